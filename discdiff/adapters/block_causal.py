r"""Run a decoder of the package transformers: each block attends to itself and to the cached blocks before it.

    i attends to j    j clean                 j noisy
    i clean           b(j) <= b(i)            never
    i noisy           b(j) <  b(i)            b(j) = b(i)

b(j) is the number of the block of token j. The table is passed to the decoder as ``attention_mask``, in transformers
4.57 and 5.

References: block diffusion (Arriola et al., 2025, https://arxiv.org/abs/2503.09573), as in LLaDA2 (inclusionAI, 2025,
https://arxiv.org/abs/2512.15745).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from discdiff.adapters.prefix import Prefix, left_padded
from discdiff.prediction import unshifted

__all__ = ["BlockCausal"]


class BlockCausal(nn.Module):
    """A decoder whose tokens attend to their own block and the blocks before it, with a cache of clean tokens.

    Shapes: tokens are (B, L) in a sequence, (B, n) in a block and (B, P) in a prefix. The lengths of prefixes are (B,).
    Logits are (B, L, C) or (B, n, C), for C columns. Block sizes are (B, 1).

    Args:
        network: a model of transformers that returns ``.logits`` and takes masks (B, 1, N, M) for N queries and
            M keys.
        block: the block size.
        shift: whether position i of the network predicts position i + 1. If so, logits are moved to the position that
            they predict. The first site of a block gets the logits at the last clean token before the block. No logits
            predict position 0, so it keeps the logits that the network returns there.
        longest: the largest number of tokens, for a network with a table of positions; None if there is no limit.

    Raises:
        ValueError: for a block size that is not positive, or for more tokens than ``longest``.
    """

    network: Any

    def __init__(self, network: nn.Module, block: int, shift: bool = False, longest: int | None = None) -> None:
        super().__init__()
        if block < 1:
            raise ValueError(f"BlockCausal: the block size must be positive, got {block}")
        self.network = network
        self.block: int = block
        self.shift: bool = shift
        self.longest: int | None = longest

    def forward(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        """Return the logits of a sequence; each site attends to its own block and the blocks before it.

        Raises:
            ValueError: for more tokens than the network takes.
        """
        self._check(x.shape[1])
        number = torch.arange(x.shape[1], device=x.device) // self.block
        sees = number <= number[:, None]
        logits = self.network(input_ids=x, attention_mask=self._additive(sees[None])).logits
        return unshifted(logits) if self.shift else logits

    def blocks_at_once(
        self, x0: Int[Tensor, "B L"], x: Int[Tensor, "B L"], time: None, block: int | Int[Tensor, "B 1"]
    ) -> Float[Tensor, "B L C"]:
        """Return the logits of all noisy blocks of ``x`` in one call, for likelihoods and training.

        Each noisy block attends to itself and to the clean tokens ``x0`` before it. ``block`` is the block size: a
        number for all rows, or one for each row, (B, 1).

        Raises:
            ValueError: for more tokens than the network takes.
        """
        self._check(x.shape[1])
        length, position = x.shape[1], torch.arange(x.shape[1], device=x.device).expand_as(x)
        clean, noisy = position // self.block, position // block
        behind = position[:, None, :] < (noisy * block)[:, :, None]
        own = noisy[:, None, :] == noisy[:, :, None]
        among = clean[:, None, :] <= clean[:, :, None]
        sees = torch.cat([torch.cat([among, torch.zeros_like(own)], 2), torch.cat([behind, own], 2)], 1)
        out = self.network(
            input_ids=torch.cat([x0, x], 1),
            attention_mask=self._additive(sees),
            position_ids=torch.cat([position, position], 1),
        )
        clean_said, said = out.logits[:, :length], out.logits[:, length:]
        if not self.shift:
            return said
        first = (position % block == 0)[..., None] & (position > 0)[..., None]
        return torch.where(first, unshifted(clean_said), unshifted(said))

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> Prefix:
        """Cache the first ``length`` tokens of each row; ``capacity`` is ignored, as the cache grows when needed.

        Raises:
            ValueError: for more tokens than the network takes.
        """
        from transformers import DynamicCache

        shown, real = left_padded(tokens, length)
        prefix = Prefix(DynamicCache(), real[:, :0].long(), tokens[:, :0])
        if shown.shape[1]:
            prefix.last = self._read(prefix, shown, real)[:, -1]
        return prefix

    def extend(self, prefix: Prefix, tokens: Int[Tensor, "B n"]) -> None:
        """Append a clean block to the prefix; the next ``evaluate`` puts it into the cache."""
        prefix.pending = torch.cat([prefix.pending, tokens], 1)

    def evaluate(self, prefix: Prefix, x: Int[Tensor, "B n"], time: None) -> Float[Tensor, "B n C"]:
        """Return the logits of a noisy block after the prefix.

        Raises:
            ValueError: for more tokens than the network takes.
        """
        pending, prefix.pending = prefix.pending, x[:, :0]
        shown = torch.cat([pending, x], 1)
        logits = self._read(prefix, shown, torch.ones_like(shown, dtype=torch.bool))
        prefix.seen = prefix.seen[:, : prefix.seen.shape[1] - x.shape[1]]
        prefix.kept.crop(-x.shape[1])  # removes the noisy tokens again
        said = logits[:, pending.shape[1] :]
        if not self.shift:
            return said
        if pending.shape[1]:
            prefix.last = logits[:, pending.shape[1] - 1]
        first = said[:, 0]
        if prefix.last is not None:
            first = torch.where((prefix.length > 0)[:, None], prefix.last, first)
        return torch.cat([first[:, None], said[:, :-1]], 1)

    def _check(self, length: int) -> None:
        if self.longest is not None and length > self.longest:
            raise ValueError(f"the network takes at most {self.longest} tokens, got {length}")

    def _read(self, prefix: Prefix, tokens: Tensor, real: Tensor) -> Tensor:
        """Append tokens to the prefix and return their logits; ``real`` is False at padding."""
        held = prefix.seen.shape[1]
        prefix.seen = torch.cat([prefix.seen, real.long()], 1)
        position = prefix.position
        if self.longest is not None and position.numel():
            self._check(int(position.max()) + 1)
        number = position // self.block
        sees = (number[:, None, :] <= number[:, held:, None]) & (prefix.seen[:, None, :] == 1)
        return self.network(
            input_ids=tokens,
            attention_mask=self._additive(sees),
            position_ids=position[:, held:],
            past_key_values=prefix.kept,
            use_cache=True,
        ).logits

    def _additive(self, sees: Bool[Tensor, "B N M"]) -> Float[Tensor, "B 1 N M"]:
        dtype = next(part.dtype for part in self.network.parameters() if part.is_floating_point())
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]
