r"""Schedules: the survival probability alpha(t) of a clean token, from alpha(0) = 1 down to alpha(1).

The losses and laws depend on time only through alpha. The noise rate is beta(t) = -alpha'(t) / alpha(t), and
sigma(t) = -log alpha(t).

Times and survival probabilities are float64: floats map to floats, tensors to tensors of the same shape. ``PerSite``
gives every position its own schedule; then the last axis of the result is the position.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import number, real, shown

__all__ = [
    "Cosine", "FromFunction", "Geometric", "Linear", "LogLinear", "Moment", "PerSite", "Polynomial", "Schedule",
    "Sigmoid", "Time", "as_schedule", "learned", "site_time",
]  # fmt: skip

Time = float | Tensor
T = TypeVar("T", float, Tensor)


class Schedule(ABC):
    """A decreasing alpha: [0, 1] -> [0, 1] with alpha(0) = 1, its derivative and its inverse.

    A subclass defines all three for float64 tensors. This class checks ranges, converts floats and gives sigma.

    Attributes:
        sites: the number of positions if each has its own schedule, or None if all share one.
    """

    sites: int | None = None

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha_derivative(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, alpha: Tensor) -> Tensor: ...

    def check_length(self, length: int) -> None:
        """Raise ValueError if every position has its own schedule and their number is not ``length``."""
        if self.sites not in (None, length):
            raise ValueError(f"{self} has clocks for sequences of length {self.sites}, got length {length}")

    def alpha(self, t: T) -> T:
        """Return alpha(t), the probability that a token is still clean at time t.

        Raises:
            ValueError: if a time lies outside [0, 1].
        """
        return self._apply(self.survival, t, "time t", 0.0)

    def survival(self, t: Tensor) -> Tensor:
        """Return alpha(t) for float64 times without a range check, so that a GPU is not synchronised.

        Where alpha is 0 or 1, gradients in t and in the parameters of the schedule are set to 0.
        """
        alpha = self._alpha(t)
        return torch.where((alpha == 0) | (alpha == 1), alpha.detach(), alpha) if alpha.requires_grad else alpha

    def alpha_derivative(self, t: T) -> T:
        """Return the derivative alpha'(t) <= 0; raises ValueError for a time outside [0, 1]."""
        return self._apply(self._alpha_derivative, t, "time t", 0.0)

    def time(self, alpha: T) -> T:
        """Return the time t at which alpha(t) equals ``alpha``.

        A tensor result is differentiable in ``alpha`` and in the parameters of the schedule, by
        dt = (dalpha - d_theta alpha(t)) / alpha'(t).

        Raises:
            ValueError: if ``alpha`` lies outside [alpha(1), 1].
        """
        with torch.no_grad():
            least = self._alpha(torch.ones((), dtype=torch.float64))
            time = self._apply(self._time, alpha, "alpha", float(least.min()))
        if not torch.is_grad_enabled() or not isinstance(alpha, Tensor):
            return time
        apart = alpha - self.survival(time)
        if not apart.requires_grad:
            return time
        slope = self.alpha_derivative(time).detach()
        inside = (alpha > 0) & (alpha < 1) & (slope < 0) & (slope > -torch.inf)
        return time + torch.where(inside, (apart - apart.detach()) / slope.where(inside, -1.0), 0.0)

    def sigma(self, t: T) -> T:
        """Return sigma(t) = -log alpha(t), the total noise; infinite where alpha is 0."""
        alpha = self.alpha(t)
        if isinstance(alpha, Tensor):
            return -alpha.log()
        return -math.log(alpha) if alpha > 0 else math.inf

    def _apply(self, formula: Callable[[Tensor], Tensor], x: T, name: str, low: float) -> T:
        tensor = _as_times(x, name)
        # NaN fails both comparisons, so it is refused too.
        if not bool(((tensor >= low) & (tensor <= 1)).all()):
            raise ValueError(f"{name} must lie in [{low:g}, 1], got {x}")
        value = formula(tensor)
        if isinstance(x, Tensor) or self.sites is not None:  # per-site schedules give a row even for one time
            return value  # type: ignore[return-value]
        return float(value.detach())


