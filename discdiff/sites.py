"""The logits of chosen sites, read late and once.

An operator decides which sites change before it looks at a logit; what it hands on are the chosen sites and a recipe
for their rows, never a (B, L, V) tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.kernels import dispatch as kernels

__all__ = ["Sites"]


@dataclass(frozen=True)
class Sites:
    """N chosen sites of (B, L) and what is known of their logits.

    Attributes:
        where: (B, L) the chosen sites; their rows are in row-major order.
        rows: N rows of logits.
        reading: what reading them told, if they were read.
    """

    where: Bool[Tensor, "B L"]
    rows: kernels.Source
    reading: kernels.Reading | None = None

    @classmethod
    def computed(
        cls,
        where: Bool[Tensor, "B L"],
        function: Callable[[Int[Tensor, " n"]], Float[Tensor, "n C"]],
        width: int,
        dtype: torch.dtype = torch.float64,
    ) -> "Sites":
        """Sites whose rows a function makes from their numbers among the chosen ones, when they are read."""
        count = int(where.sum())
        return cls(where, kernels.Computed(function, width, torch.arange(count, device=where.device), dtype))

    def known(self, top: bool = False) -> kernels.Reading:
        """What one reading of the rows tells: log-sum-exp, entropy; with ``top`` the margin too."""
        return kernels.read(self.rows, top=top)

    def read(self, at: Int[Tensor, " N"]) -> "Sites":
        """The same sites after one reading, which also finds the log-probability of a column of each."""
        return replace(self, reading=kernels.read(self.rows, at=at))

    def narrow(self, where: Bool[Tensor, "B L"]) -> "Sites":
        """Those of the sites that ``where`` still chooses."""
        keep = where[self.where]
        known = None if self.reading is None else self.reading.subset(keep)
        return Sites(self.where & where, self.rows.subset(keep), known)

    def draw(self, seed: int, ids: Int[Tensor, " B"], step: int, tag: int) -> Int[Tensor, " N"]:
        """A column of each row by the key at its site; -1 for a row without mass or with a NaN or +inf."""
        row, position = self.where.nonzero(as_tuple=True)
        return kernels.draw(
            self.rows, seed=seed, rows=ids[row], positions=position, step=step, tag=tag, reading=self.reading
        )
