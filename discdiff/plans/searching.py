"""``search``: the plan of the least objective within a number of denoiser calls."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

from rich.console import Console
from rich.progress import Progress

from discdiff.checks import decided, seeded, shown, whole
from discdiff.denoiser import Denoiser
from discdiff.operator import Operator
from discdiff.plans.evolving import Surrogate
from discdiff.plans.found import Found
from discdiff.plans.methods import Method
from discdiff.plans.objectives import Objective
from discdiff.plans.space import Space
from discdiff.plans.trials import Trials
from discdiff.process import Process
from discdiff.sampling import Step

__all__ = ["search"]


def search(
    process: Process,
    model: Denoiser | Mapping[str, Denoiser],
    *,
    calls: SupportsIndex = 8,
    operators: Sequence[Operator | Step],
    objective: Objective,
    method: Method | None = None,
    seed: SupportsIndex = 0,
    times: Iterable[float] | SupportsIndex = 16,
    cost: float | None = None,
    file: str | Path | None = None,
    progress: bool = False,
) -> Found:
    """Find the plan of the least objective: which times, and at each step which operator, guides and network.

    The result depends on the arguments alone. ``found.objective`` is its value, ``found.trials`` is what was tried.

    Args:
        process: the forward process.
        model: a denoiser, or several by name, which the steps of ``operators`` may name.
        calls: the largest number of planned denoiser calls of a plan.
        operators: the choices of a step: operators, such as ``Ancestral() >> Gibbs() ** 2``, or ``Step`` with
            guides (a temperature) and the name of a model.
        objective: what is minimised: ``KL``, ``KLUB``, ``Judge``, or an ``Objective`` of your own.
        method: how plans are gone through: ``Dynamic``, ``GoldenSection``, ``Evolution``, ``Surrogate`` (the default),
            ``Random``, or a ``Method`` of your own.
        seed: the seed of the method.
        times: the fine grid from 1 to 0, or the number of its equal intervals.
        cost: the largest planned cost, as ``Sampler.cost`` counts it; None for no limit.
        file: a file for the numbers that are computed. A search that was stopped goes on from it, to the same plan.
        progress: whether to show a progress bar on standard error.

    Raises:
        TypeError: for an objective or a method of another type, or operators that it does not take.
        ValueError: if no plan is within the limits, no plan has a finite objective, or ``file`` is of another search.
    """
    method = Surrogate() if method is None else method
    if not isinstance(objective, Objective):
        raise TypeError(
            f"search: objective must be KL(world), KLUB(world), Judge(log_prob, ...), got {shown(objective)}"
        )
    if not isinstance(method, Method):
        raise TypeError(f"search: method must be Dynamic(), Evolution(), Surrogate(), ..., got {shown(method)}")
    if not isinstance(times, Iterable):
        count = whole(times, "search: times", 1)
        times = [1 - n / count for n in range(count)] + [0.0]
    space, seed = Space(process, model, operators, times, whole(calls, "search: calls", 1), cost), seeded(seed, "seed")
    shows = decided(progress, "search: progress")
    what = f"{type(method).__name__}{method}, {objective}, {space}, seed {seed}"
    with Progress(console=Console(stderr=True)) if shows else contextlib.nullcontext() as bar:
        task = None if bar is None else (bar, bar.add_task("searching", total=method.total(space)))
        trials = Trials(space, objective, seed, None if file is None else Path(file), what, task)
        method.run(trials)
    found = trials.found()
    if found.objective == math.inf:
        raise ValueError(f"search: none of the {len(found.trials)} plans that were tried has a finite objective")
    return found
