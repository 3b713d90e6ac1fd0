"""Weighted particles in runs: splits by group, calls, evidence, resumed runs, and errors for bad input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from guides import Coin, Noisy, table
from problems import strong
from scipy.stats import chisquare, ttest_1samp
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import SCHEMES, Scheme
from discdiff.denoiser import Change
from discdiff.sampling import ParticleSamples, Potential
from discdiff.theory.world import state_index

WORLD = strong()
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
LOG_W = table(27, 1, seed=5)[0]
LOG_G = table(3, 3, seed=4, scale=0.4)
pytestmark = pytest.mark.usefixtures("as_user")


def reward(x: Tensor, t: float) -> Tensor:
    """The reward W at t = 0, and a weak potential before."""
    return LOG_W[state_index(x, 3)] if t == 0 else (x == 0).sum(-1).double() * 0.1 * (1 - t)


def model(process: dd.Process, *guides: Change) -> dd.Denoiser:
    found = WORLD.denoiser(process, predicts="loo")
    for guide in guides:
        found = found.guided(guide)
    return found


def tilt(said: dd.Prediction) -> dd.Prediction:
    return said.tilted(lambda row, position: LOG_G[position])


COIN = Coin(torch.stack([LOG_G, -LOG_G]))


def particles(
    process: dd.Process = MASKED,
    *guides: Change,
    operator: dd.Operator | None = None,
    potential: Potential = reward,
    per_group: int = 4,
    **how: Any,  # noqa: ANN401
) -> dd.Particles:
    sampler = dd.Sampler(process, model(process, *guides), operator or S.Ancestral(), steps=4)
    return dd.Particles(sampler, potential, per_group, **how)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap()], ids=str)
def test_groups_do_not_depend_on_the_batch(scheme: Scheme, process: dd.Process, operator: dd.Operator) -> None:
    steered = particles(process, tilt, Noisy(0.5), operator=operator, resample=scheme, ess=0.8)
    whole = steered.sample(24, seed=7)
    for sizes in ((1, 3, 2), (6,)):
        begin, parts = 0, []
        for size in sizes:
            parts.append(steered.sample(4 * size, seed=7, first_row=4 * begin))
            begin += size
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        torch.testing.assert_close(torch.cat([part.log_weight for part in parts]), whole.log_weight, atol=1e-12, rtol=0)
    assert len(whole.log_weight.view(6, 4).unique(dim=0)) == 6


@pytest.mark.parametrize("guides", [(), (tilt,), (COIN,)], ids=["plain", "tilt", "coin"])
@pytest.mark.parametrize(
    "operator", [S.Ancestral(), S.SplitLeap(), S.ReMDM(0.5), S.Ancestral() >> S.Remask(), S.FirstHitting()], ids=str
)
def test_the_calls_are_those_of_the_sampler(operator: dd.Operator, guides: tuple[Change, ...]) -> None:
    """The reference's pass uses the answers again, where the network is the same."""
    steered = particles(MASKED, *guides, operator=operator, ess=0.0)
    out, plain = steered.sample(32, seed=3), steered.sampler.sample(32, seed=3)
    assert torch.equal(out.tokens, plain.tokens)
    assert (out.nfe, out.calls, out.queries) == (plain.nfe, plain.calls, plain.queries)
    assert torch.equal(out.nfe_rows, plain.nfe_rows)


def test_another_network_as_reference_is_counted() -> None:
    other = T.Enumeration(torch.ones(27).double() / 27, vocab_size=3, length=3).denoiser(MASKED, predicts="loo")
    steered = particles(MASKED, tilt, reference=other.with_name("other"))
    out = steered.sample(32, seed=3)
    assert out.calls == {"model": 4, "other": 4}


