r"""Generation block by block: any operator denoises each block, given the clean tokens before it.

    p(x) = prod_b p(x^b | x^{<b}),        or  sum_k gamma_k p_k(x) for a mixture of block sizes

Each block is one run of the sampling loop, with a denoiser that takes the prefix as context. A block starts at t = 1
even if a part of it is given. A start at t < 1 would need a draw from the law p_t, which on a uniform process is not
the prior.

References: BlockGen (Deschenaux and Gulcehre, 2026, https://arxiv.org/abs/2606.02241); block diffusion (Arriola et
al., 2025, https://arxiv.org/abs/2503.09573).
"""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.checks import affordable, decided, placed, real, seeded, several, shown, token_ids, whole, wholes
from discdiff.choices import Branch
from discdiff.denoiser import Cached, CachedPrefix, Denoiser, Growing, ShownPrefix, clean_states, warn_of_dropout
from discdiff.operator import Operator, Run, choose, listening, while_listening
from discdiff.process import Process
from discdiff.sampling.beginning import check_rows
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples

__all__ = ["BlockSamples", "Blockwise"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockSamples(Samples):
    """The result of ``Blockwise``: ``Samples`` with lengths.

    Attributes:
        lengths: (B,) the number of valid tokens of each row, up to and including its first stop token. After it
            ``tokens`` repeats the stop token.
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
        steps: the number of equal steps from t = 1 to 0 in each block; a block of one site takes one step.
        grid: instead of ``steps``, decreasing times from 1 to 0.
        window: the largest number of tokens that the network gets, with the block. Of a longer prefix only
            the last tokens are used. Positions count from the start of the window. With a window, each block fills a
            cache anew, by one call.
        future: whether the network also gets noise for the sites after the block, up to the full length. Networks that
            were trained on whole sequences need this. It is always True if the model accepts only one length.

    Raises:
        TypeError, ValueError: if ``Sampler`` refuses an argument, a size is not a positive integer, or the window
            is too small.
    """

    def __init__(
        self,
        process: Process,
        model: Denoiser,
        operator: Operator,
        *,
        block: SupportsIndex | Sequence[int] | Mapping[int, float],
        steps: SupportsIndex | None = None,
        grid: Iterable[float] | None = None,
        window: SupportsIndex | None = None,
        future: bool = False,
    ) -> None:
        self.inner = Sampler(process, model, operator, steps=steps, grid=grid)
        if self.inner.grid[0] != 1 or self.inner.grid[-1] != 0:
            raise ValueError(f"Blockwise: a block goes from t = 1 to 0, got a grid from {self.inner.grid[0]}")
        self.single = self.inner.on_grid((1.0, 0.0))
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
        if window is not None and (window < largest or model.length not in (None, window)):
            raise ValueError(
                f"Blockwise: the window must hold a block ({largest}) and be the model's length ({model.length}), "
                f"got {window}"
            )
        self.window = window
        self.future = decided(future, "Blockwise: future") or model.length is not None

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

    @while_listening(listening)
    def sample(
        self,
        batch: SupportsIndex,
        length: SupportsIndex,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | Sequence[Sequence[int]] = (),
        stop: SupportsIndex | Sequence[int] = (),
        record: bool = False,
        listen: bool = False,
        device: torch.device | str | None = None,
    ) -> BlockSamples:
        """Draw samples; the tokens of row b are a function of (seed, first_row + b) and the arguments.

        Args:
            batch: B.
            length: L, the largest number of tokens of a row, with its prompt.
            seed: 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: id of the first row.
            prompt: the first tokens of all rows, or of each row; rows may differ in length.
            stop: ids of tokens that end a row. An ended row takes part in no further calls.
            record: whether to keep the log-probability of the choices made.
            listen: whether every choice is a Pyro site, as in ``Sampler.sample``. Blocks are counted from 0; the sites
                of block 2 are "b2/step.slot.name". If rows reach this block in several groups, the sites of the second
                group are "b2.1/step.slot.name".
            device: where to sample; by default where the model's parameters lie.

        Raises:
            TypeError, ValueError: if types, shapes or ids are wrong, or the model does not accept the length.
        """
        model, process = self.inner.model, self.inner.process
        batch, first_row = check_rows("sample", batch, first_row)
        length = whole(length, "sample: length", 1)
        device = placed(model.device if device is None else device, "sample: device")
        if self.window is None and model.length not in (None, length):
            raise ValueError(
                f"sample: length must be the model's ({model.length}) unless there is a window, got {length}"
            )
        affordable(batch * length, f"sample: a batch of {batch} rows of length {length}")
        stops = torch.tensor(several(stop, "sample: stop"), dtype=torch.int64, device=device)
        process.check_data(stops[None], "stop")
        given = self._prompts(prompt, batch, length)
        seed, record = seeded(seed, "sample: seed"), decided(record, "sample: record")
        warn_of_dropout((model.fn, *model.guides), stacklevel=3)
        run = Run.start(model, batch, seed, first_row=first_row, device=device, record=record, listen=listen)
        job, calls = _Job(self, run, length, stops), run.tally
        job.begin(given)
        while job.groups:
            job.advance(job.groups.pop())
        return BlockSamples(
            job.tokens, calls.nfe, calls.nfe_rows, seed, None, run.log_prob, calls.queries, model.frame,
            calls.calls, calls.rewards, job.lengths,
        )  # fmt: skip

    def _prompts(
        self, prompt: Tensor | Sequence[int] | Sequence[Sequence[int]], batch: int, length: int
    ) -> list[Tensor]:
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
        for number, row in enumerate(given):
            rest = length - len(row)
            where = torch.nn.functional.pad(torch.ones_like(row, dtype=torch.bool), (0, rest))
            whole_row = torch.nn.functional.pad(row, (0, rest))
            self.inner.model.check_data(whole_row[None], f"prompt of row {number}", where[None])
        return given

    def __repr__(self) -> str:
        inside = repr(self.inner).removeprefix("Sampler(").partition("  #")[0].removesuffix(")")
        window = "" if self.window is None else f", window={self.window}"
        note = "".join(f"  # {what}" for what in self.inner.resting)
        return f"Blockwise({inside}, block={self.block}{window}){note}"


@dataclass(frozen=True)
class _Group:
    """Rows whose blocks are denoised together.

    Attributes:
        index: (R,) their indices in the batch.
        context: the tokens before their blocks.
        begin: (R,) where their blocks begin.
        edges: (E,) where blocks begin and end.
        turn: the number of blocks each row has finished. It keys the next block's randomness, whatever the group.
    """

    index: Tensor
    context: Growing
    begin: Tensor
    edges: Tensor
    turn: int = 0


class _Job:
    """One run of ``sample``: the tokens so far, and the unfinished groups."""

    def __init__(self, maker: Blockwise, run: Run, length: int, stops: Tensor) -> None:
        self.maker, self.run, self.stops, self.rows = maker, run, stops, run.rows
        self.tokens = torch.zeros(len(run.rows), length, dtype=torch.int64, device=run.rows.device)
        self.lengths = torch.full_like(run.rows, length)
        self.given = torch.zeros_like(run.rows)
        self.groups: list[_Group] = []
        self.begun: collections.Counter[int] = collections.Counter()  # how many groups reached their n-th block
        self.future: Tensor | None = None

    def begin(self, prompts: list[Tensor]) -> None:
        """Place the prompts, choose block sizes, and give the complete blocks of the prompts to the network."""
        maker, length = self.maker, self.tokens.shape[1]
        for row, prompt in enumerate(prompts):
            self.given[row] = len(prompt)
            self.tokens[row, : len(prompt)] = prompt.to(self.rows.device)
        state, at = self.run.begin(self.tokens, 1.0)
        chosen = torch.zeros_like(self.rows)
        if len(maker.sizes) > 1:
            weights = torch.tensor(maker.weights, dtype=torch.float64)
            chosen = choose("block size", Branch(weights, len(self.rows)), state, at)
        if maker.future:
            shown = length if maker.window is None else maker.window
            self.future = choose(
                "future", maker.inner.process.prior(len(self.rows), shown, self.rows.device), state, at
            )
        partial = False
        for number, sizes in enumerate(maker.sizes):
            edges = torch.tensor(maker.edges(length, sizes), device=self.rows.device)
            index = ((chosen == number) & (self.given < length)).nonzero()[:, 0]
            if len(index):
                known = edges[torch.searchsorted(edges, self.given[index], right=True) - 1]
                partial |= bool((known < self.given[index]).any())
                self.groups.append(_Group(index, self._context(index, known, edges), known, edges))
        if partial:
            maker.inner.warn_of_infill()

    def _context(self, index: Tensor, known: Tensor, edges: Tensor) -> Growing:
        """Make the context of the first ``known`` tokens of each row, or of the last of them that fit the window."""
        model, tally, rows, length = self.maker.inner.model, self.run.tally, self.rows[index], known
        if self.maker.window is not None:
            length = known.clamp(max=self.maker.window - int(edges.diff().max()))
        columns = (known - length)[:, None] + torch.arange(int(length.max()), device=index.device)
        tokens = self.tokens[index[:, None], columns.clamp(max=self.tokens.shape[1] - 1)]
        shown = clean_states(self.maker.inner.process, tokens)
        if not isinstance(model.fn, Cached):
            return ShownPrefix(rows, length, shown, None if self.future is None else self.future[index])
        if shown.shape[1]:
            tally.count(model.name, index[length > 0], int(length.sum()))
        capacity = self.tokens.shape[1] if self.maker.window is None else self.maker.window
        return CachedPrefix(rows, length, model.fn, model.fn.prefill(shown, length, capacity))

    def advance(self, group: _Group) -> None:
        """Denoise the next block of a group and queue its unfinished rows; if block sizes differ, split it first."""
        begin, edges = group.begin, group.edges
        size = edges[torch.searchsorted(edges, begin, right=True)] - begin
        if bool((size != size[0]).any()):
            for one in size.unique().tolist():
                part = (size == one).nonzero()[:, 0]
                context = group.context.select(part)
                self.groups.append(replace(group, index=group.index[part], context=context, begin=begin[part]))
            return
        columns = begin[:, None] + torch.arange(int(size[0]), device=begin.device)
        place = group.index[:, None], columns
        twin, self.begun[group.turn] = self.begun[group.turn], self.begun[group.turn] + 1
        name, sampler = f"b{group.turn}{f'.{twin}' if twin else ''}", self.maker.sampler(columns.shape[1])
        before = self.tokens[group.index, : int(begin.max())], begin
        contexts = {id(sampler.model.fn): group.context}

        def within(model: Denoiser) -> Denoiser:
            return model.given(contexts[id(model.fn)])

        with self.run.part(group.turn, within, self.rows[group.index], name, before) as run:
            run.use(sampler.model)
            block = _denoised(sampler, run, self.tokens[place], columns < self.given[group.index][:, None])
        self.tokens[place] = block
        ended = torch.isin(block, self.stops) & (columns >= self.given[group.index][:, None])
        done = ended.any(-1)
        first = ended.int().argmax(-1)
        for row, where in zip(group.index[done].tolist(), (begin + first)[done].tolist(), strict=True):
            self.lengths[row] = where + 1
            self.tokens[row, where + 1 :] = self.tokens[row, where]
        left = (~done & (columns[:, -1] + 1 < self.tokens.shape[1])).nonzero()[:, 0]
        if len(left):
            index, begin = group.index[left], (begin + size)[left]
            if self.maker.window is not None:
                context = self._context(index, begin, edges)
            else:
                context = group.context if len(left) == len(done) else group.context.select(left)
                context.extend(clean_states(self.maker.inner.process, block[left]))
            self.groups.append(_Group(index, context, begin, edges, group.turn + 1))


def _denoised(sampler: Sampler, run: Run, tokens: Tensor, given: Tensor) -> Tensor:
    """Denoise a block of each row of a run with the sampling loop; ``tokens`` holds the given tokens."""
    process = sampler.process
    state, at = run.begin(torch.zeros_like(tokens), 1.0, frozen=given if bool(given.any()) else None)
    noise = choose("prior", process.prior(len(tokens), tokens.shape[1], tokens.device), state, at)
    state = state.at(torch.where(given, process.place(tokens, noise), noise))
    for after in sampler.through(state, run):
        state = after
    clean = process.column(state.tokens)
    run.finish(clean, sampler.operator)
    return clean
