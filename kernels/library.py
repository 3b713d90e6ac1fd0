"""Draws as one operation that torch knows, ``torch.ops.discdiff.draw``: a compiled graph holds it whole.

Under ``torch.compile`` the tracer sees its shapes and calls it as it is; under autocast its input is left in the dtype
it has, since nothing in a draw is a matrix product. Outside a graph the plain functions are called directly.
"""

import torch
from torch import Tensor

__all__ = ["draw"]


@torch.library.custom_op("discdiff::draw", mutates_args=())
def draw(logits: Tensor, rows: Tensor, positions: Tensor, seed: int, step: int, tag: int) -> Tensor:
    """``dispatch.draw`` of an (N, V) tensor; the seed as a signed integer."""
    from discdiff.kernels import dispatch  # which imports this file

    return dispatch.draw(logits, seed=seed % 2**64, rows=rows, positions=positions, step=step, tag=tag)


@draw.register_fake
def _(logits: Tensor, rows: Tensor, positions: Tensor, seed: int, step: int, tag: int) -> Tensor:
    return torch.empty_like(rows)
