"""Pictures of errors and of quality: against calls, against steps, and against entropy."""

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from discdiff.checks import real, shown, whole
from discdiff.plots.drawing import Curves, Looks, checked, look, on, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["convergence", "frontier", "kl_against_calls"]


def kl_against_calls(
    curves: Curves, ax: "Axes | None" = None, *, floor: float = 1e-12, looks: Looks | None = None
) -> "Axes":
    """Draw the KL divergence of each sampler against its denoiser calls, on logarithmic axes.

    Lower is better. KL(p0 || law) is in nats, as ``theory.kl(p0, law)`` gives it. A value below ``floor``, such as the
    0 of an exact sampler, is drawn at ``floor``, and a dotted line marks that height.

    Args:
        curves: name -> (calls, KL) or (calls, KL, standard errors), each a list of N numbers.
        ax: where to draw; a new figure if None.
        floor: the smallest value that is drawn.
        looks: name -> keywords of matplotlib's ``errorbar`` for that curve, such as ``{"color": "C3"}``.

    Raises:
        TypeError: if ``curves`` is no mapping of numbers.
        ValueError: for arrays that do not fit together, calls below 1, or a KL below 0 by more than rounding.
        ImportError: if matplotlib is not installed.
    """
    lines = checked(curves, "kl_against_calls", ("calls", "KL", "[standard error]"))
    floor = real(floor, "kl_against_calls: floor", "(0, inf)")
    for name, (calls, kl, *_) in lines.items():
        if calls.min() < 1:
            raise ValueError(f"kl_against_calls: calls of {name!r} must be at least 1, got {calls.min():g}")
        if kl.min() < -1e-9:
            raise ValueError(
                f"kl_against_calls: KL of {name!r} must be at least 0, got {kl.min():g}; both laws must sum to 1"
            )
    axis = on(ax)
    for name, (calls, kl, *error) in lines.items():
        axis.errorbar(
            calls, np.maximum(kl, floor), error[0] if error else None, **look(looks, name, marker="o", capsize=2)
        )
    if min(kl.min() for _, kl, *_ in lines.values()) < floor:
        axis.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label=f"at most {floor:.0e}")
    axis.set_yscale("log")
    ticks(axis, [n for calls, *_ in lines.values() for n in calls])
    axis.set(xlabel="denoiser calls", ylabel="KL(p0 || law of the samples), nats", title="Error against cost")
    return _finished(axis)


def convergence(
    curves: Curves, ax: "Axes | None" = None, *, last: SupportsIndex = 3, looks: Looks | None = None
) -> "Axes":
    """Draw the error of each sampler against its number of steps, with the fitted order in the legend.

    The order is the slope of -log error against log steps, fitted by least squares to the last points, as in
    ``theory.order``. The dashed line is the fit. Order 1: twice the steps halve the error. Order 2: they quarter it.

    Args:
        curves: name -> (steps, TV error), each a list of N numbers; the error lies in (0, 1].
        ax: where to draw; a new figure if None.
        last: how many points, from the last one backwards, the slope is fitted to.
        looks: name -> keywords of matplotlib's ``plot`` for that curve.

    Raises:
        TypeError: if ``curves`` is no mapping of numbers.
        ValueError: for fewer than ``last`` points, errors outside (0, 1], or steps below 1 or not increasing.
        ImportError: if matplotlib is not installed.
    """
    last = whole(last, "convergence: last", 2)
    lines = checked(curves, "convergence", ("steps", "TV error"), last)
    for name, (steps, error) in lines.items():
        if steps[0] < 1 or not (np.diff(steps) > 0).all():
            raise ValueError(f"convergence: steps of {name!r} must be at least 1 and increase, got {steps.tolist()}")
        if error.min() <= 0 or error.max() > 1 + 1e-9:
            raise ValueError(
                f"convergence: errors of {name!r} must lie in (0, 1], got {error.min():g} to {error.max():g}; "
                "an exact sampler has no order: leave it out"
            )
    axis = on(ax)
    for name, (steps, error) in lines.items():
        slope, height = np.polyfit(np.log(steps[-last:]), np.log(error[-last:]), 1)
        drawn = look(looks, name, marker="o", linestyle="none") | {"label": f"{name}: order {-slope:.2f}"}
        (points,) = axis.plot(steps, error, **drawn)
        axis.plot(steps, np.exp(height) * steps**slope, color=points.get_color(), linestyle="--", linewidth=1)
    axis.set_yscale("log")
    ticks(axis, [n for steps, _ in lines.values() for n in steps])
    axis.set(xlabel="steps", ylabel="total variation from the target", title="Order of convergence")
    return _finished(axis)


def frontier(
    curves: Curves,
    ax: "Axes | None" = None,
    *,
    data: tuple[float, float] | None = None,
    quality: str = "nats a token, by a judge",
    looks: Looks | None = None,
) -> "Axes":
    """Draw quality against entropy, a curve for each sampler, a point for each of its budgets.

    A sampler can make every sample likely and all samples alike. So quality alone does not rank samplers: the best
    curve comes nearest to the star of the data, on both axes.

    Args:
        curves: name -> (entropy, quality), or with their standard errors (entropy, quality, entropy's, quality's). Each
            is a list of N numbers, in the order of the budgets. Entropy is in nats.
        ax: where to draw; a new figure if None.
        data: (entropy, quality) of held-out data, drawn as a star.
        quality: what the quality is, with its unit; the label of the y axis.
        looks: name -> keywords of matplotlib's ``errorbar`` for that curve.

    Raises:
        TypeError: if ``curves`` is no mapping of numbers, or ``quality`` no text.
        ValueError: for arrays that do not fit together, or ``data`` that is not two numbers.
        ImportError: if matplotlib is not installed.
    """
    names = ("entropy", "quality", "[standard error of entropy]", "[standard error of quality]")
    lines = checked(curves, "frontier", names)
    if not isinstance(quality, str):
        raise TypeError(f"frontier: quality is the label of an axis, a text with a unit; got {shown(quality)}")
    if data is not None and (not hasattr(data, "__len__") or len(data) != 2):
        raise ValueError(f"frontier: data must be (entropy, quality) of the data, got {shown(data)}")
    star = None if data is None else [real(value, "frontier: data") for value in data]
    axis = on(ax)
    for name, (entropy, value, *errors) in lines.items():
        across, up = errors[0] if errors else None, errors[1] if len(errors) > 1 else None
        axis.errorbar(entropy, value, up, across, **look(looks, name, marker="o"))
    if star is not None:
        axis.plot(*star, marker="*", markersize=13, color="black", linestyle="none", label="data")
    axis.set(xlabel="entropy, nats", ylabel=quality, title="Quality against entropy")
    return _finished(axis)


def _finished(axis: "Axes") -> "Axes":
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    return axis
