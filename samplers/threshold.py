"""Confidence thresholds: reveal every mask that the prediction is sure of, and at least one.

Reference: Fast-dLLM (Wu et al., 2025).
"""

from dataclasses import dataclass

import torch

from discdiff.distributions import Tokens
from discdiff.handlers import At, choose
from discdiff.operator import Predictor
from discdiff.process import Process
from discdiff.samplers.choosing import best, check_masked, confidence, hidden
from discdiff.state import State

__all__ = ["Threshold"]


@dataclass(frozen=True)
class Threshold(Predictor):
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
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Threshold: threshold must lie in [0, 1], got {self.threshold}")

    def check(self, process: Process) -> None:
        check_masked(self, process)

    def __call__(self, state: State, at: At) -> State:
        masks = hidden(state, at)
        if not bool(masks.any()):
            return state.at(state.tokens, at.s)
        prediction = at.predict(state)
        where = masks
        if at.s > 0:
            score = confidence("max_prob", masks, lambda: prediction)
            sure = score.exp() >= self.threshold
            where = sure | best(score, torch.ones_like(state.rows))
        return state.at(choose("token", Tokens(prediction.loo_at(where), state.tokens), state, at), at.s)
