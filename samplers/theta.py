r"""Take steps with rates from two states, in two stages: the theta-RK-2 and theta-trapezoidal methods.

    stage 1     leap from x over the fraction theta of the step, with the rates R_0 at x, to y
    trapezoid   leap from y over the rest with        (a R_y - (a - 1) R_0)_+,    a = 1 / (2 theta (1 - theta))
    RK-2        leap from x over the whole step with  (R_y / (2 theta) + (1 - 1 / (2 theta)) R_0)_+

R_y are the rates at y. The trapezoid has order 2 while no rate is clipped, which needs
R_y / R_0 >= (1 - theta)^2 + theta^2. If tokens are strongly coupled, a jump makes others much less likely, and the
order falls to 1. RK-2 leaps again from x, so it discards the moves of stage 1; it has order 1 in law for every theta.

References: Ren et al. (2025, https://arxiv.org/abs/2502.00234); Hu, Li and Min (2011,
https://doi.org/10.1063/1.3609119); Anderson and Koyama (2012, https://arxiv.org/abs/1102.2922).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from discdiff.checks import real
from discdiff.operator import At, Predictor, Staged, State
from discdiff.samplers._extrapolated import combined_leap, share
from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.tau_leaping import TauLeaping

__all__ = ["ThetaRK2", "ThetaTrapezoidal"]


def _singular(at: At) -> bool:
    """Return whether rates are infinite at the start or end of the step; such a step is ancestral."""
    return at.s == 0 or (at.t == 1 and not at.process.absorbing)


@dataclass(frozen=True)
class _First(Predictor):
    """Tau-leap over the fraction theta of the step: stage 1 of both methods."""

    theta: float

    def __call__(self, state: State, at: At) -> State:
        if _singular(at):
            return replace(state, past=None)
        time, _, _ = share(state, self.theta, at)
        seen = at.predict(state)
        moved = TauLeaping()(replace(state, seen=seen), replace(at, s=time))
        return moved.after(state, seen)


@dataclass(frozen=True)
class _Second(Predictor):
    theta: float
    trapezoidal: bool

    def __call__(self, state: State, at: At) -> State:
        start = state.past
        assert start is not None  # ensured by Staged
        if _singular(at):
            return Ancestral()(replace(state, past=None), at)
        _, done, left = share(start, self.theta, at)
        late, early = at.predict(state), at.predict(start)
        theta = done / (done + left)
        if self.trapezoidal:
            return combined_leap(state, late, early, 1 / (2 * theta * (1 - theta)), left, at)
        return combined_leap(start.at(start.tokens), late, early, 1 / (2 * theta), done + left, at)


@dataclass(frozen=True)
class ThetaTrapezoidal(Staged):
    """Apply the theta-trapezoidal rule; two denoiser calls a step.

    It has order 2 while no rate is clipped at 0. If tokens are strongly coupled, rates are clipped and the order is 1.

    Args:
        theta: the fraction of the step at which the second call is made, in (0, 1).

    Raises:
        ValueError: for theta outside (0, 1).
    """

    theta: float = 0.5
    order: ClassVar[float | None] = 1.0
    weighable = False  # a rate may be clipped to 0 under one prediction alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", real(self.theta, "ThetaTrapezoidal: theta", "(0, 1)"))

    @property
    def stages(self) -> tuple[Predictor, Predictor]:
        return _First(self.theta), _Second(self.theta, trapezoidal=True)


@dataclass(frozen=True)
class ThetaRK2(Staged):
    """Apply the theta-RK-2 rule; two denoiser calls a step.

    It has order 1 in law for every theta.

    Args:
        theta: the fraction of the step at which the second call is made, in (0, 1]; 1/2 is the midpoint method.

    Raises:
        ValueError: for theta outside (0, 1].
    """

    theta: float = 0.5
    order: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", real(self.theta, "ThetaRK2: theta", "(0, 1]"))

    @property
    def weighable(self) -> bool:
        return self.theta >= 0.5  # else a rate may be clipped to 0 under one prediction alone

    @property
    def stages(self) -> tuple[Predictor, Predictor]:
        return _First(self.theta), _Second(self.theta, trapezoidal=False)
