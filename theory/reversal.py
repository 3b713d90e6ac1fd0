r"""Compute the generators of the exact reverse process on all S^L states, and exact likelihoods.

    Rbar(x, y) = R(y, x) p(y) / p(x)

R is the forward generator and p the law of the states. The predictions of a denoiser also give reverse rates, for each
site. Integrating Kolmogorov's equation with these rates from the prior gives the law of the continuous-time sampler,
and so the exact likelihood of the model, for small S^L.

References: Kelly (1979, http://www.statslab.cam.ac.uk/~frank/BOOKS/kelly_book.html); Campbell et al. (2022,
https://arxiv.org/abs/2205.14987).
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.process import Process, require_process
from discdiff.theory.world import Enumeration, all_states, check_size, law_of_data, law_of_prior, state_index

__all__ = ["joint_generator", "joint_midpoint", "model_generator", "reverse_generator", "reverse_law"]


def check_joint(process: Process, length: int, where: str) -> None:
    """Raise TypeError if ``process`` is not a Process, ValueError if a matrix over all S**L states is too large."""
    require_process(process, where)
    check_size(process.states, length, where, axes=2)


def joint_generator(process: Process, length: int, alpha: float) -> Float[Tensor, "N N"]:
    """Compute the forward generator of all sites per unit of -log alpha: the Kronecker sum of the sites' generators.

    The result is (N, N) with N = S**L, in the order of ``all_states``.

    Raises:
        TypeError, ValueError: for a length below 1, or alpha outside (0, 1].
    """
    length, alpha = whole(length, "joint_generator: length", 1), real(alpha, "joint_generator: alpha", "(0, 1]")
    check_joint(process, length, "joint_generator")
    site = process.generator(alpha)
    eye = torch.eye(process.states, dtype=torch.float64)
    total = torch.zeros(process.states**length, process.states**length, dtype=torch.float64)
    for i in range(length):
        term = torch.ones(1, 1, dtype=torch.float64)
        for j in range(length):
            term = torch.kron(term, site if i == j else eye)
        total += term
    return total


def reverse_generator(world: Enumeration, process: Process, t: float) -> Float[Tensor, "N N"]:
    """Compute the generator Rbar of the exact reverse process at time t, per unit of -log alpha.

    Rbar(x, y) = R(y, x) p_t(y) / p_t(x) for the forward generator R. Rows of states with p_t = 0 are 0. The result is
    (N, N) with N = S**L, in the order of ``all_states``.
    """
    p = world.marginal(process, t)
    forward = joint_generator(process, world.length, float(process.schedule.alpha(t)))
    rates = torch.where(p[:, None] > 0, forward.T * p / p[:, None], 0.0)
    rates.fill_diagonal_(0)
    return rates - torch.diag(rates.sum(-1))


def joint_midpoint(world: Enumeration, process: Process, t: float, s: float) -> Float[Tensor, "N N"]:
    """Compute the matrix of a midpoint step from t to s of the exact reverse process, a method of order 2.

    It is exp((alpha(s) - alpha(t)) G), where G is the reverse generator per unit of alpha at the middle of alpha(t) and
    alpha(s). All sites move jointly. Samplers move sites independently and are compared with this matrix.

    The result is (N, N) with N = S**L, in the order of ``all_states``.
    """
    from scipy.linalg import expm

    a_t, a_s = float(process.schedule.alpha(t)), float(process.schedule.alpha(s))
    middle = (a_t + a_s) / 2
    generator = reverse_generator(world, process, float(process.schedule.time(middle))) / middle
    return torch.as_tensor(expm(((a_s - a_t) * generator).numpy()))


@torch.no_grad()
def model_generator(model: Denoiser, t: float, length: int | None = None) -> Float[Tensor, "N N"]:
    """Compute the generator of the reverse process that a denoiser predicts at time t, per unit of -log alpha.

    One site jumps at a time. The result is (N, N) with N = S**L, in the order of ``all_states``.

    Raises:
        ValueError: if neither the model nor ``length`` gives the number of sites.
    """
    check_denoiser(model, "model_generator")
    process, size = model.process, model.length if length is None else whole(length, "model_generator: length", 1)
    if size is None:
        raise ValueError("model_generator: length= must say how many sites; this model has no length of its own")
    check_joint(process, size, "model_generator")
    z = all_states(process.states, size)
    rates = model(z, t).rates
    generator = torch.zeros(len(z), len(z), dtype=torch.float64)
    rows = torch.arange(len(z))
    for i in range(size):
        for v in range(process.columns):
            other = z.clone()
            other[:, i] = process.place(torch.full_like(rows, v), z[:, i])
            moved = other[:, i] != z[:, i]
            generator[rows[moved], state_index(other, process.states)[moved]] += rates[moved, i, v]
    return generator - torch.diag(generator.sum(-1))


def reverse_law(model: Denoiser, length: int | None = None, tolerance: float = 1e-10) -> Float[Tensor, " M"]:
    r"""Compute the law at time 0 of the model's reverse process, run in continuous time from the prior.

    The law is found by integrating dp/dl = (1 - alpha) p R over l = log(alpha / (1 - alpha)) from -25 to 25. R is the
    generator that ``model_generator`` returns. As functions of l the rates are bounded. Minus the log of the result is
    the exact negative log-likelihood of the model as a continuous-time sampler.

    Args:
        model: the denoiser; its alpha(1) is 0 or below 1e-10.
        length: L, needed if the model has none of its own.
        tolerance: relative and absolute tolerance of the integrator.

    Returns:
        (M,) over the M = n**L data sequences.

    Raises:
        ValueError: without a length, or for a schedule with alpha(1) above 1e-10 or a clock for each site.
    """
    from scipy.integrate import solve_ivp

    check_denoiser(model, "reverse_law")
    process, size = model.process, model.length if length is None else whole(length, "reverse_law: length", 1)
    tolerance = real(tolerance, "reverse_law: tolerance", "(0, 1)")
    least = float(process.schedule.alpha(1.0)) if process.schedule.sites is None else math.nan
    if size is None or not least <= 1e-10:
        raise ValueError(
            f"reverse_law: needs a length, and one clock with alpha(1) = 0; got length {size}, alpha(1) = {least}"
        )
    check_joint(process, size, "reverse_law")
    start = law_of_prior(process, size)

    def slope(clock: float, p: np.ndarray) -> np.ndarray:
        alpha = 1 / (1 + np.exp(-clock))
        generator = model_generator(model, float(process.schedule.time(max(alpha, least))), size)
        return (1 - alpha) * (torch.as_tensor(p) @ generator).numpy()

    done = solve_ivp(slope, (-25.0, 25.0), start.numpy(), method="DOP853", rtol=tolerance, atol=tolerance)
    return law_of_data(process, torch.as_tensor(done.y[:, -1]), size)
