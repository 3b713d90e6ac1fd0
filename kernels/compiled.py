"""Load the C sources of this folder as a library, which a wheel contains or the C compiler makes at first use.

There is one library file for each processor level, such as "avx2"; the best level of this processor is loaded. Calling
a damaged file of machine code would end the process. So each file has its hash beside it and the hash of its sources in
its name. A file that does not match is compiled again. If compiling fails, torch does all the work, after one warning.
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

__all__ = ["build", "cache", "compiler", "levels", "library"]

_HERE = Path(__file__).parent
_SOURCES = ("keyed.c", "mixture.c", "row_pass.c", "row_wide.c")  # the first includes the others
# products and sums are fused only where the sources do so, so that all levels give the same numbers
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
    """Return the processor levels of this architecture, best first."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "avx512", "avx2", "plain"
    return ("neon",) if machine in ("aarch64", "arm64") else ("plain",)


def levels() -> tuple[str, ...]:
    """Return the levels that this processor supports, best first; the variable DISCDIFF_CPU selects one of them.

    Raises:
        ValueError: if DISCDIFF_CPU names a level that this processor does not support.
    """
    found = _family()
    if found[0] == "avx512":
        import torch  # imported here, so that a wheel can be built without it

        told = torch.backends.cpu.get_cpu_capability()  # by which torch chooses its own kernels
        found = found[0 if told.startswith("AVX512") else 1 if told == "AVX2" else 2 :]
    asked = os.environ.get("DISCDIFF_CPU")
    if asked and asked not in found:
        raise ValueError(f"DISCDIFF_CPU: this processor runs {', '.join(map(repr, found))}, got {asked!r}")
    return (asked,) if asked else found


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library for this machine, or None if there is none."""
    if os.name != "posix":
        return None
    command = compiler()
    for level in levels():
        for threads in _THREADS:
            found = _load(_HERE / _name(level, threads))
            if command and not found:
                found = _built(command, level, threads)
            if found:
                return found
    if command or any(_HERE.glob("keyed-*.so")):
        whose = "the C compiler built" if command else "this wheel carries"
        warnings.warn(f"discdiff: {whose} no library that works here, so torch draws, slower", stacklevel=2)
    return None


def build(folder: Path) -> None:
    """Compile every level of this architecture into a folder of a wheel.

    Raises:
        RuntimeError: if there is no C compiler, or it fails.
    """
    command = compiler()
    for file in folder.glob("keyed-*"):  # files of earlier sources
        file.unlink()
    for level in _family():
        if not command or not any(_build(command, level, x, folder / _name(level, x)) for x in _THREADS):
            raise RuntimeError(f"compiled: {level} code needs a C compiler that builds it; CC names one, got {command}")


def _built(compiler: list[str], level: str, threads: str) -> ctypes.CDLL | None:
    """Load the library from the user's cache, and compile it first if needed."""
    path = cache() / _name(level, threads, compiler)
    found = _load(path) or (_build(compiler, level, threads, path) and _load(path))
    if found:
        return found
    with tempfile.TemporaryDirectory(prefix="discdiff-") as folder:  # for a cache that cannot be written
        path = Path(folder) / path.name
        return _load(path) if _build(compiler, level, threads, path) else None


def compiler() -> list[str] | None:
    """Return the command of the C compiler, None without one; the variable CC may contain arguments, as in make."""
    asked = shlex.split(os.environ.get("CC", "cc"))
    for words in (asked, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return None


def cache() -> Path:
    """Return the folder of this library in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "discdiff"


def _name(level: str, threads: str, compiler: list[str] | None = None) -> str:
    """Return a file name that identifies sources, flags and machine type, and in the cache also the compiler."""
    about = [*_FLAGS, *_TUNING[level], platform.system(), platform.machine(), *(compiler or [])]
    text = b"\n".join([*((_HERE / name).read_bytes() for name in _SOURCES), *(word.encode() for word in about)])
    return f"keyed-{level}{threads}-{hashlib.sha256(text).hexdigest()[:16]}.so"


def _load(path: Path) -> ctypes.CDLL | None:
    """Load a library file if it has the hash that is stored beside it; else return None."""
    try:
        if _digest(path) != _beside(path).read_text().strip():
            return None
        # its OpenMP calls resolve to the runtime that torch has loaded, or fail to resolve
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        return None


def _beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build(compiler: list[str], level: str, threads: str, path: Path) -> bool:
    """Compile to ``path`` and return whether it succeeded; no partial file is left there.

    Linking is a separate step without ``-fopenmp``, so that no second OpenMP runtime is loaded: two would compete for
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
