"""How a search goes through plans: at random, by golden sections, or by dynamic programming on an additive bound."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from discdiff.checks import whole
from discdiff.plans.space import Gene, Space
from discdiff.plans.trials import Trials
from discdiff.sampling import Plan, Step

__all__ = ["Dynamic", "GoldenSection", "Method", "Random"]


class Method(ABC):
    """Go through plans: ``run`` scores them with ``trials.score``, and the best one of these is the result."""

    @abstractmethod
    def run(self, trials: Trials) -> None:
        """Score plans; all randomness is of ``trials.random``."""

    @abstractmethod
    def total(self, space: Space) -> int | None:
        """Return how many numbers it will compute, for the progress bar; None if that is not known."""


@dataclass(frozen=True)
class Random(Method):
    """Score different random plans: the baseline.

    Args:
        evaluations: the number of plans.

    Raises:
        TypeError, ValueError: for an argument out of range.
    """

    evaluations: int = 200

    def __post_init__(self) -> None:
        whole(self.evaluations, "Random: evaluations", 1)

    def run(self, trials: Trials) -> None:
        tried = set[Gene]()
        for _ in range(100 * self.evaluations):  # a small space has fewer plans
            gene = trials.space.draw(trials.random)
            if gene not in tried:
                tried.add(gene)
                trials.score(gene)
            if len(tried) == self.evaluations:
                return

    def total(self, space: Space) -> int | None:
        return self.evaluations


@dataclass(frozen=True)
class Dynamic(Method):
    """Find the plan of the least KLUB by dynamic programming over the grid point and the calls that are left.

    The plan is the best one of the space for this objective. It takes G (G + 1) / 2 terms for each choice on a grid of
    G intervals. Operators must take whole numbers of calls.

    Raises:
        TypeError: in ``search``, for an objective that is no sum over steps, a limit on the cost, or an operator that
            takes no whole number of calls.
        ValueError: in ``search``, if every plan has an infinite bound.
    """

    def run(self, trials: Trials) -> None:
        """Score the best plan; raise TypeError or ValueError as the class says."""
        space = trials.space
        if space.cost is not None:
            raise TypeError("Dynamic: counts calls alone; for a limit on the cost take Evolution() or Surrogate()")
        wrong = [step.operator for step, calls in zip(space.choices, space.each, strict=True) if calls != int(calls)]
        if wrong:
            raise TypeError(f"Dynamic: {wrong[0]} takes no whole number of calls a step")
        none: tuple[float, Gene] = math.inf, ()
        best = [[none] * (space.calls + 1) for _ in space.times]
        best[0] = [(0.0, ())] * (space.calls + 1)
        for j in range(1, len(space.times)):
            for i in range(j):
                for choice, calls in enumerate(space.each):
                    if int(calls) > space.calls:
                        continue
                    term = trials.term(i, j, choice)
                    for left in range(int(calls), space.calls + 1):
                        before, steps = best[i][left - int(calls)]
                        if before + term < best[j][left][0]:
                            best[j][left] = before + term, (*steps, (j, choice))
        value, gene = best[-1][space.calls]
        if value == math.inf:
            raise ValueError(
                "Dynamic: every plan has an infinite bound, because each step excludes something that the true one may "
                "do; take Ancestral(), SplitLeap() or Reveal() among the operators"
            )
        trials.score(gene)

    def total(self, space: Space) -> int | None:
        return len(space.choices) * space.last * (space.last + 1) // 2 + 1


@dataclass(frozen=True)
class GoldenSection(Method):
    """Move the times of a plan one after another, each by golden sections between its neighbours.

    Every operator is tried alone, with as many steps as the calls allow, from a uniform grid. Times are real numbers,
    not those of a fine grid.

    Args:
        sweeps: how often all times are moved.
        sections: how many values each time takes in a sweep.

    Raises:
        TypeError, ValueError: for an argument out of range.
    """

    sweeps: int = 3
    sections: int = 8

    def __post_init__(self) -> None:
        whole(self.sweeps, "GoldenSection: sweeps", 1)
        whole(self.sections, "GoldenSection: sections", 2)

    def run(self, trials: Trials) -> None:
        space = trials.space
        first, last = space.times[0], space.times[-1]
        for choice, step in enumerate(space.choices):
            steps = max((n for n in range(1, space.last + 1) if space.within(((space.last, choice),) * n)), default=0)
            if not steps:
                continue
            grid = [*(first + (last - first) * n / steps for n in range(steps)), last]
            for _ in range(self.sweeps):
                for index in range(1, steps):
                    grid[index] = self._best(trials, [step] * steps, grid, index)
            trials.score(Plan(grid, [step] * steps))

    def _best(self, trials: Trials, steps: list[Step], grid: list[float], index: int) -> float:
        """Return the best of the times that golden sections try between two neighbours, the present time included."""

        def value(time: float) -> float:
            return trials.score(Plan([*grid[:index], time, *grid[index + 1 :]], steps))

        ratio = (math.sqrt(5) - 1) / 2
        low, high = grid[index + 1], grid[index - 1]
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        tried = {grid[index]: value(grid[index]), left: value(left), right: value(right)}
        for _ in range(self.sections - 2):
            if tried[left] <= tried[right]:
                high, right = right, left
                left = high - ratio * (high - low)
                tried[left] = value(left)
            else:
                low, left = left, right
                right = low + ratio * (high - low)
                tried[right] = value(right)
        return min(tried, key=lambda time: tried[time])

    def total(self, space: Space) -> int | None:
        return None
