"""The loop: samples follow the exact law, do not depend on the batch, and leave what is given alone."""

from dataclasses import replace

import pytest
import torch
from problems import chain, mislabelled, strong, weak
from problems import processes as zoo
from pyro import poutine
from scipy import stats

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.kernels.rows import Rows
from discdiff.kernels.step_inputs import Step
from discdiff.operator import Run
from discdiff.theory.world import state_index

OPERATORS = [S.Ancestral(), S.Ancestral() >> S.Gibbs(), dd.mix({S.Ancestral(): 0.5, S.Gibbs(2) >> S.Ancestral(): 0.5})]


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-square of sampled sequences against a law over V^L."""
    counts = torch.bincount(state_index(tokens, 3), minlength=len(law))
    return float(stats.chisquare(counts, len(tokens) * law / law.sum()).pvalue)


@pytest.mark.parametrize("process", zoo(), ids=repr)
@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_frequencies_agree_with_the_exact_law(process: dd.Process, operator: dd.Operator, failure_rate: float) -> None:
    world = strong()
    sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), operator, steps=3)
    tokens, law = sampler.sample(batch=200_000, seed=1).tokens, T.law(sampler)
    assert p_value(tokens, law) > failure_rate
    # planted faults: the law itself instead of the sampler's, and 5 % too much of every second sequence
    assert p_value(tokens, world.p0) < failure_rate
    assert p_value(tokens, law * (1 + 0.05 * (torch.arange(27) % 2))) < failure_rate


def test_float32_logits_follow_the_law_too(failure_rate: float) -> None:
    process, world = dd.Uniform(3, dd.Linear()), strong()
    exact = world.denoiser(process, predicts="loo")
    single = dd.Denoiser(lambda x, a: exact.fn(x, a.double()).float(), process, predicts="loo", time="alpha", length=3)
    tokens = dd.Sampler(process, single, S.Ancestral(), steps=3).sample(batch=200_000, seed=2).tokens
    assert p_value(tokens, T.law(dd.Sampler(process, exact, S.Ancestral(), steps=3))) > failure_rate


@pytest.mark.parametrize("process", zoo(4), ids=repr)
@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_tokens_do_not_depend_on_the_split(process: dd.Process, operator: dd.Operator) -> None:
    model = chain(4, 24).denoiser(process, predicts="loo")
    sampler = dd.Sampler(process, model, operator, steps=6)
    whole = sampler.sample(batch=16, length=24, seed=3)
    for size in (1, 4):
        parts = [sampler.sample(batch=size, seed=3, first_row=first).tokens for first in range(0, 16, size)]
        assert torch.equal(torch.cat(parts), whole.tokens)
    assert not torch.equal(sampler.sample(batch=16, seed=4).tokens, whole.tokens)
    assert not torch.equal(sampler.sample(batch=16, seed=3, first_row=16).tokens, whole.tokens)
    assert torch.equal(sampler.sample(batch=16, seed=3).tokens, whole.tokens)


def test_without_a_seed_runs_differ_and_can_be_repeated() -> None:
    process = dd.Uniform(3, dd.Linear())
    sampler = dd.Sampler(process, weak().denoiser(process), S.Ancestral(), steps=2)
    first, second = sampler.sample(64), sampler.sample(64)
    assert not torch.equal(first.tokens, second.tokens)
    assert torch.equal(sampler.sample(64, seed=first.seed).tokens, first.tokens)


def test_the_same_program_can_be_traced_and_replayed() -> None:
    process = dd.Uniform(3, dd.Linear())
    model = weak().denoiser(process, predicts="loo")
    operator = S.Ancestral() >> S.Gibbs()

    def step(seed: int) -> torch.Tensor:
        run = Run.start(model, 8, seed, listen=True)
        return operator(*run.begin(torch.arange(24).view(8, 3) % 3, 0.8, 0.5, 1)).tokens

    trace = poutine.trace(step).get_trace(0)
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert names == [f"1.0.{n}" for n in ("where", "accept", "data", "token", "noise")] + [
        f"1.1.{n}" for n in ("where", "data", "token", "noise")
    ]
    assert torch.equal(trace.nodes["_RETURN"]["value"], step(0))
    assert torch.equal(poutine.replay(step, trace=trace)(99), step(0))
    assert not torch.equal(step(99), step(0))


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_recording(process: dd.Process) -> None:
    """log_prob is the joint of all choices; summed over choices its mean of exp(-log_prob) counts them."""
    sampler = dd.Sampler(process, weak().denoiser(process, predicts="loo"), S.Ancestral(), steps=4)
    out = sampler.sample(batch=50, seed=0, record=True)
    plain = sampler.sample(batch=50, seed=0)
    assert torch.equal(out.tokens, plain.tokens)
    assert out.trajectory.shape == (5, 50, 3)
    assert torch.equal(out.trajectory[-1], out.tokens)
    assert plain.trajectory is None
    assert plain.log_prob is None
    assert (out.log_prob < 0).all()


def test_log_prob_is_the_traces() -> None:
    """For one masked step the choices are the token draws alone: log_prob is their log-probability under the model."""
    process, world = dd.Masked(3, dd.Linear()), strong()
    model = world.denoiser(process)
    out = dd.Sampler(process, model, S.Ancestral(), steps=1).sample(batch=20, seed=0, record=True)
    log_d = model(torch.full((20, 3), 3), 1.0).denoiser
    expected = log_d.gather(-1, out.tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(out.log_prob, expected, atol=1e-12, rtol=0)


def conditional(world: T.Enumeration, prompt: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)
    agrees = ((x == prompt) | ~frozen).all(-1)
    return world.p0 * agrees / world.p0[agrees].sum()


PROMPT, FROZEN = torch.tensor([2, 0, 1]), torch.tensor([False, True, False])


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_infill_converges_to_the_conditional(process: dd.Process) -> None:
    world = strong()
    model, target = world.denoiser(process, predicts="loo"), conditional(strong(), PROMPT, FROZEN)

    def error(m: dd.Denoiser, n: int) -> float:
        return T.tv(T.law(dd.Sampler(process, m, S.Ancestral(), steps=n), prompt=PROMPT, frozen=FROZEN), target)

    assert error(model, 32) < min(0.03, error(model, 8) / 3)
    scalar = world.denoiser(process, predicts="loo")
    scalar.call = replace(scalar.call, scalar_time=True)
    if process.absorbing:
        assert error(scalar, 8) == pytest.approx(error(model, 8), abs=1e-12)
    else:  # the negative control: the given site counts as noisy
        assert error(scalar, 32) > max(0.05, error(scalar, 8) / 2, 3 * error(model, 32))


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_infill_samples_follow_the_exact_law(process: dd.Process, failure_rate: float) -> None:
    sampler = dd.Sampler(process, strong().denoiser(process, predicts="loo"), S.Ancestral() >> S.Gibbs(), steps=3)
    out = sampler.sample(batch=100_000, seed=0, prompt=PROMPT, frozen=FROZEN, record=True)
    assert (out.trajectory[:, :, 1] == 0).all()
    law = T.law(sampler, prompt=PROMPT, frozen=FROZEN)
    possible = law > 0
    counts = torch.bincount(state_index(out.tokens, 3), minlength=27)
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], 100_000 * law[possible]).pvalue > failure_rate
    free = T.law(sampler)[possible]  # planted fault: the prompt ignored
    assert stats.chisquare(counts[possible], 100_000 * free / free.sum()).pvalue < failure_rate


@pytest.mark.parametrize("process", zoo(4), ids=repr)
def test_prompts_never_change(process: dd.Process) -> None:
    model = chain(4, 12).denoiser(process, predicts="loo")
    sampler = dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(sites=3), steps=5)
    prefix = sampler.sample(batch=6, seed=0, prompt=[1, 2, 3], record=True).trajectory
    assert (prefix[:, :, :3] == torch.tensor([1, 2, 3])).all()
    each = torch.arange(24).view(6, 4) % 4
    rows = sampler.sample(batch=6, seed=0, prompt=each, record=True).trajectory
    assert (rows[:, :, :4] == each).all()
    pattern = torch.rand(6, 12) < 0.5
    given = torch.randint(4, (6, 12))
    infill = sampler.sample(batch=6, seed=0, prompt=given, frozen=pattern, record=True).trajectory
    assert (infill[:, pattern] == given[pattern]).all()
    start = torch.randint(4, (6, 12))
    kept = sampler.sample(batch=6, seed=0, initial=start, frozen=pattern, record=True).trajectory
    assert (kept[:, pattern] == start[pattern]).all()
    all_frozen = sampler.sample(batch=2, seed=0, prompt=given[:2], frozen=torch.ones(12, dtype=torch.bool))
    assert torch.equal(all_frozen.tokens, given[:2])
    none_frozen = sampler.sample(batch=2, seed=0, prompt=given[:2], frozen=torch.zeros(12, dtype=torch.bool))
    assert torch.equal(none_frozen.tokens, sampler.sample(batch=2, seed=0).tokens)


def test_frozen_sites_are_shown_at_time_zero() -> None:
    times = []
    process = dd.Uniform(4, dd.Linear())

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t)
        return torch.zeros(*x.shape, 4)

    model = dd.Denoiser(spy, process, predicts="loo")
    dd.Sampler(process, model, S.Ancestral(), steps=2).sample(2, 3, seed=0, prompt=[1])
    assert times[0].tolist() == [[0, 1, 1]] * 2
    assert times[1].tolist() == [[0, 0.5, 0.5]] * 2


def test_infill_that_is_approximate_says_so() -> None:
    process = dd.Uniform(4, dd.Linear())
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 4), process, predicts="loo", scalar_time=True)
    sampler = dd.Sampler(process, model, S.Ancestral(), steps=2)
    assert "infill is approximate" in repr(sampler)
    with pytest.warns(UserWarning, match="infill is approximate"):
        sampler.sample(2, 3, seed=0, prompt=[1])
    sampler.sample(2, 3, seed=0)  # no prompt, no warning
    masked = dd.Masked(4, dd.Linear())
    exact = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 4), masked, predicts="denoiser", scalar_time=True)
    dd.Sampler(masked, exact, S.Ancestral(), steps=2).sample(2, 3, seed=0, prompt=[1])


def test_partial_grids() -> None:
    process, world = dd.Uniform(3, dd.Linear()), weak()
    model = world.denoiser(process, predicts="loo")
    sampler = dd.Sampler(process, model, S.Ancestral(), grid=[0.5, 0.3, 0.2])
    p = world.marginal(process, 0.5)
    law = T.law(sampler, initial=p)
    assert law.shape == (27,)
    assert T.tv(law, world.marginal(process, 0.2)) < 0.05
    out = sampler.sample(batch=4, seed=0, initial=torch.zeros(4, 3, dtype=torch.int64))
    assert out.nfe == 2
    with pytest.raises(ValueError, match="give initial="):
        sampler.sample(batch=4, seed=0)
    with pytest.raises(ValueError, match="give initial="):
        T.law(sampler)


def test_repr_is_the_method_section() -> None:
    process = dd.Masked(3, dd.Linear())
    sampler = dd.Sampler(process, weak().denoiser(process), S.Ancestral() >> S.Gibbs() ** 2, steps=64)
    expected = "Sampler(Masked(3, Linear()), Denoiser(exact, Masked(3, Linear()), predicts='denoiser', time='alpha'), "
    assert repr(sampler) == expected + "Ancestral() >> Gibbs(sites=1) ** 2, steps=64)"


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("vocab_size", [1, 2])
def test_tiny_vocabularies_and_lengths(vocab_size: int, length: int) -> None:
    for process in zoo(vocab_size):
        model = dd.Denoiser(
            lambda x, t: torch.zeros(*x.shape, vocab_size),
            process,
            predicts="loo" if not process.absorbing else "denoiser",
        )
        sampler = dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(), steps=3)
        tokens = sampler.sample(3, length, seed=0).tokens
        assert tokens.shape == (3, length)
        assert ((tokens >= 0) & (tokens < vocab_size)).all()


def test_mislabelled_samples_are_seen_to_be_wrong(failure_rate: float) -> None:
    world, process = strong(), dd.Uniform(3, dd.Linear())
    sampler = dd.Sampler(process, mislabelled(world, process), S.Ancestral(), steps=16)
    right = dd.Sampler(process, world.denoiser(process), S.Ancestral(), steps=16)
    assert p_value(sampler.sample(20_000, seed=0).tokens, T.law(right)) < failure_rate


@pytest.mark.parametrize("process", zoo(5), ids=repr)
def test_the_fused_draw_stands_in_token_for_token(process: dd.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sampler with every token drawn by the Triton kernel (in its interpreter here) gives the same tokens."""
    pytest.importorskip("triton")
    from discdiff.kernels import dispatch, triton_rows

    model = chain(5, 10).denoiser(process, predicts="loo")
    sampler = dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(sites=2), steps=3)
    expected = sampler.sample(batch=4, seed=0).tokens
    races, race = [], triton_rows.race

    def fused(*args: object) -> object:
        races.append(race(*args))
        return races[-1]

    monkeypatch.setattr(triton_rows, "race", fused)
    monkeypatch.setattr(dispatch, "_backend", lambda source, backend: "triton")
    assert torch.equal(sampler.sample(batch=4, seed=0).tokens, expected)
    assert len(races) == 6


