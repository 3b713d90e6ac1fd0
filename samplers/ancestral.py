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
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.distributions import Coins, Tokens
from discdiff.handlers import At, choose
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Predictor
from discdiff.prediction import Prediction
from discdiff.process import Survival
from discdiff.rank_one import Masked, RankOne
from discdiff.samplers.redraw import fused_step, redraw
from discdiff.state import State

__all__ = ["Ancestral", "given", "reverse_step", "reverse_tokens"]


@dataclass(frozen=True)
class Ancestral(Predictor):
    """The reverse bridge with the LOO plugged in; one denoiser call a step, order 1."""

    order = 1.0

    def __call__(self, state: State, at: At) -> State:
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
    if isinstance(process, Masked):  # a mask is no token: its bound is attained, and only what becomes data is asked
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
    """The noise odds by which candidates are accepted; None where all are."""
    return None if isinstance(process, Masked) else process.odds(z, alpha_t)


def given(seen: Prediction) -> Prediction:
    """The prediction that has been made: with ``partial``, one that need not be asked for."""
    return seen
