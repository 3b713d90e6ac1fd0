r"""Compute the exact law of a program by enumerating its choices.

``kernel`` runs the operator's own code on a batch of rows, one for each prefix of choices (``paths``), and restarts it
for each further choice. A composition is first divided into its parts. The program may call the denoiser between its
choices; it never gets an impossible state.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from discdiff.blockwise import Blockwise
from discdiff.checks import real, shown
from discdiff.checks import whole as whole_number
from discdiff.context import Shown, clean_states
from discdiff.denoiser import Counter, Denoiser
from discdiff.distributions import Key
from discdiff.handlers import At, Run, listening
from discdiff.operator import Mix, Operator, Repeat, Staged, Then, When, check_operator
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.rest import applied, check_reads
from discdiff.sampler import Sampler, acting, check_model
from discdiff.state import State
from discdiff.theory.enumeration import all_states, check_size, law_of_data, state_index
from discdiff.theory.paths import JOINT, Branching, Paths, TooManyJoint, TooManyPaths
from discdiff.theory.sited import Sited

__all__ = ["TooManyPaths", "kernel", "law"]

_MOST_PATHS = 8_000_000
_NUMBERS = 1 << 19  # limit of a table (states, sites, paths of a site, values) for states that start together
_KEPT = 1 << 26  # bytes: larger matrices are not cached
_ROWS = 10  # an N x N matrix product takes as long as N / 10 row-matrix products: measured for N = 27 to 1296
_TOGETHER = 1 << 19  # limit of rows in a batch: larger ones are divided


class _Asked(Run):
    """Run in which all choices come from ``paths``; inner Pyro handlers other than trace are refused."""

    def __init__(self, model: Counter, paths: Paths) -> None:
        super().__init__(0, model, listen=True)
        self.paths = paths

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0) -> Key:
        inner = _PYRO_STACK[_PYRO_STACK.index(self.paths) + 1 :]
        changes = [type(handler).__name__ for handler in inner if type(handler) is not TraceMessenger]
        if changes:
            raise ValueError(
                f"choice {step}.{slot}.{name}: the program makes it under Pyro handlers of its own, "
                f"{', '.join(changes)}, which may hide or change it; only trace is accepted inside a program"
            )
        return super().key(name, state, step, slot, turn)


@torch.no_grad()
def kernel(
    operator: Operator,
    process: Process,
    model: Denoiser,
    t: float,
    s: float | None = None,
    *,
    length: int | None = None,
    frozen: Bool[Tensor, " L"] | Sequence[bool] | None = None,
    whole: bool = False,
    most: int = _MOST_PATHS,
) -> Float[Tensor, "N N"]:
    r"""Compute the exact transition matrix of an operator by enumerating its program.

    Args:
        operator: a predictor (t -> s) or a corrector (at t).
        process: the forward process; must be the model's.
        model: the denoiser: an oracle's or any other that is deterministic.
        t, s: the interval; a corrector takes t alone.
        length: L, needed if the model has none of its own.
        frozen: (L,) sites that never change and have time 0.
        whole: enumerate a composition as one program instead of multiplying its parts' matrices. Slower, with the same
            result: a test of the algebra.
        most: the maximal number of rows on which the program is run, summed over all runs (see ``paths``).

    Returns:
        (N, N) float64, N = S**L, row = state before, column = state after, base-S indices with the first site slowest.
        Rows sum to 1; rows where ``world.reachable`` is False have no other meaning.

    Raises:
        TypeError: for an operator with an unbounded number of choices, or a model that is not a Denoiser.
        ValueError: for times out of order, or processes that differ; for too many states, before any enumeration; for a
            choice under a Pyro handler inside the program, or whose law depends on other rows.
        TooManyPaths: a ValueError, for a program that exceeds ``most``.
    """
    setting = _checked(operator, process, model, t, s, length, frozen, whole, most)
    return _kernel(operator, setting, setting.t)


def _checked(
    operator: Operator, process: Process, model: Denoiser, t: float, s: float | None, length: int | None,
    frozen: Tensor | Sequence[bool] | None, whole: bool = False, most: int = _MOST_PATHS,
) -> "_Setting":  # fmt: skip
    """Check the arguments of ``kernel``."""
    check_model(process, model, "kernel")
    check_operator(operator, "kernel")
    if not operator.enumerable:
        raise TypeError(f"{operator} makes an unbounded number of choices and cannot be enumerated")
    operator.check(process)
    t, s = real(t, "kernel: t", "[0, 1]"), None if s is None else real(s, "kernel: s", "[0, 1]")
    most = whole_number(most, "kernel: most", 1)
    if operator.moves and (s is None or not 0 <= s < t <= 1):
        raise ValueError(f"kernel: {operator} is a predictor and needs 0 <= s < t <= 1, got t = {t}, s = {s}")
    if not operator.moves and (s is not None or not 0 <= t <= 1):
        raise ValueError(f"kernel: {operator} is a corrector and takes t in [0, 1] alone, got t = {t}, s = {s}")
    size = model.length if length is None else whole_number(length, "kernel: length", 1)
    if size is None or (model.length is not None and size != model.length):
        raise ValueError(f"kernel: length= must say how many sites; the model's is {model.length}, got {length}")
    check_size(process.states, size, "kernel", axes=2)
    mask = None if frozen is None else torch.as_tensor(frozen, dtype=torch.bool)
    if mask is not None and mask.shape != (size,):
        raise ValueError(f"kernel: frozen must have shape ({size},), got {tuple(mask.shape)}")
    for _, part, time in acting(operator, t, t if s is None else s, t):
        check_reads(part, model, time)
    return _Setting(process, model, t, t if s is None else s, size, mask, whole, most)


class _Distinct(Counter):
    """Evaluate the denoiser once for each distinct state: thousands of paths share a few states."""

    def __call__(self, x: Tensor, time: Tensor, rows: Tensor) -> Prediction:
        if isinstance(x, Sited):  # a prediction depends on all sites
            x = x.ledger.settle(x)
        states, length = self.denoiser.process.states, x.shape[1]
        if bool((time == time[:1]).all()):
            unique, index = state_index(x, states).unique(return_inverse=True)
            time = time[:1].expand(len(unique), -1)
        else:  # rows with different times
            pairs = torch.cat([state_index(x, states).double()[:, None], time], -1)
            distinct, index = pairs.unique(dim=0, return_inverse=True)
            unique, time = distinct[:, 0].long(), distinct[:, 1:]
        return self.denoiser.evaluate(all_states(states, length)[unique], time).select(index)


@dataclass
class _Setting:
    """Hold what is the same for all parts of a composition."""

    process: Process
    model: Denoiser
    t: float
    s: float
    length: int
    frozen: Tensor | None
    whole: bool
    most: int = _MOST_PATHS
    known: dict[tuple[object, float], Tensor] = field(default_factory=dict)  # matrices, by program and time


def _kernel(operator: Operator, setting: _Setting, now: float) -> Tensor:
    """Compute the matrix of a part that starts at time ``now``: t before the step's predictor, s after it."""
    if setting.whole:
        return _enumerate(operator, setting, now)
    match operator:
        case Staged(stages=(first, second)):
            return _staged(first, second, setting, now)
        case Then(left, right):
            return _kernel(left, setting, now) @ _kernel(right, setting, setting.s if left.moves else now)
        case Repeat(inner, times):
            return torch.linalg.matrix_power(_kernel(inner, setting, now), times)
        case Mix(operators, weights):
            parts = (w * _kernel(part, setting, now) for part, w in zip(operators, weights, strict=True))
            return torch.stack(list(parts)).sum(0)
        case When():
            return _kernel(operator.at(setting.t), setting, now)
    return _enumerate(operator, setting, now)


