r"""What keeps gradients right: one value with the derivatives of another, and the logarithm of 0.

A fast pass over rows knows no derivatives. Where they are wanted, the same rows are read a second time in plain torch,
and the value of the first reading is given the derivatives of the second, so that values do not depend on whether
gradients are wanted.

log 0 = -inf is a good log-probability, but 0 times its derivative is NaN. What is impossible does not change, so its
derivative here is 0.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["graft", "log", "log_add", "log_softmax", "log_sum_exp"]


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:  # noqa: ANN401
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401
        return None, slope


def graft(value: Tensor, path: Tensor) -> Tensor:
    """``value`` with the derivatives of ``path``, a tensor of its shape that is equal to it up to rounding."""
    return _Graft.apply(value.detach(), path)


def log(x: Tensor) -> Tensor:
    """log x, with derivative 0 where x is 0."""
    if not x.requires_grad:
        return x.log()
    nothing = x == 0
    return x.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf)


def log_sum_exp(x: Tensor) -> Tensor:
    """log sum exp x over the last axis, with derivative 0 in rows that are -inf throughout."""
    if not x.requires_grad:
        return x.logsumexp(-1)
    nothing = (x == -torch.inf).all(-1)
    return x.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, -torch.inf)


def log_softmax(x: Tensor) -> Tensor:
    """log softmax over the last axis; of narrow rows in float64, twice as fast as torch's own."""
    return x - log_sum_exp(x)[..., None]


def log_add(x: Tensor, y: Tensor) -> Tensor:
    """log(exp x + y) for y >= 0, with derivative 0 where both terms are 0."""
    if not (x.requires_grad or y.requires_grad):
        return torch.maximum((x.exp() + y).log(), x)  # where exp x underflows and y is 0, it is x
    y = log(y)
    nothing = (x == -torch.inf) & (y == -torch.inf)
    return torch.logaddexp(*(z.masked_fill(nothing, 0.0) for z in (x, y))).masked_fill(nothing, -torch.inf)
