"""Simulations of the reverse CTMC, which have no finite tree: judged by chi-square against p_s from exact starts."""

import math

import pytest
import torch
from ledger import caught, within
from problems import dirichlet, families, states, strong
from scipy.stats import chisquare

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.process import grid

MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
PAIRS = dd.AbsorbingUniform(2, dd.Linear())
DRAWS = 60_000


def surprise(p: float) -> float:
    """-log10 of a p-value, at most 99."""
    return -math.log10(max(p, 1e-99))


def p_value(operator: dd.Operator, process: dd.Process, times: list[float]) -> float:
    """Exact draws of p_t, the operator over the times, and the law at the last of them."""
    world = dirichlet(0.5, 3, vocab_size=process.vocab_size)
    begin, goal = world.marginal(process, times[0]), world.marginal(process, times[-1])
    start = torch.multinomial(begin, DRAWS, True, generator=torch.Generator().manual_seed(0))
    z = states(process.states, 3)[start]
    sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), operator, grid=times)
    tokens = sampler.sample(DRAWS, initial=z, seed=3).tokens
    count = torch.bincount((tokens * process.states ** torch.tensor([2, 1, 0])).sum(-1), minlength=len(goal))
    possible = goal > 0
    assert int(count[~possible].sum()) == 0
    return float(chisquare(count[possible].numpy(), (goal / goal.sum() * DRAWS)[possible].numpy()).pvalue)


@pytest.mark.parametrize(
    ("operator", "process"),
    [
        (S.Uniformization(), MASKED), (S.Uniformization(), UNIFORM), (S.Uniformization(12.0), UNIFORM),
        (S.Thinning(), UNIFORM), (S.Thinning(), families()[2]), (S.FirstHitting(), MASKED), (S.Gillespie(), MASKED),
        (S.Uniformization(), PAIRS), (S.Thinning(), PAIRS), (S.FirstHitting(), PAIRS),
    ],
    ids=repr,
)  # fmt: skip
def test_exact_simulations_have_no_step_size(operator: dd.Operator, process: dd.Process, failure_rate: float) -> None:
    """One step over most of the time; an ancestral step of that length is seen to be wrong."""
    assert operator.order == math.inf or isinstance(operator, S.Gillespie)
    within(18, surprise(p_value(operator, process, [0.8, 0.2])), surprise(failure_rate))
    assert not operator.enumerable


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_an_ancestral_step_of_that_length_is_caught(process: dd.Process, failure_rate: float) -> None:
    caught(18, surprise(p_value(S.Ancestral(), process, [0.8, 0.2])), surprise(failure_rate))


def test_gillespie_errs_by_the_time_between_looks_only(failure_rate: float) -> None:
    assert p_value(S.Gillespie(), UNIFORM, [0.8, 0.2]) < failure_rate  # frozen rates, one look a jump
    assert p_value(S.Gillespie(), UNIFORM, torch.linspace(0.8, 0.2, 25).tolist()) > failure_rate


