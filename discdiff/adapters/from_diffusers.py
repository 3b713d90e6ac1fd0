r"""A discrete scheduler of diffusers as an operator, which runs in our sampler with its own code.

The scheduler's ``step`` runs unchanged; its draws are made by ``choose`` (``torch_draws``). They are keyed by row and,
if they are multinomials and integers, enumerated. So ``T.kernel`` and ``T.law`` are exact for it, and
``T.check_operator`` checks its claims. A step that draws by ``torch.rand`` needs ``enumerable=False`` and is tested by
chi-square.

A scheduler's step n of N equal ones goes from t = 1 - n/N to 1 - (n+1)/N and has its own survival probability there;
``Linear()`` is that of ``DiscreteDDIMScheduler``. diffusers is not imported: any object with these methods works.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from discdiff.adapters.torch_draws import Answered
from discdiff.operator import At, Corrector, Invariance, Operator, Predictor, State
from discdiff.process import Linear, Process

__all__ = ["SchedulerCorrection", "SchedulerStep"]

_MOST_STEPS = 4096


@dataclass(frozen=True, eq=False)
class _Scheduled(Operator):
    """Common part of both operators.

    Args:
        scheduler: a scheduler of diffusers; it is copied before every step, and never changed.
        options: further arguments of its step, such as {"temperature": 1.0}.
        process: the kind of process it supports.
        enumerable: False if it draws by ``torch.rand``.
    """

    scheduler: Any
    options: Mapping[str, object] = field(default_factory=dict)
    process: type[Process] = field(default=Process, kw_only=True)  # type: ignore[type-abstract]
    enumerable: bool = field(default=True, kw_only=True)

    _needs = ("set_timesteps", "step")

    def __post_init__(self) -> None:
        lacking = [name for name in self._needs if not callable(getattr(self.scheduler, name, None))]
        if lacking:
            kind = type(self.scheduler).__name__
            raise TypeError(f"{type(self).__name__}: needs a discrete scheduler, and {kind} has no {lacking[0]}()")

    def check(self, process: Process) -> None:
        if not isinstance(process, self.process):
            raise ValueError(f"{self} is for {self.process.__name__}, got {process}")
        if process.schedule != Linear():
            raise ValueError(f"{self}: a scheduler's survival falls linearly, give the process Linear(); got {process}")

    def _prepared(self, steps: int, settings: Mapping[str, object]) -> Any:  # noqa: ANN401
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, **settings)
        return scheduler

    def _tokens(self, step: Callable[..., Any], timestep: int | Tensor, state: State, at: At) -> Tensor:
        """Return the tokens after a step from a state; given sites keep theirs."""
        scheduler = step.__self__  # type: ignore[attr-defined]
        said, before = at.predict(state).denoiser, dict(vars(scheduler))
        with Answered(state, at):
            tokens = step(said, timestep, state.tokens.clone(), **self.options).prev_sample
        kept = sorted(name for name, value in vars(scheduler).items() if value is not before.get(name))
        if kept:
            raise ValueError(
                f"{self}: the scheduler keeps {', '.join(kept)} for its next step, which then depends on more than the "
                "tokens; it is no kernel on them"
            )
        at.process.check_states(tokens, f"what {self} returns")
        return torch.where(state.free, tokens, state.tokens)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({type(self.scheduler).__name__}{options})"


@dataclass(frozen=True, eq=False, repr=False)
class SchedulerStep(_Scheduled, Predictor):
    """Run ``scheduler.step`` from t to s, which must be one of N equal steps; one denoiser call.

    Args:
        scheduler, options, process, enumerable: as in ``SchedulerCorrection``; the options are those of ``step``.
        settings: further arguments of ``set_timesteps``.
        numbered: whether ``step`` takes the number n, as in block pipelines, instead of ``timesteps[n]``.
        order: its claimed order.

    Raises:
        ValueError: in a call, for an interval that is not one of N equal steps, a scheduler with internal state, or
            draws that cannot be keyed.
    """

    settings: Mapping[str, object] = field(default_factory=dict, kw_only=True)
    numbered: bool = field(default=True, kw_only=True)
    order: float | None = field(default=None, kw_only=True)

    def __call__(self, state: State, at: At) -> State:
        steps = round(1 / (at.t - at.s))
        number = round((1 - at.t) * steps)
        if abs((at.t - at.s) * steps - 1) > 1e-6 or abs((1 - at.t) * steps - number) > 1e-6:
            raise ValueError(
                f"{self}: diffusers' steps are N equal ones of t from 1 to 0, and [{at.t:g}, {at.s:g}] is none of them"
            )
        scheduler = self._prepared(steps, self.settings)
        timestep = number if self.numbered else scheduler.timesteps[number]
        return state.at(self._tokens(scheduler.step, timestep, state, at), at.s)


@dataclass(frozen=True, eq=False, repr=False)
class SchedulerCorrection(_Scheduled, Corrector):
    """Run ``scheduler.step_correct`` at the state's time t = 1 - (n+1)/N, between 0 and 1; one denoiser call.

    At t = 0 it does nothing, because no step of a scheduler begins there.

    Args:
        scheduler: a scheduler of diffusers; it is copied before every call, and never changed.
        options: further arguments of ``step_correct``.
        process: the kind of process that the scheduler supports.
        enumerable: False if the scheduler draws by ``torch.rand``.
        invariant: whether the corrector claims to keep p_t: "exact", "approximate" or "none"; None for no claim.

    Raises:
        ValueError: in a call, at t = 1, or at a time that is no such fraction for any N up to 4096.
    """

    invariant: Invariance | None = field(default=None, kw_only=True)
    _needs = ("set_timesteps", "step_correct")

    def __call__(self, state: State, at: At) -> State:
        if state.t == 0:
            return state
        alpha = Fraction(1 - state.t).limit_denominator(_MOST_STEPS)
        if not 0 < alpha < 1 or abs(float(alpha) - (1 - state.t)) > 1e-9:
            raise ValueError(f"{self}: t must be a fraction n/N strictly between 0 and 1, got {state.t:g}")
        scheduler = self._prepared(alpha.denominator, {})
        return state.at(self._tokens(scheduler.step_correct, alpha.numerator - 1, state, at))