def _staged(first: Operator, second: Operator, setting: _Setting, now: float) -> Tensor:
    """Compute the matrix of two stages by a sum over pairs (start, middle state): the second stage depends on both."""
    to_middle, then = _paths(first, setting, now)
    start, middle = to_middle.nonzero(as_tuple=True)
    return _paths(second, setting, then, _Beginnings(middle, start, to_middle[start, middle], (start, now)))[0]


def _after(law: Tensor, operator: Operator, setting: _Setting, now: float) -> Tensor:
    """Compute the law after a part: a row times each of the part's matrices, cheaper than the product of the matrices.

    A power matrix^n takes n products of a row and a matrix, N^2 each, or about log n of two matrices, N^3 each.
    """
    match operator:
        case Then(left, right):
            return _after(_after(law, left, setting, now), right, setting, setting.s if left.moves else now)
        case Repeat(inner, times):
            matrix = _kernel(inner, setting, now)
            if (times.bit_length() + times.bit_count() - 2) * len(law) < _ROWS * times:
                return law @ torch.linalg.matrix_power(matrix, times)
            for _ in range(times):
                law = law @ matrix
            return law
        case Mix(operators, weights):
            return torch.stack(
                [w * _after(law, part, setting, now) for part, w in zip(operators, weights, strict=True)]
            ).sum(0)
        case When():
            return _after(law, operator.at(setting.t), setting, now)
    return law @ _kernel(operator, setting, now)


