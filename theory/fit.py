r"""Test whether long sequences come from the law of an oracle (goodness of fit at scale).

On V^L with L in the hundreds no sequence occurs twice, so each test uses a statistic whose law is known. One is the
mean log-likelihood: dynamic programming gives its exact mean and variance. Another is the counts of a chain's
transitions: given the number of transitions from each token, they are asymptotically multinomial. If nothing is known
of the law, two samples are compared.

p-values are scipy's or from permutations. ``holds`` bounds the probability that a correct program fails.

References: counts of a chain (Billingsley, 1961, https://doi.org/10.1214/aoms/1177705136); energy distance (Szekely and
Rizzo, 2013, https://doi.org/10.1016/j.jspi.2013.03.018).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import affordable, array, real, shown, whole
from discdiff.theory.chain import HMM, MarkovChain
from discdiff.theory.tree import Tree

__all__ = ["Fit", "energy_test", "holds", "log_likelihood_test", "transition_test", "two_sample"]


@dataclass(frozen=True)
class Fit:
    """Statistic of a test, and the probability (p-value) of a value at least as extreme if the law is right."""

    statistic: float
    pvalue: float


def log_likelihood_test(law: HMM | Tree, x: Int[Tensor, "B L"]) -> Fit:
    """Test the mean of log p0(x) against its exact mean and variance under p0 (two-sided z-test).

    The sample x is (B, L). The statistic is (mean - exact mean) sqrt(B / variance). If x has a sequence of
    probability 0, the p-value is 0.

    Raises:
        ValueError: if the log-probability is not a sum along the sequence (see ``log_prob_moments``).
    """
    from scipy import stats

    mean, variance = law.log_prob_moments()
    values = law.log_prob(x).double()
    if not bool(torch.isfinite(values).all()):
        return Fit(-math.inf, 0.0)
    gap = float(values.mean()) - mean
    if variance < 1e-12:  # all sequences are equally likely: the mean is exact or wrong
        return Fit(0.0, 1.0) if abs(gap) < 1e-6 else Fit(math.inf, 0.0)
    z = gap * math.sqrt(len(x) / variance)
    return Fit(z, float(2 * stats.norm.sf(abs(z))))


def transition_test(chain: MarkovChain, x: Int[Tensor, "B L"]) -> Fit:
    """Test the transition counts of a sample (B, L) by chi-square, given the number of transitions from each token.

    There are V (V - 1) degrees of freedom if all transitions are possible and no cells are pooled. The counts from one
    token are asymptotically multinomial, although neighbouring pairs overlap (Billingsley, 1961). An impossible
    transition gives p = 0.

    Raises:
        ValueError: for a chain with a transition matrix for each step.
    """
    if chain.transition.ndim == 3:
        raise ValueError("transition_test: the chain must have one transition matrix for all steps")
    chain._check_clean(x)
    size = chain.alphabet
    pairs = (x[:, :-1] * size + x[:, 1:]).flatten()
    counts = torch.bincount(pairs, minlength=size**2).view(size, size).double().cpu()
    return chi_square(counts, chain.transition.double().cpu() * counts.sum(-1, keepdim=True))


def chi_square(seen: Float[Tensor, "R n"], expected: Float[Tensor, "R n"]) -> Fit:
    """Test counts (R, n) by chi-square, given the total of each row.

    A positive count where 0 is expected gives p = 0. In each row the cells with an expected count below 5 are pooled.
    Further cells join the pool, in increasing order of their expected counts, until the pool's expected count is at
    least 5.
    """
    from scipy import stats  # imported here, because scipy takes half a second

    if bool((seen[expected == 0] > 0).any()):
        return Fit(math.inf, 0.0)
    statistic, freedom = 0.0, 0
    for mean, order, row in zip(*expected.sort(-1), seen, strict=True):
        rare = int(((mean < 5) | (mean.cumsum(0) - mean < 5)).sum())
        cells, law = (torch.cat([part[:rare].sum()[None], part[rare:]]) for part in (row[order], mean))
        if len(law) > 1:
            statistic += float(((cells - law) ** 2 / law).sum())
            freedom += len(law) - 1
    return Fit(statistic, float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0)


def improbable(seen: Float[Tensor, " n"], expected: Float[Tensor, " n"]) -> float:
    """Compute -log10 of the p-value of ``chi_square`` for one row of counts.

    Expected counts of at most 1e-9 of their sum are set to 0, as they may be rounding errors.
    """
    expected = expected.where(expected > 1e-9 * expected.sum(), 0.0)
    return math.log10(1 / max(chi_square(seen[None], expected[None]).pvalue, 1e-300))


def two_sample(x: Int[Tensor, "B L"], y: Int[Tensor, "C L"], statistic: Callable[[Tensor], Float[Tensor, " N"]]) -> Fit:
    """Test by Kolmogorov-Smirnov that a number computed from each sequence has the same law in both samples.

    Args:
        x, y: two samples, (B, L) and (C, L).
        statistic: a function from (N, L) sequences to (N,) numbers, such as ``law.log_prob``.
    """
    from scipy import stats

    done = stats.ks_2samp(*(statistic(sample).double().cpu().numpy() for sample in (x, y)))
    return Fit(float(done.statistic), float(done.pvalue))


def energy_test(x: Int[Tensor, "B L"], y: Int[Tensor, "C L"], permutations: int = 999, seed: int = 0) -> Fit:
    """Test two samples by the energy distance E[2 d(X, Y) - d(X, X') - d(Y, Y')] with the Hamming distance d.

    The samples are (B, L) and (C, L). The law need not be known. The p-value is (1 + k) / (1 + permutations), where k
    permutations have at least the distance of the given samples. The p-value is exact and at least
    1 / (1 + permutations). Memory is quadratic in the number of sequences.

    Raises:
        ValueError: for samples of different length.
    """
    x, y = array(x, "energy_test: x"), array(y, "energy_test: y")
    if x.ndim != 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"energy_test: samples must be (B, L) and (C, L), got {tuple(x.shape)} and {tuple(y.shape)}")
    permutations = whole(permutations, "energy_test: permutations", 1)
    affordable(permutations * (len(x) + len(y)), f"energy_test: {permutations} permutations")
    seed = whole(seed, "energy_test: seed", 0)
    both = torch.cat([x, y])
    n = len(both)
    distance = torch.stack([(row != both).double().mean(-1) for row in both]).cpu().numpy()
    labels = np.r_[np.full(len(x), 1 / len(x)), np.full(len(y), -1 / len(y))]
    rng = np.random.default_rng(seed)
    signs = np.stack([labels, *(labels[rng.permutation(n)] for _ in range(permutations))])
    energy = -np.einsum("pn,pn->p", signs @ distance, signs)
    extreme = int((energy[1:] >= energy[0] - 1e-15).sum())
    return Fit(float(energy[0]), (1 + extreme) / (1 + permutations))


def holds(test: Callable[[int], float], rate: float = 1e-6) -> bool:
    """Return whether a statistical test passes; a correct program fails with probability at most ``rate``.

    Args:
        test: a function from a seed to a p-value.
        rate: the probability of a false alarm. The test fails if p < sqrt(rate) for both of two seeds. Each single test
            has the larger threshold sqrt(rate), and so keeps its power.

    Raises:
        TypeError: if ``test`` is not callable.
        ValueError: if ``rate`` is not in (0, 1), or ``test`` returns a number outside [0, 1].
    """
    rate = real(rate, "holds: rate", "(0, 1)")
    if not callable(test):
        raise TypeError(f"holds: test must be a function of a seed, got {shown(test)}")
    for seed in (0, 1):
        pvalue = test(seed)
        if not 0 <= pvalue <= 1:
            raise ValueError(f"holds: the test must return a p-value in [0, 1], got {pvalue}")
        if pvalue >= math.sqrt(rate):
            return True
    return False
