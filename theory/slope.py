r"""Measure the convergence order: how fast a sampler's exact law approaches its target as the grid is refined."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import shown, wholes
from discdiff.sampling import Sampler
from discdiff.theory.divergence import tv
from discdiff.theory.end_law import law
from discdiff.theory.world import Enumeration

__all__ = ["order"]


def order(
    steps: Sequence[int],
    build: Callable[[int], Sampler],
    *,
    target: Float[Tensor, " N"] | None = None,
    window: tuple[float, float] | None = None,
) -> float:
    r"""Fit the slope of -log TV(law, target) against log n, for the last three numbers of steps n.

    Args:
        steps: increasing numbers of steps, at least three.
        build: a function from n to a sampler with n steps.
        target: (N,) the target law; by default the oracle's p_t at the last time of the grid.
        window: (t, d): take n equal steps from t to d instead, starting from the exact p_t. Such a window avoids the
            singular rates at the ends of [0, 1]; declared orders refer to such windows.

    Raises:
        TypeError: if ``build`` is not callable or returns no Sampler.
        ValueError: for fewer than three numbers of steps; if the exact p_t is needed, because ``target`` is missing or
            ``window`` is given, and the model is not an Enumeration's.
    """
    steps = wholes(steps, "order: steps", 1)
    if len(steps) < 3 or not all(a < b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"order: a slope is fitted to three numbers of steps or more, which rise, got {list(steps)}")
    if not callable(build):
        raise TypeError(f"order: build must be a function of the number of steps, got {shown(build)}")
    errors = []
    for n in steps[-3:]:
        sampler, initial, goal = build(n), None, target
        if not isinstance(sampler, Sampler):
            raise TypeError(f"order: build must give a Sampler, got {shown(sampler)}")
        oracle = sampler.model.oracle
        if window is not None or goal is None:
            if not isinstance(oracle, Enumeration):
                raise ValueError("order: only the model of an Enumeration knows its p0 and p_t; give target=")
            if window is not None:
                begin, end = window
                sampler = sampler.on_grid(np.linspace(begin, end, n + 1).tolist())
                initial = oracle.marginal(sampler.process, begin)
            if goal is None:
                at_data = sampler.grid[-1] == 0
                goal = oracle.p0 if at_data else oracle.marginal(sampler.process, sampler.grid[-1])
        errors.append(tv(law(sampler, initial), goal))
    slope, _ = np.polyfit(np.log(steps[-3:]), np.log(errors), 1)
    return float(-slope)
