"""Functions shared by the Triton kernels: random words, adjusted rows, the race among groups, the draw in a group.

They also run in Triton's interpreter. So they use only built-in reductions, cast counter words to uint32 (a 64-bit word
would silently select Philox-4x64), and never subtract two infinities.
"""

import triton
import triton.language as tl

__all__ = [
    "adjusted", "coins", "columns", "contest", "group_lse", "passing", "read", "safe_log", "shift_of", "sums", "within",
    "within_share",
]  # fmt: skip


_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def uniform53(high, low):
    """Make a float64 in (0, 1) from two words: (k + 1/2) / 2**53 with k their 53 leading bits."""
    k = (high.to(tl.uint64) << 21) | (low.to(tl.uint64) >> 11)
    return (k.to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def gumbel32(word):
    """Make a Gumbel variable from a word.

    log1p(x) is computed as x log(1 + x) / ((1 + x) - 1), which is exact to rounding where 1 + x != 1.
    """
    u = tl.minimum((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    y = 1.0 - u
    return -tl.log(u * tl.log(y) / (y - 1.0))


@triton.jit
def adjusted(
    x, column, first, beyond, n, width, own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Apply the adjustments of ``Rows`` to columns first + column of row n, or of rows n[:, None].

    All columns are less than ``beyond``. A hidden column is searched only in tiles that may hold it, because comparing
    every element costs as much as reading it. WHOLE means that all columns are inside the width.
    """
    for h in range(HIDDEN):
        hidden = tl.load(hidden_ptr + h)
        if (hidden >= first) & (hidden < beyond):
            x = tl.where(column == (hidden - first).to(tl.int32), float("-inf"), x)
    if SHIFT:
        x = tl.where(column == (tl.load(own_ptr + n) - first).to(tl.int32), x + tl.load(shift_ptr + n).to(x.dtype), x)
    if TEMPER:
        x = tl.div_rn(x, tl.full(x.shape, 1.0, x.dtype) * temperature) if x.dtype == tl.float32 else x / temperature
    if FLOOR:
        x = tl.where(x < tl.load(floor_ptr + n).to(x.dtype), float("-inf"), x)
    return x if WHOLE else tl.where(column < width - first, x, float("-inf"))


@triton.jit
def group_word(number, seed, tag, position, step, row):
    """Return the random word of group g = ``number``: word g % 4 of the Philox call at column block g // 4.

    The kind of the counter is 0 (kernels/philox_words.py).
    """
    c0 = (tag.to(tl.uint32) << 20) | (number // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
    lane = number % 4
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def within_share(seed, tag, position, step, row):
    """Return the uniform of the draw within a group; the counter has kind 1."""
    c0 = (tag.to(tl.uint32) << 20) | 0x40000000
    w0, w1, _, _ = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
    return uniform53(w0, w1)


@triton.jit
def safe_log(mass):
    """Return log in float64, -inf at 0 without a division by zero."""
    return tl.where(mass == 0, float("-inf"), tl.log(tl.where(mass == 0, 1.0, mass).to(tl.float64)))


@triton.jit
def shift_of(peak):
    """Return the number that is subtracted from logits before exp: the peak, but 0 for -inf and 2e38 for +inf.

    So inf - inf never occurs.
    """
    return tl.where(peak == float("-inf"), 0.0, tl.where(peak == float("inf"), 2e38, peak))


@triton.jit
def coins(seed, tag, position, step, row):
    """Return the two uniforms of a coin; the counter has kind 2."""
    c0 = (tag.to(tl.uint32) << 20) | 0x80000000
    w0, w1, w2, w3 = tl.philox(seed, c0.to(tl.uint32), position, step.to(tl.uint32), row)
    return uniform53(w0, w1), uniform53(w2, w3)


@triton.jit
def columns(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n, column, inside, first, beyond,
    stride_row, stride_position, stride_column, width, temperature,
    NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the adjusted logits of row n at columns first + column < beyond; -inf where not inside.

    Columns are counted from ``first``, so that offsets are part of a load's instruction. NEAR means that columns are
    contiguous, so that 32 bits hold the offsets. WHOLE means that all columns are inside.
    """
    base = source_ptr + tl.load(row_ptr + n) * stride_row + tl.load(position_ptr + n) * stride_position
    if NEAR:
        at = base + first.to(tl.int64) + column
    else:
        at = base + (first.to(tl.int64) + column) * stride_column
    if WHOLE:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=inside & (column < width - first), other=float("-inf"))
    return adjusted(
        x.to(tl.float64 if DOUBLE else tl.float32), column, first, beyond, n, width,
        own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature, HIDDEN, SHIFT, TEMPER, FLOOR, WHOLE,
    )  # fmt: skip


@triton.jit
def sums(x, TILT: tl.constexpr):
    """Return (peak, mass, tilt) of the rows of a tile; the tilt is computed only if TILT.

    float32 rows use exp2, which takes one instruction, while exp takes six. The peak is subtracted before the factor
    log2(e) is applied, so large logits lose no precision.
    """
    # A GPU's maximum skips NaN, so the peak is the largest other logit; the mass shows the NaN.
    if _COMPILED:
        peak = tl.maximum(tl.max(x, 1), float("-inf"))
    else:
        peak = tl.max(tl.where(x == x, x, float("-inf")), 1)
    offset = x - shift_of(peak)[:, None]
    if x.dtype == tl.float64:
        weight = tl.exp(offset)
    else:
        weight = tl.exp2(offset * 1.4426950408889634)
    mass = tl.where(peak == float("inf"), float("nan"), tl.sum(weight, 1))
    tilt = tl.sum(weight * tl.maximum(offset, -87.0), 1) if TILT else mass
    return peak, mass, tilt


@triton.jit
def keep(x, at, ok, peak_ptr, mass_ptr, tilt_ptr, TILT: tl.constexpr):
    """Store peak, mass and tilt of groups at ``at``, where ``ok``."""
    peak, mass, tilt = sums(x, TILT)
    tl.store(peak_ptr + at, peak, mask=ok)
    tl.store(mass_ptr + at, mass, mask=ok)
    if TILT:
        tl.store(tilt_ptr + at, tilt, mask=ok)


@triton.jit
def read(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr, tilt_ptr,
    n, tile, stride_row, stride_position, stride_column, width, groups, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, TILT: tl.constexpr,
    NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Store the sums of TILE groups of row n; a group has SIZE columns, padded to LANES, a power of two."""
    group = tile * TILE + tl.arange(0, TILE)
    first = tile * TILE * SIZE
    beyond = first + TILE * SIZE
    at, ok = n * groups + group, group < groups
    # Most tiles of a row need neither masks nor a search for single columns.
    whole = (SIZE == LANES) & (beyond <= width)
    for h in range(HIDDEN):
        hidden = tl.load(hidden_ptr + h)
        whole = whole & ((hidden < first) | (hidden >= beyond))
    if SHIFT:
        own = tl.load(own_ptr + n)
        whole = whole & ((own < first) | (own >= beyond))
    if whole:  # each branch computes its columns, as shared ones would stay in registers
        lane = tl.arange(0, LANES)
        x = columns(
            source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n,
            tl.arange(0, TILE)[:, None] * SIZE + lane[None, :], True,
            first, beyond, stride_row, stride_position, stride_column, width, temperature,
            NEAR, DOUBLE, 0, False, TEMPER, FLOOR, True,
        )  # fmt: skip
        keep(x, at, ok, peak_ptr, mass_ptr, tilt_ptr, TILT)
    else:
        lane = tl.arange(0, LANES)
        x = columns(
            source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n,
            tl.arange(0, TILE)[:, None] * SIZE + lane[None, :], (lane < SIZE)[None, :],
            first, beyond, stride_row, stride_position, stride_column, width, temperature,
            NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR, False,
        )  # fmt: skip
        keep(x, at, ok, peak_ptr, mass_ptr, tilt_ptr, TILT)


@triton.jit
def group_lse(peak, mass):
    """Return log-sum-exp of groups in float64, from their peak and mass."""
    return tl.where(mass == 0, float("-inf"), peak.to(tl.float64) + safe_log(mass))


@triton.jit
def contest(lse, group, first, seed, tag, position, step, row, GROUPS: tl.constexpr):
    """Return the winning key and group of one row; groups beyond the last one have no mass."""
    word = group_word(first + group, seed, tag, position, step, row)
    key = tl.where((lse == lse) & (lse > float("-inf")), lse + gumbel32(word), float("-inf"))
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, group, GROUPS), 0)


@triton.jit
def passing(running, target):
    """Return the first index whose running sum exceeds the target; if rounding leaves none, the last that adds mass."""
    last = tl.sum((running < tl.max(running, 0)).to(tl.int32), 0)
    return tl.minimum(tl.sum((running <= target).to(tl.int32), 0), last)


@triton.jit
def within(x, seed, tag, position, step, row):
    """Draw a column of a winning group with logits x by inverse CDF."""
    running = tl.cumsum(tl.exp(x - tl.max(x, 0)).to(tl.float64), 0)
    return passing(running, within_share(seed, tag, position, step, row) * tl.max(running, 0))
