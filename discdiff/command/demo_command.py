"""``discdiff demo``: one labelled sheet of digits, some text, and what to expect of such small networks."""

import argparse
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.adapters.own import load_trained
from discdiff.checks import LAST_SEED, whole
from discdiff.command.pictures import check_out, picture, pyplot_without_window
from discdiff.demo.data import ASSETS, GREY_LEVELS, SIDE, examples, text
from discdiff.denoiser import Denoiser, Guide
from discdiff.operator import GuideAt, State
from discdiff.prediction import Prediction
from discdiff.samplers import Ancestral
from discdiff.sampling import Sampler

__all__ = ["CALLS", "Ink", "Panel", "add_arguments", "panels", "run"]

CALLS = (4, 8, 16, 32, 64)
_COLUMNS, _SITES, _STEPS = 10, SIDE * SIDE, 36
_AMOUNTS = (-4, -3, -2, -1, 0, 1, 2, 3, 4, 5)
_HIDDEN = -1  # a hidden pixel, drawn blue

_SHOWN = (
    "The sheet shows digits of 8 x 8 pixels with 17 grey levels. Two small networks drew them, one of a masked and "
    "one of a uniform process. Each has 0.45 million weights and was trained for minutes on 1797 images. A call is "
    "one evaluation of a network: it is what a sampler costs. With 4 calls many pixels are drawn at once, without "
    "knowledge of each other, and masked digits fall apart. With 32 calls most digits can be read. 64 calls do not "
    "mend the rest: those are errors of the networks, not of the sampler. The last two pictures need no training. In "
    "an infill the given pixels are held fixed. The networks have seen these images, so they complete them well. A "
    "guide changes what the network predicts, here the amount of ink."
)
_NEXT = (
    ('discdiff sample digits --process uniform --sampler "ancestral >> gibbs(4)" --steps 32', "another sampler"),
    ('discdiff sample text --blocks 16 --corrector arpc --prompt "The "', "text, block by block"),
    ('discdiff verify "ancestral >> gibbs" --process uniform', "check what this sampler claims against exact laws"),
)