def test_first_hitting_from_noise_to_data(failure_rate: float) -> None:
    world = strong()
    out = dd.Sampler(MASKED, world.denoiser(MASKED), S.FirstHitting(), steps=2).sample(DRAWS, seed=1)
    count = torch.bincount((out.tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    assert chisquare(count.numpy(), (world.p0 * DRAWS).numpy()).pvalue > failure_rate
    assert bool((out.nfe_rows == 3).all())  # a call for every token, whatever the grid


def test_a_bound_that_does_not_hold_is_refused() -> None:
    model = strong().denoiser(UNIFORM, predicts="loo")
    sampler = dd.Sampler(UNIFORM, model, S.Uniformization(1.5), grid=[0.8, 0.2])
    with pytest.raises(ValueError, match=r"row \d+ leaves at rate .* above the bound 1.5"):
        sampler.sample(64, initial=torch.zeros(64, 3, dtype=torch.int64), seed=0)


def test_simulations_cannot_be_enumerated() -> None:
    with pytest.raises(TypeError, match="cannot be enumerated"):
        T.kernel(S.Thinning(), UNIFORM, strong().denoiser(UNIFORM), t=0.6, s=0.4)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("operator", [getattr(S, name) for name in S.__all__], ids=S.__all__)
def test_rows_do_not_know_of_each_other(operator: type[dd.Operator], process: dd.Process) -> None:
    """Every operator of the library gives the same tokens to a row in any batch."""
    made = operator()
    op = made if made.moves else S.Ancestral() >> made
    try:
        op.check(process)
    except ValueError:
        pytest.skip(f"{op} says that it does not apply to {process}")
    sampler = dd.Sampler(process, strong().denoiser(process, predicts="loo"), op, grid=[1.0, 0.9, 0.5, 0.2, 0.0])
    whole = sampler.sample(6, seed=4).tokens
    part = sampler.sample(2, seed=4, first_row=3).tokens
    assert torch.equal(part, whole[3:5])
    if made != S.Greedy():  # which is certain of what it does from pure noise
        assert not torch.equal(sampler.sample(6, seed=5).tokens, whole)


# --- adaptive steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_adaptive_steps_keep_to_their_tolerance(process: dd.Process) -> None:
    """TV of 20,000 draws below the tolerance and the noise of that many; and a smaller tolerance asks more."""
    world, draws = strong(), 20_000
    calls = []
    for tolerance in (1.0, 0.1):
        sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), S.Adaptive(tolerance), grid=[1.0, 0.0])
        out = sampler.sample(draws, seed=1)
        law = torch.bincount((out.tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27) / draws
        assert T.tv(law.double(), world.p0) < tolerance + 0.02
        calls.append(float(out.nfe_rows.double().mean()))
    assert calls[1] > 3 * calls[0]
    assert T.tv(T.law(dd.Sampler(process, sampler.model, S.Ancestral(), steps=2)), world.p0) > 0.12  # 0.1 is not free


# --- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [dd.Linear(), dd.Cosine(), dd.LogLinear(), dd.Geometric(1e-3, 8.0)], ids=repr)
def test_grids_are_even_in_what_they_say(schedule: dd.Schedule) -> None:
    def alpha(times: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor([schedule.alpha(t) for t in times], dtype=torch.float64)

    even = alpha(grid.by_alpha(schedule, 8)).diff()
    torch.testing.assert_close(even, even[:1].expand(8), atol=1e-9, rtol=0)
    noise = (1 - alpha(grid.by_log_noise(schedule, 8, last=0.01)))[:-1].log().diff()
    torch.testing.assert_close(noise, noise[:1].expand(7), atol=1e-8, rtol=0)
    cosine = alpha(grid.by_cosine(schedule, 8)).diff()
    assert bool((cosine.diff() > 0).all())
    for times in (grid.by_time(8), grid.by_alpha(schedule, 8, start=0.9, end=0.1), grid.by_cosine(schedule, 3)):
        assert grid.listed(times) == times
    assert grid.by_time(4) == (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid.listed([0.5]), "at least two"), (lambda: grid.listed([0.1, 0.5]), "strictly decreasing"),
        (lambda: grid.by_time(0), "steps must lie in 1.."),
        (lambda: grid.by_alpha(dd.Linear(), 3, start=0.1, end=0.5), "0 <= end < start"),
        (lambda: grid.by_log_noise(dd.Linear(), 3, last=2.0), "last must lie"),
        (lambda: grid.by_alpha(dd.PerSite(dd.Linear(), torch.zeros(2)), 3), "a clock for every position"),
    ],
)  # fmt: skip
def test_grids_that_are_none_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_equal_grids_in_alpha_give_equal_laws() -> None:
    """Time enters through alpha alone, for every predictor: the same alphas on two schedules, the same law."""
    world = strong()
    for operator in (S.Euler(), S.TauLeaping(), S.DFM(1.0), S.ThetaTrapezoidal(), S.SplitLeap(), S.Unmask()):
        laws = []
        for schedule in (dd.Linear(), dd.Cosine()):
            process = dd.Masked(3, schedule)
            times = grid.by_alpha(schedule, 4)
            laws.append(T.law(dd.Sampler(process, world.denoiser(process), operator, grid=times)))
        torch.testing.assert_close(laws[0], laws[1], atol=1e-9, rtol=0)
