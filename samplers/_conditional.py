r"""Compute balanced jump rates from the one-site conditional c, for informed and locally balanced correctors.

    c_i(v | z) = p_t(z_i = v | z_{-i}) = (O_i Q_t)(v),        r_i(v | z) = c_i(v) / c_i(z_i)

O is the leave-one-out prediction (LOO) and Q_t the forward transition; with constant noise c = alpha O + (1 - alpha)
pi. r is the concrete score: p_t of the sequence z with state v at site i, divided by p_t of z. A rate g(r) with
g(r) = r g(1 / r) is in detailed balance with p_t. The rows are computed and read in chunks, never all at once. On a
rank-one process c is a mixture of the LOO and the noise law, so a kernel can sum rows without computing them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from discdiff.choices import Sites
from discdiff.kernels import dispatch as kernels
from discdiff.prediction import View

__all__ = ["Balance", "balanced", "check_balance"]

Balance = Literal["barker", "sqrt", "min", "max"]


def _log_sigmoid(x: Tensor) -> Tensor:
    """Compute log(1 / (1 + exp(-x))) of float64 to 1e-13; torch's own function takes twice as long."""
    x = x.clamp(max=700)  # beyond 700 the result is 0, and exp(x) would overflow
    return x - (1 + x.exp()).log()


# log g as a function of log r
LOG_RATE: dict[str, Callable[[Tensor], Tensor]] = {
    "barker": _log_sigmoid,  # r / (1 + r)
    "sqrt": lambda log_r: log_r / 2,
    "min": lambda log_r: log_r.clamp(max=0),
    "max": lambda log_r: torch.where(log_r == -torch.inf, -torch.inf, log_r.clamp(min=0)),
}


def check_balance(balance: str, where: str) -> None:
    """Raise ValueError for an unknown balancing function."""
    if balance not in get_args(Balance):
        raise ValueError(f"{where}: balance must be one of {', '.join(map(repr, get_args(Balance)))}, got {balance!r}")


def balanced(view: View, balance: Balance | None = None) -> Sites:
    """Return rows of log g(r) at the sites of a view, or of log r if ``balance`` is None.

    r is the concrete score of each state at the site, and g the balancing function. A row is computed when it is
    read. At the site's own state it is -inf.

    Raises:
        ValueError: if the leave-one-out prediction is undefined at a site.
    """
    process, x, conditional = view.prediction.process, view.x, view.conditional.rows
    rate = LOG_RATE[balance] if balance else torch.nn.Identity()

    def rows(n: Tensor) -> Tensor:
        log_c, own = conditional.dense(n), process.column(x[n])[:, None]
        log_own = log_c.gather(-1, own)  # -inf if no data agrees with the other sites: any move is allowed
        log_r = log_c - torch.where(log_own > -torch.inf, log_own, 0.0)
        return rate(log_r).scatter(-1, own, -torch.inf)

    mixed = conditional.mixed if isinstance(conditional, kernels.Computed) else None
    if mixed is not None:
        mixed = kernels.Mixed((replace(mixed.of[0], relative=True),), balance or "plain")
    return view.computed(rows, empty=True, mixed=mixed)
