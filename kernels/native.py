"""Reading and drawing compiled from ``row_pass.c`` at their first use, where there is a C compiler; else torch does it.

A pass in torch writes each chunk's exponentials and reads them again, about five reads of the tensor where memory
allows one. The compiled pass keeps to about one. It is 120 lines of C without dependencies, compiled in a quarter of a
second and kept in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from discdiff.kernels.reference import GROUP_SIZE, Race, Reading, contest, group_size
from discdiff.kernels.rows import Rows

__all__ = ["available", "race", "statistics"]

_SOURCE = Path(__file__).with_name("row_pass.c")
_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-shared", "-fPIC"]
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
    _run("row_pass", rows, rows.width, size, peak, mass, tilt)
    return peak, mass, tilt


def race(
    rows: Rows, reading: Reading, seed: int, ids: Tensor, positions: Tensor, step: int, tag: int, first_group: int
) -> Race | None:
    """``reference.race`` of plain float32 rows that have been read; None for others."""
    if not _readable(rows):
        return None
    size = group_size(rows.width)
    key, group, share = contest(reading.group_lse, seed, ids, positions, step, tag, first_group)
    column = torch.empty_like(group)
    _run("row_column", rows, size, size, group, share, column)
    return Race(key, torch.where(key > -torch.inf, first_group * GROUP_SIZE + group * size + column, -1))


def _readable(rows: Rows) -> bool:
    source = rows.source
    if _library() is None:
        raise RuntimeError("the native backend found no C compiler on this machine; use backend='torch'")
    return rows.plain and source.dtype == torch.float32 and source.device.type == "cpu" and source.stride(2) == 1


def _run(name: str, rows: Rows, work: int, size: int, *tensors: Tensor) -> None:
    """Call a function of the library on shares of the rows, one for each of torch's threads: it holds no lock."""
    function, source = getattr(_library(), name), rows.source
    offset = rows.row * source.stride(0) + rows.position * source.stride(1)
    pointers = [tensor.data_ptr() for tensor in tensors]

    def share(begin: int, end: int) -> None:
        function(source.data_ptr(), offset.data_ptr(), begin, end, rows.width, size, *pointers)

    count = min(torch.get_num_threads(), len(rows)) if len(rows) * work > 1 << 17 else 1
    if count == 1:
        share(0, len(rows))
    else:
        edges = [len(rows) * k // count for k in range(count + 1)]
        list(_workers(count).map(share, edges[:-1], edges[1:]))


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="discdiff-rows")


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        return None
    for folder in _folders():
        path = folder / f"row_pass-{_fingerprint(compiler)}.so"
        if path.exists() or _build(compiler, path):
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                continue
            integer, pointer = ctypes.c_int64, ctypes.c_void_p
            for function in (library.row_pass, library.row_column):
                function.argtypes = [pointer, pointer, *[integer] * 4, pointer, pointer, pointer]
                function.restype = None
            return library
    return None


def _folders() -> list[Path]:
    """Where a build may be kept: the user's cache, or a folder of this process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [cache / "discdiff", Path(tempfile.gettempdir()) / f"discdiff-{os.getpid()}"]


def _fingerprint(compiler: str) -> str:
    """A build belongs to this source, this compiler and this kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kind = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    text = [_SOURCE.read_text(), compiler, str(_FLAGS), str(_TUNING), *os.uname()[3:], *sorted(kind)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _build(compiler: str, path: Path) -> bool:
    """Compile to ``path``, whole or not at all, with the first tuning that the compiler knows."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            for tuning in _TUNING:
                command = [compiler, *_FLAGS, *tuning, str(_SOURCE), "-o", str(made)]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    made.replace(path)
                    return True
    except OSError:
        return False
    return False
