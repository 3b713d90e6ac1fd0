r"""Ancestral sampling: the exact one-site reverse marginal, at every site at once.

    p(z_s^i | z_t) = q(z_t^i | z_s^i) (O Q_s)(z_s^i) / (O Q_t)(z_t^i)

with O the leave-one-out denoiser: "keep z_t, or redraw from alpha_s O + (1 - alpha_s) pi". Where to redraw is
decided first, by a bound that needs no logits, and then accepted against the true probability; on a masked process
the bound is the probability. Where noise depends on the token it replaces there is no such split, and the whole row is
drawn. The error is that sites are moved independently: order 1 in total variation, none
for one site.

References: D3PM (Austin et al., 2021); MDLM (Sahoo et al., 2024); UDLM (Schiff et al., 2025); Uniform Diffusion
    Models Revisited (2026).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from discdiff.distributions import Coins, Tokens, report
from discdiff.handlers import At, choose
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Predictor
from discdiff.prediction import Prediction
from discdiff.process import Survival
from discdiff.rank_one import Masked, RankOne
from discdiff.samplers.redraw import redraw
from discdiff.state import State

__all__ = ["Ancestral", "reverse_step", "reverse_tokens"]


@dataclass(frozen=True)
class Ancestral(Predictor):
    """The reverse bridge with the LOO plugged in; one denoiser call a step, order 1."""

    order = 1.0

    def __call__(self, state: State, at: At) -> State:
        if at.fused and isinstance(at.process, RankOne) and at.process.anchor(state.tokens) is None:
            prediction = at.predict(state)
            rows = prediction.loo_everywhere()
            if rows is not None:
                return _fused(state, rows, at)
            state = replace(state, seen=prediction)
        return reverse_step(state, state.free, at)


def reverse_step(
    state: State, free: Bool[Tensor, "B L"], at: At, look: float | None = None, to: float | None = None
) -> State:
    """Draw the chosen sites from their reverse marginals, from the state's time to another.

    Args:
        state: where it starts.
        free: (B, L) the sites that may move.
        at: where the operator stands.
        look: the time the denoiser is told; the state's own if None.
        to: the time it ends; that of ``at`` if None.
    """
    s = at.s if to is None else to
    return state.at(reverse_tokens(state, free, at, at.alpha(state.t), at.alpha(s), lambda: at.predict(state, look)), s)


def reverse_tokens(
    state: State,
    free: Bool[Tensor, "B L"],
    at: At,
    alpha_t: Survival,
    alpha_s: Survival,
    predict: Callable[[], Prediction],
) -> Int[Tensor, "B L"]:
    """The draw itself, between two survivals; sites "where", "accept", "data", "token", "noise".

    If no site can change, ``predict`` is not called.
    """
    process, z = at.process, state.tokens
    if not isinstance(process, RankOne):
        return choose("state", Tokens(predict().reverse(free, alpha_s, alpha_t), z), state, at)
    where = choose("where", Coins(process.candidate(z, alpha_t, alpha_s).where(free, 0.0)), state, at)
    if not bool(where.any()):
        return z
    if isinstance(process, Masked):  # a mask is no token: its bound is attained, and only what becomes data is asked
        return redraw(state, where, predict, alpha_s, at).tokens
    prediction = predict().read(where)
    accept = process.acceptance(prediction.log_own(where), z, alpha_t)
    where = choose("accept", Coins(torch.where(where, accept, 0.0)), state, at)
    return redraw(state, where, prediction, alpha_s, at).tokens


def _fused(state: State, rows: kernels.Rows, at: At) -> State:
    """The choices of a step as kernels, token for token: where, accept, data, token, noise."""
    process, z = at.process, state.tokens
    assert isinstance(process, RankOne)
    bound = process.candidate(z, at.alpha(state.t), at.alpha(at.s)).where(state.free, 0.0)
    keys = [at.run.key(name, state, at.step, at.slot) for name in ("where", "accept", "data", "token", "noise")]
    noise = process.noise(z.device)
    odds = None if isinstance(process, Masked) else process.odds(z, at.alpha(state.t)).flatten()
    what = kernels.Step(
        tokens=z.flatten(),
        ids=state.rows.repeat_interleave(z.shape[1], output_size=z.numel()),
        positions=torch.arange(z.shape[1], device=z.device).repeat(len(z)),
        bound=bound.flatten(),
        odds=odds,
        kept=process.sitewise(at.alpha(at.s), z).flatten(),
        noise=noise.cumulated,
        last=noise.last,
        seed=keys[0].seed,
        step=keys[0].step,
        tags=(keys[0].tag, keys[1].tag, keys[2].tag, keys[3].tag, keys[4].tag),
    )
    tokens, wrong = kernels.step(rows, what)
    report(keys[3], wrong.view(z.shape), "logits without mass, or with a NaN or +inf")
    return state.at(tokens.view(z.shape), at.s)