def exact(steered: dd.Particles) -> float:
    return float((T.law(steered.reference) * LOG_W.exp()).sum())


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
@pytest.mark.parametrize("guides", [(), (tilt,), (COIN,)], ids=["plain", "tilt", "coin"])
def test_the_drawn_evidence_has_the_exact_mean(
    process: dd.Process, guides: tuple[Change, ...], failure_rate: float
) -> None:
    steered = particles(process, *guides, ess=0.7)
    out = steered.sample(4 * 4000, seed=5)
    found = out.evidence.numpy()
    assert ttest_1samp(found, exact(steered)).pvalue > failure_rate
    assert ttest_1samp(found, 1.15 * exact(steered)).pvalue < failure_rate  # planted: 15 % more


@pytest.mark.parametrize("operator", [S.FirstHitting(), S.Thinning(), S.Uniformization()], ids=str)
def test_operators_that_cannot_be_enumerated_are_weighed(operator: dd.Operator, failure_rate: float) -> None:
    """Each is exact on a masked process, so that the reference's law is p0."""
    steered = particles(MASKED, tilt, operator=operator, ess=0.7)
    out = steered.sample(4 * 4000, seed=6)
    z = float((WORLD.p0 * LOG_W.exp()).sum())
    assert ttest_1samp(out.evidence.numpy(), z).pvalue > failure_rate
    lost = (out.log_weight - reward(out.tokens, 0.0)).abs().max()
    assert float(lost) > 0.1  # weights correct the guide


def test_expectations_are_weighted_means_of_groups() -> None:
    out = particles(MASKED, tilt, ess=0.0).sample(12, seed=1)
    weights = out.log_weight.view(3, 4).softmax(-1)
    first = out.tokens[:, 0].double()
    torch.testing.assert_close(out.expect(lambda x: x[:, 0]), (weights * first.view(3, 4)).sum(-1))
    torch.testing.assert_close(out.ess, 1 / (weights**2).sum(-1))
    torch.testing.assert_close(out.evidence, out.log_weight.exp().view(3, 4).mean(-1))
    with pytest.raises(ValueError, match=r"expect: the function must give \(12,\) numbers"):
        out.expect(lambda x: x)


def test_drawn_particles_follow_the_target(failure_rate: float) -> None:
    """With many particles nearly: the bias is of order 1 / P."""
    steered = particles(MASKED, per_group=256)
    out = steered.sample(256 * 1000, seed=2)
    target = (T.law(steered.reference) * LOG_W.exp()).log().softmax(0)

    def pvalue(tokens: Tensor, law: Tensor) -> float:
        return float(chisquare(torch.bincount(state_index(tokens, 3), minlength=27).numpy(), law * 1000).pvalue)

    assert pvalue(out.draw(seed=1), target) > failure_rate
    first = 400 * 256
    rest = replace(out, tokens=out.tokens[first:], log_weight=out.log_weight[first:])
    assert torch.equal(rest.draw(seed=1, first_row=first), out.draw(seed=1)[400:])
    assert pvalue(out.draw(seed=1), T.law(steered.reference)) < failure_rate  # planted: no weights
    assert pvalue(out.tokens[::256], target) < failure_rate  # planted: resampling keeps particles in order


# --- steps ------------------------------------------------------------------------------------------------------------


def same(one: ParticleSamples, other: ParticleSamples) -> None:
    assert torch.equal(one.tokens, other.tokens)
    torch.testing.assert_close(one.log_weight, other.log_weight, atol=1e-12, rtol=0)
    assert (one.nfe, one.rewards, one.calls) == (other.nfe, other.rewards, other.calls)


@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap()], ids=str)
def test_a_cut_run_equals_the_uncut_one(operator: dd.Operator) -> None:
    steered = particles(UNIFORM, tilt, COIN, operator=operator, ess=0.8)
    whole = steered.sample(16, seed=3)
    for cut in (1, 2, 3):
        part = steered.sample(16, seed=3, until=cut)
        assert part.state.log_weight.shape == (16,)
        same(steered.sample(resume=part.state), whole)
    state = steered.start(16, seed=3)
    for _ in range(4):
        again = steered.step(state)
        state = steered.step(state)
        assert torch.equal(again.tokens, state.tokens)
        assert torch.equal(again.log_weight, state.log_weight)
    assert torch.equal(state.tokens, whole.tokens)
    torch.testing.assert_close(state.log_weight, whole.log_weight, atol=1e-12, rtol=0)


