r"""Reveal masks one by one at their exact random times, one denoiser call each (first hitting).

With n masks left at survival probability alpha, the next is revealed at alpha' with

    P(no reveal until alpha') = ((1 - alpha') / (1 - alpha))^n,    so 1 - alpha' = (1 - alpha) exp(-E / n),  E ~ Exp(1)

The site is uniform among the masks, and its token is drawn from the prediction at alpha'. Every row has its own times;
rows that reveal nothing before s are left out of the call. On a masked process this simulates the model's reverse CTMC
exactly, as Gillespie's algorithm and uniformization do.

Reference: Zheng et al. (2024, https://arxiv.org/abs/2409.02908).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from discdiff.choices import Subset, Waiting
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import Process
from discdiff.samplers._choosing import check_masked, draw_clean, hidden
from discdiff.samplers.ancestral import Ancestral

__all__ = ["FirstHitting"]


@dataclass(frozen=True)
class FirstHitting(Predictor):
    """Reveal one mask per denoiser call, at its exact random time; the step size causes no error.

    On a process with noise tokens instead of a mask, the step to time 0 is ancestral. So make the grid's last step
    short.
    """

    order: ClassVar[float | None] = math.inf
    enumerable = False

    @property
    def nfe(self) -> float | None:
        return None  # L in all, for any number of steps

    def check(self, process: Process) -> None:
        check_masked(self, process)
        if process.schedule.sites is not None:
            raise ValueError(f"{self} needs one clock for all positions, got {process}")

    def __call__(self, state: State, at: At) -> State:
        if at.s == 0 and not at.process.masks:  # tokens equal to their noise token stay hidden
            return Ancestral()(state, at)
        schedule, tokens, turn = at.process.schedule, state.tokens, 1
        noise = 1 - at.process.sitewise(at.alpha(state.t), tokens[:, :1])[:, 0]  # 1 - alpha, row by row
        with torch.no_grad():
            end = 1 - at.process.sitewise(at.alpha(at.s), tokens[:, :1])[:, 0]
        rows = torch.arange(len(noise), device=tokens.device)
        while True:
            some = replace(state, tokens=tokens, seen=None).select(rows)
            masks = hidden(some, at)
            some, masks, rows = _pick(some, masks, rows, masks.any(-1))
            if not len(rows):
                return state.at(tokens, at.s)
            here = at.again(turn)
            wait = choose("wait", Waiting(rows), some, here)
            noise = noise.index_copy(0, rows, noise[rows] * torch.exp(-wait / masks.sum(-1)))
            some, masks, rows = _pick(some, masks, rows, noise[rows] > end[rows])
            if len(rows):
                where = choose("where", Subset(masks, 1), some, here)
                said = here.predict(some, schedule.time((1 - noise[rows]).clamp(min=0.0))[:, None])
                tokens = tokens.index_copy(0, rows, draw_clean(replace(some, seen=said), where, here))
            turn += 1


def _pick(
    state: State, masks: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor
) -> tuple[State, torch.Tensor, torch.Tensor]:
    """Return only the rows of state, masks and row numbers where ``keep`` is true."""
    which = keep.nonzero()[:, 0]
    return state.select(which), masks[which], rows[which]
