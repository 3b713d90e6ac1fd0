"""Keep the clean prefixes of a batch in a cache of transformers."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Prefix", "left_padded"]


@dataclass
class Prefix:
    """Cache of clean tokens in C columns; rows are padded on the left, so that all end where the next block begins.

    Attributes:
        kept: the cache of transformers.
        seen: (B, C) with 1 for cached tokens and 0 for padding.
        pending: (B, n) clean tokens that the next evaluation adds to the cache.
        last: (B, V) logits at the last cached token; None if they were not computed.
    """

    kept: Any
    seen: Int[Tensor, "B C"]
    pending: Int[Tensor, "B n"]
    last: Float[Tensor, "B V"] | None = None

    @property
    def length(self) -> Int[Tensor, " B"]:
        """The number of cached tokens of each row, (B,), without pending ones."""
        return self.seen.sum(1)

    @property
    def position(self) -> Int[Tensor, "B C"]:
        """The positions of the cached tokens in their sequences, (B, C); 0 for padding."""
        return (self.seen.cumsum(1) - 1).clamp(min=0)

    def select(self, rows: Int[Tensor, " R"]) -> "Prefix":
        """Return the prefixes of the rows at indices (R,); indices may repeat."""
        kept = copy.deepcopy(self.kept)
        if self.seen.shape[1]:
            kept.batch_select_indices(rows)
        return Prefix(kept, self.seen[rows], self.pending[rows], None if self.last is None else self.last[rows])


def left_padded(
    tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"]
) -> tuple[Int[Tensor, "B C"], Bool[Tensor, "B C"]]:
    """Move the first ``length`` tokens of each row to the right end; also return a mask that is True at these tokens.

    Shapes: tokens (B, P), length (B,), both results (B, C) with C the largest length.
    """
    width = int(length.max()) if len(length) else 0
    column = torch.arange(width, device=tokens.device) - (width - length)[:, None]
    return tokens.gather(1, column.clamp(min=0)), column >= 0
