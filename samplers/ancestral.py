r"""Draw every site independently from its exact reverse marginal (ancestral sampling).

    p(z_s^i | z_t) = q(z_t^i | z_s^i) (O Q_s)(z_s^i) / (O Q_t)(z_t^i)

with O the leave-one-out prediction. On a rank-one process this keeps z_t or redraws it from alpha_s O + (1 - alpha_s)
pi. The sites to redraw are proposed with a bound that needs no logits, then accepted with the true probability over the
bound; on a masked process the two are equal. On other processes the whole row of probabilities is computed and drawn
from. The error comes from moving sites independently: order 1 in total variation, no error for one site.

References: D3PM (Austin et al., 2021, https://arxiv.org/abs/2107.03006); MDLM (Sahoo et al., 2024,
https://arxiv.org/abs/2406.07524); UDLM (Schiff et al., 2025, https://arxiv.org/abs/2412.10193); Uniform Diffusion
Models Revisited (2026, https://arxiv.org/abs/2605.22765).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Coins, Tokens
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Predictor, State, choose
from discdiff.prediction import Prediction
from discdiff.process import Masked, RankOne, Survival
from discdiff.samplers._redraw import fused_step, redraw

__all__ = ["Ancestral", "given", "reverse_step", "reverse_tokens"]


@dataclass(frozen=True)
class Ancestral(Predictor):
    """Step from t to s by the bridge with the LOO in place of x0; at most one denoiser call a step, order 1."""

    order = 1.0

    def __call__(self, state: State, at: At) -> State:
        return reverse_step(state, state.free, at)


def reverse_step(
    state: State, free: Bool[Tensor, "B L"], at: At, look: float | None = None, to: float | None = None
) -> State:
    """Draw the chosen sites from their reverse marginals, from the state's time to another.

    Args:
        state: the state at the start.
        free: (B, L) the sites that may move.
        at: the process, run and address of the operator.
        look: the time given to the denoiser; the state's own if None.
        to: the time at the end; ``at.s`` if None.
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
    """Draw the chosen sites of (B, L) from their reverse marginals between survivals alpha_t and alpha_s.

    Choices "where", "accept", "data", "token", "noise" on rank-one processes, "state" on others. On a rank-one process
    ``predict`` is not called if no site is proposed, except in a fused step on a GPU.
    """
    process, z = at.process, state.tokens
    if not isinstance(process, RankOne):
        return choose("state", Tokens(predict().reverse(free, alpha_s, alpha_t), z), state, at)
    bound = process.candidate(z, alpha_t, alpha_s).where(free, 0.0)
    if at.fused and kernels.steps_whole(z.device) and process.anchor(z) is None:
        seen = predict()
        done = fused_step(state, seen, at, alpha_s, bound=bound, odds=_odds(process, z, alpha_t))
        if done is not None:
            return done
        predict = partial(given, seen)
    where = choose("where", Coins(bound), state, at)
    if not bool(where.any()):
        return z
    if isinstance(process, Masked):  # the bound is exact; the prediction is needed only at sites that become data
        return redraw(state, where, predict, alpha_s, at).tokens
    prediction = predict()
    done = fused_step(state, prediction, at, alpha_s, where=where, odds=_odds(process, z, alpha_t))
    if done is not None:
        return done
    prediction = prediction.read(where)
    accept = process.acceptance(prediction.log_own(where), z, alpha_t)
    where = choose("accept", Coins(torch.where(where, accept, 0.0)), state, at)
    return redraw(state, where, prediction, alpha_s, at).tokens


def _odds(process: RankOne, z: Int[Tensor, "B L"], alpha_t: Survival) -> Float[Tensor, "B L"] | None:
    """Return the noise odds that decide whether a proposed site is accepted; None on a masked process: all are."""
    return None if isinstance(process, Masked) else process.odds(z, alpha_t)


def given(seen: Prediction) -> Prediction:
    """Return a prediction already made: ``partial(given, seen)`` is a ``predict`` without a denoiser call."""
    return seen
