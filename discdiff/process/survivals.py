"""Survival probabilities alpha of a token, and the error for a state x_t that noise cannot make from x0."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Survival", "refuse_impossible", "survival"]

Survival = float | Float[Tensor, "..."]


def refuse_impossible(impossible: Bool[Tensor, "B L"], x_t: Tensor, x0: Tensor) -> None:
    """Raise ValueError for the first site, if any, where ``impossible`` (B, L) says that x_t cannot come from x0."""
    if bool(impossible.any()):
        row, site = impossible.nonzero()[0].tolist()
        raise ValueError(
            f"bridge: row {row}, position {site}: "
            f"x_t = {int(x_t[row, site])} cannot come from x0 = {int(x0[row, site])}"
        )


def survival(alpha_t: Survival, alpha_s: Survival) -> Tensor:
    """Return alpha_{t|s} = alpha_t / alpha_s, or 1 if both are 0: no state changes between times of pure noise."""
    a_t, a_s = torch.as_tensor(alpha_t, dtype=torch.float64), torch.as_tensor(alpha_s, dtype=torch.float64)
    return torch.where(a_s > 0, a_t / a_s.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
