r"""Philox-4x32-10, the counter-based generator of all random numbers.

A 64-bit seed is the key. The counter is four 32-bit words, which encode where a random word is used. So a random word
does not depend on earlier draws. The counter words are

    c0 = kind (2 bits) | tag (10 bits) | column block (20 bits)
    c1 = position in the sequence
    c2 = slot in the step (12 bits) | step (20 bits)
    c3 = row id, given by the caller; a row keeps it in every sub-batch

One round, with ``hi`` and ``lo`` the halves of the 64-bit product:

    c0' = hi(0xCD9E8D57 c2) ^ c1 ^ k0      c1' = lo(0xCD9E8D57 c2)
    c2' = hi(0xD2511F53 c0) ^ c3 ^ k1      c3' = lo(0xD2511F53 c0)
    k0 += 0x9E3779B9                       k1 += 0xBB67AE85

The words equal those of Random123 and of ``triton.language.philox`` bit for bit.
Reference: Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405.
"""

from typing import TypeVar

import torch
from torch import Tensor

from discdiff.checks import whole

__all__ = ["BLOCKS", "COIN", "GROUP", "TAGS", "WITHIN", "counter", "philox", "rounds", "uniform53"]

W = TypeVar("W", int, Tensor)

# Kinds of use of a word. Two kinds at the same (tag, position, step, row) never share a word.
GROUP, WITHIN, COIN = 0, 1, 2
TAGS, BLOCKS = 1 << 10, 1 << 20

_LOW = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox(
    seed: int,
    c0: int | Tensor,  # (...) each counter word, broadcast together
    c1: int | Tensor,
    c2: int | Tensor,
    c3: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit random words for each counter.

    Args:
        seed: the key; its low 64 bits are used.
        c0, c1, c2, c3: counter words, integers or int64 tensors; their low 32 bits are used.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).

    Raises:
        TypeError: for a seed or a counter word that is no whole number.
        ValueError: for a counter word that is a tensor of floats or bools.
    """
    seed = whole(seed, "philox: seed")
    for word in (c0, c1, c2, c3):
        if isinstance(word, Tensor) and (word.is_floating_point() or word.dtype == torch.bool):
            raise ValueError(f"philox: a counter word must be of whole numbers, got {word.dtype}")
        if not isinstance(word, Tensor):
            whole(word, "philox: a counter word")
    words = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.int64) & _LOW for c in _to_one_device(c0, c1, c2, c3))
    )
    return rounds(seed & _LOW, (seed >> 32) & _LOW, *words)


def rounds(k0: int, k1: int, x0: W, x1: W, x2: W, x3: W) -> tuple[W, W, W, W]:
    """Return ``philox`` of words in [0, 2**32); counters x are tensors of one shape, or integers, which are faster."""
    for _ in range(10):
        # The product wraps modulo 2**64 in int64; both halves survive the wrap.
        p0, p2 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_2
        x0, x1, x2, x3 = (p2 >> 32) & _LOW ^ x1 ^ k0, p2 & _LOW, (p0 >> 32) & _LOW ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return x0, x1, x2, x3


def counter(kind: int, tag: int, block: int | Tensor = 0) -> int | Tensor:
    """Return the counter word c0 from kind, tag and column block."""
    return kind << 30 | tag << 20 | block


def uniform53(high: Tensor, low: Tensor) -> Tensor:
    """Make a float64 in (0, 1) from two words: (k + 1/2) / 2**53 with k their 53 leading bits."""
    return ((high << 21 | low >> 11).to(torch.float64) + 0.5) * 2.0**-53


def _to_one_device(*words: int | Tensor) -> tuple[int | Tensor, ...]:
    """Turn the integers among the words into tensors on the device of the tensors, unless that device is the CPU."""
    device = next((w.device for w in words if isinstance(w, Tensor)), None)
    if device is None or device.type == "cpu":
        return words
    # filled on the device: a copy from the host would synchronise
    return tuple(w if isinstance(w, Tensor) else torch.full((), w, dtype=torch.int64, device=device) for w in words)
