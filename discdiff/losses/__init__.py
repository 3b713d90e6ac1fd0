"""Training objectives: bounds on the negative log-likelihood, estimated from a batch."""

from discdiff.losses.base import (
    AbsorbingNELBO,
    AnyOrder,
    Continuous,
    DiscreteBound,
    Estimate,
    MaskedNELBO,
    Objective,
    PathKL,
    ScoreEntropy,
    UniformNELBO,
    prior_kl,
)
from discdiff.losses.blocks import BlockLikelihood, BlockMixture, Blocks

__all__ = [
    "AbsorbingNELBO", "AnyOrder", "BlockLikelihood", "BlockMixture", "Blocks", "Continuous", "DiscreteBound",
    "Estimate", "MaskedNELBO", "Objective", "PathKL", "ScoreEntropy", "UniformNELBO", "prior_kl",
]  # fmt: skip
