"""A picture of the weights of particles during a run."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import listing, shown
from discdiff.plots.drawing import on, whole_ticks
from discdiff.sampling import Particles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["effective_sample_size"]


def effective_sample_size(
    ess: Float[Tensor, "N B"] | list[Float[Tensor, " B"]], particles: Particles, ax: "Axes | None" = None
) -> "Axes":
    """Draw the effective sample size of each group of particles after each step, before resampling.

    It is 1 / sum_p w_p^2 for the P normalised weights of a group: P if all weigh the same, 1 if one has all the weight.
    Below the dashed line, ess P, a group is resampled. The thick line is the mean over the groups.

    Args:
        ess: (N, B), the values of N steps, or a list of N tensors (B,): what ``sample(on_step=)`` gets as
            ``info["ess"]``. All P particles of a group hold the group's value.
        particles: the ``Particles`` that ran.
        ax: where to draw; a new figure if None.

    Raises:
        TypeError: if ``particles`` is anything else, or ``ess`` does not hold tensors.
        ValueError: for no steps, a batch that is no multiple of P, or values outside [1, P].
        ImportError: if matplotlib is not installed.
    """
    if not isinstance(particles, Particles):
        raise TypeError(f"effective_sample_size: particles must be the Particles that ran, got {shown(particles)}")
    steps = list(ess) if isinstance(ess, Tensor) and ess.ndim == 2 else listing(ess, "effective_sample_size: ess")
    size = particles.per_group
    if not steps or not all(isinstance(one, Tensor) and one.shape == steps[0].shape for one in steps):
        raise ValueError(
            'effective_sample_size: ess must be a list of tensors (B,), one a step, such as info["ess"] of '
            f"sample(on_step=); got {shown(ess)}"
        )
    if steps[0].ndim != 1 or len(steps[0]) % size or not len(steps[0]):
        raise ValueError(
            f"effective_sample_size: each step must have (B,) values with B a multiple of per_group = {size}, "
            f"got shape {tuple(steps[0].shape)}"
        )
    values = torch.stack(steps)[:, ::size].detach().cpu().double().numpy()
    if not ((values >= 1 - 1e-9) & (values <= size * (1 + 1e-9))).all():
        raise ValueError(
            f"effective_sample_size: values must lie in [1, {size}], got {values.min():g} to {values.max():g}"
        )
    axis, across = on(ax), np.arange(1, len(values) + 1)
    for number, group in enumerate(values.T):
        axis.plot(across, group, color="C0", alpha=0.35, linewidth=1, label=None if number else "a group")
    axis.plot(across, values.mean(1), color="C0", linewidth=2.5, label=f"mean of {values.shape[1]} groups")
    due = particles.ess * size
    if 0 < due <= size:
        axis.axhline(due, color="C3", linestyle="--", linewidth=1, label=f"resampled below {due:g}")
    axis.set(
        xlabel="step",
        ylabel=f"effective sample size, of {size} particles",
        title="Effective sample size",
        ylim=(0, size * 1.05),
    )
    whole_ticks(axis.xaxis)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    return axis