@dataclass(frozen=True)
class Linear(Schedule):
    """Linear schedule, alpha(t) = 1 - t."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def _time(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


@dataclass(frozen=True)
class LogLinear(Schedule):
    """Schedule alpha(t) = 1 - (1 - eps) t, whose total noise sigma(1) = -log eps is finite.

    Raises ValueError unless 0 < eps < 1. Reference: SEDD (Lou et al., 2024, https://arxiv.org/abs/2310.16834)."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", real(self.eps, "LogLinear: eps", "(0, 1)"))

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.eps - 1)

    def _time(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha) / (1 - self.eps)).clamp(max=1.0)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Cosine schedule, alpha(t) = cos(pi t / 2), written sin(pi (1 - t) / 2) so that alpha(1) is exactly 0."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def _time(self, alpha: Tensor) -> Tensor:
        return torch.acos(alpha) * (2 / math.pi)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """Schedule alpha(t) = 1 - t^k.

    It is linear for k = 1, and adds most noise late for k > 1. Raises ValueError unless k > 0.
    Reference: MD4 (Shi et al., 2024, https://arxiv.org/abs/2406.04329)."""

    k: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", real(self.k, "Polynomial: k", "(0, inf)"))

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.k

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -self.k * t ** (self.k - 1)

    def _time(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) ** (1 / self.k)


@dataclass(frozen=True)
class Geometric(Schedule):
    """Schedule alpha(t) = exp(-(sigma(t) - sigma(0))) with sigma(t) = smin^(1-t) smax^t, so that alpha(0) = 1.

    Raises ValueError unless 0 < smin < smax. Reference: SEDD (Lou et al., 2024, https://arxiv.org/abs/2310.16834).
    """

    smin: float = 1e-3
    smax: float = 20.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "smin", real(self.smin, "Geometric: smin", "(0, inf)"))
        object.__setattr__(self, "smax", real(self.smax, "Geometric: smax", "(0, inf)"))
        if not self.smin < self.smax:
            raise ValueError(f"Geometric: needs 0 < smin < smax, got smin = {self.smin}, smax = {self.smax}")

    def _total(self, t: Tensor) -> Tensor:
        return self.smin * (self.smax / self.smin) ** t

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.smin - self._total(t))

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -math.log(self.smax / self.smin) * self._total(t) * self._alpha(t)

    def _time(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha.log() / self.smin).log() / math.log(self.smax / self.smin)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """Schedule from a logistic curve of steepness k, scaled to run from 1 to 0.

    Raises ValueError unless 0 < k <= 60. Reference: Jabri et al., 2022, https://arxiv.org/abs/2212.11972.
    """

    k: float = 6.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", real(self.k, "Sigmoid: k", "(0, 60]"))

    def _alpha(self, t: Tensor) -> Tensor:
        # With tanh instead of the logistic the ends are exact by symmetry.
        alpha = (1 - torch.tanh(self.k / 2 * (t - 0.5)) / math.tanh(self.k / 4)) / 2
        return torch.where(t == 0, 1.0, torch.where(t == 1, 0.0, alpha)).clamp(0.0, 1.0)

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -self.k / 4 / math.tanh(self.k / 4) / torch.cosh(self.k / 2 * (t - 0.5)) ** 2

    def _time(self, alpha: Tensor) -> Tensor:
        return (0.5 + torch.atanh((1 - 2 * alpha) * math.tanh(self.k / 4)) * 2 / self.k).clamp(0.0, 1.0)


