"""Split Gibbs: both moves and their joint law by enumeration, drawn runs, the faults of public code, and bad input."""

import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from guides import table
from places import ROOT
from problems import strong
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import GuideAt
from discdiff.sampling import SplitMoves, SplitSamples
from discdiff.theory.world import all_states, state_index

WORLD = strong()
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
LOG_W = table(27, 1, seed=5)[0]
X = all_states(3, 3)
DISTANCE = (X[:, None] != X).sum(-1).double()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import recipes

    return recipes


def log_w(x: Tensor) -> Tensor:
    return LOG_W[state_index(x, 3)]


def split(process: dd.Process = UNIFORM, etas: Any = (1.0, 0.5), steps: int = 4, **how: Any) -> dd.SplitGibbs:  # noqa: ANN401
    sampler = dd.Sampler(process, WORLD.denoiser(process, predicts="loo"), S.Ancestral(), steps=steps)
    return dd.SplitGibbs(sampler, how.pop("log_likelihood", log_w), etas, **{"proposals": 3, **how})


def moved(x: Tensor, eta: float, log_r: Any = log_w, proposals: int = 1, **how: Any) -> Tensor:  # noqa: ANN401
    """The exact kernel of moves of z given x."""
    model = WORLD.denoiser(UNIFORM, predicts="loo")
    return T.kernel(SplitMoves(x[None], log_r, eta, proposals), UNIFORM, model, t=0.0, **how)


def pvalue(tokens: Tensor, law: Tensor) -> float:
    """Of a chi-square test; sequences with fewer than 5 expected draws are one cell."""
    seen, expected = torch.bincount(state_index(tokens, 3), minlength=27).double(), law * len(tokens)
    few = expected < 5
    cells = [torch.cat([one[~few], one[few].sum()[None]]).numpy() for one in (seen, expected)]
    return float(chisquare(*(cell[cells[1] > 0] for cell in cells)).pvalue)


# --- z given x --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.3, 0.1])
def test_moves_of_z_keep_the_coupled_likelihood(eta: float) -> None:
    for x in range(0, 27, 4):
        kernel, law = moved(X[x], eta), (LOG_W - DISTANCE[x] / eta).softmax(0)
        flow = law[:, None] * kernel
        assert float((kernel.sum(-1) - 1).abs().max()) < 1e-12
        assert float((law @ kernel - law).abs().max()) < 1e-12
        assert float((flow - flow.T).abs().max()) < 1e-12
        other = (LOG_W - DISTANCE[x] / (1.1 * eta)).softmax(0)
        assert float((other @ kernel - other).abs().max()) > 1e-4 * math.exp(-1 / eta)  # planted: another eta


def test_moves_repeat_and_keep_given_sites() -> None:
    one = moved(X[5], 0.7)
    torch.testing.assert_close(moved(X[5], 0.7, proposals=2), one @ one, atol=1e-13, rtol=0)
    held = moved(X[5], 0.7, frozen=[True, False, False])
    assert bool((held[X[:, None, 0] != X[None, :, 0]] == 0).all())
    law = (LOG_W - DISTANCE[5] / 0.7).softmax(0)
    assert float((law @ held - law).abs().max()) < 1e-12


def test_a_z_without_likelihood_moves_until_one_has_it() -> None:
    log_r = torch.where(X.sum(-1) > 3, LOG_W, -torch.inf)
    kernel = moved(X[0], 1.0, lambda x: log_r[state_index(x, 3)])
    law = (log_r - DISTANCE[0]).softmax(0)
    assert float((law @ kernel - law).abs().max()) < 1e-12
    found = torch.linalg.matrix_power(kernel, 1 << 14)[0]
    torch.testing.assert_close(found, law, atol=1e-9, rtol=0)


