"""The compiled code of the CPU: the tokens of torch, on one thread or two; its file is verified before it is loaded."""

import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operators import STEPS
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.kernels import chunked, compiled, dispatch, native, reference
from discdiff.kernels.keys import Key
from discdiff.kernels.rows import Rows

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler")
V, L, B = 5, 9, 16

PROCESSES: dict[str, dd.Process] = {
    "Masked": dd.Masked(V, dd.Linear()),
    "Masked inside": dd.Masked(V, dd.Cosine(), mask_id=2),
    "Uniform": dd.Uniform(V, dd.Linear()),
    "Marginal": dd.Marginal(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64), dd.Linear()),
    "Hybrid": dd.Hybrid(V, dd.LogLinear(), p_uniform=0.3),
    # Its noise changes with time.
    "Hybrid function": dd.Hybrid(V, dd.Linear(), p_uniform=lambda alpha: 0.2 + 0.3 * alpha),
    "AbsorbingUniform": dd.AbsorbingUniform(V, dd.Linear()),  # an anchor at every site
}


def model_of(process: dd.Process, predicts: str, dtype: torch.dtype) -> dd.Denoiser:
    """Logits of a site from its left neighbour and its place; any number of rows."""
    table = torch.randn(process.states, L, V, generator=torch.Generator().manual_seed(0)).mul(2).to(dtype)
    return dd.Denoiser(lambda x, t: table[x.roll(1, 1), torch.arange(x.shape[1])], process, predicts, time=None)


def drawn(sampler: dd.Sampler) -> tuple[Tensor, int]:
    out = sampler.sample(B, L, seed=3)
    return out.tokens, out.nfe


def samplers(process: dd.Process, turn: int) -> Iterator[dd.Sampler]:
    """Every shipped operator that runs on this process, predictions and dtypes by turns."""
    kinds = itertools.product(("loo", "denoiser"), (torch.float32, torch.bfloat16))
    for operator, (predicts, dtype) in zip(STEPS, itertools.islice(itertools.cycle(kinds), turn, None), strict=False):
        try:
            operator.check(process)
            sampler = dd.Sampler(process, model_of(process, predicts, dtype), operator, steps=3)
            sampler.sample(1, 2, seed=0)
        except (TypeError, ValueError):  # not for this process or prediction
            continue
        yield sampler


