r"""Draw a whole step, keep half of its moves, and draw the other sites again from there, without extrapolation.

    stage 1   draw every site from its reverse marginal over the whole step, with the denoiser at the middle time; of
              the n sites that moved keep ceil(n / 2), chosen at random, and reset the others
    stage 2   if any site moved, call the denoiser again and draw every other site from its reverse marginal over the
              second half of the step

A single jump happens at a time that is uniform in the step. So on average half a step remains, in which the rates are
those after the jump. If two sites jump, one jump is drawn with the rates before the other jump, and one with the rates
after it. Hence the law of paths with up to two jumps is correct to second order, however strongly sites are coupled.
With many jumps in every step the method becomes two ancestral half-steps, at the same cost. No rate is negative, so
none is clipped, and the method can end at time 0. On a process that is not rank-one, slow modes make the rates at
pure noise singular; the step from pure noise is ancestral.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from discdiff.choices import Subset
from discdiff.operator import At, Predictor, Staged, State, choose
from discdiff.samplers._extrapolated import share
from discdiff.samplers.ancestral import Ancestral, reverse_step

__all__ = ["SplitLeap"]


def _singular(at: At) -> bool:
    """Return whether the step starts at pure noise of a process that is not rank-one, where rates are singular."""
    return at.process.rank_one is None and bool((torch.as_tensor(at.alpha(at.t)) == 0).any())


@dataclass(frozen=True)
class _Leap(Predictor):
    def __call__(self, state: State, at: At) -> State:
        if _singular(at):
            return replace(state, past=None)
        middle, _, _ = share(state, 0.5, at)
        moved = reverse_step(state, state.free, at, look=middle)
        jumped = moved.tokens != state.tokens
        keep = choose("keep", Subset(jumped, (jumped.sum(-1) + 1) // 2), state, at)
        return state.at(torch.where(keep, moved.tokens, state.tokens), middle)


@dataclass(frozen=True)
class _LookAgain(Predictor):
    def __call__(self, state: State, at: At) -> State:
        start = state.past
        assert start is not None  # ensured by Staged
        if _singular(at):
            return Ancestral()(replace(state, past=None), at)
        kept = state.tokens != start.tokens
        moved = kept.any(-1).nonzero()[:, 0]
        if not len(moved):
            return state.at(state.tokens, at.s)
        some = replace(state.select(moved), past=None)
        look, _, _ = share(state, 0.5, at)
        after = reverse_step(some, some.free & ~kept[moved], at, look=look)
        return state.at(state.tokens.index_copy(0, moved, after.tokens), at.s)


@dataclass(frozen=True)
class SplitLeap(Staged):
    """Draw a whole step, keep half of its moves, and draw the other sites again, given the kept moves.

    A step makes at most two denoiser calls. The method has order 2, however strongly sites are coupled.
    """

    order: ClassVar[float | None] = 2.0

    @property
    def stages(self) -> tuple[Predictor, Predictor]:
        return _Leap(), _LookAgain()
