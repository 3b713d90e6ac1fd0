r"""Make the choices of a reverse step at all sites with three Triton kernels.

The process is rank-one with constant noise. With z the token of a site, O its leave-one-out prediction and u_name its
uniform for the choice of that name, the choices are

    where   u_where  < bound                        before any logit is read
    accept  u_accept < 1 / (1 + O(z) / odds)        unless every proposed site is accepted
    data    u_data   < kept                         at accepted sites
    token   a draw from O                           where "data" is true
    noise   a draw from the noise law               at the other accepted sites

A choice depends on (seed, site, name), so the tokens equal those of an operator that makes these choices one by one. A
kernel's program ends at once if its site keeps its token, so logits are read only at sites that may change. Sites are
not compacted, no size returns to the host, and no shape depends on a draw. So a CUDA graph can contain the step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from discdiff.kernels.reference import group_size
from discdiff.kernels.rows import Rows
from discdiff.kernels.step_inputs import Step
from discdiff.kernels.triton_language import coins, columns, contest, group_lse, read, within
from discdiff.kernels.triton_rows import arguments

__all__ = ["step"]

_TILE = 4096  # columns that a program reads: large, as most programs find that their site is not read
_KEEP, _NOISE, _READ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["seed", "step", "tag_where", "tag_data"])
def _decide_kernel(
    id_ptr, place_ptr, bound_ptr, kept_ptr, code_ptr, count, seed, step, tag_where, tag_data,
    BLOCK: tl.constexpr, ACCEPT: tl.constexpr,
):  # fmt: skip
    """Make the choices of each site that need no logits: "where", and "data" unless ACCEPT."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = n < count
    row = tl.load(id_ptr + n, mask=ok, other=0).to(tl.uint32)
    place = tl.load(place_ptr + n, mask=ok, other=0).to(tl.uint32)
    u, _ = coins(seed, tag_where, place, step, row)
    where = u < tl.load(bound_ptr + n, mask=ok, other=0.0)
    if ACCEPT:
        code = tl.where(where, _READ, _KEEP)
    else:
        v, _ = coins(seed, tag_data, place, step, row)
        data = v < tl.load(kept_ptr + n, mask=ok, other=0.0)
        code = tl.where(where, tl.where(data, _READ, _NOISE), _KEEP)
    tl.store(code_ptr + n, code.to(tl.int8), mask=ok)


