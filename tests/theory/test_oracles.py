"""Oracles at scale: each equals the brute force of its definition, and runs at thousands of sites."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ledger import caught, within
from problems import chain, families, pairs, states
from scipy import stats

import discdiff as dd
from discdiff import theory as T

V, L = 3, 4
PARENTS = [-1, 0, 0, 1]
PARITY = torch.tensor([[0, 1, 0], [1, 0, 1]])  # of the number of 1s


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.7), size=shape[:-1]))


def hmm(length: int = L) -> T.HMM:
    return T.HMM(rows(1, 2)[0], rows(2, 2, seed=1), rows(2, V, seed=2), length)


def constrained(length: int = L) -> T.ConstrainedChain:
    return T.ConstrainedChain(chain(V, length), PARITY, accepting={0})


def tree(length: int = L) -> T.Tree:
    parents = PARENTS if length == L else [-1, *(i // 3 for i in range(length - 1))]
    return T.Tree(parents, rows(1, V, seed=3)[0], rows(length, V, V, seed=4))


def mixture(length: int = L) -> T.ProductMixture:
    theta = rows(3, length, V, seed=6)
    theta[0, 1] = torch.tensor([1.0, 0, 0])  # exact zeros, of which a product without its own factor must be free
    return T.ProductMixture(rows(1, 3, seed=5)[0], theta)


def markov(length: int = L) -> T.MarkovChain:
    return chain(V, length)


MAKERS: list[Callable[[], T.Oracle]] = [markov, hmm, constrained, tree, mixture]


def brute(law: T.Oracle) -> torch.Tensor:
    """p0 over V^L, from the definitions in the docstrings."""
    p = []
    for x in states(V, L).tolist():
        if isinstance(law, T.ProductMixture):
            p.append(
                sum(
                    float(w) * math.prod(float(law.theta[k, i, x[i]]) for i in range(L))
                    for k, w in enumerate(law.weights)
                )
            )
        elif isinstance(law, T.Tree):
            p.append(
                float(law.root[x[0]]) * math.prod(float(law.transition[i, x[PARENTS[i]], x[i]]) for i in range(1, L))
            )
        elif isinstance(law, T.ConstrainedChain):
            c = chain(V, L)
            free = float(c.initial[x[0]]) * math.prod(float(c.transition[a, b]) for a, b in itertools.pairwise(x))
            p.append(free * (x.count(1) % 2 == 0))
        else:
            total = 0.0
            for h in itertools.product(range(len(law.initial)), repeat=L):
                path = float(law.initial[h[0]]) * math.prod(
                    float(law.transition[a, b]) for a, b in itertools.pairwise(h)
                )
                total += path * math.prod(float(law.emission[a, b]) for a, b in zip(h, x, strict=True))
            p.append(total)
    return torch.tensor(p, dtype=torch.float64) / sum(p)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_25_log_prob_is_the_definition(make: Callable[[], T.Oracle]) -> None:
    law = make()
    within(25, float((law.log_prob(states(V, L)).exp() - brute(law)).abs().max()), 1e-10)


@pytest.mark.parametrize("process", [*families(V), *pairs(V), dd.Masked(V + 1, dd.Cosine(), mask_id=1)], ids=str)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_25_predictions_are_brute_force(make: Callable[[], T.Oracle], process: dd.Process) -> None:
    law = make()
    world = T.Enumeration(brute(law), vocab_size=V, length=L)
    x = process.data_tokens[law.sample(20, seed=1)]
    for time in (0.3, 0.8):
        z = process.marginal(x, time).sample()
        for what in ("denoiser", "loo", "ratio"):
            fast, slow = (o.denoiser(process, predicts=what)(z, time).logits.exp() for o in (law, world))
            within(25, float(((fast - slow) / (1 + slow)).abs().max()), 1e-10)
        fast, slow = law.log_marginal(process, z, time), world.log_marginal(process, z, time)
        within(25, float((fast - slow).abs().max()), 1e-10)


def test_25_another_law_is_caught() -> None:
    process, z = dd.Uniform(V, dd.Linear()), states(V, L)
    one, other = (law.denoiser(process)(z, 0.5).logits.exp() for law in (markov(), chain(V, L, seed=9)))
    caught(25, float((one - other).abs().max()), 0.05)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_posterior_draws_follow_the_posterior(make: Callable[[], T.Oracle], failure_rate: float) -> None:
    """Given one noisy sequence: jointly over the sites, by chi-square; another noisy sequence would be seen."""
    law, process = make(), dd.Uniform(V, dd.Linear())
    p0, x = brute(law), states(V, L)
    z = torch.tensor([[0, 2, 0, 1]])
    exact = []
    for noisy in (z, torch.tensor([[0, 0, 0, 1]])):
        p = p0 * torch.stack([process.kernel(0.5)[x[:, i], noisy[0, i]] for i in range(L)]).prod(0)
        exact.append(p / p.sum())
    drawn = law.posterior(process, z.expand(40_000, -1), 0.5, seed=0)
    count = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81).double()
    for p, right in zip(exact, (True, False), strict=True):
        possible = p > 0
        assert count[~possible].sum() == 0
        merged = [
            torch.cat([v[possible & (p >= 2e-4)], v[possible & (p < 2e-4)].sum()[None]]) for v in (count, 40_000 * p)
        ]
        keep = merged[1] > 0
        assert (stats.chisquare(merged[0][keep], merged[1][keep]).pvalue > failure_rate) == right
    assert torch.equal(drawn, law.posterior(process, z.expand(40_000, -1), 0.5, seed=0))


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_float32_is_float64_to_its_precision(make: Callable[[], T.Oracle]) -> None:
    law, process = make(), dd.Masked(V, dd.Linear())
    z = process.marginal(law.sample(30, seed=0), 0.5).sample()
    single = law.to(dtype=torch.float32).denoiser(process)(z, 0.5).logits
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.exp().double(), law.denoiser(process)(z, 0.5).logits.exp(), atol=2e-6, rtol=0)
    assert law.log_prob(states(V, L)).dtype == torch.float64, "the original is left as it was"


@pytest.mark.parametrize("make", [hmm, constrained, tree, mixture], ids=lambda make: make.__name__)
def test_thousands_of_sites(make: Callable[[int], T.Oracle]) -> None:
    law, process = make(2048), dd.Uniform(V, dd.Linear())
    x = law.sample(2, seed=0)
    z = process.marginal(x, 0.5).sample()
    loo = law.denoiser(process, predicts="loo")(z, 0.5).logits.exp()
    torch.testing.assert_close(loo.sum(-1), torch.ones(2, 2048).double(), atol=1e-10, rtol=0)
    other = z.clone()
    other[:, 700] = (other[:, 700] + 1) % V
    change = (law.denoiser(process, predicts="loo")(other, 0.5).logits.exp() - loo).abs().amax(-1)
    assert (change[:, 700] < 1e-10).all(), "a site's own token is left out"
    assert bool(torch.isfinite(law.log_prob(x)).all())
    assert bool(torch.isfinite(law.log_marginal(process, z, 0.5)).all())
    assert law.posterior(process, z, 0.5, seed=0).shape == x.shape
    if isinstance(law, T.ConstrainedChain):
        assert ((x == 1).sum(-1) % 2 == 0).all()
        assert ((law.posterior(process, z, 0.5, seed=0) == 1).sum(-1) % 2 == 0).all()


def test_bad_laws_are_refused(as_user: None) -> None:
    for make, message in (
        (lambda: T.HMM(torch.ones(2) / 2, torch.eye(2), torch.ones(2, 3), 4), "emission must hold probabilities"),
        (lambda: T.Tree([-1, 2, 0], torch.ones(3) / 3, torch.eye(3)), "an earlier site"),
        (lambda: T.Tree([-1, 0], torch.ones(3) / 3, torch.eye(2)), "transition must be"),
        (lambda: T.ProductMixture(torch.ones(2) / 2, torch.ones(3, 4, 2) / 2), r"weights \(K,\) and laws \(K, L, V\)"),
        (lambda: T.ConstrainedChain(chain(3, 4), PARITY, accepting={5}), "accepting states must lie in 0..1"),
        (lambda: T.ConstrainedChain(chain(3, 4), PARITY.clamp(max=0), accepting={1}), "no sequence of length"),
        (lambda: T.Coupling(torch.ones(3, 3) / 9, vocab_size=2, length=2), r"joint must have shape \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
