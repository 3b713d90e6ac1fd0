"""Compute divergences between finite laws."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["entropy", "kl", "tv"]

_FAR = 1e-6  # tolerance of a law's sum: it may have been float32


def kl(p: Float[Tensor, " N"], q: Float[Tensor, " N"]) -> float:
    """Compute KL(p || q) = sum p log(p / q) of two laws (N,) in nats; infinite if q = 0 where p > 0.

    Raises:
        ValueError: if one of them is not a law, or their shapes differ.
    """
    p, q = _laws("kl", p, q)
    support = p > 0
    return float((p[support] * (p[support].log() - q[support].log())).sum())


def tv(p: Float[Tensor, " N"], q: Float[Tensor, " N"]) -> float:
    """Compute the total variation sum |p - q| / 2 of two laws (N,), in [0, 1].

    Raises:
        ValueError: if one of them is not a law, or their shapes differ.
    """
    p, q = _laws("tv", p, q)
    return float((p - q).abs().sum() / 2)


def entropy(p: Float[Tensor, " N"]) -> float:
    """Compute the entropy -sum p log p of a law (N,) in nats.

    Raises:
        ValueError: if ``p`` is not a law.
    """
    (p,) = _laws("entropy", p)
    support = p[p > 0]
    return float(-(support * support.log()).sum())


def _laws(where: str, *laws: Float[Tensor, " N"]) -> list[Float[Tensor, " N"]]:
    """Return the laws as tensors; raise ValueError for the first that is not a law."""
    tensors = [torch.as_tensor(law) for law in laws]
    for name, p in zip("pq", tensors, strict=False):
        if p.ndim != 1 or not len(p):
            raise ValueError(
                f"{where}: {name} must be a law, one probability for each outcome, got shape {tuple(p.shape)}"
            )
        if bool(p.isnan().any()):
            raise ValueError(f"{where}: {name} has a NaN at index {int(p.isnan().nonzero()[0])}; a law has none")
        if bool((p < 0).any()):
            index = int((p < 0).nonzero()[0])
            raise ValueError(f"{where}: {name} is {float(p[index]):g} at index {index}; probabilities are not negative")
        total = float(p.double().sum())
        if not abs(total - 1) <= _FAR:
            raise ValueError(f"{where}: {name} sums to {total:.9g}; a law sums to 1")
    if len({tuple(p.shape) for p in tensors}) > 1:
        told = " and ".join(str(tuple(p.shape)) for p in tensors)
        raise ValueError(f"{where}: laws over the same outcomes are compared, got shapes {told}")
    return tensors
