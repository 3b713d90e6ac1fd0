"""At equal NFE no sampler of diffusers or flow_matching is closer to p0 than the best of ours; one exact denoiser."""

from functools import cache

import pytest
import torch
from peers import PEERS, chi_square_divergence, ddim_correct
from problems import strong

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

DRAWS = 20_000
PROCESSES = {"masked": dd.Masked(3, dd.Linear()), "uniform": dd.Uniform(3, dd.Linear())}


@cache
def ours(family: str, nfe: int) -> dict[str, float]:
    """Exact chi-square divergences from p0 of samplers that change every kind of step the same for all NFE."""
    world, process = strong(), PROCESSES[family]
    model = world.denoiser(process, predicts="loo")
    found = {}
    for operator, cost in ((S.Ancestral(), 1), (S.Ancestral() >> S.Gibbs(), 2), (S.Ancestral() >> S.Gibbs() ** 3, 4)):
        law = T.law(dd.Sampler(process, model, operator, steps=nfe // cost))
        found[repr(operator)] = float(((law - world.p0) ** 2 / world.p0).sum())
    return found


@pytest.mark.parametrize("nfe", [8, 32])
@pytest.mark.parametrize(("family", "name"), [(family, name) for family in PEERS for name in PEERS[family]])
def test_no_peer_is_closer_to_the_data(family: str, name: str, nfe: int) -> None:
    draws = PEERS[family][name](strong(), nfe, DRAWS)
    assert draws is not None
    theirs, error = chi_square_divergence(draws, strong())
    assert min(ours(family, nfe).values()) <= theirs + 4.75 * error  # one in a million


def test_the_harness_measures_what_is_exact() -> None:
    """diffusers' predictor at temperature 1 is the ancestral step: its figure must be the exact one of ours."""
    theirs, error = chi_square_divergence(
        PEERS["uniform"]["diffusers DiscreteDDIM, temperature 1"](strong(), 8, 100_000), strong()
    )
    exact = ours("uniform", 8)["Ancestral()"]
    assert abs(theirs - exact) < 4.9 * error
    assert error < exact / 10
    uniform = torch.randint(3, (DRAWS, 3))
    far, spread = chi_square_divergence(uniform, strong())
    assert far - 4.75 * spread > exact


def corrected(selection: str, sites: int, times: int) -> float:
    """The p-value of p_t after so many of diffusers' corrector sweeps from exact draws of it."""
    from scipy.stats import chisquare

    process, draws = PROCESSES["uniform"], 60_000
    p = strong().marginal(process, 0.4)
    start = torch.multinomial(p, draws, True, generator=torch.Generator().manual_seed(0))
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)[start]
    for _ in range(times):
        x = ddim_correct(selection, sites)(strong(), x)
    count = torch.bincount((x * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    return float(chisquare(count.numpy(), (p / p.sum() * draws).numpy()).pvalue)


def test_step_correct_of_diffusers_keeps_the_law_for_one_random_site_alone(failure_rate: float) -> None:
    assert corrected("random", 1, 5) > failure_rate
    assert corrected("random", 2, 5) < failure_rate
    for selection in ("lowest_log_margin", "lowest_maxprob", "lowest_current_prob"):
        assert corrected(selection, 1, 5) < failure_rate
