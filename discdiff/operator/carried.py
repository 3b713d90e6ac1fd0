"""Predictions that a state carries from one step to the next, without the logits that they hold.

An operator may remember the prediction of an earlier step in ``State.past`` or ``State.seen``. A run with gradients
would then keep the logits of every step. A prediction is a function of the tokens, the time and the weights, so it is
enough to know the call of the denoiser that made it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.choices import Watch
from discdiff.denoiser import Denoiser
from discdiff.operator.run import Run
from discdiff.operator.state import State
from discdiff.prediction import Output, Prediction

__all__ = ["Asked", "Calls", "loaded", "of_run", "unloaded", "watched"]


@dataclass(frozen=True)
class Asked:
    """A denoiser's call: the denoiser, states (R, L), times (R, L) or broadcastable to it, and row ids (R,)."""

    model: Denoiser
    x: Int[Tensor, "R L"]
    time: Float[Tensor, "#R #L"]
    rows: Int[Tensor, " R"]


Calls = list[tuple[Tensor, Asked]]  # the outputs of a denoiser and what it was asked


def watched(model: Denoiser, made: Calls) -> Denoiser:
    """Return the same model, which adds the output and the arguments of each call to ``made``."""
    other = copy.copy(model)

    def output(x: Tensor, t: Tensor, rows: Tensor | None = None, fresh: bool = False) -> Output:
        found = model.output(x, t, rows, fresh)
        if rows is not None and not fresh:
            made.append((found.source, Asked(model, x, t, rows)))
        return found

    other.output = output  # type: ignore[method-assign]
    return other


def unloaded(state: State, made: Calls) -> tuple[State, list[Asked | None]]:
    """Return a state whose predictions hold no logits, and the calls that give these logits, in a fixed order.

    A prediction that none of the calls ``made`` keeps its logits, and the call is None.
    """
    asked: list[Asked | None] = []

    def without(said: Prediction) -> Prediction:
        source = said.output.source
        asked.append(next((call for own, call in made if own is source), None))
        return (
            said if asked[-1] is None else _with(said, torch.empty(0, 0, 0, dtype=source.dtype, device=source.device))
        )

    return _changed(state, without), asked


def loaded(state: State, asked: list[Asked | None], made: Calls) -> State:
    """Return the state that ``unloaded`` was given; denoisers are called again, and the calls are added to ``made``."""
    if not any(asked):
        return state
    calls = iter(asked)

    def again(said: Prediction) -> Prediction:
        call = next(calls)
        if call is None:
            return said
        known = next((source for source, other in made if other is call), None)
        if known is None:
            known = call.model.output(call.x, call.time, call.rows).source
            made.append((known, call))
        return _with(said, known)

    return _changed(state, again)


def of_run(state: State, run: Run) -> State:
    """Return a state of the same tokens and predictions, for the rows of a run."""

    def reported(said: Prediction) -> Prediction:
        other = copy.copy(said)
        other.watch = Watch(run.rows, run.faults)
        return other

    def own(one: State) -> State:
        return replace(one, rows=run.rows, past=None if one.past is None else own(one.past))

    return _changed(own(state), reported)


def _changed(state: State, change: Callable[[Prediction], Prediction]) -> State:
    """Return a state with a function applied to each of its predictions, in a fixed order."""
    seen = None if state.seen is None else _everywhere(state.seen, change)
    past = None if state.past is None else _changed(state.past, change)
    return replace(state, seen=seen, past=past)


def _everywhere(said: Prediction, change: Callable[[Prediction], Prediction]) -> Prediction:
    """Return a prediction with a function applied to it and to those that it is combined with."""
    other = copy.copy(change(said))
    other.changes = tuple(each.of_parts(lambda part: _everywhere(part, change)) for each in said.changes)
    return other


def _with(said: Prediction, source: Tensor) -> Prediction:
    other = copy.copy(said)
    other.output = replace(said.output, source=source)
    return other
