r"""The diffusion transformer of BD3LM and BlockGen, with a cache of clean tokens.

    i sees j          j clean                 j noisy
    i clean           start(j) <= start(i)    never
    i noisy           j < start(i)            start(j) = start(i)

start(j) is where the block of j begins. Clean tokens have blocks of their own, of one token in networks that are
autoregressive too. The network gets no time, so the cache of clean tokens stays valid while a block is denoised.

References: block diffusion (Arriola et al., 2025, https://arxiv.org/abs/2503.09573); BlockGen (Deschenaux and
Gulcehre, 2026, https://arxiv.org/abs/2606.02241).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.adapters.dit import DiffusionTransformer
from discdiff.demo.transformer import Places, clean_at, noisy_at

__all__ = ["BlockTransformer", "CausalBlockTransformer", "Memory"]

_NEVER = 2**30


@dataclass
class Memory:
    """Keys and values of the clean tokens of a batch, and the clean tokens still to be added.

    Attributes:
        kept: keys and values of each layer, (B, H, C, D).
        position: (B, C) the position whose keys a column holds; a huge number for an empty column.
        length: (B,) clean tokens of a row, without pending ones.
        pending: (B, n) tokens that the next call adds.
    """

    kept: list[list[Tensor]]
    position: Int[Tensor, "B C"]
    length: Int[Tensor, " B"]
    pending: Int[Tensor, "B n"]

    def select(self, rows: Int[Tensor, " R"]) -> "Memory":
        """Return the memory of the rows at indices (R,), which may repeat."""
        kept = [[part[rows] for part in pair] for pair in self.kept]
        return Memory(kept, self.position[rows], self.length[rows], self.pending[rows])


class BlockTransformer(DiffusionTransformer):
    """The network of the module docstring; ``forward`` evaluates a whole sequence, causal between blocks.

    Shapes: tokens (B, L), in a block (B, n), in a prefix (B, P) with lengths (B,); logits (B, L, C) or (B, n, C); block
    sizes (B, 1).

    Args:
        rows, width, heads, depth, time_width: as in ``DiffusionTransformer``; a time input is always 0.
        clean: the block size in which clean tokens attend to each other: that of the noisy blocks in BD3LM and in
            BlockGen with one block size.

    Raises:
        ValueError: for a block size below 1.
    """

    def __init__(self, rows: int, width: int, heads: int, depth: int, time_width: int | None, clean: int) -> None:
        super().__init__(rows, width, heads, depth, time_width, block=clean)
        if clean < 1:
            raise ValueError(f"BlockTransformer: clean must be a positive block size, got {clean}")
        self.clean = clean

    def blocks_at_once(
        self, x0: Int[Tensor, "B L"], x: Int[Tensor, "B L"], time: None, block: int | Int[Tensor, "B 1"]
    ) -> Float[Tensor, "B L C"]:
        """Return the logits (B, L, C) of all blocks in one pass, each noisy block after the clean ones before it.

        Likelihoods and training use it. ``x0`` are the clean tokens, ``x`` the noisy ones; ``block`` is the block size,
        one for all rows or one for each row (B, 1).

        Raises:
            ValueError: if a block begins inside a block of clean tokens.
        """
        position = torch.arange(x.shape[1], device=x.device).expand_as(x)
        start = position // block * block
        self._whole(start)
        memory = self.prefill(x0[:, :0], torch.zeros_like(x0[:, 0]), 0)
        return self._after(memory, x0, x, noisy_at(position, start))

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> Memory:
        """Cache the first ``length`` tokens of each row; the memory grows beyond any ``capacity``.

        Raises:
            ValueError: if a prefix does not consist of whole blocks of clean tokens.
        """
        self._whole(length)
        weight, heads = self.vocab_embed.embedding, self.heads
        none = weight.new_zeros(len(tokens), heads, 0, self.width // heads)
        column = torch.arange(tokens.shape[1], device=tokens.device)
        position = torch.where(column < length[:, None], column, _NEVER)
        kept = [[none, none] for _ in self.blocks]
        if tokens.shape[1]:
            places = self._clean_at(position)
            self._hidden(tokens, self._told(tokens, None), position, places.sees(places), kept)
        return Memory(kept, position, length, tokens[:, :0])

    def extend(self, memory: Memory, tokens: Int[Tensor, "B n"]) -> None:
        """Append a clean block to the prefix; the next call adds it to the cache.

        Raises:
            ValueError: if it does not consist of whole blocks of clean tokens.
        """
        self._whole(torch.tensor(tokens.shape[1]))
        memory.pending = torch.cat([memory.pending, tokens], 1)

    def evaluate(self, memory: Memory, x: Int[Tensor, "B n"], time: None) -> Float[Tensor, "B n C"]:
        """Return the logits of a noisy block after the prefix."""
        begin = (memory.length + memory.pending.shape[1])[:, None]
        position = begin + torch.arange(x.shape[1], device=x.device)
        return self._after(memory, x[:, :0], x, noisy_at(position, begin.expand_as(position)))

    def _after(self, memory: Memory, clean: Tensor, x: Tensor, places: Places) -> Tensor:
        """Return the logits of noisy tokens after the memory, pending tokens and more clean ones."""
        n, columns = memory.pending.shape[1], memory.position.shape[1]
        shown = torch.cat([memory.pending, clean], 1)
        before = memory.length[:, None] + torch.arange(shown.shape[1], device=x.device)
        both = self._clean_at(before).then(places)
        kept, told = [list(pair) for pair in memory.kept], self._told(x, None)
        seen = both.sees(clean_at(memory.position).then(both))
        h = self._hidden(torch.cat([shown, x], 1), told, both.position, seen, kept)
        if n:
            memory.kept = [[part[:, :, : columns + n] for part in pair] for pair in kept]
            memory.position = torch.cat([memory.position, before[:, :n]], 1)
            memory.length, memory.pending = memory.length + n, x[:, :0]
        return self.output_layer(h[:, shown.shape[1] :], told)

    def _clean_at(self, position: Int[Tensor, "B N"]) -> Places:
        """Make the places of clean tokens, which attend to all tokens before the end of their own block."""
        return Places(position, (position // self.clean + 1) * self.clean, torch.zeros_like(position).bool())

    def _whole(self, count: Tensor) -> None:
        if bool((count % self.clean != 0).any()):
            raise ValueError(
                f"{type(self).__name__}: its clean tokens come in whole blocks of {self.clean}, got "
                f"{sorted(set(count.flatten().tolist()))[:4]}"
            )


class CausalBlockTransformer(BlockTransformer):
    """A block transformer with causal clean tokens, as in BlockGen with several block sizes; a sequence is one block.

    Args:
        rows, width, heads, depth, time_width: as in ``BlockTransformer``.
        blank: the token at a site of pure noise: the mask, or any token if noise is uniform.
    """

    def __init__(self, rows: int, width: int, heads: int, depth: int, time_width: int | None, blank: int) -> None:
        super().__init__(rows, width, heads, depth, time_width, clean=1)
        self.block, self.blank = None, blank

    def score(self, memory: Memory, x: Int[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        """Return the autoregressive logits p(. | prefix, x_{<i}) of a clean block, in one call of 2n queries."""
        position = (memory.length + memory.pending.shape[1])[:, None] + torch.arange(x.shape[1], device=x.device)
        return self._after(memory, x, torch.full_like(x, self.blank), noisy_at(position, position))
