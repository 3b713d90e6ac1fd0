r"""Follow each ancestral step by a fixed number of Gibbs moves: order about 2 from two simpler methods.

An ancestral step has an error of O(h^2). The Gibbs moves after it contract the accumulated error by a factor rho that
does not depend on h, so the remaining error is O(h^2) / (1 - rho) instead of O(h). In a long sequence one move changes
one site of L, so the gain per call depends on how many sites move at once: several in parallel cost one call but
preserve p_t only approximately.

References: predictor-corrector sampling (Campbell et al., 2022, https://arxiv.org/abs/2205.14987; Zhao et al., 2024,
https://arxiv.org/abs/2407.21243).
"""

from discdiff.operator import Operator
from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.gibbs import Gibbs

__all__ = ["ancestral_gibbs"]


def ancestral_gibbs(moves: int = 1, sites: int = 1) -> Operator:
    """Return ``Ancestral() >> Gibbs(sites) ** moves``; 1 + moves denoiser calls a step."""
    return Ancestral() >> Gibbs(sites) ** moves
