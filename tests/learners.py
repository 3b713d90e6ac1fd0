"""Small networks that learn a law of two sites exactly, and a run that is stopped and goes on."""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import discdiff as dd
from discdiff import losses
from discdiff.learning import Trainer

__all__ = ["MASKED", "ROWS", "Dropping", "Pairs", "ends_alike_if_killed", "killed", "stopping", "weights"]

MASKED = dd.Masked(3, dd.Linear())
ROWS = torch.randint(3, (40, 4), generator=torch.Generator().manual_seed(1))


class Pairs(nn.Module):
    """A network of L sites that can learn any prediction of a small world, told alpha by several of its functions."""

    def __init__(self, process: dd.Process, length: int, width: int = 64) -> None:
        super().__init__()
        self.states, self.columns, self.length = process.states, process.vocab_size, length
        self.inner = nn.Linear(length * self.states + 4, width)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, length * self.columns)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        a = alpha.float()[:, None]
        told = torch.cat([a, a.clamp(min=1e-4).log() / 9, (1 - a).clamp(min=1e-4).log() / 9, a * a], 1)
        seen = nn.functional.one_hot(x, self.states).flatten(1).float()
        h = torch.tanh(self.middle(torch.tanh(self.inner(torch.cat([seen, told], 1)))))
        return self.out(h).unflatten(-1, (self.length, self.columns))


class Dropping(nn.Module):
    """A network with dropout, so that a step depends on torch's random state and on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(4, 8)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        return self.out(self.norm(self.drop(self.token(x)).transpose(1, 2)).transpose(1, 2))


def stopping(folder: Path | None, **options: object) -> Trainer:
    """A run of a fresh network on the rows."""
    torch.manual_seed(7)
    said = {"batch": 8, "every": 3, "warmup": 4, "held_out": ROWS[:8], "progress": False, **options}
    return Trainer(Dropping(), MASKED, losses.MaskedNELBO(), ROWS, time=None, folder=folder, **said)  # type: ignore[arg-type]


def weights(trainer: Trainer) -> list[Tensor]:
    """The weights, their averages, and the curves as tensors."""
    assert isinstance(trainer.model.fn, nn.Module)
    curves = [torch.tensor(curve, dtype=torch.float64) for curve in (trainer.curve, trainer.held_out_curve)]
    return [*trainer.network.state_dict().values(), *trainer.model.fn.state_dict().values(), *curves]


def killed(work: Callable[[], object]) -> int:
    """Run in a process of its own, and return the signal that ended it; the work must kill itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that a fork leaves behind
        child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def kill_self(*_: object, **__: object) -> None:
    """End this process at once, as SIGKILL does."""
    os.kill(os.getpid(), signal.SIGKILL)


def ends_alike_if_killed(
    training: Callable[[Path | None], Trainer], owner: type, method: str, place: int, folder: Path
) -> None:
    """Kill a training of 12 steps in a call of a method, resume it, and compare the weights with an unstopped one's."""

    def die() -> None:
        calls, plain = [], getattr(owner, method)

        def counted(*arguments: object, **named: object) -> object:
            calls.append(0)
            if len(calls) == place:
                kill_self()
            return plain(*arguments, **named)

        setattr(owner, method, counted)
        training(folder).fit(12)

    assert killed(die) == signal.SIGKILL
    torch.manual_seed(99)  # the random state must come from the checkpoint
    resumed, whole = training(folder), training(None)
    resumed.fit(12)
    whole.fit(12)
    for one, other in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(one, other)
