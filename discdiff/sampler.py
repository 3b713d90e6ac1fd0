r"""The one loop: a process, a denoiser, an operator and a grid of times."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor

from discdiff.denoiser import Counter, Denoiser
from discdiff.grid import by_time, listed
from discdiff.handlers import At, Run, choose
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Mix, Operator, Repeat, Then, When, check_operator, when
from discdiff.process import Process
from discdiff.rest import check_reads, rests
from discdiff.state import State

__all__ = ["Sampler", "Samples", "predictor_corrector"]


@dataclass(frozen=True)
class Samples:
    """What a sampler returns.

    Attributes:
        tokens: (B, L) int64 at the last time of the grid: tokens at time 0, states before it.
        nfe: batched denoiser calls made.
        nfe_rows: (B,) calls each row took part in.
        seed: the seed that gives these tokens again.
        trajectory: (N + 1, B, L) the states at every time of the grid, with ``record=True``.
        log_prob: (B,) float64 log-probability of all choices made, auxiliary ones included, with ``record=True``.
        queries: tokens that went through the network, of all rows.
    """

    tokens: Int[Tensor, "B L"]
    nfe: int
    nfe_rows: Int[Tensor, " B"]
    seed: int
    trajectory: Int[Tensor, "N B L"] | None = None
    log_prob: Float[Tensor, " B"] | None = None
    queries: int = 0


class Sampler:
    """Run an operator over a grid of times.

    Args:
        process: the forward process.
        model: a ``Denoiser`` for the same process.
        operator: what a step does; it has exactly one predictor.
        steps: N equal intervals of t from 1 to 0.
        grid: instead of ``steps``, N + 1 decreasing times in [0, 1].

    Raises:
        TypeError: if the model is not a Denoiser or the operator does not move in time.
        ValueError: if the processes differ, the operator has no meaning on this one, or the grid is not one.
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
        if (steps is None) == (grid is None):
            raise ValueError("Sampler: give either steps=N or grid=[1.0, ..., 0.0]")
        self.process, self.model, self.operator = process, model, operator
        self.grid = listed(grid) if grid is not None else _uniform_grid(steps)
        for _, part, time in self._acting():
            check_reads(part, model, time)

    def on_grid(self, grid: Iterable[float]) -> "Sampler":
        """The same sampler on another grid."""
        return Sampler(self.process, self.model, self.operator, grid=grid)

    @property
    def nfe(self) -> float | None:
        """Planned denoiser calls of a row: what the operators of all steps declare, each ``when`` decided; or None.

        ``Samples.nfe`` counts those made. It is less where a call is not needed (an answer that is still known, a last
        step that has nothing to look at twice).
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
        """(step number from 1, t, s) of every step."""
        for step, (t, s) in enumerate(itertools.pairwise(self.grid), start=1):
            yield step, t, s

    def through(self, state: State, run: Run) -> Iterator[State]:
        """The states after every step, from one at the first time of the grid."""
        for step, t, s in self.intervals():
            state = self.operator(state, At(self.process, run, t, s, step))
            yield state

    @torch.no_grad()
    def sample(
        self,
        batch: int,
        length: int | None = None,
        *,
        seed: int | None = None,
        first_row: int = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        record: bool = False,
        progress: bool = False,
        device: torch.device | str = "cpu",
    ) -> Samples:
        r"""Draw samples.

        The tokens of row b are a function of (seed, first_row + b) and the arguments, not of the batch it was drawn
        in.

        Args:
            batch: B.
            length: L; may be left out where the model has just one.
            seed: 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: id of the first row.
            prompt: tokens that are given: (P,) or (B, P), the first P sites; with ``frozen``, (L,) or (B, L), used
                where it is True.
            frozen: (L,) or (B, L), the sites that keep their prompt (or their ``initial`` token) and are shown to
                the denoiser as clean, at time 0. An infill pattern.
            initial: (B, L) states at the first time of the grid, instead of a draw from the prior.
            record: keep the trajectory and the log-probability.
            progress: show a progress bar on standard error.
            device: where to sample.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabulary, NaN or massless logits.
        """
        length = self._length(length)
        if batch < 1:
            raise ValueError(f"sample: batch must be at least 1, got {batch}")
        if not 0 <= first_row <= 2**32 - batch:
            raise ValueError(
                f"sample: row ids must lie in [0, 2**32), got first_row = {first_row} with batch = {batch}"
            )
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        counter = Counter(self.model, first_row, torch.zeros(batch, dtype=torch.int64, device=device))
        log_prob = torch.zeros(batch, dtype=torch.float64, device=device) if record else None
        run = Run(seed, counter, log_prob, fuse=kernels.fuses(torch.device(device)))
        at = At(self.process, run, self.grid[0], self.grid[0], step=0)

        rows = torch.arange(first_row, first_row + batch, device=device)
        state = State(torch.zeros(batch, length, dtype=torch.int64, device=device), self.grid[0], rows)
        if initial is not None:
            initial = torch.as_tensor(initial)
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
            state = State(torch.where(where, given, state.tokens), state.t, rows, where)

        trajectory = [state.tokens]
        states = self.through(state, run)
        shown = track(states, "sampling", len(self.grid) - 1, console=Console(stderr=True), disable=not progress)
        for state in shown:
            if record:
                trajectory.append(state.tokens)
        run.check_faults()
        tokens = self.process.column(state.tokens) if self.grid[-1] == 0 else state.tokens
        path = torch.stack(trajectory) if record else None
        return Samples(tokens, counter.nfe, counter.nfe_rows, seed, path, run.log_prob, counter.queries)

    def _length(self, length: int | None) -> int:
        own = self.model.length
        if length is None and own is None:
            raise ValueError("sample: give length=, this model has none of its own")
        if length is not None and own is not None and length != own:
            raise ValueError(f"sample: length = {length}, but the model is for length {own}")
        chosen = length if length is not None else own
        if chosen is None or chosen < 1:
            raise ValueError(f"sample: length must be at least 1, got {length}")
        self.process.schedule.check_length(chosen)
        return chosen

    def _check_initial(self, initial: Tensor, batch: int, length: int) -> None:
        if tuple(initial.shape) != (batch, length):
            raise ValueError(f"sample: initial must have shape ({batch}, {length}), got {tuple(initial.shape)}")
        if initial.is_floating_point() or initial.dtype == torch.bool:
            raise ValueError(f"sample: initial must hold states, got {initial.dtype}")
        self.process.check_states(initial.to(torch.int64), "initial")

    def _fixed(
        self,
        batch: int,
        length: int,
        prompt: Tensor | Sequence[int] | None,
        frozen: Tensor | Sequence[bool] | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The given tokens and the (B, L) mask of the sites they are given at."""
        if prompt is None and frozen is None:
            return None
        if prompt is None and initial is None:
            raise ValueError("sample: frozen= says which sites are given; prompt= or initial= must say what they hold")
        given = self.process.column(initial) if prompt is None and initial is not None else torch.as_tensor(prompt)
        width = given.shape[-1] if given.ndim else 0
        if width == 0 and given.ndim and frozen is None:
            return None  # an empty prompt
        if given.ndim not in (1, 2) or width > length or (given.ndim == 2 and len(given) != batch):
            raise ValueError(
                f"sample: prompt must be (P,) or ({batch}, P) with P <= {length}, got {tuple(given.shape)}"
            )
        if given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(f"sample: prompt must hold token ids, got {given.dtype}")
        if frozen is None:
            where = (torch.arange(length) < width).expand(batch, length)
            given = torch.nn.functional.pad(given, (0, length - width))
        else:
            where = torch.as_tensor(frozen)
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
        # Sites that are not frozen hold anything; only what is given must be data.
        self.process.check_data(given.where(where, self.process.data_tokens[0]), "prompt")
        self.warn_of_infill()
        return given, where

    def warn_of_infill(self) -> None:
        """Warn if given sites will count as noisy."""
        if self._infill_is_approximate():
            warnings.warn(
                "infill is approximate: this denoiser cannot be told that the given sites are clean (it takes no time, "
                "or one time a row), and on a process that is not absorbing they then count as noisy",
                stacklevel=4,
            )

    def _infill_is_approximate(self) -> bool:
        return not self.process.absorbing and not self.model.sees_site_times

    def __repr__(self) -> str:
        times = f"steps={len(self.grid) - 1}" if self.grid == _uniform_grid(len(self.grid) - 1) else f"grid={self.grid}"
        notes = ["infill is approximate: the denoiser sees one time a row"] if self._infill_is_approximate() else []
        note = f"  # {'; '.join(notes + self.resting)}" if notes or self.resting else ""
        return f"Sampler({self.process}, {self.model}, {self.operator}, {times}){note}"

    @property
    def resting(self) -> list[str]:
        """What rests at the last time, in words."""
        idle = dict.fromkeys(repr(part) for _, part, time in self._acting() if rests(part, self.model, time))
        return [f"{part} rests at t = 0: the model determines no leave-one-out there" for part in idle]


