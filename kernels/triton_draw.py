r"""The two-level categorical of ``reference.draw`` as one Triton kernel: a program a row, one pass over its groups.

Written for the interpreter as well as the GPU: only built-in reductions, counter words cast to uint32 (a 64-bit word
would silently select Philox-4x64), no autotuning (its launch fails without a GPU).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from discdiff.kernels.reference import GROUP_SIZE

__all__ = ["draw"]


@triton.jit
def _uniform53(high, low):
    """Two words to a float64 in (0, 1): (k + 1/2) / 2**53."""
    k = (high.to(tl.uint64) << 21) | (low.to(tl.uint64) >> 11)
    return (k.to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def _gumbel32(word):
    """A word to a Gumbel; log1p(x) = x log(1+x) / ((1+x) - 1), exact to rounding where 1+x != 1."""
    u = tl.minimum((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    y = 1.0 - u
    return -tl.log(u * tl.log(y) / (y - 1.0))


# Not specialised: an argument that happens to be 1 would arrive as a constant, without the `to` of a tensor.
@triton.jit(do_not_specialize=["seed", "step", "tag"])
def _draw_kernel(
    logits_ptr,  # (N, V)
    rows_ptr,  # (N,) int64
    positions_ptr,  # (N,) int64
    out_ptr,  # (N,) int64
    stride_row,
    stride_column,
    width,
    seed,
    step,
    tag,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    # kinds: group Gumbel 0, within the group 1 (kernels/philox.py)
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + n).to(tl.uint32)
    position = tl.load(positions_ptr + n).to(tl.uint32)
    base = logits_ptr + n * stride_row
    column = tl.arange(0, SIZE)

    best_key = tl.full((), float("-inf"), tl.float64)
    best_group = tl.full((), 0, tl.int32)
    best_peak = tl.full((), 0.0, tl.float64 if DOUBLE else tl.float32)
    bad = tl.full((), 0, tl.int32)
    for g in range(GROUPS):
        here = g * SIZE + column
        x = tl.load(base + here.to(tl.int64) * stride_column, mask=here < width, other=float("-inf"))
        x = x.to(tl.float64 if DOUBLE else tl.float32)
        # tl.max drops NaN, so NaN is counted by itself
        bad += tl.sum((x != x).to(tl.int32), 0) + tl.sum((x == float("inf")).to(tl.int32), 0)
        peak = tl.max(x, 0)
        if (peak > float("-inf")) & (peak < float("inf")):
            mass = tl.sum(tl.exp(x - peak), 0)
            c0 = (tag.to(tl.uint32) << 20) | (g // 4)
            w0, w1, w2, w3 = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
            lane = g % 4
            word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
            key = peak.to(tl.float64) + tl.log(mass.to(tl.float64)) + _gumbel32(word)
            if key > best_key:
                best_key = key
                best_group = g
                best_peak = peak

    here = best_group * SIZE + column
    x = tl.load(base + here.to(tl.int64) * stride_column, mask=here < width, other=float("-inf"))
    x = x.to(tl.float64 if DOUBLE else tl.float32)
    x = tl.where(bad == 0, x, 0.0)  # whatever is computed of a bad row is thrown away
    weight = tl.exp(x - best_peak).to(tl.float64)
    total = tl.cumsum(weight, 0)
    whole = tl.max(total, 0)
    c0 = (tag.to(tl.uint32) << 20) | 0x40000000
    w0, w1, w2, w3 = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
    target = _uniform53(w0, w1) * whole
    picked = tl.sum((total <= target).to(tl.int32), 0)
    # rounding may carry the target to the whole: then the last column with mass is meant
    last = tl.max(tl.where(weight > 0, column, 0), 0)
    token = best_group * SIZE + tl.minimum(picked, last)
    ok = (bad == 0) & (best_key > float("-inf"))
    tl.store(out_ptr + n, tl.where(ok, token, -1).to(tl.int64))


def draw(logits: Tensor, seed: int, rows: Tensor, positions: Tensor, step: int, tag: int) -> Tensor:
    """``reference.draw`` by Triton, same arguments and tokens."""
    n, width = logits.shape
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n:
        groups = -(-width // GROUP_SIZE)
        size = GROUP_SIZE if groups > 1 else triton.next_power_of_2(width)
        signed_seed = seed - (1 << 64) if seed >= 1 << 63 else seed
        with torch.cuda.device_of(logits):
            _draw_kernel[(n,)](
                logits, rows.contiguous(), positions.contiguous(), out, logits.stride(0), logits.stride(1), width,
                signed_seed, step, tag,
                GROUPS=groups, SIZE=size, DOUBLE=logits.dtype == torch.float64,
            )  # fmt: skip
    return out
