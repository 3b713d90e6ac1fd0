r"""Restrict the tokens that sites may hold.

    O'(v) ~ O(v) 1(v is allowed at the site)

O is the leave-one-out prediction. On a process that is not absorbing, noisy states may hold other tokens; the samples
do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from discdiff.checks import array, wholes
from discdiff.denoiser import Guide
from discdiff.operator import GuideAt, State
from discdiff.prediction import Prediction
from discdiff.process import Process

__all__ = ["Allow", "Forbid"]


@dataclass(frozen=True)
class Forbid(Guide):
    """Guide that rules out some tokens at every site: ``model.guided(Forbid([3, 4]))``.

    Args:
        tokens: (n,) their ids.

    Raises:
        ValueError: for an id outside the vocabulary; in sampling, if a site is left without a token.
    """

    tokens: Sequence[int] | Int[Tensor, " n"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", wholes(self.tokens, "Forbid: tokens", 0))

    def check(self, process: Process) -> None:
        wrong = [token for token in self.tokens if token >= process.vocab_size]
        if wrong:
            raise ValueError(f"Forbid: tokens must be ids below {process.vocab_size}, got {wrong[0]}")

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        log_g = torch.zeros(prediction.process.vocab_size, dtype=torch.float64, device=prediction.x.device)
        log_g[list(self.tokens)] = -torch.inf
        return prediction.tilted(lambda row, position: log_g.expand(len(row), -1))


class Allow(Guide):
    """Guide that lets each site hold its allowed tokens alone, such as several vocabularies in one sequence.

    In ``Blockwise`` the sites of a block have their positions in the whole sequence.

    Args:
        mask: (L, V) bools, the tokens that each site may hold.

    Raises:
        TypeError: if ``mask`` is no array of bools.
        ValueError: for a mask of another vocabulary, or a site without tokens; in sampling, for another length.
    """

    def __init__(self, mask: Bool[Tensor, "L V"] | Sequence[Sequence[bool]]) -> None:
        self.mask: Tensor = array(mask, "Allow: mask")
        if self.mask.dtype != torch.bool:
            raise TypeError(f"Allow: mask must hold bools, got {self.mask.dtype}")
        if self.mask.ndim != 2:
            raise ValueError(f"Allow: mask must be (L, V), got {tuple(self.mask.shape)}")
        empty = (~self.mask.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"Allow: site {empty[0]} may hold no token; each site needs one True in mask")

    def check(self, process: Process) -> None:
        if self.mask.shape[1] != process.vocab_size:
            raise ValueError(f"Allow: mask must be (L, {process.vocab_size}), got {tuple(self.mask.shape)}")

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        blocks = at.run.before is not None
        end = prediction.x.shape[1] + (int(at.offset.max()) if blocks else 0)
        if end > len(self.mask) or (not blocks and end < len(self.mask)):
            raise ValueError(f"Allow: mask is for {len(self.mask)} sites, but the sequence has {end}")
        mask, offset = self.mask.to(prediction.x.device), at.offset
        return prediction.tilted(lambda row, position: mask[offset[row] + position].double().log())

    def __eq__(self, other: object) -> bool:
        return torch.equal(self.mask, other.mask) if isinstance(other, Allow) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.mask.shape)

    def __repr__(self) -> str:
        return f"Allow({tuple(self.mask.shape)} mask)"
