"""One run of ``Blockwise``: the tokens so far, and groups of rows with the block that each is at.

A group is a set of rows whose blocks are denoised together. The groups are a stack: the steps of a run are those of the
last group until its block is complete, then those of the group that is last after that.
"""

import collections
import copy
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from discdiff.choices import Branch
from discdiff.denoiser import Tally, clean_states
from discdiff.operator import Run, State, choose
from discdiff.sampling.contexts import Contexts

if TYPE_CHECKING:
    from discdiff.sampling.blockwise import Blockwise

__all__ = ["Job"]


@dataclass(frozen=True)
class _Group:
    """Rows whose blocks are denoised together.

    Attributes:
        index: (R,) their indices in the batch.
        context: the tokens before their blocks.
        begin: (R,) where their blocks begin.
        edges: (E,) where blocks begin and end.
        turn: the number of blocks of each row that have been denoised. It keys the next block's randomness, whatever
            the group.
        name: the first part of the names of the block's Pyro sites.
        state: the state of the block with its run, once the block has begun; else None.
        shared: whether another state of the run holds the same context, so that it must be copied before it grows.
    """

    index: Tensor
    context: Contexts
    begin: Tensor
    edges: Tensor
    turn: int = 0
    name: str = ""
    state: State | None = None
    shared: bool = False


