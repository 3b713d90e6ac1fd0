"""Let every site jump as often as a Poisson process with its frozen rates does (tau-leaping).

Tokens are not numbers, so several jumps of one site do not add up, and a convention for them is needed.

References: Gillespie (2001, https://doi.org/10.1063/1.1378322); tau-LDR (Campbell et al., 2022,
https://arxiv.org/abs/2205.14987).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.samplers._leap import Leap

__all__ = ["TauLeaping"]

Several = Literal["last", "reject"]


@dataclass(frozen=True)
class TauLeaping(Leap):
    """Draw a Poisson number of jumps at each site, with rates that are frozen for a step.

    A step makes one denoiser call. The method has order 1.

    P(r) is the probability that a site moves, with r its total rate times the step length in alpha.

    Args:
        several: the effect of more than one jump of a site. "last": the site takes the state of the last jump,
            so P(r) = 1 - exp(-r). "reject": the site stays, so P(r) = r exp(-r), as in tau-LDR on data that is not
            ordinal.

    Raises:
        ValueError: for any other value of ``several``.
    """

    several: Several = "last"
    order: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        if self.several not in get_args(Several):
            raise ValueError(f"TauLeaping: several must be 'last' or 'reject', got {self.several!r}")

    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        if self.several == "reject":
            return torch.where(rate < torch.inf, rate * torch.exp(-rate), 0.0)
        return self.bound(rate)

    def bound(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        return -torch.expm1(-rate)
