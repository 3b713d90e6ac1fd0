"""Draw noisy tokens for measurements; torch's global generator is left unchanged."""

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.checks import LAST_SEED, whole
from discdiff.process.base import Process

__all__ = ["noise", "noised"]


def noised(process: Process, x0: Int[Tensor, "B L"], t: float, seed: int) -> Int[Tensor, "B L"]:
    """Noise data (B, L) to time t for measurements; torch's global generator is left unchanged.

    Raises:
        TypeError, ValueError: if the seed is not a whole number of 64 bits.
    """
    seed = whole(seed, "seed", 0, LAST_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return process.marginal(x0, t).sample()


def noise(process: Process, batch: int, length: int, seed: int) -> Int[Tensor, "B L"]:
    """Draw (B, L) states from the prior for measurements; torch's global generator is left unchanged.

    Raises:
        TypeError, ValueError: if the seed is not a whole number of 64 bits.
    """
    seed = whole(seed, "seed", 0, LAST_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return process.prior(batch, length).sample()
