r"""Compute a chain's recursions over its sites without a Python step for every site.

Messages. Given a vector m_1, weights w_i for every site and a matrix A, the recursion

    f_i = m_i w_i / s_i,   s_i = sum(m_i w_i),   m_{i+1} = f_i A

takes L sequential steps; this is done if A differs from step to step. Otherwise a *blocked scan* divides the sites into
about sqrt(L) blocks of about sqrt(L) sites:

    1. the matrix of every block, prod_i diag(w_i) A, for all blocks at once
    2. the message at the beginning of every block, from block to block
    3. the messages inside, for all blocks at once

This takes 3 sqrt(L) Python steps instead of L, and O(L H^3) operations instead of O(L H^2). Extra memory is one matrix
for each block: O(sqrt(L) H^2), less than the messages if H < sqrt(L).

Messages do not underflow. Each row of a block's matrix is scaled by its own power of 2 at every site, without rounding.
A weight is rounded to 0 only if its ratio to the largest weight of its row is below the smallest positive number. In
the sequential loop it is rounded to 0 if its ratio to the largest weight of all rows is that small. So the scan keeps
every weight that the loop keeps.

Draws. A draw backwards along the chain is a map from the state of the next site to the state of a site; blocks of such
maps are composed in the same way.

References: prefix sums (Blelloch, 1990,
http://www.cs.cmu.edu/afs/cs.cmu.edu/project/scandal/public/papers/CMU-CS-90-190.html); hidden Markov models (Hassan,
Sarkka and Garcia-Fernandez, 2021, https://arxiv.org/abs/2102.05743).
"""

import math
from itertools import repeat

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.theory.oracles import pick

__all__ = ["messages", "path"]

# Measured on one core in float64, L = 1024, in microseconds a site. The loop takes 7 to 10; blocks take 2.1 (H = 8,
# B = 1), 4.3 (8, 16), 3.7 (32, 1), 7.6 (8, 32), 5.8 (32, 2), and 11.5 against the loop's 9.2 at (64, 1). Below 64 sites
# they are equal. With gradients the loop is used.
_SHORT = 64  # sites
_WORK = 2048  # B H^2
_TOGETHER = 1 << 17  # weights of maps drawn together: 1 MiB


def messages(
    weights: Float[Tensor, "B L H"], first: Float[Tensor, " H"], matrix: Float[Tensor, "*K H H"]
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B L"]]:
    """Compute messages m_{i+1} = (m_i w_i / s_i) A and totals s_i = sum(m_i w_i) for every site i, from m_1.

    If sum(m_i w_i) = 0 at a site, all later messages are 0. There and at all later sites s_i is the smallest normal
    number.

    Args:
        weights: (B, L, H) w_i, not negative.
        first: (H,) m_1, not negative.
        matrix: (H, H) A, not negative; row = from, column = to. Or (K, H, H) with K = L-1, one for each step.

    Returns:
        (B, L, H) messages, each up to a factor, and (B, L) totals, which are exact if the rows of A sum to 1.
    """
    batch, length, size = weights.shape
    start = first.expand(batch, size)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (weights, first, matrix))
    if length < _SHORT or batch * size**2 > _WORK or wanted or matrix.ndim == 3:
        return _in_order(weights, start, matrix)[:2]
    return _in_blocks(weights, start, matrix, math.isqrt(length))


