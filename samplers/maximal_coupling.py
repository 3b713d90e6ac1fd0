r"""Step by the maximal coupling of the marginals, in which a site keeps its state as often as the marginals allow.

    z_s = x0 with probability (alpha_s - alpha_t) / (1 - alpha_t), else z_s = z_t;      x0 ~ D(z_t)

This preserves every marginal q_t(. | x0), but is not the posterior of the forward process: no fresh noise is drawn. In
the limit of small steps its rates are those of flow matching, D(v) / (1 - alpha). On a masked process the step
equals ``Ancestral``.

References: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765); Gat et al. (2024,
https://arxiv.org/abs/2407.15595).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from discdiff.choices import Coins, Tokens
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import Process

__all__ = ["MaximalCoupling"]


@dataclass(frozen=True)
class MaximalCoupling(Predictor):
    """Draw each site from the bridge ``dd.bridge.MaximalCoupling``, with x0 drawn from the denoiser.

    A step makes at most one denoiser call. The method has order 1.
    """

    order: ClassVar[float | None] = 1.0

    def check(self, process: Process) -> None:
        if not process.one_noise_law:
            raise ValueError(f"MaximalCoupling needs a rank-one process with one noise law, got {process}")

    def __call__(self, state: State, at: At) -> State:
        process, z = at.process, state.tokens
        a_t, a_s = process.sitewise(at.alpha(state.t), z), process.sitewise(at.alpha(at.s), z)
        noisy = state.free & (process.inflow(z, a_t)[..., 0] > 0)
        jump = torch.where(noisy & (a_t < 1), (a_s - a_t) / (1 - a_t), 0.0)
        where = choose("where", Coins(jump), state, at)
        if not bool(where.any()):
            return state.at(z, at.s)
        token = choose("token", Tokens(at.predict(state)[where].denoiser, process.column(z)), state, at)
        return state.at(torch.where(where, process.place(token, z), z), at.s)
