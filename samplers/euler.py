"""Euler: a site jumps with its rate times the step's length, as long as that is a probability.

References: SEDD (Lou et al., 2024); discrete flow matching (Gat et al., 2024).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from discdiff.samplers.leap import Leap

__all__ = ["Euler"]


@dataclass(frozen=True)
class Euler(Leap):
    """P(r) = min(r, 1); one denoiser call a step, order 1. On masked processes it is ``Ancestral``."""

    order = 1.0

    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        return rate.clamp(max=1.0)
