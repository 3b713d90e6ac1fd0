"""What all pictures share: matplotlib, which is imported late, the axes to draw on, and checked curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from discdiff.checks import array, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["Curves", "Looks", "checked", "look", "on", "ticks", "whole_ticks"]

Curves = Mapping[str, Sequence[Any]]  # name -> (x, y) or (x, y, error of y), each a sequence of numbers
Looks = Mapping[str, Mapping[str, Any]]  # name -> keywords of matplotlib's plot


def on(ax: "Axes | None", size: tuple[float, float] = (6.0, 4.0)) -> "Axes":
    """Return the axes to draw on: the given ones, or those of a new figure of ``size`` inches.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if ``ax`` is no ``matplotlib.axes.Axes``.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError("discdiff.plots needs matplotlib: pip install 'discdiff[demo]'") from error
    if ax is None:
        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(
            f"ax must be one matplotlib.axes.Axes or None, got {shown(ax)}; of several axes give one, such as axes[0]"
        )
    return ax


def checked(
    curves: object, what: str, parts: Sequence[str], least: int = 1
) -> dict[str, list[Float[np.ndarray, " N"]]]:
    """Return curves by name as lists of float64 arrays (N,), one for each of ``parts``.

    Args:
        curves: the given mapping, name -> sequence of arrays.
        what: the name of the function, for errors.
        parts: the names of the arrays; those in brackets, such as "[error]", may be left out.
        least: the smallest accepted N.

    Raises:
        TypeError: if ``curves`` is no mapping, or an array does not hold numbers.
        ValueError: for no curves, another number of arrays, different lengths, or numbers that are not finite.
    """
    form = f"a mapping such as {{'Ancestral': ({', '.join(parts)})}}"
    if not isinstance(curves, Mapping):
        raise TypeError(f"{what}: curves must be {form}, got {shown(curves)}")
    if not curves:
        raise ValueError(f"{what}: curves must be {form}, got an empty one")
    needed, found = sum(part[0] != "[" for part in parts), {}
    for name, given in curves.items():
        if isinstance(given, str) or not hasattr(given, "__len__") or not needed <= len(given) <= len(parts):
            raise ValueError(f"{what}: the curve {name!r} must be ({', '.join(parts)}), got {shown(given)}")
        numbers: list[Float[np.ndarray, " N"]] = []
        for part, values in zip(parts, given, strict=False):
            one = array(values, f"{what}: {part.strip('[]')} of {name!r}", torch.float64).detach().cpu().numpy()
            if one.ndim != 1 or len(one) < least or (numbers and len(one) != len(numbers[0])):
                length = f"{len(numbers[0])}" if numbers else f"at least {least}"
                raise ValueError(
                    f"{what}: {part.strip('[]')} of {name!r} must be a list of {length} numbers, got shape {one.shape}"
                )
            if not np.isfinite(one).all():
                where = f"{what}: {part.strip('[]')} of {name!r}"
                raise ValueError(f"{where} must hold finite numbers, got {shown(values)}")
            numbers.append(one)
        found[str(name)] = numbers
    return found


def look(looks: Looks | None, name: str, **usual: object) -> dict[str, Any]:
    """Return matplotlib's keywords of one curve: the usual ones, replaced by those that ``looks`` has for it."""
    return {"label": name, **usual, **((looks or {}).get(name, {}))}


def ticks(ax: "Axes", numbers: Sequence[float]) -> None:
    """Put the ticks of a logarithmic x axis at whole numbers that occur, at most nine of them."""
    all_ = sorted({float(number) for number in numbers})
    chosen = all_[:: -(-len(all_) // 9)]
    ax.set_xscale("log")
    ax.set_xticks(chosen, [f"{number:g}" for number in chosen])
    ax.minorticks_off()


def whole_ticks(*sides: "Axis") -> None:
    """Put the ticks of axes at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for side in sides:
        side.set_major_locator(MaxNLocator(integer=True))
