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

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.distributions import Coins, Tokens, report
from discdiff.handlers import At, choose
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Predictor
from discdiff.rank_one import Masked, RankOne
from discdiff.samplers.redraw import redraw
from discdiff.state import State

__all__ = ["Ancestral"]


@dataclass(frozen=True)
class Ancestral(Predictor):
    """The reverse bridge with the LOO plugged in; one denoiser call a step, order 1."""

    order = 1.0

    def __call__(self, state: State, at: At) -> State:
        alpha_t, alpha_s = at.alpha(state.t), at.alpha(at.s)
        z = state.tokens
        if not isinstance(at.process, RankOne):
            reverse = at.predict(state).reverse(state.free, alpha_s)
            return state.at(choose("state", Tokens(reverse, z), state, at), at.s)
        bound = at.process.candidate(z, alpha_t, alpha_s).where(state.free, 0.0)
        prediction = at.predict(state)
        if at.fused and at.process.anchor(z) is None:
            rows = prediction.loo_everywhere()
            if rows is not None:
                return _fused(state, bound, rows, at)
        where = choose("where", Coins(bound), state, at)
        if not isinstance(at.process, Masked):  # a mask is no token, so its bound is attained
            prediction = prediction.read(where)
            accept = at.process.acceptance(prediction.log_own(where), z, alpha_t)
            where = choose("accept", Coins(torch.where(where, accept, 0.0)), state, at)
        return redraw(state.at(z, at.s), where, prediction, alpha_s, at)


def _fused(state: State, bound: Float[Tensor, "B L"], rows: kernels.Rows, at: At) -> State:
    """The choices of a step as kernels, token for token: where, accept, data, token, noise."""
    process, z = at.process, state.tokens
    assert isinstance(process, RankOne)
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
