r"""Check the order that a predictor declares.

The order is checked for the end law, for single steps and for the step to 0:

    TV(p_T K^n, p_d) ~ n^-order        on an interior window, to which a declared order refers
    TV(p_t K_h, p_{t-h}) ~ h^(order + 1)    at early and late times outside the window
    TV(p_t K_t, p_0) ~ (1 - alpha_t)^2      in the step to 0, which must draw a single noisy site exactly

TV is the total variation, p_t the exact law at time t, K_h the matrix of a step of length h, and K^n that of n equal
steps from T to d. If the operator cannot be enumerated, the chi-square distance of the end law is estimated from draws
instead.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from discdiff.operator import Run
from discdiff.sampling import Sampler
from discdiff.theory.divergence import tv
from discdiff.theory.report import Errors, NotChecked
from discdiff.theory.slope import order
from discdiff.theory.trials import Case, enumerable
from discdiff.theory.world import state_index

__all__ = ["end_order", "last_step", "measured_order", "on_data", "step_order"]

WINDOW = (0.9, 0.1)
REFINEMENTS = ([8, 16, 32], [32, 64, 128], [96, 192, 384])
EARLY_AND_LATE = (0.96, 0.04)
LENGTHS = (0.002, 0.001)  # of equal steps whose grids contain those times
LAST = (0.004, 0.002)  # values of 1 - alpha
EXACT = 1e-12  # smaller distances are rounding errors
SAMPLES, GRIDS = 40_000, (1, 2, 4)


def end_order(cases: Sequence[Case], where: Case) -> Errors:
    """Yield how far the fitted order of the end law's error is below the declared order.

    Finer grids are used until one shows the declared order or an order that is far too low. The smallest shortfall of
    all grids is yielded. A declared order is the lowest over processes and data. An operator that clips rates has a
    higher order where no rate is clipped. Where rates are clipped, a thousand steps may be needed before the
    first-order error exceeds the second-order error.
    """
    for case in enumerable([where]):
        declared, found = case.operator.order or 0.0, []
        for steps in REFINEMENTS:
            slope = _slope(case, steps)
            distance = declared - slope
            found.append((max(distance, 0.0), f"slope {slope:.2f} at {steps}, {case}"))
            if distance <= 0.1 or distance > 0.5:  # order shown, or too far off for a finer grid
                break
        yield min(found)


def _slope(case: Case, steps: Sequence[int]) -> float:
    return order(steps, lambda n: Sampler(case.process, case.model, case.operator, steps=n), window=WINDOW)


def step_order(cases: Sequence[Case]) -> Errors:
    """Yield how far the fitted order of a single step's error is below the declared order + 1, early and late."""
    for case in enumerable(cases):
        for t in EARLY_AND_LATE:
            p, errors = case.world.marginal(case.process, t), []
            for h in LENGTHS:
                s = t - h
                errors.append(tv(p @ case.matrix(t, s), case.world.marginal(case.process, s)))
            if max(errors) < EXACT:
                continue
            slope = np.polyfit(np.log(LENGTHS), np.log(np.maximum(errors, 1e-300)), 1)[0]
            short = (case.operator.order or 0.0) + 1 - float(slope)
            yield max(short, 0.0), f"slope {slope:.2f}, {case}, t = {t}"


def on_data(cases: Sequence[Case]) -> Errors:
    """Yield the share of draws that are not data sequences after a step to 0."""
    for case in cases:
        for t, s, where in case.over():
            if s == 0:
                tokens = case.process.column(case.run(case.starts(t, 1024), t, s)[0])
                known = (tokens[..., None] == case.process.data_tokens).any(-1)
                yield 1 - float(known.all(-1).double().mean()), where


def last_step(cases: Sequence[Case]) -> Errors:
    """Yield how far the fitted order in 1 - alpha of the error of a step to 0 is below 2.

    The steps start at 1 - alpha = .004 and .002. At most one site is noisy there, except with a probability of order
    (1 - alpha)^2, and that site must be drawn from its exact law. Data laws with impossible sequences are left out:
    there it may be ambiguous which site is noisy, and independent moves then have an error of order 1 - alpha.
    """
    for case in enumerable([case for case in cases if not case.setting.zeros]):
        errors, schedule, goal = [], case.process.schedule, case.world.marginal(case.process, 0.0)
        for noise in LAST:
            t = float(schedule.time(1 - noise))
            errors.append(tv(case.world.marginal(case.process, t) @ case.matrix(t, 0.0), goal))
        if max(errors) > EXACT:
            slope = math.log(errors[0] / errors[1]) / math.log(LAST[0] / LAST[1])
            yield max(2 - slope, 0.0), f"slope {slope:.2f}, {case}"
        else:
            yield 0.0, str(case)


def measured_order(cases: Sequence[Case]) -> Errors:
    """Yield how far the order of the end law's error, estimated from draws, is below the declared order.

    The error is the square root of the chi-square distance from the exact law. Three standard errors of the order are
    subtracted from the shortfall.

    Raises:
        NotChecked: if the distances are too small to be measured by draws.
    """
    case = cases[0]
    target = case.world.marginal(case.process, WINDOW[1])
    logs, errors = [], []
    for n in GRIDS:
        distance, error = _chi_square_distance(_end(case, n), target, case.process.states)
        if distance < 3 * error:
            break
        logs.append(math.log(distance) / 2)
        errors.append(error / distance / 2)
    if len(logs) < 2:
        raise NotChecked(f"its end law is too close to the exact one to be resolved by {SAMPLES} draws, {case}")
    slope = (logs[-2] - logs[-1]) / math.log(2)
    chance = 3 * math.hypot(errors[-2], errors[-1]) / math.log(2)
    short = (case.operator.order or 0.0) - slope - chance
    yield max(short, 0.0), f"slope {slope:.2f} +- {chance:.2f}, {case}"


def _end(case: Case, steps: int) -> Tensor:
    """Draw ``SAMPLES`` states from the exact law at the start of ``WINDOW``; take ``steps`` equal steps to its end."""
    times = np.linspace(*WINDOW, steps + 1).tolist()
    state, at = Run.start(case.model, SAMPLES, case.seed).begin(case.starts(times[0], SAMPLES), times[0])
    for k in range(steps):
        state = case.operator(state, replace(at, t=times[k], s=times[k + 1], step=k + 1))
    return state.tokens


def _chi_square_distance(tokens: Tensor, law: Tensor, states: int) -> tuple[float, float]:
    """Estimate the chi-square distance sum (q - p)^2 / p without bias, and its standard error.

    q is the law that the tokens were drawn from, p is ``law``.
    """
    n, kept = len(tokens), law > 0
    seen = torch.bincount(state_index(tokens, states), minlength=len(law)).double()[kept]
    statistic = float(((seen - n * law[kept]) ** 2 / (n * law[kept])).sum())
    freedom = int(kept.sum()) - 1
    distance = (statistic - freedom) / n
    return distance, math.sqrt(2 * freedom + 4 * n * max(distance, 0.0)) / n
