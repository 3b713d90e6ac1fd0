"""Batches of training data: random rows of an array, random windows of one long row, or a function's."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.checks import shown, token_ids, whole
from discdiff.process import Process

__all__ = ["Batches", "Rows", "batches_of"]

Batches = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Rows:
    """Data as an array, from which batches of rows or windows are drawn.

    Attributes:
        tokens: (N, M): N rows with M = L, or one long row, (1, M), from which windows are cut.
        length: L, the length of a drawn row.
    """

    tokens: Int[Tensor, "N M"]
    length: int

    def at(self, number: Int[Tensor, " B"]) -> Int[Tensor, "B L"]:
        """Return rows or windows (B, L) by their numbers (B,); window n begins at token n."""
        if self.tokens.shape[1] == self.length:
            return self.tokens[number]
        return self.tokens[0][number[:, None] + torch.arange(self.length)]

    def __len__(self) -> int:
        rows, width = self.tokens.shape
        return rows if width == self.length else width - self.length + 1

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """Draw ``count`` rows or windows with replacement, (B, L)."""
        return self.at(torch.randint(len(self), (count,), generator=generator))

    def spaced(self, most: int) -> Int[Tensor, "B L"]:
        """Return all rows or windows, (B, L), or ``most`` of them at even distances."""
        return self.at(torch.linspace(0, len(self) - 1, min(most, len(self))).long())

    @property
    def digest(self) -> str:
        """A fingerprint of the data."""
        return f"{hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]} {tuple(self.tokens.shape)}"


def batches_of(data: object, length: int | None, process: Process, name: str) -> Rows:
    """Return data (N, L), or one long row (N,) that is cut into windows of ``length`` tokens, as ``Rows``.

    Raises:
        TypeError: if the data are no array of whole numbers.
        ValueError: if they have a wrong shape, are too short, or hold ids that are not data tokens of the process.
    """
    if isinstance(data, str):
        raise TypeError(f"{name} must be an array of token ids, got a string; Vocabulary(text).encode(text) makes ids")
    if hasattr(data, "__next__") or hasattr(data, "dataset"):
        raise TypeError(
            f"{name} must be an array of token ids or a function of a torch.Generator, got {shown(data)}; the place in "
            "an iterator cannot be kept in a checkpoint"
        )
    if hasattr(data, "batches"):
        raise TypeError(
            f"{name} must be an array of token ids or a function, got {shown(data)}; give .batches(B) of it"
        )
    tokens = token_ids(data, name, "token ids").to("cpu", torch.int64).contiguous()
    if tokens.ndim not in (1, 2) or tokens.numel() == 0:
        raise ValueError(f"{name} must have shape (N, L), or (N,) for one long row, got {tuple(tokens.shape)}")
    long_row = tokens.ndim == 1
    if long_row and length is None:
        raise ValueError(f"{name} is one long row of {len(tokens)} tokens: give length=, the length of its windows")
    width = tokens.shape[-1] if length is None else whole(length, "Trainer: length", 1)
    if (width != tokens.shape[-1] and not long_row) or width > tokens.shape[-1]:
        had = f"{tokens.shape[-1]} tokens" if long_row else f"rows of {tokens.shape[-1]} tokens"
        raise ValueError(f"{name} has {had}, and length= is {width}; it must be {'shorter' if long_row else 'equal'}")
    rows = tokens.view(-1, tokens.shape[-1])
    process.check_data(rows, name)
    return Rows(rows, width)
