"""Draws as one torch operation, ``torch.ops.discdiff.draw``, which a compiled graph contains as one node.

Under ``torch.compile`` the tracer uses its shapes and does not trace into it. Under autocast the input keeps its dtype,
since a draw has no matrix product. Outside a graph the plain functions are called directly.
"""

import torch
from torch import Tensor

__all__ = ["draw"]


_SCHEMA = "(Tensor logits, Tensor rows, Tensor positions, SymInt seed, SymInt step, SymInt tag) -> Tensor"


@torch.library.custom_op("discdiff::draw", mutates_args=(), schema=_SCHEMA)
def draw(logits: Tensor, rows: Tensor, positions: Tensor, *words: int) -> Tensor:
    """``dispatch.draw`` of an (N, V) tensor with the words seed, step and tag; the seed is a signed integer."""
    from discdiff.kernels import dispatch  # imported here, as it imports this file

    seed, step, tag = words
    return dispatch.draw(logits, seed=seed % 2**64, rows=rows, positions=positions, step=step, tag=tag)


@draw.register_fake
def _(logits: Tensor, rows: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(rows)
