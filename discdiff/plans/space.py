"""The plans among which a search looks: times of a fine grid, and an operator, guides and a model for each step."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from discdiff.checks import listing, real, shown, whole
from discdiff.denoiser import Denoiser
from discdiff.operator import Operator
from discdiff.process import Process, listed
from discdiff.sampling import Plan, Sampler, Step

__all__ = ["Gene", "Space"]

Gene = tuple[tuple[int, int], ...]  # for each step: the index of the time at its end, and of its choice


class Space:
    """All plans whose times lie on a fine grid and whose steps are among given ones, within a number of calls.

    A plan is held as a *gene*: for each step the index of the time at its end, and the index of its choice.

    Args:
        process: the forward process.
        models: a denoiser, or several by name.
        operators: operators, or whole steps, ``Step``, with guides and the name of a model.
        times: the fine grid, from 1 to 0.
        calls: the largest number of planned denoiser calls of a plan.
        cost: the largest cost of a plan; None for no limit. Then every model needs a ``Denoiser(cost=)``.

    Attributes:
        choices: the steps.
        each: the planned calls of each choice.
        prices: the cost of each choice; None if a model has no cost.

    Raises:
        TypeError: for an operator without predictor, or one that does not declare its number of calls.
        ValueError: for an operator that the process or its model does not take, or if no plan is within the limits.
    """

    def __init__(
        self, process: Process, models: Denoiser | Mapping[str, Denoiser], operators: Sequence[Operator | Step],
        times: Iterable[float], calls: int, cost: float | None = None,
    ) -> None:  # fmt: skip
        self.process: Process = process
        self.models: Denoiser | Mapping[str, Denoiser] = models
        self.times: tuple[float, ...] = listed(times)
        if self.times[0] != 1 or self.times[-1] != 0:
            raise ValueError(f"search: times must go from 1 to 0, got {shown(self.times)}")
        choices = [one if isinstance(one, Step) else Step(one) for one in listing(operators, "search: operators")]
        self.choices: list[Step] = choices
        self.calls: int = whole(calls, "search: calls", 1)
        self.last: int = len(self.times) - 1
        self.cost: float | None = None if cost is None else real(cost, "search: cost", "(0, inf)")
        if not self.choices:
            raise ValueError("search: operators must hold at least one operator, such as Ancestral()")
        self.each: list[float] = []
        self.prices: list[float | None] = []
        for step in self.choices:
            sampler = Sampler(process, models, plan=Plan([1.0, 0.5], [step]))
            if sampler.nfe is None:
                raise TypeError(
                    f"search: {step.operator} does not declare its number of calls; plans cannot count them"
                )
            self.each.append(sampler.nfe)
            self.prices.append(sampler.cost)
        if self.cost is not None and None in self.prices:
            raise ValueError("search: with cost= every model needs its cost, Denoiser(..., cost=seconds)")
        if not any(self.within(((self.last, choice),)) for choice in range(len(self.choices))):
            raise ValueError(f"search: not one step is within {self._limits}; steps take {self.each} calls")

    @property
    def _limits(self) -> str:
        return f"{self.calls} calls" + ("" if self.cost is None else f" and a cost of {self.cost:g}")

    def within(self, gene: Gene) -> bool:
        """Return whether a plan is within the limits."""
        calls = sum(self.each[choice] for _, choice in gene)
        if self.cost is None:
            return calls <= self.calls + 1e-9
        prices = (self.prices[choice] for _, choice in gene)
        return calls <= self.calls + 1e-9 and sum(price or 0.0 for price in prices) <= self.cost * (1 + 1e-9)

    def plan(self, gene: Gene) -> Plan:
        """Return the plan of a gene."""
        return Plan(
            [self.times[0], *(self.times[end] for end, _ in gene)], [self.choices[choice] for _, choice in gene]
        )

    def every(self) -> Iterator[Gene]:
        """Yield all genes within the limits; their number grows as a power of that of the times."""
        cheapest = min(self.each)
        for steps in range(1, min(self.last, int((self.calls + 1e-9) // max(cheapest, 1e-9))) + 1):
            for inner in itertools.combinations(range(1, self.last), steps - 1):
                for choices in itertools.product(range(len(self.choices)), repeat=steps):
                    gene = tuple(zip((*inner, self.last), choices, strict=True))
                    if self.within(gene):
                        yield gene

    def draw(self, rng: random.Random) -> Gene:
        """Draw a gene within the limits: half of the time with as many steps as the calls allow."""
        most = max(1, min(self.last, int(self.calls // max(min(self.each), 1e-9))))
        steps = most if rng.random() < 0.5 else rng.randint(1, most)
        inner = sorted(rng.sample(range(1, self.last), steps - 1))
        gene = tuple((end, rng.randrange(len(self.choices))) for end in (*inner, self.last))
        return self.shorten(gene, rng)

    def shorten(self, gene: Gene, rng: random.Random) -> Gene:
        """Leave out random steps, then take cheaper ones, until the plan is within the limits."""
        while not self.within(gene) and len(gene) > 1:
            left_out = rng.randrange(len(gene) - 1)
            gene = gene[:left_out] + gene[left_out + 1 :]
        if self.within(gene):
            return gene
        fits = [choice for choice in range(len(self.choices)) if self.within(((self.last, choice),))]
        return ((self.last, rng.choice(fits)),)

    def mutate(self, gene: Gene, rng: random.Random) -> Gene:
        """Return a changed gene: a time moved, added or left out, or another choice; at least one change."""
        for _ in range(1 + (rng.random() < 0.5) + (rng.random() < 0.25)):
            ends, choices = [end for end, _ in gene], [choice for _, choice in gene]
            free = [end for end in range(1, self.last) if end not in ends]
            kind = rng.randrange(4)
            if kind == 0 and len(ends) > 1:  # move a time to a free one between its neighbours, if there is one
                which = rng.randrange(len(ends) - 1)
                low, high = ends[which - 1] if which else 0, ends[which + 1]
                near = [end for end in free if low < end < high]
                ends[which] = rng.choice(near) if near else ends[which]
            elif kind == 1 and free:
                ends.append(rng.choice(free))
                ends.sort()
                choices.insert(rng.randrange(len(ends)), rng.randrange(len(self.choices)))
            elif kind == 2 and len(ends) > 1:
                which = rng.randrange(len(ends) - 1)
                del ends[which], choices[which]
            else:
                choices[rng.randrange(len(choices))] = rng.randrange(len(self.choices))
            gene = tuple(zip(ends, choices, strict=True))
        return self.shorten(gene, rng)

    def cross(self, one: Gene, other: Gene, rng: random.Random) -> Gene:
        """Return the steps of one gene up to a random time, and those of the other after it."""
        cut = rng.randint(1, self.last)
        return self.shorten(
            (*(step for step in one if step[0] < cut), *(step for step in other if step[0] >= cut)), rng
        )

    def __repr__(self) -> str:
        return (
            f"{self.process}, {shown(self.models)}, {self.choices}, {list(self.times)}, {self._limits}, {self.each}, "
            f"{self.prices}"
        )
