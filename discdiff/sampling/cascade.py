"""Two stages: the samples of the first sampler condition the second.

    y ~ p(y),    x ~ p(x | y)

For instance a coarse image and then a fine one, or a plan and then a text: the second denoiser takes y as an input.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import torch

from discdiff.checks import wholes
from discdiff.operator import alone, stream, under, while_listening
from discdiff.sampling.beginning import check_rows
from discdiff.sampling.blockwise import Blockwise
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples

__all__ = ["Cascade"]


class Cascade:
    """Two samplers in sequence: the second one's denoiser is called as fn(x, time, y) with the first one's tokens y.

    y is (B, L1), where L1 is the length of the first stage.

    Args:
        first: a ``Sampler`` or a ``Blockwise``.
        second: a ``Sampler``.

    Raises:
        TypeError: if ``first`` or ``second`` is anything else.
    """

    def __init__(self, first: Sampler | Blockwise, second: Sampler) -> None:
        if not isinstance(first, Sampler | Blockwise) or not isinstance(second, Sampler):
            raise TypeError(f"Cascade: takes a Sampler or Blockwise, then a Sampler; got {first!r}, {second!r}")
        self.first, self.second = first, second

    @while_listening(alone)
    def sample(
        self,
        batch: SupportsIndex,
        lengths: Sequence[SupportsIndex],
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        listen: bool = False,
        device: torch.device | str | None = None,
    ) -> tuple[Samples, Samples]:
        """Draw both stages; row b depends on (seed, first_row + b).

        Args:
            batch: B.
            lengths: the lengths of the first and of the second stage.
            seed: 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: id of the first row.
            listen: whether every choice is a Pyro site, as in ``Sampler.sample``; sites begin "first/" or "second/".
            device: where to sample; by default where the first model's parameters lie.

        Raises:
            TypeError, ValueError: unless ``lengths`` is two whole numbers >= 1, or if a stage refuses an argument.
        """
        batch, first_row = check_rows("sample", batch, first_row)
        lengths = wholes(lengths, "sample: lengths", 1)
        if len(lengths) != 2:
            raise ValueError(f"sample: lengths must be two, of the first stage and of the second, got {lengths}")
        with under("first", listen):
            drawn = self.first.sample(batch, lengths[0], seed=seed, first_row=first_row, listen=listen, device=device)
        device, model = drawn.tokens.device, self.second.model.with_condition(drawn.tokens, first_row)
        second = Sampler(self.second.process, model, self.second.operator, grid=self.second.grid)
        own = stream(drawn.seed, 2, 1)
        with under("second", listen):
            return drawn, second.sample(batch, lengths[1], seed=own, first_row=first_row, listen=listen, device=device)

    def __repr__(self) -> str:
        return f"Cascade({self.first}, {self.second})"
