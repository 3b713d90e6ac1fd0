"""The C sources of this folder as a library: found, or compiled at first use, and looked at before it is loaded.

A file of machine code that is damaged ends the process that calls it, so each has its hash beside it. What does not
fit is compiled again; where that fails too, torch does all, after one warning.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["library"]

_HERE = Path(__file__).parent
_SOURCES = ("keyed.c", "row_pass.c", "row_avx512.c")  # each includes the next
_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fPIC")
_TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library of this machine, or None where it cannot be had."""
    compiler = _compiler()
    if compiler is None or os.name != "posix":
        return None
    kept = _kept()
    for threads in ("-fopenmp", ""):
        path = kept / f"keyed{threads}-{_fingerprint(compiler)}.so"
        found = _load(path) or (_build(compiler, threads, path) and _load(path))
        if found:
            return found
        with tempfile.TemporaryDirectory(prefix="discdiff-") as folder:  # a cache that cannot be written
            path = Path(folder) / path.name
            found = _build(compiler, threads, path) and _load(path)
            if found:
                return found
    warnings.warn("discdiff: the C compiler built no library that works here, so torch draws, slower", stacklevel=2)
    return None


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


def _fingerprint(compiler: list[str]) -> str:
    """A build belongs to these sources, this compiler and this kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kind = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    sources = [(_HERE / name).read_text() for name in _SOURCES]
    text = [*sources, *compiler, str(_FLAGS), str(_TUNING), *os.uname()[3:], *sorted(kind)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


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


def _build(compiler: list[str], threads: str, path: Path) -> bool:
    """Compile to ``path``, whole or not at all, with the first tuning that the compiler knows.

    Linked in a step of its own, without ``-fopenmp``, so that no second OpenMP runtime comes in: two would fight for
    the cores.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            if not any(_compiled(step) for step in _commands(compiler, threads, made)):
                return False
            hashed = _beside(made)
            hashed.write_text(_digest(made))
            made.replace(path)
            hashed.replace(_beside(path))
            return True
    except OSError:
        return False


def _commands(compiler: list[str], threads: str, made: Path) -> Iterator[list[list[str]]]:
    part = str(made.with_suffix(".o"))
    for tuning in _TUNING:
        flags = [*_FLAGS, *tuning, *([threads] if threads else [])]
        yield [
            [*compiler, *flags, "-c", str(_HERE / _SOURCES[0]), "-o", part],
            [*compiler, "-shared", part, "-o", str(made), "-lm"],
        ]


def _compiled(steps: list[list[str]]) -> bool:
    return all(subprocess.run(step, capture_output=True, check=False).returncode == 0 for step in steps)
