"""Dense reverse rates given x0, for processes of few states: which generators keep the marginals.

Any flux with detailed balance may be added to reverse rates (``add_flux``).

References: discrete flow matching (Campbell et al., 2024, https://arxiv.org/abs/2402.04997; Gat et al., 2024,
https://arxiv.org/abs/2407.15595).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.process import Process, RankOne


def _pinned(process: Process, x0: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return q_t(. | x0) and its derivative in alpha, (S,), from the forward equation dq/dalpha = -q Q / alpha."""
    q = process.transition(alpha, 1.0)[x0]
    return q, -(q @ process.generator(alpha)) / alpha


def _as_generator(rates: Tensor) -> Tensor:
    rates = rates.clone().fill_diagonal_(0)
    return rates - torch.diag(rates.sum(-1))


def posterior_rates(process: Process, x0: int, alpha: float) -> Float[Tensor, "S S"]:
    """Return rates (S, S) of the reversed process given x0: Q(y, x) q(y) / q(x) / alpha; 0 in rows with q = 0."""
    q, _ = _pinned(process, x0, alpha)
    rates = process.generator(alpha).T * q / alpha
    return _as_generator(torch.where(q[:, None] > 0, rates / q[:, None], 0.0))


def minimal_rates(process: Process, x0: int, alpha: float) -> Float[Tensor, "S S"]:
    """Return rates (S, S) without jumps both ways between any two states:

        (q'(y) - q'(x))_+ / (Z q(x)), Z the number of states with q > 0.

    Reference: Campbell et al., 2024, https://arxiv.org/abs/2402.04997.
    """
    q, slope = _pinned(process, x0, alpha)
    reached = q > 0
    rates = (slope - slope[:, None]).clamp(min=0) * reached / reached.sum()
    return _as_generator(torch.where(reached[:, None], rates / q[:, None], 0.0))


def direct_rates(process: RankOne, x0: int, alpha: float) -> Float[Tensor, "S S"]:
    """Return rates (S, S) of jumps to x0, 1 / (1 - alpha) from every state, as in flow matching's mixture path.

    Reference: Gat et al., 2024, https://arxiv.org/abs/2407.15595.
    """
    rates = torch.zeros(process.states, process.states, dtype=torch.float64)
    rates[:, x0] = 1 / (1 - alpha)
    return _as_generator(rates)


def add_flux(
    rates: Float[Tensor, "S S"], q: Float[Tensor, " S"], flux: Float[Tensor, "S S"], eta: float
) -> Float[Tensor, "S S"]:
    """Add eta flux(x, y) / q(x) to rates: any symmetric flux keeps the marginals; eta is the stochasticity.

    Shapes: rates and flux (S, S), q (S,).

    Raises:
        ValueError: if the flux is not symmetric, is negative, or is positive where q is 0.
    """
    flux = flux.clone().fill_diagonal_(0)
    if not torch.allclose(flux, flux.T, rtol=0, atol=1e-14) or bool((flux < 0).any()) or bool((flux[q == 0] > 0).any()):
        raise ValueError("add_flux: the flux must be symmetric, not negative, and 0 wherever q is 0")
    return rates + eta * _as_generator(torch.where(q[:, None] > 0, flux / q[:, None], 0.0))
