r"""Ancestral steps with a fixed number of Gibbs moves after each: order about 2 from two methods that are simpler.

An ancestral step errs by O(h^2); the Gibbs moves at its end contract what errors there are by a factor rho that does
not depend on h, so the error that is left is O(h^2) / (1 - rho) instead of O(h). In a long sequence one move touches
one site of L, and what is gained a call depends on how many sites can be moved at once: ``sites`` in parallel are only
approximately invariant, and cheap.

Reference: predictor-corrector sampling (Campbell et al., 2022; Zhao et al., 2024).
"""

from discdiff.operator import Operator
from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.gibbs import Gibbs

__all__ = ["ancestral_gibbs"]


def ancestral_gibbs(moves: int = 1, sites: int = 1) -> Operator:
    """``Ancestral() >> Gibbs(sites) ** moves``; 1 + moves denoiser calls a step."""
    return Ancestral() >> Gibbs(sites) ** moves
