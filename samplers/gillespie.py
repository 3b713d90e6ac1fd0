r"""Simulate the reverse CTMC jump by jump, with rates recomputed after every jump (Gillespie's algorithm).

Between two jumps the rates are those after the earlier jump, so they depend on the current tokens of all sites. Only
their change with time is neglected. On a masked process they do not change with time, and the simulation is exact.

Reference: Gillespie (1977, https://doi.org/10.1021/j100540a008).
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from discdiff.operator import At, State
from discdiff.samplers._jumps import Jumps, look, pick_site
from discdiff.samplers._leap import jump, own_probability

__all__ = ["Gillespie"]


@dataclass(frozen=True)
class Gillespie(Jumps):
    """Simulate jumps one by one, with rates that are frozen between jumps.

    The method has order 1 in the step's length, and is exact on masked processes. It makes one denoiser call for each
    jump, and one more in each step.
    """

    order: ClassVar[float | None] = 1.0
    weighable = False  # the time of an event depends on the prediction

    def rates(self, state: State, alpha: Float[Tensor, "B 1"], at: At) -> tuple[Float[Tensor, "B L"], State]:
        state, exit = look(state, state.free, alpha, at)
        return (1 - alpha) * exit.total, state

    def event(
        self, state: State, rates: Float[Tensor, "B L"], alpha: Float[Tensor, "B 1"], at: At
    ) -> Int[Tensor, "B L"]:
        where, said = pick_site(state, rates, at), at.predict(state)  # the prediction made in ``rates``
        exit = at.rank_one.exit(state.tokens, said.alpha, own_probability(state, where, at))
        return jump(state, where, exit, at)