@dataclass(frozen=True)
class FromFunction(Schedule):
    """Schedule from any decreasing function; its derivative comes from autograd, its inverse from bisection.

    Args:
        function: t -> alpha, elementwise on tensors, written with torch so that it can be differentiated.

    Raises:
        ValueError: if alpha(0) is not 1, or alpha is not strictly decreasing within [0, 1] on a grid of 1001 times.
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        try:
            with torch.no_grad():
                alpha = self.function(t)
        except Exception as error:
            raise ValueError(
                f"schedule: the function fails on a float64 tensor of times: {error}; use torch's functions"
            ) from error
        if not isinstance(alpha, Tensor) or alpha.shape != t.shape or alpha.dtype != t.dtype:
            raise ValueError("schedule: the function must map a float64 tensor of times to one of equal shape")
        if abs(float(alpha[0]) - 1) > 1e-12:
            raise ValueError(f"schedule: alpha(0) must be 1, got {float(alpha[0])}")
        rising = ~(alpha.diff() < 0)  # this also refuses NaN
        if bool(rising.any()):
            k = int(rising.nonzero()[0])
            raise ValueError(
                "schedule: alpha must be strictly decreasing, but "
                f"alpha({float(t[k]):g}) = {float(alpha[k]):g} and alpha({float(t[k + 1]):g}) = {float(alpha[k + 1]):g}"
            )
        if float(alpha[-1]) < 0:
            raise ValueError(f"schedule: alpha must stay in [0, 1], got alpha(1) = {float(alpha[-1])}")

    def _alpha(self, t: Tensor) -> Tensor:
        return self.function(t)

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and self.function(t).requires_grad
        with torch.enable_grad():
            variable = t if t.requires_grad else t.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(variable).sum(), variable, create_graph=wanted)
        return slope

    def _time(self, alpha: Tensor) -> Tensor:
        low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
        for _ in range(60):
            middle = (low + high) / 2
            later = self.function(middle) > alpha
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return torch.where(alpha >= 1, 0.0, (low + high) / 2)


class PerSite(Schedule):
    r"""Schedule with a power for every position, alpha_i(t) = alpha(t)^{power_i}; the powers may be learned.

    Each alpha_i decreases from 1; it ends at 0 if the base schedule does. Gradients flow to ``log_power``, so it may be
    a parameter trained with the loss, similar to MULAN (Sahoo et al., 2024, https://arxiv.org/abs/2312.13236).

    Args:
        base: the schedule alpha(t).
        log_power: (L,) finite logarithms of the powers; anything else raises TypeError or ValueError.
    """

    def __init__(self, base: Schedule, log_power: Float[Tensor, " L"]) -> None:
        if not isinstance(base, Schedule) or base.sites is not None:
            raise TypeError(f"PerSite: base must be a schedule that all positions share, got {shown(base)}")
        if not isinstance(log_power, Tensor) or log_power.ndim != 1 or len(log_power) < 1:
            raise TypeError(f"PerSite: log_power must be a tensor (L,), got {shown(log_power)}")
        if not log_power.is_floating_point() or not bool(torch.isfinite(log_power).all()):
            raise ValueError(f"PerSite: log_power must hold finite logarithms, got {shown(log_power)}")
        self.base: Schedule = base
        self.log_power: Tensor = log_power
        self.sites: int = len(log_power)

    @property
    def _power(self) -> Tensor:
        return self.log_power.double().exp()

    def _alpha(self, t: Tensor) -> Tensor:
        return self.base._alpha(t) ** self._power.to(t.device)

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        power = self._power.to(t.device)
        return power * self.base._alpha(t) ** (power - 1) * self.base._alpha_derivative(t)

    def _time(self, alpha: Tensor) -> Tensor:
        return self.base._time((alpha ** (1 / self._power.to(alpha.device))).clamp(min=self._least()))

    def _least(self) -> float:
        return float(self.base._alpha(torch.ones((), dtype=torch.float64)))

    def __repr__(self) -> str:
        return f"PerSite({self.base}, {self.sites} sites)"


class Moment(float):
    """A time found from a learned schedule: a float that also holds the time as a differentiable tensor (1, 1)."""

    tensor: Tensor

    @classmethod
    def of(cls, tensor: Float[Tensor, "1 1"]) -> "Moment":
        """Make a ``Moment`` from a tensor (1, 1)."""
        moment = cls(tensor.detach())
        moment.tensor = tensor
        return moment


def learned(time: Time) -> Time:
    """Return the differentiable tensor of a ``Moment``, and any other time unchanged."""
    return time.tensor if isinstance(time, Moment) else time


def _as_times(x: object, name: str) -> Tensor:
    """Return a number, or a tensor of numbers, as a float64 tensor."""
    if isinstance(x, Tensor) and x.dtype != torch.bool and not x.is_complex():
        return x.double()
    return torch.tensor(number(x, name, "a float, or a tensor of them"), dtype=torch.float64)


def site_time(t: Time, batch: int, length: int) -> Float[Tensor, "#B #L"]:
    """Return ``t`` as a float64 tensor that broadcasts with (B, L): of shape (1, 1), (B, 1) or (B, L).

    Raises:
        ValueError: if ``t`` is a tensor of another shape.
    """
    tensor = _as_times(t, "time t")
    if tensor.ndim == 0:
        return tensor[None, None]
    if tensor.shape == (batch,):
        return tensor[:, None]
    if tensor.shape == (batch, length):
        return tensor
    raise ValueError(f"time t must be a float, ({batch},) or ({batch}, {length}), got shape {tuple(tensor.shape)}")


def as_schedule(schedule: object) -> Schedule:
    """Return a Schedule unchanged, or make one from a decreasing function of time.

    Raises:
        TypeError: if ``schedule`` is neither a Schedule nor a function.
        ValueError: if the function does not decrease strictly from 1 within [0, 1].
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, type) or not callable(schedule):
        hint = "; it is a class: add ()" if isinstance(schedule, type) else ""
        raise TypeError(
            f"schedule must be a Schedule such as Linear(), or a function of time such as lambda t: (1 - t) ** 2, "
            f"got {shown(schedule)}{hint}"
        )
    return FromFunction(schedule)