@pytest.mark.parametrize(
    "process", [pytest.param(n, marks=() if n in ("Masked", "Hybrid") else pytest.mark.slow) for n in PROCESSES]
)
def test_tokens_and_calls_are_those_of_torch(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    for sampler in samplers(PROCESSES[process], list(PROCESSES).index(process)):
        fused = drawn(sampler)
        with monkeypatch.context() as one:
            one.setattr(native, "available", lambda: False)
            plain = drawn(sampler)
        assert torch.equal(fused[0], plain[0]), sampler
        assert fused[1] == plain[1], sampler
        count += 1
    assert count > 15


@pytest.mark.parametrize("process", ["Masked", "Uniform"])
def test_tokens_do_not_depend_on_the_number_of_threads(process: str) -> None:
    threads, count = torch.get_num_threads(), 0
    try:
        for sampler in samplers(PROCESSES[process], 0):
            made = []
            for used in (1, 2):
                torch.set_num_threads(used)
                made.append(sampler.sample(60, L, seed=3).tokens)  # 540 sites: enough to be shared among threads
            assert torch.equal(*made), sampler
            count += 1
    finally:
        torch.set_num_threads(threads)
    assert count > 15


@pytest.mark.slow
@pytest.mark.parametrize("process", ["Masked", "Masked inside", "Uniform"])
def test_tokens_are_those_of_tritons_interpreter(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shipped operator with all that it reads, draws and steps made by the kernels of a GPU."""
    pytest.importorskip("triton")
    count = 0
    for sampler in samplers(PROCESSES[process], 0):
        expected = sampler.sample(2, 3, seed=3).tokens
        with monkeypatch.context() as one:
            one.setattr(dispatch, "_backend", lambda source, backend: "triton")
            one.setattr(dispatch, "steps_whole", lambda device: True)
            assert torch.equal(sampler.sample(2, 3, seed=3).tokens, expected), sampler
        count += 1
    assert count > 15


def test_a_step_that_is_off_by_one_choice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    process = PROCESSES["Uniform"]
    sampler = dd.Sampler(process, model_of(process, "loo", torch.float32), S.Ancestral(), steps=4)
    right = drawn(sampler)[0]
    step = native.step

    def shifted(rows: Rows, what: dispatch.Step) -> tuple[Tensor, Tensor]:
        what.keys["accept"], what.keys["data"] = what.keys["data"], what.keys["accept"]
        return step(rows, what)

    monkeypatch.setattr(native, "step", shifted)
    assert not torch.equal(drawn(sampler)[0], right)


@pytest.mark.parametrize("width", [1, 5, 33, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_those_of_torch_for_any_number_of_threads(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(width)).mul(3).to(dtype)
    x[0], x[1, 0], x[2, width // 2] = -torch.inf, torch.nan, torch.inf
    ids = torch.arange(300)
    key = Key(2**64 - 1, ids, 3, name=7)
    race = [reference.race(x.float(), key, ids * 5)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for reading in (None, dispatch.read(x, backend="native")):
                race.append(chunked.race(Rows.of(x), key, ids * 5, reading, 0, native))
                token = native.draw(Rows.of(x), key, ids * 5, reading)
                race.append(reference.Race(race[0].key, token))
    finally:
        torch.set_num_threads(threads)
    for other in race[1:]:
        assert torch.equal(other.token, race[0].token)
        torch.testing.assert_close(other.key, race[0].key, rtol=0, atol=1e-5, equal_nan=True)
    assert race[0].token[:3].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("width", [3, 1024, 2500])
def test_draws_from_rows_in_float64_are_those_of_torch(width: int) -> None:
    x = torch.randn(50, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width)) * 3
    x[0], x[1, 0], x[2, width // 2] = -torch.inf, torch.nan, torch.inf
    ids = torch.arange(50)
    key = Key(5, ids, 3, name=900)
    mine, right = (chunked.race(Rows.of(x), key, ids * 7, None, 0, by) for by in (native, None))
    assert torch.equal(mine.token, right.token)
    torch.testing.assert_close(mine.key, right.key, rtol=1e-14, atol=0, equal_nan=True)
    other = chunked.race(Rows.of(x), replace(key, name=901), ids * 7, None, 0, native)
    assert not torch.equal(other.token, right.token)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 250, 1024])
def test_the_two_largest_are_those_of_torch(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-3, 4, (90, width), generator=generator).float()  # ties
    x[:20], x[20:40, ::2] = -torch.inf, -torch.inf
    x[40:60] = torch.randn(20, width, generator=generator)
    found = native.largest(Rows.of(x), torch.zeros(90, dtype=torch.int64))
    assert found is not None
    for mine, right in zip(found, reference.two_largest(x), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("width", [1, 5, 64, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_column_is_that_of_torch(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-3, 4, (60, width), generator=generator).to(dtype)  # ties, across groups too
    x[20:] = torch.randn(40, width, generator=generator).to(dtype)
    right = x.float().argmax(-1)
    x[0], x[1, width - 1], x[2, width // 2], x[3, : width - 1] = -torch.inf, torch.nan, torch.inf, -torch.inf
    right[:3], right[3] = -1, width - 1
    for backend in ("native", "torch"):
        assert torch.equal(dispatch.best(x, backend=backend), right), backend
    assert torch.equal(dispatch.best(x[4:].double()), right[4:])


def test_coins_are_those_of_torch() -> None:
    p = torch.rand(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, places = torch.tensor([0, 5, 2**32 - 1, 3, 8, 13, 21]), torch.arange(11)
    key = Key(11, ids, 3, name=900)
    u, v = reference.uniforms(key[:, None], places)
    public = dispatch.uniforms(rows=ids[:, None], positions=places, seed=11, step=3, tag=900)
    for pair in (dispatch.coins(key, 11), public):
        assert torch.equal(pair[0], u)
        assert torch.equal(pair[1], v)
    heads, wrong = dispatch.flips(p, key)
    assert torch.equal(heads, u < p)
    assert wrong is None
    p[2, 3], p[4, 5] = torch.nan, 1.5
    _, wrong = dispatch.flips(p, key)
    assert wrong is not None
    assert wrong.nonzero().tolist() == [[2, 3], [4, 5]]


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a library that has not been looked for yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "discdiff"
    compiled.library.cache_clear()


def found() -> object:
    compiled.library.cache_clear()
    return compiled.library()


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:3000], lambda b: b"", lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:]],
    ids=["cut", "empty", "flipped"],
)
def test_a_damaged_file_is_built_again(cache: Path, spoil: object) -> None:
    assert found() is not None
    (file,) = cache.glob("*.so")
    whole = file.read_bytes()
    file.unlink()  # the one that is loaded stays as it is
    file.write_bytes(spoil(whole))  # type: ignore[operator]
    assert compiled._load(file) is None
    assert found() is not None
    assert compiled._load(file) is not None
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_hash_that_is_lost_is_a_file_that_is_not_trusted(cache: Path) -> None:
    assert found() is not None
    (file,) = cache.glob("*.sha256")
    file.unlink()
    assert found() is not None
    assert file.exists()


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in its place")
    assert found() is not None


def test_a_compiler_with_arguments_and_one_that_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -pipe")
    assert found() is not None
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="built no library that works here, so torch draws"):
        assert found() is None