FUSED = [
    dd.Masked(5, dd.Linear()),
    dd.Masked(5, dd.Linear(), mask_id=2),
    dd.Uniform(5, dd.Linear()),
    dd.Marginal(torch.tensor([0, 0.1, 0.5, 0.4, 0]), dd.Cosine()),
    dd.Masked(1100, dd.Linear()),
    dd.Uniform(1100, dd.Linear()),
]


@pytest.mark.parametrize("whole", [True, False], ids=["triton", "native"])
@pytest.mark.parametrize(
    ("process", "predicts"),
    [(process, "loo") for process in FUSED] + [(p, "denoiser") for p in FUSED if not isinstance(p, dd.Marginal)],
    ids=repr,
)
def test_the_fused_step_stands_in_token_for_token(
    process: dd.Process, predicts: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All choices of Ancestral by three Triton kernels (in their interpreter here), or in C: the program's tokens."""
    from discdiff.kernels import dispatch, native

    if whole:
        pytest.importorskip("triton")
    elif not native.available():
        pytest.skip("there is no C compiler")

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(process.states, process.vocab_size, generator=generator) * 2
    mixing = torch.randn(9, 9, generator=generator)
    model = dd.Denoiser(lambda x, t: torch.einsum("lk,bkv->blv", mixing, table[x]), process, predicts)
    to_the_end = process.absorbing or predicts == "loo"  # at t = 0 a denoiser does not give the corrector its O
    grid = [1.0, 0.6, 0.3, *([0.0] if to_the_end else [])]
    sampler = dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(sites=2), grid=grid)
    monkeypatch.setattr(dispatch, "fuses", lambda device: False)
    expected = sampler.sample(3, 9, seed=4, prompt=[1, 3]).tokens
    steps = []

    def fused(rows: Rows, what: Step) -> object:
        steps.append(what.where is None)
        return run(rows, what)

    run = dispatch.step
    monkeypatch.setattr(dispatch, "step", fused)
    monkeypatch.setattr(dispatch, "fuses", lambda device: True)
    monkeypatch.setattr(dispatch, "steps_whole", lambda device: whole)
    assert torch.equal(sampler.sample(3, 9, seed=4, prompt=[1, 3]).tokens, expected)
    moves = len(sampler.grid) - 1
    assert steps.count(True) == (moves if whole else 0)
    assert steps.count(False) == (moves if whole else 2 * moves)  # the corrector's are native here
    assert not torch.equal(sampler.sample(3, 9, seed=5, prompt=[1, 3]).tokens, expected)
    steps.clear()
    sampler.sample(3, 9, seed=4, record=True)
    assert steps == [], "whoever records hears every choice"


@pytest.mark.parametrize("whole", [True, False], ids=["triton", "native"])
def test_the_fused_step_names_a_site_that_cannot_be_drawn(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from discdiff.kernels import dispatch

    monkeypatch.setattr(dispatch, "fuses", lambda device: True)
    monkeypatch.setattr(dispatch, "steps_whole", lambda device: whole)
    logits = torch.zeros(2, 3, 4)
    logits[1, 2] = float("nan")
    model = dd.Denoiser(lambda x, t: logits, dd.Masked(4, dd.Linear()), "loo")
    with pytest.raises(ValueError, match="row 1, position 2: the denoiser gave logits without mass, or with a NaN"):
        dd.Sampler(model.process, model, S.Ancestral(), steps=1).sample(2, 3, seed=0)
