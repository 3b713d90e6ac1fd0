r"""Compute, exactly, the mean of a network's predictions at earlier times less its prediction now.

    residual(x_t) = E[f_s(x_s) | x_t] - f_t(x_t),        x_t -> ... -> x_s by the exact reverse process

The residual of the exact denoiser is 0 for every chain of times (tower rule). So is that of every f that does not
depend on its input, down to s > 0; at s = 0, f is the clean sequence itself, whatever the network says. The
leave-one-out has a residual on noise that is not absorbing.
Reference: Consistent Diffusion Language Models (2026, https://arxiv.org/abs/2605.00161).
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import listing, real, shown
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.process import Process
from discdiff.theory.world import Enumeration, all_states, check_size

__all__ = ["exact_reverse", "joint_of_times", "path_residual"]


def joint_of_times(world: Enumeration, process: Process, t: float, s: float) -> Float[Tensor, "N N"]:
    """Compute p(x_t, x_s) = p_s(x_s) q_{t|s}(x_t | x_s) for s <= t, (N, N) with N = S**L; row x_t, column x_s.

    Raises:
        ValueError: if s > t, or the matrix is too large.
    """
    check_size(process.states, world.length, "the joint law of two times", axes=2)
    forward = functools.reduce(torch.kron, [process.kernel(t, s)] * world.length)
    return (world.marginal(process, s)[:, None] * forward).T


def exact_reverse(world: Enumeration, process: Process, t: float, s: float) -> Float[Tensor, "N N"]:
    """Compute p(x_s | x_t) of the exact reverse process of all sites together, (N, N) with N = S**L.

    Rows of states with p_t = 0 are 0.

    Raises:
        ValueError: if s > t, or the matrix is too large.
    """
    joint, p_t = joint_of_times(world, process, t, s), world.marginal(process, t)[:, None]
    return torch.where(p_t > 0, joint / p_t, 0.0)


@torch.no_grad()
def path_residual(
    world: Enumeration, model: Denoiser, times: Sequence[float], *, loo: bool = False
) -> Float[Tensor, "N L V"]:
    """Compute E[f_s(x_s) | x_t] - f_t(x_t) for every state x_t, as differences of probabilities.

    Args:
        world: the law of the data, which gives the exact reverse process.
        model: the denoiser whose prediction f is tested.
        times: t > ... > s, two at least; the expectation goes through all of them.
        loo: whether f is the leave-one-out in place of the denoiser.

    Returns:
        (N, L, V) for the N = S**L states in the order of ``all_states``; 0 at states that x_t never has.

    Raises:
        TypeError: if ``model`` is no Denoiser, or ``world`` no Enumeration.
        ValueError: if the times are not in [0, 1] or increase, or there are fewer than two; if the leave-one-out is
            undefined at some state; or the matrices are too large.
    """
    process = check_denoiser(model, "path_residual").process
    if not isinstance(world, Enumeration):
        raise TypeError(f"path_residual: world must be an Enumeration, got {shown(world)}")
    grid = [real(time, "path_residual: a time", "[0, 1]") for time in listing(times, "path_residual: times")]
    if len(grid) < 2 or any(late < early for late, early in itertools.pairwise(grid)):
        raise ValueError(f"path_residual: times must be at least two, none after the one before it, got {grid}")
    steps = [exact_reverse(world, process, late, early) for late, early in itertools.pairwise(grid)]
    states = all_states(process.states, world.length)

    def known(time: float) -> Tensor:
        met = (world.marginal(process, time) > 0).nonzero()[:, 0]
        if time == 0:
            rows = torch.nn.functional.one_hot(process.column(states[met]), process.vocab_size).double()
        else:
            said = model(states[met], time)
            rows = (said.loo if loo else said.denoiser).double().exp()
        return torch.zeros(len(states), *rows.shape[1:], dtype=torch.float64).index_copy(0, met, rows)

    mean = known(grid[-1])
    for step in reversed(steps):
        mean = (step @ mean.flatten(1)).view_as(mean)
    return torch.where((world.marginal(process, grid[0]) > 0)[:, None, None], mean - known(grid[0]), 0.0)
