"""Restrict a network to the allowed tokens of each site."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from discdiff.checks import array
from discdiff.denoiser.base import Denoiser, check_denoiser

__all__ = ["Alphabets"]


class Alphabets:
    """A network's function restricted to the allowed tokens of each site: several vocabularies in one sequence.

    The joint vocabulary holds all alphabets side by side. The process must be absorbing. Other noise would have to
    differ between sites, and no process here supports that.

    Shapes: tokens x (B, L).

    Args:
        model: the denoiser whose function is restricted, on an absorbing process.
        allowed: (L, V), the tokens that each site may hold.

    Raises:
        ValueError: if the process is not absorbing, the shape is wrong, or a site allows no token.
    """

    def __init__(self, model: Denoiser, allowed: Bool[Tensor, "L V"]) -> None:
        if not check_denoiser(model, "Alphabets").process.absorbing:
            raise ValueError(f"Alphabets: needs an absorbing process, got {model.process}")
        allowed, size = array(allowed, "Alphabets: allowed"), model.process.vocab_size
        if allowed.ndim != 2 or allowed.shape[1] != size or allowed.dtype != torch.bool:
            raise ValueError(
                f"Alphabets: allowed must be (L, {size}), of bools, got {allowed.dtype} of {tuple(allowed.shape)}"
            )
        empty = (~allowed.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"Alphabets: site {empty[0]} may hold no token")
        self.fn, self.allowed = model.fn, allowed

    def __call__(self, x: Int[Tensor, "B L"], time: Tensor | None) -> Tensor:
        return self.fn(x, time).masked_fill(~self.allowed.to(x.device), -torch.inf)

    @property
    def frame(self) -> tuple[int, int] | None:
        """The ids of the start and end token that the wrapped function puts around sequences, or None."""
        return getattr(self.fn, "frame", None)

    @classmethod
    def of(cls, model: Denoiser, allowed: Bool[Tensor, "L V"]) -> Denoiser:
        """Return the same model with its function restricted to the ``allowed`` tokens."""
        return model.calling(cls(model, allowed))
