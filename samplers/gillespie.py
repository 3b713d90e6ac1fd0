r"""Gillespie's algorithm: look, wait, jump, look again.

The rates are those of the moment of the last jump, so what other sites do is never out of date; only the rates' own
change with time between two jumps is neglected. On a masked process there is none, and the simulation is exact.

Reference: Gillespie (1977).
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from discdiff.handlers import At
from discdiff.prediction import Prediction
from discdiff.rank_one import RankOne
from discdiff.samplers.jumps import Jumps, look, pick_site
from discdiff.samplers.leap import jump, own_probability
from discdiff.state import State

__all__ = ["Gillespie"]


@dataclass(frozen=True)
class Gillespie(Jumps):
    """Rates frozen between jumps, order 1 in the step's length; exact on masked processes. A call for every jump."""

    order = 1.0

    def rates(
        self, state: State, alpha: Float[Tensor, "B 1"], at: At
    ) -> tuple[Float[Tensor, "B L"], Prediction | None]:
        said, exit = look(state, alpha, state.free, at)
        return (1 - alpha) * exit.total, said

    def event(
        self, state: State, rates: Float[Tensor, "B L"], alpha: Float[Tensor, "B 1"], at: At
    ) -> Int[Tensor, "B L"]:
        where, said = pick_site(rates, state, at), at.predict(state)  # the prediction of the last look
        assert isinstance(at.process, RankOne)
        exit = at.process.exit(state.tokens, said.alpha, own_probability(said, where))
        return jump(state, where, exit, said, at).tokens
