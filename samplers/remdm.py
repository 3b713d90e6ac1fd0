r"""Take steps of masked diffusion that mask some revealed tokens again (ReMDM).

    revealed:  mask again with probability sigma
    masked:    reveal x0 with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t),    x0 ~ D

These steps preserve every marginal q_t(. | x0) for 0 <= sigma <= m = min(1, (1 - alpha_s) / alpha_t). If sigma does not
shrink with the step, many sites change together in every step. So between times inside (0, 1) the error does not
vanish: order 0. Near t = 0 the bound m falls with t. With n steps, errors made at times above n^(-1/2) are removed
later, so the order from noise to data is 1/2. If sigma is proportional to the step's length, both orders are 1. The
published loop repeats ``Remask`` at one time: when(..., Ancestral() >> Remask(0.1) ** n, Ancestral()).

Reference: ReMDM (Wang et al., 2025, https://arxiv.org/abs/2503.00307).
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from discdiff.checks import decided, real, whole
from discdiff.choices import Coins, Subset, spread
from discdiff.operator import At, Corrector, Invariance, Predictor, Reads, State, choose
from discdiff.process import Process
from discdiff.samplers._choosing import check_masked, draw_clean, hidden

__all__ = ["ReMDM", "Remask"]

Rule = Literal["cap", "rescale", "rate"]


@dataclass(frozen=True)
class ReMDM(Predictor):
    """Take ancestral steps that mask some revealed tokens again; at most one denoiser call a step.

    A revealed token is masked with probability sigma <= m = min(1, (1 - alpha_s) / alpha_t).

    Args:
        eta: the strength of remasking; in [0, 1], or [0, inf) for "rate".
        rule: "cap": sigma = min(eta, m). "rescale": sigma = eta m. "rate": sigma = min(eta (alpha_s - alpha_t), m), the
            only one of order 1; the others have order 0 inside (0, 1) and 1/2 from noise to data.
        confident: divide sigma among the revealed sites in proportion to softmax(-O(z)), so that the least probable
            tokens are masked most often. The model must determine the leave-one-out prediction O at revealed sites.
            Marginals are not preserved.

    Raises:
        ValueError: for an unknown rule, or eta out of range.
    """

    eta: float = 0.1
    rule: Rule = "cap"
    confident: bool = False

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"ReMDM: rule must be one of {get_args(Rule)}, got {self.rule!r}")
        object.__setattr__(self, "eta", real(self.eta, "ReMDM: eta", "[0, inf)" if self.rule == "rate" else "[0, 1]"))
        decided(self.confident, "ReMDM: confident")

    @property
    def reads(self) -> Reads | None:
        return "shown" if self.confident else None

    @property
    def order(self) -> float | None:
        return None if self.confident else 1.0 if self.rule == "rate" or self.eta == 0 else 0.0

    def check(self, process: Process) -> None:
        check_masked(self, process)

    def __call__(self, state: State, at: At) -> State:
        process, z = at.process, state.tokens
        a_t, a_s = process.sitewise(at.alpha(state.t), z), process.sitewise(at.alpha(at.s), z)
        most = torch.where(a_t > 0, (1 - a_s) / a_t.where(a_t > 0, 1.0), 1.0).clamp(max=1.0)
        shares = {"cap": torch.ones_like(most), "rescale": most, "rate": a_s - a_t}
        sigma = torch.minimum(self.eta * shares[self.rule], most)
        masks = hidden(state, at)
        shown = state.free & ~masks
        again = sigma
        if self.confident:
            state = replace(state, seen=at.predict(state))  # used again in the draw below
            belief = spread(at.predict(state)[shown].own, shown, 0.0).exp()
            share = (-belief).masked_fill(~shown, -torch.inf).softmax(-1).where(shown, 0.0)
            again = (again * share).minimum(most)
            sigma = torch.zeros_like(sigma)
        remask = choose("remask", Coins(torch.where(shown, again, 0.0)), state, at)
        reveal = torch.where(a_t < 1, (a_s - (1 - sigma) * a_t) / (1 - a_t), 0.0).clamp(0.0, 1.0)
        where = choose("where", Coins(torch.where(masks, reveal, 0.0)), state, at)
        x = torch.where(remask, process.hide(z), z)
        if not bool(where.any()):
            return state.at(x, at.s)
        return state.at(draw_clean(replace(state, tokens=x, seen=at.predict(state)), where, at), at.s)


@dataclass(frozen=True)
class Remask(Corrector):
    """Mask revealed sites with probability sigma, and reveal masked ones with probability sigma alpha / (1 - alpha).

    Args:
        sigma: in [0, 1]. A sigma above (1 - alpha) / alpha is lowered to it; alpha is the survival probability.
        sites: how many uniformly chosen sites of a row may change. 1 preserves p_t exactly; more, or all (None), only
            approximately.

    Raises:
        ValueError: for sigma outside [0, 1] or ``sites`` below 1.
    """

    sigma: float = 0.1
    sites: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", real(self.sigma, "Remask: sigma", "[0, 1]"))
        if self.sites is not None:
            object.__setattr__(self, "sites", whole(self.sites, "Remask: sites", 1))

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.sites == 1 else "approximate"

    def check(self, process: Process) -> None:
        check_masked(self, process)

    def __call__(self, state: State, at: At) -> State:
        process, z = at.process, state.tokens
        alpha = process.sitewise(at.alpha(state.t), z)
        some = state.free
        if self.sites is not None:
            some = choose("site", Subset(state.free, self.sites), state, at)
        sigma = torch.where(alpha > 0, (1 - alpha) / alpha, 1.0).clamp(max=self.sigma)
        reveal = torch.where(alpha < 1, sigma * alpha / (1 - alpha), 0.0).clamp(max=1.0)  # rounding
        masks = hidden(state, at)
        where = choose("where", Coins(torch.where(masks, reveal, sigma).where(some, 0.0)), state, at)
        x, shown = torch.where(where, process.hide(z), z), where & masks
        if not bool(shown.any()):
            return state.at(x)
        return state.at(draw_clean(replace(state, tokens=x, seen=at.predict(state)), shown, at))
