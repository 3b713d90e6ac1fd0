r"""Redraw each site with a probability that grows with the entropy of its leave-one-out prediction.

    redraw site i with probability min(1, budget H(O_i) / log V),        z_i ~ alpha O_i + (1 - alpha) pi

H is the entropy of the leave-one-out prediction O_i, which does not depend on z_i. So with one uniformly chosen site
the move preserves p_t exactly. A move with the entropy of the denoiser D, or with one budget for all sites, would not.
At all sites in parallel the move is approximate; it redraws mostly the sites that the other sites do not determine.

Introduced here; inspired by the informed correctors (Zhao et al., 2024, https://arxiv.org/abs/2407.21243).
"""

import math
from dataclasses import dataclass, replace

import torch

from discdiff.checks import real, whole
from discdiff.choices import Coins, Subset, spread
from discdiff.operator import At, Corrector, Invariance, Reads, State, choose
from discdiff.samplers._redraw import redraw

__all__ = ["EntropyRedraw"]


@dataclass(frozen=True)
class EntropyRedraw(Corrector):
    """Redraw sites whose leave-one-out entropy is large; one denoiser call.

    Args:
        budget: b. A site is redrawn with probability min(1, b H / log V), where H is its leave-one-out entropy and V
            the number of tokens.
        sites: how many uniformly chosen sites of a row may be redrawn. 1 preserves p_t exactly; more, or all (None),
            only approximately.

    Raises:
        ValueError: for a budget that is not positive, or ``sites`` below 1.
    """

    budget: float = 0.1
    sites: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", real(self.budget, "EntropyRedraw: budget", "(0, inf)"))
        if self.sites is not None:
            object.__setattr__(self, "sites", whole(self.sites, "EntropyRedraw: sites", 1))

    @property
    def weighable(self) -> bool:
        return self.budget < 1  # else a site of large entropy is redrawn for sure, under one prediction alone

    @property
    def reads(self) -> Reads:
        return "shown" if self.sites is None else "hidden"

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.sites == 1 else "approximate"

    def __call__(self, state: State, at: At) -> State:
        some = state.free
        if self.sites is not None:
            some = choose("site", Subset(state.free, self.sites), state, at)
        asked = state
        if self.sites is not None and at.process.absorbing:  # O at a revealed site needs it masked, as in Gibbs
            asked = state.at(torch.where(some, at.process.hide(state.tokens), state.tokens))
        state = replace(state, seen=at.predict(asked))
        doubt = at.predict(state)[some].loo.known(entropy=True).entropy / math.log(max(at.process.vocab_size, 2))
        redo = spread((self.budget * doubt).clamp(0.0, 1.0), some, 0.0)
        return state.at(redraw(state, choose("where", Coins(redo), state, at), at.alpha(state.t), at))