@pytest.mark.usefixtures("as_user")
def test_a_weight_without_the_kernels_1_over_v_minus_1_is_caught(page: ModuleType) -> None:
    """Public code: the ratio at a changed site is too large by V - 1."""
    for size, ratio in ((3, 2), (32, 31), (256, 255)):
        kernel = dd.Uniform(size, dd.Linear()).kernel(0.3)
        eta = 1 / math.log(float(kernel[0, 0] / kernel[0, 1]))
        assert math.exp(-1 / eta) == pytest.approx(float(kernel[0, 1] / kernel[0, 0]), rel=1e-12)
        of_all = float((1 - kernel[0, 0]) / kernel[0, 0])  # the weight of public code
        assert of_all / math.exp(-1 / eta) == pytest.approx(ratio, rel=1e-12)
    for x in (0, 13):
        right, wrong = page.moves(0.3)[x], page.moves(0.3, page.Uncorrected)[x]
        law = (page.LOG_W - DISTANCE[x] / 0.3).softmax(0)
        theirs = (page.LOG_W - DISTANCE[x] * (1 / 0.3 - math.log(2))).softmax(0)
        assert float((law @ right - law).abs().max()) < 1e-12
        assert float((theirs @ wrong - theirs).abs().max()) < 1e-12
        assert T.tv(theirs, law) > 0.05
    found = page.controls()
    assert found["split Gibbs"][-1] < 1e-3 < 0.05 < found["1 / (V - 1) left out"][-1]  # it does not fall with eta
    assert found["split Gibbs, V = 32, one site"][-1] < 1e-3 < 0.3 < found["1 / (V - 1) left out, V = 32, one site"][-1]


# --- x given z --------------------------------------------------------------------------------------------------------


def coupled(eta: float) -> Tensor:
    """The joint law, (x, z)."""
    return (WORLD.p0.log()[:, None] - DISTANCE / eta + LOG_W).flatten().softmax(0).view(27, 27)


def given_z(eta: float) -> Tensor:
    """The law of x given z, (z, x), from the definition."""
    return (WORLD.p0.log() - DISTANCE / eta).softmax(-1)


@pytest.mark.parametrize("schedule", [dd.Linear(), dd.Cosine(), dd.LogLinear(1e-3)], ids=repr)
def test_x_given_z_is_the_reverse_process_from_the_time_of_eta(schedule: dd.Schedule) -> None:
    process = dd.Uniform(3, schedule)
    for eta in (1.0, 0.5, 0.05):
        back = split(process, (eta,))._reverse[0]
        noise = process.kernel(back.grid[0])
        assert float(noise[0, 1] / noise[0, 0]) == pytest.approx(math.exp(-1 / eta), rel=1e-6)
        weight = noise[X[:, None], X].prod(-1) * WORLD.p0[:, None]  # p0(x) q_t(z | x)
        torch.testing.assert_close((weight / weight.sum(0)).T, given_z(eta), atol=1e-7, rtol=0)


@pytest.mark.usefixtures("as_user")
def test_the_runs_error_falls_with_its_steps(page: ModuleType) -> None:
    errors = []
    for steps in (8, 16, 32):
        found = page.matrix(split(UNIFORM, (0.7,), steps)._reverse[0])
        errors.append(float((found - given_z(0.7)).abs().sum(-1).max()) / 2)
    slopes = [math.log2(one / other) for one, other in itertools.pairwise(errors)]
    assert errors[-1] < 0.05
    assert min(slopes) > 0.8


def test_a_turn_takes_the_steps_of_the_grid_below_its_time() -> None:
    sampler = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM), S.Ancestral(), grid=[1.0, 0.6, 0.2, 0.0])
    grids = [back.grid for back in dd.SplitGibbs(sampler, log_w, (1.0, 0.5, 0.2))._reverse]
    assert [len(grid) for grid in grids] == [4, 3, 2]
    assert [grid[1:] for grid in grids] == [(0.6, 0.2, 0.0), (0.2, 0.0), (0.0,)]
    first, last = dd.Step(S.Ancestral()), dd.Step(S.SplitLeap())
    planned = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM), plan=dd.Plan([1.0, 0.6, 0.0], [first, last]))
    assert [back.plan.steps for back in dd.SplitGibbs(planned, log_w, (1.0, 0.5))._reverse] == [(first, last), (last,)]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", [dd.Masked(2, dd.Linear()), dd.Marginal(torch.tensor([0.4, 0.6]), dd.Cosine())])
