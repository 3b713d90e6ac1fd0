r"""Propose jumps at a rate that needs no denoiser and bounds the true one, then accept or reject them (thinning).

A site in state z leaves it at a rate of at most 1 + (1 - pi(z)) (1 - alpha) / alpha per unit of l = -log(1 - alpha).
This is the rate if the leave-one-out prediction has O(z) = 0, so it is a bound for every prediction. Jumps are proposed
at this rate. At each proposal the denoiser is called, and the jump is made with probability (true rate) / (bound). This
simulates the model's reverse CTMC exactly, without a time discretisation. On masked processes the bound equals the
rate, and the method is ``FirstHitting``.

References: Lewis and Shedler (1979, https://doi.org/10.1002/nav.3800260304); Chen and Ying (2024,
https://arxiv.org/abs/2402.08095).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.choices import Coins
from discdiff.operator import At, State, choose
from discdiff.samplers._jumps import Jumps, look, pick_site
from discdiff.samplers._leap import jump

__all__ = ["Thinning"]


@dataclass(frozen=True)
class Thinning(Jumps):
    """Simulate the reverse process exactly; one denoiser call for each proposed jump.

    The process must be rank-one with one noise law. Two steps are ancestral: from pure noise on a process that does not
    hide tokens, and to time 0 on a process that is not masked.
    """

    order: ClassVar[float | None] = math.inf

    def rates(self, state: State, alpha: Float[Tensor, "B 1"], at: At) -> tuple[Float[Tensor, "B L"], State]:
        return (1 - alpha) * at.rank_one.exit(state.tokens, alpha, 0.0).total, state  # falls with alpha

    def event(
        self, state: State, rates: Float[Tensor, "B L"], alpha: Float[Tensor, "B 1"], at: At
    ) -> Int[Tensor, "B L"]:
        where = pick_site(state, rates, at)
        state, exit = look(state, where, alpha, at)
        keep = torch.where(where, (1 - alpha) * exit.total / rates.where(where, 1.0), 0.0)
        where = choose("accept", Coins(keep), state, at)
        return jump(state, where, exit, at)