def _enumerate(operator: Operator, setting: _Setting, now: float) -> Tensor:
    """Compute the matrix of a program, once for equal parts at the same time."""
    try:
        hash(operator)
        key: tuple[object, float] = operator, now
    except TypeError:
        key = id(operator), now
    if key in setting.known:
        return setting.known[key]
    matrix = _paths(operator, setting, now)[0]
    if matrix.nbytes <= _KEPT:
        setting.known[key] = matrix
    return matrix


class _Beginnings(NamedTuple):
    """Initial states of a program.

    Attributes:
        state: (M,) the indices of states.
        row: (M,) the row of the matrix to which each result is added.
        weight: (M,) the weight of each state.
        past: (M,) the states before, for operators that remember them, and their time.
    """

    state: Tensor
    row: Tensor
    weight: Tensor
    past: tuple[Tensor, float] | None = None

    def part(self, here: slice) -> "_Beginnings":
        past = None if self.past is None else (self.past[0][here], self.past[1])
        return _Beginnings(self.state[here], self.row[here], self.weight[here], past)


def _paths(operator: Operator, setting: _Setting, now: float, begin: _Beginnings | None = None) -> tuple[Tensor, float]:
    """Compute the matrix from the initial states (default: every state, in its row) to all states, and the end time."""
    states = all_states(setting.process.states, setting.length)
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    if begin is None:
        every = torch.arange(len(states)).split(max(1, _NUMBERS // (setting.length * setting.process.states**2)))
        waiting = [_Beginnings(some, some, torch.ones(len(some), dtype=torch.float64)) for some in every]
    else:
        waiting = [begin] if len(begin.state) else []
    joint, then, done = all(len(part.state) <= JOINT for part in waiting), now, 0
    while waiting:
        part = waiting.pop()
        paths, half = Paths(part.weight, setting.length, setting.most, joint), len(part.state) // 2
        while True:
            if half and paths.rows > _TOGETHER:
                waiting += [part.part(slice(half)), part.part(slice(half, None))]
                break
            done += paths.rows
            if done > setting.most:
                raise TooManyPaths(f"{operator}: more than {setting.most} paths; use a smaller vocabulary or length")
            try:
                with listening(), paths:
                    after = applied(operator, *_place(setting, states, part, paths, now))
                paths.add_ends(after.tokens, matrix, part.row)
            except Branching:
                continue
            except TooManyJoint:
                joint, waiting = False, [*waiting, part]
                break
            then = after.t
            break
    return matrix, then


def _place(setting: _Setting, states: Tensor, begin: _Beginnings, paths: Paths, now: float) -> tuple[State, At]:
    """Build the state and the ``At`` with which a program is run on some paths."""
    rows, start = paths.rows, paths.start.repeat_interleave(paths.copies)
    run = _Asked(_Distinct(setting.model, 0, torch.zeros(rows, dtype=torch.int64)), paths)
    frozen = None if setting.frozen is None else setting.frozen.expand(rows, -1)
    state = State(states[begin.state[start]], now, torch.arange(rows), frozen)
    if begin.past is not None:
        state = state.after(replace(state, tokens=states[begin.past[0][start]], t=begin.past[1]))
    return state, At(setting.process, run, setting.t, setting.s, step=1)


@torch.no_grad()
def law(
    sampler: Sampler | Blockwise,
    initial: Float[Tensor, " N"] | None = None,
    *,
    length: int | None = None,
    prompt: Int[Tensor, " L"] | Sequence[int] | None = None,
    frozen: Bool[Tensor, " L"] | Sequence[bool] | None = None,
) -> Float[Tensor, " M"]:
    """Compute the exact law of a sampler's output: the initial law times the kernel of every step.

    Args:
        sampler: the sampler; a ``Blockwise`` one takes no initial, prompt or frozen.
        initial: (N,) law of the N = S**L states at the first time of the grid; by default the prior, for a grid that
            starts at 1.
        length: L, needed if the model has none of its own.
        prompt, frozen: (L,) an infill pattern: sites that hold the prompt and never change.

    Returns:
        (M,), over the n**L data sequences for a grid that ends at 0, else over the S**L noisy states. Sums to 1.

    Raises:
        TypeError, ValueError: for a partial grid without ``initial``, or mass left on masks at time 0; as ``kernel``.
    """
    if isinstance(sampler, Blockwise):
        return _blockwise(sampler, length)
    if not isinstance(sampler, Sampler):
        raise TypeError(f"law: sampler must be a Sampler or a Blockwise, got {shown(sampler)}")
    process, model = sampler.process, sampler.model
    size = model.length if length is None else whole_number(length, "law: length", 1)
    if size is None:
        raise ValueError("law: length= must say how many sites; this model has no length of its own")
    check_size(process.states, size, "law", axes=2)
    if (prompt is None) != (frozen is None) or any(x is not None and len(x) != size for x in (prompt, frozen)):
        raise ValueError(f"law: prompt= and frozen= go together, both of length {size}")
    if initial is None:
        if sampler.grid[0] != 1:
            raise ValueError(f"law: the grid starts at t = {sampler.grid[0]}; give initial=, the law there")
        initial = _prior(process, size, prompt, frozen)
    current = torch.as_tensor(initial, dtype=torch.float64)
    if current.shape != (process.states**size,):
        raise ValueError(
            f"law: initial must have shape ({process.states**size},) = (S**L,), got {tuple(current.shape)}"
        )
    if sampler.operator.remembers:
        current = _with_memory(sampler, current, size, None if frozen is None else torch.as_tensor(frozen))
    else:
        for _, t, s in sampler.intervals():
            setting = _checked(sampler.operator, process, model, t, s, size, frozen)
            current = _after(current, sampler.operator, setting, t)
    if sampler.grid[-1] > 0:
        return current
    on_data = law_of_data(process, current, size)
    left = float(current.sum() - on_data.sum())
    if abs(left) > 1e-9:
        raise ValueError(f"law: mass {left:.3g} is not on data at time 0; {sampler.operator} leaves masks")
    return on_data


def _blockwise(sampler: Blockwise, length: int | None) -> Tensor:
    """Multiply the law of each block given every prefix by the prefix's law; (n**L,) over data sequences."""
    model, process = sampler.inner.model, sampler.inner.process
    size = model.length if length is None else whole_number(length, "law: length", 1)
    if size is None:
        raise ValueError("law: length= must say how many sites; this model has no length of its own")
    check_size(len(process.data_tokens), size, "law")
    for sites in {b - a for sizes in sampler.sizes for a, b in itertools.pairwise(sampler.edges(size, sizes))}:
        check_size(process.states, sites, f"law of a block of {sites} sites", axes=2)
    tokens, total = process.data_tokens, []
    future = process.prior(1, sampler.window or size).sample() if sampler.future else None
    for sizes, weight in zip(sampler.sizes, sampler.weights, strict=True):
        so_far, edges = torch.tensor([weight], dtype=torch.float64), sampler.edges(size, sizes)
        room = size if sampler.window is None else sampler.window - max(b - a for a, b in itertools.pairwise(edges))
        for begin, end in itertools.pairwise(edges):
            inner, onwards = sampler.sampler(end - begin), []
            for prefix in tokens[all_states(len(tokens), begin)] if begin else tokens[None, :0]:
                clean = clean_states(process, prefix[None, max(0, begin - room) :])
                shown = Shown(torch.zeros(1, dtype=torch.int64), torch.tensor([clean.shape[1]]), clean, future)
                block = Sampler(process, model.given(shown), inner.operator, grid=inner.grid)
                onwards.append(law(block, length=end - begin))
            so_far = (so_far[:, None] * torch.stack(onwards)).flatten()
        total.append(so_far)
    return torch.stack(total).sum(0)


def _with_memory(sampler: Sampler, law: Tensor, size: int, frozen: Tensor | None) -> Tensor:
    """Compute the law after all steps of an operator with memory: a Markov chain of (state before, state)."""
    operator, pairs, before = sampler.operator, torch.diag(law), None
    for _, t, s in sampler.intervals():
        setting = _Setting(sampler.process, sampler.model, t, s, size, frozen, True)
        past, now = pairs.nonzero(as_tuple=True)
        look = None if before is None else (past, before)  # in the first step there is no past
        pairs, _ = _paths(operator, setting, t, _Beginnings(now, now, pairs[past, now], look))
        before = t
    return pairs.sum(0)


def _prior(
    process: Process, length: int, prompt: Tensor | Sequence[int] | None, frozen: Tensor | Sequence[bool] | None
) -> Tensor:
    """Compute the law at the start of sampling: the prior, with the prompt at frozen sites."""
    _, values, log_p = process.prior(1, length).fork()
    if prompt is not None and frozen is not None:
        given, where = torch.as_tensor(prompt).expand(values.shape), torch.as_tensor(frozen, dtype=torch.bool)
        values = torch.where(where, process.place(given, values), values)
    law = torch.zeros(process.states**length, dtype=torch.float64)
    return law.index_add(0, state_index(values, process.states), log_p.exp())