def test_elsewhere_particles_weigh_what_the_tilt_changes(process: dd.Process) -> None:
    """E[Zhat 1(x)] is p_sampler(x) exp(-D(x, z) / eta)."""
    world = T.Enumeration(torch.tensor([0.4, 0.1, 0.2, 0.3]), vocab_size=2, length=2)
    sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), S.Ancestral(), grid=[1.0, 0.5, 0.0])
    steered = dd.SplitGibbs(sampler, lambda x: x.sum(-1), (0.7,), per_group=2)
    x = all_states(2, 2)
    for z in x if process.absorbing else x[1:2]:
        found = T.evidence(steered._particles(z[None], 0.7, 0))
        exact = T.law(sampler) * (-(x != z).sum(-1).double() / 0.7).exp()
        assert float((found - exact).abs().max()) < (1e-12 if process.absorbing else 1e-9)
        assert float((found - T.law(sampler)).abs().max()) > 1e-2


@pytest.mark.usefixtures("as_user")
def test_many_particles_draw_x_given_z(failure_rate: float) -> None:
    steered = split(MASKED, (0.7,), per_group=64)
    out = steered._draw(0, X[3].expand(1000, -1), None, 9, 0)
    p = T.law(steered.sampler).log() - DISTANCE[3] / 0.7
    assert pvalue(out.tokens, p.softmax(0)) > failure_rate
    assert pvalue(out.tokens, given_z(0.35)[3]) < failure_rate  # planted: another eta


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
def test_turns_keep_the_joint_law_and_lead_to_it(page: ModuleType) -> None:
    to_z = torch.stack([moved(x, 0.7) for x in X])
    joint, back = coupled(0.7), given_z(0.7)
    after = page.turn(joint, to_z, back, 3)
    assert float((after - joint).abs().max()) < 1e-12
    begun = torch.diag(WORLD.p0)
    for _ in range(400):
        begun = page.turn(begun, to_z, back, 3)
    assert float((begun - joint).abs().max()) < 1e-10
    late = page.turn(joint, to_z, given_z(0.5), 3)  # planted: the reverse pass starts at the next, earlier time
    assert float((late - joint).abs().sum()) > 0.05


def test_the_law_of_x_tends_to_the_posterior(page: ModuleType) -> None:
    """operators.md has .093, .022, 8e-4, 1e-9 for laws and etas that it does not give: here e^(-1/eta) is the rate."""
    errors = [T.tv(page.coupled(eta).sum(1), page.TARGET) for eta in page.ETAS]
    rates = [float(error) * math.exp(1 / eta) for error, eta in zip(errors, page.ETAS, strict=True)]
    assert rates[2] == pytest.approx(rates[3], rel=0.02)
    assert rates == sorted(rates)
    assert errors[3] < 1e-8 < 0.1 < errors[0]


@pytest.mark.usefixtures("as_user")
def test_drawn_runs_follow_the_enumerated_law(page: ModuleType, failure_rate: float) -> None:
    """The whole program on a uniform process: first draw, moves, reverse passes, three turns."""
    steered = dd.SplitGibbs(page.sampler(UNIFORM), page.log_w, (0.8, 0.4, 0.2), proposals=4)
    out, law = steered.sample(8000, seed=2), page.law_of(steered)
    assert pvalue(out.tokens, law) > failure_rate
    assert pvalue(out.tokens, T.law(steered.sampler)) < failure_rate
    assert T.tv(law, page.TARGET) < 0.8 * T.tv(T.law(steered.sampler), page.TARGET)


