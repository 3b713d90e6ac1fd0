"""Choose an operator or a guide by the start time of the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

from discdiff.checks import real
from discdiff.denoiser import Change, Guide, WhenGuide
from discdiff.operator.algebra import Operator, When, check_operator, same_kind
from discdiff.prediction import Truncation

__all__ = ["Between", "after", "before", "between", "when"]


@dataclass(frozen=True)
class Between:
    """Condition for ``when``: True in steps that start at a time in (low, high]; made by the functions below."""

    low: float
    high: float

    def __call__(self, t: float) -> bool:
        return self.low < t <= self.high

    def __repr__(self) -> str:
        if self.high == float("inf"):
            return f"before({self.low!r})"
        if self.low == -float("inf"):
            return f"after({self.high!r})"
        return f"between({self.low!r}, {self.high!r})"


def before(t: float) -> Between:
    """Return the condition that a step starts before time t is reached: its start time is above t.

    A run goes from time 1 to 0, so these are its first steps.

    Raises:
        TypeError, ValueError: if t is not a number.
    """
    return Between(real(t, "before: t"), float("inf"))


def after(t: float) -> Between:
    """Return the condition that a step starts when time t is reached, or later: its start time is at most t.

    Raises:
        TypeError, ValueError: if t is not a number.
    """
    return Between(-float("inf"), real(t, "after: t"))


def between(s: float, t: float) -> Between:
    """Return the condition that a step's start time lies in (s, t].

    Raises:
        ValueError: unless s < t.
    """
    low, high = real(s, "between: s"), real(t, "between: t")
    if not low < high:
        raise ValueError(f"between: takes s < t, as in s < start <= t; got s = {low}, t = {high}")
    return Between(low, high)


@overload
def when(condition: Callable[[float], bool], yes: Operator, no: Operator) -> Operator: ...


@overload
def when(condition: Callable[[float], bool], yes: Guide | Change, no: Guide | Change | None = None) -> Guide: ...


def when(
    condition: Callable[[float], bool], yes: Operator | Guide | Change, no: Operator | Guide | Change | None = None
) -> Operator | Guide:
    """Return an operator, or a guide, that runs ``yes`` in steps whose start time meets the condition, else ``no``.

    Args:
        condition: a function of the start time t, such as ``before(0.5)``.
        yes: an operator or a guide.
        no: the same kind; for a guide None leaves the prediction unchanged.

    Raises:
        TypeError: if an operator is paired with a guide or with None, or a predictor with a corrector, or the
            condition cannot be called.
    """
    if not callable(condition) or isinstance(condition, Operator | Guide | Truncation):
        raise TypeError(f"when: the condition must be a function of the start time t, got {condition!r}")
    if isinstance(yes, Operator) or isinstance(no, Operator):
        both = check_operator(yes, "when"), check_operator(no, "when")
        same_kind("when", *both)
        return When(condition, *both)
    for guide in (yes, no):
        if isinstance(guide, type | Between) or not (guide is None or callable(guide)) or yes is None:
            hint = "; it is a class: add ()" if isinstance(guide, type) else ""
            raise TypeError(f"when takes two operators, or guides, functions of a prediction; got {guide!r}{hint}")
    return WhenGuide(condition, yes, no)
