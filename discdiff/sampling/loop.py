"""Checks shared by all samplers, of the arguments that watch, stop and continue a run."""

from collections.abc import Callable

from torch import Tensor

from discdiff.checks import shown
from discdiff.operator import State

__all__ = ["OnStep", "check_on_step", "check_resumed", "refuse_beginning"]


# called after each step with its number, the state and what operators reported; False stops the run
OnStep = Callable[[int, State, dict[str, Tensor]], object]


def check_on_step(on_step: object) -> None:
    """Raise TypeError unless ``on_step`` is None or can be called."""
    if not (on_step is None or callable(on_step)):
        raise TypeError(f"sample: on_step is called as on_step(step, state, info), got {shown(on_step)}")


def refuse_beginning(**given: object) -> None:
    """Raise TypeError if an argument for the beginning of a run is given, as the run to resume has its own."""
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise TypeError(f"sample: resume= continues a run, which began with its own {', '.join(extra)}")


def check_resumed(log_prob: Tensor | None, made: int, until: int | None, record: bool) -> None:
    """Raise ValueError unless a run that has made ``made`` steps can be continued up to step ``until``.

    If the rest is to be recorded, the run must have been recorded: ``log_prob`` (B,) is its log-probability, or None.
    """
    if record and log_prob is None:
        raise ValueError("sample: the run to resume was not recorded; give record=True from its first step on")
    if until is not None and made >= until:
        raise ValueError(f"sample: until = {until}, but the run to resume has made {made} steps")