def test_a_pass_that_starts_at_the_next_time_keeps_another_law(page: ModuleType) -> None:
    found = page.controls()
    late = found["x drawn at the next eta, .7 times this"]
    assert min(late) > 0.1  # it does not fall with eta
    assert found["split Gibbs"][-1] < 1e-3
    ours = page.WORLD.p0, page.LOG_W, page.DISTANCE
    kept = page.faulty(*ours, 0.3, later=0.7)
    assert min(T.tv(kept, page.coupled(eta).sum(1)) for eta in (0.3, 0.21)) > 0.1
    torch.testing.assert_close(page.faulty(*ours, 0.3), page.coupled(0.3).sum(1), atol=1e-10, rtol=0)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
@pytest.mark.parametrize("prompt", [None, [2]])
def test_rows_do_not_depend_on_the_batch(process: dd.Process, prompt: list[int] | None) -> None:
    steered = split(process, per_group=3)
    whole = steered.sample(12, seed=7, prompt=prompt)
    parts = [steered.sample(size, seed=7, first_row=begin, prompt=prompt) for size, begin in ((1, 0), (6, 1), (5, 7))]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    torch.testing.assert_close(torch.cat([part.accepted for part in parts]), whole.accepted)
    assert len(whole.tokens.unique(dim=0)) > 2
    assert not torch.equal(steered.sample(12, seed=8, prompt=prompt).tokens, whole.tokens)


def test_calls_and_rewards_are_counted() -> None:
    out = split(UNIFORM, (1.0, 0.5, 0.1), per_group=3).sample(10, seed=0)
    calls = 4 + 3 + 2 + 1
    assert (out.nfe, out.calls, out.rewards) == (calls, {"model": calls}, 10 * 3 * (1 + 3))
    assert out.nfe_rows.tolist() == [calls] * 10
    out = split(MASKED, (1.0, 0.5), per_group=3).sample(10, seed=0)
    assert (out.nfe, out.rewards) == (4 * 3, 10 * 2 * (1 + 3))
    assert out.nfe_rows.tolist() == [4 + 2 * 4 * 3] * 10
    assert bool(((out.accepted >= 0) & (out.accepted <= 1)).all())


class Looks(dd.Guide):
    """Changes nothing and asks for the rewards of the states."""

    def __init__(self, reward: Any) -> None:  # noqa: ANN401
        self.reward = reward

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        at.reward(self.reward, prediction.x)
        return prediction


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
def test_guides_belong_to_the_prior_and_their_rewards_count(process: dd.Process) -> None:
    seen: list[int] = []

    def reward(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.zeros(len(x))

    def guided(guide: dd.Guide) -> dd.Sampler:
        model = WORLD.denoiser(process, predicts="loo").guided(guide)
        return dd.Sampler(process, model, S.Ancestral(), steps=3)

    out = dd.SplitGibbs(guided(Looks(reward)), reward, (0.5,), proposals=2, per_group=2).sample(4, seed=0)
    assert out.rewards == sum(seen) > 4 * 3
    kept = dd.SplitGibbs(guided(dd.Forbid([1])), log_w, (0.5,), proposals=2, per_group=4)
    assert not bool((kept.sample(64, seed=0).tokens == 1).any())
    draws = guided(dd.Reward(reward, samples=1))
    if process is MASKED:
        with pytest.raises(TypeError, match="the guides of the reference must not draw"):
            dd.SplitGibbs(draws, reward, (0.5,))
    else:
        seen.clear()
        assert dd.SplitGibbs(draws, reward, (0.5,)).sample(4, seed=0).rewards == sum(seen)


def test_prompts_are_kept_in_x_and_z_and_masks_never_proposed() -> None:
    seen = []

    def likelihood(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(len(x))

    for process in (MASKED, UNIFORM):
        out = split(process, log_likelihood=likelihood).sample(16, seed=0, prompt=[2])
        assert bool((out.tokens[:, 0] == 2).all())
        assert bool((torch.cat(seen)[:, 0] == 2).all())
    process = dd.Masked(4, dd.Linear(), mask_id=1)  # the mask lies between the tokens
    flat = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 4), process, "denoiser")
    seen.clear()
    steered = dd.SplitGibbs(dd.Sampler(process, flat, S.Ancestral(), steps=2), likelihood, (9.0, 9.0))
    out = steered.sample(200, 3, seed=0)
    for x in (out.tokens, torch.cat(seen)):
        assert x.unique().tolist() == [0, 2, 3]


