r"""Run a discrete scheduler of diffusers as an operator in this package's sampler.

The scheduler's ``step`` runs unchanged, but ``choose`` makes its random draws (``torch_draws``). The draws are keyed by
row. If the step draws only by ``torch.multinomial`` and ``torch.randint``, its draws can be enumerated. Then
``T.kernel`` and ``T.law`` are exact, and ``T.check_operator`` checks the operator's claims. A step that draws by
``torch.rand`` needs ``enumerable=False`` and is tested by chi-square.

Of N equal steps, step n goes from t = 1 - n/N to 1 - (n+1)/N. The scheduler and the process must both have the
survival probability of ``Linear()``, 1 - t, as ``DiscreteDDIMScheduler`` does. diffusers is not imported: any object
with the methods of its schedulers works.
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
    """An operator that calls a method of a scheduler.

    Args:
        scheduler: a scheduler of diffusers; it is copied before every step and never changed.
        options: further arguments of the method, such as {"temperature": 1.0}.
        process: the class of the processes that the scheduler supports.
        enumerable: False if the scheduler draws by ``torch.rand``.
    """

    scheduler: Any
    options: Mapping[str, object] = field(default_factory=dict)
    process: type[Process] = field(default=Process, kw_only=True)  # type: ignore[type-abstract]
    enumerable: bool = field(default=True, kw_only=True)

    weighable = False  # a scheduler may keep or redraw a token by a rule of its own

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
        """Call a scheduler's method and return the new tokens; given sites keep their tokens."""
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
    """Run ``scheduler.step`` from time t to time s, with one denoiser call.

    The interval from t to s must be one of N equal steps from 1 to 0, for some N.

    Args:
        scheduler: a scheduler of diffusers; it is copied before every step and never changed.
        options: further arguments of ``scheduler.step``, such as {"temperature": 1.0}.
        process: the class of the processes that the scheduler supports.
        enumerable: False if the scheduler draws by ``torch.rand``.
        settings: further arguments of ``set_timesteps``.
        numbered: whether ``step`` takes the number n of the step, as in block pipelines, instead of ``timesteps[n]``.
        order: the claimed order of convergence; None for no claim.

    Raises:
        ValueError: when called, if the interval is not one of N equal steps, the scheduler keeps state between steps,
            or its draws cannot be keyed.
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
    """Run ``scheduler.step_correct`` at the state's time t, with one denoiser call.

    t must be 1 - (n+1)/N for a step n of N. At t = 0 the state stays as it is, as no step of a scheduler begins
    there.

    Args:
        scheduler: a scheduler of diffusers; it is copied before every call and never changed.
        options: further arguments of ``scheduler.step_correct``, such as {"temperature": 1.0}.
        process: the class of the processes that the scheduler supports.
        enumerable: False if the scheduler draws by ``torch.rand``.
        invariant: how well the corrector is claimed to keep p_t: "exact", "approximate" or "none". None for no claim.

    Raises:
        ValueError: when called, if t = 1, where the corrector is not defined, or if t is not a fraction with a
            denominator N of at most 4096.
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
