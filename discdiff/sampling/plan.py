"""Plans: which operator, guides and model each step of a grid uses, as one object that can be stored."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass

from discdiff.checks import listing, real, shown
from discdiff.denoiser import Change, Guide
from discdiff.operator import Operator, check_operator
from discdiff.process import listed
from discdiff.sampling.notation import parsed, written

__all__ = ["Plan", "Step", "equal_parts"]


@dataclass(frozen=True)
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
            if not callable(guide) or isinstance(guide, type | Operator):
                raise TypeError(f"Step: guides must be guides, such as Truncation(top_p=0.9), got {shown(guide)}")
        if not isinstance(self.model, str | None):
            raise TypeError(f"Step: model must be a name in the sampler's mapping of models, got {shown(self.model)}")
        object.__setattr__(self, "guides", guides)

    def __eq__(self, other: object) -> bool:
        """Return whether operators, guides and models are equal."""
        if not isinstance(other, Step):
            return NotImplemented
        return equal_parts((self.operator, self.guides, self.model), (other.operator, other.guides, other.model))

    def __repr__(self) -> str:
        guides = f", guides=[{', '.join(map(repr, self.guides))}]" if self.guides else ""
        model = "" if self.model is None else f", model={self.model!r}"
        return f"Step({self.operator}{guides}{model})"


def equal_parts(one: object, other: object) -> bool:
    """Return whether two objects, or all parts of two tuples, are equal.

    A comparison that has no answer, such as that of two arrays in the fields of a guide, counts as different.
    """
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(equal_parts, one, other))
    if one is other:
        return True
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):
        return False


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
        alone = isinstance(grid, Sized) and len(grid) == 1
        self.grid: tuple[float, ...] = (
            (real(next(iter(grid)), "Plan: grid: the time", "[0, 1]"),) if alone else listed(grid)
        )
        self.steps: tuple[Step, ...] = tuple(listing(steps, "Plan: steps"))
        wrong = next((step for step in self.steps if not isinstance(step, Step)), None)
        if wrong is not None:
            raise TypeError(f"Plan: steps must be Steps, such as Step(Ancestral()), got {shown(wrong)}")
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
            guides = [written(guide, where) for guide in step.guides]
            steps.append({"operator": written(step.operator, where), "guides": guides, "model": step.model})
        return json.dumps({"grid": self.grid, "steps": steps})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that a text of ``to_json`` describes; only names that discdiff exports are read.

        Raises:
            ValueError: for any other text; the error names the step.
            TypeError: for an ill-formed operator or guide.
        """
        try:
            held = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"Plan.from_json: takes the text of Plan.to_json, got {shown(text)}: {error}") from error
        if not isinstance(held, dict) or held.keys() != {"grid", "steps"} or not isinstance(held["steps"], list):
            raise ValueError(f"Plan.from_json: the text must hold a grid and steps, got {shown(held)}")
        steps = []
        for number, each in enumerate(held["steps"], start=1):
            where = f"Plan.from_json: step {number}"
            if not isinstance(each, dict) or each.keys() != {"operator", "guides", "model"}:
                raise ValueError(f"{where}: must hold an operator, guides and a model, got {shown(each)}")
            guides = [parsed(guide, where) for guide in listing(each["guides"], f"{where}: guides")]
            steps.append(Step(check_operator(parsed(each["operator"], where), where), guides, each["model"]))
        return cls(held["grid"], steps)

    def __eq__(self, other: object) -> bool:
        """Return whether both plans have the same JSON text; plans that cannot be written are compared by content."""
        if not isinstance(other, Plan):
            return NotImplemented
        if equal_parts((self.grid, self.steps), (other.grid, other.steps)):
            return True
        try:
            return self.to_json() == other.to_json()
        except ValueError:
            return False

    __hash__ = None  # type: ignore[assignment]  # equal by a text that is made when it is needed

    def __repr__(self) -> str:
        folded = [(step, sum(1 for _ in same)) for step, same in itertools.groupby(self.steps)]
        steps = ", ".join(f"{step}{f' * {count}' if count > 1 else ''}" for step, count in folded)
        return f"Plan({list(self.grid)}, [{steps}])"
