r"""Goodness of fit at scale: do these long sequences come from the law an oracle holds?

On V^L with L in the hundreds no cell is ever seen twice, so each test looks at a statistic whose law is known: the
mean log-likelihood (its mean and variance under the law are exact, by dynamic programming), the transitions of a chain
(given how often each token is left, their counts are multinomial), or, where nothing is known of the law, a second
sample.

p-values are scipy's. ``holds`` bounds how often a correct program is blamed.

References: Billingsley (1961) for the counts of a chain; Szekely and Rizzo (2013) for the energy distance.
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
    """A test's statistic and its p-value: the probability of a statistic as extreme if the law is the right one."""

    statistic: float
    pvalue: float


def log_likelihood_test(law: HMM | Tree, x: Int[Tensor, "B L"]) -> Fit:
    """z-test, two-sided, of the mean of log p0(x) against its exact mean and variance under p0.

    The statistic is (mean - expected) sqrt(B / variance). A sequence of probability 0 gives p = 0.

    Raises:
        ValueError: for a law whose log-probability is no sum along the sequence (``log_prob_moments``).
    """
    from scipy import stats

    mean, variance = law.log_prob_moments()
    values = law.log_prob(x).double()
    if not bool(torch.isfinite(values).all()):
        return Fit(-math.inf, 0.0)
    gap = float(values.mean()) - mean
    if variance < 1e-12:  # every sequence is equally likely, and these have the right likelihood or not
        return Fit(0.0, 1.0) if abs(gap) < 1e-6 else Fit(math.inf, 0.0)
    z = gap * math.sqrt(len(x) / variance)
    return Fit(z, float(2 * stats.norm.sf(abs(z))))


def transition_test(chain: MarkovChain, x: Int[Tensor, "B L"]) -> Fit:
    """Chi-square of the transition counts given the row totals; V (V - 1) degrees of freedom where all are possible.

    Given how often each token is left, the counts of a row are asymptotically multinomial, although neighbouring pairs
    overlap (Billingsley, 1961). Cells of a row that expect fewer than 5 are pooled. An impossible transition gives p =
    0.
    """
    from scipy import stats

    chain._check_clean(x)
    size = chain.alphabet
    pairs = (x[:, :-1] * size + x[:, 1:]).flatten()
    counts = torch.bincount(pairs, minlength=size**2).view(size, size).double().cpu()
    expected = chain.transition.double().cpu() * counts.sum(-1, keepdim=True)
    if bool((counts[chain.transition.cpu() == 0] > 0).any()):
        return Fit(math.inf, 0.0)
    statistic, freedom = 0.0, 0
    for seen, mean in zip(counts, expected, strict=True):
        small = mean < 5
        cells = torch.cat([seen[~small], seen[small].sum()[None]]), torch.cat([mean[~small], mean[small].sum()[None]])
        kept = cells[1] >= 1
        if int(kept.sum()) > 1:
            statistic += float(((cells[0] - cells[1]) ** 2 / cells[1])[kept].sum())
            freedom += int(kept.sum()) - 1
    return Fit(statistic, float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0)


def two_sample(x: Int[Tensor, "B L"], y: Int[Tensor, "C L"], statistic: Callable[[Tensor], Float[Tensor, " N"]]) -> Fit:
    """Kolmogorov-Smirnov test that a scalar of the sequences has one law in both samples.

    Args:
        x, y: two samples.
        statistic: (N, L) sequences -> (N,) numbers, such as ``law.log_prob``.
    """
    from scipy import stats

    done = stats.ks_2samp(*(statistic(sample).double().cpu().numpy() for sample in (x, y)))
    return Fit(float(done.statistic), float(done.pvalue))


def energy_test(x: Int[Tensor, "B L"], y: Int[Tensor, "C L"], permutations: int = 999, seed: int = 0) -> Fit:
    """Energy distance under the Hamming distance, E 2 d(X, Y) - d(X, X') - d(Y, Y'), with a permutation p-value.

    Knows nothing of the law. The p-value is (1 + k) / (1 + permutations), where k permutations are as extreme, so it is
    exact and never below 1 / (1 + permutations). Memory is quadratic in the number of sequences.

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
    """Whether a statistical test passes, a correct program failing with probability ``rate`` at most.

    Args:
        test: seed -> p-value.
        rate: of false alarms. The test fails if p < sqrt(rate) for one seed and again for an independent one, so chance
            needs two misses and a real fault, which is missed twice as seldom, is still found.

    Raises:
        ValueError: if ``rate`` is not in (0, 1), or a p-value is none.
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
