"""Every level of processors that this one has: the same numbers, the same tokens; and wheels that carry them."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.kernels import compiled, dispatch, native, reference
from discdiff.kernels.keys import Key
from discdiff.kernels.rows import Rows

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler")
LEVELS = compiled.levels()
FUSED = [level for level in LEVELS if level != "plain" or platform.machine().lower() not in ("x86_64", "amd64")]
ADJUSTED: dict[str, Callable[[Rows], Rows]] = {
    "as it is": lambda rows: rows,
    "hidden": lambda rows: replace(rows, hidden=(0, rows.width // 2)),
    "own": lambda rows: replace(
        rows, own=torch.arange(len(rows)) % rows.width, shift=torch.linspace(-9, 9, len(rows)).float()
    ),
    "tempered": lambda rows: replace(rows, temperature=0.7, floor=torch.full((len(rows),), -1.5)),
    "strided": lambda rows: replace(rows, source=rows.source.repeat_interleave(2, -1)[..., ::2]),
    "summed": lambda rows: rows.plus(1.5, [(-0.7, Rows.of(rows.source[:, 0].roll(7, 0)))]),
}


def forget() -> None:
    compiled.library.cache_clear()
    native._call.cache_clear()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Chooses a level; afterwards all is as before."""

    def choose(level: str) -> None:
        monkeypatch.setenv("DISCDIFF_CPU", level)
        forget()
        assert native.available(), level

    yield choose
    forget()


