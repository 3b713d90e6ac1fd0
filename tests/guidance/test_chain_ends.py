"""Exact guides at 256 sites: samples follow the tilted chain, and particles with an exact h have no variance."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from tilting import MASKED, UNIFORM, logs, markov
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

VISITS = T.Automaton(torch.tensor([[1, 0, 0], [0, 1, 1]]), torch.tensor([0.0, -0.7]).double())
pytestmark = pytest.mark.usefixtures("as_user")


def world(length: int) -> tuple[T.MarkovChain, T.Tilt]:
    """A chain, and a tilt of its sites, its pairs, and the parity of the number of tokens 0."""
    chain = markov(length)
    return chain, T.Tilt(logs(length, 3, seed=1), 0.5 * logs(length - 1, 3, 3, seed=2), VISITS)


def ends(tokens: Tensor) -> Tensor:
    """The first two and the last token of each row as one number of 27."""
    return tokens[:, 0] * 9 + tokens[:, 1] * 3 + tokens[:, -1]


@pytest.mark.parametrize(
    ("process", "operator", "steps", "length", "count"),
    [
        (MASKED, S.FirstHitting(), 1, 24, 400),
        pytest.param(MASKED, S.FirstHitting(), 1, 256, 200, marks=pytest.mark.slow),
        # of order 2: with 64 steps its error is below the noise of 200 samples
        pytest.param(UNIFORM, S.SplitLeap(), 64, 256, 200, marks=pytest.mark.slow),
    ],
)
def test_samples_follow_the_tilted_chain(
    process: dd.Process, operator: dd.Operator, steps: int, length: int, count: int, failure_rate: float
) -> None:
    """The end law is the tilted one: by likelihood ratio and chi-square."""
    chain, tilt = world(length)
    goal = chain.tilted(tilt)
    model = chain.denoiser(process, predicts="loo")
    guided = model.guided(dd.Doob(clean=chain.log_clean(process, tilt)))
    found, plain = (dd.Sampler(process, one, operator, steps=steps).sample(count, length, seed=1).tokens
                    for one in (guided, model))  # fmt: skip
    drawn = goal.sample(20_000, seed=2)

    def ratio(tokens: Tensor) -> npt.NDArray[np.float64]:
        return (goal.log_prob(tokens) - chain.log_prob(tokens)).numpy()

    assert ks_2samp(ratio(found), ratio(drawn)).pvalue > failure_rate
    assert ks_2samp(ratio(plain), ratio(drawn)).pvalue < failure_rate  # planted: no guide
    law = torch.bincount(ends(drawn), minlength=27).double() / len(drawn)
    often = law * count > 5
    counts = [torch.bincount(ends(x), minlength=27)[often].double() for x in (found, plain)]
    expected = law[often] / law[often].sum()
    assert chisquare(counts[0], expected * counts[0].sum()).pvalue > failure_rate
    assert chisquare(counts[1], expected * counts[1].sum()).pvalue < failure_rate


@pytest.mark.parametrize("length", [24, pytest.param(256, marks=pytest.mark.slow)])
def test_particles_with_an_exact_h_have_no_variance(length: int) -> None:
    """Every weight is Z: M is K h_s / h_t, so that K / M times psi_s / psi_t is 1."""
    chain, tilt = world(length)
    log_h = chain.log_h(MASKED, tilt)
    guided = chain.denoiser(MASKED, predicts="loo").guided(dd.Doob(clean=chain.log_clean(MASKED, tilt)))

    def potential(x: Tensor, t: float) -> Tensor:
        return log_h(x, torch.full((len(x),), t, dtype=torch.float64)) if t > 0 else tilt(x)

    sampler = dd.Sampler(MASKED, guided, S.AnyOrder(), steps=4)
    out = dd.Particles(sampler, potential, 4).sample(8, length, seed=0)
    log_z = log_h(torch.full((1, length), 3), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(out.log_weight, log_z.expand(8), atol=1e-8, rtol=0)
    plain = dd.Sampler(MASKED, chain.denoiser(MASKED, predicts="loo"), S.AnyOrder(), steps=4)
    spread = dd.Particles(plain, lambda x, t: tilt(x) if t == 0 else torch.zeros(len(x)).double(), 4, ess=0.0)
    assert float(spread.sample(8, length, seed=0).log_weight.std()) > 1  # planted: no guide
