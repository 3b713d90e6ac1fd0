"""Read rows, draw from them and finish reverse steps on the CPU, in compiled C code; torch is the fallback.

A pass in torch writes the exponentials of each chunk and reads them again: about five reads of the tensor where one
suffices. Philox in torch's int64 takes half the time of a small step. The C code reads a row once and draws from it
while it is in the cache.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from discdiff.kernels import compiled
from discdiff.kernels.keys import Key
from discdiff.kernels.reference import GROUP_SIZE, Race, Reading, group_size
from discdiff.kernels.rows import Computed, Mixture, Rows
from discdiff.kernels.step_inputs import Step

__all__ = [
    "available", "best", "contests", "draw", "flips", "largest", "mixture_draw", "mixture_sums", "race", "readable",
    "statistics", "step", "uniforms",
]  # fmt: skip

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _Rows(ctypes.Structure):
    """Copy of the C type ``struct rows`` in row_pass.c."""

    _fields_: ClassVar = [
        ("base", _P),
        ("offset", _P),
        *((name, _I) for name in ("kind", "stride", "width", "size", "count", "threads")),
        ("hidden", _P),
        ("hidden_count", _I),
        ("own", _P),
        ("shift", _P),
        ("temperature", ctypes.c_float),
        ("floor", _P),
        ("weight", ctypes.c_float),
        ("term_count", _I),
        ("terms", _P),
    ]


class _Term(ctypes.Structure):
    """Copy of the C type ``struct term`` in row_pass.c."""

    _fields_: ClassVar = [("rows", _P), ("weight", ctypes.c_float)]


class _Address(ctypes.Structure):
    """Copy of the C type ``struct address`` in keyed.c."""

    _fields_: ClassVar = [("seed", ctypes.c_uint64), ("step", ctypes.c_uint32)]


class _Step(ctypes.Structure):
    """Copy of the C type ``struct step`` in keyed.c."""

    _fields_: ClassVar = [
        *((name, _P) for name in ("ids", "tokens", "where", "data", "odds", "kept", "noise")),
        ("last", _I),
        ("length", _I),
        ("address", _Address),
        *((name, ctypes.c_uint32) for name in ("accept", "data_tag", "token", "noise_tag")),
    ]


class _Mixture(ctypes.Structure):
    """Copy of the C type ``struct mixture`` in mixture.c."""

    _fields_: ClassVar = [
        *((name, _P) for name in ("rows", "place", "weight", "level", "spike", "scale", "pi", "anchor", "own")),
        ("relative", _I),
    ]


class _Mixtures(ctypes.Structure):
    """Copy of the C type ``struct mixtures`` in mixture.c."""

    _fields_: ClassVar = [
        *((name, _P) for name in ("one", "two")),
        *((name, _I) for name in ("columns", "rate", "threads")),
        ("without", _P),
    ]


_A = ctypes.POINTER(_Address)
_RATES = ("plain", "barker", "sqrt", "min", "max")
_ARGUMENTS = {
    "row_pass": [_P, _P, _P, _P],
    "row_largest": [_P, _P, _P, _P],
    "row_best": [_P, _P],
    "contests": [_P, _A, _I, _I, _I, _P, _P, _I, _P, _P, _P],
    "uniforms": [_A, _I, _I, _I, _P, _P, _P, _P, _I],
    "flips": [_A, _I, _I, _I, _P, _P, _P, _I],
    "races": [_P, _A, _I, _P, _P, _I, _P, _P, _P, _P],
    "finish_step": [_P, _P, _P, _P],
    "mixture_sums": [_P, _P, _I, _I, _P, _P, _P],
    "mixture_races": [_P, _P, _I, _A, _I, _P, _P, _P],
}


def available() -> bool:
    """Return whether the compiled code is available on this machine."""
    return compiled.library() is not None


def readable(rows: Rows) -> bool:
    """Return whether rows can be read in place: floats of 32 or 16 bits in CPU memory, without a conversion."""
    plain = rows.convert is None and rows.source.dtype in _KINDS and rows.source.device.type == "cpu"
    return plain and all(isinstance(other, Rows) and readable(other) for _, other in rows.terms)


def statistics(rows: Rows, tilt: bool = True) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return ``reference.statistics`` of 32- or 16-bit rows, read in place; None for other rows.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    if not _can(rows):
        return None
    shape = (len(rows), -(-rows.width // group_size(rows.width)))
    peak, mass = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    third = torch.empty(shape, dtype=torch.float32) if tilt else None
    given, _kept = _rows(rows)
    _call("row_pass")(given, peak.data_ptr(), mass.data_ptr(), _pointer(third))
    return peak, mass, third


def largest(rows: Rows, group: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return ``reference.two_largest`` of one group of each row, for 32- or 16-bit rows; None for other rows.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    if not _can(rows):
        return None
    column, second = torch.empty_like(group), torch.empty(group.shape, dtype=torch.float32)
    given, _kept = _rows(rows)
    _call("row_largest")(given, group.contiguous().data_ptr(), column.data_ptr(), second.data_ptr())
    return column, second


def best(rows: Rows) -> Tensor | None:
    """Return the lowest column with the largest logit of each 32- or 16-bit row; None for other rows.

    The column is -1 for a row without mass or with a NaN or +inf.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    if not _can(rows):
        return None
    column = torch.empty(len(rows), dtype=torch.int64)
    given, _kept = _rows(rows)
    _call("row_best")(given, column.data_ptr())
    return column


