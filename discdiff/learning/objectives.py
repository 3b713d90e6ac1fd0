"""Which loss trains which prediction on which process."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import shown
from discdiff.denoiser import Denoiser
from discdiff.losses import Objective
from discdiff.prediction import Predicts, check_predicts
from discdiff.process import Process

__all__ = ["Loss", "held_out_loss", "nats_per_token", "predicted"]

Loss = Objective | Callable[[Denoiser, Tensor], Tensor]


def predicted(loss: object, process: Process, predicts: Predicts | None) -> Predicts:
    """Return what a network trained by a loss on a process predicts: ``predicts``, or what follows from the loss.

    Raises:
        TypeError: if the loss cannot be called or is a class.
        ValueError: if the loss does not apply to the process, or ``predicts`` is needed or unknown.
    """
    if not callable(loss) or isinstance(loss, type):
        hint = f"; it is a class: write {loss.__name__}()" if isinstance(loss, type) else ""
        raise TypeError(f"Trainer: loss must be one of discdiff.losses or a function, got {shown(loss)}{hint}")
    if isinstance(loss, Objective):
        loss.check(process)
    if predicts is not None:
        check_predicts(predicts)
        return predicts
    if not isinstance(loss, Objective):
        raise ValueError("Trainer: the loss is a function, so give predicts='denoiser', 'loo' or 'ratio'")
    return loss.predicts(process)


def nats_per_token(loss: Loss, model: Denoiser, x0: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Return the mean loss of a batch (B, L), in nats a token.

    Raises:
        TypeError: if the loss returns no floating tensor (B,) or ().
    """
    value = loss(model, x0)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape not in ((len(x0),), ()):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"Trainer: the loss must return nats a sequence, a tensor (B,) = ({len(x0)},), got {got}")
    return value.mean() / x0.shape[1]


@torch.no_grad()
def held_out_loss(loss: Loss, model: Denoiser, x0: Int[Tensor, "N L"], batch: int) -> float:
    """Return the mean loss of rows (N, L), ``batch`` at a time, in nats a token, with the same noise in every call."""
    x0 = x0.to(model.device)
    with torch.random.fork_rng([x0.device] if x0.is_cuda else []):
        torch.manual_seed(0)
        return float(sum(len(part) * nats_per_token(loss, model, part) for part in x0.split(batch)) / len(x0))
