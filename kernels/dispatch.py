"""The only door to the kernels: argument checks, and the choice between torch and Triton by where the tensors are."""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from discdiff.kernels import reference
from discdiff.kernels.philox import BLOCKS, TAGS, philox

__all__ = ["TAGS", "draw", "philox", "uniforms"]

Backend = Literal["auto", "torch", "triton"]
_MAX_COLUMNS = reference.GROUP_SIZE * 4 * BLOCKS


def draw(
    logits: Tensor,  # (N, V) float
    *,
    seed: int,
    rows: Tensor,  # (N,) int64
    positions: Tensor,  # (N,) int64
    step: int = 0,
    tag: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Draw one column of each row with probability softmax(logits), as a function of where the draw is used.

    The token depends on (seed, row id, position, step, tag) and on the row of logits, not on N, on the order of the
    rows or on other rows. The algorithm is the specification in ``kernels/reference.py``.

    Args:
        logits: (N, V) unnormalised natural-log weights in any floating dtype; -inf excludes a column.
        seed: 64-bit key.
        rows: (N,) id of the sequence each row belongs to, in [0, 2**32).
        positions: (N,) position in the sequence, in [0, 2**32).
        step: step number, below 2**32.
        tag: which draw of the step this is, below 1024.
        backend: "torch", "triton" (on a GPU, or in the interpreter), or "auto": Triton for CUDA tensors.

    Returns:
        (N,) int64 columns; -1 for a row without mass or with a NaN or +inf (the caller knows the site's name).

    Raises:
        ValueError: for wrong shapes, dtypes or ranges.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"draw: logits must be a floating (N, V) tensor, got {got}")
    n, width = logits.shape
    if width < 1 or width > _MAX_COLUMNS:
        raise ValueError(f"draw: V must lie in 1..{_MAX_COLUMNS}, got {width}")
    for name, ids in (("rows", rows), ("positions", positions)):
        if ids.shape != (n,) or ids.dtype != torch.int64:
            raise ValueError(
                f"draw: {name} must be an int64 tensor of shape ({n},), got {ids.dtype} of {tuple(ids.shape)}"
            )
    _check_address(seed, step, tag)
    if backend == "auto":
        backend = "triton" if logits.is_cuda and importlib.util.find_spec("triton") else "torch"
    if backend == "torch":
        return reference.draw(logits, seed, rows, positions, step, tag)
    if backend == "triton":
        from discdiff.kernels import triton_draw  # imported here: triton comes with CUDA builds of torch only

        return triton_draw.draw(logits, seed, rows, positions, step, tag)
    raise ValueError(f"draw: unknown backend {backend!r}; accepted: 'auto', 'torch', 'triton'")


def uniforms(
    *,
    seed: int,
    rows: Tensor,  # (...) int64
    positions: Tensor,  # (...) int64, broadcast with rows
    step: int = 0,
    tag: int = 0,
) -> tuple[Tensor, Tensor]:
    """Two float64 uniforms in (0, 1) for each (row, position), functions of (seed, row, position, step, tag) alone."""
    _check_address(seed, step, tag)
    return reference.uniforms(seed, rows, positions, step, tag)


def _check_address(seed: int, step: int, tag: int) -> None:
    for name, value, end in (("seed", seed, 1 << 64), ("step", step, 1 << 32), ("tag", tag, TAGS)):
        if not 0 <= value < end:
            raise ValueError(f"random key: {name} must lie in [0, {end}), got {value}")
