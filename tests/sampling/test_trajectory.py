"""Trajectories: small where they are kept, int64 where they are read, and no second copy."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.command.bench import Meter
from discdiff.operator import State
from discdiff.sampling import narrowest


def sampler(vocab: int = 3, steps: int = 5) -> dd.Sampler:
    process = dd.Uniform(vocab, dd.Linear())
    model = dd.Denoiser(lambda x, t: torch.zeros(1, 1, 1).expand(*x.shape, vocab), process, "loo")
    return dd.Sampler(process, model, S.Ancestral(), steps=steps)


def kept(out: dd.Samples) -> Tensor:
    found = vars(out)["trajectory"]
    assert isinstance(found, Tensor)
    return found


def watched(monkeypatch: pytest.MonkeyPatch, beyond: int = 0) -> list[Tensor]:
    """The states of all steps, as they come; the last one moved by ``beyond``."""
    seen: list[Tensor] = []
    through = dd.Sampler.through

    def watch(self: dd.Sampler, state: State, run: object) -> Iterator[State]:
        seen.append(state.tokens.clone())
        for after in through(self, state, run):  # type: ignore[arg-type]
            seen.append(after.tokens + beyond)
            yield replace(after, tokens=after.tokens + beyond)

    monkeypatch.setattr(dd.Sampler, "through", watch)
    return seen


@pytest.mark.parametrize(
    ("vocab", "kind"),
    [(3, torch.uint8), (256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_every_state_is_kept_in_the_smallest_dtype(
    vocab: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    out = sampler(vocab).sample(4, 64, seed=0, record=True)
    assert kept(out).dtype == kind
    assert out.trajectory is not None
    assert out.trajectory.dtype == torch.int64
    assert torch.equal(out.trajectory, torch.stack(seen))
    assert out.trajectory is out.trajectory
    assert sampler(vocab).sample(4, 64, seed=0).trajectory is None


def test_the_smallest_dtype() -> None:
    limits = [(0, 255), (0, 256), (-1, 3), (0, 2**15), (-(2**15) - 1, 0), (0, 2**31)]
    found = [narrowest(*each) for each in limits]
    assert found == [torch.uint8, torch.int16, torch.int16, torch.int32, torch.int32, torch.int64]


def test_what_a_small_dtype_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, beyond=256)
    with pytest.raises(ValueError, match=r"Ancestral\(\) made states outside \[0, 3\)"):
        sampler().sample(4, 6, seed=0, record=True)


def test_reading_changes_nothing_but_the_dtype(tmp_path: Path) -> None:
    one, read = (sampler().sample(4, 6, seed=0, record=True) for _ in range(2))
    whole = read.trajectory
    assert whole is not None
    assert one == read
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert kept(again).dtype == torch.uint8
        assert again == one
    assert replace(one, seed=1).trajectory is not None
    for number, out in enumerate((sampler().sample(4, 6, seed=0, record=True), read)):
        path = tmp_path / f"{number}.safetensors"
        out.save(path)
        assert load_file(path)["trajectory"].dtype == torch.uint8
        again = dd.Samples.load(path)
        assert kept(again).dtype == torch.uint8
        assert again == one
        assert torch.equal(again.trajectory, whole)  # type: ignore[arg-type]
    whole[2, 1, 3] = 300  # an edit of what was read lasts, and files hold it
    assert read != one
    read.save(path)
    assert int(dd.Samples.load(path).trajectory[2, 1, 3]) == 300  # type: ignore[index]


def test_files_of_before_are_read(tmp_path: Path) -> None:
    out, path = sampler().sample(4, 6, seed=0, record=True), tmp_path / "old.safetensors"
    assert out.log_prob is not None
    for kind, fits in ((torch.int64, True), (torch.int32, True), (torch.float32, False), (torch.bool, False)):
        tensors = {"tokens": out.tokens, "nfe_rows": out.nfe_rows, "log_prob": out.log_prob}
        tensors["trajectory"] = kept(out).to(kind)
        numbers = f'{{"nfe": {out.nfe}, "seed": 0, "queries": {out.queries}}}'
        save_file(tensors, path, {"discdiff": "Samples", "numbers": numbers})
        if fits:
            assert dd.Samples.load(path) == replace(out, calls={})  # they did not count by name
        else:
            with pytest.raises(ValueError, match="trajectory does not go"):
                dd.Samples.load(path)


def test_there_is_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 steps more are 48 bytes a site more at the peak; they are short, so that the longest step is the same."""

    def peak(more: int) -> int:
        short = [(1 - n / (more + 1)) / 16 for n in range(1, more + 2)]
        with Meter() as meter:
            sampler().on_grid([1 - n / 16 for n in range(16)] + short).sample(4, 1024, seed=0, record=True)
        return meter.peak

    more = 48 * 4 * 1024
    assert abs(peak(48) - peak(0) - more) < more / 50
    monkeypatch.setattr("discdiff.sampling.sampler.narrowest", lambda low, high: torch.int64)
    assert peak(48) - peak(0) > 7 * more
