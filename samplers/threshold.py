"""Reveal every mask whose prediction is confident enough, and at least one (confidence threshold).

Reference: Fast-dLLM (Wu et al., 2025, https://arxiv.org/abs/2505.22618).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.checks import real
from discdiff.operator import At, State
from discdiff.samplers._choosing import best, confidence
from discdiff.samplers._sure import Sure

__all__ = ["Threshold"]


@dataclass(frozen=True)
class Threshold(Sure):
    """Reveal the masks whose largest probability reaches ``threshold``, but at least one in each row.

    The step to time 0 reveals all masks. The schedule does not set the number of revealed masks. Steps after all masks
    are revealed cost no call, so give as many steps as there are sites.

    Args:
        threshold: the least probability of a site's likeliest token, in [0, 1]; at 1 a call reveals about one token.

    Raises:
        ValueError: for a threshold outside [0, 1].
    """

    threshold: float = 0.9
    weighable = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", real(self.threshold, "Threshold: threshold", "[0, 1]"))

    def pick(self, state: State, masks: Bool[Tensor, "B L"], at: At) -> Bool[Tensor, "B L"]:
        score = confidence(state, masks, "max_prob", at)
        one = torch.ones(len(masks), dtype=torch.int64, device=masks.device)
        return masks & (score.exp() >= self.threshold) | best(score, one)
