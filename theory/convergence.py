r"""Whether a predictor has the order that it declares: of the end law, of single steps, and in the step to 0.

    TV(p_T K^n, p_d) ~ n^-order        on an interior window: what a declared order means
    TV(p_t K_h, p_{t-h}) ~ h^(order + 1)    early and late, where the window does not reach
    TV(p_t K_t, p_0) ~ (1 - alpha_t)^2      in the step to 0, in which one site alone is drawn exactly

Where nothing can be enumerated, the distance of the end law is measured by chi-square.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from discdiff.denoiser import Counter
from discdiff.handlers import At, Run
from discdiff.sampler import Sampler
from discdiff.state import State
from discdiff.theory.divergence import tv
from discdiff.theory.enumeration import state_index
from discdiff.theory.order import order
from discdiff.theory.report import Errors, NotChecked
from discdiff.theory.trials import Case, enumerable

__all__ = ["end_order", "last_step", "measured_order", "on_data", "step_order"]

WINDOW = (0.9, 0.1)
REFINEMENTS = ([8, 16, 32], [32, 64, 128], [96, 192, 384])
EARLY_AND_LATE = (0.96, 0.04)
LENGTHS = (0.002, 0.001)  # steps of equal ones that meet those times
LAST = (0.004, 0.002)  # of 1 - alpha
EXACT = 1e-12  # a distance that is rounding
SAMPLES, GRIDS = 40_000, (1, 2, 4)


def end_order(cases: Sequence[Case], where: Case) -> Errors:
    """How far the slope falls short where it is asymptotic: the coarsest refinement that shows it will do.

    An order is the least over processes and data. Where nothing is clipped, rules that clip do better than they
    declare, and elsewhere their first-order error may take a thousand steps to outgrow the second-order one.
    """
    for case in enumerable([where]):
        declared, found = case.operator.order or 0.0, []
        for steps in REFINEMENTS:
            slope = _slope(case, steps)
            distance = declared - slope
            found.append((max(distance, 0.0), f"slope {slope:.2f} at {steps}, {case}"))
            if distance <= 0.1 or distance > 0.5:  # shown, or too far to be brought by a finer grid
                break
        yield min(found)


def _slope(case: Case, steps: Sequence[int]) -> float:
    return order(steps, lambda n: Sampler(case.process, case.model, case.operator, steps=n), window=WINDOW)


def step_order(cases: Sequence[Case]) -> Errors:
    """How far the slope of a single step's error falls short of one more than the order."""
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
    """The share of draws that are no data after a step to 0."""
    for case in cases:
        for t, s, where in case.over():
            if s == 0:
                tokens = case.process.column(case.run(case.starts(t, 1024), t, s)[0])
                known = (tokens[..., None] == case.process.data_tokens).any(-1)
                yield 1 - float(known.all(-1).double().mean()), where


def last_step(cases: Sequence[Case]) -> Errors:
    """How far the slope of a step's error falls short of 2, from 1 - alpha = .004 and .002 to 0.

    There at most one site is noisy, but for a share of (1 - alpha)^2: it must be drawn from its exact law. Where some
    sequences are impossible it may be unclear which site that is, and sites that are moved apart err by 1 - alpha.
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
    """By chi-square: the slope of the end law's distance from p_d where draws resolve it, less three of its errors."""
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
    """States after equal steps through the window, from many of the exact law at its beginning."""
    times = np.linspace(*WINDOW, steps + 1).tolist()
    counter = Counter(case.model, 0, torch.zeros(SAMPLES, dtype=torch.int64))
    state, run = State(case.starts(times[0], SAMPLES), times[0], torch.arange(SAMPLES)), Run(case.seed, counter)
    for k in range(steps):
        state = case.operator(state, At(case.process, run, times[k], times[k + 1], k + 1))
    return state.tokens


def _chi_square_distance(tokens: Tensor, law: Tensor, states: int) -> tuple[float, float]:
    """sum (q - p)^2 / p of the law q that drew the tokens, without bias, and its standard error."""
    n, kept = len(tokens), law > 0
    seen = torch.bincount(state_index(tokens, states), minlength=len(law)).double()[kept]
    statistic = float(((seen - n * law[kept]) ** 2 / (n * law[kept])).sum())
    freedom = int(kept.sum()) - 1
    distance = (statistic - freedom) / n
    return distance, math.sqrt(2 * freedom + 4 * n * max(distance, 0.0)) / n
