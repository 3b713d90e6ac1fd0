"""Distances between finite laws, in nats."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["entropy", "kl", "tv"]


def kl(p: Float[Tensor, " N"], q: Float[Tensor, " N"]) -> float:
    """KL(p || q) = sum p log(p / q) in nats; infinite where q misses a part of p."""
    p, q = torch.as_tensor(p), torch.as_tensor(q)
    support = p > 0
    return float((p[support] * (p[support].log() - q[support].log())).sum())


def tv(p: Float[Tensor, " N"], q: Float[Tensor, " N"]) -> float:
    """Total variation, sum |p - q| / 2, in [0, 1]."""
    return float((torch.as_tensor(p) - torch.as_tensor(q)).abs().sum() / 2)


def entropy(p: Float[Tensor, " N"]) -> float:
    """-sum p log p in nats."""
    p = torch.as_tensor(p)
    support = p[p > 0]
    return float(-(support * support.log()).sum())
