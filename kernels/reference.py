r"""Define what every kernel computes, in plain torch on rows in memory.

A row of V logits is split into groups of 1024 columns. This number is part of the specification: tokens depend on it.
One reading of the row gives for every group, with m_g its largest logit,

    s_g = sum exp(l - m_g),     a_g = sum exp(l - m_g) (l - m_g)

These numbers give log-sum-exp, entropy, the largest logit and a draw. ``draw`` has two levels:

    group  = argmax_g  m_g + log s_g + G_g          G_g = -log(-log1p(-u_g)), one 32-bit uniform a group
    column = the first c of the group with  sum_{c' <= c} exp(l_c' - m_g) > v * sum over the group

The draw is exact and reads one group a second time. u_g is word g % 4 of the Philox call at column block g // 4, mapped
to min((w + 1/2) / 2**32, 1 - 2**-24). Small u win the race, and small u have full relative precision. v is a uniform of
53 bits. Group sums are float32 (float64 for float64 logits). Keys and the sums inside the winning group are float64,
because a float32 running sum loses every token of probability below 6e-8 after a likely one. Ties go to the lowest
column.

Groups are independent, so each shard of the vocabulary can run its own race and the largest key wins.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from discdiff.kernels.gradients import graft, log, log_sum_exp
from discdiff.kernels.keys import Key
from discdiff.kernels.philox_words import COIN, GROUP, WITHIN, counter, philox, uniform53

__all__ = [
    "GROUP_SIZE", "Race", "Reading", "contest", "draw", "group_size", "group_words", "gumbel32", "race", "read",
    "statistics", "threshold", "two_largest", "uniforms", "within",
]  # fmt: skip

GROUP_SIZE = 1024


@dataclass(frozen=True)
class Reading:
    """The results of one pass over N rows.

    Attributes:
        peak, mass, tilt: (N, G) for each group of logits l: m = max l, sum exp(l - m) and sum exp(l - m) (l - m). mass
            is NaN if the group holds a NaN or +inf; tilt is None if entropies were not requested.
        value: (N,) the logit of the requested column, -inf if it does not exist; None if not requested.
        argmax: (N,) the lowest column with the largest logit; None if not requested.
        runner_up: (N,) the largest logit of the other columns; None if not requested.
    """

    peak: Tensor
    mass: Tensor
    tilt: Tensor | None
    value: Tensor | None = None
    argmax: Tensor | None = None
    runner_up: Tensor | None = None

    @property
    def group_lse(self) -> Tensor:
        """The log-sum-exp of each group, (N, G) float64."""
        return self.peak.double() + log(self.mass.double())

    @functools.cached_property
    def log_sum_exp(self) -> Tensor:
        """The log-sum-exp (N,), float64; NaN for a row with a NaN or +inf, -inf for one without mass."""
        return self.group_lse[:, 0] if self.peak.shape[1] == 1 else log_sum_exp(self.group_lse)

    @property
    def log_prob(self) -> Tensor:
        """The log-probability of the requested column, (N,) float64; raises ValueError if none was requested."""
        if self.value is None:
            raise ValueError("log_prob: read(..., at=columns) was not asked for a column")
        return self.value.double() - self.log_sum_exp

    @property
    def entropy(self) -> Tensor:
        """The entropy in nats, (N,) float64; raises ValueError if it was not requested."""
        if self.tilt is None:
            raise ValueError("entropy: read(..., entropy=False) did not ask for it")
        share = (self.group_lse - self.log_sum_exp[:, None]).exp()
        empty = self.mass == 0
        mean = self.peak.double() + self.tilt.double() / self.mass.masked_fill(empty, 1.0).double()  # mean logit
        return self.log_sum_exp - torch.where(empty, 0.0, share * mean.masked_fill(empty, 0.0)).sum(-1)

    @property
    def max_prob(self) -> Tensor:
        """The largest probability, (N,) float64."""
        return (self.peak.amax(-1).double() - self.log_sum_exp).exp()

    @property
    def margin(self) -> Tensor:
        """The largest probability minus the second largest, (N,) float64; raises ValueError if it was not requested."""
        if self.runner_up is None:
            raise ValueError("margin: read(..., top=True) was not asked for the second largest")
        return self.max_prob - (self.runner_up.double() - self.log_sum_exp).exp()

    @property
    def joined(self) -> "Reading":
        """The reading with the groups of each row merged to one, in float64 and without entropies."""
        peak, total = self.peak.double().amax(-1, keepdim=True), self.log_sum_exp[:, None]
        empty = total == -torch.inf
        mass = (total.masked_fill(empty, 0.0) - peak.masked_fill(empty, 0.0)).exp().masked_fill(empty, 0.0)
        return Reading(peak, mass, None, self.value, self.argmax, self.runner_up)

    def subset(self, keep: Tensor) -> "Reading":
        """Return the reading of the rows that a mask or an index chooses."""
        return self._from([self], lambda parts: parts[0][keep])

    def along(self, path: "Reading") -> "Reading":
        """Return this reading with the derivatives of ``path``, another reading of the same rows."""
        return self._from([self, path], lambda parts: graft(*parts) if parts[1].requires_grad else parts[0])

    @classmethod
    def join(cls, readings: Sequence["Reading"]) -> "Reading":
        """Join the readings of consecutive rows."""
        return cls._from(readings, torch.cat)

    @classmethod
    def _from(cls, readings: Sequence["Reading"], make: Callable[[list[Tensor]], Tensor]) -> "Reading":
        def optional(name: str) -> Tensor | None:
            return None if getattr(readings[0], name) is None else make([getattr(r, name) for r in readings])

        peak, mass = (make([getattr(r, name) for r in readings]) for name in ("peak", "mass"))
        return cls(peak, mass, *map(optional, ("tilt", "value", "argmax", "runner_up")))


@dataclass(frozen=True)
class Race:
    """The result of a draw for N rows among the columns of one shard of the vocabulary.

    Attributes:
        key: (N,) float64, the key of the winning group; -inf without mass, NaN for a bad row.
        token: (N,) the column; -1 for a row without mass or with a NaN or +inf.
    """

    key: Tensor
    token: Tensor


def uniforms(key: Key, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent float64 uniforms in (0, 1) for each (row, position), from one Philox call of 128 bits.

    The positions (...) are broadcast with the key's ids.
    """
    seed, step, tag = key.words
    w0, w1, w2, w3 = philox(seed, counter(COIN, tag), positions, step, key.ids)
    return uniform53(w0, w1), uniform53(w2, w3)