class Job:
    """One run of ``Blockwise``: the tokens so far, and the unfinished groups.

    Args:
        maker: the sampler.
        run: the seed, counts and records of the run.
        tokens: (B, L) given tokens; at other sites they may be anything.
        frozen: (B, L) bools, True at given sites.
        stops: (S,) ids of the tokens that end a row.
        initial: (B, L) states at the beginning of each block, or None for draws from the prior.
    """

    def __init__(
        self, maker: "Blockwise", run: Run, tokens: Tensor, frozen: Tensor, stops: Tensor, initial: Tensor | None
    ) -> None:
        self.maker: Blockwise = maker
        self.run: Run = run
        self.stops: Tensor = stops
        self.rows: Tensor = run.rows
        self.initial: Tensor | None = initial
        self.tokens: Tensor = torch.where(frozen, tokens, -1)
        self.frozen: Tensor = frozen
        self.some: bool = bool(frozen.any())  # whether there are given sites
        self.lengths: Tensor = torch.full_like(run.rows, tokens.shape[1])
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        self.last: Tensor = (frozen * places).amax(1)  # of each row, where its last given site ends
        # the number of given sites before each place
        self.known: Tensor = torch.nn.functional.pad(frozen.cumsum(1), (1, 0))
        self.step: int = 0
        self.t: float = 1.0
        self.groups: list[_Group] = []
        self.begun: collections.Counter[int] = collections.Counter()  # how many groups reached their n-th block
        self.future: Tensor | None = None
        self._begin()

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.run.seed

    @property
    def log_prob(self) -> Tensor | None:
        """The log-probability (B,) of all choices made, or None if it is not recorded."""
        return self.run.log_prob

    @property
    def tally(self) -> Tally:
        """The counts of the run's calls."""
        return self.run.tally

    def _begin(self) -> None:
        """Choose block sizes, and give the complete blocks at the beginning of each row to the network."""
        maker, length = self.maker, self.tokens.shape[1]
        given = self.frozen.long().cumprod(1).sum(1)
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
            index = ((chosen == number) & (given < length)).nonzero()[:, 0]
            if len(index):
                begin = edges[torch.searchsorted(edges, given[index], right=True) - 1]
                inside = self.known[index][:, edges].diff(dim=1)
                partial |= bool(((inside > 0) & (inside < edges.diff())).any())
                self.groups.append(_Group(index, self._context(index, begin, edges), begin, edges))
        if partial:
            maker.inner.warn_of_infill()

    def _context(self, index: Tensor, known: Tensor, edges: Tensor) -> Contexts:
        """Make the contexts of the first ``known`` tokens of each row, or of the last of them that fit the window."""
        length = known
        if self.maker.window is not None:
            length = known.clamp(max=self.maker.window - int(edges.diff().max()))
        columns = (known - length)[:, None] + torch.arange(int(length.max()), device=index.device)
        tokens = self.tokens[index[:, None], columns.clamp(max=self.tokens.shape[1] - 1)].clamp(min=0)
        shown = clean_states(self.maker.inner.process, tokens)
        capacity = self.tokens.shape[1] if self.maker.window is None else self.maker.window
        future = None if self.future is None else self.future[index]
        networks = self.maker.inner.networks
        return Contexts.begin(networks, self.rows[index], length, shown, future, capacity, self.tally, index)

    def copy(self) -> "Job":
        """Return a copy of the run, so that steps of one leave the other unchanged; contexts are copied later.

        A context is copied before the first step that uses it.
        """
        other = copy.copy(self)
        other.run, other.tokens, other.lengths = self.run.copy(), self.tokens.clone(), self.lengths.clone()
        other.groups, other.begun = [replace(group, shared=True) for group in self.groups], self.begun.copy()
        return other

    def ready(self) -> bool:
        """Begin the block of the last group, unless it has begun; return whether a step is left to make."""
        while self.groups and self.groups[-1].state is None:
            self._open(self._pop())
        return bool(self.groups)

    def through(self) -> Generator[None]:
        """Make the remaining steps and yield after each; close this generator before the counts are read."""
        while self.ready():
            yield from self.advance(self._pop())

    def _pop(self) -> _Group:
        group = self.groups.pop()
        if not group.shared:
            return group
        every = torch.arange(len(group.index), device=group.index.device)
        return replace(group, context=group.context.select(every), shared=False)

    def _open(self, group: _Group) -> None:
        """Begin the next block of a group; if block sizes differ, or blocks of some rows are given, split it first."""
        begin, edges = group.begin, group.edges
        size = edges[torch.searchsorted(edges, begin, right=True)] - begin
        given = self.known[group.index, begin + size] - self.known[group.index, begin] == size
        kind = 2 * size + given
        if bool((kind != kind[0]).any()):
            for one in kind.unique().tolist():
                part = (kind == one).nonzero()[:, 0]
                context = group.context.select(part)
                self.groups.append(replace(group, index=group.index[part], context=context, begin=begin[part]))
            return
        place = self._place(group, int(size[0]))
        if bool(given[0]):
            return self._queue(group, self.tokens[place], given, group.turn)
        twin, self.begun[group.turn] = self.begun[group.turn], self.begun[group.turn] + 1
        group = replace(group, name=f"b{group.turn}{f'.{twin}' if twin else ''}")
        process, frozen = self.maker.inner.process, self.frozen[place]
        with self._part(group) as run:
            state, at = run.begin(torch.zeros_like(place[1]), 1.0, frozen=frozen if bool(frozen.any()) else None)
            if self.initial is None:
                prior = process.prior(len(group.index), place[1].shape[1], self.rows.device)
                noise = choose("prior", prior, state, at)
            else:
                noise = self.initial[place]
            state = state.at(torch.where(frozen, process.place(self.tokens[place].clamp(min=0), noise), noise))
        self.tokens[place] = state.tokens
        self.groups.append(replace(group, state=replace(state, run=run)))

    def _place(self, group: _Group, size: int) -> tuple[Tensor, Tensor]:
        """Return the rows (R, 1) and columns (R, size) of the group's blocks of ``size`` sites."""
        return group.index[:, None], group.begin[:, None] + torch.arange(size, device=group.begin.device)

    def _part(self, group: _Group) -> AbstractContextManager[Run]:
        """Yield the run of the group's block."""
        given = torch.where(self.frozen, self.tokens, -1)[group.index]
        before = self.tokens[group.index, : int(group.begin.max())], group.begin, given
        return self.run.part(group.turn, group.context.given, self.rows[group.index], group.name, before)

    def advance(self, group: _Group) -> Generator[None]:
        """Make the remaining steps of a group's block, yield after each, and queue its unfinished rows."""
        assert group.state is not None
        begun, before = group.state, group.state.run
        place = self._place(group, begun.tokens.shape[1])
        sampler, columns = self.maker.sampler(begun.tokens.shape[1]), place[1]
        with self._part(group) as run:
            run.go_on(before)
            for state in sampler.through(replace(begun, run=None), run):
                self.step = self.step + 1
                self.t = state.t
                self.run.info["block"] = torch.full_like(self.rows, torch.nan, dtype=torch.float64)
                self.run.info["block"][group.index] = group.turn
                if not sampler._ended(state):
                    self.tokens[place] = state.tokens
                    self.groups.append(replace(group, state=replace(state, run=run)))
                    yield
                    self.groups.pop()
            block = sampler.process.column(state.tokens)
            run.finish(block, sampler.plan.steps[-1].operator)
        self.tokens[place] = block
        ended = torch.isin(block, self.stops) & (columns >= self.last[group.index][:, None])
        done = ended.any(-1)
        first = ended.int().argmax(-1)
        for row, where in zip(group.index[done].tolist(), (group.begin + first)[done].tolist(), strict=True):
            self.lengths[row] = where + 1
            self.tokens[row, where + 1 :] = self.tokens[row, where]
        self._queue(group, block, ~done, group.turn + 1)
        yield

    def _queue(self, group: _Group, block: Tensor, going: Tensor, turn: int) -> None:
        """Queue the rows of a group that go on after their clean block, with the number of their next block."""
        end = group.begin + block.shape[1]
        left = (going & (end < self.tokens.shape[1])).nonzero()[:, 0]
        if len(left):
            index, begin = group.index[left], end[left]
            if self.maker.window is not None:
                context = self._context(index, begin, group.edges)
            else:
                context = group.context if len(left) == len(going) else group.context.select(left)
                context.extend(clean_states(self.maker.inner.process, block[left]))
            self.groups.append(_Group(index, context, begin, group.edges, turn))

    def check_faults(self) -> None:
        """Raise ValueError if a flag says that a row of logits on a GPU was invalid."""
        for run in (self.run, *(group.state.run for group in self.groups if group.state is not None)):
            run.check_faults()

    def state(self) -> State:
        """Return the tokens so far, with -1 at sites that are not given and whose block has not begun."""
        frozen = self.frozen if self.some else None
        return State(self.tokens.clone(), self.t, self.rows, frozen, step=self.step)

    def complete(self) -> Tensor:
        """Return the lengths (B,) of the rows up to now: of an unfinished row, its sites in complete blocks."""
        lengths = self.lengths.clone()
        for group in self.groups:
            lengths[group.index] = group.begin
        return lengths

    def left(self) -> float:
        """Return the number of sites still to denoise; a site of a block that has begun counts as a part of one."""
        total = 0.0
        for group in self.groups:
            total += len(group.index) * self.tokens.shape[1] - int(group.begin.sum())
            if group.state is not None:
                total -= group.state.tokens.numel() * group.state.step / (len(self.maker.inner.grid) - 1)
        return total