def race(rows: Rows, key: Key, positions: Tensor, reading: Reading | None, first: int) -> Race | None:
    """Return ``reference.race`` of 32- or 16-bit rows, read here unless a reading is given; None for other rows.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    if not _can(rows):
        return None
    best = torch.empty(len(rows), dtype=torch.float64)
    column = _columns(rows, key, positions, reading, first, best)
    return Race(best, column if first == 0 else torch.where(column < 0, column, column + first * GROUP_SIZE))


def draw(rows: Rows, key: Key, positions: Tensor, reading: Reading | None) -> Tensor | None:
    """Return the tokens of ``race`` among all columns, without its keys; None for rows that ``race`` cannot read.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    return _columns(rows, key, positions, reading, 0, None) if _can(rows) else None


def _columns(
    rows: Rows, key: Key, positions: Tensor, reading: Reading | None, first: int, best: Tensor | None
) -> Tensor:
    ids, positions, column = key.ids.contiguous(), positions.contiguous(), torch.empty(len(rows), dtype=torch.int64)
    peak = mass = None
    if reading is not None:
        peak, mass = reading.peak.float().contiguous(), reading.mass.float().contiguous()
    given, _kept = _rows(rows)
    _call("races")(
        given, *_address(key), ids.data_ptr(), positions.data_ptr(), first,
        _pointer(peak), _pointer(mass), _pointer(best), column.data_ptr(),
    )  # fmt: skip
    return column


