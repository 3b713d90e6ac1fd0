"""What the Triton kernels share: words, rows of logits on their way, the race among groups and the draw within one.

Written for the interpreter as well as the GPU: only built-in reductions, counter words cast to uint32 (a 64-bit word
would silently select Philox-4x64), no infinity taken from another.
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
    x, column, first, beyond, n, width, own_ptr, shift_ptr, floor_ptr, hidden_ptr, temperature,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What ``Rows`` does to columns first + column of row n, or of rows n[:, None]; all are less than ``beyond``.

    A single column is looked for only where it may be found: a comparison an element costs as much as a read of it.
    WHOLE says that all columns are inside the width.
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
    return tl.where(peak == float("-inf"), 0.0, tl.where(peak == float("inf"), 2e38, peak))


@triton.jit
def coins(seed, tag, position, step, row):
    """The two uniforms of a coin, kind 2."""
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
    """Logits of row n at columns first + column < beyond, as ``Rows`` says; -inf where they are not inside.

    Columns are told from the first, so that their offsets are parts of a load's instruction. NEAR says that they lie
    side by side, so that 32 bits hold these; WHOLE that all of them are inside.
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
    """(peak, mass, tilt) of the rows of a tile, the tilt only if TILT asks for it.

    exp2 is one instruction where exp is six; the subtraction comes first, so large logits lose nothing.
    """
    # The largest that is no NaN, which the mass tells: a GPU's maximum passes over NaN by itself.
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
    """Store the sums of groups."""
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
    """Sums of a tile of TILE groups of row n; a group has SIZE columns in LANES, a power of two."""
    group = tile * TILE + tl.arange(0, TILE)
    first = tile * TILE * SIZE
    beyond = first + TILE * SIZE
    at, ok = n * groups + group, group < groups
    # All but a few tiles of a row need neither masks nor a look at single columns.
    whole = (SIZE == LANES) & (beyond <= width)
    for h in range(HIDDEN):
        hidden = tl.load(hidden_ptr + h)
        whole = whole & ((hidden < first) | (hidden >= beyond))
    if SHIFT:
        own = tl.load(own_ptr + n)
        whole = whole & ((own < first) | (own >= beyond))
    if whole:  # each branch makes its columns: what both used would be kept in registers
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
    """log-sum-exp of groups in float64."""
    return tl.where(mass == 0, float("-inf"), peak.to(tl.float64) + safe_log(mass))


@triton.jit
def contest(lse, group, first, seed, tag, position, step, row, GROUPS: tl.constexpr):
    """The winning key and group of one row; groups beyond the last one have no mass."""
    word = group_word(first + group, seed, tag, position, step, row)
    key = tl.where((lse == lse) & (lse > float("-inf")), lse + gumbel32(word), float("-inf"))
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, group, GROUPS), 0)


@triton.jit
def passing(running, target):
    """The first place at which running sums exceed a target; by rounding none may, then the last that adds to them."""
    last = tl.sum((running < tl.max(running, 0)).to(tl.int32), 0)
    return tl.minimum(tl.sum((running <= target).to(tl.int32), 0), last)


@triton.jit
def within(x, seed, tag, position, step, row):
    """A column of a winning group, by inverse CDF."""
    running = tl.cumsum(tl.exp(x - tl.max(x, 0)).to(tl.float64), 0)
    return passing(running, within_share(seed, tag, position, step, row) * tl.max(running, 0))
