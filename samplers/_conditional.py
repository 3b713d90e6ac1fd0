r"""Compute the one-site conditional c = O Q_t and balanced rates from it, for informed and locally balanced correctors.

    c_i(v | z) = p_t(z_i = v | z_{-i}) = alpha O_i(v) + (1 - alpha) pi(v),        r_i(v | z) = c_i(v) / c_i(z_i)

r is the concrete score: p_t of the sequence with site i at v, over p_t of the sequence. A rate g(r) with
g(r) = r g(1 / r) is in detailed balance with p_t. The rows are computed and read in chunks, never all at once. On a
rank-one process a kernel can sum them without computing them: they are mixtures of the LOO and the noise law.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from discdiff.choices import Sites
from discdiff.kernels import dispatch as kernels
from discdiff.prediction import Prediction
from discdiff.process import Process, RankOne

__all__ = ["Balance", "balanced_at", "check_balance", "conditional_at", "rates_mixture", "spread"]

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


def conditional_at(prediction: Prediction, where: Bool[Tensor, "B L"]) -> Sites:
    """Give log c at the chosen sites of (B, L) as rows that are computed when they are read.

    Raises:
        ValueError: where the LOO is undefined, for instance of a masked denoiser at revealed sites.
    """
    process, x, alpha = prediction.process, prediction.x[where], prediction.alpha[where]
    loo = prediction.loo_at(where).rows

    def rows(n: Tensor) -> Tensor:
        return process.conditional(kernels.log_softmax(loo.dense(n).double()), x[n], alpha[n])

    mixture = _mixture(process, loo, x, alpha)
    mixed = None if mixture is None else kernels.Mixed((mixture,))
    return Sites.computed(where, rows, process.columns, watch=prediction.watch, mixed=mixed)


def balanced_at(prediction: Prediction, where: Bool[Tensor, "B L"], balance: Balance | None = None) -> Sites:
    """Give log g(r) at the chosen sites of (B, L), or log r without a ``balance``; unread, -inf at the site's state."""
    process, x = prediction.process, prediction.x[where]
    conditional, rate = conditional_at(prediction, where).rows, LOG_RATE[balance] if balance else torch.nn.Identity()

    def rows(n: Tensor) -> Tensor:
        log_c, own = conditional.dense(n), process.column(x[n])[:, None]
        log_own = log_c.gather(-1, own)  # -inf if no data agrees with the other sites: any move is allowed
        log_r = log_c - torch.where(log_own > -torch.inf, log_own, 0.0)
        return rate(log_r).scatter(-1, own, -torch.inf)

    mixed = conditional.mixed if isinstance(conditional, kernels.Computed) else None
    if mixed is not None:
        mixed = kernels.Mixed((replace(mixed.of[0], relative=True),), balance or "plain")
    return Sites.computed(where, rows, process.columns, watch=prediction.watch, empty=True, mixed=mixed)


def rates_mixture(
    prediction: Prediction, where: Bool[Tensor, "B L"], weight: Float[Tensor, " N"]
) -> kernels.Mixture | None:
    """Give ``weight`` (N,) times R at N chosen sites of (B, L), as in ``rates_at``, as mixtures; None if they are not.

    Raises:
        ValueError: where the LOO is undefined and a ratio is needed.
    """
    process, x, alpha = prediction.process, prediction.x[where], prediction.alpha[where].clamp(min=1e-290)
    if not isinstance(process, RankOne):
        return None
    inflow = process.inflow(x[None], alpha[None])[0, :, 0]
    moving = inflow > 0
    loo = prediction.loo_at(where.masked_scatter(where, moving)).rows
    made = _mixture(process, loo, x, alpha)
    place = torch.where(moving, moving.cumsum(0) - 1, -1)
    return made and replace(made, place=place, scale=weight * inflow / alpha, relative=True)


def _mixture(process: Process, loo: kernels.Source, x: Tensor, alpha: Tensor) -> kernels.Mixture | None:
    """Give the conditional c of states (N,) as a mixture of rows of the LOO; None if it is none."""
    if not isinstance(process, RankOne) or not isinstance(loo, kernels.Rows):
        return None
    mass, anchor = process.anchored(alpha), process.anchor(x)
    return kernels.Mixture(
        loo,
        torch.arange(len(x), device=x.device),
        weight=alpha,
        level=(1 - alpha - mass).clamp(min=0),
        scale=torch.ones_like(alpha),
        pi=process.noise(x.device).pi,
        spike=None if anchor is None else mass,
        anchor=None if anchor is None else process.column(anchor),
        own=process.column(x),
    )


def spread(value: Float[Tensor, " N"], where: Bool[Tensor, "B L"], fill: float = -torch.inf) -> Float[Tensor, "B L"]:
    """Put N values (N,) at the N chosen sites of a (B, L) float64 tensor, and ``fill`` at the others."""
    return torch.full(where.shape, fill, dtype=torch.float64, device=where.device).masked_scatter(where, value.double())
