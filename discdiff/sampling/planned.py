"""Which operators and models act in each step of a plan, and how many calls they plan."""

from collections.abc import Iterable, Iterator, Mapping
from typing import SupportsIndex

from discdiff.checks import real, shown, whole
from discdiff.denoiser import Denoiser, Guide, acting_at, check_denoiser, models_of
from discdiff.operator import SLOTS, Mix, Operator, Repeat, Then, When, check_operator, check_reads, rests
from discdiff.process import LONGEST, Process, by_time, listed, require_process
from discdiff.sampling.plan import Plan, Step, equal_parts

__all__ = [
    "acting", "alike", "check_model", "check_plan", "named_models", "networks_of", "planned_calls", "step_models",
    "uniform_grid",
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
        TypeError, ValueError: for a name that ``models`` does not hold, guides that the process does not take, or a
            guide that asks a denoiser that it guides.
    """
    made: list[Denoiser] = []
    for number, step in enumerate(plan.steps):
        if step.model is not None and step.model not in models:
            raise ValueError(f"{where}: step {number + 1} takes the model {step.model!r}; there are {list(models)}")
        before = plan.steps[number - 1] if number else None
        if before is not None and before.model == step.model and equal_parts(before.guides, step.guides):
            made.append(made[-1])
            continue
        model = next(iter(models.values())) if step.model is None else models[step.model]
        for guide in step.guides:
            model = model.guided(guide)
        for other in models_of(model, models):
            if isinstance(other, str) and other not in models:
                raise ValueError(f"{where}: a guide asks the model {other!r}; there are {list(models)}")
        made.append(model)
    return tuple(made)


def networks_of(models: Iterable[Denoiser], named: Mapping[str, Denoiser]) -> list[Denoiser]:
    """Return denoisers and all that their guides ask, each once."""
    found: dict[int, Denoiser] = {}
    for model in models:
        for one in (model, *models_of(model, named)):
            known = named[one] if isinstance(one, str) else one
            found[id(known)] = known
    return list(found.values())


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


def planned_calls(plan: Plan, models: tuple[Denoiser, ...], named: Mapping[str, Denoiser]) -> dict[str, float] | None:
    """Return the planned calls of a row by the name of the denoiser, or None if an operator does not declare its calls.

    A guide's calls are divided evenly among the denoisers that it asks.
    """
    total: dict[str, float] = {}
    for (_, t, s), step, model in zip(plan.intervals(), plan.steps, models, strict=True):
        for often, part, time in acting(step.operator, t, s, t):
            if often and not rests(part, model, time):
                if part.nfe is None:
                    return None
                _add(total, model, often * part.nfe, t, named)
    return total


def _add(total: dict[str, float], model: Denoiser, calls: float, t: float, named: Mapping[str, Denoiser]) -> None:
    total[model.name] = total.get(model.name, 0.0) + calls
    for guide in acting_at(model.guides, t):
        if isinstance(guide, Guide) and guide.nfe:
            for other in guide.models:
                asked = named[other] if isinstance(other, str) else other
                _add(total, asked, calls * guide.nfe / len(guide.models), t, named)


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
    return by_time(whole(steps, "steps", 1, LONGEST - 1))
