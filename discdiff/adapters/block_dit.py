r"""The diffusion transformer of BD3LM and BlockGen, with a cache of clean tokens.

    i attends to j    j clean                 j noisy
    i clean           start(j) <= start(i)    never
    i noisy           j < start(i)            start(j) = start(i)

start(j) is the position where the block of token j begins. Clean tokens may have another block size than noisy ones. In
networks that are also autoregressive, clean blocks have size 1. The network gets no time, so the cache of clean tokens
stays valid while a block is denoised.

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
    """Cache of the keys and values of a batch's clean tokens, in C columns.

    Attributes:
        kept: for each layer its keys and its values, (B, H, C, D) each, with H heads of width D.
        position: (B, C) the position of the token in a column; a huge number marks an empty column.
        length: (B,) the number of cached tokens of a row, without pending ones.
        pending: (B, n) clean tokens that the next evaluation adds to the cache.
    """

    kept: list[list[Tensor]]
    position: Int[Tensor, "B C"]
    length: Int[Tensor, " B"]
    pending: Int[Tensor, "B n"]

    def select(self, rows: Int[Tensor, " R"]) -> "Memory":
        """Return the cache of the rows at indices (R,); indices may repeat."""
        kept = [[part[rows] for part in pair] for pair in self.kept]
        return Memory(kept, self.position[rows], self.length[rows], self.pending[rows])


class BlockTransformer(DiffusionTransformer):
    """Diffusion transformer whose sites attend to their own block and the blocks before it.

    ``forward`` evaluates a whole sequence.

    Shapes: tokens are (B, L) in a sequence, (B, n) in a block and (B, P) in a prefix. The lengths of prefixes are (B,).
    Logits are (B, L, C) or (B, n, C), for C columns. Block sizes are (B, 1).

    Args:
        rows, width, heads, depth, time_width: as in ``DiffusionTransformer``. If the network has a time input, the time
            is always 0.
        clean: the block size of clean tokens. In BD3LM, and in BlockGen with one block size, noisy tokens have the same
            block size.

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
        """Return the logits of all noisy blocks of ``x`` in one call, for likelihoods and training.

        Each noisy block attends to itself and to the clean tokens ``x0`` before it. ``block`` is the block size: a
        number for all rows, or one for each row, (B, 1).

        Raises:
            ValueError: if a block begins at a position that is not a multiple of ``clean``, the block size of ``x0``.
        """
        position = torch.arange(x.shape[1], device=x.device).expand_as(x)
        start = position // block * block
        self._whole(start)
        memory = self.prefill(x0[:, :0], torch.zeros_like(x0[:, 0]), 0)
        return self._after(memory, x0, x, noisy_at(position, start))

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> Memory:
        """Cache the first ``length`` tokens of each row; ``capacity`` is ignored, as the cache grows when needed.

        Raises:
            ValueError: if the length of a prefix is not a multiple of the block size ``clean``.
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
        """Append clean tokens to the prefix; the next evaluation puts them into the cache.

        Raises:
            ValueError: if the number of tokens is not a multiple of the block size ``clean``.
        """
        self._whole(torch.tensor(tokens.shape[1]))
        memory.pending = torch.cat([memory.pending, tokens], 1)

    def evaluate(self, memory: Memory, x: Int[Tensor, "B n"], time: None) -> Float[Tensor, "B n C"]:
        """Return the logits of a noisy block after the prefix."""
        begin = (memory.length + memory.pending.shape[1])[:, None]
        position = begin + torch.arange(x.shape[1], device=x.device)
        return self._after(memory, x[:, :0], x, noisy_at(position, begin.expand_as(position)))

    def _after(self, memory: Memory, clean: Tensor, x: Tensor, places: Places) -> Tensor:
        """Return the logits of noisy tokens x, which follow the cached, the pending and the ``clean`` tokens."""
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
        """Make the places of clean tokens: each attends to all tokens before the end of its own block."""
        return Places(position, (position // self.clean + 1) * self.clean, torch.zeros_like(position).bool())

    def _whole(self, count: Tensor) -> None:
        if bool((count % self.clean != 0).any()):
            raise ValueError(
                f"{type(self).__name__}: its clean tokens come in whole blocks of {self.clean}, got "
                f"{sorted(set(count.flatten().tolist()))[:4]}"
            )


class CausalBlockTransformer(BlockTransformer):
    """Block transformer with causal attention between clean tokens: BlockGen's network for several block sizes.

    ``forward`` evaluates a sequence as one block.

    Args:
        rows, width, heads, depth, time_width: as in ``BlockTransformer``.
        blank: the token to put at a site of pure noise: the mask, or any token if noise is uniform.
    """

    def __init__(self, rows: int, width: int, heads: int, depth: int, time_width: int | None, blank: int) -> None:
        super().__init__(rows, width, heads, depth, time_width, clean=1)
        self.block: int | None = None
        self.blank: int = blank

    def score(self, memory: Memory, x: Int[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        """Return the logits of p(x_i | prefix, x_{<i}) at each site i of a clean block, in one call of 2n queries."""
        position = (memory.length + memory.pending.shape[1])[:, None] + torch.arange(x.shape[1], device=x.device)
        return self._after(memory, x, torch.full_like(x, self.blank), noisy_at(position, position))
