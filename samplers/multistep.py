r"""Multistep: the rates are extrapolated from the step before, so that one call a step is enough.

    R = ((1 + w) R_n - w R_{n-1})_+,      w = d_n / (2 d_{n-1})

with R_n the reverse rates at this state, R_{n-1} those at the state before, and d the steps' lengths in alpha: the
Adams-Bashforth rule of order 2. Like the theta-trapezoid it is of order 2 while nothing is clipped, and of order 1
where jumps make other jumps much less likely. The first step, and those at an end of time where rates are infinite,
have no extrapolation.

With equal steps a rate is clipped where a jump of the step before divided it by more than 3. Such jumps have
probability O(h), and what is clipped is a jump of probability O(h) in this step: an error of O(h^2) a step, so that the
order is 1 in the worst case. The constant is small: the end law errs by a / n + b / n^2, and at 95 % coupling on masked
processes b / a was 17 for one law and 200 for another, whose slope is still 1.5 between 96 and 384 steps. Where noise
never takes some token, the slope is 1.1 with 8 to 64 steps.

Reference: the discrete counterpart of DPM-Solver++(2M) (Lu et al., 2022).
"""

from dataclasses import dataclass, replace

from discdiff.handlers import At
from discdiff.operator import Predictor
from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.extrapolated import combined_leap
from discdiff.samplers.tau_leaping import TauLeaping
from discdiff.state import State

__all__ = ["Multistep"]


@dataclass(frozen=True)
class Multistep(Predictor):
    """Order 2 while no rate is clipped, 1 at strong coupling; one denoiser call a step."""

    order = 1.0
    remembers = True

    def __call__(self, state: State, at: At) -> State:
        before, now = state.past, replace(state, past=None)
        if at.s == 0 or _infinite(now, at):
            return Ancestral()(now, at)
        now = replace(now, seen=at.predict(now))
        if before is None or _infinite(before, at) or now.seen is None:
            return TauLeaping()(now, at).after(now, now.seen)
        a_s, a_t, a_before = (at.process.sitewise(at.alpha(u), now.tokens) for u in (at.s, now.t, before.t))
        weight = 1 + (a_s - a_t) / (2 * (a_t - a_before))
        return combined_leap(now, now.seen, at.predict(before), weight, a_s - a_t, at).after(now, now.seen)


def _infinite(state: State, at: At) -> bool:
    """Whether rates are infinite at a state's time: pure noise that is no mask."""
    return state.t == 1 and not at.process.absorbing
