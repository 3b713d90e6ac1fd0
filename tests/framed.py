"""A small network between a start and an end token, and its convention."""

from typing import Any

import torch
from torch import Tensor, nn

import discdiff as dd

START, END = 5, 6


class Network(nn.Module):
    """Logits (B, N, 7) that depend on every token and its place; it keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.near = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        self.far = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        self.shown: list[Tensor] = []
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        self.shown.append(x)
        if time is not None:
            self.times.append(time)
        place = torch.arange(1, x.shape[1] + 1, dtype=torch.float64)
        return self.near[x] + (self.far[x] / place[:, None]).sum(1, keepdim=True)


def convention(**more: Any) -> dd.Convention:  # noqa: ANN401
    """Seven columns, of which the mask is none: 0 to 4 are words, 5 and 6 the ends."""
    process = dd.Masked(7, dd.Linear())
    return dd.Convention("mine", process, "denoiser", 7, ids="", frame=(START, END), **more)
