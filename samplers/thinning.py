r"""Propose jumps at a bound on the rate that needs no denoiser, and accept with true rate / bound (thinning).

For every prediction a site leaves at a rate of at most 1 + (1 - pi(z)) (1 - alpha) / alpha per unit of
l = -log(1 - alpha), the value at O(z) = 0. Proposals come at that rate; at each one the denoiser is called, and the
jump is made with probability (true rate) / (bound). This simulates the model's reverse CTMC exactly, without a time
discretisation. On masked processes the bound equals the rate, and the method is ``FirstHitting``.

References: Lewis and Shedler (1979, https://doi.org/10.1002/nav.3800260304); Chen and Ying (2024,
https://arxiv.org/abs/2402.08095).
"""

import math
from dataclasses import dataclass

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
    """Simulate the reverse CTMC exactly on rank-one processes with one noise law; one denoiser call a proposal.

    Where rates are infinite the step is ancestral: from pure noise or to time 0 on a uniform process, for instance.
    """

    order = math.inf

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
