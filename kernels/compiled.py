"""The C sources of this folder as a library: carried by a wheel or compiled at first use, checked before it is loaded.

One file for each level of processors, so that a file serves all of its level, and the best that this one has is loaded.
A file of machine code that is damaged ends the process that calls it, so each has its hash beside it, and the hash of
its sources in its name. What does not fit is compiled again; where that fails too, torch does all, after one warning.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

__all__ = ["build", "levels", "library"]

_HERE = Path(__file__).parent
_SOURCES = ("keyed.c", "row_pass.c", "row_wide.c")  # each includes the next
# products and sums are fused where the sources say so, so that levels do not differ by what a compiler sees fit
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fPIC")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_TUNING = {
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "avx2": _AVX2,
    "neon": (),  # every 64-bit ARM has it
    "plain": (),
}
_THREADS = ("-fopenmp", "")


def _family() -> tuple[str, ...]:
    """The levels that processors of this architecture may have, best first."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "avx512", "avx2", "plain"
    return ("neon",) if machine in ("aarch64", "arm64") else ("plain",)


def levels() -> tuple[str, ...]:
    """The levels that this processor has, best first; the environment variable DISCDIFF_CPU leaves one of them.

    Raises:
        ValueError: if DISCDIFF_CPU names a level that this processor has not.
    """
    found = _family()
    if found[0] == "avx512":
        import torch  # here, so that a wheel can be built without it

        told = torch.backends.cpu.get_cpu_capability()  # as torch chooses its own kernels
        found = found[0 if told.startswith("AVX512") else 1 if told == "AVX2" else 2 :]
    asked = os.environ.get("DISCDIFF_CPU")
    if asked and asked not in found:
        raise ValueError(f"DISCDIFF_CPU: this processor runs {', '.join(map(repr, found))}, got {asked!r}")
    return (asked,) if asked else found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library of this machine, or None where it cannot be had."""
    if os.name != "posix":
        return None
    compiler = _compiler()
    for level in levels():
        for threads in _THREADS:
            found = _load(_HERE / _name(level, threads))
            if compiler and not found:
                found = _built(compiler, level, threads)
            if found:
                return found
    if compiler or any(_HERE.glob("keyed-*.so")):
        whose = "the C compiler built" if compiler else "this wheel carries"
        warnings.warn(f"discdiff: {whose} no library that works here, so torch draws, slower", stacklevel=2)
    return None


def build(folder: Path) -> None:
    """Compile every level of this architecture into a folder, for a wheel to carry.

    Raises:
        RuntimeError: if there is no C compiler, or it fails.
    """
    compiler = _compiler()
    for file in folder.glob("keyed-*"):  # of a build of other sources
        file.unlink()
    for level in _family():
        if not compiler or not any(_build(compiler, level, x, folder / _name(level, x)) for x in _THREADS):
            raise RuntimeError(
                f"compiled: {level} code needs a C compiler that builds it; CC names one, got {compiler}"
            )


def _built(compiler: list[str], level: str, threads: str) -> ctypes.CDLL | None:
    """From the user's cache, compiled if need be."""
    path = _kept() / _name(level, threads, compiler)
    found = _load(path) or (_build(compiler, level, threads, path) and _load(path))
    if found:
        return found
    with tempfile.TemporaryDirectory(prefix="discdiff-") as folder:  # a cache that cannot be written
        path = Path(folder) / path.name
        return _load(path) if _build(compiler, level, threads, path) else None


def _compiler() -> list[str] | None:
    """The command of the C compiler; CC may have arguments, as in make."""
    asked = shlex.split(os.environ.get("CC", "cc"))
    for words in (asked, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return None


def _kept() -> Path:
    """The user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "discdiff"


def _name(level: str, threads: str, compiler: list[str] | None = None) -> str:
    """A build belongs to these sources, flags and kind of machine; one in the cache to its compiler too."""
    about = [*_FLAGS, *_TUNING[level], platform.system(), platform.machine(), *(compiler or [])]
    text = b"\n".join([*((_HERE / name).read_bytes() for name in _SOURCES), *(word.encode() for word in about)])
    return f"keyed-{level}{threads}-{hashlib.sha256(text).hexdigest()[:16]}.so"


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, if the file is the one that was built."""
    try:
        if _digest(path) != _beside(path).read_text().strip():
            return None
        # its calls of OpenMP find the runtime that torch has loaded, or nothing
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        return None


def _beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build(compiler: list[str], level: str, threads: str, path: Path) -> bool:
    """Compile to ``path``, whole or not at all.

    Linked in a step of its own, without ``-fopenmp``, so that no second OpenMP runtime comes in: two would fight for
    the cores.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            flags, part = [*_FLAGS, *_TUNING[level], *([threads] if threads else [])], str(made.with_suffix(".o"))
            for step in (
                [*compiler, *flags, "-c", str(_HERE / _SOURCES[0]), "-o", part],
                [*compiler, "-shared", part, "-o", str(made), "-lm"],
            ):
                if subprocess.run(step, capture_output=True, check=False).returncode:
                    return False
            hashed = _beside(made)
            hashed.write_text(_digest(made))
            made.replace(path)
            hashed.replace(_beside(path))
            return True
    except OSError:
        return False
