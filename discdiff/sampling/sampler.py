r"""The sampling loop: run an operator with a process and a denoiser over a grid of times."""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import SupportsIndex

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from discdiff.checks import affordable, array, decided, placed, seeded, token_ids, whole
from discdiff.denoiser import Denoiser, check_denoiser, warn_of_dropout
from discdiff.operator import (
    SLOTS,
    At,
    Mix,
    Operator,
    Repeat,
    Run,
    State,
    Then,
    When,
    check_operator,
    check_reads,
    choose,
    listening,
    rests,
    while_listening,
)
from discdiff.process import LONGEST, Process, by_time, listed, require_process
from discdiff.sampling.samples import Samples, narrowest

__all__ = ["Sampler", "acting", "check_model", "check_rows"]


class Sampler:
    """Run an operator over a grid of times.

    Args:
        process: the forward process.
        model: a ``Denoiser`` for the same process.
        operator: one step of the sampler; it has exactly one predictor.
        steps: N, the number of equal intervals of t from 1 to 0.
        grid: instead of ``steps``, N + 1 decreasing times in [0, 1].

    Raises:
        TypeError: if the model is not a Denoiser or the operator has no predictor.
        ValueError: if the model is for another process, the operator does not support this one, or the grid is invalid.
    """

    def __init__(
        self,
        process: Process,
        model: Denoiser,
        operator: Operator,
        *,
        steps: SupportsIndex | None = None,
        grid: Iterable[float] | None = None,
    ) -> None:
        check_model(process, model, "Sampler")
        check_operator(operator, "Sampler")
        if not operator.moves:
            raise TypeError(f"Sampler: a step needs a predictor, such as Ancestral(), and {operator} only corrects")
        operator.check(process)
        if operator.width > SLOTS:
            raise ValueError(f"Sampler: a step has at most {SLOTS} slots, and {operator} takes {operator.width}")
        if (steps is None) == (grid is None):
            raise ValueError("Sampler: give either steps=N or grid=[1.0, ..., 0.0]")
        self.process, self.model, self.operator = process, model, operator
        self.grid = listed(grid) if grid is not None else _uniform_grid(steps)
        for _, part, time in self._acting():
            check_reads(part, model, time)

    def on_grid(self, grid: Iterable[float]) -> "Sampler":
        """Return the same sampler on another grid."""
        return Sampler(self.process, self.model, self.operator, grid=grid)

    @property
    def nfe(self) -> float | None:
        """Planned denoiser calls of a row: the sum of ``nfe`` of the operators that run, or None if one is unknown.

        ``Samples.nfe`` is the measured number. It is smaller if a call is not needed, because the prediction is still
        known or a two-stage predictor needs only one call in the last step.
        """
        total = 0.0
        for often, part, time in self._acting():
            if often and not rests(part, self.model, time):
                if part.nfe is None:
                    return None
                total += often * part.nfe
        return total

    def _acting(self) -> Iterator[tuple[float, Operator, float]]:
        for _, t, s in self.intervals():
            yield from acting(self.operator, t, s, t)

    def intervals(self) -> Iterator[tuple[int, float, float]]:
        """Yield (step number from 1, t, s) for every step."""
        for step, (t, s) in enumerate(itertools.pairwise(self.grid), start=1):
            yield step, t, s

    def through(self, state: State, run: Run) -> Iterator[State]:
        """Run all steps on a state at the first time of the grid, and yield the state after each."""
        for step, t, s in self.intervals():
            state = self.operator(state, At(self.process, run, t, s, step))
            yield state

    @while_listening(listening)
    def sample(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        record: bool = False,
        listen: bool = False,
        progress: bool = False,
        device: torch.device | str | None = None,
    ) -> Samples:
        r"""Draw samples.

        The tokens of row b depend on (seed, first_row + b) and the arguments, but not on the other rows of the batch.

        Args:
            batch: B; optional if ``initial`` is given.
            length: L; optional if ``initial`` is given or the model accepts only one length.
            seed: 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: id of the first row.
            prompt: the tokens of the first P sites, (P,) or (B, P). With ``frozen`` it is (L,) or (B, L), and the
                tokens where ``frozen`` is True are used.
            frozen: (L,) or (B, L) bools, True at given sites (infill). These sites keep their token of ``prompt`` or
                ``initial``, and the denoiser gets time 0 for them, as they are clean.
            initial: (B, L) states at the first time of the grid, instead of a draw from the prior.
            record: whether to keep the trajectory and the log-probability.
            listen: whether every choice is a Pyro site, for trace, replay and condition. Otherwise the run ignores
                Pyro's handlers, in every thread. Only one run listens at a time; a second one waits.
            progress: whether to show a progress bar on standard error.
            device: where to sample; by default where the model's parameters lie (``Denoiser.device``).

        Raises:
            ValueError: if shapes are wrong, ids are outside the vocabulary, logits are NaN or without mass, or a mask
                is left at time 0.
            RuntimeError: if a listening run starts inside another one of the same thread.
        """
        if initial is not None:
            initial = token_ids(initial, "sample: initial", "states")
            if initial.ndim != 2:
                raise ValueError(f"sample: initial must be (B, L) states, got shape {tuple(initial.shape)}")
            batch, length = (own if n is None else n for n, own in zip((batch, length), initial.shape, strict=True))
        batch, first_row = check_rows("sample", batch, first_row)
        length, seed = self._length(length), seeded(seed, "sample: seed")
        record = decided(record, "sample: record")
        device = placed(self.model.device if device is None else device, "sample: device")
        affordable(batch * length, f"sample: a batch of {batch} rows of length {length}")
        warn_of_dropout((self.model.fn, *self.model.guides), stacklevel=3)
        run = Run.start(self.model, batch, seed, first_row=first_row, device=device, record=record, listen=listen)
        state, at = run.begin(torch.zeros(batch, length, dtype=torch.int64, device=device), self.grid[0])
        if initial is not None:
            self._check_initial(initial, batch, length)
            state = state.at(initial.to(device, torch.int64))
        elif self.grid[0] == 1:
            state = state.at(choose("prior", self.process.prior(batch, length, device), state, at))
        else:
            raise ValueError(
                f"sample: the grid starts at t = {self.grid[0]}, where the law is not the prior; give initial="
            )
        fixed = self._fixed(batch, length, prompt, frozen, initial)
        if fixed is not None:
            given, where = (x.to(device) for x in fixed)
            given = self.process.place(given, state.tokens)
            state = replace(state, tokens=torch.where(where, given, state.tokens), frozen=where)

        path, beyond = None, torch.zeros((), dtype=torch.bool, device=device)
        if record:
            kind, shape = narrowest(0, self.process.states - 1), (len(self.grid), batch, length)
            affordable(math.prod(shape) * kind.itemsize // 8, f"sample: a trajectory of shape {shape} in {kind}")
            path = torch.empty(shape, dtype=kind, device=device)
            path[0] = state.tokens
        states: Iterable[State] = self.through(state, run)
        if decided(progress, "sample: progress"):  # a hidden bar would still start a thread
            states = track(states, "sampling", len(self.grid) - 1, console=Console(stderr=True))
        for step, state in enumerate(states, start=1):
            if path is not None:
                path[step] = state.tokens
                beyond |= (path[step] != state.tokens).any()
        tokens = self.process.column(state.tokens) if self.grid[-1] == 0 else state.tokens
        if self.grid[-1] == 0:
            run.finish(tokens, self.operator)
        else:
            run.check_faults()
        if path is not None and bool(beyond):  # the small dtype could not hold it
            raise ValueError(f"sample: {self.operator} made states outside [0, {self.process.states})")
        calls, frame = run.model, self.model.frame
        return Samples(tokens, calls.nfe, calls.nfe_rows, seed, path, run.log_prob, calls.queries, frame)

    def _length(self, length: SupportsIndex | None) -> int:
        own = self.model.length
        if length is None and own is None:
            raise ValueError("sample: give length=, this model has none of its own")
        chosen = whole(own if length is None else length, "sample: length", 1)
        if own is not None and chosen != own:
            raise ValueError(f"sample: length = {chosen}, but the model is for length {own}")
        self.process.schedule.check_length(chosen)
        return chosen

    def _check_initial(self, initial: Tensor, batch: int, length: int) -> None:
        if tuple(initial.shape) != (batch, length):
            raise ValueError(f"sample: initial must have shape ({batch}, {length}), got {tuple(initial.shape)}")
        self.model.check_states(initial.to(torch.int64), "initial")

    def _fixed(
        self,
        batch: int,
        length: int,
        prompt: Tensor | Sequence[int] | None,
        frozen: Tensor | Sequence[bool] | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Return the given tokens and the mask of their sites, both (B, L), or None if none are given."""
        if prompt is None and frozen is None:
            return None
        if prompt is None and initial is None:
            raise ValueError("sample: frozen= says which sites are given; prompt= or initial= must say what they hold")
        if prompt is None and initial is not None:
            given = self.process.column(initial)
        else:
            given = token_ids(prompt, "sample: prompt", "token ids")
        width = given.shape[-1] if given.ndim else 0
        if width == 0 and given.ndim and frozen is None:
            return None  # an empty prompt
        if given.ndim not in (1, 2) or width > length or (given.ndim == 2 and len(given) != batch):
            raise ValueError(
                f"sample: prompt must be (P,) or ({batch}, P) with P <= {length}, got {tuple(given.shape)}"
            )
        if frozen is None:
            where = (torch.arange(length) < width).expand(batch, length)
            given = torch.nn.functional.pad(given, (0, length - width))
        else:
            where = array(frozen, "sample: frozen")
            if where.dtype != torch.bool or where.shape not in ((length,), (batch, length)):
                raise ValueError(
                    f"sample: frozen must be a bool mask ({length},) or ({batch}, {length}), "
                    f"got {where.dtype} {tuple(where.shape)}"
                )
            if width != length:
                raise ValueError(f"sample: with frozen=, prompt must cover all {length} sites, got {width}")
            where = where.expand(batch, length)
        given = given.to(torch.int64).expand(batch, length).to(where.device)
        if not bool(where.any()):
            return None
        self.model.check_data(given, "prompt", where)  # the other sites may hold anything
        self.warn_of_infill()
        return given, where

    def warn_of_infill(self) -> None:
        """Warn if the denoiser will treat given sites as noisy."""
        if self._infill_is_approximate():
            warnings.warn(
                "infill is approximate: this denoiser cannot be told that the given sites are clean (it takes no time, "
                "or one time a row), and on a process that is not absorbing they then count as noisy",
                stacklevel=4,
            )

    def _infill_is_approximate(self) -> bool:
        return not self.process.absorbing and not self.model.call.sees_site_times

    def __repr__(self) -> str:
        times = f"steps={len(self.grid) - 1}" if self.grid == _uniform_grid(len(self.grid) - 1) else f"grid={self.grid}"
        notes = ["infill is approximate: the denoiser sees one time a row"] if self._infill_is_approximate() else []
        note = f"  # {'; '.join(notes + self.resting)}" if notes or self.resting else ""
        return f"Sampler({self.process}, {self.model}, {self.operator}, {times}){note}"

    @property
    def resting(self) -> list[str]:
        """One sentence for each part of the operator that is skipped at the last time (see ``rests``)."""
        idle = dict.fromkeys(repr(part) for _, part, time in self._acting() if rests(part, self.model, time))
        return [f"{part} rests at t = 0: the model determines no leave-one-out there" for part in idle]


def check_rows(where: str, batch: object, first_row: object) -> tuple[int, int]:
    """Check the batch size and the id of the first row, and return both as ints.

    Raises:
        TypeError, ValueError: if they are not whole numbers, the size is below 1, or a row id is not in [0, 2**32).
    """
    size, first = whole(batch, f"{where}: batch", 1), whole(first_row, f"{where}: first_row")
    if not 0 <= first <= 2**32 - size:
        raise ValueError(f"{where}: row ids must lie in [0, 2**32), got first_row = {first} with batch = {size}")
    return size, first


def acting(operator: Operator, t: float, s: float, now: float) -> Iterator[tuple[float, Operator, float]]:
    """Yield (expected number of runs, operator, start time) for the single operators of a composition in a step t -> s.

    ``now`` is the time at which the composition starts. The parts of a single operator are yielded with 0 runs, because
    its own ``nfe`` counts their calls.
    """
    match operator:
        case When():
            yield from acting(operator.at(t), t, s, now)
        case Then(left, right):
            yield from acting(left, t, s, now)
            yield from acting(right, t, s, s if left.moves else now)
        case Repeat(inner, times):
            yield from ((times * often, part, time) for often, part, time in acting(inner, t, s, now))
        case Mix(operators, weights):
            for weight, one in zip(weights, operators, strict=True):
                yield from ((weight * often, part, time) for often, part, time in acting(one, t, s, now))
        case _:
            yield 1.0, operator, now
            for part in operator.parts:  # their calls are counted in the operator's own nfe
                yield from ((0.0, inner, time) for _, inner, time in acting(part, t, s, now))


def check_model(process: Process, model: Denoiser, where: str) -> None:
    """Raise TypeError or ValueError unless ``model`` is a Denoiser for ``process``."""
    require_process(process, where)
    check_denoiser(model, where)
    if model.process != process:
        raise ValueError(
            f"{where}: the process is {process}, but the model is for {model.process}; "
            "model.with_schedule(s) re-times a model"
        )


def _uniform_grid(steps: SupportsIndex | None) -> tuple[float, ...]:
    return by_time(whole(steps, "steps", 1, LONGEST - 1))
