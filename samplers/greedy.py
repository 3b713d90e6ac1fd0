"""The most probable token of the denoiser at every site: an end without noise, for the last step.

    z_i <- argmax_v D_i(v | z)

It makes no choice, so the law it ends in is not p0; ``when(lambda t: t > 1 / steps, Ancestral(), Greedy())`` puts it
last. On a masked process tokens that are shown stay.
"""

from dataclasses import dataclass

import torch

from discdiff.handlers import At
from discdiff.operator import Predictor
from discdiff.samplers.choosing import believed_at, hidden
from discdiff.state import State

__all__ = ["Greedy"]


@dataclass(frozen=True)
class Greedy(Predictor):
    """Go to clean tokens at once; one denoiser call, none if no site is hidden. Ties go to the lowest id."""

    def __call__(self, state: State, at: At) -> State:
        where = hidden(state, at) if at.process.absorbing else state.free
        if not bool(where.any()):
            return state.at(state.tokens, at.s)
        best = believed_at(at.predict(state), where).best().clamp(min=0)  # a GPU goes on to the end: with an id
        tokens = at.process.column(state.tokens).masked_scatter(where, best)
        return state.at(torch.where(where, at.process.place(tokens, state.tokens), state.tokens), at.s)
