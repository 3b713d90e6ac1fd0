"""Which operators and models act in each step of a plan, and how many calls they plan."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from discdiff.checks import real, shown, whole
from discdiff.denoiser import Change, Denoiser, Guide, acting_at, check_denoiser
from discdiff.operator import SLOTS, Mix, Operator, Repeat, Then, When, check_operator, check_reads, rests
from discdiff.process import LONGEST, Process, by_time, listed, require_process
from discdiff.sampling.plan import Plan, Step, equal

__all__ = [
    "Part", "acting", "alike", "anew", "asked_of", "calls_for_one", "check_model", "check_plan", "named_models",
    "networks_of", "planned_calls", "programs_of", "step_models", "uniform_grid",
]  # fmt: skip


def acting(operator: Operator, t: float, s: float, now: float) -> Iterator[tuple[float, Operator, float]]:
    """Yield (expected number of runs, operator, start time) for the single operators of a composition in a step t -> s.

    ``now`` is the time at which the composition starts. The parts of a single operator are yielded with 0 runs, because
    its own ``nfe`` counts their calls.
    """
    match operator:
        case When():
            yield from acting(operator.at(t), t, s, now)
        case Then(left, right):
            yield from acting(left, t, s, now)
            yield from acting(right, t, s, s if left.moves else now)
        case Repeat(inner, times):
            yield from ((times * often, part, time) for often, part, time in acting(inner, t, s, now))
        case Mix(operators, weights):
            for weight, one in zip(weights, operators, strict=True):
                yield from ((weight * often, part, time) for often, part, time in acting(one, t, s, now))
        case _:
            yield 1.0, operator, now
            for part in operator.parts:  # their calls are counted in the operator's own nfe
                yield from ((0.0, inner, time) for _, inner, time in acting(part, t, s, now))


def check_model(process: Process, model: object, where: str) -> Denoiser:
    """Return the model; raise TypeError or ValueError unless ``model`` is a Denoiser for ``process``."""
    require_process(process, where)
    model = check_denoiser(model, where)
    if model.process != process:
        raise ValueError(
            f"{where}: the process is {process}, but the model is for {model.process}; "
            "model.with_schedule(s) re-times a model"
        )
    return model


def named_models(process: Process, model: object, where: str) -> dict[str, Denoiser]:
    """Return a sampler's models by name: those of a mapping, whose keys become their names, or one denoiser.

    Raises:
        TypeError, ValueError: as ``check_model``; for a mapping that is empty, or has a key that is no string.
    """
    if not isinstance(model, Mapping):
        known = check_model(process, model, where)
        return {known.name: known}
    if not model or not all(isinstance(name, str) for name in model):
        raise TypeError(f"{where}: a mapping of models is {{name: Denoiser}}, with at least one, got {shown(model)}")
    for one in model.values():
        check_model(process, one, where)
    return {name: one if one.name == name else one.with_name(name) for name, one in model.items()}


def step_models(plan: Plan, models: Mapping[str, Denoiser], where: str) -> tuple[Denoiser, ...]:
    """Return the denoiser of each step, with the step's guides; equal steps share one object.

    Raises:
        TypeError, ValueError: for a name that ``models`` does not hold, guides that the process does not take, guides
            of two models that ask each other, or models of different lengths.
    """
    made: list[Denoiser] = []
    first, before = next(iter(models)), None
    for number, step in enumerate(plan.steps, start=1):
        name = first if step.model is None else step.model
        if name not in models:
            raise ValueError(f"{where}: step {number} takes the model {name!r}; there are {list(models)}")
        if before is not None and equal(before, (name, step.guides)):
            made.append(made[-1])
            continue
        model = models[name]
        for guide in step.guides:
            try:
                model = model.guided(guide)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: step {number}: {error}") from error
        check_asked(model, models, f"{where}: step {number}")
        made.append(model)
        before = name, step.guides
    check_lengths(networks_of(made, models), where)
    return tuple(made)


def asked_of(model: Denoiser, named: Mapping[str, Denoiser]) -> Iterator[Denoiser]:
    """Yield the denoisers that a denoiser's guides ask, those of a ``when`` included; unknown names are left out."""
    yield from _asked(model.guides, named)


def _asked(guides: Iterable[Guide | Change], named: Mapping[str, Denoiser]) -> Iterator[Denoiser]:
    for guide in guides:
        for other in guide.models if isinstance(guide, Guide) else ():
            if not isinstance(other, str):
                yield other
            elif other in named:
                yield named[other]


def check_asked(model: Denoiser, named: Mapping[str, Denoiser], where: str, within: tuple[Denoiser, ...] = ()) -> None:
    """Check all denoisers that a denoiser's guides ask, those that the guides of these ask, and so on.

    Raises:
        ValueError: for a name without a denoiser, or a denoiser that is asked for a prediction of its own.
    """
    if any(model is one for one in within):
        raise ValueError(f"{where}: the guides of {model} ask, in the end, {model.name!r} itself")
    for guide in model.guides:
        for other in guide.models if isinstance(guide, Guide) else ():
            if isinstance(other, str) and other not in named:
                raise ValueError(f"{where}: a guide asks the model {other!r}; there are {list(named)}")
    for one in asked_of(model, named):
        check_asked(one, named, where, (*within, model))


def check_lengths(models: Iterable[Denoiser], where: str) -> None:
    """Raise ValueError if two of the denoisers are for sequences of different lengths."""
    lengths = {model.length: model for model in models if model.length is not None}
    if len(lengths) > 1:
        (one, first), (other, second), *_ = lengths.items()
        raise ValueError(f"{where}: {first} is for length {one}, and {second} for length {other}")


