r"""Draw tokens from hidden states without storing logits, with two Triton kernels for the last layer and the draw.

The first multiplies a tile of rows with a tile of 128 columns of the head. For each row it stores the tile's largest
logit and sum of exponentials: N x V / 128 pairs instead of N x V logits. The second combines tiles to the groups of the
specification and runs the race among them. It finds the winning tile by the running sum of its group's tiles and
computes that tile once more. The arithmetic of a tile, and so the tokens, do not depend on the number of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from discdiff.kernels.keys import Key
from discdiff.kernels.reference import GROUP_SIZE, Race
from discdiff.kernels.rows import LinearHead, Rows
from discdiff.kernels.triton_language import adjusted, contest, passing, safe_log, shift_of, sums, within_share
from discdiff.kernels.triton_rows import arguments

__all__ = ["race"]

_COLUMNS = 128


@triton.jit
def _tile(
    hidden_ptr, weight_ptr, bias_ptr, row, position, column, ok,
    stride_row, stride_position, stride_hidden, stride_weight, stride_depth, depth, width,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the logits of rows (N,) at columns (C,), float32; EVEN means that DEPTH divides the depth."""
    out = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
    d = tl.arange(0, DEPTH)
    here = tl.where(ok, row * stride_row + position * stride_position, 0)
    h_ptr = hidden_ptr + here[:, None] + d[None, :] * stride_hidden
    # Columns beyond the last repeat it: their results are discarded, and the loads need no mask.
    own = tl.minimum(column, width - 1).to(tl.int64)
    w_ptr = weight_ptr + own[None, :] * stride_weight + d[:, None] * stride_depth
    for k in range(CHUNKS):
        if EVEN:
            h, w = tl.load(h_ptr), tl.load(w_ptr)
        else:
            left = d < depth - k * DEPTH
            h = tl.load(h_ptr, mask=left[None, :], other=0.0)
            w = tl.load(w_ptr, mask=left[:, None], other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        out = tl.dot(h, w, acc=out, input_precision=PRECISION)
        h_ptr += DEPTH * stride_hidden
        w_ptr += DEPTH * stride_depth
    if BIAS:
        out += tl.load(bias_ptr + own).to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["temperature"])
