"""Conditions: infill, marginal and conditional laws of one joint denoiser, several alphabets, something told a row."""

import pytest
import torch
from problems import strong
from scipy.stats import chisquare

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

WORLD = strong()
PROCESSES = [dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())]
QUICK = [PROCESSES[0], pytest.param(PROCESSES[1], marks=pytest.mark.slow)]  # by draws
P0 = WORLD.p0.view(3, 3, 3)
DRAWS = 40_000
PROMPT, FROZEN = torch.tensor([2, 0, 1]), torch.tensor([False, True, False])


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """Of a chi-square test of draws against a law over sequences."""
    index = (tokens * 3 ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(-1)
    seen = torch.bincount(index, minlength=len(law)).double()
    return float(chisquare(seen, law * len(tokens)).pvalue)


@pytest.mark.parametrize("process", QUICK, ids=repr)
def test_infill_from_noise_follows_the_exact_conditional(process: dd.Process, failure_rate: float) -> None:
    model = WORLD.denoiser(process)
    sampler = dd.Sampler(process, model, S.SplitLeap() if not process.absorbing else S.FirstHitting(), steps=48)
    x = sampler.sample(DRAWS, seed=1, prompt=PROMPT, frozen=FROZEN).tokens
    assert bool((x[:, 1] == 0).all())
    exact = (P0[:, 0] / P0[:, 0].sum()).flatten()
    assert p_value(x[:, [0, 2]], exact) > failure_rate
    overwritten = sampler.sample(DRAWS, seed=1).tokens  # what is often done: sample, then put the prompt in its place
    overwritten[:, 1] = 0
    assert p_value(overwritten[:, [0, 2]], exact) < failure_rate


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("site", [0, 1, 2])
def test_one_site_given_the_others_is_exact_for_any_steps(process: dd.Process, site: int) -> None:
    moving = torch.arange(3) == site
    for x0 in ([0, 1, 2], [2, 2, 0]):
        model = WORLD.denoiser(process).condition(torch.tensor(x0), moving)
        exact = P0[tuple(slice(None) if n == site else x0[n] for n in range(3))]
        for steps in (1, 3):
            law = T.law(dd.Sampler(process, model, S.Ancestral(), steps=steps))
            assert T.tv(law, exact / exact.sum()) < 1e-12


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("site", [0, 1, 2])
def test_one_site_with_the_others_summed_out_is_exact_for_any_steps(process: dd.Process, site: int) -> None:
    model = WORLD.denoiser(process).marginal(torch.arange(3) == site, seed=5)
    exact = P0.sum([n for n in range(3) if n != site])
    for steps in (1, 3):
        assert T.tv(T.law(dd.Sampler(process, model, S.Ancestral(), steps=steps)), exact) < 1e-12


@pytest.mark.parametrize("process", QUICK, ids=repr)
def test_joint_conditional_and_marginal_laws_come_from_one_denoiser(process: dd.Process) -> None:
    joint = WORLD.denoiser(process)
    pair = torch.tensor([True, False, True])
    laws = {
        "joint": (joint, WORLD.p0),
        "conditional": (joint.condition(PROMPT, pair), (P0[:, 0] / P0[:, 0].sum()).flatten()),
        "marginal": (joint.marginal(pair), P0.sum(1).flatten()),
    }
    for name, (model, exact) in laws.items():
        found = [T.kl(exact, T.law(dd.Sampler(process, model, S.Ancestral(), steps=n))) for n in (16, 32)]
        assert found[1] < 3e-3, name
        assert 3.0 < found[0] / found[1] < 5.0, name  # a fourth each time, as for the joint law
    others = T.kl(laws["marginal"][1], T.law(dd.Sampler(process, laws["conditional"][0], S.Ancestral(), steps=32)))
    assert others > 0.02  # they are not the same law


def test_a_denoiser_with_one_time_a_row_is_refused_where_it_would_be_wrong() -> None:
    process = PROCESSES[1]
    model = dd.Denoiser(WORLD.denoiser(process).fn, process, "denoiser", time="alpha", scalar_time=True)
    with pytest.raises(ValueError, match=r"condition: .* takes one time a row, or none"):
        model.condition(PROMPT, FROZEN)
    with pytest.raises(ValueError, match=r"marginal: moving must be a bool mask \(3,\) with a site in it"):
        WORLD.denoiser(process).marginal(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="condition: the model is for length 3, got 2"):
        WORLD.denoiser(process).condition(PROMPT[:2], FROZEN[:2])


def test_rows_have_prompts_of_their_own() -> None:
    process = PROCESSES[1]
    given = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 0, 0]])
    moving = torch.tensor([True, False, False])
    both = dd.Sampler(process, WORLD.denoiser(process).condition(given, moving), S.Ancestral(), steps=4)
    one = dd.Sampler(process, WORLD.denoiser(process).condition(given[2], moving), S.Ancestral(), steps=4)
    drawn = both.sample(3, seed=4)
    assert torch.equal(drawn.tokens[2:], one.sample(1, seed=4, first_row=2).tokens)
    assert drawn.queries == 3 * 3 * drawn.nfe


def test_a_class_is_told_to_the_network_row_by_row() -> None:
    process = dd.Masked(3, dd.Linear())

    def network(x: torch.Tensor, time: torch.Tensor | None, wanted: torch.Tensor) -> torch.Tensor:
        return 50.0 * torch.nn.functional.one_hot(wanted, 3)[:, None].expand(-1, x.shape[1], -1).float()

    model = dd.Denoiser(network, process, "denoiser").with_condition(torch.tensor([2, 0, 1]), first_row=4)
    out = dd.Sampler(process, model, S.Ancestral(), steps=3).sample(3, 5, seed=0, first_row=4)
    assert out.tokens.tolist() == [[2] * 5, [0] * 5, [1] * 5]
