"""Searches that learn from the plans they have scored: evolution, and a surrogate that predicts scores in stages."""

import math
from dataclasses import dataclass

import numpy as np

from discdiff.checks import real, whole
from discdiff.plans.methods import Method
from discdiff.plans.space import Gene, Space
from discdiff.plans.trials import Trials

__all__ = ["Evolution", "Surrogate"]


@dataclass(frozen=True)
class Evolution(Method):
    """Change and cross the best plans, generation by generation (AutoDiffusion).

    Grid, operator, number of corrections, temperature and network of every step are all part of a plan, and change.
    The first generation is random. A later one keeps the best plans, and fills up with changed plans, crossed ones and
    random ones. No plan is scored twice.

    Args:
        evaluations: the number of plans that are scored.
        population: the size of a generation.
        parents: how many of the best plans are parents of the next generation.
        mutations, crossings: the shares of a generation that are changed and crossed parents; the rest is random.

    Raises:
        TypeError, ValueError: for an argument out of range.

    Reference: AutoDiffusion (Li et al., 2023, https://arxiv.org/abs/2309.10438).
    """

    evaluations: int = 200
    population: int = 40
    parents: int = 10
    mutations: float = 0.6
    crossings: float = 0.3

    def __post_init__(self) -> None:
        whole(self.evaluations, "Evolution: evaluations", 1)
        whole(self.population, "Evolution: population", 2)
        whole(self.parents, "Evolution: parents", 1)
        real(self.mutations, "Evolution: mutations", "[0, 1]")
        real(self.crossings, "Evolution: crossings", "[0, 1]")

    def run(self, trials: Trials) -> None:
        space, rng = trials.space, trials.random
        ranked: list[tuple[float, Gene]] = []
        for generation in range(max(1, 100 * self.evaluations)):
            parents = [gene for _, gene in ranked[: self.parents]]
            fresh: list[Gene] = []
            for _ in range(20 * self.population):
                if len(fresh) == self.population:
                    break
                u = rng.random()
                if generation == 0 or not parents or u >= self.mutations + self.crossings:
                    gene = space.draw(rng)
                elif u < self.mutations:
                    gene = space.mutate(rng.choice(parents), rng)
                else:
                    gene = space.cross(rng.choice(parents), rng.choice(parents), rng)
                if gene not in fresh and not trials.known(gene):
                    fresh.append(gene)
            for gene in fresh[: self.evaluations - len(ranked)]:
                ranked.append((trials.score(gene), gene))
            ranked.sort(key=lambda each: each[0])
            if not fresh or len(ranked) >= self.evaluations:
                return

    def total(self, space: Space) -> int | None:
        return self.evaluations


@dataclass(frozen=True)
class Surrogate(Method):
    """Score the plans that a predictor ranks best, and fit the predictor again, in stages (S³).

    The predictor is a ridge regression of the objective, or of its log if no value is below 0, on features of a plan:
    for every interval of the fine grid the length of the step that covers it, its square, its choice, and the step
    itself.

    Args:
        evaluations: the number of plans that are scored.
        first: how many of them are random, before the first fit.
        stages: how many times the predictor is fitted.
        proposals: how many plans are predicted in each stage.
        ridge: the weight of the squared coefficients.

    Reference: S³, of the unified sampling framework (Liu et al., 2023, https://arxiv.org/abs/2312.07243).

    Raises:
        TypeError, ValueError: for an argument out of range.
    """

    evaluations: int = 200
    first: int = 60
    stages: int = 7
    proposals: int = 1000
    ridge: float = 0.1

    def __post_init__(self) -> None:
        whole(self.evaluations, "Surrogate: evaluations", 1)
        whole(self.first, "Surrogate: first", 2)
        whole(self.stages, "Surrogate: stages", 1)
        whole(self.proposals, "Surrogate: proposals", 1)
        real(self.ridge, "Surrogate: ridge", "(0, inf)")

    def run(self, trials: Trials) -> None:
        space, rng = trials.space, trials.random
        scored: list[tuple[float, Gene]] = []
        for _ in range(20 * self.first):
            gene = space.draw(rng)
            if not trials.known(gene) and len(scored) < min(self.first, self.evaluations):
                scored.append((trials.score(gene), gene))
        left = self.evaluations - len(scored)
        for stage in range(self.stages):
            count = left * (stage + 1) // self.stages - left * stage // self.stages
            best = [gene for _, gene in sorted(scored, key=lambda each: each[0])[:10]]
            offered = list(dict.fromkeys(
                space.draw(rng) if rng.random() < 0.3 or not best else space.mutate(rng.choice(best), rng)
                for _ in range(self.proposals)
            ))  # fmt: skip
            offered = [gene for gene in offered if not trials.known(gene)]
            if not offered:
                return
            order = np.argsort(self._predicted(scored, offered, space), kind="stable")
            for index in order[:count]:
                scored.append((trials.score(offered[int(index)]), offered[int(index)]))

    def _predicted(self, scored: list[tuple[float, Gene]], offered: list[Gene], space: Space) -> np.ndarray:
        """Return the predicted objectives of the offered plans, or their logs if none is below 0."""
        finite = [(value, gene) for value, gene in scored if math.isfinite(value)]
        if len(finite) < 2:
            return np.zeros(len(offered))
        y = np.array([value for value, _ in finite])
        if y.min() >= 0:
            y = np.log(y.clip(1e-300))
        x, new = (np.stack([features(gene, space) for gene in genes]) for genes in ([g for _, g in finite], offered))
        middle, mean = x.mean(0), y.mean()
        x, new = x - middle, new - middle
        # the dual form: as many unknowns as plans
        weights = np.linalg.solve(x @ x.T + self.ridge * np.eye(len(x)), y - mean)
        return new @ (x.T @ weights) + mean

    def total(self, space: Space) -> int | None:
        return self.evaluations


def features(gene: Gene, space: Space) -> np.ndarray:
    """Return the features of a plan.

    They are, for every interval of the fine grid, the length of the step that covers it, its square and its choice; one
    for each possible step, which is 1 if the plan has it; and the number of steps.
    """
    last, kinds = space.last, len(space.choices)
    cells, steps, begin = np.zeros((last, 2 + kinds)), np.zeros((last, last, kinds)), 0
    for end, choice in gene:
        length = space.times[begin] - space.times[end]
        cells[begin:end, 0], cells[begin:end, 1], cells[begin:end, 2 + choice] = length, length**2, 1
        steps[begin, end - 1, choice] = 1
        begin = end
    return np.concatenate([cells.ravel(), steps.ravel(), [len(gene)]])