def contests(lse: Tensor, key: Key, positions: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``reference.contest`` of groups with log-sum-exp (N, G)."""
    lse, ids, positions = lse.double().contiguous(), key.ids.contiguous(), positions.contiguous()
    best, group, share = torch.empty(len(ids), dtype=torch.float64), torch.empty_like(ids), torch.empty_like(lse[:, 0])
    _call("contests")(
        lse.data_ptr(), *_address(key), *lse.shape, ids.data_ptr(), positions.data_ptr(),
        first, best.data_ptr(), group.data_ptr(), share.data_ptr(),
    )  # fmt: skip
    return best, group, share


def uniforms(key: Key, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``reference.uniforms`` at every position (L,) of every row (B,)."""
    ids, positions = key.ids.contiguous(), positions.contiguous()
    u, v = (torch.empty(len(ids), len(positions), dtype=torch.float64) for _ in range(2))
    _call("uniforms")(
        *_address(key), len(ids), len(positions), ids.data_ptr(), positions.data_ptr(),
        u.data_ptr(), v.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return u, v


def flips(p: Tensor, key: Key) -> tuple[Tensor, bool]:
    """Flip coins (B, L) with float64 probabilities p; also return whether any p is outside [0, 1]."""
    p, ids, heads = p.contiguous(), key.ids.contiguous(), torch.empty(p.shape, dtype=torch.bool)
    wrong = _call("flips")(
        *_address(key), *p.shape, ids.data_ptr(), p.data_ptr(), heads.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return heads, bool(wrong)


def step(rows: Rows, what: Step) -> tuple[Tensor, Tensor]:
    """Make the choices of a reverse step after "where"; arguments and results are those of ``dispatch.step``."""
    assert what.where is not None
    given, _kept = _rows(rows)
    key = what.keys["token"]
    given_too = (key.ids, what.tokens, what.where, what.data, what.odds, what.kept, what.noise)
    held = [None if x is None else x.contiguous() for x in given_too]
    asked = _Step(
        *map(_pointer, held), what.last, what.length, _address(key)[0],
        *[what.keys[name].words[2] if name in what.keys else 0 for name in ("accept", "data", "token", "noise")],
    )  # fmt: skip
    out, bad = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows), dtype=torch.bool)
    _call("finish_step")(given, ctypes.byref(asked), out.data_ptr(), bad.data_ptr())
    return out, bad


def _address(key: Key) -> tuple[_Address, int]:
    """Return seed and step as a C struct, and the tag."""
    seed, step, tag = key.words
    return _Address(seed, step), tag


def mixture_sums(rows: Computed, strict: bool = True) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return c(own) of the first mixture, the largest rate g and the sum of rates g, for each row.

    ``Mixture`` defines c and own, ``Mixed`` the rate g. The three results are float64. A result is NaN if it may be
    wrong because terms below 1e-300 are cut off. With ``strict`` every sum below 1e-50 is NaN too. The function returns
    None if it cannot read the rows.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    made = _mixtures(rows)
    if made is None:
        return None
    chosen = rows.number.contiguous()
    own, peak, total = (torch.empty(len(chosen), dtype=torch.float64) for _ in range(3))
    _call("mixture_sums")(
        made[0], chosen.data_ptr(), len(chosen), strict, own.data_ptr(), peak.data_ptr(), total.data_ptr()
    )
    return own, peak, total


def mixture_draw(rows: Computed, key: Key, positions: Tensor) -> Tensor | None:
    """Draw a column from each row of mixtures; return None if the rows cannot be read.

    Where ``mixture_sums`` with ``strict`` gives NaN, no column is drawn and the result is -2.

    Raises:
        RuntimeError: if there is no compiled code.
    """
    made = _mixtures(rows)
    if made is None:
        return None
    chosen, ids, positions = rows.number.contiguous(), key.ids.contiguous(), positions.contiguous()
    column = torch.empty_like(chosen)
    _call("mixture_races")(
        made[0], chosen.data_ptr(), len(chosen), *_address(key), ids.data_ptr(), positions.data_ptr(), column.data_ptr()
    )
    return column


def _mixtures(rows: Computed) -> tuple[Any, object] | None:
    """Return the mixtures as a C struct, and the objects that must stay alive while it is used.

    None if the rows are no mixtures, or C code cannot read the logits in them.
    """
    mixed = rows.mixed
    if mixed is None or not all(_can(one.rows) for one in mixed.of):
        return None
    made = [_mixture(one) for one in mixed.of]
    one, two = (*(ctypes.addressof(given) for given, _ in made), None)[:2]
    without = None if mixed.without is None else mixed.without.contiguous()
    whole = _Mixtures(one, two, rows.width, _RATES.index(mixed.rate), torch.get_num_threads(), _pointer(without))
    return ctypes.byref(whole), (made, without, whole)


def _mixture(one: Mixture) -> tuple[_Mixture, object]:
    rows, kept = _rows(one.rows)
    names = ("place", "weight", "level", "spike", "scale", "pi", "anchor", "own")
    arrays = [None if (x := getattr(one, name)) is None else x.detach().contiguous() for name in names]
    return _Mixture(ctypes.addressof(rows._obj), *map(_pointer, arrays), one.relative), (kept, arrays)


def _can(rows: Rows) -> bool:
    if not available():
        raise RuntimeError("the native backend found no compiled code and no C compiler here; use backend='torch'")
    return readable(rows)


@functools.cache
def _call(name: str) -> Callable[..., int]:
    function = getattr(compiled.library(), name)
    function.argtypes, function.restype = _ARGUMENTS[name], _I if name == "flips" else None
    return function


def _rows(rows: Rows) -> tuple[Any, object]:
    """Return the rows as a C struct, and the objects that must stay alive while it is used."""
    source = rows.source
    offset = rows.row * source.stride(0) + rows.position * source.stride(1)
    hidden = torch.tensor(rows.hidden, dtype=torch.int64) if rows.hidden else None
    own = None if rows.own is None else rows.own.contiguous()
    shift, floor = (None if x is None else x.to(torch.float32).contiguous() for x in (rows.shift, rows.floor))
    others = [(_rows(other), weight) for weight, other in rows.terms if isinstance(other, Rows)]
    terms = (_Term * len(others))(*(_Term(ctypes.addressof(made._obj), weight) for (made, _), weight in others))
    made = _Rows(
        source.data_ptr(), offset.data_ptr(),
        _KINDS[source.dtype], source.stride(2), rows.width, group_size(rows.width), len(rows), torch.get_num_threads(),
        _pointer(hidden), len(rows.hidden), _pointer(own), _pointer(shift), rows.temperature, _pointer(floor),
        rows.weight, len(others), ctypes.addressof(terms),
    )  # fmt: skip
    return ctypes.byref(made), (offset, hidden, own, shift, floor, made, others, terms)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
