"""Goodness of fit: exact moments, calibrated p-values, and faults that each test must see."""

import math

import numpy as np
import pytest
import torch
from problems import chain, states
from scipy import stats

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory import fit

EVEN = torch.tensor([[0, 1, 0], [1, 0, 1]])  # the parity of token 1


def tree(length: int = 5, vocab_size: int = 3) -> T.Tree:
    rng = np.random.default_rng(2)
    rows = torch.as_tensor(rng.dirichlet(np.ones(vocab_size), size=(length, vocab_size)))
    return T.Tree([-1, *(i // 2 for i in range(length - 1))], torch.as_tensor(rng.dirichlet(np.ones(vocab_size))), rows)


LAWS = [chain(3, 5), T.ConstrainedChain(chain(3, 5), EVEN, accepting={0}), tree()]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_moments_are_exact(law: T.MarkovChain) -> None:
    log_p = law.log_prob(states(3, 5))
    p = log_p.exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    log_p = log_p.where(p > 0, 0.0)
    mean = float((p * log_p).sum())
    found = law.log_prob_moments()
    assert found[0] == pytest.approx(mean, abs=1e-10)
    assert found[1] == pytest.approx(float((p * (log_p - mean) ** 2).sum()), abs=1e-10)


def test_moments_of_ambiguous_paths_are_refused() -> None:
    c = chain(3, 5)
    blurred = T.HMM(c.initial, c.transition, torch.full((3, 3), 1 / 3), length=5)
    with pytest.raises(ValueError, match="not a sum along the sequence"):
        blurred.log_prob_moments()


def pvalues(law: T.MarkovChain, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    return {
        "log-likelihood": fit.log_likelihood_test(law, x).pvalue,
        "transitions": fit.transition_test(law, x).pvalue,
        "two samples": fit.two_sample(x, y, law.log_prob).pvalue,
        "energy": fit.energy_test(x, y, 99).pvalue,
    }


def test_null_pvalues_are_uniform(failure_rate: float) -> None:
    """150 replications of each test on exact draws, against the uniform law; and a shifted null would be seen."""
    law, found = chain(4, 64), []
    for seed in range(150):
        found.append(pvalues(law, law.sample(60, 2 * seed + 1000), law.sample(60, 2 * seed + 1001)))
    for name in found[0]:
        p = np.array([row[name] for row in found])
        # permutation p-values are multiples of 1 / 100: spread within their cell
        spread = p - np.random.default_rng(0).uniform(size=150) / 100 if name == "energy" else p
        assert stats.kstest(spread, "uniform").pvalue > failure_rate, name
        assert stats.kstest(spread**2.5, "uniform").pvalue < failure_rate, name


def test_faults_are_seen(failure_rate: float) -> None:
    law = chain(4, 64)
    process = dd.Masked(4, dd.Linear())
    coarse = dd.Sampler(process, law.denoiser(process), S.Ancestral(), steps=2).sample(600, seed=0).tokens
    found = pvalues(law, coarse, law.sample(600, 1))
    assert found["log-likelihood"] < failure_rate
    assert found["transitions"] < failure_rate
    assert found["two samples"] < failure_rate
    other = chain(4, 64, seed=6)
    assert fit.energy_test(other.sample(100, 0), law.sample(100, 1), 999).pvalue == 1 / 1000
    bent = T.MarkovChain(law.initial, 0.9 * law.transition + 0.025, length=64)
    assert fit.transition_test(law, bent.sample(400, 0)).pvalue < failure_rate


def test_the_impossible_has_no_probability() -> None:
    law = T.MarkovChain(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [0.5, 0.5]]), length=4)
    x = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert fit.log_likelihood_test(law, x).pvalue == 0
    assert fit.transition_test(law, x).pvalue == 0
    alternating = T.MarkovChain(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), length=4)
    assert fit.log_likelihood_test(alternating, alternating.sample(9, 0)).pvalue == 1, "all are equally likely"


def test_two_misses_are_needed() -> None:
    seen = []

    def unlucky_once(seed: int) -> float:
        seen.append(seed)
        return 1e-9 if seed == 0 else 0.5

    assert fit.holds(unlucky_once)
    assert seen == [0, 1]
    assert not fit.holds(lambda seed: 1e-4)
    assert fit.holds(lambda seed: 2e-3)
    with pytest.raises(ValueError, match="p-value"):
        fit.holds(lambda seed: math.nan)


def test_sampler_at_256_sites_is_judged_by_its_steps() -> None:
    """The z-test rejects few steps, and its statistic shrinks as they grow."""
    law, process = chain(4, 256), dd.Masked(4, dd.Linear())
    z = []
    for n in (4, 64):
        sampler = dd.Sampler(process, law.denoiser(process), S.Ancestral(), steps=n)
        z.append(fit.log_likelihood_test(law, sampler.sample(200, seed=0).tokens).statistic)
    assert z[0] < -6
    assert z[0] < 3 * z[1]