def test_results_are_stored(tmp_path: Path) -> None:
    out = split().sample(8, seed=0)
    out.save(tmp_path / "out.safetensors")
    assert SplitSamples.load(tmp_path / "out.safetensors") == out


@pytest.mark.usefixtures("as_user")
def test_bad_input_is_refused() -> None:
    model = WORLD.denoiser(UNIFORM, predicts="loo")
    sampler = dd.Sampler(UNIFORM, model, S.Ancestral(), steps=2)
    particles = dd.Particles(sampler, None, 2)
    for wrong in (particles, model, None):
        with pytest.raises(TypeError, match="SplitGibbs: takes a Sampler"):
            dd.SplitGibbs(wrong, log_w, (1.0,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="log_likelihood is called with tokens"):
        dd.SplitGibbs(sampler, 3, (1.0,))  # type: ignore[arg-type]
    for etas in ((), (0.5, 0.7)):
        with pytest.raises(ValueError, match="etas must be one or more numbers that do not rise"):
            dd.SplitGibbs(sampler, log_w, etas)
    with pytest.raises(ValueError, match=r"eta must lie in \(0, inf\), got 0"):
        dd.SplitGibbs(sampler, log_w, (1.0, 0.0))
    with pytest.raises(ValueError, match=r"eta = 0\.02 belongs to alpha = 1, which Linear\(\) has at no time"):
        dd.SplitGibbs(sampler, log_w, (1.0, 0.02))
    noisy = dd.Uniform(3, dd.LogLinear(0.1))
    with pytest.raises(ValueError, match=r"alpha larger than alpha\(1\) = 0\.1"):
        split(noisy, (10.0,))
    for name in ("proposals", "per_group"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            dd.SplitGibbs(sampler, log_w, (1.0,), **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the sampler's grid must go from 1 to 0"):
        dd.SplitGibbs(dd.Sampler(UNIFORM, model, S.Ancestral(), grid=[0.5, 0.0]), log_w, (1.0,))
    pairs = dd.AbsorbingUniform(3, dd.Linear())
    flat = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), pairs, "denoiser")
    with pytest.raises(ValueError, match="takes states that are tokens, and at least two tokens"):
        dd.SplitGibbs(dd.Sampler(pairs, flat, S.Ancestral(), steps=2), log_w, (1.0,))
    masked = WORLD.denoiser(MASKED, predicts="loo")
    step = dd.Step(S.Ancestral(), guides=[dd.Forbid([1])])
    with pytest.raises(ValueError, match="guides of single steps are part of no model"):
        dd.SplitGibbs(dd.Sampler(MASKED, masked, plan=dd.Plan([1.0, 0.0], [step])), log_w, (1.0,))
    with pytest.raises(ValueError, match="Particles: Greedy"):
        dd.SplitGibbs(dd.Sampler(MASKED, masked, S.Greedy(), steps=2), log_w, (1.0,))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"SplitGibbs: log_likelihood: the reward of a sequence of row 0"):
            split(log_likelihood=lambda x, bad=bad: torch.full((len(x),), bad)).sample(4, seed=0)
    assert "2 etas 1 to 0.5, proposals=3" in repr(split())
    assert "per_group=8" in repr(split(MASKED))
