r"""Locally balanced correctors: jump to a neighbour v of site i at rate g(r_i(v)), with g(r) = r g(1 / r).

    "barker"  r / (1 + r)        "sqrt"  sqrt(r)        "min"  min(1, r)        "max"  max(1, r)

Such rates are in detailed balance with p_t. ``LocallyBalanced`` makes one jump of that process as a proposal,
(i, v) ~ g(r_i(v | z)) / Z(z), and accepts it with min(1, Z(z) / Z(z')), which keeps p_t exactly.
``TauLocallyBalanced`` lets every site jump by itself for a length h of the process's own time, with the rates frozen:
its bias is O(h).

References: Zanella (2020); Sun et al. (2022); Zhao et al. (2024).
"""

from dataclasses import dataclass

import torch

from discdiff.distributions import Coins, Tokens
from discdiff.events import Ranking
from discdiff.handlers import At, choose
from discdiff.operator import Corrector, Invariance
from discdiff.samplers.conditional import Balance, balanced_at, check_balance, spread
from discdiff.state import State

__all__ = ["LocallyBalanced", "TauLocallyBalanced"]


@dataclass(frozen=True)
class LocallyBalanced(Corrector):
    """One Metropolised jump a row; two denoiser calls.

    Args:
        balance: g.

    Raises:
        ValueError: for an unknown g; in sampling, if the model says nothing of the LOO at a site that holds a token.
    """

    balance: Balance = "barker"
    reads = "shown"

    def __post_init__(self) -> None:
        check_balance(self.balance, "LocallyBalanced")

    @property
    def invariant(self) -> Invariance:
        return "exact"

    @property
    def nfe(self) -> float | None:
        return 2.0

    def __call__(self, state: State, at: At) -> State:
        process, z, free = at.process, state.tokens, state.free
        rates = balanced_at(at.predict(state), free, self.balance)
        leaves = spread(rates.known().log_sum_exp, free)
        where = choose("site", Ranking(leaves, torch.ones_like(state.rows)), state, at) >= 0
        column = choose("state", Tokens(rates.narrow(where), process.column(z)), state, at)
        after = state.at(torch.where(where, process.place(column, z), z))
        back = spread(balanced_at(at.predict(after), free, self.balance).known().log_sum_exp, free)
        gain = (leaves.logsumexp(-1, keepdim=True) - back.logsumexp(-1, keepdim=True)).nan_to_num(0.0)
        accept = choose("accept", Coins(gain.clamp(max=0.0).exp()), state, at)
        return state.at(torch.where(accept, after.tokens, z))


@dataclass(frozen=True)
class TauLocallyBalanced(Corrector):
    """All sites at once for a length h, each leaving with 1 - exp(-h sum_v g(r_i(v))); one denoiser call.

    Args:
        h: how long, in units in which a neighbour as probable as the present state is reached at rate g(1).
        balance: g.

    Raises:
        ValueError: for an unknown g, or a length that is not positive.
    """

    h: float = 0.05
    balance: Balance = "barker"
    reads = "shown"

    def __post_init__(self) -> None:
        check_balance(self.balance, "TauLocallyBalanced")
        if not 0 < self.h < float("inf"):
            raise ValueError(f"TauLocallyBalanced: h must be positive and finite, got {self.h}")

    @property
    def invariant(self) -> Invariance:
        return "approximate"

    def __call__(self, state: State, at: At) -> State:
        process, z, free = at.process, state.tokens, state.free
        rates = balanced_at(at.predict(state), free, self.balance)
        leaves = -torch.expm1(-self.h * spread(rates.known().log_sum_exp, free).exp())
        where = choose("where", Coins(leaves), state, at)
        column = choose("state", Tokens(rates.narrow(where), process.column(z)), state, at)
        return state.at(torch.where(where, process.place(column, z), z))