def logits(width: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(width)).mul(3)
    x[0], x[1, 0], x[2, width // 2], x[3, width - 1], x[4, ::2] = -torch.inf, torch.nan, torch.inf, -torch.inf, -300
    return x.to(dtype)


def numbers(x: Tensor) -> list[Tensor]:
    """Statistics with and without the tilt, two largest and races, of rows adjusted in every way."""
    ids, found = torch.arange(len(x)), []
    for adjusted in ADJUSTED.values():
        rows = adjusted(Rows.of(x))
        group = torch.zeros(len(x), dtype=torch.int64)
        race = native.race(rows, Key(7, ids, 2, name=5), ids * 3, None, 0)
        assert race is not None
        parts = (native.statistics(rows), native.statistics(rows, tilt=False), native.largest(rows, group))
        found += [part for several in parts if several for part in several if part is not None] + [race.key, race.token]
    return found


def equal(mine: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(777.0), b.nan_to_num(777.0)) for a, b in zip(mine, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_the_same_at_every_level(dtype: torch.dtype, at: Callable[[str], None]) -> None:
    """Bit for bit where products and sums are fused; plain x86-64 rounds twice, so there to 1e-6."""
    for width in (1, 31, 33, 50, 63, 64, 65, 100, 129, 1000, 1024, 1025, 1105, 3000):
        x = logits(width, dtype)
        found = {}
        for level in LEVELS:
            at(level)
            found[level] = numbers(x)
        best, *others = FUSED or LEVELS
        for level in others:
            assert equal(found[level], found[best]), (level, width)
        for mine, right in zip(found[LEVELS[-1]], found[best], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6, equal_nan=True)
        ordinary = [n for n in range(len(x)) if n not in (1, 2)]  # a NaN and +inf
        for mine, right in zip(found[best][:3], reference.statistics(x.float()), strict=True):
            torch.testing.assert_close(mine[ordinary], right[ordinary], rtol=2e-5, atol=2e-4)


def samplers() -> Iterator[dd.Sampler]:
    """Steps that draw, reveal in order, redraw and read, on rows that are wider than a few columns."""
    vocab, length = 70, 6
    for process, operators in (
        (dd.Masked(vocab, dd.Linear()), [S.Ancestral(), S.Unmask("entropy"), S.Ancestral() >> S.Gibbs(sites=2)]),
        (dd.Uniform(vocab, dd.Linear()), [S.Ancestral(), S.SplitLeap(), S.Ancestral() >> S.Gibbs(sites=2)]),
        (dd.Hybrid(vocab, dd.LogLinear(), p_uniform=0.3), [S.Ancestral(), S.Euler()]),
    ):
        for operator, dtype in zip(operators, (torch.float32, torch.bfloat16, torch.float16), strict=False):
            table = torch.randn(process.states, length, vocab, generator=torch.Generator().manual_seed(0)).mul(2)
            table = table.to(dtype)
            model = dd.Denoiser(
                lambda x, t, table=table: table[x.roll(1, 1), torch.arange(x.shape[1])], process, "loo", time=None
            )
            yield dd.Sampler(process, model, operator, steps=3)


def test_tokens_are_the_same_at_every_level(at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for sampler in samplers():
        with monkeypatch.context() as torch_alone:
            torch_alone.setattr(native, "available", lambda: False)
            right = sampler.sample(32, 6, seed=5).tokens
        for level in LEVELS:
            at(level)
            assert torch.equal(sampler.sample(32, 6, seed=5).tokens, right), (level, sampler)


def test_coins_are_the_same_at_every_level(at: Callable[[str], None]) -> None:
    p = torch.rand(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    key = Key(2**64 - 1, torch.arange(7) * 2**29, 3, name=900)
    u, _ = reference.uniforms(key[:, None], torch.arange(11))
    for level in LEVELS:
        at(level)
        assert torch.equal(dispatch.flips(p, key)[0], u < p)


def test_a_level_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ", ".join(map(repr, LEVELS))
    for asked in ("sse9", "neon" if "plain" in LEVELS else "avx2"):
        monkeypatch.setenv("DISCDIFF_CPU", asked)
        forget()
        with pytest.raises(ValueError, match=f"^DISCDIFF_CPU: this processor runs {here}, got '{asked}'$"):
            dispatch.draw(torch.zeros(1, 2), seed=0, rows=torch.zeros(1).long(), positions=torch.zeros(1).long())
    monkeypatch.delenv("DISCDIFF_CPU")
    forget()


@pytest.mark.parametrize("told", ["AVX512", "AVX2", "NO AVX", "DEFAULT", "AVX999"])
def test_a_processor_is_never_given_more_than_it_has(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISCDIFF_CPU", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: told)
    for machine, levels in (
        ("x86_64", {"AVX512": ("avx512", "avx2", "plain"), "AVX2": ("avx2", "plain")}.get(told, ("plain",))),
        ("arm64", ("neon",)),
        ("riscv64", ("plain",)),
    ):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert compiled.levels() == levels


# --- carried --------------------------------------------------------------------------------------------------------


def test_what_lies_beside_the_sources_is_loaded_only_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: Callable[[str], None]
) -> None:
    """Compiled files of other sources are passed over; and a changed constant is seen in the numbers."""
    x = logits(100, torch.float32)
    at(LEVELS[0])
    right = numbers(x)
    here = tmp_path / "kernels"
    here.mkdir()
    for name in compiled._SOURCES:
        shutil.copy(compiled._HERE / name, here)
    monkeypatch.setattr(compiled, "_HERE", here)
    monkeypatch.setattr(compiled, "_family", lambda: LEVELS[:1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.build(here)
    assert len(list(here.glob("*.so"))) == len(list(here.glob("*.sha256"))) == 1
    with monkeypatch.context() as bare:
        bare.setattr(compiled, "compiler", lambda: None)
        monkeypatch.setattr(compiled, "levels", lambda: LEVELS[:1])
        at(LEVELS[0])
        assert equal(numbers(x), right)
        source = here / "row_pass.c"
        source.write_text(source.read_text().replace("0x1.62e42ap-1f", "0x1.62e52ap-1f"))
        forget()
        with pytest.warns(UserWarning, match="this wheel carries no library that works here, so torch draws"):
            assert compiled.library() is None
    assert not (tmp_path / "cache").exists()
    at(LEVELS[0])
    assert (tmp_path / "cache").exists()
    assert not equal(numbers(x), right)


DRAWS = """
import os, torch
from discdiff import kernels
from discdiff.kernels import compiled, native
ids = torch.arange(64)
for level in compiled.levels():
    os.environ["DISCDIFF_CPU"] = level
    compiled.library.cache_clear(), native._call.cache_clear()
    x = torch.arange(64 * 999.0).view(64, 999).sin()
    print(kernels.draw(x, seed=1, rows=ids, positions=ids, backend="native").tolist())
    del os.environ["DISCDIFF_CPU"]
"""


def test_a_wheel_carries_what_needs_no_compiler(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    environment = os.environ | {"DISCDIFF_COMPILE": "1"}
    done = subprocess.run(build, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        held.extractall(site)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    carried = sorted((site / "discdiff" / "kernels").glob("*.so"))
    assert len(carried) == len(compiled._family())

    bare = {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    bare |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", DRAWS], capture_output=True, text=True, check=False, cwd=tmp_path, env=bare
        )

    x, ids = torch.arange(64 * 999.0).view(64, 999).sin(), torch.arange(64)
    right = dispatch.draw(x, seed=1, rows=ids, positions=ids, backend="torch").tolist()
    drawn = run()
    assert drawn.stdout.splitlines() == [str(right)] * len(LEVELS), drawn.stderr
    assert not (tmp_path / "cache").exists()
    for file in carried:  # without them there is nothing, and damaged ones are not run
        file.write_bytes(file.read_bytes()[:3000])
    drawn = run()
    assert drawn.stdout == ""
    assert "this wheel carries no library that works here" in drawn.stderr
    assert "RuntimeError: the native backend found no" in drawn.stderr
