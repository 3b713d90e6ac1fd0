r"""Read rows and draw from them with two Triton kernels: one sums every group, the other draws a token for each row.

Only the first reads all logits. One of its programs reads a few groups of one row in place, applies the adjustments of
``Rows`` in registers, and writes three numbers a group. The second runs the race among a row's groups and reads the
winning group again. Neither writes a row.

Tile sizes are chosen here, as autotuning fails in the interpreter.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from discdiff.kernels.keys import Key
from discdiff.kernels.reference import Race, Reading, group_size
from discdiff.kernels.reference import contest as contests
from discdiff.kernels.rows import Rows
from discdiff.kernels.triton_language import columns, contest, group_lse, read, within

__all__ = ["arguments", "contests", "largest", "race", "statistics"]

_TILE = 2048  # columns that a program reads: two groups in two warps were fastest on an H200


@triton.jit(do_not_specialize=["temperature"])
def _read_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr, tilt_ptr,
    stride_row, stride_position, stride_column, width, groups, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, TILT: tl.constexpr,
    NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Store the sums of groups TILE b to TILE b + TILE - 1 of row n, in program (n, b)."""
    read(
        source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr, tilt_ptr,
        tl.program_id(0).to(tl.int64), tl.program_id(1), stride_row, stride_position, stride_column, width, groups,
        temperature, SIZE, LANES, TILE, TILT, NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR,
    )  # fmt: skip


# Not specialised: an argument equal to 1 would become a constant, which has no method ``to``.
@triton.jit(do_not_specialize=["seed", "step", "tag", "first", "temperature"])
def _pick_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr,
    id_ptr, place_ptr, key_ptr, token_ptr,
    stride_row, stride_position, stride_column, width, groups, first, seed, step, tag, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Run the race among the groups of row n, and store its key and token."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(id_ptr + n).to(tl.uint32)
    position = tl.load(place_ptr + n).to(tl.uint32)
    group = tl.arange(0, GROUPS)
    here = group < groups
    peak = tl.load(peak_ptr + n * groups + group, mask=here, other=float("-inf"))
    mass = tl.load(mass_ptr + n * groups + group, mask=here, other=0.0)
    lse = group_lse(peak, mass)
    bad = tl.sum((lse != lse).to(tl.int32), 0) > 0
    best, winner = contest(lse, group, first.to(tl.int32), seed, tag, position, step, row, GROUPS)
    ok = (best > float("-inf")) & (bad == 0)
    lane = tl.arange(0, LANES)
    x = columns(
        source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n, lane,
        lane < SIZE, winner * SIZE, (winner + 1) * SIZE,
        stride_row, stride_position, stride_column, width, temperature,
        NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR, False,
    )  # fmt: skip
    x = tl.where(ok, x, 0.0)  # results of a bad row are discarded
    token = first.to(tl.int64) * 1024 + winner * SIZE + within(x, seed, tag, position, step, row)
    tl.store(token_ptr + n, tl.where(ok, token, -1).to(tl.int64))
    tl.store(key_ptr + n, tl.where(bad, float("nan"), best))


@triton.jit(do_not_specialize=["temperature"])
def _largest_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, group_ptr, column_ptr, second_ptr,
    stride_row, stride_position, stride_column, width, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Store the column of the largest logit of one group of row n, and the second largest logit."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    first = tl.load(group_ptr + n) * SIZE
    x = columns(
        source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n, lane, lane < SIZE,
        first, first + SIZE, stride_row, stride_position, stride_column, width, temperature,
        NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR, False,
    )  # fmt: skip
    x = tl.where(x == x, x, float("-inf"))
    best = tl.min(tl.where(x == tl.max(x, 0), lane, LANES), 0)
    tl.store(column_ptr + n, best.to(tl.int64))
    tl.store(second_ptr + n, tl.max(tl.where(lane == best, float("-inf"), x), 0))


def largest(rows: Rows, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``reference.two_largest`` of one group of each row."""
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


def statistics(rows: Rows, tilt: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``reference.statistics`` of rows, read in place."""
    size = group_size(rows.width)
    groups = -(-rows.width // size)
    lanes = triton.next_power_of_2(size)
    tile = max(1, min(_TILE // lanes, triton.next_power_of_2(groups)))
    peak, mass = (torch.empty(len(rows), groups, dtype=rows.dtype, device=rows.device) for _ in range(2))
    third = torch.empty_like(mass) if tilt else mass
    pointers, strides, flags = arguments(rows)
    if len(rows):
        with torch.cuda.device_of(rows.source):
            _read_kernel[(len(rows), triton.cdiv(groups, tile))](
                *pointers, peak, mass, third, *strides, rows.width, groups, rows.temperature,
                SIZE=size, LANES=lanes, TILE=tile, TILT=tilt, num_warps=2, **flags,
            )  # fmt: skip
    return peak, mass, third if tilt else None


def race(rows: Rows, key: Key, positions: Tensor, reading: Reading | None, first_group: int) -> Race:
    """Return ``reference.race`` of rows, which are read here unless a reading is given."""
    reading = Reading(*statistics(rows, tilt=False)) if reading is None else reading
    size = group_size(rows.width)
    groups = reading.peak.shape[1]
    best = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    token = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    pointers, strides, flags = arguments(rows)
    if len(rows):
        with torch.cuda.device_of(rows.source):
            _pick_kernel[(len(rows),)](
                *pointers, reading.peak, reading.mass, key.ids.contiguous(), positions.contiguous(), best, token,
                *strides, rows.width, groups, first_group, *key.signed, rows.temperature,
                SIZE=size, LANES=triton.next_power_of_2(size), GROUPS=triton.next_power_of_2(groups), **flags,
            )  # fmt: skip
    return Race(best, token)


@functools.cache
def _columns(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Return columns as a tensor on a device, cached."""
    return torch.tensor(columns, device=device)


def arguments(rows: Rows) -> tuple[list[Tensor], tuple[int, ...], dict[str, bool | int]]:
    """Return the kernels' arguments for the rows: tensors, strides, and flags of the adjustments."""
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
        "NEAR": rows.source.stride(2) == 1,
        "DOUBLE": rows.dtype == torch.float64,
        "HIDDEN": len(rows.hidden),
        "SHIFT": shifted,
        "TEMPER": rows.temperature != 1,
        "FLOOR": rows.floor is not None,
    }
    return pointers, rows.source.stride(), flags
