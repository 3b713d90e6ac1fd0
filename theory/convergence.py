r"""Check the order that a predictor declares: of the end law, of single steps, and of the step to 0.

    TV(p_T K^n, p_d) ~ n^-order        on an interior window, to which a declared order refers
    TV(p_t K_h, p_{t-h}) ~ h^(order + 1)    at early and late times outside the window
    TV(p_t K_t, p_0) ~ (1 - alpha_t)^2      in the step to 0, which must draw a single noisy site exactly

If the operator cannot be enumerated, the distance of the end law is measured by chi-square.
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
    """Yield the shortfall of the slope of the end law's error, at the coarsest refinement that shows the order.

    A declared order is the least over processes and data. If no rate is clipped, rules that clip do better than they
    declare; otherwise their first-order error may exceed the second-order one only after a thousand steps.
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
    """Yield the shortfall of the slope of a single step's error from order + 1."""
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
    """Yield the shortfall from 2 of the slope of a step's error, from 1 - alpha = .004 and .002 to 0.

    There at most one site is noisy, up to a probability of (1 - alpha)^2, and it must be drawn from its exact law.
    Worlds with impossible sequences are left out: the noisy site may be ambiguous, and independent moves then have an
    error of 1 - alpha.
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
    """Yield by how much the measured order falls below the declared one, beyond three standard errors.

    The error of the law at the end of ``WINDOW`` is the root of its chi-square distance from the exact law. Its order
    is measured on the two finest grids for which draws resolve this distance.

    Raises:
        NotChecked: if draws do not resolve the distance on two grids.
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
    """Draw ``SAMPLES`` states from the exact law at the window's start and take equal steps through the window."""
    times = np.linspace(*WINDOW, steps + 1).tolist()
    state, at = Run.start(case.model, SAMPLES, case.seed).begin(case.starts(times[0], SAMPLES), times[0])
    for k in range(steps):
        state = case.operator(state, replace(at, t=times[k], s=times[k + 1], step=k + 1))
    return state.tokens


def _chi_square_distance(tokens: Tensor, law: Tensor, states: int) -> tuple[float, float]:
    """Estimate sum (q - p)^2 / p without bias, with q the law that drew the tokens; also its standard error."""
    n, kept = len(tokens), law > 0
    seen = torch.bincount(state_index(tokens, states), minlength=len(law)).double()[kept]
    statistic = float(((seen - n * law[kept]) ** 2 / (n * law[kept])).sum())
    freedom = int(kept.sum()) - 1
    distance = (statistic - freedom) / n
    return distance, math.sqrt(2 * freedom + 4 * n * max(distance, 0.0)) / n