def _in_order(weights: Tensor, start: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute messages (B, L, H), totals (B, L) and the message after the last site (B, H), one step for each site.

    If each step has a matrix of its own, the message after the last site is not moved further.
    """
    found, totals, least = [start], [], torch.finfo(weights.dtype).tiny
    each = repeat(matrix) if matrix.ndim == 2 else (*matrix, torch.eye(weights.shape[2]).to(matrix))
    for weight, step in zip(weights.unbind(1), each, strict=False):
        seen = found[-1] * weight
        totals.append(seen.sum(-1, keepdim=True).clamp(min=least))
        found.append((seen / totals[-1]) @ step)
    return torch.stack(found[:-1], 1), torch.cat(totals, 1), found[-1]


def _in_blocks(weights: Tensor, start: Tensor, matrix: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    batch, length, size = weights.shape
    inside = length // blocks
    body = blocks * inside
    beside = weights[:, :body].unflatten(1, (blocks, inside))
    starts = _starts(start, *_block_matrices(beside[:, :-1].flatten(0, 1), matrix))
    found, totals, behind = _in_order(beside.flatten(0, 1), starts, matrix)
    found, totals = found.view(batch, body, size), totals.view(batch, body)
    if body < length:
        rest, rest_totals, _ = _in_order(weights[:, body:], behind.view(batch, blocks, size)[:, -1], matrix)
        found, totals = torch.cat([found, rest], 1), torch.cat([totals, rest_totals], 1)
    return found, totals


def _block_matrices(weights: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the matrices of M blocks as rows (M, from, to) and powers (M, from).

    Row h of the matrices is rows[:, h] 2^powers[:, h]. During the product the blocks are the last axis, so that sums
    run over contiguous memory.
    """
    count, _, size = weights.shape
    columns = torch.eye(size).to(weights)[..., None].repeat(1, 1, count)  # (to, from, M)
    into, other = matrix.T.contiguous(), torch.empty_like(columns)
    powers = weights.new_zeros(size, count, dtype=torch.float64)
    lowest = math.frexp(torch.finfo(weights.dtype).tiny)[1]
    for weight in weights.permute(1, 2, 0).contiguous().unbind(0):
        columns *= weight[:, None]
        torch.mm(into, columns.view(size, -1), out=other.view(size, -1))
        power = torch.frexp(other.sum(0)).exponent.clamp_(min=lowest)
        torch.mul(other, torch.exp2(-power.to(other)), out=columns)
        powers += power
    powers.masked_fill_(columns.sum(0) == 0, -torch.inf)  # states without a possible path
    return columns.permute(2, 1, 0).contiguous(), powers.T.contiguous()


def _starts(start: Tensor, rows: Tensor, powers: Tensor) -> Tensor:
    """Compute the message at the beginning of each of C blocks, (B C, H), from the matrices of all but the last."""
    least, lowest = torch.finfo(start.dtype).tiny, torch.finfo(torch.float64).min
    batch, found = len(start), [start]
    each = (x.unflatten(0, (batch, -1)).unbind(1) for x in (rows, powers))
    for row, power in zip(*each, strict=True):
        mantissa, exponent = torch.frexp(found[-1])
        exponent = torch.where(mantissa > 0, power + exponent, -torch.inf)
        shared = mantissa * torch.exp2(exponent - exponent.amax(-1, keepdim=True).clamp_(min=lowest)).to(mantissa)
        message = (shared[:, None] @ row)[:, 0]
        found.append(message / message.sum(-1, keepdim=True).clamp_(min=least))
    return torch.stack(found, 1).flatten(0, 1)


def path(
    filtered: Float[Tensor, "B L H"], into: Float[Tensor, "*L H H"], last: Int[Tensor, " B"], u: Float[Tensor, "L B"]
) -> Int[Tensor, "B M"]:
    """Draw the states of L sites backwards from the last one, h_i ~ filtered_i(h) into(h_{i+1}, h).

    Args:
        filtered: (B, L, H) weights of each site's states given the sites before it.
        into: (H, H), row = the state of the next site; or (L, H, H) with one for each site.
        last: (B,) h_{L+1}.
        u: (L, B) a uniform number for each draw.

    Returns:
        (B, M) states with M = L + 1; the last one is ``last``. Depending on the sizes, the states are drawn in a
        loop or by composed maps, with the same result.
    """
    batch, length, size = filtered.shape
    if length < _SHORT or batch * size**2 > _WORK:
        drawn = [last]
        for i in reversed(range(length)):
            drawn.append(pick(filtered[:, i] * (into if into.ndim == 2 else into[i])[drawn[-1]], u[i]))
        return torch.stack(drawn[::-1], 1)
    together, maps = max(1, _TOGETHER // (batch * size**2)), []
    for begin in range(0, length, together):
        part = filtered[:, begin : begin + together, None] * (
            into if into.ndim == 2 else into[begin : begin + together]
        )
        each = u[begin : begin + together].T[..., None].expand(part.shape[:-1])
        maps.append(pick(part.flatten(0, 2), each.flatten()).view(each.shape))
    return torch.cat([_composed(torch.cat(maps, 1), last), last[:, None]], 1)


def _composed(maps: Int[Tensor, "B L H"], last: Int[Tensor, " B"]) -> Int[Tensor, "B L"]:
    """Compute the state of every site (B, L) from the state after the last site, (B,).

    The map of a site (H,) gives its state for each state of the next site.
    """
    batch, length, size = maps.shape
    inside = math.isqrt(length)
    blocks = -(-length // inside)
    same = torch.arange(size, device=maps.device).expand(batch, blocks * inside - length, size)
    each = torch.cat([maps, same], 1).unflatten(1, (blocks, inside)).unbind(2)
    found = [each[-1]]
    for one in reversed(each[:-1]):
        found.append(one.gather(-1, found[-1]))
    from_behind = torch.stack(found[::-1], 2)
    behind = [last[:, None]]
    for block in reversed(found[-1].unbind(1)[1:]):
        behind.append(block.gather(-1, behind[-1]))
    index = torch.cat(behind[::-1], 1)[..., None, None].expand(-1, -1, inside, -1)
    return from_behind.gather(-1, index).flatten(1)[:, :length]
