"""What a search minimises: the exact KL of a small world, or the likelihood of samples under a judge."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real, seeded, shown, whole
from discdiff.plans.matrices import Matrices
from discdiff.samplers import Reveal
from discdiff.sampling import Sampler, Step
from discdiff.theory import Enumeration, MarkovChain, total_correlation
from discdiff.theory import kl as divergence
from discdiff.theory import law as law_of
from discdiff.theory.world import law_of_data, law_of_prior

__all__ = ["KL", "Judge", "Objective", "TotalCorrelation"]


class Objective(ABC):
    """A number for each sampler, smaller is better; ``search`` minimises it over plans."""

    @abstractmethod
    def score(self, sampler: Sampler) -> float:
        """Return the number of a sampler; infinity excludes its plan."""

    def prepare(self, times: tuple[float, ...], first: Step | None = None) -> None:  # noqa: B027  # most need nothing
        """Prepare for plans whose times are among ``times``; a search calls it once, with its first choice."""


class KL(Objective):
    """KL(p0 || law) in nats, exact, of the end law that ``theory.law`` enumerates.

    Args:
        world: the data law.

    Raises:
        TypeError: if the world is no Enumeration.
    """

    def __init__(self, world: Enumeration) -> None:
        if not isinstance(world, Enumeration):
            raise TypeError(f"KL: takes a listed law, theory.Enumeration, got {shown(world)}")
        self.world: Enumeration = world
        self._matrices = Matrices(world.length)

    def score(self, sampler: Sampler) -> float:
        process, steps = sampler.process, sampler.plan.steps
        if sampler.grid[0] != 1 or sampler.grid[-1] > 0 or any(step.operator.remembers for step in steps):
            found = law_of(sampler, length=self.world.length)
        else:
            law = law_of_prior(process, self.world.length)
            for (_, t, s), step in zip(sampler.intervals(), steps, strict=True):
                law = law @ self._matrices.of(sampler, step, t, s)
            found = law_of_data(process, law, self.world.length)
            if abs(float(found.sum()) - 1) > 1e-6:  # masks are left, or a choice has no value: the law says which
                found = law_of(sampler, length=self.world.length)
        return max(0.0, divergence(self.world.p0, found / found.sum()))

    def __repr__(self) -> str:
        return f"KL({_named(self.world.p0)})"


class Judge(Objective):
    """Mean negative log-likelihood of samples under a judge, in nats a sequence; a floor on their entropy.

    A judge alone prefers plans that repeat its likeliest sequences. So a plan whose samples have less entropy than
    ``floor`` is excluded. The entropy is that of the frequencies of tokens within a sequence, averaged over sequences.

    Args:
        log_prob: the judge, a function of tokens (B, L) that returns natural logs (B,).
        length: L.
        floor: the least entropy of a sequence's tokens, in nats; 0 excludes no plan.
        samples: the number of samples of each plan; all plans use the same seed.
        seed: the seed.

    Raises:
        TypeError, ValueError: for an argument of another type or out of range; in scoring, if the judge gives NaN.
    """

    def __init__(
        self, log_prob: Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]], *, length: SupportsIndex,
        floor: float = 0.0, samples: SupportsIndex = 64, seed: SupportsIndex = 0,
    ) -> None:  # fmt: skip
        if not callable(log_prob):
            raise TypeError(f"Judge: log_prob must be a function of tokens (B, L), got {shown(log_prob)}")
        self.log_prob: Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]] = log_prob
        self.length: int = whole(length, "Judge: length", 1)
        self.floor: float = real(floor, "Judge: floor", "[0, inf)")
        self.samples: int = whole(samples, "Judge: samples", 1)
        self.seed: int = seeded(seed, "Judge: seed")

    def score(self, sampler: Sampler) -> float:
        """Return the mean of -log_prob of samples; raises ValueError if the judge gives NaN."""
        tokens = sampler.sample(self.samples, self.length, seed=self.seed).tokens
        if self.entropy(tokens) < self.floor:
            return math.inf
        found = float(-self.log_prob(tokens).double().mean())
        if math.isnan(found):
            raise ValueError("Judge: log_prob gave NaN")
        return found

    @staticmethod
    def entropy(tokens: Int[Tensor, "B L"]) -> float:
        """Return the mean entropy of the frequencies of tokens within each sequence of (B, L), in nats."""
        counts = torch.nn.functional.one_hot(tokens).double().mean(1)
        return float(-torch.special.xlogy(counts, counts).sum(-1).mean())

    def __repr__(self) -> str:
        return f"Judge(length={self.length}, floor={self.floor}, samples={self.samples}, seed={self.seed})"


class TotalCorrelation(Objective):
    """KL(p0 || law) in nats, exact at any length, of plans that reveal all sites in an order by position.

    Such a plan is one step of ``Reveal``, "spread" or "left_to_right", from 1 to 0. Other plans are excluded.

    Args:
        world: the data law, an ``Enumeration`` or a ``MarkovChain``.

    Raises:
        TypeError: for another law.
    """

    def __init__(self, world: Enumeration | MarkovChain) -> None:
        if not isinstance(world, Enumeration | MarkovChain):
            raise TypeError(f"TotalCorrelation: takes an Enumeration or a MarkovChain, got {shown(world)}")
        self.world = world

    def score(self, sampler: Sampler) -> float:
        step = sampler.plan.steps[0].operator
        if len(sampler.plan.steps) > 1 or not isinstance(step, Reveal) or not step.positional:
            return math.inf
        return total_correlation(self.world, step.groups(self.world.length))

    def __repr__(self) -> str:
        law = self.world.p0 if isinstance(self.world, Enumeration) else self.world.transition
        return f"TotalCorrelation({self.world.length}, {_named(law)})"


def _named(numbers: Tensor) -> str:
    """Return a short text that differs for different numbers."""
    flat = numbers.double().flatten()
    weight = torch.arange(1, len(flat) + 1, dtype=torch.float64).sqrt()
    return f"{tuple(numbers.shape)}, {float((flat * weight).sum())!r}"
