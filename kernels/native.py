"""Reading and drawing compiled from ``row_pass.c`` at their first use, where there is a C compiler; else torch does it.

A pass in torch writes each chunk's exponentials and reads them again, about five reads of the tensor where memory
allows one. The compiled pass keeps to about one. It is 150 lines of C without dependencies, compiled in a quarter of a
second and kept in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from discdiff.kernels.reference import GROUP_SIZE, Race, Reading, contest, group_size
from discdiff.kernels.rows import Rows

__all__ = ["available", "largest", "race", "statistics"]

_SOURCE = Path(__file__).with_name("row_pass.c")
_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fPIC"]
_TUNING = [["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], []]


def available() -> bool:
    """Whether the compiled pass can be had on this machine."""
    return _library() is not None


def statistics(rows: Rows) -> tuple[Tensor, Tensor, Tensor] | None:
    """``reference.statistics`` of plain float32 rows where they lie; None for others."""
    if not _readable(rows):
        return None
    size = group_size(rows.width)
    shape = (len(rows), -(-rows.width // size))
    peak, mass, tilt = (torch.empty(shape, dtype=torch.float32) for _ in range(3))
    _run("row_pass", rows, size, peak, mass, tilt)
    return peak, mass, tilt


def largest(rows: Rows, group: Tensor) -> tuple[Tensor, Tensor] | None:
    """``reference.two_largest`` of one group of each of plain float32 rows; None for others."""
    if not _readable(rows):
        return None
    column, second = torch.empty_like(group), torch.empty(group.shape, dtype=torch.float32)
    size = group_size(rows.width)
    _run("row_largest", rows, size, group, column, second)
    return column, second


def race(
    rows: Rows, reading: Reading, seed: int, ids: Tensor, positions: Tensor, step: int, tag: int, first_group: int
) -> Race | None:
    """``reference.race`` of plain float32 rows that have been read; None for others."""
    if not _readable(rows):
        return None
    size = group_size(rows.width)
    key, group, share = contest(reading.group_lse, seed, ids, positions, step, tag, first_group)
    column = torch.empty_like(group)
    _run("row_column", rows, size, group, share, column)
    return Race(key, torch.where(key > -torch.inf, first_group * GROUP_SIZE + group * size + column, -1))


def _readable(rows: Rows) -> bool:
    source = rows.source
    if _library() is None:
        raise RuntimeError("the native backend found no C compiler on this machine; use backend='torch'")
    return rows.plain and source.dtype == torch.float32 and source.device.type == "cpu" and source.stride(2) == 1


def _run(name: str, rows: Rows, size: int, *tensors: Tensor) -> None:
    """Call a function of the library; it shares the rows among torch's threads."""
    source = rows.source
    offset = rows.row * source.stride(0) + rows.position * source.stride(1)
    getattr(_library(), name)(
        source.data_ptr(), offset.data_ptr(), len(rows), torch.get_num_threads(), rows.width, size,
        *(tensor.data_ptr() for tensor in tensors),
    )  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        return None
    for threads in ("-fopenmp", ""):
        for folder in _folders():
            path = folder / f"row_pass{threads}-{_fingerprint(compiler)}.so"
            library = _load(path) if path.exists() or _build(compiler, threads, path) else None
            if library is not None:
                return library
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    try:  # its calls of OpenMP find the runtime that torch has loaded, or nothing
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        return None
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    for function in (library.row_pass, library.row_column, library.row_largest):
        function.argtypes = [pointer, pointer, long, ctypes.c_int, long, long, pointer, pointer, pointer]
        function.restype = None
    return library


def _folders() -> Iterator[Path]:
    """Where a build may be kept: the user's cache, or a folder of this process alone."""
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "discdiff"
    yield Path(tempfile.mkdtemp(prefix="discdiff-"))


def _fingerprint(compiler: str) -> str:
    """A build belongs to this source, this compiler and this kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kind = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    text = [_SOURCE.read_text(), compiler, str(_FLAGS), str(_TUNING), *os.uname()[3:], *sorted(kind)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _build(compiler: str, threads: str, path: Path) -> bool:
    """Compile to ``path``, whole or not at all, with the first tuning that the compiler knows.

    Linked in a step of its own, without ``-fopenmp``, so that no second OpenMP runtime comes in: two would fight for
    the cores.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part, made = str(Path(folder) / "row_pass.o"), Path(folder) / path.name
            for tuning in _TUNING:
                flags = [*_FLAGS, *tuning, *([threads] if threads else [])]
                steps = [compiler, *flags, "-c", str(_SOURCE), "-o", part], [compiler, "-shared", part, "-o", str(made)]
                if all(subprocess.run(step, capture_output=True, check=False).returncode == 0 for step in steps):
                    made.replace(path)
                    return True
    except OSError:
        return False
    return False
