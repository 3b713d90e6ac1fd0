"""The plan that a search found, with its objective and all plans that were tried."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from discdiff.sampling import Plan, Step

__all__ = ["Found", "Trial", "front"]


@dataclass(frozen=True)
class Trial:
    """A plan that was tried.

    Attributes:
        plan: the plan.
        objective: the value of the objective; smaller is better.
        calls: the planned denoiser calls.
        cost: the planned calls, each times the ``cost`` of its denoiser (seconds, say); None if a cost is unknown.
    """

    plan: Plan
    objective: float
    calls: float
    cost: float | None


class Found(Plan):
    """A plan with the value of its objective, as ``search`` returns it; it is used, stored and compared as a ``Plan``.

    Attributes:
        objective: the value of the objective, smaller is better.
        trials: every plan that was tried, in the order of the search. Dynamic programming tries one plan as a whole.
    """

    def __init__(
        self, grid: Iterable[float], steps: Sequence[Step], objective: float, trials: Sequence[Trial] = ()
    ) -> None:
        super().__init__(grid, steps)
        self.objective: float = objective
        self.trials: tuple[Trial, ...] = tuple(trials)

    @property
    def front(self) -> list[Trial]:
        """The trials that no other trial beats in objective and cost at once; see ``front``."""
        return front(self.trials)


def front(trials: Iterable[Trial]) -> list[Trial]:
    """Return the Pareto front of objective and cost, from the cheapest trial to the best; calls count where no cost is.

    A trial is left out if another one is at least as good in both and better in one.
    """
    listed = list(trials)
    priced = all(one.cost is not None for one in listed)
    price = {id(one): float(one.cost if priced and one.cost is not None else one.calls) for one in listed}
    kept: list[Trial] = []
    for one in sorted(listed, key=lambda each: (price[id(each)], each.objective)):
        if not kept or one.objective < kept[-1].objective:
            kept.append(one)
    return kept