def test_what_a_step_tells_and_keeps() -> None:
    steered, seen = particles(MASKED, tilt, ess=0.9), []
    out = steered.sample(8, seed=0, record=True, on_step=lambda step, state, info: seen.append((step, info["ess"])))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(ess.shape == (8,) and bool(((ess >= 1) & (ess <= 4)).all()) for _, ess in seen)
    assert out.trajectory is not None
    assert out.trajectory.shape == (5, 8, 3)
    assert torch.equal(out.trajectory[-1], out.tokens)
    assert out.log_prob is None
    assert out.rewards == 8 * 5  # before the first step and after each


def test_prompts_are_kept() -> None:
    out = particles(MASKED, tilt, ess=2.0).sample(8, seed=0, prompt=[2])
    assert bool((out.tokens[:, 0] == 2).all())


def test_samples_are_stored(tmp_path: Path) -> None:
    out = particles(MASKED, tilt).sample(8, seed=0)
    out.save(tmp_path / "out.safetensors")
    assert ParticleSamples.load(tmp_path / "out.safetensors") == out
    with pytest.raises(ValueError, match=r"must hold what Samples\.save wrote"):
        dd.Samples.load(tmp_path / "out.safetensors")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_dead_group_is_named() -> None:
    def kills(x: Tensor, t: float) -> Tensor:
        dead = (torch.arange(len(x)) // 4 == 1) & (t < 0.6)
        return torch.where(dead, -torch.inf, 0.0).double()

    with pytest.raises(ValueError, match=r"group 1, rows 4 to 7, has no particle of positive weight after step 2"):
        particles(MASKED, potential=kills).sample(12, seed=0)


def test_bad_potentials_are_named() -> None:
    for potential, wrong in (
        (lambda x, t: torch.full((len(x),), torch.nan), "the reward of sequence 0"),
        (lambda x, t: torch.zeros(len(x), 2), r"must give \(8,\) numbers"),
    ):
        with pytest.raises(ValueError, match=rf"Particles: the potential at t = 1: .*{wrong}"):
            particles(MASKED, potential=potential).sample(8, seed=0)


def test_bad_arguments_are_refused() -> None:
    sampler = dd.Sampler(MASKED, model(MASKED), S.Ancestral(), steps=2)
    steered = dd.Particles(sampler, reward, 4)
    blocks = dd.Blockwise(MASKED, model(MASKED), S.Ancestral(), block=1, steps=1)
    for wrong in (blocks, steered, 3):
        with pytest.raises(TypeError, match="Particles: takes a Sampler"):
            dd.Particles(wrong, reward, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"potential is called as potential\(x, t\)"):
        dd.Particles(sampler, 3, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resample must be one of 'systematic'"):
        dd.Particles(sampler, reward, 4, resample="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_group must be at least 1"):
        dd.Particles(sampler, reward, 0)
    with pytest.raises(TypeError, match="the guides of the reference must not draw"):
        dd.Particles(sampler, reward, 4, reference=model(MASKED, COIN))
    with pytest.raises(ValueError, match="the process is Masked"):
        dd.Particles(sampler, reward, 4, reference=model(UNIFORM))
    for wrong_rows in ({"batch": 6}, {"batch": 8, "first_row": 2}):
        with pytest.raises(ValueError, match="must be a multiple of per_group = 4"):
            steered.sample(**wrong_rows, seed=0)
    with pytest.raises(ValueError, match="resume takes the state of weighted samples"):
        steered.sample(resume=sampler.sample(4, seed=0, until=1).state)
    with pytest.raises(TypeError, match="law: sampler must be a Sampler or a Blockwise"):
        T.law(steered)  # type: ignore[arg-type]
    assert "per_group=4" in repr(steered)
