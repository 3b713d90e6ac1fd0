"""Draw the pictures of the guide, which are kept beside its pages: ``python docs/website/figures.py``."""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib.figure import Figure
from pictures import TOKENS, world
from torch import Tensor

import discdiff as dd

GUIDE = Path(__file__).resolve().parent.parent / "guide"
PARTS = (
    ("Process", "how tokens\nbecome noise"),
    ("Denoiser", "your network, and\nwhat it predicts"),
    ("Prediction", "D, leave-one-out\nor ratio, at a state"),
    ("Operator", "what one step\ndoes with it"),
    ("Sampler", "an operator over\na grid of times"),
    ("Samples", "tokens, calls,\nthe path"),
)
TIME, NOISY = 0.5, (0, 2)  # the state "a c"


def pipeline() -> Figure:
    """Draw the parts in the order in which data flow."""
    figure = Figure(figsize=(10.5, 2.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10.5), ylim=(0, 2.6))
    axes.axis("off")
    for k, (name, says) in enumerate(PARTS):
        x = 0.95 + 1.72 * k
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#e8f0fa", "edgecolor": "#3b6ea5"}
        axes.text(x, 1.75, name, ha="center", va="center", fontsize=12, bbox=box)
        axes.text(x, 0.95, says, ha="center", va="center", fontsize=9)
        if k:
            axes.annotate("", (x - 0.62, 1.75), (x - 1.1, 1.75), arrowprops={"arrowstyle": "->", "color": "#3b6ea5"})
    axes.annotate("", (4.39, 1.5), (4.39, 1.28), arrowprops={"arrowstyle": "->", "color": "#b35900"})
    note = "guides change a prediction before an operator uses it: model.guided(guide)"
    axes.text(4.39, 0.3, note, ha="center", color="#b35900", fontsize=9)
    return figure


def predictions() -> dict[str, tuple[Tensor, Tensor]]:
    """Return O and D of the first site at the noisy state, (3,) each, on masked and uniform noise."""
    found = {}
    for process in (dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())):
        x = torch.tensor([[process.mask_id if process.absorbing else NOISY[0], NOISY[1]]])
        prediction = world().denoiser(process, predicts="loo")(x, TIME)
        found[type(process).__name__] = (prediction.loo[0, 0].exp(), prediction.denoiser[0, 0].exp())
    return found


def beside() -> Figure:
    """Draw D beside the leave-one-out at one noisy state, on masked and on uniform noise."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    places = torch.arange(3)
    for axes, (name, (loo, denoiser)) in zip(figure.subplots(1, 2, sharey=True), predictions().items(), strict=True):
        axes.bar(places - 0.2, loo, 0.4, label="leave-one-out O: the other site alone", color="#b35900")
        axes.bar(places + 0.2, denoiser, 0.4, label="denoiser D: the site's own token too", color="#3b6ea5")
        axes.set_xticks(range(3), list(TOKENS))
        shown = "mask" if name == "Masked" else TOKENS[NOISY[0]]
        axes.set_title(f"{name}: first site shows {shown}, second shows {TOKENS[NOISY[1]]}", fontsize=10)
        axes.set_xlabel("clean token of the first site")
    figure.axes[0].set_ylabel("probability")
    figure.axes[1].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Write the pictures."""
    for name, make in (("pipeline", pipeline), ("predictions", beside)):
        make().savefig(GUIDE / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
