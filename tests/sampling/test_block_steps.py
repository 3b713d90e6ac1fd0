"""Blockwise runs and cascades that are cut, resumed, watched and stepped by hand; given sites and first states."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from operators import STEPS as SHIPPED
from operators import accepted
from problems import block_network, chain, named, strong
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.denoiser import CachedPrefix
from discdiff.operator import Run, State
from discdiff.sampling import BlockSamples
from discdiff.sampling.blocks import Job

# Hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
PROCESSES = [MASKED, UNIFORM]
B, L = 4, 4
# A coarse tolerance, as the usual one takes thousands of calls.
STEPS = [S.Adaptive(tolerance=1.0) if isinstance(one, S.Adaptive) else one for one in SHIPPED]
PROMPTS = [[], [1], [2, 0, 1], [2, 1]]
ORACLES = {process: chain(3, L).denoiser(process, predicts="loo") for process in PROCESSES}
SHORT = {process: chain(3, 3).denoiser(process, predicts="loo") for process in PROCESSES}
CACHED = {
    process: dd.Denoiser(block_network(process).fn, process, "loo", time="alpha")  # type: ignore[arg-type]
    for process in PROCESSES
}
TIMELESS = {
    process: dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), process, "loo", time=None) for process in PROCESSES
}
FROZEN = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
HELD = torch.tensor([[0, 0, 1, 2], [1, 0, 0, 2], [0, 0, 0, 0], [0, 1, 1, 2]])

# The model, options of Blockwise and arguments of sample.
SETTINGS: dict[str, tuple[dict[dd.Process, dd.Denoiser], dict[str, object], dict[str, object]]] = {
    "prompts": (ORACLES, {"block": 2}, {"prompt": PROMPTS}),
    "sizes and stops": (ORACLES, {"block": {1: 0.5, 2: 0.5}}, {"prompt": PROMPTS, "stop": 0}),
    "window": (SHORT, {"block": 2, "window": 3}, {"prompt": PROMPTS, "stop": 0}),
    "cached": (CACHED, {"block": 2}, {"prompt": PROMPTS, "stop": 0}),
    "cached window": (CACHED, {"block": {1: 0.5, 2: 0.5}, "window": 3}, {"prompt": PROMPTS, "stop": 0}),
    "frozen": (CACHED, {"block": 2}, {"prompt": HELD, "frozen": FROZEN}),
    "no time": (TIMELESS, {"block": 2}, {}),
}


def blocks_of(
    setting: str, process: dd.Process, operator: dd.Operator, steps: int = 2
) -> tuple[dd.Blockwise, dict[str, object]]:
    models, options, asked = SETTINGS[setting]
    maker = dd.Blockwise(process, models[process], operator, steps=steps, **options)  # type: ignore[arg-type]
    return maker, {"batch": B, "length": L, "seed": 7, **asked}


def cascade(process: dd.Process, operator: dd.Operator, first: dd.Sampler | dd.Blockwise | None = None) -> dd.Cascade:
    table = torch.randn(process.states, 3, 3, generator=torch.Generator().manual_seed(0))
    second = dd.Denoiser(lambda x, t, y: table[x, y], process, "loo")  # type: ignore[arg-type]
    if first is None:
        first = dd.Sampler(process, dd.Denoiser(lambda x, t: table[x, 0], process, "loo"), operator, steps=2)
    return dd.Cascade(first, dd.Sampler(process, second, operator, steps=2))


def same(one: dd.Samples, other: dd.Samples) -> None:
    """Equal in all but the trajectory; log-probabilities are sums in another order."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.nfe_rows, other.nfe_rows)
    assert (one.nfe, one.queries, one.seed) == (other.nfe, other.queries, other.seed)
    assert (one.log_prob is None) == (other.log_prob is None)
    if one.log_prob is not None:
        torch.testing.assert_close(one.log_prob, other.log_prob, rtol=1e-5, atol=1e-5)
    if isinstance(one, BlockSamples) and isinstance(other, BlockSamples):
        assert one.lengths is not None
        assert other.lengths is not None
        assert torch.equal(one.lengths, other.lengths)


