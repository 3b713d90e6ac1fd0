r"""Boundary draws: initial noise is scored once, and its best draws are used again.

A run with few steps depends on its first state z_1. Each of M draws of it is scored by what its runs end in, and the
best draws begin later runs. Their law is

    law(x) = sum_z w(z) law(x | z_1 = z),       w the frequencies of the kept draws

It is not the law of fresh noise: it gains score and gives up diversity. ``theory.law(sampler, initial=kept.law(...))``
is exact on small worlds, so both can be seen side by side.

Where alpha(1) = 0 the first state tells nothing of the data, and exact ancestral steps give every first state the same
law: then there is nothing to gain.

Reference: optimal boundary conditions (Ma et al., 2023, https://arxiv.org/abs/2305.15357), here for discrete noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, seeded, shown, whole
from discdiff.kernels.dispatch import draw
from discdiff.process import Process
from discdiff.sampling import Sampler
from discdiff.theory.world import check_size, state_index

__all__ = ["ScoredNoise", "score_noise"]


@dataclass(frozen=True)
class ScoredNoise:
    """Draws of the first state and their scores: ``sampler.sample(initial=kept.draw(16, seed=0), seed=1)``.

    Attributes:
        tokens: (M, L) states at the first time of the grid.
        scores: (M,) float64; larger is better.
    """

    tokens: Int[Tensor, "M L"]
    scores: Float[Tensor, " M"]

    def keep(self, count: SupportsIndex) -> "ScoredNoise":
        """Return the draws with the ``count`` largest scores, the best first; raises ValueError for another number."""
        count = whole(count, "keep: count", 1, len(self.tokens))
        best = self.scores.argsort(descending=True, stable=True)[:count]
        return ScoredNoise(self.tokens[best], self.scores[best])

    def draw(self, batch: SupportsIndex, *, seed: SupportsIndex, first_row: SupportsIndex = 0) -> Int[Tensor, "B L"]:
        """Return uniform draws (B, L) among the kept states; a row depends on the seed and its number alone.

        Raises ValueError for a number or a seed out of range.
        """
        count = whole(batch, "draw: batch", 1)
        first = whole(first_row, "draw: first_row", 0, LAST_SEED - count)
        rows, place = first + torch.arange(count), torch.zeros(count, dtype=torch.int64)
        even = torch.zeros(1, len(self.tokens)).expand(count, -1)
        return self.tokens[draw(even, seed=seeded(seed, "draw: seed"), rows=rows, positions=place)]

    def law(self, process: Process) -> Float[Tensor, " N"]:
        """Return the law (N,) of a draw over the N = S**L states, for ``theory.law(sampler, initial=)``."""
        length = self.tokens.shape[1]
        check_size(process.states, length, "ScoredNoise.law")
        counts = torch.zeros(process.states**length, dtype=torch.float64)
        each = torch.full((len(self.tokens),), 1 / len(self.tokens), dtype=torch.float64)
        return counts.index_add(0, state_index(self.tokens, process.states), each)


def score_noise(
    sampler: Sampler,
    score: Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]],
    *,
    count: SupportsIndex = 64,
    repeats: SupportsIndex = 4,
    length: SupportsIndex | None = None,
    seed: SupportsIndex = 0,
) -> ScoredNoise:
    """Draw first states from the prior and score each by the mean score of the runs that begin in it.

    Args:
        sampler: the sampler, whose grid begins at t = 1.
        score: a function of data tokens (B, L) that returns numbers (B,), larger is better, such as a log-likelihood.
        count: M, the number of draws.
        repeats: the number of runs from each.
        length: L, needed if the model has none of its own.
        seed: the seed of draws and runs.

    Raises:
        ValueError: on a process whose prior is a single state, such as ``Masked``; if the scores have another shape.
    """
    process, count, repeats = sampler.process, whole(count, "count", 1), whole(repeats, "repeats", 1)
    size = sampler.model.length if length is None else whole(length, "length", 1)
    if size is None:
        raise ValueError("score_noise: length= must say how many sites; this model has no length of its own")
    if process.masks:
        raise ValueError(f"score_noise: the prior of {process} is a single state, so there is nothing to choose")
    seed = seeded(seed, "score_noise: seed")
    start = sampler.start(count, size, seed=seed).tokens
    runs = sampler.sample(initial=start.repeat_interleave(repeats, 0), seed=(seed + 1) % 2**64)
    found = score(runs.tokens)
    if not isinstance(found, Tensor) or found.shape != (count * repeats,):
        raise ValueError(
            f"score_noise: score must give ({count * repeats},) numbers, one a sequence, got {shown(found)}"
        )
    return ScoredNoise(start, found.double().view(count, repeats).mean(1))
