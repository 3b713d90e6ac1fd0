"""The address of random words, as one value that choices pass to kernels."""

import functools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from discdiff.kernels.philox_words import TAGS, rounds

__all__ = ["Key", "stream"]


@dataclass(frozen=True, eq=False)
class Key:
    """The address of one choice's random words.

    The value of a choice depends only on its law and its key.

    Attributes:
        seed: the run's 64-bit seed.
        ids: (B,) row ids in [0, 2**32), or one for each draw; a row keeps its id in every sub-batch.
        step, slot: the number of the step, and of the operator's slot within it. They take 20 and 12 bits of one word.
        turn: the repetition in a loop, counted from 1; 0 outside a loop.
        name: the choice's name, whose crc32 modulo 1024 is the tag; or the tag itself, a number.
    """

    seed: int
    ids: Tensor
    step: int = 0
    slot: int = 0
    turn: int = 0
    name: str | int = 0

    @classmethod
    def fresh(cls, batch: int, device: torch.device) -> "Key":
        """Make a key from torch's global generator, for draws outside a sampler."""
        return cls(int(torch.randint(2**62, ())), torch.arange(batch, device=device))

    def __getitem__(self, rows: Tensor | slice | tuple[slice, int | None]) -> "Key":
        """Return the key of some of the rows, by any index of ``ids``."""
        return Key(self.seed, self.ids[rows], self.step, self.slot, self.turn, self.name)

    @functools.cached_property
    def words(self) -> tuple[int, int, int]:
        """The seed of the turn, the word of slot and step, and the tag; a kernel needs only these and the ids."""
        tag = self.name if isinstance(self.name, int) else zlib.crc32(self.name.encode()) % TAGS
        return stream(self.seed, 0, self.turn), self.slot << 20 | self.step, tag

    @property
    def signed(self) -> tuple[int, int, int]:
        """The ``words`` with the seed as an int64, as Triton and torch take it."""
        seed, step, tag = self.words
        return seed - (seed >> 63 << 64), step, tag


@functools.lru_cache(maxsize=64)
def stream(seed: int, kind: int, n: int) -> int:
    """Return the seed of the n-th part of a run, where ``kind`` is 0 for turns of a loop, 1 for blocks, 2 for stages.

    Part 0 keeps the seed. The seeds of other parts are Philox words at counters of kind 3, which no choice uses; see
    ``philox_words`` for the kinds of counters.
    """
    if n == 0:
        return seed
    high, low, _, _ = rounds(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 3 << 30, n, kind, 0)
    return high << 32 | low
