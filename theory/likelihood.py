r"""Compute likelihood bounds exactly for small V^L: enumeration over noisy states, quadrature over time."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import affordable, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.losses import AnyOrder, Continuous, DiscreteBound, Objective
from discdiff.process import Process
from discdiff.theory.world import all_states

__all__ = ["bound", "integrand"]


@torch.no_grad()
def bound(objective: Objective, model: Denoiser, length: int | None = None) -> Float[Tensor, " M"]:
    """Compute the expected value of a bound, over times and noise, for each data sequence, (M,), in nats.

    With n data tokens there are M = n**L data sequences. The prior's term of the bound is left out.

    Continuous bounds use tanh-sinh quadrature over alpha in [alpha(1), 1], accurate to about 1e-8 if the integrand is
    integrable at its ends. Discrete bounds are exact.

    Raises:
        TypeError: for a bound that cannot be enumerated.
        ValueError: if neither the model nor ``length`` gives the number of sites.
    """
    x0, size = _data(model, length)
    if isinstance(objective, Continuous):
        least = float(model.process.schedule.alpha(1.0))
        total = torch.zeros(len(x0), dtype=torch.float64)
        h = 1 / 16
        for k in range(-43, 44):  # beyond these nodes 1 - alpha rounds to 0
            u = math.pi / 2 * math.sinh(k * h)
            share, weight = 1 / (1 + math.exp(-2 * u)), h * math.pi / 4 * math.cosh(k * h) / math.cosh(u) ** 2
            total += weight * (1 - least) * integrand(objective, model, least + (1 - least) * share, length)
        return total
    if isinstance(objective, DiscreteBound):
        schedule, total = model.process.schedule, torch.zeros(len(x0), dtype=torch.float64)
        for k in range(objective.steps):
            t, s = (k + 1) / objective.steps, k / objective.steps
            z, weights = _noise(model.process, x0, float(schedule.alpha(t)))
            alpha_s = torch.full((1, 1), float(schedule.alpha(s)), dtype=torch.float64)
            prediction, data = model(z.repeat(len(x0), 1), t), x0.repeat_interleave(len(z), 0)
            value = objective.step(prediction, data, alpha_s).sum(-1).view(weights.shape)
            total += torch.where(weights > 0, weights * value, 0.0).sum(-1)
        return total
    if isinstance(objective, AnyOrder):
        total = torch.zeros(len(x0), dtype=torch.float64)
        for hidden in all_states(2, size)[1:].bool():
            n = int(hidden.sum())
            weight = 1 / size / math.comb(size, n)
            total += weight * objective.given(model, x0, hidden.expand(x0.shape))
        return total
    raise TypeError(f"bound: {objective} is not one of discdiff.losses, such as MaskedNELBO()")


@torch.no_grad()
def integrand(objective: Objective, model: Denoiser, alpha: float, length: int | None = None) -> Float[Tensor, " M"]:
    """Compute the integrand of a continuous bound at alpha, averaged exactly over x_t, for each data sequence, (M,).

    Raises:
        TypeError: for a bound that is not an integral over time.
        ValueError: if neither the model nor ``length`` gives the number of sites.
    """
    if not isinstance(objective, Continuous):
        raise TypeError(f"integrand: {objective} is not an integral over time")
    process = model.process
    objective.check(process)
    x0, _ = _data(model, length)
    t = float(process.schedule.time(alpha))
    z, weights = _noise(process, x0, float(process.schedule.alpha(t)))
    prediction = model(z.repeat(len(x0), 1), t)
    value = objective.density(prediction, x0.repeat_interleave(len(z), 0)).sum(-1).view(weights.shape)
    return torch.where(weights > 0, weights * value, 0.0).sum(-1)


def _data(model: Denoiser, length: int | None) -> tuple[Tensor, int]:
    size = check_denoiser(model, "bound").length if length is None else whole(length, "bound: length", 1)
    if size is None:
        raise ValueError("length= must say how many sites; this model has no length of its own")
    tokens = model.process.data_tokens
    pairs = (len(tokens) * model.process.states) ** size  # of a clean and a noisy sequence
    affordable(pairs, f"bound: all pairs of data and states of {size} sites")
    return tokens[all_states(len(tokens), size)], size


def _noise(process: Process, x0: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """List every noisy state, (N, L), and its probability q_t given each data sequence, (M, N)."""
    z = all_states(process.states, x0.shape[1])
    law = process.noised(x0, alpha)
    return z, torch.stack([law.log_prob(row.expand(x0.shape)).exp() for row in z], -1)
