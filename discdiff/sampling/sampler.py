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

from discdiff.checks import affordable, decided, real, shown, whole
from discdiff.denoiser import Denoiser, check_denoiser
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
    listening,
    rests,
    while_listening,
)
from discdiff.process import LONGEST, Process, by_time, listed, require_process
from discdiff.sampling.beginning import begin
from discdiff.sampling.loop import OnStep, check_on_step, check_resumed, refuse_beginning
from discdiff.sampling.samples import Samples, narrowest

__all__ = ["Sampler", "acting", "check_model"]


class Sampler:
    """Run an operator over a grid of times, or a corrector alone at one time.

    Args:
        process: the forward process.
        model: a ``Denoiser`` for the same process.
        operator: one step of the sampler. It has exactly one predictor, or none if ``time`` is given.
        steps: N equal intervals of t from 1 to 0.
        grid: instead of ``steps``, N + 1 decreasing times in [0, 1].
        time: instead of both, the time at which a corrector runs once.

    Raises:
        TypeError: for a model that is no Denoiser, or an operator without predictor (with one, if ``time`` is given).
        ValueError: for a model of another process, an operator that is not defined on ``process``, or an invalid grid.
    """

    def __init__(
        self,
        process: Process,
        model: Denoiser,
        operator: Operator,
        *,
        steps: SupportsIndex | None = None,
        grid: Iterable[float] | None = None,
        time: float | None = None,
    ) -> None:
        check_model(process, model, "Sampler")
        check_operator(operator, "Sampler")
        if not operator.moves and time is None:
            raise TypeError(
                f"Sampler: a step needs a predictor, such as Ancestral(), and {operator} only corrects; "
                "time=t runs a corrector alone"
            )
        if operator.moves and time is not None:
            raise TypeError(f"Sampler: time= is for a corrector alone, and {operator} moves; give steps= or grid=")
        operator.check(process)
        if operator.width > SLOTS:
            raise ValueError(f"Sampler: a step has at most {SLOTS} slots, and {operator} takes {operator.width}")
        if (steps is None) + (grid is None) + (time is None) != 2:
            raise ValueError("Sampler: give either steps=N or grid=[1.0, ..., 0.0], or time=t for a corrector alone")
        self.process, self.model, self.operator = process, model, operator
        if time is not None:
            self.grid: tuple[float, ...] = (real(time, "Sampler: time", "[0, 1]"),)
        else:
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
        """Yield (step number from 1, t, s) for every step; a corrector alone makes one step, from t to t."""
        for step, (t, s) in enumerate(itertools.pairwise(self.grid * 2 if len(self.grid) == 1 else self.grid), start=1):
            yield step, t, s

    def through(self, state: State, run: Run) -> Iterator[State]:
        """Yield the state after each remaining step of the run, beginning with the step that follows ``state``."""
        for step, t, s in itertools.islice(self.intervals(), state.step, None):
            run.info.clear()
            state = replace(self.operator(state, At(self.process, run, t, s, step)), step=step)
            yield state

    def start(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Return the state at the first time of the grid, for ``step``; arguments and errors as in ``sample``."""
        with torch.no_grad():
            state, run = begin(self, batch, length, seed, first_row, prompt, frozen, initial, device)
        return replace(state, run=run)

    @torch.no_grad()
    def step(self, state: State) -> State:
        """Return the state after one more step; the given state is unchanged, so that two calls give equal states.

        Raises:
            ValueError: if the state does not come from ``start`` or ``step``, or all steps are made; as ``sample``.
        """
        run = self._run_of(state, "step").copy()
        after = next(self.through(replace(state, run=None), run), None)
        if after is None:
            raise ValueError(f"step: all {state.step} steps are made")
        self._close(after, run)
        return replace(after, run=run)

    def _close(self, state: State, run: Run) -> Tensor:
        """Check the run up to a state; return the state's tokens, which are data if this is the last step and t = 0."""
        if self.grid[-1] > 0 or state.step < self._last:
            run.check_faults()
            return state.tokens
        tokens = self.process.column(state.tokens)
        run.finish(tokens, self.operator)
        return tokens

    @property
    def _last(self) -> int:
        """The number of the last step."""
        return max(1, len(self.grid) - 1)

    def _ended(self, state: State) -> bool:
        """Return whether all steps are made."""
        return state.step == self._last

    def _run_of(self, state: State, where: str) -> Run:
        """Return the run of a state of this sampler."""
        if not isinstance(state, State) or not isinstance(state.run, Run):
            raise ValueError(f"{where}: takes a state of start(), step() or Samples.state, got {shown(state)}")
        times = [self.grid[0], *(s for _, _, s in self.intervals())]
        if state.step >= len(times) or state.t != times[state.step] or state.run.model.denoiser is not self.model:
            raise ValueError(f"{where}: the state, after {state.step} steps at t = {state.t}, is not of {self}")
        return state.run

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
        until: SupportsIndex | None = None,
        resume: State | None = None,
        on_step: OnStep | None = None,
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
            until: stop after this step, counted from 1. ``Samples.state`` continues the run.
            resume: continue from ``Samples.state`` of a run that stopped. The tokens are the same as without the stop.
            on_step: called after each step as on_step(step, state, info); the run stops if it returns False. ``info``
                maps names to the values (B,) that operators reported with ``At.report``.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabulary, logits that are NaN or without mass, or a mask
                left at time 0.
            TypeError: for ``resume`` together with an argument for the beginning of a run, such as ``seed``.
            RuntimeError: for a listening run inside another one of the same thread.
        """
        until = self._last if until is None else whole(until, "sample: until", 1, self._last)
        check_on_step(on_step)
        record = decided(record, "sample: record")
        if resume is None:
            state, run = begin(self, batch, length, seed, first_row, prompt, frozen, initial, device, record, listen)
        else:
            refuse_beginning(batch=batch, length=length, seed=seed, prompt=prompt, frozen=frozen, initial=initial,
                             device=device, first_row=first_row or None)  # fmt: skip
            run = replace(self._run_of(resume, "sample: resume").copy(), listen=listen)
            state = replace(resume, run=None)
            check_resumed(run.log_prob, state.step, until, record)
            if not record:
                run.log_prob = None
        begun, device = state.step, state.tokens.device
        path, beyond = None, torch.zeros((), dtype=torch.bool, device=device)
        if record:
            kind, shape = narrowest(0, self.process.states - 1), (until - begun + 1, *state.tokens.shape)
            affordable(math.prod(shape) * kind.itemsize // 8, f"sample: a trajectory of shape {shape} in {kind}")
            path = torch.empty(shape, dtype=kind, device=device)
            path[0] = state.tokens
        states: Iterable[State] = itertools.islice(self.through(state, run), until - begun)
        if decided(progress, "sample: progress"):  # a hidden bar would still start a thread
            states = track(states, "sampling", until - begun, console=Console(stderr=True))
        for state in states:
            if path is not None:
                path[state.step - begun] = state.tokens
                beyond |= (path[state.step - begun] != state.tokens).any()
            if on_step is not None and on_step(state.step, state, dict(run.info)) is False:
                path = None if path is None else path[: state.step - begun + 1]
                break
        if path is not None and bool(beyond):  # the small dtype could not hold it
            raise ValueError(f"sample: {self.operator} made states outside [0, {self.process.states})")
        return self._samples(replace(state, run=run), path)

    def _samples(self, state: State, path: Tensor | None) -> Samples:
        """Return the samples of a run up to a state, with this state to continue from."""
        run: Run = state.run
        tokens = self._close(state, run)
        if self._ended(state):  # frees logits
            state, run.model = replace(state, past=None, seen=None), replace(run.model, _last=None)
        calls, frame = run.model, self.model.frame
        out = Samples(tokens, calls.nfe, calls.nfe_rows, run.seed, path, run.log_prob, calls.queries, frame)
        vars(out)["_state"] = state
        return out

    def warn_of_infill(self) -> None:
        """Warn if the denoiser will treat given sites as noisy."""
        if self._infill_is_approximate():
            warnings.warn(
                "infill is approximate: this denoiser cannot be told that the given sites are clean (it takes no time, "
                "or one time a row), and on a process that is not absorbing they then count as noisy",
                stacklevel=5,
            )

    def _infill_is_approximate(self) -> bool:
        return not self.process.absorbing and not self.model.call.sees_site_times

    def __repr__(self) -> str:
        if len(self.grid) == 1:
            times = f"time={self.grid[0]}"
        elif self.grid == _uniform_grid(len(self.grid) - 1):
            times = f"steps={len(self.grid) - 1}"
        else:
            times = f"grid={self.grid}"
        notes = ["infill is approximate: the denoiser sees one time a row"] if self._infill_is_approximate() else []
        note = f"  # {'; '.join(notes + self.resting)}" if notes or self.resting else ""
        return f"Sampler({self.process}, {self.model}, {self.operator}, {times}){note}"

    @property
    def resting(self) -> list[str]:
        """One sentence for each part of the operator that is skipped at the last time (see ``rests``)."""
        idle = dict.fromkeys(repr(part) for _, part, time in self._acting() if rests(part, self.model, time))
        return [f"{part} rests at t = 0: the model determines no leave-one-out there" for part in idle]


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