def joined(parts: list[dd.Samples]) -> Tensor:
    """The trajectory of a run from those of its parts; each begins with the last state of the one before."""
    paths = [part.trajectory for part in parts if part.trajectory is not None and len(part.trajectory)]
    return torch.cat([paths[0], *(path[1:] for path in paths[1:])])


def walk(
    maker: dd.Blockwise | dd.Cascade, asked: dict[str, object], record: bool, steps: int
) -> Iterator[dd.Samples | tuple[dd.Samples, dd.Samples]]:
    """Run one step at a time: each part continues the one before."""
    told: dict[str, object] = asked
    for step in range(1, steps + 1):
        part = maker.sample(**told, record=record, until=step)  # type: ignore[arg-type]
        yield part
        told = {"resume": part.state}


def length(out: dd.Samples) -> int:
    """The number of steps of a recorded run."""
    assert out.trajectory is not None
    return len(out.trajectory) - 1


# --- cut at every step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("operator", STEPS, ids=named)
def test_a_run_cut_at_every_step_is_the_uncut_run(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    for setting, record in (("sizes and stops", True), ("cached", True), ("cached window", False)):
        maker, asked = blocks_of(setting, process, operator)
        whole = maker.sample(**asked, record=True)  # type: ignore[arg-type]
        steps, deaf = length(whole), whole if record else maker.sample(**asked)  # type: ignore[arg-type]
        parts = list(walk(maker, asked, record, steps))
        same(parts[-1], deaf)  # type: ignore[arg-type]
        if record:
            assert torch.equal(joined(parts), whole.trajectory)  # type: ignore[arg-type]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("operator", STEPS, ids=named)
def test_a_cascade_cut_at_every_step_is_the_uncut_one(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    blocks = blocks_of("cached", process, operator)[0]
    for first, record in ((None, True), (blocks, True), (None, False)):
        maker, asked = cascade(process, operator, first), {"batch": B, "lengths": (L, L), "seed": 7}
        told = maker.sample(**asked, record=True)  # type: ignore[arg-type]
        steps = length(told.first) + length(told.second)
        parts = list(walk(maker, asked, record, steps))
        for stage, (one, other) in enumerate(zip(parts[-1], maker.sample(**asked, record=record), strict=True)):  # type: ignore[arg-type]
            same(one, other)
            if record:
                assert torch.equal(joined([part[stage] for part in parts]), other.trajectory)


OPERATORS = [S.Ancestral(), S.Multistep(), S.Ancestral() >> S.LocallyBalanced() ** 2]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_cut_of_every_setting_goes_on_to_the_end(setting: str, process: dd.Process) -> None:
    for operator in (one for one in OPERATORS if accepted(one, process)):
        maker, asked = blocks_of(setting, process, operator, steps=3)
        whole = maker.sample(**asked, record=True)  # type: ignore[arg-type]
        assert length(whole) >= 3
        for cut in range(1, length(whole)):
            part = maker.sample(**asked, record=True, until=cut)  # type: ignore[arg-type]
            for _ in range(2):  # from one state twice
                rest = maker.sample(resume=part.state, record=True)
                same(rest, whole)
                assert torch.equal(joined([part, rest]), whole.trajectory)


def restarted(self: dd.Sampler, state: State, run: Run) -> Iterator[State]:
    """Number the remaining steps from 1."""
    for number, (step, t, s) in enumerate(itertools.islice(self.intervals(), state.step, None), start=1):
        state = replace(self.operator(state, dd.At(self.process, run, t, s, number)), step=step)
        yield state


def test_steps_with_other_numbers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, asked = blocks_of("cached", UNIFORM, S.Ancestral(), steps=3)
    whole, part = maker.sample(**asked), maker.sample(**asked, until=2)  # type: ignore[arg-type]
    same(maker.sample(resume=part.state), whole)
    monkeypatch.setattr(dd.Sampler, "through", restarted)
    same(maker.sample(**asked), whole)  # type: ignore[arg-type]  # nothing is cut, so nothing is numbered anew
    with pytest.raises(AssertionError):
        same(maker.sample(resume=part.state), whole)
    pair = cascade(UNIFORM, S.Ancestral())
    with pytest.raises(AssertionError):
        parts = list(walk(pair, {"batch": 64, "lengths": (L, L), "seed": 7}, False, 4))
        same(parts[-1][1], pair.sample(64, (L, L), seed=7).second)  # type: ignore[index]


# --- by hand --------------------------------------------------------------------------------------------------------


def by_hand(maker: dd.Blockwise, asked: dict[str, object], steps: int) -> list[State]:
    states = [maker.start(**asked)]  # type: ignore[arg-type]
    for number in range(1, steps + 1):
        before = states[-1].tokens.clone()
        one, other = maker.step(states[-1]), maker.step(states[-1])
        assert torch.equal(one.tokens, other.tokens)
        assert (one.step, one.t, one.run.model.nfe) == (number, other.t, other.run.model.nfe)
        assert torch.equal(states[-1].tokens, before)
        states.append(one)
    return states


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_step_is_pure_and_steps_make_the_run(setting: str, process: dd.Process) -> None:
    for operator in (one for one in OPERATORS if accepted(one, process)):
        maker, asked = blocks_of(setting, process, operator)
        whole = maker.sample(**asked, record=True)  # type: ignore[arg-type]
        states = by_hand(maker, asked, length(whole))
        assert whole.trajectory is not None
        assert torch.equal(states[-1].tokens, whole.tokens)
        assert states[-1].run.model.nfe == whole.nfe
        shown, complete = torch.stack([state.tokens for state in states]), whole.trajectory
        assert torch.equal(shown, complete)
        for state in [*states[:-1], *states[-2::-1]]:  # earlier ones after later ones were made and resumed
            assert torch.equal(maker.sample(resume=state).tokens, whole.tokens)
        with pytest.raises(ValueError, match=f"all {length(whole)} steps are made"):
            maker.step(states[-1])
        with pytest.raises(ValueError, match=f"has made all its {length(whole)} steps"):
            maker.sample(resume=states[-1])


@pytest.mark.parametrize("cached", [True, False])
def test_contexts_that_are_not_copied_are_caught(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = CACHED[UNIFORM].fn
    model = CACHED[UNIFORM] if cached else dd.Denoiser(lambda x, a: net(x, a), UNIFORM, "loo", time="alpha")
    maker, asked = dd.Blockwise(UNIFORM, model, S.Ancestral(), block=2, steps=2), {"batch": B, "length": 6, "seed": 7}
    whole, usual = maker.sample(**asked, record=True), Job.copy  # type: ignore[arg-type]

    def resumed() -> None:
        for state in by_hand(maker, asked, length(whole))[-2::-1]:
            rest = maker.sample(resume=state)
            assert (rest.nfe, rest.tokens.tolist()) == (whole.nfe, whole.tokens.tolist())

    def careless(job: Job) -> Job:
        other = usual(job)
        other.groups = list(job.groups)
        return other

    resumed()
    monkeypatch.setattr(Job, "copy", careless)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        resumed()


def test_a_cascade_by_hand() -> None:
    maker = cascade(UNIFORM, S.Ancestral() >> S.Gibbs(), blocks_of("cached", UNIFORM, S.Ancestral())[0])
    whole = maker.sample(B, (L, L), seed=7)
    states = [maker.start(B, (L, L), seed=7)]
    for number in range(1, 7):
        one, other = maker.step(states[-1]), maker.step(states[-1])
        assert torch.equal(one.tokens, other.tokens)
        assert one.step == number
        states.append(one)
    assert torch.equal(states[4].tokens, whole.first.tokens)
    assert torch.equal(states[6].tokens, whole.second.tokens)
    for state in states[-2::-1]:
        for one, other in zip(maker.sample(resume=state), whole, strict=True):
            same(one, other)
    with pytest.raises(ValueError, match="all 6 steps are made"):
        maker.step(states[-1])
    with pytest.raises(ValueError, match="has made all its 6 steps"):
        maker.sample(resume=states[-1])


def test_an_uncut_run_copies_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    select = CachedPrefix.select
    monkeypatch.setattr(CachedPrefix, "select", lambda self, index: copied.append(len(index)) or select(self, index))
    maker = dd.Blockwise(UNIFORM, CACHED[UNIFORM], S.Ancestral(), block=2, steps=3)
    part = maker.sample(B, L, seed=7, record=True, until=4, on_step=lambda step, state, info: None)
    assert copied == []
    maker.sample(resume=part.state)
    assert copied == [B]


# --- watched --------------------------------------------------------------------------------------------------------


def test_a_function_sees_every_step_of_a_blockwise_run_and_stops_it() -> None:
    maker, asked = blocks_of("prompts", UNIFORM, S.Ancestral() >> S.LocallyBalanced())
    seen: list[tuple[int, State, dict[str, Tensor]]] = []

    def look(step: int, state: State, info: dict[str, Tensor]) -> bool:
        seen.append((step, state, info))
        return step < 3

    out = maker.sample(**asked, on_step=look, record=True)  # type: ignore[arg-type]
    assert [step for step, _, _ in seen] == [state.step for _, state, _ in seen] == [1, 2, 3]
    assert out.trajectory is not None
    assert torch.equal(out.trajectory[1:], torch.stack([state.tokens for _, state, _ in seen]))
    assert {state.t for _, state, _ in seen} == {0.5, 0.0}
    for (_, state, info), before in zip(seen, out.trajectory, strict=False):
        assert info["accepted"].shape == (B,)
        moved = (state.tokens != before).any(-1)
        assert not bool((moved & info["accepted"].isnan()).any())  # only the group's rows report and move
        assert state.frozen is not None
        assert torch.equal(state.frozen.sum(1), torch.tensor([0, 1, 3, 2]))
    assert any(bool(info["accepted"].isnan().any()) for _, _, info in seen)
    whole = maker.sample(**asked)  # type: ignore[arg-type]
    same(maker.sample(resume=out.state), whole)
    assert out.lengths is not None
    assert whole.lengths is not None
    assert bool((out.lengths <= whole.lengths).all())
    assert bool((out.lengths < whole.lengths).any())
    kept = torch.arange(L) < out.lengths[:, None]
    assert torch.equal(out.tokens[kept], whole.tokens[kept])
    assert bool((out.tokens == -1).any())


def test_a_function_sees_both_stages_and_stops_them() -> None:
    maker = cascade(UNIFORM, S.Ancestral() >> S.LocallyBalanced())
    whole = maker.sample(B, (L, L), seed=7)
    for last in (1, 2, 3):
        seen: list[tuple[int, Tensor]] = []

        def look(step: int, state: State, info: dict[str, Tensor], seen: list = seen, last: int = last) -> bool:  # type: ignore[type-arg]
            assert state.step == step
            assert info["accepted"].shape == (B,)
            seen.append((step, state.tokens))
            return step < last

        out = maker.sample(B, (L, L), seed=7, on_step=look)
        assert [step for step, _ in seen] == list(range(1, last + 1))
        assert torch.equal(seen[-1][1], out.first.tokens if last <= 2 else out.second.tokens)
        assert bool((out.second.tokens == -1).all()) is (last <= 2)
        assert (out.second.nfe == 0) is (last <= 2)
        for one, other in zip(maker.sample(resume=out.state), whole, strict=True):
            same(one, other)


def test_progress_is_shown_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    maker, asked = blocks_of("prompts", MASKED, S.Ancestral())
    maker.sample(**asked)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    maker.sample(**asked, progress=True)  # type: ignore[arg-type]
    assert "100%" in capsys.readouterr().err
    cascade(MASKED, S.Ancestral()).sample(2, (2, 2), seed=0, progress=True)
    assert capsys.readouterr().err.count("100%") == 2


# --- trajectories ---------------------------------------------------------------------------------------------------


def test_the_trajectory_of_one_block_is_the_plain_sampler() -> None:
    for process in PROCESSES:
        whole = dd.Sampler(process, CACHED[process], S.Ancestral(), steps=3).sample(3, L, seed=2, record=True)
        block = dd.Blockwise(process, CACHED[process], S.Ancestral(), block=L, steps=3)
        out = block.sample(3, L, seed=2, record=True)
        same(out, whole)
        assert torch.equal(out.trajectory, whole.trajectory)  # type: ignore[arg-type]
        assert vars(block.sample(3, L, seed=2, record=True))["trajectory"].dtype == torch.int16


def test_blocks_that_have_not_begun_are_minus_one() -> None:
    maker = dd.Blockwise(UNIFORM, CACHED[UNIFORM], S.Ancestral(), block=2, steps=3)
    out = maker.sample(3, 6, seed=0, record=True, prompt=torch.tensor([0, 0, 0, 0, 0, 2]), frozen=[False] * 5 + [True])
    assert out.trajectory is not None
    assert out.trajectory.shape == (10, 3, 6)
    begun = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 3, 3])[:, None] * 2 > torch.arange(6)
    begun[:, 5] = True  # given
    assert torch.equal(out.trajectory >= 0, begun[:, None].expand_as(out.trajectory))
    assert torch.equal(out.trajectory[3, :, :2], out.tokens[:, :2])
    assert torch.equal(out.trajectory[-1], out.tokens)


# --- given sites and first states -----------------------------------------------------------------------------------


class Stay(dd.Predictor):
    """Moves in time alone."""

    def __call__(self, state: State, at: dd.At) -> State:
        return state.at(state.tokens, at.s)


def test_blocks_begin_with_the_states_given() -> None:
    states = torch.randint(3, (B, L), generator=torch.Generator().manual_seed(0))
    for block in (1, 2, 3, {1: 0.5, 2: 0.5}):
        stay = dd.Blockwise(UNIFORM, CACHED[UNIFORM], Stay(), block=block, steps=2)
        assert torch.equal(stay.sample(initial=states, seed=0).tokens, states)
        assert not torch.equal(stay.sample(B, L, seed=0).tokens, states)
    for process in PROCESSES:
        noise = states if process is UNIFORM else torch.full((B, L), 3)
        whole = dd.Sampler(process, ORACLES[process], S.Ancestral(), steps=3)
        block = dd.Blockwise(process, ORACLES[process], S.Ancestral(), block=L, steps=3)
        assert torch.equal(block.sample(initial=noise, seed=1).tokens, whole.sample(initial=noise, seed=1).tokens)
    maker, asked = blocks_of("cached", MASKED, S.Ancestral())  # masks are the only first states
    assert torch.equal(maker.sample(**asked, initial=torch.full((B, L), 3)).tokens, maker.sample(**asked).tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("operator", STEPS, ids=named)
def test_given_sites_keep_their_tokens(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    for frozen, prompt in ((FROZEN, HELD), (FROZEN[0], HELD[0])):
        for models, block in ((CACHED, 2), (ORACLES, {1: 0.5, 4: 0.5})):
            maker = dd.Blockwise(process, models[process], operator, block=block, steps=2)
            out = maker.sample(B, L, seed=3, prompt=prompt, frozen=frozen, stop=1)
            assert torch.equal(out.tokens[frozen.expand(B, L)], prompt.expand(B, L)[frozen.expand(B, L)])
            assert process.mask_id is None or not bool((out.tokens == process.mask_id).any())


def test_given_first_sites_are_a_prompt() -> None:
    for setting in ("prompts", "cached", "window"):
        maker, asked = blocks_of(setting, UNIFORM, S.Ancestral() >> S.Gibbs())
        frozen = torch.arange(L) < torch.tensor([len(prompt) for prompt in PROMPTS])[:, None]
        tokens = torch.tensor([[*prompt, *[2] * (L - len(prompt))] for prompt in PROMPTS])
        other = maker.sample(**{**asked, "prompt": tokens, "frozen": frozen}, record=True)  # type: ignore[arg-type]
        assert other == maker.sample(**asked, record=True)  # type: ignore[arg-type]
        start = {**asked, "prompt": None, "frozen": frozen, "initial": tokens}
        again = maker.sample(**start)  # type: ignore[arg-type]
        assert torch.equal(again.tokens[frozen], tokens[frozen])


def test_a_given_block_takes_no_step() -> None:
    maker = dd.Blockwise(MASKED, CACHED[MASKED], S.Unmask(), block=2, steps=2)
    frozen, prompt = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 2, 2, 1, 0, 0])
    out = maker.sample(3, 8, seed=0, prompt=prompt, frozen=frozen, record=True)
    assert length(out) == out.nfe == 4
    greedy = dd.Blockwise(
        MASKED, CACHED[MASKED], S.Greedy(), block=2, steps=1
    )  # whatever the numbers of the blocks are
    one = greedy.sample(3, 8, seed=0, prompt=prompt, frozen=frozen).tokens
    assert torch.equal(greedy.sample(3, 8, seed=0, prompt=one[:, :6]).tokens, one)
    every = maker.sample(3, 8, seed=0, prompt=prompt, frozen=torch.ones(8, dtype=torch.bool), record=True)
    assert (every.nfe, length(every)) == (1, 0)  # what fills the cache
    assert torch.equal(every.tokens, prompt.expand(3, 8))


def test_a_given_site_conditions_its_block(failure_rate: float) -> None:
    """p(x_1) p(x_2 | x_1, x_3): one site at a time, which is exact; the third site is given."""
    world, given = strong(), 1
    maker = dd.Blockwise(MASKED, world.denoiser(MASKED), S.Ancestral(), block=[1, 2], steps=1)
    out = maker.sample(20_000, 3, seed=4, prompt=[0, 0, given], frozen=[False, False, True])
    joint = world.p0.view(3, 3, 3)
    law = joint.sum((1, 2))[:, None] * joint[:, :, given] / joint[:, :, given].sum(1, keepdim=True)
    count = torch.bincount(out.tokens[:, 0] * 3 + out.tokens[:, 1], minlength=9)
    assert chisquare(count.numpy(), law.flatten().numpy() * 20_000).pvalue > failure_rate
    alone = joint.sum((1, 2))[:, None] * joint.sum(2) / joint.sum((1, 2))[:, None]
    assert chisquare(count.numpy(), alone.flatten().numpy() * 20_000).pvalue < failure_rate


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_may_be_split(process: dd.Process, size: int) -> None:
    """Tokens, log-probabilities, calls and lengths of 16 rows are those of parts of the batch."""
    frozen = torch.rand(16, L, generator=torch.Generator().manual_seed(1)) < 0.4
    frozen[::4] = frozen[1]
    prompt = torch.randint(3, (16, L), generator=torch.Generator().manual_seed(2))
    states = torch.randint(process.states, (16, L), generator=torch.Generator().manual_seed(3))
    for operator, block in itertools.product((S.Ancestral(), S.Unmask("margin"), S.Multistep()), (2, {1: 0.5, 3: 0.5})):
        if not accepted(operator, process):
            continue
        maker = dd.Blockwise(process, CACHED[process], operator, block=block, steps=2)
        whole = maker.sample(16, L, seed=5, prompt=prompt, frozen=frozen, initial=states, stop=2, record=True)
        for row in range(0, 16, size):
            here = slice(row, min(row + size, 16))
            told = {"prompt": prompt[here], "frozen": frozen[here], "initial": states[here], "first_row": row}
            part = maker.sample(seed=5, stop=2, record=True, **told)  # type: ignore[arg-type]
            assert torch.equal(part.tokens, whole.tokens[here])
            assert torch.equal(part.lengths, whole.lengths[here])  # type: ignore[arg-type, index]
            torch.testing.assert_close(part.log_prob, whole.log_prob[here], rtol=1e-5, atol=1e-5)  # type: ignore[index]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    maker, asked = blocks_of("cached", UNIFORM, S.Ancestral())
    state = maker.sample(**asked, until=2).state  # type: ignore[arg-type]
    pair = cascade(UNIFORM, S.Ancestral())
    half, late = pair.sample(2, (3, 3), seed=0, until=1).state, pair.sample(2, (3, 3), seed=0, until=3).state
    plain = pair.first.start(2, 3, seed=0)
    other = dd.Blockwise(UNIFORM, CACHED[UNIFORM], S.Ancestral(), block=3, steps=2)
    for call, error, text in (
        (lambda: maker.sample(2, resume=state), TypeError, "began with its own batch"),
        (lambda: maker.sample(resume=state, seed=1, stop=1), TypeError, "its own seed, stop"),
        (lambda: maker.sample(resume=state, frozen=[True]), TypeError, "its own frozen"),
        (lambda: maker.sample(resume=state, until=2), ValueError, "has made 2 steps"),
        (lambda: maker.sample(resume=state, record=True), ValueError, "record=True from its first step"),
        (lambda: maker.sample(2, 4, seed=1, on_step=5), TypeError, "called as on_step"),
        (lambda: maker.sample(2, 4, seed=1, until=0), ValueError, "until must"),
        (lambda: maker.sample(2, 4, seed=1, progress=1), TypeError, "progress must"),
        (lambda: other.sample(resume=state), ValueError, "is not of Blockwise"),
        (lambda: maker.step(replace(state, t=0.3)), ValueError, "is not of Blockwise"),
        (lambda: maker.step(replace(state, tokens=state.tokens + 1)), ValueError, "tokens of the state were changed"),
        (lambda: maker.step(plain), ValueError, "takes a state of start"),
        (lambda: maker.inner.step(state), ValueError, "takes a state of start"),
        (lambda: pair.first.step(half), ValueError, "takes a state of start"),
        (lambda: maker.sample(2, seed=1), ValueError, "give length="),
        (lambda: maker.sample(2, 4, seed=1, initial=[[0, 1]]), ValueError, "initial must have shape"),
        (lambda: maker.sample(initial=[[0, 3]], seed=1), ValueError, "initial"),
        (lambda: maker.sample(2, 4, seed=1, frozen=[True] * 4), ValueError, "must say what they hold"),
        (lambda: maker.sample(2, 4, seed=1, prompt=[1], frozen=[True] * 4), ValueError, "cover all 4 sites"),
        (lambda: pair.sample(2, (3, 3), resume=half), TypeError, "its own batch, lengths"),
        (lambda: pair.sample(resume=half, until=1), ValueError, "has made 1 steps"),
        (lambda: pair.sample(resume=late, until=3), ValueError, "has made 3 steps"),
        (lambda: pair.sample(resume=half, record=True), ValueError, "record=True from its first step"),
        (lambda: pair.sample(resume=late, record=True), ValueError, "record=True from its first step"),
        (lambda: pair.sample(2, (3, 3), until=5), ValueError, "until must"),
        (lambda: pair.sample(2, (3, 3), on_step=5), TypeError, "called as on_step"),
        (lambda: pair.sample(2), TypeError, "lengths must"),
        (lambda: pair.step(plain), ValueError, "takes a state of start"),
        (lambda: pair.step(replace(late, t=0.3)), ValueError, "is not of Cascade"),
        (lambda: pair.step(replace(late, tokens=late.tokens + 1)), ValueError, "tokens of the state were changed"),
        (lambda: cascade(UNIFORM, S.Ancestral()).step(late), ValueError, "is not of"),
    ):
        with pytest.raises(error, match=text):
            call()
