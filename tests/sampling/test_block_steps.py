"""Blockwise runs and cascades that are cut, resumed, watched and stepped by hand."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from blocks import (
    CACHED,
    MASKED,
    PROCESSES,
    PROMPTS,
    SETTINGS,
    STEPS,
    TIMELESS,
    UNIFORM,
    B,
    L,
    blocks_of,
    cascade,
    joined,
    length,
    same,
    walk,
)
from operators import accepted
from problems import chain, named
from pyro import poutine
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.denoiser import CachedPrefix
from discdiff.operator import Run, State
from discdiff.sampling.blocks import Job

# Hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")


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
            rest = maker.sample(resume=part.state, record=True)
            same(rest, whole)
            assert torch.equal(joined([part, rest]), whole.trajectory)


def restarted(self: dd.Sampler, state: State, run: Run) -> Iterator[State]:
    """Number the remaining steps from 1."""
    run.use(self.model)
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


def test_a_call_that_is_not_repeated_is_not_repeated_after_a_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network without a time is not called again on the tokens of its last call."""
    maker, asked = dd.Blockwise(MASKED, TIMELESS[MASKED], S.Euler(), block=2, steps=8), {"length": L, "seed": 3}
    whole = maker.sample(1, **asked)  # type: ignore[arg-type]
    assert whole.nfe < 8
    same(list(walk(maker, {"batch": 1, **asked}, False, 16))[-1], whole)  # type: ignore[arg-type]
    copied = Job.copy

    def forgetful(job: Job) -> Job:
        other = copied(job)
        for group in (one for one in other.groups if one.state is not None):
            group.state.run.model._last = None
        return other

    monkeypatch.setattr(Job, "copy", forgetful)
    with pytest.raises(AssertionError):
        same(list(walk(maker, {"batch": 1, **asked}, False, 16))[-1], whole)  # type: ignore[arg-type]


# --- by hand --------------------------------------------------------------------------------------------------------


def by_hand(maker: dd.Blockwise, asked: dict[str, object], steps: int) -> list[State]:
    states = [maker.start(**asked)]  # type: ignore[arg-type]
    for number in range(1, steps + 1):
        before = states[-1].tokens.clone()
        one, other = maker.step(states[-1]), maker.step(states[-1])
        assert torch.equal(one.tokens, other.tokens)
        assert (one.step, one.t, one.run.tally.nfe) == (number, other.t, other.run.tally.nfe)
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
        assert states[-1].run.tally.nfe == whole.nfe
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
        return step != 2

    out = maker.sample(**asked, on_step=look, record=True)  # type: ignore[arg-type]
    assert [step for step, _, _ in seen] == [state.step for _, state, _ in seen] == [1, 2]
    assert out.trajectory is not None
    assert torch.equal(out.trajectory[1:], torch.stack([state.tokens for _, state, _ in seen]))
    assert {state.t for _, state, _ in seen} == {0.5, 0.0}
    for (_, state, info), before in zip(seen, out.trajectory, strict=False):
        assert info["accepted"].shape == (B,)
        moved = (state.tokens != before).any(-1)
        assert not bool((moved & info["accepted"].isnan()).any())  # only the group's rows report and move
        assert state.frozen is not None
        assert torch.equal(state.frozen.sum(1), torch.tensor([0, 1, 3, 2]))
        assert not bool(info["accepted"].isnan().any())
    whole = maker.sample(**asked)  # type: ignore[arg-type]
    same(maker.sample(resume=out.state, on_step=look), whole)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    for _, _, info in seen[2:]:  # rows with a prompt of two tokens or more have one block
        assert info["accepted"].isnan().tolist() == [False, False, True, True]
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


def test_choices_after_a_cut_have_the_names_of_the_uncut_run() -> None:
    def heard(**asked: object) -> dict[str, Tensor]:
        trace = poutine.trace(lambda: maker.sample(**asked, listen=True)).get_trace()  # type: ignore[arg-type]
        return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}

    for maker, size in (
        (blocks_of("cached", UNIFORM, S.Ancestral())[0], {"length": L}),
        (cascade(UNIFORM, S.Ancestral(), blocks_of("cached", UNIFORM, S.Ancestral())[0]), {"lengths": (L, L)}),
    ):
        asked = {"batch": B, "seed": 7, **size}
        whole = heard(**asked)
        for cut in range(1, 4):
            first, rest = heard(**asked, until=cut), heard(resume=maker.sample(**asked, until=cut).state)  # type: ignore[arg-type]
            assert [*first, *rest] == list(whole)
            assert all(torch.equal(value, whole[name]) for name, value in (first | rest).items())


def test_joint_states_travel_too() -> None:
    process = dd.AbsorbingUniform(3, dd.Linear())
    maker = dd.Blockwise(process, chain(3, L).denoiser(process), S.Ancestral(), block=2, steps=3)
    asked: dict[str, object] = {"batch": B, "length": L, "seed": 7, "prompt": PROMPTS}
    whole = maker.sample(**asked, record=True)  # type: ignore[arg-type]
    parts = list(walk(maker, asked, True, length(whole)))
    same(parts[-1], whole)  # type: ignore[arg-type]
    assert torch.equal(joined(parts), whole.trajectory)  # type: ignore[arg-type]


def test_progress_is_shown_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    maker, asked = blocks_of("prompts", MASKED, S.Ancestral())
    maker.sample(**asked)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    maker.sample(**asked, progress=True)  # type: ignore[arg-type]
    assert "100%" in capsys.readouterr().err
    cascade(MASKED, S.Ancestral()).sample(2, (2, 2), seed=0, progress=True)
    assert capsys.readouterr().err.count("100%") == 2


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
