"""Reading and drawing compiled from ``row_pass.c`` at their first use, where there is a C compiler; else torch does it.

A pass in torch writes each chunk's exponentials and reads them again, about five reads of the tensor where memory
allows one. The compiled pass keeps to about one. It is 220 lines of C without dependencies, compiled in a quarter of a
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
from typing import ClassVar

import torch
from torch import Tensor

from discdiff.kernels.reference import GROUP_SIZE, Race, Reading, contest, group_size
from discdiff.kernels.rows import Rows

__all__ = ["available", "largest", "race", "statistics"]

_SOURCE = Path(__file__).with_name("row_pass.c")
_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fPIC"]
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TUNING = [["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], []]


def available() -> bool:
    """Whether the compiled pass can be had on this machine."""
    return _library() is not None


def statistics(rows: Rows, tilt: bool = True) -> tuple[Tensor, Tensor, Tensor] | None:
    """``reference.statistics`` of rows in 32 or 16 bits where they lie; None for others."""
    if not _readable(rows):
        return None
    size = group_size(rows.width)
    shape = (len(rows), -(-rows.width // size))
    peak, mass, third = (torch.empty(shape, dtype=torch.float32) for _ in range(3))
    _run("row_pass", rows, peak, mass, third)
    return peak, mass, third


def largest(rows: Rows, group: Tensor) -> tuple[Tensor, Tensor] | None:
    """``reference.two_largest`` of one group of each of rows in 32 or 16 bits; None for others."""
    if not _readable(rows):
        return None
    column, second = torch.empty_like(group), torch.empty(group.shape, dtype=torch.float32)
    _run("row_largest", rows, group, column, second)
    return column, second


def race(
    rows: Rows, reading: Reading, seed: int, ids: Tensor, positions: Tensor, step: int, tag: int, first_group: int
) -> Race | None:
    """``reference.race`` of rows in 32 or 16 bits that have been read; None for others."""
    if not _readable(rows):
        return None
    size = group_size(rows.width)
    key, group, share = contest(reading.group_lse, seed, ids, positions, step, tag, first_group)
    column = torch.empty_like(group)
    _run("row_column", rows, group, share, column)
    return Race(key, torch.where(key > -torch.inf, first_group * GROUP_SIZE + group * size + column, -1))


class _Rows(ctypes.Structure):
    """``struct rows`` of row_pass.c."""

    _fields_: ClassVar = [
        ("base", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "stride", "width", "size", "count", "threads")),
        ("hidden", ctypes.c_void_p),
        ("hidden_count", ctypes.c_int64),
        ("own", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("floor", ctypes.c_void_p),
    ]


def _readable(rows: Rows) -> bool:
    if _library() is None:
        raise RuntimeError("the native backend found no C compiler on this machine; use backend='torch'")
    return rows.convert is None and rows.source.dtype in _KINDS and rows.source.device.type == "cpu"


def _run(name: str, rows: Rows, *tensors: Tensor) -> None:
    """Call a function of the library; it shares the rows among torch's threads."""
    source = rows.source
    offset = rows.row * source.stride(0) + rows.position * source.stride(1)
    hidden = torch.tensor(rows.hidden, dtype=torch.int64)
    own = None if rows.own is None else rows.own.contiguous()
    shift, floor = (None if x is None else x.to(torch.float32).contiguous() for x in (rows.shift, rows.floor))
    arguments = _Rows(
        source.data_ptr(), offset.data_ptr(),
        _KINDS[source.dtype], source.stride(2), rows.width, group_size(rows.width), len(rows), torch.get_num_threads(),
        hidden.data_ptr(), len(hidden), _pointer(own), _pointer(shift), rows.temperature, _pointer(floor),
    )  # fmt: skip
    getattr(_library(), name)(ctypes.byref(arguments), *(tensor.data_ptr() for tensor in tensors))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


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
    for function in (library.row_pass, library.row_column, library.row_largest):
        function.argtypes = [ctypes.POINTER(_Rows), *[ctypes.c_void_p] * 3]
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
