"""Tau-leaping: every site jumps as often as a Poisson process with its frozen rates.

A token is no number, so jumps of one site do not add up, and a convention is needed for more than one.

References: Gillespie (2001); tau-LDR (Campbell et al., 2022).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.samplers.leap import Leap

__all__ = ["TauLeaping"]

Several = Literal["last", "reject"]


@dataclass(frozen=True)
class TauLeaping(Leap):
    """Poisson jumps with frozen rates; one denoiser call a step, order 1.

    Args:
        several: what more than one jump of a site does. "last": it ends where the last one led, P(r) = 1 - exp(-r).
            "reject": it stays, P(r) = r exp(-r), as tau-LDR does on data that is not ordinal.

    Raises:
        ValueError: for another convention.
    """

    several: Several = "last"
    order = 1.0

    def __post_init__(self) -> None:
        if self.several not in get_args(Several):
            raise ValueError(f"TauLeaping: several must be 'last' or 'reject', got {self.several!r}")

    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        if self.several == "reject":
            return torch.where(rate < torch.inf, rate * torch.exp(-rate), 0.0)
        return self.bound(rate)

    def bound(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        return -torch.expm1(-rate)
