"""Confidence thresholds: reveal every mask that the prediction is sure of, and at least one.

Reference: Fast-dLLM (Wu et al., 2025).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.checks import real
from discdiff.prediction import Prediction
from discdiff.samplers.choosing import best, confidence
from discdiff.samplers.sure import Sure

__all__ = ["Threshold"]


@dataclass(frozen=True)
class Threshold(Sure):
    """Reveal the masks whose largest probability reaches ``threshold``; at least one a row, and all in the last step.

    The schedule says nothing here: when all is revealed the remaining steps cost no call, so give as many steps as
    there are sites.

    Args:
        threshold: in [0, 1]; at 1 it is nearly one token a call.

    Raises:
        ValueError: for a threshold outside [0, 1].
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", real(self.threshold, "Threshold: threshold", "[0, 1]"))

    def pick(self, masks: Bool[Tensor, "B L"], prediction: Prediction) -> Bool[Tensor, "B L"]:
        score = confidence("max_prob", masks, lambda: prediction)
        one = torch.ones(len(masks), dtype=torch.int64, device=masks.device)
        return masks & (score.exp() >= self.threshold) | best(score, one)
