r"""Sum weights of clean sequences in the domain of logs, where nothing underflows.

For weights w(x) and evidence e_i(v) of every site:

    total = sum_x w(x) prod_i e_i(x_i),    loo_i(v) = sum_{x: x_i = v} w(x) prod_{j != i} e_j(x_j)

Ratios of such sums with and without a tilt are its conditional expectations. All logs are natural.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Listed", "LogSums", "over"]

_TOGETHER = 1 << 22  # numbers of a temporary: 32 MiB


class LogSums(ABC):
    """Weights of clean sequences, to be summed with evidence."""

    @abstractmethod
    def log_total(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        """Compute the log of the total (B,) from the log evidence (B, L, n); -inf if it is 0."""

    @abstractmethod
    def log_leave_one_out(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        """Compute the log of loo (B, L, n) from the log evidence, with its scale; -inf where it is 0."""


def over(part: Float[Tensor, "*B"], whole: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return the log of the ratio of two sums, part - whole; -inf where the second is 0."""
    return torch.where(whole > -torch.inf, part - whole, -torch.inf)


class Listed(LogSums):
    """Weights of every sequence of V^L, (N,) with N = V**L, first site slowest.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(self, log_p: Float[Tensor, " N"], alphabet: int, length: int) -> None:
        if not bool((log_p > -torch.inf).any()):
            raise ValueError("no sequence of this length has positive probability and a positive weight (Z = 0)")
        self.log_p: Tensor = log_p
        self.alphabet: int = alphabet
        self.length: int = length

    def log_total(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return self._summed(log_e, None)

    def log_leave_one_out(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        return torch.stack([self._summed(log_e, site) for site in range(self.length)], 1)

    def _summed(self, log_e: Tensor, kept: int | None) -> Tensor:
        parts = log_e.split(max(1, _TOGETHER // len(self.log_p)))
        return torch.cat([self._sum_out(part, kept) for part in parts])

    def _sum_out(self, log_e: Tensor, kept: int | None) -> Tensor:
        """Contract one site after another, the last one first, but not site ``kept``."""
        total = self.log_p.view(1, *[self.alphabet] * self.length)
        for site in reversed(range(self.length)):
            if site != kept:
                axis = site + 1
                behind = total.ndim - 1 - axis  # 1 if the site that is kept lies behind this one, else 0
                total = (total + log_e[:, site].view(len(log_e), *[1] * site, self.alphabet, *[1] * behind)).logsumexp(
                    axis
                )
        return total.expand(len(log_e), *total.shape[1:])
