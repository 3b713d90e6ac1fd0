r"""Draw every site independently from its exact reverse marginal (ancestral sampling).

    p(z_s^i | z_t) = q(z_t^i | z_s^i) (O Q_s)(z_s^i) / (O Q_t)(z_t^i)

O is the leave-one-out prediction and Q_s the forward transition from time 0 to s. On a process of constant noise pi
this law keeps z_t or redraws the site from alpha_s O + (1 - alpha_s) pi. Sites are proposed with a bound on the
probability of a redraw; the bound needs no logits. They are accepted with the true probability divided by the bound; on
a masked process the two are equal. On a process that is not rank-one the new state is drawn from a whole row of
probabilities. The only error comes from moving sites independently of each other. It has order 1 in total variation,
and is 0 for a single site.

References: D3PM (Austin et al., 2021, https://arxiv.org/abs/2107.03006); MDLM (Sahoo et al., 2024,
https://arxiv.org/abs/2406.07524); UDLM (Schiff et al., 2025, https://arxiv.org/abs/2412.10193); Uniform Diffusion
Models Revisited (2026, https://arxiv.org/abs/2605.22765).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Coins, Tokens, spread
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import RankOne, Survival
from discdiff.samplers._redraw import fused_step, redraw

__all__ = ["Ancestral", "reverse_step", "reverse_tokens"]


@dataclass(frozen=True)
class Ancestral(Predictor):
    """Draw each site at s from the bridge q(z_s | z_t, x0), with the leave-one-out prediction in place of x0.

    A step makes at most one denoiser call. The method has order 1.
    """

    order: ClassVar[float | None] = 1.0

    def __call__(self, state: State, at: At) -> State:
        return reverse_step(state, state.free, at)


def reverse_step(
    state: State, where: Bool[Tensor, "B L"], at: At, look: float | None = None, to: float | None = None
) -> State:
    """Draw the chosen sites from their reverse marginals at an earlier time, and return the state there.

    Args:
        state: the state at the start.
        where: (B, L) the chosen sites.
        at: the process, run and address of the operator.
        look: the time given to the denoiser; the state's time if None.
        to: the time at the end; ``at.s`` if None.
    """
    s, told = at.s if to is None else to, state if look is None else replace(state, t=look, seen=None)
    return state.at(reverse_tokens(told, where, at.alpha(state.t), at.alpha(s), at), s)


def reverse_tokens(
    state: State, where: Bool[Tensor, "B L"], alpha_t: Survival, alpha_s: Survival, at: At
) -> Int[Tensor, "B L"]:
    """Draw the chosen sites from their reverse marginals between alpha_t and alpha_s, and return all tokens (B, L).

    Random choices: "where", "accept", "data", "token", "noise" on rank-one processes, "state" on other ones. On a
    rank-one process the denoiser is not called if no site is proposed, except in a fused step on a GPU.
    """
    process, z = at.process.rank_one, state.tokens
    if process is None:
        return choose("state", Tokens(at.predict(state)[where].reverse(alpha_s, alpha_t), z), state, at)
    bound = process.candidate(z, alpha_t, alpha_s).where(where, 0.0)
    if at.fused and kernels.steps_whole(z.device) and process.anchor(z) is None:
        said = at.predict(state)
        done = fused_step(state, said, alpha_s, at, bound=bound, odds=_odds(process, z, alpha_t))
        if done is not None:
            return done
        state = replace(state, seen=said)
    where = choose("where", Coins(bound), state, at)
    if not bool(where.any()):
        return z
    if process.masks:  # the bound is exact; the prediction is needed only at sites that become data
        return redraw(state, where, alpha_s, at)
    said = at.predict(state)
    done = fused_step(state, said, alpha_s, at, where=where, odds=_odds(process, z, alpha_t))
    if done is not None:
        return done
    state, view = replace(state, seen=said), said[where]
    accept = process.acceptance(spread(view.own, where, 0.0), z, alpha_t)
    where = choose("accept", Coins(torch.where(where, accept, 0.0)), state, at)
    return redraw(state, where, alpha_s, at, replace(view.loo, reading=view.reading))


def _odds(process: RankOne, z: Int[Tensor, "B L"], alpha_t: Survival) -> Float[Tensor, "B L"] | None:
    """Return the noise odds of each site's token, from which follows the probability that a proposed site is accepted.

    None on a masked process, where every proposed site is accepted.
    """
    return None if process.masks else process.odds(z, alpha_t)
