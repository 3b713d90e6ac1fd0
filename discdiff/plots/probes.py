"""A picture of a checkpoint's probe: how much its leave-one-out prediction looks at the token it leaves out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import listing, real, shown
from discdiff.plots.drawing import Looks, look, on
from discdiff.prediction import Predicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["loo_sensitivity"]


def loo_sensitivity(
    curves: Mapping[Predicts, Float[Tensor, "A 2"]],
    alphas: Sequence[float],
    ax: "Axes | None" = None,
    *,
    declared: Predicts | None = None,
    looks: Looks | None = None,
) -> "Axes":
    """Draw how much the leave-one-out prediction of a site changes if the site's own token is replaced.

    The total variation is 0 for an exact leave-one-out prediction. Of two readings of one network, the lower curve is
    the right one: ``predicts="loo"`` or ``predicts="denoiser"``. ``discdiff sensitivity`` draws this picture.

    Args:
        curves: reading -> (A, 2), the mean and its standard error at each alpha, as
            ``diagnostics.sensitivity_curve(model, x0, alphas)`` returns it.
        alphas: the survival probabilities, A of them.
        ax: where to draw; a new figure if None.
        declared: the reading that the model declares, ``model.predicts``; the legend marks it.
        looks: reading -> keywords of matplotlib's ``errorbar`` for that curve.

    Raises:
        TypeError: if ``curves`` is no mapping of tensors.
        ValueError: for a tensor of another shape, alphas outside (0, 1), or a ``declared`` that is no reading.
        ImportError: if matplotlib is not installed.
    """
    if not isinstance(curves, Mapping) or not all(isinstance(one, Tensor) for one in curves.values()):
        raise TypeError(f"loo_sensitivity: curves must be what sensitivity_curve returns, got {shown(curves)}")
    across = [real(alpha, "loo_sensitivity: alphas", "(0, 1)") for alpha in listing(alphas, "loo_sensitivity: alphas")]
    for name, curve in curves.items():
        if curve.shape != (len(across), 2) or not bool(torch.isfinite(curve).all()):
            raise ValueError(
                f"loo_sensitivity: the curve {name!r} must hold a mean and an error for each of {len(across)} alphas, "
                f"shape ({len(across)}, 2), got shape {tuple(curve.shape)}"
            )
    if declared is not None and declared not in curves:
        raise ValueError(f"loo_sensitivity: declared must be one of {sorted(curves)}, got {declared!r}")
    axis = on(ax)
    for name, curve in curves.items():
        mean, error = curve.detach().cpu().double().T.numpy()
        title = f"read as {name}{', as declared' if name == declared else ''}"
        axis.errorbar(across, mean, error, **look(looks, name, marker="o", capsize=2) | {"label": title})
    axis.set(
        xlabel="alpha, the share of clean tokens",
        ylabel="total variation, own token replaced",
        title="Sensitivity of the leave-one-out prediction",
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    return axis
