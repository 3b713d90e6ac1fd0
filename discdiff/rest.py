r"""What an operator asks of a model's leave-one-out, and when a corrector rests for want of it.

A model that predicts the denoiser D says nothing of O at a site whose state rules tokens out for sure, D being a point
mass there: at time 0 wherever noise does not hide the token, and at any time where noise never takes that state. A
ratio says nothing of O at alpha = 0. Which of this a step meets follows from the process, from what the model predicts
and from the time, so that it is known before the first call:

    at time 0       a corrector that reads O there rests: it is the identity, and makes no call
    at other times  the operator is refused
"""

from typing import Literal, Protocol, runtime_checkable

import torch

from discdiff.denoiser import Denoiser
from discdiff.handlers import At
from discdiff.process import Process
from discdiff.rank_one import RankOne
from discdiff.state import State

__all__ = ["Reads", "applied", "check_reads", "rests"]

Reads = Literal["hidden", "noisy", "shown"]


@runtime_checkable
class _Applicable(Protocol):
    """What this room needs to know of an operator."""

    @property
    def moves(self) -> bool: ...

    @property
    def reads(self) -> Reads | None: ...

    def __call__(self, state: State, at: At) -> State: ...


def rests(operator: _Applicable, model: Denoiser, t: float) -> bool:
    """Whether a corrector does nothing at time t, because the model determines no leave-one-out where all is clean."""
    if operator.moves or operator.reads is None:
        return False
    least, _ = _survivals(model.process, t)
    return least == 1 and _undetermined(operator.reads, model, 1.0)


def applied(operator: _Applicable, state: State, at: At) -> State:
    """The state after an operator, or the same state where it rests: how the parts of a composition are run."""
    return state if rests(operator, at.run.model.denoiser, state.t) else operator(state, at)


def check_reads(operator: _Applicable, model: Denoiser, t: float) -> None:
    """Raise ValueError if the model does not determine what an operator reads from time t on."""
    if rests(operator, model, t):
        return
    least, most = _survivals(model.process, t)
    if model.predicts == "ratio" and least == 0 and not model.process.absorbing:
        raise ValueError(
            f"{operator}: the leave-one-out prediction is undefined at t = {t:g}, because a ratio carries no "
            "information at alpha = 0; start the grid below t = 1"
        )
    reads = operator.reads
    if reads is not None and _undetermined(reads, model, most):
        where = "sites that hold tokens" if reads == "shown" else "the sites it redraws"
        raise ValueError(
            f"{operator} reads the leave-one-out prediction at {where}, and at t = {t:g} on {model.process} the "
            f"leave-one-out prediction is undefined there for a model that predicts {model.predicts!r}, whose "
            "denoiser may be a point mass; let the model predict 'loo', or keep this operator away with when()"
        )


def _survivals(process: Process, t: float) -> tuple[float, float]:
    """The least and the largest survival at a time, over the positions' clocks."""
    schedule = process.schedule
    if schedule.sites is None:
        alpha = float(schedule.alpha(t))
        return alpha, alpha
    alphas = schedule.alpha(torch.full((1, 1), t, dtype=torch.float64)).detach()
    return float(alphas.min()), float(alphas.max())


def _undetermined(reads: Reads, model: Denoiser, alpha: float) -> bool:
    """Whether some state that may be met leaves the leave-one-out open.

    Of processes that are not of rank one this is said at alpha = 1 only, where it is so for all; elsewhere it takes
    an S x S array to know, and the run says it.
    """
    process = model.process
    if model.predicts != "denoiser":
        return False
    if not isinstance(process, RankOne):
        return alpha == 1
    pi = process.noise("cpu").pi if reads != "noisy" else -process.noise("cpu").pi
    if process.mask_id is not None:
        pi = pi.index_fill(0, torch.tensor(process.mask_id), torch.inf)
    token = pi.argmin().view(1, 1)  # that noise takes least, or most; of pairs, beside another source token
    state = process.place(token, (token + 1) % process.vocab_size)
    if reads != "shown" and process.absorbing:
        state = process.hide(state)
    return bool(process.settled(state, torch.full((1, 1), alpha, dtype=torch.float64)).any())
