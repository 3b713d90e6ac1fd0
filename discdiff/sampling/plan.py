"""Plans: which operator, guides and model each step of a grid uses, as one object that can be stored."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from discdiff.checks import listing, real, shown
from discdiff.denoiser import Change, Guide
from discdiff.operator import Between, Operator, check_operator
from discdiff.process import listed
from discdiff.sampling.notation import parsed, written

__all__ = ["Plan", "Step", "equal", "few"]

_FEW = 6  # times and groups of equal steps that a repr holds


def equal(one: object, other: object) -> bool:
    """Return whether two objects, or all parts of two tuples, are equal.

    A comparison that has no answer, such as that of two arrays in the fields of a guide, counts as different.
    """
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if one is other:
        return True
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):
        return False


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a plan.

    Args:
        operator: the operator of the step.
        guides: guides that change the model's predictions in this step, after the model's own.
        model: the name of the model; the sampler's first model if None.

    Raises:
        TypeError: if the operator, a guide or the name is anything else.
    """

    operator: Operator
    guides: Sequence[Guide | Change] = ()
    model: str | None = None

    def __post_init__(self) -> None:
        check_operator(self.operator, "Step")
        guides = tuple(listing(self.guides, "Step: guides"))
        for guide in guides:
            if not callable(guide) or isinstance(guide, type | Operator | Between):
                raise TypeError(f"Step: guides must be guides, such as Truncation(top_p=0.9), got {shown(guide)}")
        if not isinstance(self.model, str | None):
            raise TypeError(f"Step: model must be a name in the sampler's mapping of models, got {shown(self.model)}")
        object.__setattr__(self, "guides", guides)

    def __eq__(self, other: object) -> bool:
        """Return whether operator, guides and name are equal."""
        if not isinstance(other, Step):
            return NotImplemented
        mine, others = ((one.model, one.operator, one.guides) for one in (self, other))
        return equal(mine, others)

    def __hash__(self) -> int:
        return hash((self.operator, self.model))

    def __repr__(self) -> str:
        guides = f", guides=[{', '.join(map(repr, self.guides))}]" if self.guides else ""
        model = "" if self.model is None else f", model={self.model!r}"
        return f"Step({self.operator}{guides}{model})"


