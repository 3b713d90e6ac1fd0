r"""Reveal masks whose prediction is confident and has hardly changed since the step before (KLASS).

A mask is revealed if its largest probability reaches a threshold and KL(O_now || O_before) < kl, with O_before the
prediction of the step before.

Reference: KLASS (Kim et al., 2025, https://arxiv.org/abs/2511.05664), here with a history of one step.
"""

from dataclasses import dataclass, replace

import torch

from discdiff.checks import real
from discdiff.operator import At, Predictor, State
from discdiff.process import Process
from discdiff.samplers._choosing import believed, best, check_mask, compare, confidence, draw_clean, hidden, kl_rows

__all__ = ["KLStable"]


@dataclass(frozen=True)
class KLStable(Predictor):
    """Reveal the masks whose prediction is confident and stable; at least one a row, and all in the step to time 0.

    Args:
        threshold: a prediction is confident if its largest probability is at least this.
        kl: a prediction is stable if KL(this prediction || prediction of the step before) is below this, in nats.

    Raises:
        ValueError: for a threshold outside [0, 1] or a negative kl.
    """

    threshold: float = 0.9
    kl: float = 0.01
    remembers = True
    weighable = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", real(self.threshold, "KLStable: threshold", "[0, 1]"))
        object.__setattr__(self, "kl", real(self.kl, "KLStable: kl", "[0, inf)"))

    def check(self, process: Process) -> None:
        check_mask(self, process)

    def __call__(self, state: State, at: At) -> State:
        before, now = state.past, replace(state, past=None)
        masks = hidden(now, at)
        if not bool(masks.any()):
            return now.at(now.tokens, at.s)
        said, where = at.predict(now), masks
        now = replace(now, seen=said)
        if at.s > 0:
            score = confidence(now, masks, "max_prob", at)
            where = best(score, torch.ones_like(now.rows))
            sure = masks & (score.exp() >= self.threshold)
            if before is not None and bool(sure.any()):
                here, there = (believed(one.untruncated[sure]) for one in (said, at.predict(before)))
                where = where | sure.masked_scatter(sure, compare(here, there, kl_rows) < self.kl)
        after = now.at(draw_clean(now, where, at), at.s)
        return after.after(now, said)
