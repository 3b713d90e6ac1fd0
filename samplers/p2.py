r"""Let a planner decide which sites stay revealed; tokens may be masked again (P2, path planning).

    draw      a token at every mask
    plan      score every free site by the planner: log of the probability of its token
    update    mask the sites with the least scores, as many as the schedule sets, and reveal the others

Scores of revealed sites are multiplied by eta. With eta = 0 no token is masked again; a larger eta masks more
tokens again. The choice of sites depends on the drawn tokens, so the end law is BIASED. This holds for every order that
is chosen after the tokens are drawn.

Reference: P2 (Peng et al., 2025, https://arxiv.org/abs/2502.03540).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real
from discdiff.choices import spread
from discdiff.operator import At, Predictor, Reads, State
from discdiff.process import Process
from discdiff.samplers._choosing import best, check_mask, draw_clean, hidden, quota

__all__ = ["P2"]

Planner = Callable[[Int[Tensor, "B L"]], Float[Tensor, "B L"]]


@dataclass(frozen=True)
class P2(Predictor):
    """Draw tokens, score them and keep the best; one denoiser call a step, besides the calls of a planner.

    Args:
        eta: the factor on the score of a revealed site, at least 0; at 0 no token is masked again.
        planner: a function from tokens without masks (B, L) to log-probabilities (B, L), such as those of a masked
            language model. By default the denoiser is the planner; with eta > 0 the model must then determine the
            leave-one-out prediction at revealed sites.

    Raises:
        ValueError: for a negative eta; in sampling, if the planner gives NaN or +inf.
        TypeError: if ``planner`` is not callable.
    """

    eta: float = 1.0
    planner: Planner | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", real(self.eta, "P2: eta", "[0, inf)"))
        if self.planner is not None and not callable(self.planner):
            raise TypeError(f"P2: planner must be a function of tokens (B, L), got {self.planner!r}")

    @property
    def weighable(self) -> bool:
        return self.planner is not None

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
        state = replace(state, seen=at.predict(state))
        drawn = draw_clean(state, masks, at)
        if self.planner is not None:
            score = self.planner(drawn).double()
            at.watch(state).refuse(free & ~(score < torch.inf), "the planner gave NaN or +inf, no log-probability")
        else:
            asked = free if self.eta > 0 else masks
            log_p = at.predict(state).untruncated[asked].loo.known(at=at.process.column(drawn)[asked]).log_prob
            score = spread(log_p, asked, 0.0)
        score = torch.where(masks, score, self.eta * score)
        score = score.clamp(min=-1e300).masked_fill(~masks & (self.eta == 0), torch.inf)
        hide = best((-score).masked_fill(~free, -torch.inf), left)
        return state.at(torch.where(hide, at.process.hide(drawn), drawn), at.s)
