r"""The definition of every kernel, in plain torch.

``draw`` is a two-level categorical. The columns are split into groups of 1024, a number that belongs to the
specification: tokens depend on it. With m_g the largest logit of group g and s_g the sum of exp(logit - m_g),

    group  = argmax_g  m_g + log s_g + G_g          G_g = -log(-log1p(-u_g)), one 32-bit uniform a group
    column = the first c of the group with  sum_{c' <= c} exp(l_c' - m_g) > v * sum over the group

which is an exact categorical draw that reads the row once (and 1/groups of it again). u_g is word g % 4 of the Philox
call at column block g // 4, mapped to min((w + 1/2) / 2**32, 1 - 2**-24): the race is won by small u, and there the
grid keeps its full relative precision. v has 53 bits. Group sums are float32 (float64 for float64 logits); keys and
the sums inside the winning group are float64, because a float32 running sum loses every token below 6e-8 behind a
likely one. Ties go to the lowest column.
"""

import torch
from torch import Tensor

from discdiff.kernels.philox import COIN, GROUP, WITHIN, counter, philox, uniform53

__all__ = ["GROUP_SIZE", "draw", "gumbel32", "uniforms"]

GROUP_SIZE = 1024
_CHUNK = 1 << 20  # logits converted at a time: the only temporary, 4 MB


def uniforms(
    seed: int,
    rows: Tensor,  # (...) row ids
    positions: Tensor,  # (...) positions in the sequence, broadcast with rows
    step: int,
    tag: int,
) -> tuple[Tensor, Tensor]:
    """Two independent float64 uniforms in (0, 1) for each (row, position): one call gives 128 bits."""
    w0, w1, w2, w3 = philox(seed, counter(COIN, tag), positions, step, rows)
    return uniform53(w0, w1), uniform53(w2, w3)


def gumbel32(word: Tensor) -> Tensor:
    """A standard Gumbel in float64 from a 32-bit word, precise in the tail that wins a race."""
    u = ((word.to(torch.float64) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def draw(
    logits: Tensor,  # (N, V) any floating dtype, any strides; -inf is allowed
    seed: int,
    rows: Tensor,  # (N,) row ids
    positions: Tensor,  # (N,) positions in the sequence
    step: int,
    tag: int,
) -> Tensor:
    """One column a row, with probability softmax(logits); -1 where the row has no mass or holds a NaN or +inf."""
    n, width = logits.shape
    per_chunk = max(1, _CHUNK // max(width, 1))
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    for start in range(0, n, per_chunk):
        part = slice(start, start + per_chunk)
        tokens[part] = _draw_rows(logits[part], seed, rows[part], positions[part], step, tag)
    return tokens


def _draw_rows(logits: Tensor, seed: int, rows: Tensor, positions: Tensor, step: int, tag: int) -> Tensor:
    n, width = logits.shape
    groups = -(-width // GROUP_SIZE)
    size = GROUP_SIZE if groups > 1 else width  # trailing -inf columns of a lone group would change nothing
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    padded = torch.full((n, groups * size), -torch.inf, dtype=dtype, device=logits.device)
    padded[:, :width] = logits
    grouped = padded.view(n, groups, size)

    peak = grouped.amax(-1)  # (n, groups)
    safe_peak = peak.masked_fill(peak == -torch.inf, 0)  # an empty group: exp(-inf - 0) = 0
    mass = (grouped - safe_peak[..., None]).exp_().sum(-1)
    bad = (peak.amax(-1) == -torch.inf) | ~torch.isfinite(mass.sum(-1))

    block = torch.arange(-(-groups // 4), device=logits.device)
    words = philox(seed, counter(GROUP, tag, block), positions[:, None], step, rows[:, None])
    word = torch.stack(words, -1).view(n, -1)[:, :groups]  # word g % 4 of block g // 4
    key = safe_peak.double() + mass.double().log() + gumbel32(word)
    group = key.argmax(-1)

    index = torch.arange(n, device=logits.device)
    weight = (grouped[index, group] - safe_peak[index, group][:, None]).exp_().double()
    high, low, _, _ = philox(seed, counter(WITHIN, tag), positions, step, rows)
    total = weight.cumsum(-1)
    # v < 1 and total[-1] > 0, so v * total[-1] < total[-1] except by rounding: then the last column with mass is meant.
    target = torch.minimum(uniform53(high, low) * total[:, -1], torch.nextafter(total[:, -1], total.new_zeros(())))
    column = (total <= target[:, None]).sum(-1)
    return torch.where(bad, -1, group * size + column)
