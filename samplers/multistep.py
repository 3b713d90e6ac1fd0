r"""Extrapolate the rates from the step before: a second-order rule with one denoiser call a step.

    R = ((1 + w) R_n - w R_{n-1})_+,      w = d_n / (2 d_{n-1})

with R_n the reverse rates at the present state, R_{n-1} those one step before, and d the steps' lengths in alpha. This
is the Adams-Bashforth rule of order 2. It has order 2 while no rate is clipped, and order 1 if jumps make other jumps
much less likely. There is no extrapolation in the first step, nor at an end of time where rates are infinite.

With equal steps of length h a rate is clipped if a jump in the step before divided it by more than 3. Such a jump has
probability O(h). In the present step a jump whose rate is clipped should have probability O(h), too. So the error of a
step is O(h^2), and the order is 1 in the worst case. With n steps the error of the end law is a / n + b / n^2, and a
is small. On masked processes at 95 % coupling b / a was 17 for one law and 200 for another; for the second the error
still falls with slope 1.5 between 96 and 384 steps. If some token has no noise mass, the slope is 1.1 with 8 to 64
steps.

Reference: the discrete counterpart of DPM-Solver++(2M) (Lu et al., 2022, https://arxiv.org/abs/2211.01095).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from discdiff.operator import At, Predictor, State
from discdiff.samplers._extrapolated import combined_leap
from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.tau_leaping import TauLeaping

__all__ = ["Multistep"]


@dataclass(frozen=True)
class Multistep(Predictor):
    """Let each site jump with rates extrapolated from the step before; one denoiser call a step.

    The method has order 2 while no rate is clipped at 0, and order 1 if tokens are strongly coupled.
    """

    order: ClassVar[float | None] = 1.0
    remembers = True
    weighable = False  # a rate may be clipped to 0 under one prediction alone

    def __call__(self, state: State, at: At) -> State:
        before, now = state.past, replace(state, past=None)
        if at.s == 0 or _infinite(now, at):
            return Ancestral()(now, at)
        now = replace(now, seen=at.predict(now))
        if before is None or _infinite(before, at):
            return TauLeaping()(now, at).after(now, now.seen)
        a_s, a_t, a_before = (at.process.sitewise(at.alpha(u), now.tokens) for u in (at.s, now.t, before.t))
        weight = 1 + (a_s - a_t) / (2 * (a_t - a_before))
        return combined_leap(now, at.predict(now), at.predict(before), weight, a_s - a_t, at).after(now, now.seen)


def _infinite(state: State, at: At) -> bool:
    """Return whether rates are infinite at a state's time.

    Rates are infinite at pure noise on a process that does not hide tokens.
    """
    return state.t == 1 and not at.process.absorbing
