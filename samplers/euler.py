"""Let a site jump with probability rate times step length, at most 1 (the Euler method).

References: SEDD (Lou et al., 2024, https://arxiv.org/abs/2310.16834); discrete flow matching (Gat et al., 2024,
https://arxiv.org/abs/2407.15595).
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from discdiff.samplers._leap import Leap

__all__ = ["Euler"]


@dataclass(frozen=True)
class Euler(Leap):
    """Let each site jump with probability min(R d, 1), with R its total rate and d the step length in alpha.

    A step makes one denoiser call. The method has order 1. On masked processes it equals ``Ancestral``.
    """

    order: ClassVar[float | None] = 1.0
    weighable = False  # a jump has probability 1 where its rate is large, under one prediction alone

    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        return rate.clamp(max=1.0)