class Plan:
    """A grid of times and one ``Step`` for each of its intervals: ``Sampler(process, model, plan=plan)``.

    Args:
        grid: N + 1 decreasing times in [0, 1]; or one time, for a corrector alone.
        steps: N steps; one step for a corrector alone.

    Raises:
        TypeError: if a step is no ``Step``, or is a corrector without predictor (a predictor, at one time).
        ValueError: for an invalid grid or another number of steps.
    """

    def __init__(self, grid: Iterable[float], steps: Sequence[Step]) -> None:
        try:
            self.grid: tuple[float, ...] = _times(grid)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Plan: {error}") from error
        self.steps: tuple[Step, ...] = tuple(listing(steps, "Plan: steps"))
        wrong = [step for step in self.steps if not isinstance(step, Step)]
        if wrong:
            raise TypeError(f"Plan: steps must be Steps, such as Step(Ancestral()), got {shown(wrong[0])}")
        count = max(1, len(self.grid) - 1)
        if len(self.steps) != count:
            raise ValueError(f"Plan: {len(self.grid)} times take {count} steps, got {len(self.steps)}")
        for step in self.steps:
            if step.operator.moves != (len(self.grid) > 1):
                what = "a predictor, and this one only corrects" if len(self.grid) > 1 else "a corrector, for one time"
                raise TypeError(f"Plan: a step needs {what}; got {step.operator}")

    def intervals(self) -> Iterator[tuple[int, float, float]]:
        """Yield (step number from 1, t, s) for every step; a corrector alone makes one step, from t to t."""
        times = self.grid * 2 if len(self.grid) == 1 else self.grid
        for number, (t, s) in enumerate(itertools.pairwise(times), start=1):
            yield number, t, s

    @property
    def alike(self) -> bool:
        """Whether all steps are equal."""
        return all(step == self.steps[0] for step in self.steps)

    def to_json(self) -> str:
        """Return the plan as JSON text.

        Raises:
            ValueError: for an operator, a guide or a condition that discdiff does not export; the error names it.
        """
        steps = []
        for number, step in enumerate(self.steps, start=1):
            where = f"Plan.to_json: step {number}"
            guides = [written(guide, f"{where}: guide {n}") for n, guide in enumerate(step.guides, start=1)]
            operator = written(step.operator, f"{where}: operator")
            steps.append({"operator": operator, "guides": guides, "model": step.model})
        return json.dumps({"grid": self.grid, "steps": steps})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that a text of ``to_json`` describes; only names that discdiff exports are read.

        Raises:
            ValueError: for any other text; the error names the step.
            TypeError: for an ill-formed operator or guide.
        """
        try:
            held = json.loads(text, object_pairs_hook=_once)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"Plan.from_json: takes the text of Plan.to_json, got {shown(text)}: {error}") from error
        match held:
            case {"grid": list(grid), "steps": list(listed_steps), **rest} if not rest:
                steps = [_step(each, f"Plan.from_json: step {n}") for n, each in enumerate(listed_steps, start=1)]
            case _:
                raise ValueError(f"Plan.from_json: the text must hold a grid and steps, two lists, got {shown(held)}")
        try:
            return cls(grid, steps)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Plan.from_json: {error}") from error

    def __eq__(self, other: object) -> bool:
        """Return whether both plans have the same JSON text; plans that cannot be written are compared by content."""
        if not isinstance(other, Plan):
            return NotImplemented
        if equal((self.grid, self.steps), (other.grid, other.steps)):
            return True
        try:
            return self.to_json() == other.to_json()
        except ValueError:
            return False

    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # equal by a text that is made when it is needed

    def __repr__(self) -> str:
        folded = ((step, sum(1 for _ in same)) for step, same in itertools.groupby(self.steps))
        steps = few([f"{step}{f' * {count}' if count > 1 else ''}" for step, count in folded])
        return f"Plan([{few([*map(repr, self.grid)])}], [{steps}])"


def few(parts: list[str]) -> str:
    """Return parts, separated by commas: of many the first ones, the number of those left out, and the last."""
    if len(parts) > _FEW + 1:
        parts = [*parts[: _FEW - 1], f"... {len(parts) - _FEW} more ...", parts[-1]]
    return ", ".join(parts)


def _times(grid: Iterable[float]) -> tuple[float, ...]:
    """Return a grid, which may be a single time.

    Raises:
        TypeError, ValueError: unless ``grid`` holds strictly decreasing times in [0, 1].
    """
    if isinstance(grid, str) or not isinstance(grid, Iterable) or getattr(grid, "ndim", 1) != 1:
        return listed(grid)  # which raises
    times = iter(grid)
    first = list(itertools.islice(times, 2))
    return (real(first[0], "grid: the time", "[0, 1]"),) if len(first) == 1 else listed(itertools.chain(first, times))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the object that JSON describes; raise ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is given twice: {shown([key for key, _ in pairs])}")
    return found


def _step(held: object, where: str) -> Step:
    """Return the step that a file describes.

    Raises:
        TypeError, ValueError: for anything that ``to_json`` does not write.
    """
    match held:
        case {"operator": str(operator), "guides": list(guides), "model": str() | None as model, **rest} if not rest:
            made = check_operator(parsed(operator, f"{where}: operator"), f"{where}: operator")
            changes = [parsed(guide, f"{where}: guide {n}") for n, guide in enumerate(guides, start=1)]
        case _:
            raise ValueError(
                f"{where}: must hold an operator, a text, guides, a list of texts, and a model, a name or null; "
                f"got {shown(held)}"
            )
    try:
        return Step(made, changes, model)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
