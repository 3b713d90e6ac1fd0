r"""Grids: N + 1 decreasing times for ``Sampler(..., grid=...)``.

A law depends on its grid through alpha alone, so a grid says where the steps are spent: equal steps of t are the
schedule's own idea, equal steps of alpha reveal equally many tokens, equal steps of -log(1 - alpha) give every step the
same share of what is left, and a cosine spends them at the end.
"""

import math
from collections.abc import Iterable
from typing import SupportsIndex

from discdiff.checks import real, shown, whole
from discdiff.schedule import Schedule

__all__ = ["by_alpha", "by_cosine", "by_log_noise", "by_time", "listed"]

LONGEST = 1 << 20  # times of a grid: a choice's key has room for the numbers of so many steps


def by_time(steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
    """Equal steps of t; what ``steps=N`` gives."""
    steps = _check(steps, start, end)
    return _between([start * ((steps - n) / steps) + end * (n / steps) for n in range(steps + 1)], start, end)


def by_alpha(schedule: Schedule, steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0) -> tuple[float, ...]:
    """Equal steps of alpha: each reveals as many tokens of a masked process as every other."""
    steps = _check(steps, start, end)
    first, last = _ends(schedule, start, end)
    return _times(schedule, [first + (last - first) * n / steps for n in range(steps + 1)], start, end)


def by_log_noise(
    schedule: Schedule, steps: SupportsIndex, *, start: float = 1.0, end: float = 0.0, last: float = 1e-2
) -> tuple[float, ...]:
    """Equal steps of -log(1 - alpha): each settles the same share of what is not settled yet.

    Args:
        schedule: the clock.
        steps: N.
        start, end: the first and the last time.
        last: the noise 1 - alpha that the step to time 0 starts from, where the scale is infinite.
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
    """1 - alpha falls as a cosine of the steps: few tokens a step at first, many at the end (MaskGIT, 2022)."""
    steps = _check(steps, start, end)
    first, last = _ends(schedule, start, end)
    alphas = [last - (last - first) * math.cos(math.pi / 2 * n / steps) for n in range(steps + 1)]
    return _times(schedule, alphas, start, end)


def listed(times: Iterable[float]) -> tuple[float, ...]:
    """A list of times as a grid.

    Raises:
        ValueError: unless they are at least two, strictly decreasing, in [0, 1].
    """
    if isinstance(times, str) or not isinstance(times, Iterable) or getattr(times, "ndim", 1) != 1:
        raise TypeError(f"grid must be a sequence of decreasing times in [0, 1], got {shown(times)}")
    grid: list[float] = []
    for time in times:  # looked at one by one, so that what has no end is refused too
        grid.append(real(time, "grid: a time", "[0, 1]"))
        if len(grid) > LONGEST or grid[-2:] != sorted(set(grid[-2:]), reverse=True):
            raise ValueError(f"grid must hold 2 to {LONGEST} strictly decreasing times in [0, 1], got {shown(grid)}")
    if len(grid) < 2:
        raise ValueError(f"grid must hold at least two strictly decreasing times in [0, 1], got {shown(grid)}")
    return tuple(grid)


def _check(steps: SupportsIndex, start: float, end: float) -> int:
    if not 0 <= real(end, "end", "[0, 1]") < real(start, "start", "[0, 1]") <= 1:
        raise ValueError(f"a grid goes from start to end with 0 <= end < start <= 1, got {start} and {end}")
    return whole(steps, "steps", 1, LONGEST - 1)


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
    """The ends exactly, whatever rounding says."""
    return listed([start, *times[1:-1], end])