def gumbel32(word: Tensor) -> Tensor:
    """Return a standard Gumbel variable in float64 from a 32-bit word; large values, which win a race, are precise."""
    u = ((word.to(torch.float64) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def group_size(width: int) -> int:
    """Return the number of columns of a group: 1024, or all of a narrower row."""
    return min(width, GROUP_SIZE)


def statistics(x: Tensor, tilt: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (peak, mass, tilt) of the groups of rows (N, V), each (N, G); a group without mass has -inf, 0 and 0."""
    n, width = x.shape
    size = group_size(width)
    groups = -(-width // size)
    if width < groups * size:
        x = torch.nn.functional.pad(x, (0, groups * size - width), value=-torch.inf)
    x = x.view(n, groups, size)
    peak = x.amax(-1)
    offset = x - peak.masked_fill(peak == -torch.inf, 0)[..., None]
    weight = offset.exp()
    # offsets below -87 add nothing; the clamp avoids 0 * -inf = NaN
    return peak, weight.sum(-1), (weight * offset.clamp_(min=-87)).sum(-1) if tilt else None


def read(x: Tensor, at: Tensor | None = None, top: bool = False, tilt: bool = True) -> Reading:
    """Return the reading of rows (N, V) in float32 or float64; ``at`` (N,) requests a column of each row."""
    value = argmax = runner_up = None
    if at is not None:
        known = (at >= 0) & (at < x.shape[1])
        value = x.gather(-1, at.where(known, 0)[:, None])[:, 0].masked_fill(~known, -torch.inf)
    if top:
        argmax, runner_up = two_largest(x)
    return Reading(*statistics(x, tilt), value, argmax, runner_up)


def two_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest column with the largest logit of each row (N, V), and the largest of its other logits."""
    argmax = x.argmax(-1)
    return argmax, x.scatter(-1, argmax[:, None], -torch.inf).amax(-1)


def group_words(key: Key, positions: Tensor, first: int, groups: int) -> Tensor:
    """Return the words (N, G) of groups first..first + groups - 1: word g % 4 of the Philox call at block g // 4."""
    seed, step, tag = key.words
    start, end = first // 4, -(-(first + groups) // 4)
    block = torch.arange(start, end, device=key.ids.device)
    words = philox(seed, counter(GROUP, tag, block), positions[:, None], step, key.ids[:, None])
    return torch.stack(words, -1).flatten(1)[:, first - 4 * start :][:, :groups]


def contest(lse: Tensor, key: Key, positions: Tensor, first_group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run the race among groups with log-sum-exp (N, G).

    Returns the winning keys, their groups, and the uniforms v for the draw within them, (N,) each.
    """
    best, group = (lse + gumbel32(group_words(key, positions, first_group, lse.shape[1]))).max(-1)
    seed, step, tag = key.words
    high, low, _, _ = philox(seed, counter(WITHIN, tag), positions, step, key.ids)
    return best, group, uniform53(high, low)


def within(x: Tensor, share: Tensor) -> Tensor:
    """Draw a column from each row of logits x (N, size) by inverse CDF, with the uniforms ``share`` (N,).

    A row is the group of columns that won its race. The first column is drawn whose running sum of exp(x - max)
    exceeds ``share`` times the whole sum.
    """
    weight = (x - x.amax(-1, keepdim=True)).exp_().double()
    total = weight.cumsum(-1)
    # v < 1, so v * total[-1] < total[-1] except by rounding; then the last column with mass is drawn.
    target = torch.minimum(share * total[:, -1], torch.nextafter(total[:, -1], total.new_zeros(())))
    return (total <= target[:, None]).sum(-1)


def race(
    x: Tensor,  # (N, V) float32 or float64
    key: Key,  # of N ids
    positions: Tensor,  # (N,) positions in the sequence
    first_group: int = 0,
) -> Race:
    """Run the race among the groups of rows x; their first group is group ``first_group`` of the vocabulary."""
    width = x.shape[1]
    size = group_size(width)
    best, group, share = contest(read(x, tilt=False).group_lse, key, positions, first_group)
    column = group[:, None] * size + torch.arange(size, device=x.device)
    chosen = x.gather(-1, column.clamp(max=width - 1)).masked_fill(column >= width, -torch.inf)
    token = first_group * GROUP_SIZE + group * size + within(chosen, share)
    return Race(best, torch.where(best > -torch.inf, token, -1))


def draw(x: Tensor, key: Key, positions: Tensor) -> Tensor:
    """Draw one column a row with probability softmax(x); -1 if the row has no mass or holds a NaN or +inf."""
    return race(x, key, positions).token


def threshold(x: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Return the least logit (N,) that a truncation of softmax(x) keeps; ties with it are kept.

    The truncation keeps the ``top_k`` most probable tokens. From this set it keeps the fewest most probable tokens
    that hold a share ``top_p`` of the set's mass. Of these few it drops the tokens with less than ``min_p`` times the
    largest probability.

    The least logit is found by bisection of the bits of its gap to the largest logit, so nothing is sorted. After 31
    halvings of the non-negative floats it is exact.
    """
    peak = x.amax(-1, keepdim=True)
    gap = (peak - x).to(torch.float32).where(x > -torch.inf, torch.inf)
    order = gap.view(torch.int32)  # non-negative floats have the order of their bits
    limit = torch.full((len(x), 1), torch.finfo(torch.float32).max, device=x.device)  # keeps all finite gaps
    if top_k is not None:
        limit = _least(order, torch.ones_like(gap, dtype=torch.float64), torch.full_like(limit, top_k).double())
    if top_p is not None:
        weight = torch.exp(-gap.double()).where(gap <= limit, 0.0)
        limit = torch.minimum(limit, _least(order, weight, top_p * weight.sum(-1, keepdim=True)))
    if min_p is not None:
        limit = limit.clamp(max=-math.log(min_p) if min_p > 0 else torch.finfo(torch.float32).max)
    return torch.where(gap <= limit, x, torch.inf).amin(-1)


def _least(order: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the least gap (N, 1) such that the columns with at most this gap have weights that reach the target.

    ``order`` holds the bits of each column's gap to the largest logit. If no gap suffices, the result is the largest
    finite float.
    """
    low = torch.zeros_like(target, dtype=torch.int32)
    high = torch.full_like(low, 0x7F7FFFFF)  # the largest finite float
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = weight.where(order <= middle, 0.0).sum(-1, keepdim=True) >= target
        low, high = torch.where(enough, low, middle + 1).clamp(max=0x7F7FFFFF), torch.where(enough, middle, high)
    return high.view(torch.float32)