def _head_kernel(
    hidden_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hide_ptr, weight_ptr, bias_ptr,
    peak_ptr, mass_ptr,
    stride_row, stride_position, stride_hidden, stride_weight, stride_depth, depth, width, count, tiles, temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, BAND: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Compute, for ROWS rows and TOGETHER tiles of columns, each tile's largest logit and sum of exponentials.

    Programs that run at the same time share BAND blocks of rows, so that the weights come from the cache.
    """
    number = tl.program_id(0)
    blocks, across = tl.cdiv(count, ROWS), tl.cdiv(width, TOGETHER * COLUMNS)
    begin = number // (BAND * across) * BAND
    high = tl.minimum(blocks - begin, BAND)
    inner = number % (BAND * across)
    n = (begin + inner % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = inner // high * TOGETHER
    ok = n < count
    safe = tl.where(ok, n, 0)
    column = first * COLUMNS + tl.arange(0, TOGETHER * COLUMNS)
    x = _tile(
        hidden_ptr, weight_ptr, bias_ptr, tl.load(row_ptr + safe), tl.load(position_ptr + safe), column, ok,
        stride_row, stride_position, stride_hidden, stride_weight, stride_depth, depth, width,
        DEPTH, CHUNKS, EVEN, BIAS, PRECISION, WIDEN,
    )  # fmt: skip
    x = adjusted(
        x, tl.arange(0, TOGETHER * COLUMNS)[None, :], first * COLUMNS, (first + TOGETHER) * COLUMNS, safe[:, None],
        width, own_ptr, shift_ptr, floor_ptr, hide_ptr, temperature, HIDDEN, SHIFT, TEMPER, FLOOR, False,
    )  # fmt: skip
    x = tl.reshape(x, (ROWS * TOGETHER, COLUMNS))
    peak, mass, _ = sums(x, False)
    tile = first + tl.arange(0, TOGETHER)
    at = n[:, None] * tiles + tile[None, :]
    inside = ok[:, None] & (tile < tiles)[None, :]
    tl.store(peak_ptr + at, tl.reshape(peak, (ROWS, TOGETHER)), mask=inside)
    tl.store(mass_ptr + at, tl.reshape(mass, (ROWS, TOGETHER)), mask=inside)


@triton.jit(do_not_specialize=["seed", "step", "tag", "first", "temperature"])
def _head_pick_kernel(
    hidden_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hide_ptr, weight_ptr, bias_ptr,
    peak_ptr, mass_ptr, id_ptr, place_ptr, key_ptr, token_ptr,
    stride_row, stride_position, stride_hidden, stride_weight, stride_depth, depth, width, tiles,
    first, seed, step, tag, temperature,
    GROUPS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Run the race of row n among groups of SHARE tiles, and store its key and token."""
    n = tl.program_id(0).to(tl.int64)
    id = tl.load(id_ptr + n).to(tl.uint32)
    place = tl.load(place_ptr + n).to(tl.uint32)
    group = tl.arange(0, GROUPS)
    tile = group[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    peak = tl.load(peak_ptr + n * tiles + tile, mask=tile < tiles, other=float("-inf"))
    mass = tl.load(mass_ptr + n * tiles + tile, mask=tile < tiles, other=0.0)
    top = tl.max(peak, 1)
    part = mass.to(tl.float64) * tl.exp((peak - shift_of(top)[:, None]).to(tl.float64))
    whole = tl.sum(part, 1)
    lse = tl.where(whole == 0, float("-inf"), top.to(tl.float64) + safe_log(whole))
    bad = tl.sum((lse != lse).to(tl.int32), 0) > 0
    best, winner = contest(lse, group, first.to(tl.int32), seed, tag, place, step, id, GROUPS)
    ok = (best > float("-inf")) & (bad == 0)

    # the tile of the winning group in which the running sum exceeds the target
    won = tl.sum(tl.where((group == winner)[:, None], tl.where(part == part, part, 0.0), 0.0), 0)
    running = tl.cumsum(won, 0)
    target = within_share(seed, tag, place, step, id) * tl.max(running, 0)
    chosen = passing(running, target)
    lane = tl.arange(0, SHARE)
    before = tl.sum(tl.where(lane < chosen, won, 0.0), 0)

    lanes = tl.arange(0, COLUMNS)
    column = (winner * SHARE + chosen) * COLUMNS + lanes
    alone = tl.arange(0, ROWS) == 0  # a matrix product needs several rows, of which only this one is used
    same = n + tl.zeros((ROWS,), dtype=tl.int64)
    x = _tile(
        hidden_ptr, weight_ptr, bias_ptr, tl.load(row_ptr + same), tl.load(position_ptr + same), column, alone,
        stride_row, stride_position, stride_hidden, stride_weight, stride_depth, depth, width,
        DEPTH, CHUNKS, EVEN, BIAS, PRECISION, WIDEN,
    )  # fmt: skip
    x = tl.sum(tl.where(alone[:, None], x, 0.0), 0)
    start = (winner * SHARE + chosen) * COLUMNS
    x = adjusted(
        x, lanes, start, start + COLUMNS, n, width,
        own_ptr, shift_ptr, floor_ptr, hide_ptr, temperature, HIDDEN, SHIFT, TEMPER, FLOOR, False,
    )  # fmt: skip
    x = tl.where(ok, x, 0.0)  # results of a bad row are discarded
    height = tl.max(tl.where(group == winner, tl.where(ok, top, 0.0), float("-inf")), 0)
    picked = passing(tl.cumsum(tl.exp(x - height).to(tl.float64), 0), target - before)
    token = first.to(tl.int64) * 1024 + (winner * SHARE + chosen) * COLUMNS + picked
    tl.store(token_ptr + n, tl.where(ok, token, -1).to(tl.int64))
    tl.store(key_ptr + n, tl.where(bad, float("nan"), best))


def race(rows: Rows, head: LinearHead, key: Key, positions: Tensor, first_group: int) -> Race:
    """Return ``reference.race`` of the logits that a linear head computes from ``rows`` of hidden states."""
    count, width, depth = len(rows), rows.width, rows.source.shape[2]
    tiles = triton.cdiv(width, _COLUMNS)
    share = GROUP_SIZE // _COLUMNS
    peak, mass = (torch.empty(count, tiles, dtype=torch.float32, device=rows.device) for _ in range(2))
    best = torch.empty(count, dtype=torch.float64, device=rows.device)
    token = torch.empty(count, dtype=torch.int64, device=rows.device)
    pointers, strides, flags = arguments(rows)
    del flags["NEAR"], flags["DOUBLE"]
    bias = head.weight if head.bias is None else head.bias
    sizes = (*strides, *head.weight.stride(), depth, width)
    chunk = min(64, max(16, triton.next_power_of_2(depth)))
    shape = {
        "COLUMNS": _COLUMNS, "DEPTH": chunk, "CHUNKS": triton.cdiv(depth, chunk), "EVEN": depth % chunk == 0,
        "BIAS": head.bias is not None, "PRECISION": "ieee",
        "WIDEN": not isinstance(_head_kernel, triton.JITFunction),  # the interpreter multiplies bfloat16 as integers
    }  # fmt: skip
    # Half-precision tiles of 128 x 256 reach .9 of a matrix product on an H200; float32 has no fast unit to use.
    wide = rows.source.element_size() == 2
    block, together = (64 if count <= 64 else 128, 2) if wide else (16 if count <= 16 else 64, 1)
    if count:
        with torch.cuda.device_of(rows.source):
            _head_kernel[(triton.cdiv(count, block) * triton.cdiv(width, together * _COLUMNS),)](
                *pointers, head.weight, bias, peak, mass, *sizes, count, tiles, rows.temperature,
                ROWS=block, TOGETHER=together, BAND=8, num_warps=8 if block == 128 else 4, num_stages=3,
                **shape, **flags,
            )  # fmt: skip
            _head_pick_kernel[(count,)](
                *pointers, head.weight, bias, peak, mass, key.ids.contiguous(), positions.contiguous(), best, token,
                *sizes, tiles, first_group, *key.signed, rows.temperature,
                GROUPS=triton.next_power_of_2(triton.cdiv(tiles, share)), SHARE=share, ROWS=16, **shape, **flags,
            )  # fmt: skip
    return Race(best, token)
