"""Plans that are found: objectives, searches, statistics of a network, and noise that is scored and used again."""

from discdiff.plans.correcting import Excess, excess
from discdiff.plans.evolving import Evolution, Surrogate
from discdiff.plans.found import Found, Trial, front
from discdiff.plans.intervals import Measured, measure
from discdiff.plans.klub import KLUB
from discdiff.plans.methods import Dynamic, GoldenSection, Method, Random
from discdiff.plans.noise import ScoredNoise, score_noise
from discdiff.plans.objectives import KL, Judge, Objective, TotalCorrelation
from discdiff.plans.searching import search
from discdiff.plans.space import Space
from discdiff.plans.trials import Trials

__all__ = [
    "KL", "KLUB", "Dynamic", "Evolution", "Excess", "Found", "GoldenSection", "Judge", "Measured", "Method",
    "Objective", "Random", "ScoredNoise", "Space", "Surrogate", "TotalCorrelation", "Trial", "Trials", "excess",
    "front", "measure", "score_noise", "search",
]  # fmt: skip


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted(__all__)
