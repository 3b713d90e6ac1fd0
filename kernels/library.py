"""Register draws as one torch operation, ``torch.ops.discdiff.draw``, which is one node of a compiled graph.

Under ``torch.compile`` the tracer needs only the shapes of this operation and does not trace into it. Under autocast
the logits keep their dtype, since a draw has no matrix product. Outside a graph the plain functions are called
directly.
"""

import torch
from torch import Tensor

__all__ = ["draw"]


_SCHEMA = "(Tensor logits, Tensor rows, Tensor positions, SymInt seed, SymInt step, SymInt tag) -> Tensor"


@torch.library.custom_op("discdiff::draw", mutates_args=(), schema=_SCHEMA)
def draw(logits: Tensor, rows: Tensor, positions: Tensor, *words: int) -> Tensor:
    """Return ``dispatch.draw`` of an (N, V) tensor; ``words`` are seed, step and tag, the seed as a signed integer."""
    from discdiff.kernels import dispatch  # imported here, as it imports this file

    seed, step, tag = words
    return dispatch.draw(logits, seed=seed % 2**64, rows=rows, positions=positions, step=step, tag=tag)


@draw.register_fake
def _(logits: Tensor, rows: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(rows)
