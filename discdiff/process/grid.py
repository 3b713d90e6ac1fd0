r"""Grids: N + 1 decreasing times for ``Sampler(..., grid=...)``.

The law of the samples depends on a grid only through alpha at its times. Equal steps of t follow the schedule. Equal
steps of alpha reveal equally many tokens. Equal steps of -log(1 - alpha) multiply the noise 1 - alpha by the same
factor in every step. A cosine reveals few tokens at first and many at the end.
"""

import math
from collections.abc import Iterable
from typing import SupportsIndex

from discdiff.checks import real, shown, whole
from discdiff.process.schedule import Schedule

__all__ = ["LONGEST", "by_alpha", "by_cosine", "by_log_noise", "by_time", "listed"]

LONGEST = 1 << 20  # most times of a grid: the key of a choice has 20 bits for the step


def by_time(steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
    """Make equal steps of t, as ``Sampler(..., steps=N)`` does.

    Raises:
        TypeError, ValueError: unless there is at least one step and 0 <= end < start <= 1.
    """
    steps = _check(steps, start, end)
    return _between([start * ((steps - n) / steps) + end * (n / steps) for n in range(steps + 1)], start, end)


def by_alpha(schedule: Schedule, steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
    """Make equal steps of alpha: on a masked process each step reveals equally many tokens in expectation.

    Raises:
        TypeError: if ``schedule`` is not a Schedule.
        ValueError: unless steps >= 1 and 0 <= end < start <= 1, or if the schedule differs among positions.
    """
    steps = _check(steps, start, end)
    first, last = _ends(schedule, start, end)
    return _times(schedule, [first + (last - first) * n / steps for n in range(steps + 1)], start, end)


def by_log_noise(
    schedule: Schedule, steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0, last: float = 1e-2
) -> tuple[float, ...]:
    """Make equal steps of -log(1 - alpha): each step multiplies the noise 1 - alpha by the same factor.

    Args:
        schedule: the noise schedule.
        steps: the number of steps.
        start, end: the first and the last time.
        last: the noise 1 - alpha at the start of the last step, used only if alpha = 1 at ``end``, where
            -log(1 - alpha) is infinite. A value above half the noise at ``start`` is replaced by that half.

    Raises:
        TypeError, ValueError: if ``last`` is outside (0, 1), if steps, start or end is invalid, or if the schedule
            differs among positions.
    """
    steps = _check(steps, start, end)
    first, finish = _ends(schedule, start, end)
    last = real(last, "by_log_noise: last", "(0, 1)")
    count = steps - 1 if finish == 1 else steps
    low = min(last, (1 - first) / 2) if finish == 1 else 1 - finish
    ratio = (low / (1 - first)) ** (1 / max(count, 1))
    alphas = [1 - (1 - first) * ratio**n for n in range(count + 1)]
    return _times(schedule, [*alphas, 1.0] if finish == 1 else alphas, start, end)


def by_cosine(schedule: Schedule, steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
    """Make steps in which 1 - alpha falls as a cosine: few tokens a step at first, many at the end.

    Reference: MaskGIT (Chang et al., 2022, https://arxiv.org/abs/2202.04200).

    Raises:
        TypeError: if ``schedule`` is not a Schedule.
        ValueError: unless steps >= 1 and 0 <= end < start <= 1, or if the schedule differs among positions.
    """
    steps = _check(steps, start, end)
    first, last = _ends(schedule, start, end)
    alphas = [last - (last - first) * math.cos(math.pi / 2 * n / steps) for n in range(steps + 1)]
    return _times(schedule, alphas, start, end)


def listed(times: Iterable[float]) -> tuple[float, ...]:
    """Check a list of times and return it as a grid.

    Raises:
        TypeError, ValueError: unless ``times`` holds at least two strictly decreasing times in [0, 1].
    """
    if isinstance(times, str) or not isinstance(times, Iterable) or getattr(times, "ndim", 1) != 1:
        raise TypeError(f"grid must be a sequence of decreasing times in [0, 1], got {shown(times)}")
    grid: list[float] = []
    for time in times:  # checked one by one, so that an endless iterable is refused too
        grid.append(real(time, "grid: a time", "[0, 1]"))
        if len(grid) > LONGEST or grid[-2:] != sorted(set(grid[-2:]), reverse=True):
            raise ValueError(f"grid must hold 2 to {LONGEST} strictly decreasing times in [0, 1], got {shown(grid)}")
    if len(grid) < 2:
        raise ValueError(f"grid must hold at least two strictly decreasing times in [0, 1], got {shown(grid)}")
    return tuple(grid)


def _check(steps: SupportsIndex, start: float, end: float) -> int:
    if not 0 <= real(end, "end", "[0, 1]") < real(start, "start", "[0, 1]") <= 1:
        raise ValueError(f"a grid goes from start to end with 0 <= end < start <= 1, got {start} and {end}")
    return whole(steps, "grid: steps", 1, LONGEST - 1)


def _ends(schedule: Schedule, start: float, end: float) -> tuple[float, float]:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"a grid by alpha needs a schedule, such as Linear(), got {shown(schedule)}")
    if schedule.sites is not None:
        raise ValueError(f"{schedule} has a clock for every position; give a grid of times")
    return float(schedule.alpha(start)), float(schedule.alpha(end))


def _times(schedule: Schedule, alphas: list[float], start: float, end: float) -> tuple[float, ...]:
    least = float(schedule.alpha(1.0))
    return _between([float(schedule.time(min(max(alpha, least), 1.0))) for alpha in alphas], start, end)


def _between(times: list[float], start: float, end: float) -> tuple[float, ...]:
    """Return the times as a grid with exact ends, without rounding errors."""
    return listed([start, *times[1:-1], end])
