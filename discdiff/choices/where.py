"""Choices of positions and times: subsets, rankings and waiting times, as Pyro distributions over a batch of rows."""

import itertools
import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import constraints

from discdiff.choices.choice import Choice, Key
from discdiff.choices.faults import AT_ONCE, Watch
from discdiff.kernels import dispatch as kernels

__all__ = ["Ranking", "Subset", "Waiting"]


class Subset(Choice):
    """A uniform subset of the free positions of each row, as a mask: ``size`` of them, or all if fewer are free.

    Args:
        free: (B, L) the free positions.
        size: the number to choose: the same for all rows, or (B,) with one for each row.
    """

    kind: ClassVar[torch.dtype] = torch.bool

    def __init__(self, free: Bool[Tensor, "B L"], size: int | Int[Tensor, " B"]) -> None:
        super().__init__(free.shape[0], (free.shape[1],), free.device)
        self.free = free
        self.size: Tensor = torch.minimum(torch.as_tensor(size, device=free.device), free.sum(-1))

    def _draw(self, key: Key) -> Bool[Tensor, "B L"]:
        u = kernels.coins(key, self.free.shape[1])[0].masked_fill(~self.free, 2.0)
        order = u.argsort(dim=-1, stable=True)
        chosen = torch.arange(u.shape[1], device=self.device) < self.size[:, None]
        return torch.zeros_like(self.free).scatter(-1, order, chosen)

    def _count(self) -> Float[Tensor, " B"]:
        """Return the log of the number of subsets of each row."""
        n, k = self.free.sum(-1).double(), self.size.double()
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        right = (value.sum(-1) == self.size) & ((value == 0) | (value == 1) & self.free).all(-1)
        return torch.where(right, -self._count(), -torch.inf)

    def entropy(self) -> Float[Tensor, " B"]:
        return self._count()

    def fork(self) -> tuple[Tensor, Tensor, Tensor]:
        patterns, kind = torch.cat([self.free, self.size[:, None]], -1).unique(dim=0, return_inverse=True)
        parents, values = [], []
        for index, pattern in enumerate(patterns):
            free, size = pattern[:-1].nonzero()[:, 0].tolist(), int(pattern[-1])
            subsets = torch.zeros(math.comb(len(free), size), self.free.shape[1], dtype=torch.bool)
            for subset, chosen in zip(subsets, itertools.combinations(free, size), strict=True):
                subset[list(chosen)] = True
            rows = (kind == index).nonzero()[:, 0]
            parents.append(rows.repeat_interleave(len(subsets)))
            values.append(subsets.to(self.free.device).repeat(len(rows), 1))
        parent = torch.cat(parents)
        return parent, torch.cat(values), -self._count()[parent]


class Ranking(Choice):
    r"""Positions drawn one after another without replacement, with probability proportional to their weight.

    This is the Plackett-Luce law: the order of log w + Gumbel noise, largest first. The value is (B, L): 0 for the
    first position, 1 for the second, and so on; -1 for positions that are not chosen.

    Args:
        log_weight: (B, L); -inf excludes a position.
        count: (B,) the number of positions to choose; all allowed positions if there are fewer.
    """

    def __init__(self, log_weight: Float[Tensor, "B L"], count: Int[Tensor, " B"]) -> None:
        super().__init__(log_weight.shape[0], (log_weight.shape[1],), log_weight.device)
        self.log_weight: Tensor = log_weight.double()
        self.count: Tensor = torch.minimum(count, (log_weight > -torch.inf).sum(-1))

    def _draw(self, key: Key) -> Int[Tensor, "B L"]:
        Watch(key.ids, self.faults).refuse(
            ~(self.log_weight < torch.inf), "a weight to choose a site by is NaN or +inf"
        )
        u = kernels.coins(key, self.log_weight.shape[1])[0]
        order = (self.log_weight - (-u.log()).log()).argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(u.shape[1], device=self.device).expand_as(order)
        return torch.full_like(order, -1).scatter(-1, order, rank.where(rank < self.count[:, None], -1))

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        right = ((value >= 0) & (self.log_weight > -torch.inf)).sum(-1) == self.count
        right &= (value >= -1).all(-1) & ((value >= 0).sum(-1) == self.count)
        left = self.log_weight.expand(value.shape)
        total = torch.zeros(value.shape[:-1], dtype=torch.float64, device=self.device)
        for rank in range(int(self.count.max()) if len(self.count) else 0):
            now, counts = value == rank, rank < self.count
            right &= (now.sum(-1) == 1) | ~counts
            share = torch.where(now, left, 0.0).sum(-1) - kernels.log_sum_exp(left)
            total = total + torch.where(counts & right, share, 0.0)
            left = left.masked_fill(now, -torch.inf)
        return torch.where(right, total, -torch.inf)

    def fork(self) -> tuple[Int[Tensor, " M"], Tensor, Float[Tensor, " M"]]:
        AT_ONCE.refuse(~(self.log_weight < torch.inf), "a weight to choose a site by is NaN or +inf")
        parent = torch.arange(len(self.log_weight), device=self.device)
        value, total = torch.full_like(self.log_weight, -1, dtype=torch.int64), torch.zeros(len(parent)).double()
        for rank in range(int(self.count.max()) if len(self.count) else 0):
            log_p = self.log_weight[parent].masked_fill(value >= 0, -torch.inf).log_softmax(-1)
            done = rank >= self.count[parent]
            log_p = torch.where(done[:, None], torch.where(torch.arange(log_p.shape[1]) == 0, 0.0, -torch.inf), log_p)
            row, position = (log_p > -torch.inf).nonzero(as_tuple=True)
            chosen = value[row]
            chosen[torch.arange(len(row)), position] = torch.where(
                done[row], chosen[torch.arange(len(row)), position], rank
            )
            parent, total, value = parent[row], total[row] + log_p[row, position], chosen
        return parent, value, total


class Waiting(Choice):
    """A waiting time for each row, (B,) float64, exponential with rate 1.

    ``rows`` (B,) gives only B and the device. Waiting times are real numbers, so they cannot be enumerated.
    """

    has_enumerate_support: bool = False
    kind: ClassVar[torch.dtype] = torch.float64

    def __init__(self, rows: Bool[Tensor, " B"] | Int[Tensor, " B"]) -> None:
        super().__init__(len(rows), (), rows.device)

    def _draw(self, key: Key) -> Float[Tensor, " B"]:
        return -kernels.coins(key, 1)[0][:, 0].log()

    def _log_prob(self, value: Float[Tensor, "*sample B"]) -> Float[Tensor, "*sample B"]:
        return torch.where(value >= 0, -value, -torch.inf)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.nonnegative

    def entropy(self) -> Float[Tensor, " B"]:
        return torch.ones(self.batch_shape, dtype=torch.float64, device=self.device)

    def fork(self) -> tuple[Tensor, Tensor, Tensor]:
        raise TypeError("a waiting time is a real number: its values cannot be listed")
