r"""Checks of operators that need a leave-one-out O which the model does not determine.

A model that predicts the denoiser D does not determine O at a site whose state rules out a token, as D is a point mass
there. This happens at time 0 at every site that holds a token, and at any time in a state to which noise never leads. A
model that predicts a ratio does not determine O at alpha = 0. The process, ``predicts`` and the time tell before the
first call whether a step meets such a site:

    at time 0       a corrector that reads O there is skipped: it is the identity, without a denoiser call
    at other times  the operator is refused
"""

from typing import Literal, Protocol, runtime_checkable

import torch

from discdiff.denoiser import Denoiser
from discdiff.operator.run import At
from discdiff.operator.state import State
from discdiff.process import Process

__all__ = ["Reads", "applied", "check_reads", "rests"]

Reads = Literal["hidden", "noisy", "shown"]


@runtime_checkable
class _Applicable(Protocol):
    """The part of an operator's interface that this module uses."""

    @property
    def moves(self) -> bool: ...

    @property
    def reads(self) -> Reads | None: ...

    @property
    def site_times(self) -> bool: ...

    def __call__(self, state: State, at: At) -> State: ...


def rests(operator: _Applicable, model: Denoiser, t: float) -> bool:
    """Return whether a corrector is skipped at time t.

    It is skipped if all sites are clean at t and the model does not determine their leave-one-out.
    """
    if operator.moves or operator.reads is None:
        return False
    least, _ = _survivals(model.process, t)
    return least == 1 and _undetermined(operator.reads, model, 1.0)


def applied(operator: _Applicable, state: State, at: At) -> State:
    """Run an operator, or return the state unchanged if ``rests`` is True; compositions call this for each part."""
    return state if rests(operator, at.run.model.denoiser, state.t) else operator(state, at)


def check_reads(operator: _Applicable, model: Denoiser, t: float) -> None:
    """Raise ValueError if an operator needs what the model does not give.

    That is a leave-one-out prediction that the model does not determine at time t, or a time for every site.
    """
    if operator.site_times and not (model.process.masks or model.call.sees_site_times):
        raise ValueError(
            f"{operator} asks with revealed sites at time 0 and others at time t, and {model} takes one time a row, or "
            "none; take a denoiser with a time for every site, a masked process, or another operator, such as "
            "Ancestral()"
        )
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
    """Return the least and the largest survival probability at a time, over the schedules of the positions."""
    schedule = process.schedule
    if schedule.sites is None:
        alpha = float(schedule.alpha(t))
        return alpha, alpha
    alphas = schedule.alpha(torch.full((1, 1), t, dtype=torch.float64)).detach()
    return float(alphas.min()), float(alphas.max())


def _undetermined(reads: Reads, model: Denoiser, alpha: float) -> bool:
    """Return whether the leave-one-out O may be undetermined in a state that the operator meets.

    For processes that are not of rank one only alpha = 1 is tested, where O is undetermined for all of them. At other
    alphas the test would take an S x S array; there the error comes from the run.
    """
    process = model.process.rank_one
    if model.predicts != "denoiser":
        return False
    if process is None:
        return alpha == 1
    pi = process.noise("cpu").pi if reads != "noisy" else -process.noise("cpu").pi
    if process.mask_id is not None:
        pi = pi.index_fill(0, torch.tensor(process.mask_id), torch.inf)
    token = pi.argmin().view(1, 1)  # the token that noise takes least, or most; for pairs with another source token
    state = process.place(token, (token + 1) % process.vocab_size)
    if reads != "shown" and process.absorbing:
        state = process.hide(state)
    return bool(process.settled(state, torch.full((1, 1), alpha, dtype=torch.float64)).any())
