r"""Resampling of particles: which particle of its group each particle becomes a copy of.

With normalised weights w and P particles, every scheme gives particle i P w_i copies in expectation:

    multinomial   P independent draws from w
    stratified    one uniform in each of the P intervals [k/P, (k+1)/P) of the running sums of w
    systematic    the same, with one uniform for all intervals
    residual      floor(P w_i) copies of each particle, then independent draws from what is left of P w
    one           all become copies of one particle, drawn from w: particles are candidates for the next state

Reference: Douc, Cappe and Moulines (2005, https://arxiv.org/abs/cs/0507025).
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.choices.choice import Choice, Key
from discdiff.kernels import dispatch as kernels

__all__ = ["SCHEMES", "Ancestors", "Scheme"]

Scheme = Literal["systematic", "stratified", "residual", "multinomial", "one"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_ROUNDING = 1e-12


class Ancestors(Choice):
    """The ancestor of each of the P particles of a group, (G, P) numbers 0..P-1; one row stands for a group.

    Args:
        log_weight: (G, P) natural logs of the weights; -inf for a particle that gets no copy.
        scheme: "systematic", "stratified", "residual", "multinomial" or "one".

    Raises:
        ValueError: for another scheme.
    """

    def __init__(self, log_weight: Float[Tensor, "G P"], scheme: Scheme = "systematic") -> None:
        super().__init__(len(log_weight), (log_weight.shape[1],), log_weight.device)
        if scheme not in SCHEMES:
            raise ValueError(f"resample must be one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
        self.weight: Tensor = log_weight.double().softmax(-1)
        self.scheme = scheme

    def _draw(self, key: Key) -> Int[Tensor, "G P"]:
        size = self.event_shape[0]
        u, k = kernels.coins(key, size)[0], torch.arange(size, device=self.device)
        match self.scheme:
            case "multinomial":
                return _placed(self.weight, u)
            case "stratified":
                return _placed(self.weight, (k + u) / size)
            case "one":
                return _placed(self.weight, u[:, :1].expand(-1, size))
            case "systematic":
                return _placed(self.weight, (k + u[:, :1]) / size)
        sure, rest = self._residual()
        copies = torch.arange(size, device=self.device).expand_as(sure)
        ends = sure.cumsum(-1)
        first = torch.searchsorted(ends, copies.contiguous(), right=True).clamp(max=size - 1)
        return torch.where(k < ends[:, -1:], first, _placed(rest, u))

    def _residual(self) -> tuple[Int[Tensor, "G P"], Float[Tensor, "G P"]]:
        """Return the sure copies of each particle, and the law of each further ancestor."""
        share = self.weight * self.event_shape[0]
        sure = (share + _ROUNDING).floor()
        rest = (share - sure).clamp(min=0.0)
        total = rest.sum(-1, keepdim=True)
        return sure.long(), torch.where(total > 0, rest / total, self.weight)

    def _table(self) -> Float[Tensor, "G P P"]:
        """Return the law of each ancestor, where they are independent: rows are particles, columns their ancestors."""
        size = self.event_shape[0]
        k = torch.arange(size, device=self.device)
        if self.scheme == "multinomial":
            return self.weight[:, None].expand(-1, size, -1)
        if self.scheme == "stratified":
            begin, end = self._ends()
            return (torch.minimum(end, k[:, None] + 1) - torch.maximum(begin, k[:, None])).clamp(min=0.0)
        sure, rest = self._residual()
        ends = sure.cumsum(-1)
        copies = ((k[:, None] < ends[:, None]) & (k[:, None] >= (ends - sure)[:, None])).double()
        return torch.where(k[:, None] < ends[:, -1:, None], copies, rest[:, None])

    def _ends(self) -> tuple[Float[Tensor, "G 1 P"], Float[Tensor, "G 1 P"]]:
        """Return where the interval of each particle begins and ends, in units of 1 / P."""
        end = self.weight.cumsum(-1)
        end = (end / end[:, -1:] * self.event_shape[0])[:, None]
        return torch.nn.functional.pad(end, (1, 0))[..., :-1], end

    def _log_prob(self, value: Int[Tensor, "*sample G P"]) -> Float[Tensor, "*sample G"]:
        size = self.event_shape[0]
        known = ((value >= 0) & (value < size)).all(-1)
        value = value.clamp(0, size - 1)
        if self.scheme == "one":
            first = value[..., 0]
            p = self.weight.expand(*value.shape[:-2], *self.weight.shape).gather(-1, first[..., None])[..., 0]
            return torch.where(known & (value == value[..., :1]).all(-1), p, 0.0).log()
        if self.scheme == "systematic":
            k = torch.arange(size, device=self.device)
            begin, end = (x[:, 0].expand(value.shape).gather(-1, value) - k for x in self._ends())
            p = (end.amin(-1).clamp(max=1.0) - begin.amax(-1).clamp(min=0.0)).clamp(min=0.0)
            return torch.where(known, p, 0.0).log()
        table = self._table()
        each = table.expand(*value.shape[:-2], *table.shape).gather(-1, value[..., None])[..., 0]
        return torch.where(known, each.log().sum(-1), -torch.inf)

    def fork(self) -> tuple[Int[Tensor, " M"], Tensor, Float[Tensor, " M"]]:
        parent = torch.arange(len(self.weight), device=self.device)
        if self.scheme == "one":
            row, one = (self.weight > 0).nonzero(as_tuple=True)
            return row, one[:, None].expand(-1, self.event_shape[0]), self.weight[row, one].log()
        if self.scheme == "systematic":
            # between two neighbouring ends of intervals, taken modulo one step, all ancestors are the same
            ends = (self._ends()[1][:, 0] % 1.0).sort(-1).values
            cuts = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=1.0)
            width, middle = cuts.diff(dim=-1), (cuts[:, 1:] + cuts[:, :-1]) / 2
            row, cut = (width > _ROUNDING).nonzero(as_tuple=True)
            points = (
                torch.arange(self.event_shape[0], device=self.device) + middle[row, cut, None]
            ) / self.event_shape[0]
            value = _placed(self.weight[row], points)
            return row, value, width[row, cut].log()
        table, value, total = self._table(), parent[:, None][:, :0], torch.zeros_like(self.weight[:, 0])
        for particle in range(self.event_shape[0]):
            row, ancestor = (table[parent, particle] > 0).nonzero(as_tuple=True)
            total = total[row] + table[parent[row], particle, ancestor].log()
            value, parent = torch.cat([value[row], ancestor[:, None]], -1), parent[row]
        return parent, value, total


def _placed(weight: Float[Tensor, "G P"], points: Float[Tensor, "G P"]) -> Int[Tensor, "G P"]:
    """Return the particle in whose part of the running sums of the weights each point in [0, 1) lies."""
    sums = weight.cumsum(-1)
    found = torch.searchsorted((sums / sums[:, -1:])[:, :-1].contiguous(), points.contiguous(), right=True)
    last = (weight > 0).double().cumsum(-1).argmax(-1, keepdim=True)  # rounding never picks a particle behind it
    return torch.minimum(found, last)