@triton.jit(do_not_specialize=["temperature"])
def _groups_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, code_ptr, peak_ptr, mass_ptr,
    stride_row, stride_position, stride_column, width, groups, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Store the sums of TILE groups of one site, if its logits are needed."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(code_ptr + n) == _READ:
        read(
            source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, peak_ptr, mass_ptr, mass_ptr,
            n, tl.program_id(1), stride_row, stride_position, stride_column, width, groups, temperature,
            SIZE, LANES, TILE, False, NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seed", "step", "tag_accept", "tag_data", "tag_token", "tag_noise", "temperature"])
def _finish_kernel(
    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, code_ptr, peak_ptr, mass_ptr,
    id_ptr, place_ptr, token_ptr, odds_ptr, kept_ptr, noise_ptr, out_ptr, bad_ptr,
    stride_row, stride_position, stride_column, width, groups, last, seed, step,
    tag_accept, tag_data, tag_token, tag_noise, temperature,
    SIZE: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, HALVINGS: tl.constexpr, ACCEPT: tl.constexpr,
    NEAR: tl.constexpr, DOUBLE: tl.constexpr,
    HIDDEN: tl.constexpr, SHIFT: tl.constexpr, TEMPER: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Make the remaining choices of one site, and store its state after the step."""
    n = tl.program_id(0).to(tl.int64)
    z = tl.load(token_ptr + n)
    code = tl.load(code_ptr + n).to(tl.int32)  # names must have the same type after both branches
    out = z
    wrong = tl.full((), 0, tl.int1)
    if code != _KEEP:
        row = tl.load(id_ptr + n).to(tl.uint32)
        place = tl.load(place_ptr + n).to(tl.uint32)
        data = code == _READ
        if code == _READ:
            group = tl.arange(0, GROUPS)
            here = group < groups
            peak = tl.load(peak_ptr + n * groups + group, mask=here, other=float("-inf"))
            mass = tl.load(mass_ptr + n * groups + group, mask=here, other=0.0)
            lse = group_lse(peak, mass)
            bad = tl.sum((lse != lse).to(tl.int32), 0) > 0
            top = tl.max(tl.where(lse == lse, lse, float("-inf")), 0)
            wrong = bad | (top == float("-inf"))
            accepted = True
            if ACCEPT:
                own = columns(
                    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n, z - z, z >= 0,
                    z, z + 1, stride_row, stride_position, stride_column, width, temperature,
                    NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR, False,
                )  # fmt: skip
                height = tl.where(wrong, 0.0, top)
                total = tl.sum(tl.where(lse == lse, tl.exp(tl.where(lse == lse, lse, height) - height), 0.0), 0)
                share = tl.exp(own.to(tl.float64) - height) / tl.where(total > 0, total, 1.0)
                u, _ = coins(seed, tag_accept, place, step, row)
                accepted = u < 1 / (1 + share / tl.load(odds_ptr + n))
                v, _ = coins(seed, tag_data, place, step, row)
                data = accepted & (v < tl.load(kept_ptr + n))
                code = tl.where(accepted, _NOISE, _KEEP)
            if data & (wrong == 0):
                _, winner = contest(lse, group, 0, seed, tag_token, place, step, row, GROUPS)
                lane = tl.arange(0, LANES)
                x = columns(
                    source_ptr, row_ptr, position_ptr, own_ptr, shift_ptr, floor_ptr, hidden_ptr, n,
                    lane, lane < SIZE, winner * SIZE, (winner + 1) * SIZE,
                    stride_row, stride_position, stride_column, width, temperature,
                    NEAR, DOUBLE, HIDDEN, SHIFT, TEMPER, FLOOR, False,
                )  # fmt: skip
                out = (winner * SIZE + within(x, seed, tag_token, place, step, row)).to(tl.int64)
        if (code == _NOISE) & (data == 0):
            _, v = coins(seed, tag_noise, place, step, row)
            low = tl.full((), 0, tl.int32)
            high = low + last
            for _ in range(HALVINGS):  # bisect for the number of cumulated masses before ``last`` not above v
                middle = (low + high) // 2
                passed = (low < high) & (tl.load(noise_ptr + middle) <= v)
                high = tl.where((low < high) & (passed == 0), middle, high)
                low = tl.where(passed, middle + 1, low)
            out = low.to(tl.int64)
    tl.store(out_ptr + n, out)
    tl.store(bad_ptr + n, wrong)


def step(rows: Rows, what: Step) -> tuple[Tensor, Tensor]:
    """Make all choices of a reverse step at N sites; ``rows`` are logits of their leave-one-out predictions O.

    Returns:
        (N,) states after the step, and (N,) a mask of the sites whose row was read and had no mass, a NaN or +inf.
    """
    count, device = len(rows), rows.device
    size = group_size(rows.width)
    groups, lanes = -(-rows.width // size), triton.next_power_of_2(size)
    tile = max(1, min(_TILE // lanes, triton.next_power_of_2(groups)))
    code = torch.empty(count, dtype=torch.int8, device=device)
    peak, mass = (torch.empty(count, groups, dtype=rows.dtype, device=device) for _ in range(2))
    out, bad = torch.empty(count, dtype=torch.int64, device=device), torch.empty(count, dtype=torch.bool, device=device)
    pointers, strides, flags = arguments(rows)
    key, names = what.keys["token"], ("where", "accept", "data", "token", "noise")
    where, accept, data, token, noise = (what.keys[name].words[2] if name in what.keys else 0 for name in names)
    assert what.bound is not None and what.kept is not None
    given = (what.tokens, what.bound if what.odds is None else what.odds, what.kept)
    tokens, odds, kept = (x.contiguous() for x in given)
    ids = key.ids.repeat_interleave(what.length, output_size=count)
    positions = torch.arange(what.length, device=device).repeat(len(key.ids))
    (seed, number, _), asks = key.signed, what.odds is not None
    with torch.cuda.device_of(rows.source):
        _decide_kernel[(triton.cdiv(count, 256),)](
            ids, positions, what.bound.contiguous(), kept, code, count, seed, number, where, data,
            BLOCK=256, ACCEPT=asks,
        )  # fmt: skip
        _groups_kernel[(count, triton.cdiv(groups, tile))](
            *pointers, code, peak, mass, *strides, rows.width, groups, rows.temperature,
            SIZE=size, LANES=lanes, TILE=tile, **flags,
        )  # fmt: skip
        _finish_kernel[(count,)](
            *pointers, code, peak, mass, ids, positions, tokens, odds, kept, what.noise, out, bad,
            *strides, rows.width, groups, what.last, seed, number, accept, data, token, noise, rows.temperature,
            SIZE=size, LANES=lanes, GROUPS=triton.next_power_of_2(groups), HALVINGS=max(1, what.last.bit_length()),
            ACCEPT=asks, **flags,
        )  # fmt: skip
    return out, bad
