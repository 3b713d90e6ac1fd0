"""Survival probabilities alpha of a token, and the error for a pair (x_t, x0) that no noise connects."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Survival", "refuse_impossible", "survival"]

Survival = float | Float[Tensor, "..."]


def refuse_impossible(impossible: Bool[Tensor, "B L"], x_t: Tensor, x0: Tensor) -> None:
    """Raise ValueError if ``impossible`` (B, L) is True: x_t cannot come from x0 there; the error names the site."""
    if bool(impossible.any()):
        row, site = impossible.nonzero()[0].tolist()
        raise ValueError(
            f"bridge: row {row}, position {site}: "
            f"x_t = {int(x_t[row, site])} cannot come from x0 = {int(x0[row, site])}"
        )


def survival(alpha_t: Survival, alpha_s: Survival) -> Tensor:
    """Return alpha_{t|s} = alpha_t / alpha_s; it is 1 if both are 0, as nothing moves between times of pure noise."""
    a_t, a_s = torch.as_tensor(alpha_t, dtype=torch.float64), torch.as_tensor(alpha_s, dtype=torch.float64)
    return torch.where(a_s > 0, a_t / a_s.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
