r"""Generation block by block: any operator denoises each block, given the clean tokens before it.

    p(x) = prod_b p(x^b | x^{<b}),        or  sum_k gamma_k p_k(x) for a mixture of block sizes

Each block is one run of the sampling loop, with a denoiser that takes the prefix as context. A block starts at t = 1
even if a part of it is given. A start at t < 1 would need a draw from the law p_t, which on a uniform process is not
the prior.

References: BlockGen (Deschenaux and Gulcehre, 2026, https://arxiv.org/abs/2606.02241); block diffusion (Arriola et
al., 2025, https://arxiv.org/abs/2503.09573).
"""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from discdiff.checks import affordable, decided, placed, real, seeded, several, shown, token_ids, whole, wholes
from discdiff.denoiser import Denoiser, Guide, warn_of_dropout
from discdiff.operator import Operator, Run, State, listening, while_listening
from discdiff.process import Process
from discdiff.sampling.beginning import check_initial, check_rows, fixed, shaped
from discdiff.sampling.blocks import Job
from discdiff.sampling.loop import OnStep, check_on_step, check_resumed, refuse_beginning
from discdiff.sampling.plan import Plan
from discdiff.sampling.planned import programs_of
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples, narrowest

__all__ = ["BlockSamples", "Blockwise"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockSamples(Samples):
    """The result of ``Blockwise``: ``Samples`` with lengths.

    ``trajectory`` is (N, B, L), the states before the first step and after each step. It holds -1 at sites that are not
    given and whose block has not begun, and so does ``tokens`` if the run stopped before its end.

    Attributes:
        lengths: (B,) the number of valid tokens of each row, up to and including its first stop token. After it
            ``tokens`` repeats the stop token. If the run stopped, the lengths of unfinished rows are those of their
            complete blocks.
    """

    lengths: Int[Tensor, " B"] | None = None


class Blockwise:
    """Sampler that generates a sequence block by block.

    Args:
        process: the forward process.
        model: a ``Denoiser`` for it. If its function is ``Cached``, a call evaluates only the block; any other function
            evaluates the prefix again in every call.
        operator: one step within a block.
        block: the block size. A sequence of sizes is used in order, and its last size is repeated. From a mapping
            {size: probability} one size is drawn for each row.
        steps: the number of equal steps from t = 1 to 0 in each block; a block of one site takes one step, unless the
            steps of a plan differ.
        grid: instead of ``steps``, decreasing times from 1 to 0.
        window: the largest number of tokens that the network gets, with the block. Of a longer prefix only
            the last tokens are used. Positions count from the start of the window. With a window, each block fills a
            cache anew, by one call.
        plan: instead of operator and times, a ``Plan``, whose grid every block runs.
        future: whether the network also gets noise for the sites after the block, up to the full length. Networks that
            were trained on whole sequences need this. It is always True if the model accepts only one length.

    Raises:
        TypeError, ValueError: if ``Sampler`` refuses an argument, a size is not a positive integer, or the window
            is too small.
    """

    def __init__(
        self,
        process: Process,
        model: Denoiser | Mapping[str, Denoiser],
        operator: Operator | None = None,
        *,
        block: SupportsIndex | Sequence[int] | Mapping[int, float],
        steps: SupportsIndex | None = None,
        grid: Iterable[float] | None = None,
        window: SupportsIndex | None = None,
        future: bool = False,
        plan: Plan | None = None,
    ) -> None:
        self.inner: Sampler = Sampler(process, model, operator, steps=steps, grid=grid, plan=plan)
        if self.inner.grid[0] != 1 or self.inner.grid[-1] != 0:
            raise ValueError(f"Blockwise: a block goes from t = 1 to 0, got a grid from {self.inner.grid[0]}")
        self.single: Sampler = self.inner.on_grid((1.0, 0.0)) if self.inner.plan.alike else self.inner
        far = next((guide for one in self.inner.networks for guide in one.guides if _whole(guide)), None)
        if far is not None:
            raise ValueError(f"Blockwise: {far} needs the sites after a block, which are not there yet")
        if held := [one for one in self.inner.networks if one.context is not None]:
            raise ValueError(f"Blockwise: {held[0]} has a context of its own, which a block's prefix would replace")
        lengths = {one.length for one in self.inner.networks} - {None}
        self.block = block
        self.sizes: tuple[tuple[int, ...], ...]
        self.weights: tuple[float, ...] = (1.0,)
        if isinstance(block, Mapping):
            self.sizes = tuple((whole(size, "Blockwise: block size", 1),) for size in block)
            self.weights = tuple(real(p, "Blockwise: weight of a block size", "[0, 1]") for p in block.values())
            if not block or abs(sum(self.weights) - 1) > 1e-9:
                raise ValueError(f"Blockwise: the weights of block sizes must be probabilities, got {dict(block)}")
        elif isinstance(block, Sequence):
            self.sizes = (wholes(block, "Blockwise: block size", 1),)
            if not block:
                raise ValueError("Blockwise: block must be a size, sizes or {size: probability}, got none")
        else:
            self.sizes = ((whole(block, "Blockwise: block size", 1),),)
        largest = max(max(sizes) for sizes in self.sizes)
        window = None if window is None else whole(window, "Blockwise: window", 1)
        if window is not None and (window < largest or not lengths <= {window}):
            raise ValueError(
                f"Blockwise: the window must hold a block ({largest}) and be the model's length "
                f"({self.inner.model.length}), got {window}"
            )
        self.window = window
        self.future: bool = decided(future, "Blockwise: future") or bool(lengths)

    def edges(self, length: int, sizes: tuple[int, ...]) -> list[int]:
        """Return the positions at which blocks of these sizes begin, followed by the length."""
        repeated = itertools.chain(sizes, itertools.repeat(sizes[-1]))
        return [*itertools.takewhile(lambda edge: edge < length, itertools.accumulate(repeated, initial=0)), length]

    def sampler(self, size: int) -> Sampler:
        """Return the sampler for a block of ``size`` sites; for one site it takes a single step."""
        return self.single if size == 1 else self.inner

    def nfe(self, length: int) -> float | None:
        """Return the planned denoiser calls of a row without a prompt, averaged over block sizes; None if unknown."""
        total = 0.0
        for sizes, weight in zip(self.sizes, self.weights, strict=True):
            for begin, end in itertools.pairwise(self.edges(length, sizes)):
                calls = self.sampler(end - begin).nfe
                if calls is None:
                    return None
                total += weight * calls
        return total

    def start(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        stop: SupportsIndex | Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Return the state before the first step, for ``step``; arguments as in ``sample``.

        The first block has begun: its sites hold the states at t = 1.

        Raises:
            TypeError, ValueError: as ``sample``.
        """
        with torch.no_grad():
            job = self._begin(batch, length, seed, first_row, prompt, frozen, initial, stop, device)
        return replace(job.state(), run=job)

    def step(self, state: State) -> State:
        """Return the state after one more step; the given state is unchanged, so that two calls give equal states.

        A step is one step of the sampling loop in the block of one group of rows. A block begins with its first step,
        and the step that completes a block gives it to the network's context. Contexts are copied in each call.

        Raises:
            ValueError: if the state does not come from ``start`` or ``step``, or all steps are made; as ``sample``.
        """
        job = self._run_of(state, "step").copy()
        with torch.no_grad(), contextlib.closing(job.through()) as steps:
            for _ in steps:
                break
            else:
                raise ValueError(f"step: all {state.step} steps are made")
        job.check_faults()
        return replace(job.state(), run=job)

    def _run_of(self, state: State, where: str) -> Job:
        """Return the run of a state of this sampler."""
        if not isinstance(state, State) or not isinstance(state.run, Job):
            raise ValueError(f"{where}: takes a state of start(), step() or Samples.state, got {shown(state)}")
        job: Job = state.run
        same = job.run.models == self.inner.models and job.maker._settings == self._settings
        if not same or (state.step, state.t) != (job.step, job.t):
            raise ValueError(f"{where}: the state, after {state.step} steps at t = {state.t}, is not of {self}")
        if not torch.equal(state.tokens, job.tokens):
            raise ValueError(f"{where}: the tokens of the state were changed, but contexts hold the earlier ones")
        return job

    @property
    def _settings(self) -> tuple[object, ...]:
        """What a state must have in common with this sampler, beside the model."""
        return self.inner.plan, self.sizes, self.weights, self.window, self.future

    def _ended(self, state: State) -> bool:
        """Return whether all steps are made."""
        return not state.run.groups

    @while_listening(listening)
    def sample(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        stop: SupportsIndex | Sequence[int] | None = None,
        record: bool = False,
        listen: bool = False,
        progress: bool = False,
        device: torch.device | str | None = None,
        until: SupportsIndex | None = None,
        resume: State | None = None,
        on_step: OnStep | None = None,
    ) -> BlockSamples:
        """Draw samples; the tokens of row b are a function of (seed, first_row + b) and the arguments.

        A step is one step of the sampling loop in the blocks of one group of rows. Rows stay in one group while their
        next blocks have the same size. Steps are counted from 1 through the whole run; if all rows are in one group,
        n blocks of N steps make n N steps. Several groups take turns, in an order that depends on the batch.

        Args:
            batch: B; optional if ``initial`` is given.
            length: L, the largest number of tokens of a row, with its prompt; optional if ``initial`` is given, or if
                the model accepts only one length and there is no window.
            seed: 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: id of the first row.
            prompt: the first tokens of all rows, or of each row; rows may differ in length. With ``frozen`` it is
                (L,) or (B, L), and the tokens where ``frozen`` is True are used.
            frozen: (L,) or (B, L) bools, True at given sites of any blocks (infill), as in ``Sampler.sample``. A given
                token conditions its own block and later ones, but not earlier ones. A block of given tokens takes no
                step.
            initial: (B, L) states at t = 1 of the blocks, instead of draws from the prior.
            stop: ids of tokens that end a row; no token before the last given site of a row does. An ended row takes
                part in no further calls.
            record: whether to keep the trajectory and the log-probability of the choices made.
            listen: whether every choice is a Pyro site, as in ``Sampler.sample``. Blocks are counted from 0; the sites
                of block 2 are "b2/step.slot.name". If rows reach this block in several groups, the sites of the second
                group are "b2.1/step.slot.name".
            progress: whether to show a progress bar of sites on standard error.
            device: where to sample; by default where the model's parameters lie.
            until: stop after this step, counted from 1. ``Samples.state`` continues the run. A run with fewer steps is
                complete.
            resume: continue from ``Samples.state`` of a run that stopped. The tokens are the same as without the stop.
            on_step: called after each step as on_step(step, state, info); the run stops if it returns False. The state
                holds the tokens (B, L) of whole rows up to now, with -1 at sites that are not given and whose block has
                not begun, and the time of the block that moved. ``info`` is as in ``Sampler.sample``, with
                "block", the number of the block that moved; both are NaN for rows of other groups.

        Raises:
            TypeError, ValueError: if types, shapes or ids are wrong, the model does not accept the length, or
                ``resume`` is given together with an argument for the beginning of a run.
        """
        until = None if until is None else whole(until, "sample: until", 1)
        check_on_step(on_step)
        record, progress = decided(record, "sample: record"), decided(progress, "sample: progress")
        if resume is None:
            job = self._begin(
                batch, length, seed, first_row, prompt, frozen, initial, stop, device, record=record, listen=listen
            )
        else:
            refuse_beginning(batch=batch, length=length, seed=seed, prompt=prompt, frozen=frozen, initial=initial,
                             stop=stop, device=device, first_row=first_row or None)  # fmt: skip
            job = self._run_of(resume, "sample: resume").copy()
            check_resumed(job.log_prob, job.step, until, record)
            if not job.groups:
                raise ValueError(f"sample: the run to resume has made all its {job.step} steps")
            job.run = replace(job.run, listen=listen, log_prob=job.run.log_prob if record else None)
        kind = narrowest(-1, self.inner.process.states - 1)
        beyond = torch.zeros((), dtype=torch.bool, device=job.tokens.device)
        path = [job.tokens.to(kind)] if record else []
        with contextlib.ExitStack() as stack:
            steps = stack.enter_context(contextlib.closing(job.through()))
            bar = stack.enter_context(Progress(console=Console(stderr=True))) if progress else None
            sites = job.left() if bar else 0.0
            task = bar.add_task("sampling", total=sites) if bar else None
            for _ in steps:
                if record:
                    path.append(job.tokens.to(kind))
                    beyond |= (path[-1] != job.tokens).any()
                if bar and task is not None:
                    bar.update(task, completed=sites - job.left())
                stopped = on_step is not None and on_step(job.step, job.state(), dict(job.run.info)) is False
                if stopped or job.step == until:
                    break
        if bool(beyond):  # the small dtype could not hold it
            raise ValueError(f"sample: {self.inner.operator} made states outside [0, {self.inner.process.states})")
        return self._samples(replace(job.state(), run=job), torch.stack(path) if record else None)

    def _samples(self, state: State, path: Tensor | None) -> BlockSamples:
        """Return the samples of a run up to a state, with this state to continue from."""
        job: Job = state.run
        job.check_faults()
        calls = job.tally
        out = BlockSamples(
            state.tokens, calls.nfe, calls.nfe_rows, job.seed, path, job.log_prob, calls.queries,
            self.inner.model.frame, calls.calls, calls.rewards, job.complete(),
        )  # fmt: skip
        vars(out)["_state"] = state
        return out

    def _begin(
        self,
        batch: SupportsIndex | None,
        length: SupportsIndex | None,
        seed: SupportsIndex | None,
        first_row: SupportsIndex,
        prompt: Tensor | Sequence[int] | Sequence[Sequence[int]] | None,
        frozen: Tensor | Sequence[bool] | None,
        initial: Tensor | Sequence[Sequence[int]] | None,
        stop: SupportsIndex | Sequence[int] | None,
        device: torch.device | str | None,
        record: bool = False,
        listen: bool = False,
    ) -> Job:
        """Check the arguments of ``sample`` and return a run that has begun its first block."""
        model, process = self.inner.model, self.inner.process
        initial, batch, length = shaped(initial, batch, length)
        batch, first_row = check_rows("sample", batch, first_row)
        if length is None and (self.window is not None or model.length is None):
            raise ValueError("sample: give length=, this model has none of its own")
        length = whole(model.length if length is None else length, "sample: length", 1)
        device = placed(model.device if device is None else device, "sample: device")
        if self.window is None and model.length not in (None, length):
            raise ValueError(
                f"sample: length must be the model's ({model.length}) unless there is a window, got {length}"
            )
        affordable(batch * length, f"sample: a batch of {batch} rows of length {length}")
        stops = torch.tensor(several(() if stop is None else stop, "sample: stop"), dtype=torch.int64, device=device)
        process.check_data(stops[None], "stop")
        if initial is not None:
            check_initial(model, initial, batch, length)
            initial = initial.to(device, torch.int64)
        if frozen is None:
            held = self._prompts(() if prompt is None else prompt, batch, length)
        else:
            whole_rows: Any = prompt
            held = fixed(self.inner, batch, length, whole_rows, frozen, initial) or self._prompts((), batch, length)
        tokens, where = (each.to(device) for each in held)
        seed = seeded(seed, "sample: seed")
        warn_of_dropout(programs_of(self.inner.networks), stacklevel=4)
        run = Run.start(model, batch, seed, first_row=first_row, device=device, record=record, listen=listen)
        run.models = self.inner.models
        job = Job(self, run, tokens, where, stops, initial)
        job.ready()
        return job

    def _prompts(
        self, prompt: Tensor | Sequence[int] | Sequence[Sequence[int]], batch: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, L) of prompts at the beginning of each row, and the mask (B, L) of their sites."""
        if isinstance(prompt, str) or not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
            raise TypeError(f"sample: prompt must be token ids, or rows of them, got {shown(prompt)}")
        rows: list[Any] = list(prompt)
        if not any((isinstance(row, Tensor) and row.ndim) or isinstance(row, Sequence) for row in rows):
            rows = [rows] * batch
        given = [token_ids(row, f"sample: prompt of row {n}", "token ids") for n, row in enumerate(rows)]
        if len(given) != batch or any(row.ndim != 1 or len(row) > length for row in given):
            shapes = sorted({tuple(row.shape) for row in given})
            raise ValueError(
                f"sample: prompt must be token ids, or {batch} rows of them, at most {length} each; "
                f"got {len(given)} rows of shapes {shapes}"
            )
        tokens, frozen = torch.zeros(batch, length, dtype=torch.int64), torch.zeros(batch, length, dtype=torch.bool)
        for number, row in enumerate(given):
            tokens[number, : len(row)], frozen[number, : len(row)] = row, True
            here = slice(number, number + 1)
            self.inner.model.check_data(tokens[here], f"prompt of row {number}", frozen[here])
        return tokens, frozen

    def __repr__(self) -> str:
        inside = repr(self.inner).removeprefix("Sampler(").partition("  #")[0].removesuffix(")")
        window = "" if self.window is None else f", window={self.window}"
        note = "".join(f"  # {what}" for what in self.inner.resting)
        return f"Blockwise({inside}, block={self.block}{window}){note}"


def _whole(guide: object) -> bool:
    """Return whether a guide needs sites that a block does not show."""
    return isinstance(guide, Guide) and guide.whole
