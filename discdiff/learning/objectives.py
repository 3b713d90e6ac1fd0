"""Which loss trains which prediction on which process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from discdiff.checks import shown
from discdiff.denoiser import Denoiser
from discdiff.losses import Objective
from discdiff.prediction import Predicts, check_predicts
from discdiff.process import Process

__all__ = [
    "Loss",
    "StagedLoss",
    "evaluating",
    "held_out_loss",
    "predicted",
    "refuse_own",
    "scaled",
    "surprise",
    "times",
    "updates_of",
]

Loss = Objective | Callable[[Denoiser, Tensor], Tensor]


class StagedLoss(ABC):
    """A loss that follows the course of its training: it sees the averaged weights and the share of steps done.

    ``Trainer`` asks it for the losses of a batch by ``updates``, and takes one step of the optimizer after each.

    Attributes:
        whole: whether the value is that of a sequence, as a reward is. Otherwise the trainer divides it by L.
        rows: whether a batch holds rows of tokens (B, L), so that held-out data can be an array of them.
    """

    whole: ClassVar[bool] = False
    rows: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, model: Denoiser, x0: Tensor) -> Float[Tensor, " B"]:
        """Return the loss (B,) of a batch (B, L) outside a training, as at its last step."""

    @abstractmethod
    def updates(self, model: Denoiser, average: Denoiser, x0: Tensor, done: float) -> Iterator[Float[Tensor, " B"]]:
        """Yield losses (B,) of one batch, one for each step of the optimizer; weights change between two of them.

        Args:
            model: the denoiser that learns.
            average: the denoiser with averaged weights, which gets no gradient.
            x0: (B, L) data, or (B, L, 2) pairs.
            done: the share of the training's steps that are done, in [0, 1).
        """

    def details(self) -> tuple[object, ...]:
        """Return what tells two losses apart beside their repr; of a denoiser the weights count."""
        return ()

    def check(self, process: Process) -> None:  # noqa: B027  most apply to every process
        """Raise ValueError if the loss does not apply to the process."""

    def predicts(self, process: Process) -> Predicts:
        """Return what a network trained by this loss predicts."""
        return "denoiser"


def predicted(loss: object, process: Process, predicts: Predicts | None) -> Predicts:
    """Return what a network trained by a loss on a process predicts: ``predicts``, or what follows from the loss.

    Raises:
        TypeError: if the loss cannot be called or is a class.
        ValueError: if the loss does not apply to the process, or ``predicts`` is needed or unknown.
    """
    if not callable(loss) or isinstance(loss, type):
        hint = f"; it is a class: write {loss.__name__}()" if isinstance(loss, type) else ""
        raise TypeError(f"Trainer: loss must be one of discdiff.losses or a function, got {shown(loss)}{hint}")
    if isinstance(loss, Objective | StagedLoss):
        loss.check(process)
    if predicts is not None:
        check_predicts(predicts)
        return predicts
    if not isinstance(loss, Objective | StagedLoss):
        raise ValueError("Trainer: the loss is a function, so give predicts='denoiser', 'loo' or 'ratio'")
    return loss.predicts(process)


def updates_of(loss: Loss, model: Denoiser, average: Denoiser, x0: Tensor, done: float) -> Iterator[Float[Tensor, ""]]:
    """Yield the losses of a batch (B, L), in the unit of the training's curve: one, or those of a ``StagedLoss``.

    Raises:
        TypeError: if the loss returns no floating tensor (B,) or ().
    """
    values = loss.updates(model, average, x0, done) if isinstance(loss, StagedLoss) else iter((loss(model, x0),))
    for value in values:
        yield scaled(loss, value, x0)


def scaled(loss: Loss, value: object, x0: Tensor) -> Float[Tensor, ""]:
    """Return the mean of a loss over a batch (B, L), in nats a token; of a loss of whole sequences, the mean itself.

    Raises:
        TypeError: if the value is no floating tensor (B,) or ().
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape not in ((len(x0),), ()):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"Trainer: the loss must return nats a sequence, a tensor (B,) = ({len(x0)},), got {got}")
    return value.mean() / (1 if isinstance(loss, StagedLoss) and loss.whole else x0.shape[1])


@torch.no_grad()
def held_out_loss(loss: Loss, model: Denoiser, x0: Int[Tensor, "N L"], batch: int) -> float:
    """Return the mean loss of rows (N, L), ``batch`` at a time, in nats a token, with the same noise in every call."""
    x0 = x0.to(model.device)
    with torch.random.fork_rng([x0.device] if x0.is_cuda else []):
        torch.manual_seed(0)
        return float(sum(len(part) * scaled(loss, loss(model, part), part) for part in x0.split(batch)) / len(x0))


def times(x0: Tensor) -> Float[Tensor, " B"]:
    """Draw a time in (0, 1] for each row of a batch, (B,); together the times are spread evenly (stratified)."""
    even = torch.arange(len(x0), dtype=torch.float64, device=x0.device) / len(x0)
    return 1 - (torch.rand((), dtype=torch.float64, device=x0.device) + even) % 1


def surprise(log_d: Float[Tensor, "B L V"], x0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Return -log D(x0) summed over the sites, (B,) float64, for log D (B, L, V) and data (B, L)."""
    return -log_d.gather(-1, x0[..., None])[..., 0].double().sum(-1)


@contextmanager
def evaluating(*models: Denoiser | None) -> Iterator[None]:
    """Hold the networks of denoisers in evaluation mode, and give each of their modules its own mode back."""
    networks = [model.fn for model in models if model is not None and isinstance(model.fn, nn.Module)]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def refuse_own(other: Denoiser | None, model: Denoiser, name: str) -> None:
    """Raise ValueError if another denoiser has the network that learns: it would change with it."""
    if other is not None and other.fn is model.fn:
        raise ValueError(f"{name} has the network that is trained, and would change with it; give it a copy")
