r"""Schedules: the survival probability alpha(t) of a clean token, from alpha(0) = 1 down to alpha(1).

Losses and laws depend on time only through alpha, so a schedule is only a clock. The noise rate is
beta(t) = -alpha'(t) / alpha(t), and sigma(t) = -log alpha(t).

Times and survivals are float64: a float goes in and comes out, or a tensor of any shape.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Cosine", "Linear", "LogLinear", "Schedule", "Time"]

Time = float | Tensor
T = TypeVar("T", float, Tensor)


class Schedule(ABC):
    """A decreasing alpha: [0, 1] -> [0, 1] with alpha(0) = 1, its derivative and its inverse.

    A subclass writes the three formulas for float64 tensors; ranges, floats and sigma come from here.
    """

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha_derivative(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, alpha: Tensor) -> Tensor: ...

    def alpha(self, t: T) -> T:
        """alpha(t), the probability that a token is still clean at time t.

        Raises:
            ValueError: if a time lies outside [0, 1].
        """
        return _apply(self._alpha, t, "time t", 0.0)

    def alpha_derivative(self, t: T) -> T:
        """alpha'(t), per unit of time; negative."""
        return _apply(self._alpha_derivative, t, "time t", 0.0)

    def time(self, alpha: T) -> T:
        """The t at which alpha(t) equals ``alpha``.

        Raises:
            ValueError: if ``alpha`` lies outside [alpha(1), 1].
        """
        return _apply(self._time, alpha, "alpha", float(self._alpha(torch.ones((), dtype=torch.float64))))

    def sigma(self, t: T) -> T:
        """sigma(t) = -log alpha(t), the total noise; infinite where alpha is 0."""
        alpha = self.alpha(t)
        if isinstance(alpha, Tensor):
            return -alpha.log()
        return -math.log(alpha) if alpha > 0 else math.inf


def _apply(formula: Callable[[Tensor], Tensor], x: T, name: str, low: float) -> T:
    tensor = torch.as_tensor(x, dtype=torch.float64)
    # NaN fails both comparisons, so it is refused too.
    if not bool(((tensor >= low) & (tensor <= 1)).all()):
        raise ValueError(f"{name} must lie in [{low:g}, 1], got {x}")
    value = formula(tensor)
    return value if isinstance(x, Tensor) else float(value)


@dataclass(frozen=True)
class Linear(Schedule):
    """alpha(t) = 1 - t."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def _time(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


@dataclass(frozen=True)
class LogLinear(Schedule):
    """alpha(t) = 1 - (1 - eps) t, so that sigma(1) = -log eps is finite (Lou et al., SEDD, 2024)."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"LogLinear: eps must lie in (0, 1), got {self.eps}")

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.eps - 1)

    def _time(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha) / (1 - self.eps)).clamp(max=1.0)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha(t) = cos(pi t / 2), written sin(pi (1 - t) / 2) so that alpha(1) is exactly 0."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def _time(self, alpha: Tensor) -> Tensor:
        return torch.acos(alpha) * (2 / math.pi)
