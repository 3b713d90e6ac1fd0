"""The logits of chosen sites, read late and once.

An operator decides which sites change before it looks at a logit; what it hands on are the chosen sites and a recipe
for their rows, never a (B, L, V) tensor. Whatever it learns of those rows it learns here, where bad ones are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.faults import AT_ONCE, BAD_LOGITS, Watch
from discdiff.kernels import dispatch as kernels

__all__ = ["Sites"]


@dataclass(frozen=True)
class Sites:
    """N chosen sites of (B, L) and what is known of their logits.

    Attributes:
        where: (B, L) the chosen sites; their rows are in row-major order.
        rows: N rows of logits.
        reading: what reading them told, if they were read.
        watch: who is told of bad rows.
        empty: whether a row may be without mass, such as the rates of a state that is never left.

    Raises:
        ValueError: when a row is read that has no mass (unless it may), a NaN or +inf, naming row and position.
    """

    where: Bool[Tensor, "B L"]
    rows: kernels.Source
    reading: kernels.Reading | None = None
    watch: Watch = AT_ONCE
    empty: bool = False

    @classmethod
    def computed(
        cls,
        where: Bool[Tensor, "B L"],
        function: Callable[[Int[Tensor, " n"]], Float[Tensor, "n C"]],
        width: int,
        dtype: torch.dtype = torch.float64,
        watch: Watch = AT_ONCE,
        empty: bool = False,
    ) -> "Sites":
        """Sites whose rows a function makes from their numbers among the chosen ones, when they are read."""
        count = int(where.sum())
        rows = kernels.Computed(function, width, torch.arange(count, device=where.device), dtype)
        return cls(where, rows, None, watch, empty)

    def known(self, top: bool = False, entropy: bool = False) -> kernels.Reading:
        """What one reading of the rows tells: log-sum-exp; if asked, entropy, most probable column and margin."""
        return self._checked(kernels.read(self.rows, top=top, entropy=entropy))

    def best(self) -> Int[Tensor, " N"]:
        """The most probable column of each row, the lowest of equal ones."""
        column = kernels.best(self.rows)
        self._refuse(column < 0)
        return column

    def read(self, at: Int[Tensor, " N"]) -> "Sites":
        """The same sites after one reading, which also finds the log-probability of a column of each."""
        return replace(self, reading=self._checked(kernels.read(self.rows, at=at, entropy=False)))

    def dense(self) -> Float[Tensor, "N C"]:
        """The rows as they are, differentiable; in a run a row that is no law is refused."""
        rows = self.rows.dense()
        if self.watch.flags is not None:
            self._refuse(~rows.logsumexp(-1).isfinite())
        return rows

    def log_prob(self, columns: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The log-probability of a column of each row; float64."""
        log_p = kernels.log_prob(self.rows, columns).double()
        self._refuse(log_p.isnan())
        return log_p

    def log_probs(self, start: int, count: int) -> Float[Tensor, "n C"]:
        """The whole rows from number ``start`` on, at most ``count`` of them, normalised; float64."""
        log_p = kernels.log_softmax(self.rows.dense(slice(start, start + count)).double())
        self._refuse(log_p.isnan().any(-1), start)
        return log_p

    def narrow(self, where: Bool[Tensor, "B L"]) -> "Sites":
        """Those of the sites that ``where`` still chooses."""
        keep = where[self.where]
        known = None if self.reading is None else self.reading.subset(keep)
        return replace(self, where=self.where & where, rows=self.rows.subset(keep), reading=known)

    def draw(self, seed: int, ids: Int[Tensor, " B"], step: int, tag: int) -> Int[Tensor, " N"]:
        """A column of each row by the key at its site; -1 for a row without mass or with a NaN or +inf."""
        row, position = self.where.nonzero(as_tuple=True)
        return kernels.draw(
            self.rows, seed=seed, rows=ids[row], positions=position, step=step, tag=tag, reading=self.reading
        )

    def _checked(self, reading: kernels.Reading) -> kernels.Reading:
        total = reading.log_sum_exp
        self._refuse(total.isnan() if self.empty else ~total.isfinite())
        return reading

    def _refuse(self, wrong: Bool[Tensor, " n"], start: int = 0) -> None:
        self.watch.refuse(wrong, BAD_LOGITS, self.where, start)
