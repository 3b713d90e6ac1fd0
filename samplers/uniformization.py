r"""Simulate the reverse CTMC by a Poisson process whose fixed rate bounds all exit rates (uniformization).

With R the generator and lambda >= the total exit rate of every state and time in the step,

    exp(l R) = sum_k Poisson(k; lambda l) (I + R / lambda)^k

so at every event a row jumps with probability (total rate) / lambda, at a site drawn in proportion to the sites' rates.
The denoiser is called at every event. This simulates the model's reverse CTMC exactly.

References: Jensen (1953, https://doi.org/10.1080/03461238.1953.10419459); Chen and Ying (2024,
https://arxiv.org/abs/2402.08095).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real
from discdiff.choices import Coins
from discdiff.operator import At, State, choose
from discdiff.samplers._jumps import Jumps, leaves, look, pick_site
from discdiff.samplers._leap import jump

__all__ = ["Uniformization"]


@dataclass(frozen=True)
class Uniformization(Jumps):
    """Simulate the reverse process exactly; one denoiser call for each event.

    The process must be rank-one with one noise law. Two steps are ancestral: from pure noise on a process that does not
    hide tokens, and to time 0 on a process that is not masked.

    Args:
        bound: lambda, the rate of events of a row, per unit of l = -log(1 - alpha). The default is valid for every
            prediction: L (1 + (1 - least pi) (1 - alpha_t) / alpha_t) for L free sites, or L on absorbing processes. A
            smaller bound that is valid for a model saves calls.

    Raises:
        ValueError: for a bound that is not positive; in sampling, if the total rate of a row exceeds the bound.
    """

    bound: float | None = None
    order: ClassVar[float | None] = math.inf

    def __post_init__(self) -> None:
        if self.bound is not None:
            object.__setattr__(self, "bound", real(self.bound, "Uniformization: bound", "(0, inf)"))

    def rates(self, state: State, alpha: Float[Tensor, "B 1"], at: At) -> tuple[Float[Tensor, "B L"], State]:
        process = at.rank_one
        some = leaves(state, alpha, at).any(-1, keepdim=True)
        sites = (state.free & some).double()  # no events in rows where no site can leave
        if self.bound is not None:
            return self.bound * sites / sites.sum(-1, keepdim=True).clamp(min=1), state
        if process.absorbing:  # only hidden sites leave, at rate at most 1
            return sites, state
        start = process.sitewise(at.alpha(at.t), state.tokens)
        pi = process.noise(sites.device).pi
        return sites * (1 + (1 - pi[pi > 0].min()) * (1 - start) / start.clamp(min=1e-300)), state

    def event(
        self, state: State, rates: Float[Tensor, "B L"], alpha: Float[Tensor, "B 1"], at: At
    ) -> Int[Tensor, "B L"]:
        """Return the tokens (B, L) after an event, perhaps unchanged; raises ValueError if a rate exceeds the bound."""
        state, exit = look(state, state.free, alpha, at)
        true, bound = (1 - alpha) * exit.total.where(state.free, 0.0), rates.sum(-1)
        total = true.sum(-1)
        if bool((total > bound * (1 + 1e-9)).any()):
            row = int((total - bound).argmax())
            raise ValueError(
                f"Uniformization: row {int(state.rows[row])} leaves at rate {float(total[row]):.6g} at alpha = "
                f"{float(alpha[row]):.6g}, above the bound {float(bound[row]):.6g}; give a larger bound, or none"
            )
        moves = choose("jump", Coins((total / bound).clamp(max=1.0)[:, None]), state, at)
        where = pick_site(state, torch.where(moves, true, 0.0), at)
        return jump(state, where, exit, at)