@dataclass(frozen=True)
class Panel:
    """One picture of the sheet: rows of images with a name for each row.

    Attributes:
        title: what it shows.
        rows: (R, N, 64) grey levels, -1 for a hidden pixel.
        names: the name of each row.
        below: a name for each column, or none.
        label: what the names of the columns are.
    """

    title: str
    rows: Int[Tensor, "R N 64"]
    names: tuple[str, ...]
    below: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Ink(Guide):
    """Guide that makes dark pixels more probable: each grey level v gets weight exp(amount v / 16)."""

    amount: int

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        levels = torch.arange(GREY_LEVELS, dtype=torch.float64) / (GREY_LEVELS - 1)
        return prediction.tilted(lambda row, position: (self.amount * levels).expand(len(row), -1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("demo.png"), help="picture to write")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed gives the same sheet")


def run(arguments: argparse.Namespace) -> int:
    """Draw the sheet, write it, say what it shows, and return the exit status 0.

    Raises:
        ImportError: if matplotlib or scikit-learn is not installed.
        ValueError: for a seed out of range, or an unsuitable path.
    """
    pyplot, seed = pyplot_without_window(), whole(arguments.seed, "--seed", 0, LAST_SEED)
    check_out(arguments.out, pyplot)
    start = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of networks so small, more threads wait for each other
    try:
        figure, written = _sheet(pyplot, panels(seed, CALLS)), _written(seed)
    finally:
        torch.set_num_threads(threads)
    figure.savefig(arguments.out, dpi=110)
    pyplot.close(figure)
    print(f"{textwrap.fill(_SHOWN, 100)}\n")
    print(f"A third network writes like Python's manual, 96 characters with 64 calls:\n  {written}\n")
    print("Try next:")
    for command, why in _NEXT:
        print(f"  {why}:\n    {command}")
    print(f"\nwrote {arguments.out} in {time.perf_counter() - start:.0f} s: open it")
    return 0


def panels(seed: int = 0, calls: tuple[int, ...] = CALLS) -> list[Panel]:
    """Sample what the sheet shows: data, one run, both processes at several costs, an infill, and a guided row.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    masked, uniform = (load_trained(ASSETS / f"digits-{name}.safetensors") for name in ("masked", "uniform"))
    names = tuple(f"{count} calls" for count in calls)
    data = examples("digits", 2 * _COLUMNS, torch.Generator().manual_seed(seed % 2**63))
    return [
        Panel("The data: what the networks learned from", data.view(2, _COLUMNS, _SITES), ("", "")),
        _one_run(masked, seed),
        Panel("Masked: starts with all pixels hidden", _costs(masked, calls, seed), names),
        Panel("Uniform: starts with random pixels", _costs(uniform, calls, seed), names),
        _infill(masked, data[:_COLUMNS], seed),
        _guided(masked, seed),
    ]


def _written(seed: int) -> str:
    model, (_, vocabulary) = load_trained(ASSETS / "text-masked.safetensors"), text()
    sampler = Sampler(model.process, model, Ancestral(), steps=64)
    return vocabulary.decode(sampler.sample(1, 96, seed=seed, prompt=vocabulary.encode("The ")).tokens[0])


def _costs(model: Denoiser, calls: tuple[int, ...], seed: int) -> Int[Tensor, "R N 64"]:
    runs = (Sampler(model.process, model, Ancestral(), steps=n).sample(_COLUMNS, _SITES, seed=seed) for n in calls)
    return torch.stack([out.tokens for out in runs])


def _one_run(model: Denoiser, seed: int) -> Panel:
    """Two runs: every fourth state of 36 steps."""
    sampler = Sampler(model.process, model, Ancestral(), steps=_STEPS)
    path = sampler.sample(2, _SITES, seed=seed, record=True).trajectory
    every = _STEPS // (_COLUMNS - 1)
    mask = model.process.mask_id
    assert path is not None and mask is not None
    states = path[::every].transpose(0, 1)
    frames = states.masked_fill(states == mask, _HIDDEN)
    said = tuple(str(n) for n in range(0, _STEPS + 1, every))
    return Panel("Two runs of Masked, state by state (blue: hidden)", frames, ("", ""), said, "calls made so far")


def _infill(model: Denoiser, x0: Int[Tensor, "N 64"], seed: int) -> Panel:
    frozen = torch.arange(_SITES) < _SITES // 2
    sampler = Sampler(model.process, model, Ancestral(), steps=32)
    out = sampler.sample(len(x0), _SITES, seed=seed, prompt=x0, frozen=frozen)
    return Panel(
        "Infill (Masked, 32 calls): the upper half is given",
        torch.stack([x0.masked_fill(~frozen, _HIDDEN), out.tokens, x0]),
        ("given", "filled in", "data"),
    )


def _guided(model: Denoiser, seed: int) -> Panel:
    rows = []
    for amount in _AMOUNTS:
        guided = model.guided(Ink(amount))
        rows.append(Sampler(model.process, guided, Ancestral(), steps=32).sample(3, _SITES, seed=seed).tokens)
    return Panel(
        "Guided (Masked, 32 calls): from little to much ink",
        torch.stack(rows, 1),
        ("1st sample", "2nd", "3rd"),
        tuple(f"{amount:+d}" if amount else "0" for amount in _AMOUNTS),
        "strength of the guide (0: none)",
    )


def _sheet(pyplot: Any, shown: list[Panel]) -> Any:  # noqa: ANN401  # matplotlib is imported late
    """Return the figure: two panels side by side, three times."""
    heights = [max(len(panel.rows) for panel in shown[k : k + 2]) + 0.5 for k in (0, 2, 4)]
    figure, axes = pyplot.subplots(3, 2, figsize=(13, 7.9), layout="constrained", height_ratios=heights)
    figure.get_layout_engine().set(hspace=0.02, wspace=0.02)
    colours = pyplot.get_cmap("gray_r").with_extremes(under="#a9c9ea")
    zoom, side = 1, SIDE + 2
    for axis, panel in zip(axes.flat, shown, strict=True):
        images = picture(panel.rows.flatten(0, 1), panel.rows.shape[1], zoom)
        axis.imshow(images.numpy(), cmap=colours, vmin=0, vmax=GREY_LEVELS - 1, interpolation="nearest")
        axis.set_title(panel.title, fontsize=13)
        axis.set_yticks([side * (n + 0.5) - 0.5 for n in range(len(panel.names))], panel.names, fontsize=11)
        places = [side * (n + 0.5) - 0.5 for n in range(len(panel.below))]
        axis.set_xticks(places, panel.below, fontsize=10)
        axis.set_xlabel(panel.label, fontsize=10)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure
