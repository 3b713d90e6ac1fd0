r"""Jump to state v at site i at rate g(r_i(v)) with g(r) = r g(1 / r) (locally balanced correctors).

    "barker"  r / (1 + r)        "sqrt"  sqrt(r)        "min"  min(1, r)        "max"  max(1, r)

r_i(v | z) is the concrete score: p_t of the sequence z with state v at site i, divided by p_t of z. Such rates are in
detailed balance with p_t. ``LocallyBalanced`` proposes one jump, (i, v) ~ g(r_i(v | z)) / Z(z) with Z the sum over i
and v. It accepts the new sequence z' with probability min(1, Z(z) / Z(z')), which preserves p_t exactly.
``TauLocallyBalanced`` lets all sites jump independently for a length h of the jump process's time. Its rates are
frozen, so it has a bias O(h).

References: Zanella (2020, https://arxiv.org/abs/1711.07424); Sun et al. (2022, https://arxiv.org/abs/2206.14897); Zhao
et al. (2024, https://arxiv.org/abs/2407.21243).
"""

from dataclasses import dataclass

import torch

from discdiff.checks import real
from discdiff.choices import Coins, Ranking, Tokens, spread
from discdiff.operator import At, Corrector, Invariance, State, choose
from discdiff.samplers._conditional import Balance, balanced, check_balance

__all__ = ["LocallyBalanced", "TauLocallyBalanced"]


@dataclass(frozen=True)
class LocallyBalanced(Corrector):
    """Propose one jump in each row and accept it by the Metropolis rule; two denoiser calls.

    Args:
        balance: the rate g(r) of a jump that multiplies p_t by r: "barker" r / (1 + r), "sqrt" sqrt(r), "min" min(1, r)
            or "max" max(1, r).

    Raises:
        ValueError: for an unknown g; in sampling, if the model does not determine the leave-one-out prediction at a
            site with a token.
    """

    balance: Balance = "barker"
    reads = "shown"
    weighable = False  # the acceptance may be 1 under one prediction alone

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
        rates = balanced(at.predict(state)[free], self.balance)
        leaves = spread(rates.known().log_sum_exp, free)
        where = choose("site", Ranking(leaves, torch.ones_like(state.rows)), state, at) >= 0
        column = choose("state", Tokens(rates.narrow(where), process.column(z)), state, at)
        after = state.at(torch.where(where, process.place(column, z), z))
        back = spread(balanced(at.predict(after, name="after")[free], self.balance).known().log_sum_exp, free)
        here, there = leaves.logsumexp(-1, keepdim=True), back.logsumexp(-1, keepdim=True)
        gain = torch.where(here == -torch.inf, 0.0, here - there)  # no site can leave: no proposal
        accept = choose("accept", Coins(gain.clamp(max=0.0).exp()), state, at)
        at.report(state, accepted=lambda: accept[:, 0])
        return state.at(torch.where(accept, after.tokens, z))


@dataclass(frozen=True)
class TauLocallyBalanced(Corrector):
    """Let all sites jump independently with frozen rates for a length h; one denoiser call.

    Site i jumps with probability 1 - exp(-h sum_v g(r_i(v))). The sum is over the other states v of the site, and
    r_i(v) is the factor by which the jump to v multiplies p_t.

    Args:
        h: the length, in units of time in which a site jumps at rate g(1) to a state as probable as its own.
        balance: the rate g(r) of a jump that multiplies p_t by r: "barker" r / (1 + r), "sqrt" sqrt(r), "min" min(1, r)
            or "max" max(1, r).

    Raises:
        ValueError: for an unknown g, or a length that is not positive; in sampling, if the model does not determine the
            leave-one-out prediction at a site with a token.
    """

    h: float = 0.05
    balance: Balance = "barker"
    reads = "shown"

    def __post_init__(self) -> None:
        check_balance(self.balance, "TauLocallyBalanced")
        object.__setattr__(self, "h", real(self.h, "TauLocallyBalanced: h", "(0, inf)"))

    @property
    def invariant(self) -> Invariance:
        return "approximate"

    def __call__(self, state: State, at: At) -> State:
        process, z, free = at.process, state.tokens, state.free
        rates = balanced(at.predict(state)[free], self.balance)
        leaves = -torch.expm1(-self.h * spread(rates.known().log_sum_exp, free).exp())
        where = choose("where", Coins(leaves), state, at)
        column = choose("state", Tokens(rates.narrow(where), process.column(z)), state, at)
        return state.at(torch.where(where, process.place(column, z), z))
