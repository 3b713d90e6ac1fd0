"""A run that is killed goes on from its checkpoint to the weights, bit for bit, of one that was not."""

import functools
import signal
from pathlib import Path

import pytest
import torch
from learners import ROWS, Dropping, kill_self, killed, stopping, weights
from torch import Tensor

from discdiff import losses
from discdiff.learning import run as run_module
from discdiff.learning import trainer as trainer_module

STEPS = 14


@functools.cache
def uninterrupted() -> list[Tensor]:
    trainer = stopping(None)
    trainer.fit(STEPS)
    return weights(trainer)


def resumed(folder: Path) -> list[Tensor]:
    torch.manual_seed(99)  # the random state must come from the checkpoint
    trainer = stopping(folder)
    trainer.fit(STEPS)
    return weights(trainer)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kill_in(place: str, folder: Path) -> None:
    """Train until a place, and kill the process there."""
    owner, name, count = {
        "in the forward pass of step 1": (Dropping, "forward", 1),
        "in the forward pass of step 8": (Dropping, "forward", 10),  # two calls were of held-out data
        "before the optimizer's step 4": (torch.optim.AdamW, "step", 4),
        "between the optimizer's step 11 and the average's": (trainer_module.AveragedModel, "update_parameters", 11),
        "while a checkpoint is written": (torch, "save", 2),
        "before a checkpoint takes its place": (run_module.os, "replace", 3),
        "after the last step, before its checkpoint": (run_module.Run, "save", 5),
    }[place]
    calls, plain = [], getattr(owner, name)

    def counted(*arguments: object, **named: object) -> object:
        calls.append(0)
        if len(calls) == count:
            if name == "save" and owner is torch:
                arguments[1].write(b"half a checkpoint")  # type: ignore[attr-defined]
                arguments[1].flush()  # type: ignore[attr-defined]
            kill_self()
        return plain(*arguments, **named)

    setattr(owner, name, counted)
    stopping(folder).fit(STEPS)


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("in the forward pass of step 1", None),
        ("in the forward pass of step 8", 6),
        ("before the optimizer's step 4", 3),
        ("between the optimizer's step 11 and the average's", 9),
        ("while a checkpoint is written", 3),
        ("before a checkpoint takes its place", 6),
        ("after the last step, before its checkpoint", 12),
    ],
)
def test_a_killed_run_ends_with_the_same_weights(place: str, kept: int | None, tmp_path: Path) -> None:
    assert killed(lambda: kill_in(place, tmp_path)) == signal.SIGKILL
    path = tmp_path / run_module.CHECKPOINT
    assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == kept
    assert same(resumed(tmp_path), uninterrupted())


class Stop(Exception):
    """A stop at a step."""


def stopped(folder: Path, step: int) -> dict[str, object]:
    """Stop a run after a step, and return its last checkpoint."""
    calls: list[int] = []

    class Loss(losses.MaskedNELBO):
        def at(self, model: object, x0: Tensor, u: Tensor) -> Tensor:
            calls.append(0)
            if len(calls) > step + step // 3:  # one call more at each checkpoint, of held-out data
                raise Stop
            return super().at(model, x0, u)  # type: ignore[arg-type]

        def __repr__(self) -> str:
            return "MaskedNELBO()"

    trainer = stopping(folder)
    trainer.loss = Loss()
    with pytest.raises(Stop):
        trainer.fit(STEPS)
    assert not trainer.network.training
    return torch.load(folder / run_module.CHECKPOINT, weights_only=True)


def test_a_run_may_be_stopped_often(tmp_path: Path) -> None:
    for step in (4, 3, 6):  # each from where the last one stopped
        stopped(tmp_path, step)
    assert same(resumed(tmp_path), uninterrupted())


@pytest.mark.parametrize(
    "part", ["network", "average", "optimizer", "schedule", "smooth", "curve", "data", "cpu", "step"]
)
def test_the_check_sees_each_part_of_a_checkpoint(part: str, tmp_path: Path) -> None:
    """With one part of an earlier step, or no random state, the weights or curves are others."""
    earlier, state = stopped(tmp_path / "earlier", 4), stopped(tmp_path, 8)
    path = tmp_path / run_module.CHECKPOINT
    assert (earlier["step"], state["step"]) == (3, 6)
    assert same(resumed(tmp_path), uninterrupted())
    if part in ("data", "cpu"):
        state["random"][part] = earlier["random"][part]  # type: ignore[index]
    else:
        state[part] = earlier[part]
    torch.save(state, path)
    assert not same(resumed(tmp_path), uninterrupted())


def test_a_resume_without_the_random_state_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path, 8)
    monkeypatch.setattr(run_module.Run, "_restore_random", lambda *_: None)
    assert not same(resumed(tmp_path), uninterrupted())


def test_a_finished_run_is_read_and_not_trained_on(tmp_path: Path) -> None:
    stopping(tmp_path).fit(STEPS)
    trainer = stopping(tmp_path)
    trainer.loss = None  # it would fail
    trainer._settings = lambda steps: stopping(None)._settings(steps)  # type: ignore[method-assign]
    trainer.fit(STEPS)
    assert same(weights(trainer), uninterrupted())


def test_training_leaves_the_random_state_alone_and_begins_anew_when_told(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer = stopping(tmp_path)
    torch.set_rng_state(before)
    trainer.fit(STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    anew = stopping(tmp_path)
    anew.fit(STEPS, resume=False)
    assert same(weights(anew), uninterrupted())
    other = stopping(tmp_path, seed=1)
    other.fit(STEPS, resume=False)
    assert not same(weights(other), uninterrupted())


@pytest.mark.usefixtures("as_user")
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    stopping(tmp_path).fit(STEPS)
    for options, steps, message in (
        ({}, 15, "of another run: steps 14, now 15"),
        ({"rate": 2e-3}, STEPS, "rate 0.001, now 0.002"),
        ({"seed": None}, STEPS, "seed 0, now None"),
        ({"ema": 0.9, "clip": 2.0}, STEPS, "clip 1.0, now 2.0; ema 0.998, now 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            stopping(tmp_path, **options).fit(steps)
    other = stopping(tmp_path)
    other._data = trainer_module.batches_of(ROWS.flip(0), None, other.model.process, "data")
    with pytest.raises(ValueError, match="of another run: data "):
        other.fit(STEPS)


@pytest.mark.usefixtures("as_user")
def test_a_file_that_is_no_checkpoint_is_refused_and_no_code_in_it_runs(tmp_path: Path) -> None:
    path = tmp_path / run_module.CHECKPOINT
    for content in (b"", b"text", b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"checkpoint.pt is no checkpoint of Trainer .*; delete it or give another"
        ):
            stopping(tmp_path).fit(STEPS)
    for thing in ({"weights": torch.zeros(1)}, [1, 2], Runs(tmp_path / "made")):
        torch.save(thing, path)
        with pytest.raises(ValueError, match="is no checkpoint of Trainer"):
            stopping(tmp_path).fit(STEPS)
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists(), "the file would have run code"


class Runs:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.path,)
