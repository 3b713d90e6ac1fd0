r"""The sampling loop: run an operator with a process and a denoiser over a grid of times."""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import SupportsIndex

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from discdiff.checks import affordable, decided, shown, whole
from discdiff.denoiser import Denoiser
from discdiff.operator import At, Operator, Run, State, listening, rests, while_listening
from discdiff.process import Process, listed, require_process
from discdiff.sampling.beginning import begin
from discdiff.sampling.loop import OnStep, check_on_step, check_resumed, refuse_beginning
from discdiff.sampling.plan import Plan, few
from discdiff.sampling.planned import (
    Part,
    acting,
    alike,
    anew,
    check_plan,
    named_models,
    networks_of,
    planned_calls,
    step_models,
    uniform_grid,
)
from discdiff.sampling.samples import Samples, narrowest
from discdiff.sampling.trajectory import Keeps, fork, keeps, kept, log_prob, resumed

__all__ = ["Sampler"]


class Sampler:
    """Run an operator over a grid of times, or a corrector alone at one time.

    Args:
        process: the forward process.
        model: a ``Denoiser`` for the same process, or several by name, {name: Denoiser}, for a plan and for guides.
        operator: one step of the sampler. It has exactly one predictor, or none if ``time`` is given.
        steps: N equal intervals of t from 1 to 0.
        grid: instead of ``steps``, N + 1 decreasing times in [0, 1].
        time: instead of both, the time at which a corrector runs once.
        plan: instead of operator and times, a ``Plan``: the operator, guides and model of every step.

    Attributes:
        plan: the plan; its steps are alike if an operator was given.
        models: the denoisers by name.
        step_models: the denoiser of each step, with the step's guides.

    Raises:
        TypeError: for a model that is no Denoiser, or an operator without predictor (with one, if ``time`` is given).
        ValueError: for a model of another process, an operator that is not defined on ``process``, or an invalid grid.
    """

    def __init__(
        self,
        process: Process,
        model: Denoiser | Mapping[str, Denoiser],
        operator: Operator | None = None,
        *,
        steps: SupportsIndex | None = None,
        grid: Iterable[float] | None = None,
        time: float | None = None,
        plan: Plan | None = None,
    ) -> None:
        require_process(process, "Sampler")
        self.process: Process = process
        self.models: dict[str, Denoiser] = named_models(process, model, "Sampler")
        if plan is None:
            plan = alike(operator, steps, grid, time)
        elif not isinstance(plan, Plan):
            raise TypeError(f"Sampler: plan must be a Plan, got {shown(plan)}")
        elif any(given is not None for given in (operator, steps, grid, time)):
            raise TypeError("Sampler: a plan has its own operators and grid; give no operator, steps=, grid= or time=")
        self.plan = plan
        self.step_models: tuple[Denoiser, ...] = step_models(plan, self.models, "Sampler")
        check_plan(plan, self.step_models, process, "Sampler")

    @property
    def model(self) -> Denoiser:
        """The denoiser of the first step, with its guides."""
        return self.step_models[0]

    @property
    def operator(self) -> Operator:
        """The operator of the first step; of all steps, unless a plan sets others."""
        return self.plan.steps[0].operator

    @property
    def grid(self) -> tuple[float, ...]:
        """The times of the grid."""
        return self.plan.grid

    @property
    def networks(self) -> list[Denoiser]:
        """The denoisers of all steps, and those that their guides ask."""
        return networks_of(self.step_models, self.models)

    def parts(self) -> Iterator[Part]:
        """Yield (step number from 1, t, s, operator, denoiser with the step's guides) for every step."""
        for (number, t, s), step, model in zip(self.plan.intervals(), self.plan.steps, self.step_models, strict=True):
            yield number, t, s, step.operator, model

    def on_grid(self, grid: Iterable[float]) -> "Sampler":
        """Return the same sampler on another grid.

        Raises ValueError if the steps of the plan differ.
        """
        if not self.plan.alike:
            raise ValueError(f"on_grid: takes a sampler whose steps are alike, got {self.plan}")
        times, step = listed(grid), self.plan.steps[:1]
        return Sampler(self.process, self.models, plan=Plan(times, step * (len(times) - 1)))

    @property
    def calls(self) -> dict[str, float] | None:
        """Planned denoiser calls of a row by the name of the denoiser, or None if an operator's number is unknown.

        It counts the calls of the operators that run, and of their guides. ``Samples.calls`` are the measured numbers.
        These are smaller if a call is not needed, because the prediction is still known or a two-stage predictor needs
        only one call in the last step.
        """
        planned = planned_calls(self.plan, self.step_models, self.models)
        return None if planned is None else planned.calls

    @property
    def nfe(self) -> float | None:
        """Planned denoiser calls of a row: the sum of ``calls``, or None if one is unknown."""
        calls = self.calls
        return None if calls is None else float(sum(calls.values()))

    @property
    def cost(self) -> float | None:
        """The planned calls, each times the ``cost`` of its denoiser; None if a number or a cost is unknown."""
        planned = planned_calls(self.plan, self.step_models, self.models)
        return None if planned is None else planned.cost

    def intervals(self) -> Iterator[tuple[int, float, float]]:
        """Yield (step number from 1, t, s) for every step; a corrector alone makes one step, from t to t."""
        return self.plan.intervals()

    def through(self, state: State, run: Run) -> Iterator[State]:
        """Yield the state after each remaining step of the run, beginning with the step that follows ``state``.

        Where the denoiser changes, or the guides or operators that act, an operator that remembers starts anew.
        """
        known = [*self.parts()]
        for step, t, s, operator, model in known[state.step :]:
            if step > 1 and anew(known[step - 2], known[step - 1], self.models):
                state = replace(state, past=None, seen=None)
            run.use(model)
            run.info.clear()
            state = replace(self._advance(operator, state, At(self.process, run, t, s, step)), step=step)
            yield state

    def _advance(self, operator: Operator, state: State, at: At) -> State:
        return operator(state, at)

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
        run.finish(tokens, self.plan.steps[-1].operator)
        return tokens

    @property
    def _last(self) -> int:
        """The number of the last step."""
        return max(1, len(self.grid) - 1)

    def _ended(self, state: State) -> bool:
        return state.step == self._last

    def _run_of(self, state: State, where: str) -> Run:
        """Return the run of a state of this sampler."""
        if not isinstance(state, State) or not isinstance(state.run, Run):
            raise ValueError(f"{where}: takes a state of start(), step() or Samples.state, got {shown(state)}")
        times = [self.grid[0], *(s for _, _, s in self.intervals())]
        if state.step >= len(times) or state.t != times[state.step] or state.run.models != self.models:
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
        record: Keeps = False,
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
            record: whether to keep the trajectory and the log-probability. "choices" also keeps the value of every
                choice, for ``log_prob`` and ``fork``.
            listen: whether every choice is a Pyro site, for trace, replay and condition. Otherwise the run ignores
                Pyro's handlers, in every thread. Only one run listens at a time; a second one waits.
            progress: whether to show a progress bar on standard error.
            device: where to sample; by default where the model's parameters lie (``Denoiser.device``).
            until: stop after this step, counted from 1. ``Samples.state`` continues the run.
            resume: continue from ``Samples.state`` of a run that stopped. The tokens are the same as without the stop.
            on_step: called after each step as on_step(step, state, info); the run stops if it returns False. ``info``
                maps names to the values (B,) that operators reported with ``At.report``: "accepted" proposals, the
                number of sites that "jumped", the number of "events", the mean "step_size" in alpha.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabulary, logits that are NaN or without mass, or a mask
                left at time 0.
            TypeError: for ``resume`` together with an argument for the beginning of a run, such as ``seed``.
            RuntimeError: for a listening run inside another one of the same thread.
        """
        until = self._last if until is None else whole(until, "sample: until", 1, self._last)
        check_on_step(on_step)
        record = keeps(record)
        if resume is None:
            state, run = begin(self, batch, length, seed, first_row, prompt, frozen, initial, device, record, listen)
        else:
            refuse_beginning(batch=batch, length=length, seed=seed, prompt=prompt, frozen=frozen, initial=initial,
                             device=device, first_row=first_row or None)  # fmt: skip
            run, state = self._run_of(resume, "sample: resume"), replace(resume, run=None)
            check_resumed(run.log_prob, state.step, until, bool(record))
            run = resumed(run, record, listen)
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
            state, run.model, run.asked = replace(state, past=None, seen=None), replace(run.model, _last=None), {}
        calls = run.tally
        out = Samples(
            tokens, calls.nfe, calls.nfe_rows, run.seed, path, run.log_prob, calls.queries, self.model.frame,
            calls.calls, calls.rewards, choices=kept(self, run, state),
        )  # fmt: skip
        vars(out)["_state"] = state
        return out

    def log_prob(
        self, out: Samples, *, model: Denoiser | Mapping[str, Denoiser] | None = None, since: SupportsIndex = 0,
        by_step: bool = False,
    ) -> Float[Tensor, "B *K"]:  # fmt: skip
        """Return the log-probability (B,) float64 of all choices of a recorded run, the prior's draw included.

        It equals ``Samples.log_prob`` under the run's models. It has gradients, and memory holds one step at a time.

        Args:
            out: samples of this sampler with ``record="choices"``, whole or cut, from a fork or a file.
            model: a denoiser of the same process, or several by name; by default the sampler's own.
            since: only the steps after this one count, given the run up to it; the prior's draw counts with 0 alone.
            by_step: return (B, K), one column for each step that counts; the prior's draw is part of the first step's.

        Raises:
            TypeError, ValueError: if ``out`` is no ``Samples`` with choices on this grid, a model no denoiser of this
                process, or no step counts; if a value is missing or impossible under the model, with its site and row.
        """
        return log_prob(self, out, model, since, by_step)

    def fork(
        self, out: Samples, *, step: SupportsIndex, copies: SupportsIndex = 1, seed: SupportsIndex | None = None
    ) -> Samples:
        """Return branches (c B rows) that share a recorded run up to and including a step, and differ after it.

        Rows b c to b c + c - 1 are the c copies of row b. The copies of the row with id i have the ids i c to
        i c + c - 1, so that they do not depend on a split of the batch. With one copy and the run's own seed the tokens
        are the run's. The shared steps are made again from their choices; ``nfe`` counts only the steps after them. The
        result holds the trajectory, log-probability and choices of both parts. A reward for each branch:

            branches = sampler.fork(out, step=5, copies=3, seed=1)
            best = reward(branches.tokens).view(-1, 3).argmax(1)  # of the branches of each row
            weight = sampler.log_prob(branches, model=other) - branches.log_prob

        Args:
            out: samples of this sampler with ``record="choices"``, whole or cut, from a fork or a file.
            step: the last shared step; 0 shares the first state alone.
            copies: c.
            seed: the seed of the steps that follow; drawn from torch's global generator if None.

        Raises:
            TypeError, ValueError: as ``log_prob``, or if no step follows the shared ones.
        """
        return fork(self, out, step, copies, seed)

    def warn_of_infill(self) -> None:
        """Warn if the denoiser will treat given sites as noisy."""
        if self._infill_is_approximate():
            warnings.warn(
                "infill is approximate: this denoiser cannot be told that the given sites are clean (it takes no time, "
                "or one time a row), and on a process that is not absorbing they then count as noisy",
                stacklevel=5,
            )

    def _infill_is_approximate(self) -> bool:
        return not self.process.absorbing and not all(one.call.sees_site_times for one in self.networks)

    def __repr__(self) -> str:
        if not self.plan.alike or self.plan.steps[0].guides or self.plan.steps[0].model:
            models = next(iter(self.models.values())) if len(self.models) == 1 else self.models
            return f"Sampler({self.process}, {models}, plan={self.plan})"
        if len(self.grid) == 1:
            times = f"time={self.grid[0]}"
        elif self.grid == uniform_grid(len(self.grid) - 1):
            times = f"steps={len(self.grid) - 1}"
        else:
            times = f"grid=({few([*map(repr, self.grid)])})"
        notes = ["infill is approximate: the denoiser sees one time a row"] if self._infill_is_approximate() else []
        note = f"  # {'; '.join(notes + self.resting)}" if notes or self.resting else ""
        return f"Sampler({self.process}, {self.model}, {self.operator}, {times}){note}"

    @property
    def resting(self) -> list[str]:
        """One sentence for each part of the operator that is skipped at the last time (see ``rests``)."""
        idle = dict.fromkeys(
            repr(part)
            for _, t, s, operator, model in self.parts()
            for _, part, time in acting(operator, t, s, t)
            if rests(part, model, time)
        )
        return [f"{part} rests at t = 0: the model determines no leave-one-out there" for part in idle]
