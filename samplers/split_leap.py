r"""A two-stage method without extrapolation: leap, keep half of what moved, look again.

    stage 1   draw every site's reverse marginal over the whole step, the denoiser told the time in its middle;
              of the n sites that moved keep ceil(n / 2), chosen at random, and put the others back
    stage 2   if any site moved, look again, and draw every site's reverse marginal over the second half of the step

Where nothing is clipped nothing can be lost: with one jump in a step the jump happened at a time that is uniform in it,
so what follows has half a step on average, with the rates after the jump; with two, they meet each other's rates. Hence
the law of paths with up to two jumps is right to second order, however strong the coupling. With many jumps in every
step it turns into two ancestral half-steps, which cost the same. Nothing has a negative rate, and it can end at time 0.
Where noise has no rank one its slow modes make the rates at pure noise singular: the step from there is ancestral.
"""

from dataclasses import dataclass, replace

import torch

from discdiff.events import Subset
from discdiff.handlers import At, choose
from discdiff.operator import Predictor, Staged
from discdiff.rank_one import RankOne
from discdiff.samplers.ancestral import Ancestral, reverse_step
from discdiff.samplers.extrapolated import share
from discdiff.state import State

__all__ = ["SplitLeap"]


def _singular(at: At) -> bool:
    """Whether the step leaves pure noise in which some modes of the noise process are slower than others."""
    return not isinstance(at.process, RankOne) and bool((torch.as_tensor(at.alpha(at.t)) == 0).any())


@dataclass(frozen=True)
class _Leap(Predictor):
    def __call__(self, state: State, at: At) -> State:
        if _singular(at):
            return replace(state, past=None)
        middle, _, _ = share(at, state.t, state, 0.5)
        moved = reverse_step(state, state.free, at, look=middle)
        jumped = moved.tokens != state.tokens
        keep = choose("keep", Subset(jumped, (jumped.sum(-1) + 1) // 2), state, at)
        return state.at(torch.where(keep, moved.tokens, state.tokens), middle)


@dataclass(frozen=True)
class _LookAgain(Predictor):
    def __call__(self, state: State, at: At) -> State:
        start = state.past
        assert start is not None  # Staged sees to it
        if _singular(at):
            return Ancestral()(replace(state, past=None), at)
        kept = state.tokens != start.tokens
        moved = kept.any(-1).nonzero()[:, 0]
        if not len(moved):
            return state.at(state.tokens, at.s)
        some = replace(state.select(moved), past=None)
        look, _, _ = share(at, state.t, state, 0.5)
        after = reverse_step(some, some.free & ~kept[moved], at, look=look)
        return state.at(state.tokens.index_copy(0, moved, after.tokens), at.s)


@dataclass(frozen=True)
class SplitLeap(Staged):
    """Order 2 at any coupling; at most two denoiser calls a step."""

    order = 2.0

    @property
    def stages(self) -> tuple[Predictor, Predictor]:
        return _Leap(), _LookAgain()