def networks_of(models: Iterable[Denoiser], named: Mapping[str, Denoiser]) -> list[Denoiser]:
    """Return denoisers and all that their guides ask, and so on, each once."""
    found: dict[int, Denoiser] = {}
    left = list(reversed([*models]))
    while left:
        model = left.pop()
        if id(model) not in found:
            found[id(model)] = model
            left += reversed([*asked_of(model, named)])
    return list(found.values())


Part = tuple[int, float, float, Operator, Denoiser]  # number from 1, t, s, operator, denoiser with the step's guides


def anew(before: Part, now: Part, named: Mapping[str, Denoiser]) -> bool:
    """Return whether an operator that remembers starts anew in a step, given the step before it.

    It does where the denoiser, the operators or the guides that act differ; ``when`` may change the last two.
    """
    acts = [
        ([(often, part) for often, part, _ in acting(operator, t, s, t)], [*_acting_guides(model, t, named)])
        for _, t, s, operator, model in (before, now)
    ]
    return before[4] is not now[4] or not equal(*acts)


def _acting_guides(model: Denoiser, t: float, named: Mapping[str, Denoiser]) -> Iterator[Guide | Change]:
    for guide in acting_at(model.guides, t):
        yield guide
        for other in _asked([guide], named):
            yield from _acting_guides(other, t, named)


def programs_of(networks: Iterable[Denoiser]) -> list[object]:
    """Return what may hold a network with weights: functions and guides, each once, in lists of at most 64."""
    each = [*{id(one): one for model in networks for one in (model.fn, *model.guides)}.values()]
    return [each[some : some + 64] for some in range(0, len(each), 64)]


def check_plan(plan: Plan, models: tuple[Denoiser, ...], process: Process, where: str) -> None:
    """Raise ValueError for an operator that is not defined on the process or needs what its model does not tell."""
    for step in {id(step): step for step in plan.steps}.values():
        step.operator.check(process)
        if step.operator.width > SLOTS:
            raise ValueError(
                f"{where}: a step has at most {SLOTS} slots, and {step.operator} takes {step.operator.width}"
            )
    for (_, t, s), step, model in zip(plan.intervals(), plan.steps, models, strict=True):
        for _, part, time in acting(step.operator, t, s, t):
            check_reads(part, model, time)


@dataclass(frozen=True)
class Planned:
    """Denoisers with their planned calls of a row; one may be there several times."""

    each: Sequence[tuple[Denoiser, float]]

    @property
    def calls(self) -> dict[str, float]:
        """The planned calls by the name of the denoiser."""
        total: dict[str, float] = {}
        for model, calls in self.each:
            total[model.name] = total.get(model.name, 0.0) + calls
        return total

    @property
    def cost(self) -> float | None:
        """The sum of the planned calls, each times the cost of its denoiser, or None if a cost is unknown."""
        known = [calls * model.cost for model, calls in self.each if model.cost is not None]
        return float(sum(known)) if len(known) == len(self.each) else None


def planned_calls(plan: Plan, models: tuple[Denoiser, ...], named: Mapping[str, Denoiser]) -> Planned | None:
    """Return the denoisers with their planned calls of a row, or None if an operator does not declare its calls.

    A guide's calls are divided evenly among the denoisers that it asks.
    """
    total: list[tuple[Denoiser, float]] = []
    for (_, t, s), step, model in zip(plan.intervals(), plan.steps, models, strict=True):
        for often, part, time in acting(step.operator, t, s, t):
            if often and not rests(part, model, time):
                if part.nfe is None:
                    return None
                total += _called(model, often * part.nfe, t, named)
    return Planned(total)


def calls_for_one(model: Denoiser) -> float:
    """Return the largest number of calls for one prediction of a denoiser, those of its guides included."""
    total = 1.0
    for guide in model.guides:
        if isinstance(guide, Guide) and guide.nfe:
            each = [1.0 if isinstance(other, str) else calls_for_one(other) for other in guide.models]
            total += guide.nfe * sum(each) / max(1, len(each))
    return total


def _called(model: Denoiser, calls: float, t: float, named: Mapping[str, Denoiser]) -> Iterator[tuple[Denoiser, float]]:
    yield model, calls
    for guide in acting_at(model.guides, t):
        if isinstance(guide, Guide) and guide.nfe:
            for other in _asked([guide], named):
                yield from _called(other, calls * guide.nfe / len(guide.models), t, named)


def alike(
    operator: Operator | None, steps: SupportsIndex | None, grid: Iterable[float] | None, time: float | None
) -> Plan:
    """Return the plan whose steps all run one operator.

    Raises:
        TypeError, ValueError: for arguments that ``Sampler`` refuses.
    """
    operator = check_operator(operator, "Sampler")
    if not operator.moves and time is None:
        raise TypeError(
            f"Sampler: a step needs a predictor, such as Ancestral(), and {operator} only corrects; "
            "time=t runs a corrector alone"
        )
    if operator.moves and time is not None:
        raise TypeError(f"Sampler: time= is for a corrector alone, and {operator} moves; give steps= or grid=")
    if (steps is None) + (grid is None) + (time is None) != 2:
        raise ValueError("Sampler: give either steps=N or grid=[1.0, ..., 0.0], or time=t for a corrector alone")
    if time is not None:
        return Plan([real(time, "Sampler: time", "[0, 1]")], [Step(operator)])
    times = listed(grid) if grid is not None else uniform_grid(steps)
    return Plan(times, [Step(operator)] * (len(times) - 1))


def uniform_grid(steps: SupportsIndex | None) -> tuple[float, ...]:
    """Return equally spaced times from 1 to 0; raise TypeError or ValueError for an invalid number of steps."""
    return by_time(whole(steps, "Sampler: steps", 1, LONGEST - 1))
