"""Scores of plans, computed once, written to disk as they come, and read again by a search that was stopped."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress, TaskID

from discdiff.plans.found import Found, Trial
from discdiff.plans.klub import KLUB
from discdiff.plans.objectives import Objective
from discdiff.plans.space import Gene, Space
from discdiff.sampling import Plan, Sampler

__all__ = ["Trials"]


class Trials:
    """The plans that a method tries: it scores each one once and keeps the best.

    With a file every number is appended to it as a line. A search with the same arguments goes through the same plans
    again, and reads the numbers that are there. So a search that was stopped at any place ends in the same plan.

    Args:
        space: the plans.
        objective: what is minimised.
        seed: the seed of ``random``.
        path: the file, or None.
        what: a text that describes the search; a file of another search is refused.
        bar: a progress bar and its task, or None.

    Attributes:
        random: the random numbers of the method.

    Raises:
        ValueError: for a file of another search.
    """

    def __init__(
        self, space: Space, objective: Objective, seed: int, path: Path | None, what: str,
        bar: tuple[Progress, TaskID] | None = None,
    ) -> None:  # fmt: skip
        self.space: Space = space
        self.objective: Objective = objective
        self.random: random.Random = random.Random(seed)
        self._path, self._bar = path, bar
        self._stored = {} if path is None else _read(path, what)
        self._known: dict[str, float] = {}
        self._tried: list[Trial] = []
        self._sampler = Sampler(space.process, space.models, plan=space.plan(((space.last, 0),)))
        objective.prepare(space.times, space.choices[0])

    def score(self, plan: Plan | Gene) -> float:
        """Return the objective of a plan; raise ValueError if it is NaN."""
        plan = plan if isinstance(plan, Plan) else self.space.plan(plan)
        key = plan.to_json()
        if key not in self._known:
            sampler = Sampler(self.space.process, self.space.models, plan=plan)
            self._known[key] = self._number(key, lambda: self.objective.score(sampler))
            self._tried.append(Trial(plan, self._known[key], float(sampler.nfe or 0.0), sampler.cost))
        return self._known[key]

    def known(self, gene: Gene) -> bool:
        """Return whether a plan was scored in this search."""
        return self.space.plan(gene).to_json() in self._known

    def term(self, i: int, j: int, choice: int) -> float:
        """Return the part of the objective of one step, from the i-th to the j-th time; it must be a sum over steps.

        Raises:
            TypeError: for an objective that is no sum over steps.
            ValueError: if it is NaN.
        """
        objective, times = self.objective, self.space.times
        if not isinstance(objective, KLUB):
            raise TypeError(f"Dynamic: takes an objective that is a sum over steps, KLUB, got {objective}")
        step = self.space.choices[choice]
        return self._number(f"{i} {j} {choice}", lambda: objective.term(self._sampler, step, times[i], times[j]))

    def found(self) -> Found:
        """Return the best plan so far: the first one of the least objective."""
        best = min(self._tried, key=lambda one: one.objective)
        return Found(best.plan.grid, best.plan.steps, best.objective, self._tried)

    def _number(self, key: str, compute: Callable[[], float]) -> float:
        if key in self._stored:
            value = self._stored[key]
        else:
            value = float(compute())
            if math.isnan(value):
                raise ValueError(f"search: {self.objective} gave NaN; an objective gives a number, or inf for no plan")
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, value]) + "\n")
        if self._bar is not None:
            self._bar[0].advance(self._bar[1])
        return value


def _read(path: Path, what: str) -> dict[str, float]:
    """Return the numbers of a file, which is begun if it is not there; a last line that was cut is removed.

    Raises:
        ValueError: if the file is of another search.
    """
    head = json.dumps({"search": what})
    if not path.exists() or "\n" not in path.read_text(encoding="utf-8"):
        path.write_text(head + "\n", encoding="utf-8")
        return {}
    first, *lines = path.read_text(encoding="utf-8").split("\n")
    if first != head:
        raise ValueError(
            f"search: {path} is of another search; take another file, or the arguments of the search that wrote it: "
            f"{first[:200]}"
        )
    if lines[-1]:
        path.write_text("\n".join([first, *lines[:-1]]) + "\n", encoding="utf-8")
    return dict(map(_entry, lines[:-1]))


def _entry(line: str) -> tuple[str, float]:
    """Return the key and the number of a line; raise ValueError for anything else."""
    found = json.loads(line)
    if not (isinstance(found, list) and list(map(type, found)) == [str, float] and not math.isnan(found[1])):
        raise ValueError(f"search: each line of the file holds a text and a number, got {line[:100]!r}")
    return found[0], found[1]
