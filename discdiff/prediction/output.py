"""The unconverted output of a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.kernels import dispatch as kernels

__all__ = ["Output", "unshifted"]


@dataclass(frozen=True)
class Output:
    """The unconverted output of a denoiser: (B, L, V) logits, or hidden states whose head has not run.

    Attributes:
        source: (B, L, V) logits, or (B, L, D) hidden states.
        width: V.
        head: maps hidden states (n, D) of some sites to logits (n, V).
        shift: whether the logits at position i predict position i + 1.
        suppress: columns that are never predicted.
        batch_rows: (R,) the selected batch rows of the source; all in order by default. A selection copies no logits.
        version: torch's count of in-place writes to the source at construction; None if torch does not count them.

    Raises:
        ValueError: when rows are requested after the source was written to.
    """

    source: Float[Tensor, "B L _"]
    width: int
    head: Callable[[Tensor], Tensor] | None = None
    shift: bool = False
    suppress: tuple[int, ...] = ()
    batch_rows: Int[Tensor, " R"] | None = None
    version: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counted = not self.source.is_inference()
        object.__setattr__(self, "version", self.source._version if counted else None)

    def rows(self, place: tuple[Int[Tensor, " N"], Int[Tensor, " N"]] | None = None) -> kernels.Rows:
        """Return rows of sites given by row and position (N,), or of all, unread; raises ValueError as the class."""
        self._refuse_rewritten()
        head = None if self.head is None else _as_convert(self.head)
        rows = kernels.Rows.at(self.source, place, self.width, int(self.shift), head, self.batch_rows)
        return replace(rows, hidden=self.suppress)

    def logits(self) -> Float[Tensor, "B L V"]:
        """Return all logits, for small sizes or if every site is needed; raises ValueError as the class."""
        self._refuse_rewritten()
        if self.head is None and not self.shift and not self.suppress and self.batch_rows is None:
            return self.source
        return self.rows().dense().view(-1, self.source.shape[1], self.width)

    def select(self, index: Int[Tensor, " R"]) -> "Output":
        """Return the output of chosen batch rows; raises ValueError as the class."""
        self._refuse_rewritten()
        return replace(self, batch_rows=index if self.batch_rows is None else self.batch_rows[index])

    def _refuse_rewritten(self) -> None:
        if self.version is not None and self.source._version != self.version:
            raise ValueError(
                "an earlier output of the denoiser was written to in place before it was read: the function must "
                "return a new tensor at every call, or a copy of its buffer, and nobody may edit what it returned"
            )


def unshifted(source: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
    """Move each output of (B, L, D) from position i to i + 1, which it predicts; position 0 keeps its own output."""
    return torch.cat([source[:, :1], source[:, :-1]], 1)


def _as_convert(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(head, torch.nn.Linear):
        return kernels.LinearHead(head.weight, head.bias)
    return lambda hidden, number: head(hidden)
