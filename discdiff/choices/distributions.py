r"""The random choices an operator may make, as Pyro distributions over a batch of rows.

A choice is vectorised over the positions of a sequence: batch shape (B,), event shape (L,). Each class has three
operations: ``sample`` draws a value with keyed randomness, ``log_prob`` gives the log-probability of a value, and
``fork`` lists all possible values. ``discdiff.theory`` enumerates programs with ``fork``.

Sites that are not chosen keep a fixed value with log-probability 0, and their logits are never read.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices.choice import Choice, Key
from discdiff.choices.faults import AT_ONCE, BAD_LOGITS, Watch
from discdiff.choices.sites import Sites
from discdiff.kernels import dispatch as kernels

__all__ = ["Branch", "Choice", "Coins", "Key", "Noise", "Other", "PointMixture", "SiteWise", "Tokens"]


class SiteWise(Choice):
    """Independent random values at the positions; a subclass lists the values of each site in ``table``."""

    @abstractmethod
    def table(self) -> tuple[Float[Tensor, "B L K"], Tensor]:
        """Return the log-probabilities and the values of the K categories of each site, (B, L, K) each."""

    def fork(self) -> tuple[Int[Tensor, " M"], Tensor, Float[Tensor, " M"]]:
        log_p, value = self.table()
        batch, length, _ = log_p.shape
        AT_ONCE.refuse(log_p.sum(-1).isnan(), f"{type(self).__name__} has a NaN probability; {BAD_LOGITS}")
        parent = torch.arange(batch, device=log_p.device)
        values, total = value.new_empty(batch, 0), log_p.new_zeros(batch)
        for site in range(length):
            row, category = (log_p[parent, site] > -torch.inf).nonzero(as_tuple=True)
            parent = parent[row]
            values = torch.cat([values[row], value[parent, site, category][:, None]], -1)
            total = total[row] + log_p[parent, site, category]
        return parent, values, total

    def entropy(self) -> Float[Tensor, " B"]:
        log_p, _ = self.table()
        return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum((-1, -2))


class Coins(SiteWise):
    """An independent coin at each position: True with probability ``probs`` (B, L).

    Raises:
        ValueError: if a probability is NaN or outside [0, 1] when a value is drawn; the error names the site.
    """

    kind: ClassVar[torch.dtype] = torch.bool

    def __init__(self, probs: Float[Tensor, "B L"]) -> None:
        super().__init__(probs.shape[0], (probs.shape[1],), probs.device)
        self.probs = probs

    def _draw(self, key: Key) -> Bool[Tensor, "B L"]:
        heads, wrong = kernels.flips(self.probs, key)
        if wrong is not None:
            said = "the denoiser gave a probability that is not in [0, 1]: are there NaNs in the logits?"
            Watch(key.ids, self.faults).refuse(wrong, said)
        return heads

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        p = torch.where(value == 1, self.probs, self._tails)
        return p.masked_fill((value < 0) | (value > 1), 0.0).log().sum(-1)

    @property
    def _tails(self) -> Float[Tensor, "B L"]:
        return (1 - self.probs).clamp(min=0.0)  # rounding may leave probs above 1

    def table(self) -> tuple[Tensor, Tensor]:
        log_p = torch.stack([self._tails, self.probs], -1).log()
        return log_p, torch.tensor([False, True], device=log_p.device).expand_as(log_p)


class Tokens(SiteWise):
    r"""A token at each chosen site, drawn from the softmax of its logits; the other positions keep their token.

    Args:
        sites: the chosen sites and their logits; the logits may be computed when they are read.
        keep: (B, L) the tokens of the other positions.

    Raises:
        ValueError: if a row of logits that a draw reads has no mass, a NaN or +inf; the error names the site.
    """

    def __init__(self, sites: Sites, keep: Int[Tensor, "B L"]) -> None:
        super().__init__(keep.shape[0], (keep.shape[1],), keep.device)
        self.sites: Sites = sites
        self.keep: Tensor = keep

    def _draw(self, key: Key) -> Int[Tensor, "B L"]:
        where = self.sites.where
        drawn = self.sites.draw(key)
        replace(self.sites.watch, ids=key.ids, flags=self.faults).refuse(drawn < 0, BAD_LOGITS, where)
        return self.keep.masked_scatter(where, drawn.clamp(min=0))  # a GPU run continues, so its ids must be valid

    def __getstate__(self) -> dict[str, object]:
        """Pickle the logits themselves, because the functions that compute them may not be picklable."""
        rows = kernels.Rows.of(self.sites.rows.dense())
        return {**self.__dict__, "sites": Sites(self.sites.where, rows)}

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        where = self.sites.where
        # Gather before normalising: the rows of other sites would give NaN gradients.
        log_p = kernels.log_prob(self.sites.rows, value[..., where].movedim(-1, 0)).movedim(0, -1)
        fixed = torch.where(value == self.keep, 0.0, -torch.inf).to(log_p.dtype)
        return fixed.masked_scatter(where.expand(value.shape), log_p).sum(-1)

    def table(self) -> tuple[Tensor, Tensor]:
        where, logits = self.sites.where, self.sites.rows.dense()
        log_p = logits.new_full((*where.shape, logits.shape[-1]), -torch.inf)
        log_p[..., 0] = 0
        log_p = log_p.masked_scatter(where[..., None].expand(log_p.shape), logits.log_softmax(-1))
        category = torch.arange(logits.shape[-1], device=log_p.device).expand(log_p.shape)
        return log_p, torch.where(where[..., None], category, self.keep[..., None])


class Noise(NamedTuple):
    """A noise law over S states, with its running sums for draws.

    Attributes:
        pi: (S,) float64, the probabilities.
        cumulated: (S,) the running sums of pi.
        last: the last state with positive probability. Draws stop there, so rounding never picks a later state.
    """

    pi: Float[Tensor, " S"]
    cumulated: Float[Tensor, " S"]
    last: int

    @classmethod
    def of(cls, pi: Float[Tensor, " S"], device: torch.device) -> "Noise":
        """Move a law to a device and prepare it for draws."""
        return cls(pi.to(device), pi.cumsum(0).to(device), int(pi.nonzero()[-1]))


def _identity(x: Tensor) -> Tensor:
    return x


class PointMixture(SiteWise):
    r"""Law of a state at each position: one of K given points, or a draw from the noise law pi:

        P(v) = sum_k w_k 1(v = points_k) + (1 - sum_k w_k) pi(v).

    Forward marginals (one point, x0), posteriors of rank-one processes (two points, x_t and x_0) and priors (no point)
    have this form. A draw from this law needs no row of V probabilities.

    Args:
        pi: (S,) float64 noise law, or a ``Noise`` made from one.
        points: K tensors (B, L) of tokens.
        weights: K tensors (B, L), the probabilities of the points; at each position their sum is at most 1.
        shape, device: (B, L) and the device; needed if there are no points.
        place, column: ``place`` maps each index of pi, called a column, to its state; ``column`` maps each state to its
            column. Both keep the shape (..., B, L). By default both are the identity.
    """

    def __init__(
        self,
        pi: Float[Tensor, " S"] | Noise,
        points: Sequence[Int[Tensor, "B L"]],
        weights: Sequence[Float[Tensor, "B L"]],
        shape: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        place: Callable[[Tensor], Tensor] = _identity,
        column: Callable[[Tensor], Tensor] = _identity,
    ) -> None:
        batch, length = points[0].shape if shape is None else shape
        super().__init__(batch, (length,), points[0].device if points else torch.device(device))
        self.noise: Noise = pi if isinstance(pi, Noise) else Noise.of(pi, self.device)
        self.pi: Tensor = self.noise.pi
        self.points: tuple[Tensor, ...] = tuple(points)
        self.weights: tuple[Tensor, ...] = tuple(weights)
        self.place: Callable[[Tensor], Tensor] = place
        self.column: Callable[[Tensor], Tensor] = column

    def _draw(self, key: Key) -> Int[Tensor, "B L"]:
        u, v = kernels.coins(key, self.event_shape[0])
        value = self.place(torch.searchsorted(self.noise.cumulated[: self.noise.last], v, right=True))
        if self.points:  # where the weights sum to 1, rounding must not pick noise
            value = torch.where(self._rest() > 0, value, self.points[-1])
        threshold = torch.zeros_like(u)
        for point, weight in zip(self.points, self.weights, strict=True):
            value = torch.where((threshold <= u) & (u < threshold + weight), point, value)
            threshold = threshold + weight
        return value

    def like(self, points: Sequence[Tensor], weights: Sequence[Tensor]) -> "PointMixture":
        """Return the same noise law with other points and weights."""
        shape = (self.batch_shape[0], self.event_shape[0])
        return PointMixture(self.noise, points, weights, shape, self.device, self.place, self.column)

    def _rest(self) -> Float[Tensor, "B L"]:
        """Return the weight of the noise law: 1 minus the weights of the points."""
        rest = torch.ones(*self.batch_shape, *self.event_shape, dtype=torch.float64, device=self.device)
        for weight in self.weights:
            rest = rest - weight
        return torch.where(rest > 1e-15, rest, 0.0)  # a smaller rest is rounding

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        column = self.column(value)
        known = (column >= 0) & (column < len(self.pi))
        column = column.where(known, 0)
        p = self.pi[column] * (known & (self.place(column) == value)) * self._rest()
        for point, weight in zip(self.points, self.weights, strict=True):
            p = p + weight * (value == point)
        return p.log().sum(-1)

    def table(self) -> tuple[Tensor, Tensor]:
        columns = torch.arange(len(self.pi), device=self.device)
        states = self.place(columns[:, None, None].expand(-1, *self.batch_shape, *self.event_shape)).permute(1, 2, 0)
        p = self._rest()[..., None] * self.pi
        for point, weight in zip(self.points, self.weights, strict=True):
            p = p + weight[..., None] * (point[..., None] == states)
        return p.log(), states


class Other(SiteWise):
    """Noise at each chosen site, conditioned to differ from the current state; other positions keep their state.

    Args:
        noise: the noise law pi.
        x: (B, L) the states.
        where: (B, L) the chosen sites.
        anchored: (B, L) the probability of drawing the anchor instead of noise.
        anchor: (B, L) the anchor of each site, a state such as the mask, or None if the process has no anchor.
        place, column: as in ``PointMixture``.
    """

    def __init__(
        self,
        noise: Noise,
        x: Int[Tensor, "B L"],
        where: Bool[Tensor, "B L"],
        anchored: Float[Tensor, "B L"],
        anchor: Int[Tensor, "B L"] | None,
        place: Callable[[Tensor], Tensor] = _identity,
        column: Callable[[Tensor], Tensor] = _identity,
    ) -> None:
        super().__init__(x.shape[0], (x.shape[1],), x.device)
        self.noise: Noise = noise
        self.x: Tensor = x
        self.where: Tensor = where
        self.anchored: Tensor = anchored
        self.anchor: Tensor | None = anchor
        self.place: Callable[[Tensor], Tensor] = place
        self.own: Tensor = column(x)

    def _draw(self, key: Key) -> Int[Tensor, "B L"]:
        u, v = kernels.coins(key, self.x.shape[1])
        pi, running = self.noise.pi, self.noise.cumulated
        # the interval [below, below + pi(own)) of the own column is cut out of the range of v
        share, below = pi[self.own], torch.nn.functional.pad(running, (1, 0))[self.own]
        v = v * (running[-1] - share)
        v = torch.where(v < below, v, (v + share).clamp(min=running[self.own]))
        value = self.place(torch.searchsorted(running[: self.noise.last], v, right=True))
        if self.anchor is not None:
            value = torch.where(u < self.anchored, self.anchor, value)
        return torch.where(self.where, value, self.x)

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        p, states = self._probabilities()
        return torch.where(states == value[..., None], p, 0.0).sum(-1).log().sum(-1)

    def table(self) -> tuple[Tensor, Tensor]:
        p, states = self._probabilities()
        return p.log(), states

    def _probabilities(self) -> tuple[Tensor, Tensor]:
        columns = torch.arange(len(self.noise.pi), device=self.device)
        states = self.place(columns[:, None, None].expand(-1, *self.x.shape)).permute(1, 2, 0)
        own = columns == self.own[..., None]
        left = (1 - self.noise.pi[self.own])[..., None]
        p = (1 - self.anchored)[..., None] * torch.where(left > 0, self.noise.pi / left, 0.0) * ~own
        if self.anchor is not None:
            p = p + self.anchored[..., None] * (states == self.anchor[..., None])
        return torch.where(self.where[..., None], p, own.to(p)), states


class Branch(Choice):
    """One of K branches for each row, with probabilities ``weights`` (K,); the value is the index of the branch."""

    def __init__(self, weights: Float[Tensor, " K"], batch: int) -> None:
        super().__init__(batch, (), weights.device)
        self.weights = weights

    def _draw(self, key: Key) -> Int[Tensor, " B"]:
        u = kernels.coins(key, 1)[0][:, 0]
        return torch.searchsorted(self.weights.cumsum(0)[:-1], u, right=True)

    def _log_prob(self, value: Int[Tensor, "*sample B"]) -> Float[Tensor, "*sample B"]:
        known = (value >= 0) & (value < len(self.weights))
        return self.weights.log()[value.where(known, 0)].where(known, -torch.inf)

    def fork(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, possible = self.batch_shape[0], self.weights.nonzero()[:, 0]
        parent = torch.arange(batch, device=self.device).repeat_interleave(len(possible))
        value = possible.repeat(batch)
        return parent, value, self.weights.log()[value]
