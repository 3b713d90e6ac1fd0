"""Set every site to the denoiser's most probable token: a last step without randomness.

    z_i <- argmax_v D_i(v | z)

The step is deterministic, so its end law is not p0. ``when(lambda t: t > 1 / steps, Ancestral(), Greedy())`` uses it
in the last step only. On a masked process revealed tokens stay.
"""

from dataclasses import dataclass

import torch

from discdiff.operator import At, Predictor, State
from discdiff.samplers._choosing import believed, hidden

__all__ = ["Greedy"]


@dataclass(frozen=True)
class Greedy(Predictor):
    """Set the most probable token at every site, or at the hidden sites if noise hides tokens; one denoiser call.

    If there are no such sites, there is no call. Ties go to the lowest token id.
    """

    weighable = False

    def __call__(self, state: State, at: At) -> State:
        where = hidden(state, at) if at.process.absorbing else state.free
        if not bool(where.any()):
            return state.at(state.tokens, at.s)
        best = believed(at.predict(state)[where]).best().clamp(min=0)  # a GPU run goes on after a bad row
        tokens = at.process.column(state.tokens).masked_scatter(where, best)
        return state.at(torch.where(where, at.process.place(tokens, state.tokens), state.tokens), at.s)
