"""Pictures of recorded runs: the states over time, and the order in which masks were revealed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import shown, whole, wholes
from discdiff.plots.drawing import on, whole_ticks
from discdiff.process import Process
from discdiff.sampling import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["revealed", "trajectory", "unmasking_order"]

_WRITTEN = 2500  # the most characters written in a picture


def trajectory(
    samples: Samples,
    process: Process,
    ax: "Axes | None" = None,
    *,
    row: SupportsIndex = 0,
    decode: Callable[[Tensor], str] | None = None,
) -> "Axes":
    """Draw the states of one row over time: a line for each time of the grid, a column for each position.

    The first line is the start, the last one the result. Masks are grey. A token keeps its colour.

    Args:
        samples: what a sampler gave with ``record=True``.
        process: the forward process, which knows the mask.
        ax: where to draw; a new figure if None.
        row: which row of the batch.
        decode: a function from ids (1,) to text, such as a tokenizer's ``decode``; its text is written on each site.

    Raises:
        TypeError: if ``samples``, ``process`` or ``decode`` is of another kind.
        ValueError: for samples without a trajectory, a row that there is not, or a picture with ``decode`` of more than
            2500 sites.
        ImportError: if matplotlib is not installed.
    """
    path = _path(samples, process, "trajectory")
    states = path[:, whole(row, "trajectory: row", 0, path.shape[1] - 1)]
    if decode is not None and not callable(decode):
        raise TypeError(f"trajectory: decode is called with ids (1,) and gives text, got {shown(decode)}")
    if decode is not None and states.numel() > _WRITTEN:
        raise ValueError(
            f"trajectory: text is written on at most {_WRITTEN} sites, got {states.shape[0]} x {states.shape[1]}; "
            "leave decode out, or take fewer steps"
        )
    columns = states.shape[1]
    axis = on(ax, (min(14.0, 2.0 + 0.22 * columns), min(9.0, 1.4 + 0.22 * len(states))))
    hidden = _hidden(states, process)
    cells = np.ma.masked_array(states.double().numpy(), hidden.numpy())
    axis.set_facecolor("0.82")  # seen where cells are masked out
    axis.imshow(cells, cmap="viridis", vmin=0, vmax=max(process.states - 1, 1), aspect="auto", interpolation="nearest")
    if decode is not None:
        for line, site in (~hidden).nonzero().tolist():
            token = states[line, site]
            dark = float(token) < 0.6 * max(process.states - 1, 1)
            said = decode(token[None])
            axis.text(site, line, said, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    where = "grey: masked" if bool(hidden.any()) else "colour: token"
    axis.set(xlabel="position", ylabel="step (0: start)", title=f"States over time, row {int(row)} ({where})")
    whole_ticks(axis.xaxis, axis.yaxis)
    return axis


def unmasking_order(
    samples: Samples, process: Process, ax: "Axes | None" = None, *, shape: tuple[int, int] | None = None
) -> "Axes":
    """Draw, as a heat map, the step at which each site was last unmasked.

    By default a line is a row of the batch and a column a position. With ``shape`` the mean over the batch is arranged
    as an image. Step 0 stands for a site that held a token from the start, such as a prompt. A site that is masked to
    the end is left white.

    Args:
        samples: what a sampler gave with ``record=True``.
        process: the forward process, which knows the mask.
        ax: where to draw; a new figure if None.
        shape: (height, width) of the image that the L positions are, with height * width = L.

    Raises:
        TypeError: if ``samples`` or ``process`` is of another kind.
        ValueError: for samples without a trajectory, a process without a mask, or a shape that does not hold L sites.
        ImportError: if matplotlib is not installed.
    """
    path = _path(samples, process, "unmasking_order")
    if not process.absorbing and process.mask_id is None:
        raise ValueError(f"unmasking_order: needs a process with a mask, such as Masked or Hybrid, got {process}")
    order, length = revealed(path, process), path.shape[2]
    if shape is not None:
        sides = wholes(shape, "unmasking_order: shape", 1)
        if len(sides) != 2 or sides[0] * sides[1] != length:
            raise ValueError(f"unmasking_order: shape must be (height, width) of {length} sites, got {shown(shape)}")
        order = order.nanmean(0).view(sides)
    axis = on(ax)
    values = np.ma.masked_invalid(order.numpy())
    picture = axis.imshow(
        values, cmap="viridis", vmin=0, vmax=len(path) - 1, interpolation="nearest",
        aspect="auto" if shape is None else "equal",
    )  # fmt: skip
    mean = "" if shape is None else f", mean of {path.shape[1]} samples"
    axis.figure.colorbar(picture, ax=axis, label=f"step of unmasking{mean}")
    names = ("position", "sample") if shape is None else ("column", "line")
    axis.set(xlabel=names[0], ylabel=names[1], title="Order of unmasking")
    whole_ticks(axis.xaxis, axis.yaxis)
    return axis


def revealed(path: Int[Tensor, "N B L"], process: Process) -> Float[Tensor, "B L"]:
    """Return the last step at which each site lost its mask, (B, L), from states (N, B, L) at N times.

    0 is a site without a mask at the start that never got one; NaN one that is masked at the end.
    """
    hidden = _hidden(path, process)
    lost = hidden[:-1] & ~hidden[1:]
    step = torch.arange(1, len(path), dtype=torch.float64)[:, None, None]
    last = (lost * step).amax(0) if len(path) > 1 else torch.zeros(path.shape[1:], dtype=torch.float64)
    return last.masked_fill(hidden[-1], torch.nan)


def _hidden(states: Int[Tensor, "*N"], process: Process) -> Bool[Tensor, "*N"]:
    if process.absorbing:
        return states == process.hide(states)
    return torch.zeros_like(states, dtype=torch.bool) if process.mask_id is None else states == process.mask_id


def _path(samples: object, process: object, what: str) -> Int[Tensor, "N B L"]:
    if not isinstance(samples, Samples):
        raise TypeError(f"{what}: samples must be what a sampler returns, got {shown(samples)}")
    if not isinstance(process, Process):
        raise TypeError(f"{what}: process must be a Process, such as sampler.process, got {shown(process)}")
    if samples.trajectory is None:
        raise ValueError(f"{what}: these samples have no trajectory; give record=True to sample")
    return samples.trajectory.cpu()
