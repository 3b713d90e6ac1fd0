r"""Reading and drawing as two Triton kernels: every group of every row, then a winner for each row.

The first is the only one that reads logits in bulk: a program takes a few groups of one row where they lie, does what
``Rows`` says to them in registers and writes three numbers a group. The second runs the race among a row's groups and
reads the winning one again. Neither writes a row.

Written for the interpreter as well as the GPU: only built-in reductions, counter words cast to uint32 (a 64-bit word
would silently select Philox-4x64), no autotuning (its launch fails without a GPU), so the tile is chosen here.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from discdiff.kernels.reference import Race, Reading, group_size
from discdiff.kernels.rows import Rows

__all__ = [
    "adjusted", "arguments", "group_word", "gumbel32", "largest", "race", "safe_log", "shift_of", "signed",
    "statistics", "uniform53", "within_share",
]  # fmt: skip

_TILE = 4096  # columns a program reads together


@triton.jit
def uniform53(high, low):
    """Two words to a float64 in (0, 1): (k + 1/2) / 2**53."""
    k = (high.to(tl.uint64) << 21) | (low.to(tl.uint64) >> 11)
    return (k.to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def gumbel32(word):
    """A word to a Gumbel; log1p(x) = x log(1+x) / ((1+x) - 1), exact to rounding where 1+x != 1."""
    u = tl.minimum((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    y = 1.0 - u
    return -tl.log(u * tl.log(y) / (y - 1.0))


@triton.jit
def adjusted(
    x, column, n, width, own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """What ``Rows`` does to the columns of row n, or of rows n[:, None]."""
    for h in range(HIDDEN):
        x = tl.where(column == tl.load(hidden_ptr + h), float("-inf"), x)
    if SHIFT:
        x = tl.where(column == tl.load(own_ptr + n), x + tl.load(shift_ptr + n).to(x.dtype), x)
    if TEMPER:
        x = tl.div_rn(x, tl.full(x.shape, 1.0, x.dtype) * temperature) if x.dtype == tl.float32 else x / temperature
    if FLOOR:
        x = tl.where(x < tl.load(floor_ptr + n).to(x.dtype), float("-inf"), x)
    return tl.where(column < width, x, float("-inf"))


@triton.jit
def group_word(number, seed, tag, position, step, row):
    """Word g % 4 of the Philox call at column block g // 4: the group Gumbels', kind 0 (kernels/philox.py)."""
    c0 = (tag.to(tl.uint32) << 20) | (number // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
    lane = number % 4
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def within_share(seed, tag, position, step, row):
    """The uniform of the draw within a group, kind 1."""
    c0 = (tag.to(tl.uint32) << 20) | 0x40000000
    w0, w1, _, _ = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
    return uniform53(w0, w1)


@triton.jit
def safe_log(mass):
    """log in float64, -inf at 0 without dividing by it."""
    return tl.where(mass == 0, float("-inf"), tl.log(tl.where(mass == 0, 1.0, mass).to(tl.float64)))


@triton.jit
def shift_of(peak):
    """What exponents are taken from, so that inf - inf is never computed: empty groups by nothing, +inf by a lot."""
    return tl.where(peak == float("-inf"), 0.0, tl.where(peak == float("inf"), 3.4e38, peak))


@triton.jit(do_not_specialize=["temperature"])
def _read_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr, tilt_ptr,
    stride_row, stride_position, stride_column, width, groups, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Groups TILE b .. TILE b + TILE - 1 of row n; a group has SIZE columns in LANES, a power of two."""
    n = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, LANES)
    column = group[:, None] * SIZE + lane[None, :]
    base = source_ptr + tl.load(row_ptr + n) * stride_row + tl.load(position_ptr + n) * stride_position
    inside = (column < width) & (lane < SIZE)[None, :]
    x = tl.load(base + column.to(tl.int64) * stride_column, mask=inside, other=float("-inf"))
    x = x.to(tl.float64 if DOUBLE else tl.float32)
    x = adjusted(
        x, column, n, width, own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature, HIDDEN, SHIFT, TEMPER, FLOOR
    )
    peak = tl.max(tl.where(x == x, x, float("-inf")), 1)  # a NaN is told by the mass
    offset = x - shift_of(peak)[:, None]
    weight = tl.exp(offset)
    mass = tl.where(peak == float("inf"), float("nan"), tl.sum(weight, 1))
    tilt = tl.sum(weight * tl.where(offset < -87.0, -87.0, tl.where(offset > 0, 1.0, offset)), 1)
    at = n * groups + group
    tl.store(peak_ptr + at, peak, mask=group < groups)
    tl.store(mass_ptr + at, mass, mask=group < groups)
    tl.store(tilt_ptr + at, tilt, mask=group < groups)


# Not specialised: an argument that happens to be 1 would arrive as a constant, without the `to` of a tensor.
@triton.jit(do_not_specialize=["seed", "step", "tag", "first", "temperature"])
def _pick_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr,
    id_ptr, place_ptr, key_ptr, token_ptr,
    stride_row, stride_position, stride_column, width, groups, first, seed, step, tag, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The race of row n."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(id_ptr + n).to(tl.uint32)
    position = tl.load(place_ptr + n).to(tl.uint32)
    group = tl.arange(0, GROUPS)
    here = group < groups
    peak = tl.load(peak_ptr + n * groups + group, mask=here, other=float("-inf"))
    mass = tl.load(mass_ptr + n * groups + group, mask=here, other=0.0)
    lse = tl.where(mass == 0, float("-inf"), peak.to(tl.float64) + safe_log(mass))
    word = group_word(first.to(tl.int32) + group, seed, tag, position, step, row)
    bad = tl.sum((lse != lse).to(tl.int32), 0) > 0
    key = tl.where(here & (lse == lse), lse + gumbel32(word), float("-inf"))
    best = tl.max(key, 0)
    winner = tl.min(tl.where(key == best, group, GROUPS), 0)

    column = winner * SIZE + tl.arange(0, LANES)
    base = source_ptr + tl.load(row_ptr + n) * stride_row + tl.load(position_ptr + n) * stride_position
    inside = (column < width) & (tl.arange(0, LANES) < SIZE)
    x = tl.load(base + column.to(tl.int64) * stride_column, mask=inside, other=float("-inf"))
    x = x.to(tl.float64 if DOUBLE else tl.float32)
    x = adjusted(
        x, column, n, width, own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature, HIDDEN, SHIFT, TEMPER, FLOOR
    )
    ok = (best > float("-inf")) & (bad == 0)
    x = tl.where(ok, x, 0.0)  # whatever is computed of a bad row is thrown away
    weight = tl.exp(x - tl.max(x, 0)).to(tl.float64)
    total = tl.cumsum(weight, 0)
    picked = tl.sum((total <= within_share(seed, tag, position, step, row) * tl.max(total, 0)).to(tl.int32), 0)
    # rounding may carry the target to the whole: then the last column with mass is meant
    last = tl.max(tl.where(weight > 0, tl.arange(0, LANES), 0), 0)
    token = first.to(tl.int64) * 1024 + winner * SIZE + tl.minimum(picked, last)
    tl.store(token_ptr + n, tl.where(ok, token, -1).to(tl.int64))
    tl.store(key_ptr + n, tl.where(bad, float("nan"), best))


@triton.jit(do_not_specialize=["temperature"])
def _largest_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, group_ptr, column_ptr, second_ptr,
    stride_row, stride_position, stride_column, width, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The two largest logits of one group of row n."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    column = tl.load(group_ptr + n) * SIZE + lane
    base = source_ptr + tl.load(row_ptr + n) * stride_row + tl.load(position_ptr + n) * stride_position
    x = tl.load(base + column * stride_column, mask=(column < width) & (lane < SIZE), other=float("-inf"))
    x = x.to(tl.float64 if DOUBLE else tl.float32)
    x = adjusted(
        x, column, n, width, own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature, HIDDEN, SHIFT, TEMPER, FLOOR
    )
    x = tl.where(x == x, x, float("-inf"))
    first = tl.min(tl.where(x == tl.max(x, 0), lane, LANES), 0)
    tl.store(column_ptr + n, first.to(tl.int64))
    tl.store(second_ptr + n, tl.max(tl.where(lane == first, float("-inf"), x), 0))


def largest(rows: Rows, group: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.two_largest`` of one group of each row."""
    size = group_size(rows.width)
    column, second = torch.empty_like(group), torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
    pointers, strides, flags = arguments(rows)
    if len(rows):
        with torch.cuda.device_of(rows.source):
            _largest_kernel[(len(rows),)](
                *pointers, group, column, second, *strides, rows.width, rows.temperature,
                SIZE=size, LANES=triton.next_power_of_2(size), **flags,
            )  # fmt: skip
    return column, second


def statistics(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.statistics`` of rows where they lie."""
    size = group_size(rows.width)
    groups = -(-rows.width // size)
    lanes = triton.next_power_of_2(size)
    tile = max(1, min(_TILE // lanes, triton.next_power_of_2(groups)))
    shape = (len(rows), groups)
    peak, mass, tilt = (torch.empty(shape, dtype=rows.dtype, device=rows.device) for _ in range(3))
    pointers, strides, flags = arguments(rows)
    if len(rows):
        with torch.cuda.device_of(rows.source):
            _read_kernel[(len(rows), triton.cdiv(groups, tile))](
                *pointers, peak, mass, tilt, *strides, rows.width, groups, rows.temperature,
                SIZE=size, LANES=lanes, TILE=tile, **flags,
            )  # fmt: skip
    return peak, mass, tilt


def race(
    rows: Rows, reading: Reading, seed: int, ids: Tensor, positions: Tensor, step: int, tag: int, first_group: int
) -> Race:
    """``reference.race`` of rows that have been read."""
    size = group_size(rows.width)
    groups = reading.peak.shape[1]
    key = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    token = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    pointers, strides, flags = arguments(rows)
    if len(rows):
        with torch.cuda.device_of(rows.source):
            _pick_kernel[(len(rows),)](
                *pointers, reading.peak, reading.mass, ids.contiguous(), positions.contiguous(), key, token,
                *strides, rows.width, groups, first_group, signed(seed), step, tag, rows.temperature,
                SIZE=size, LANES=triton.next_power_of_2(size), GROUPS=triton.next_power_of_2(groups), **flags,
            )  # fmt: skip
    return Race(key, token)


@functools.cache
def _columns(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Columns on a device, sent there once."""
    return torch.tensor(columns, device=device)


def signed(seed: int) -> int:
    """A 64-bit seed as the int64 that a kernel takes."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def arguments(rows: Rows) -> tuple[list[Tensor], tuple[int, ...], dict[str, bool | int]]:
    """What both kernels are told of the rows: tensors, strides, and which adjustments there are."""
    unused = rows.row
    shifted = rows.own is not None and rows.shift is not None
    pointers = [
        rows.source,
        rows.row.contiguous(),
        rows.position.contiguous(),
        rows.own.contiguous() if rows.own is not None and shifted else unused,
        rows.shift.to(rows.dtype).contiguous() if rows.shift is not None and shifted else unused,
        unused if rows.floor is None else rows.floor.to(rows.dtype).contiguous(),
        _columns(rows.hidden or (-1,), rows.device),
    ]
    flags = {
        "DOUBLE": rows.dtype == torch.float64,
        "HIDDEN": len(rows.hidden),
        "SHIFT": shifted,
        "TEMPER": rows.temperature != 1,
        "FLOOR": rows.floor is not None,
    }
    return pointers, rows.source.stride(), flags
