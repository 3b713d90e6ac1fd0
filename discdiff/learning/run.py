"""The state of a training run, and its checkpoint: one file, replaced as a whole, from which no code is run."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from discdiff.learning.batches import Rows
from discdiff.learning.objectives import StagedLoss
from discdiff.losses import Objective

__all__ = ["CHECKPOINT", "Run", "bar", "told"]

CHECKPOINT = "checkpoint.pt"


@dataclass
class Run:
    """All that the next step of a training run depends on.

    Attributes:
        network, average, optimizer, schedule: the weights, their average, the optimizer and its learning rate.
        generator: draws the batches, so its state is the position in the data.
        settings: what the run was started with, by the names of arguments.
        step: the number of steps done.
        smooth: the smoothed loss.
        curve, held_out_curve: (step, loss), as in ``Trainer``.
    """

    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: Any
    generator: torch.Generator
    settings: dict[str, str]
    step: int = 0
    smooth: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    held_out_curve: list[tuple[int, float]] = field(default_factory=list)

    def save(self, folder: Path | None, device: torch.device) -> None:
        """Write the checkpoint, if there is a folder; a reader finds the old file or the new one, never a part."""
        if folder is None:
            return
        numbers = {name: getattr(self, name) for name in ("settings", "step", "smooth", "curve", "held_out_curve")}
        parts = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer", "schedule")}
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{CHECKPOINT}.new"
        with beside.open("wb") as file:
            torch.save({**numbers, **parts, "random": self._random(device)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / CHECKPOINT)

    def restore(self, folder: Path, device: torch.device) -> None:
        """Take the state of the checkpoint of a folder, if there is one, and set torch's random state.

        Raises:
            ValueError: if the file is damaged or no checkpoint of ``Trainer``, or of a run with other settings.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = dict(state["settings"])
        except Exception as error:  # a damaged file raises errors of many kinds
            said = str(error).strip().split("\n")[0]
            raise ValueError(
                f"fit: {path} is no checkpoint of Trainer ({said}); delete it or give another folder"
            ) from error
        other = [
            f"{name} {found.get(name)}, now {now}" for name, now in self.settings.items() if found.get(name) != now
        ]
        if other:
            raise ValueError(
                f"fit: {path} is of another run: {'; '.join(other)}. Give the same arguments, another folder, or "
                "resume=False to begin anew"
            )
        for name in ("network", "average", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.smooth = state["step"], state["smooth"]
        self.curve[:], self.held_out_curve[:] = state["curve"], state["held_out_curve"]
        self._restore_random(state["random"], device)

    def _random(self, device: torch.device) -> dict[str, torch.Tensor]:
        states = {"data": self.generator.get_state(), "cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})

    def _restore_random(self, states: dict[str, torch.Tensor], device: torch.device) -> None:
        self.generator.set_state(states["data"])
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)


def told(value: object) -> str:
    """Return a description of a setting that is the same in another process.

    Data have a fingerprint, a network its class and a fingerprint of its shapes, and a function its name. A staged loss
    has its repr and a fingerprint of its ``details``.
    """
    if isinstance(value, Rows):
        return value.digest
    if isinstance(value, nn.Module):
        shapes = repr([(name, tuple(part.shape)) for name, part in value.state_dict().items()])
        return f"{type(value).__name__} {_hash(shapes.encode())}"
    if isinstance(value, StagedLoss):
        more = "".join(map(_content, value.details()))
        return _bare(value) + (f" {_hash(more.encode())}" if more else "")
    if callable(value) and not isinstance(value, Objective):
        return str(getattr(value, "digest", getattr(value, "__qualname__", type(value).__name__)))
    return _bare(value)


def _bare(value: object) -> str:
    """Return a repr without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _content(value: object) -> str:
    """Return a text that changes with the weights of a denoiser, the code of a function, or a value."""
    network, code = getattr(value, "fn", None), getattr(value, "__code__", None)
    if isinstance(network, nn.Module):
        parts = (part.detach().cpu().contiguous() for part in network.state_dict().values())
        return "".join(_hash(part.flatten().view(torch.uint8).numpy().tobytes()) for part in parts if part.numel())
    return _bare(value) if code is None else told(value) + _code(code)


def _code(code: CodeType) -> str:
    """Return a text of the instructions, names and numbers of a function, and of functions in it."""
    inner = [_code(one) for one in code.co_consts if isinstance(one, CodeType)]
    numbers = [one for one in code.co_consts if isinstance(one, int | float | str | bytes | tuple)]
    return _hash(code.co_code) + repr((code.co_names, inner)) + _bare(numbers)


def bar(visible: bool) -> Progress:
    """Return a progress bar on standard error, with the number of steps and the time that is left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not visible)
