"""The optimizer of a training run and the course of its learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Optimizing", "adamw", "decayed"]

Optimizing = Callable[[Iterable[nn.Parameter], int], tuple[torch.optim.Optimizer, Any]]
Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]
LEAST = 0.02  # the last learning rate, as a share of the highest


def adamw(
    parameters: Iterable[nn.Parameter], steps: int, rate: float, warmup: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Make AdamW and its learning rate, which rises for ``warmup`` steps and then falls on a cosine to 2 % of ``rate``.

    Step n of N has the rate times (n + 1) / (warmup + 1) before n = warmup, and times 0.02 + 0.98 (1 + cos(pi f)) / 2
    with f = (n - warmup) / (N - warmup) from there; n counts from 0.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)

    def factor(n: int) -> float:
        if n < warmup:
            return (n + 1) / (warmup + 1)
        along = min(1.0, (n - warmup) / max(1, steps - warmup))
        return LEAST + (1 - LEAST) * (1 + math.cos(math.pi * along)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def decayed(ema: float) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    """Return the update of averages a by weights w: d a + (1 - d) w with d = min(ema, n / (n + 10)) at step n.

    It takes all tensors at once, so that the number n is read from the device once a step.
    """

    @torch.no_grad()
    def update(averages: Tensors, weights: Tensors, number: torch.Tensor | int) -> None:
        n = int(number)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - min(ema, n / (n + 10)))

    return update
