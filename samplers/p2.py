r"""P2, path planning: a planner decides which sites stay revealed, and may hide tokens again.

    draw      a token at every mask
    plan      score every free site by the planner: log of the probability of its token
    update    the schedule's number of sites with the least scores is (or stays) masked, the others show their token

Revealed sites' scores count eta times: eta = 0 never hides a token again, larger ones hide more easily. The choice
looks at the tokens it keeps, so no law is kept: BIASED, like every sample-then-select order.

Reference: Peng et al. (2025).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.handlers import At
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Predictor
from discdiff.process import Process
from discdiff.rest import Reads
from discdiff.samplers.choosing import best, check_mask, draw_at, hidden, quota
from discdiff.state import State

__all__ = ["P2"]

Planner = Callable[[Int[Tensor, "B L"]], Float[Tensor, "B L"]]


@dataclass(frozen=True)
class P2(Predictor):
    """Draw, plan, and keep the best; one denoiser call a step (the planner's own are not counted).

    Args:
        eta: the weight of a revealed site's score, at least 0.
        planner: from tokens without masks (B, L) to log-probabilities (B, L), for instance of a masked language model.
            By default the denoiser plans for itself, which at revealed sites needs one that predicts the LOO.

    Raises:
        ValueError: for a negative eta.
    """

    eta: float = 1.0
    planner: Planner | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"P2: eta must be at least 0 and finite, got {self.eta}")

    @property
    def reads(self) -> Reads | None:
        return "shown" if self.eta > 0 and self.planner is None else None

    def check(self, process: Process) -> None:
        check_mask(self, process)

    def __call__(self, state: State, at: At) -> State:
        masks, free = hidden(state, at), state.free
        left = masks.sum(-1) - quota(state, at)
        if not bool(masks.any()) and not bool((left > 0).any()):
            return state.at(state.tokens, at.s)
        prediction = at.predict(state)
        drawn = draw_at(masks, prediction, state, at)
        if self.planner is not None:
            score = self.planner(drawn).double()
        else:
            asked = free if self.eta > 0 else masks
            rows = prediction.untruncated.loo_at(asked).rows
            score = torch.zeros(free.shape, dtype=torch.float64, device=free.device)
            score = score.masked_scatter(asked, kernels.log_prob(rows, at.process.column(drawn)[asked]).double())
        score = torch.where(masks, score, self.eta * score)
        score = score.clamp(min=-1e300).masked_fill(~masks & (self.eta == 0), torch.inf)
        hide = best((-score).masked_fill(~free, -torch.inf), left)
        return state.at(torch.where(hide, at.process.hide(drawn), drawn), at.s)
