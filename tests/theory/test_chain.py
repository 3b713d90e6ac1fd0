"""The Markov chain oracle: brute force where that is possible, and thousands of sites where it is not."""

import pytest
import torch
from problems import chain, states
from problems import families as zoo
from scipy import stats

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T


@pytest.mark.parametrize("process", [*zoo(4), dd.Masked(5, dd.Cosine(), mask_id=0)], ids=repr)
@pytest.mark.parametrize("predicts", ["denoiser", "loo", "ratio"])
def test_forward_backward_is_brute_force(process: dd.Process, predicts: str) -> None:
    """V = 4, L = 6 against the 4096 listed sequences."""
    c = chain(4, 6)
    x = states(4, 6)
    world = T.Enumeration(c.log_prob(x).exp(), vocab_size=4, length=6)
    data = process.data_tokens[x[::97]]
    for t in (torch.tensor(0.4).double(), torch.linspace(0.05, 0.95, 6).double().expand(len(data), 6)):
        z = process.marginal(data, t.expand(len(data)) if t.ndim == 0 else t).sample()
        time = float(t) if t.ndim == 0 else t
        fast = c.denoiser(process, predicts=predicts)(z, time).logits.exp()
        slow = world.denoiser(process, predicts=predicts)(z, time).logits.exp()
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("process", zoo(4), ids=repr)
def test_log_marginal_is_brute_force(process: dd.Process) -> None:
    c = chain(4, 3)
    world = T.Enumeration(c.log_prob(states(4, 3)).exp(), vocab_size=4, length=3)
    z = states(process.states, 3)
    torch.testing.assert_close(c.log_marginal(process, z, 0.3).exp(), world.marginal(process, 0.3), atol=1e-14, rtol=0)


@pytest.mark.parametrize("process", zoo(8), ids=repr)
def test_thousands_of_sites(process: dd.Process) -> None:
    """L = 4096: finite, normalised, and a far site's evidence is worth nothing while a near one's is."""
    c = chain(8, 4096)
    x = c.sample(2, seed=0)
    assert x.shape == (2, 4096)
    z = process.marginal(x, 0.5).sample()
    loo = c.denoiser(process, predicts="loo")(z, 0.5).logits.exp()
    torch.testing.assert_close(loo.sum(-1), torch.ones(2, 4096).double(), atol=1e-12, rtol=0)
    other = z.clone()
    other[:, 2000] = (other[:, 2000] + 1) % 8
    change = (c.denoiser(process, predicts="loo")(other, 0.5).logits.exp() - loo).abs().amax(-1)
    assert (change[:, 2000] < 1e-12).all(), "a site's own token is left out"
    assert change[:, [1999, 2001]].amax() > 1e-6
    assert change[:, :1000].amax() < 1e-12
    out = dd.Sampler(process, c.denoiser(process, predicts="loo"), S.Ancestral(), steps=2).sample(1, seed=0)
    assert out.tokens.shape == (1, 4096)
    assert torch.isfinite(c.log_prob(x)).all()


def test_contradicted_evidence_gives_uniform_rows() -> None:
    """Of a deterministic chain 0 1 0 1 ..., 0 0 is impossible; sites that see both have no data to agree with."""
    c = T.MarkovChain(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), length=4)
    process = dd.Masked(2, dd.Linear())
    loo = c.denoiser(process, predicts="loo")(torch.tensor([[0, 0, 2, 2]]), 0.5).logits.exp()
    assert loo[0, 2:].tolist() == [[0.5, 0.5]] * 2
    assert loo[0, 0].tolist() == [0, 1], "without its own token, site 0 sees 0 at site 1"
    world = T.Enumeration(torch.tensor([0.0] * 5 + [0.5] + [0.0] * 4 + [0.5] + [0.0] * 5), vocab_size=2, length=4)
    same = world.denoiser(process, predicts="loo")(torch.tensor([[0, 0, 2, 2]]), 0.5).logits.exp()
    torch.testing.assert_close(loo, same, atol=1e-14, rtol=0)


def test_samples_follow_the_chain(failure_rate: float) -> None:
    c = chain(3, 3)
    p = c.log_prob(states(3, 3)).exp()
    tokens = c.sample(100_000, seed=0)
    counts = torch.bincount((tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    possible = p > 0
    assert stats.chisquare(counts[possible], 100_000 * p[possible]).pvalue > failure_rate
    assert stats.chisquare(counts[possible], 100_000 * p.flip(0)[possible] / p.sum()).pvalue < failure_rate
    assert torch.equal(tokens, c.sample(100_000, seed=0))
    assert not torch.equal(tokens, c.sample(100_000, seed=1))


def test_a_sampler_at_length_64_comes_near_the_chain() -> None:
    """Ancestral samples lose log-likelihood in proportion to 1/N: halving the steps about doubles the deficit."""
    process, c = dd.Masked(4, dd.Linear()), chain(4, 64)
    model = c.denoiser(process)
    truth = float(c.log_prob(c.sample(4000, seed=0)).mean())
    found = [
        truth - float(c.log_prob(dd.Sampler(process, model, S.Ancestral(), steps=n).sample(600, seed=0).tokens).mean())
        for n in (4, 8)
    ]
    assert found[0] > found[1] > 0
    assert 1.5 < found[0] / found[1] < 3
