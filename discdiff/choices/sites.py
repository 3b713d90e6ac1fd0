"""Logits of chosen sites, read as late as possible and once.

An operator chooses the sites that change before it reads a logit. It passes on these sites and a recipe for their
rows of logits, never a (B, L, V) tensor. All reads go through this class, which refuses invalid rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices.faults import AT_ONCE, BAD_LOGITS, Watch
from discdiff.kernels import dispatch as kernels

__all__ = ["Sites", "spread"]


@dataclass(frozen=True)
class Sites:
    """N chosen sites of (B, L), with their logits or the results of reading them.

    Shapes: one value for each site (N,); rows of logits (N, C), or some of them (n, C) with their indices (n,); ids of
    batch rows (B,).

    Attributes:
        where: (B, L) the chosen sites; their rows are in row-major order.
        rows: N rows of logits.
        reading: the results of reading them, or None if not read.
        watch: reports bad rows.
        empty: whether a row may have no mass, such as the rates of a state that is never left.
        place: the batch row (N,) and the position (N,) of each site, or None if they have not been found yet.

    Raises:
        ValueError: in a read, for a row with a NaN or +inf, or without mass unless ``empty``; names row and position.
    """

    where: Bool[Tensor, "B L"]
    rows: kernels.Source
    reading: kernels.Reading | None = None
    watch: Watch = AT_ONCE
    empty: bool = False
    place: tuple[Int[Tensor, " N"], Int[Tensor, " N"]] | None = None

    @classmethod
    def computed(
        cls,
        where: Bool[Tensor, "B L"],
        function: Callable[[Int[Tensor, " n"]], Float[Tensor, "n C"]],
        width: int,
        dtype: torch.dtype = torch.float64,
        watch: Watch = AT_ONCE,
        empty: bool = False,
        place: tuple[Tensor, Tensor] | None = None,
        mixed: kernels.Mixed | None = None,
    ) -> "Sites":
        """Make sites whose rows a function computes when they are read, from their numbers among the chosen sites."""
        count = int(where.sum()) if place is None else len(place[0])
        rows = kernels.Computed(function, width, torch.arange(count, device=where.device), dtype, mixed)
        return cls(where, rows, None, watch, empty, place)

    def known(self, top: bool = False, entropy: bool = False, at: Int[Tensor, " N"] | None = None) -> kernels.Reading:
        """Read the rows once and return log-sum-exp.

        On request also the entropy, the most probable column and the margin, and the log-probability of the column
        ``at`` in each row.
        """
        reading = kernels.read(self.rows, at=at, top=top, entropy=entropy)
        total = reading.log_sum_exp
        self._refuse(total.isnan() if self.empty else ~total.isfinite())
        return reading

    def best(self) -> Int[Tensor, " N"]:
        """The most probable column of each row, the lowest of equal ones."""
        column = kernels.best(self.rows)
        self._refuse(column < 0)
        return column

    def dense(self) -> Float[Tensor, "N C"]:
        """Return the rows unnormalised and differentiable; in a run an invalid row is refused."""
        rows = self.rows.dense()
        if self.watch.flags is not None:
            self._refuse(~rows.logsumexp(-1).isfinite())
        return rows

    def log_prob(self, columns: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the log-probability of one column of each row; float64."""
        log_p = kernels.log_prob(self.rows, columns).double()
        self._refuse(log_p.isnan())
        return log_p

    def log_probs(self, start: int, count: int) -> Float[Tensor, "n C"]:
        """Return at most ``count`` whole rows from number ``start`` on, normalised; float64."""
        log_p = kernels.log_softmax(self.rows.dense(slice(start, start + count)).double())
        self._refuse(log_p.isnan().any(-1), start)
        return log_p

    def narrow(self, where: Bool[Tensor, "B L"]) -> "Sites":
        """Return those of the sites that ``where`` chooses too."""
        keep = where[self.where]
        known = None if self.reading is None else self.reading.subset(keep)
        place = None if self.place is None else (self.place[0][keep], self.place[1][keep])
        return replace(self, where=self.where & where, rows=self.rows.subset(keep), reading=known, place=place)

    def draw(self, key: kernels.Key) -> Int[Tensor, " N"]:
        """Draw a column of each row with the key at its site; -1 for a row without mass or with a NaN or +inf."""
        row, position = self.where.nonzero(as_tuple=True) if self.place is None else self.place
        return kernels.drawn(self.rows, key[row], position, self.reading)

    def _refuse(self, wrong: Bool[Tensor, " n"], start: int = 0) -> None:
        self.watch.refuse(wrong, BAD_LOGITS, self.where, start)


def spread(value: Float[Tensor, " N"], where: Bool[Tensor, "B L"], fill: float = -torch.inf) -> Float[Tensor, "B L"]:
    """Put N values (N,) at the N chosen sites of a (B, L) float64 tensor, and ``fill`` at the others."""
    return torch.full(where.shape, fill, dtype=torch.float64, device=where.device).masked_scatter(where, value.double())