def predictor_corrector(
    process: Process,
    model: Denoiser,
    predictor: Operator,
    corrector: Operator,
    *,
    nfe: int,
    repeats: int = 1,
    corrected: Literal["first", "last"] = "first",
) -> Sampler:
    r"""A sampler of at most ``nfe`` denoiser calls: equal steps, as many as can be followed by a corrector.

    With p calls a predictor step and c calls for all corrections after one,

        n = floor((nfe - p) / (p + c)) corrected steps of floor((nfe - c n) / p) steps

    ``Sampler.nfe`` is the sum.

    Args:
        process, model: as for ``Sampler``.
        predictor, corrector: what a step does; both must declare their calls.
        nfe: the budget, at least p.
        repeats: corrector moves after a corrected step.
        corrected: "first": the first n, so that what is drawn at t = 0 is left as it is, as published. "last": the last
            n, the one that ends at t = 0 among them, where errors are not carried away by later noise; the model must
            then have a LOO at t = 0.

    Raises:
        TypeError: if the predictor does not move in time, or the corrector does.
        ValueError: for a budget below one predictor step, or an operator that does not declare its calls.

    Reference: Uniform Diffusion Models Revisited (2026).
    """
    both = predictor >> corrector**repeats
    calls, more = predictor.nfe, (corrector**repeats).nfe
    if calls is None or more is None or not calls > 0:
        raise ValueError(
            f"predictor_corrector: the predictor and the corrector must declare their calls; {predictor} has "
            f"nfe = {calls}, {corrector}**{repeats} has {more}"
        )
    if nfe < calls:
        raise ValueError(f"predictor_corrector: nfe must be at least {calls:g}, one step of {predictor}; got {nfe}")
    n = int((nfe - calls) // (calls + more))
    times = by_time(int((nfe - more * n) // calls))
    if corrected == "first":
        return Sampler(process, model, when(After(times[n]), both, predictor), grid=times)
    if corrected == "last":
        return Sampler(process, model, when(After(times[len(times) - 1 - n]), predictor, both), grid=times)
    raise ValueError(f"predictor_corrector: corrected must be 'first' or 'last', got {corrected!r}")


@dataclass(frozen=True)
class After:
    """The condition t > time: steps that begin before a run comes down to this time."""

    time: float

    def __call__(self, t: float) -> bool:
        return t > self.time

    def __repr__(self) -> str:
        return f"t > {self.time:.4g}"


def acting(operator: Operator, t: float, s: float, now: float) -> Iterator[tuple[float, Operator, float]]:
    """What a step t -> s runs: how often, which operator that is no composition, and at which time it starts."""
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
            for part in operator.parts:  # its calls are among the operator's own
                yield from ((0.0, inner, time) for _, inner, time in acting(part, t, s, now))


def check_model(process: Process, model: Denoiser, where: str) -> None:
    """Raise unless ``model`` is a Denoiser for ``process``."""
    if not isinstance(process, Process):
        raise TypeError(f"{where}: process must be a Process such as Masked(V, Linear()), got {process!r}")
    if not isinstance(model, Denoiser):
        raise TypeError(
            f"{where}: model must be a Denoiser, got {type(model).__name__}; "
            "wrap a function with Denoiser(fn, process, predicts='denoiser' | 'loo' | 'ratio')"
        )
    if model.process != process:
        raise ValueError(
            f"{where}: the process is {process}, but the model is for {model.process}; "
            "model.with_schedule(s) re-times a model"
        )


def _uniform_grid(steps: SupportsIndex | None) -> tuple[float, ...]:
    if isinstance(steps, bool) or not isinstance(steps, SupportsIndex) or steps.__index__() < 1:
        raise ValueError(f"steps must be a positive whole number, got {steps!r}")
    return by_time(steps.__index__())
