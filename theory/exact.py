r"""Compute the exact law of a program by enumerating its choices.

``kernel`` runs the operator's own code on a batch of rows, one for each prefix of choices (``paths``), and restarts it
for each further choice. A composition is first divided into its parts. The program may call the denoiser between its
choices. Values of probability 0 are not followed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from discdiff.checks import real
from discdiff.checks import whole as whole_number
from discdiff.choices import Key
from discdiff.denoiser import Change, Counter, Denoiser, Guide, drawing
from discdiff.operator import (
    At,
    GuideAt,
    Mix,
    Operator,
    Repeat,
    Run,
    Staged,
    State,
    Then,
    When,
    applied,
    check_operator,
    check_reads,
    listening,
)
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.sampling import acting, check_model
from discdiff.theory.paths import JOINT, Branching, Paths, TooManyJoint, TooManyPaths
from discdiff.theory.sited import Sited
from discdiff.theory.world import all_states, check_size, state_index

__all__ = ["Asked", "Beginnings", "Setting", "TooManyPaths", "after", "checked", "draws", "kernel", "run_paths"]

_MOST_PATHS = 8_000_000
_NUMBERS = 1 << 19  # limit of a table (states, sites, paths of a site, values) for states that start together
_KEPT = 1 << 26  # bytes: larger matrices are not cached
_ROWS = 10  # an N x N matrix product takes as long as N / 10 row-matrix products: measured for N = 27 to 1296
_TOGETHER = 1 << 19  # limit of rows in a batch: larger ones are divided


class _Distinct(Counter):
    """Counter that evaluates a denoiser once for each distinct state and time, which many paths share."""

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
        x = all_states(states, length)[unique]
        return self.denoiser.interpret(self.denoiser.output(x, time), x, time).select(index)


class Asked(Run):
    """Run whose choices all come from ``paths``.

    A choice under a Pyro handler other than trace, inside the program, raises ValueError.
    """

    paths: Paths
    _counts = _Distinct
    reports = False  # the sites of a path are kept apart, and what is reported may combine them

    def guide(self, guide: Guide | Change, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        """Run a guide once for each distinct state and noise, which many paths share, if nothing is drawn for it."""
        if drawing((guide,), self.models) is not None:
            return super().guide(guide, prediction, state, at)
        x = state.tokens  # of an autoregressive prediction the clean tokens, and not its blank x
        x = x.ledger.settle(x) if isinstance(x, Sited) else x
        seen = torch.cat([x.double(), prediction.alpha], -1)
        _, index = seen.unique(dim=0, return_inverse=True)
        first = torch.full((int(index.max()) + 1,), len(index)).scatter_reduce(
            0, index, torch.arange(len(index)), "amin"
        )
        times = at.times if at.times is None or len(at.times) == 1 else at.times[first]
        place = replace(at, rows=at.rows[first], times=times)
        return super().guide(guide, prediction.select(first), state.select(first), place).select(index)

    def reward(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute the reward of each distinct sequence once."""
        distinct, index = x.unique(dim=0, return_inverse=True)
        return function(distinct)[index]

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0, seed: int | None = None) -> Key:
        inner = _PYRO_STACK[_PYRO_STACK.index(self.paths) + 1 :]
        changes = [type(handler).__name__ for handler in inner if type(handler) is not TraceMessenger]
        if changes:
            raise ValueError(
                f"choice {step}.{slot}.{name}: the program makes it under Pyro handlers of its own, "
                f"{', '.join(changes)}, which may hide or change it; only trace is accepted inside a program"
            )
        return super().key(name, state, step, slot, turn, seed)


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
        model: the denoiser, which must be deterministic; an oracle's is.
        t, s: the interval; a corrector takes t alone.
        length: L, needed if the model has none of its own.
        frozen: (L,) sites that never change and have time 0.
        whole: enumerate a composition as one program instead of multiplying its parts' matrices. This is slower and
            gives the same result; it tests the algebra of compositions.
        most: the maximal number of rows on which the program is run, summed over all runs (see ``paths``).

    Returns:
        (N, N) float64, N = S**L, row = state before, column = state after, base-S indices with the first site slowest.
        All rows sum to 1, but the rows of states impossible at time t (see ``Enumeration.reachable``) have no meaning.

    Raises:
        TypeError: for an operator with an unbounded number of choices, or a model that is not a Denoiser.
        ValueError: for times out of order; if ``process`` is not the model's; for too many states, before any
            enumeration; for a choice under a Pyro handler inside the program, or with a law that depends on other rows.
        TooManyPaths: a ValueError, for a program that exceeds ``most``.
    """
    setting = checked(operator, process, model, t, s, length, frozen, whole, most)
    return _kernel(operator, setting, setting.t)


def checked(
    operator: Operator, process: Process, model: Denoiser, t: float, s: float | None, length: int | None,
    frozen: Tensor | Sequence[bool] | None, whole: bool = False, most: int = _MOST_PATHS,
) -> "Setting":  # fmt: skip
    """Check the arguments of ``kernel`` and return them as a ``Setting``.

    Raises:
        TypeError, ValueError: for the same arguments as ``kernel``.
    """
    check_model(process, model, "kernel")
    check_operator(operator, "kernel")
    if not operator.enumerable:
        raise TypeError(
            f"{operator} makes an unbounded number of choices and cannot be enumerated; test samples instead"
        )
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
    return Setting(process, model, t, t if s is None else s, size, mask, whole, most)


@dataclass
class Setting:
    """Arguments of ``kernel`` that all parts of a composition share, and the matrices computed so far."""

    process: Process
    model: Denoiser
    t: float
    s: float
    length: int
    frozen: Tensor | None
    whole: bool
    most: int = _MOST_PATHS
    models: Mapping[str, Denoiser] = field(default_factory=dict)  # that guides ask by name
    before: tuple[Tensor, int] | None = None  # (P,) clean tokens before a block, and the length of whole sequences
    within: Callable[[Denoiser], Denoiser] | None = None  # gives a denoiser the context of the block
    known: dict[tuple[object, float], Tensor] = field(default_factory=dict)  # matrices, by program and time


def _kernel(operator: Operator, setting: Setting, now: float) -> Tensor:
    """Compute the matrix of a part of a composition that starts at time ``now``.

    ``now`` is t before the step's predictor and s after it.
    """
    if setting.whole:
        return _enumerate(operator, setting, now)
    match operator:
        case Staged(stages=(first, second)) if not draws(setting.model, setting.models):
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


def draws(model: Denoiser, named: Mapping[str, Denoiser]) -> bool:
    """Return whether a guide of the model, or of one that it asks, makes random choices; ``named`` are models by name.

    Then a prediction is no function of the state, and an operator that looks at one again is enumerated as a whole.
    """
    return drawing(model.guides, named) is not None


def _staged(first: Operator, second: Operator, setting: Setting, now: float) -> Tensor:
    """Compute the matrix of two stages, where the second depends on the start and on the state after the first.

    It is a sum over pairs (start, middle state).
    """
    to_middle, then = run_paths(first, setting, now)
    start, middle = to_middle.nonzero(as_tuple=True)
    return run_paths(second, setting, then, Beginnings(middle, start, to_middle[start, middle], (start, now)))[0]


def after(law: Tensor, operator: Operator, setting: Setting, now: float) -> Tensor:
    """Compute the law of the state after an operator, from its law before it; ``now`` is the time before it.

    The law is multiplied by one matrix after another, which is cheaper than a product of matrices. For n repetitions
    the cheaper way is taken. Either the law is multiplied by the matrix n times, which costs N^2 each time, or the
    power of the matrix is computed by about log n products, which cost N^3 each.
    """
    match operator:
        case Then(left, right):
            return after(after(law, left, setting, now), right, setting, setting.s if left.moves else now)
        case Repeat(inner, times):
            matrix = _kernel(inner, setting, now)
            if (times.bit_length() + times.bit_count() - 2) * len(law) < _ROWS * times:
                return law @ torch.linalg.matrix_power(matrix, times)
            for _ in range(times):
                law = law @ matrix
            return law
        case Mix(operators, weights):
            return torch.stack(
                [w * after(law, part, setting, now) for part, w in zip(operators, weights, strict=True)]
            ).sum(0)
        case When():
            return after(law, operator.at(setting.t), setting, now)
    return law @ _kernel(operator, setting, now)


def _enumerate(operator: Operator, setting: Setting, now: float) -> Tensor:
    """Enumerate the matrix of a program, or return it if it is known.

    Matrices of at most 64 MiB are kept, and used again for the same operator and time.
    """
    try:
        hash(operator)
        key: tuple[object, float] = operator, now
    except TypeError:
        key = id(operator), now
    if key in setting.known:
        return setting.known[key]
    matrix = run_paths(operator, setting, now)[0]
    if matrix.nbytes <= _KEPT:
        setting.known[key] = matrix
    return matrix


class Beginnings(NamedTuple):
    """Initial states of a program.

    Attributes:
        state: (M,) the indices of states.
        row: (M,) the row of the matrix to which each result is added.
        weight: (M,) the weight of each state.
        past: for operators that use the previous state, its indices (M,) and its time.
    """

    state: Tensor
    row: Tensor
    weight: Tensor
    past: tuple[Tensor, float] | None = None

    def part(self, here: slice) -> "Beginnings":
        """Return the initial states in a slice."""
        past = None if self.past is None else (self.past[0][here], self.past[1])
        return Beginnings(self.state[here], self.row[here], self.weight[here], past)


def run_paths(
    operator: Operator, setting: Setting, now: float, begin: Beginnings | None = None
) -> tuple[Tensor, float]:
    """Compute the matrix from the initial states to all states, and the time at which the program ends.

    By default every state is an initial state, in its own row.

    Raises:
        TooManyPaths: a ValueError, if the program runs on more than ``setting.most`` rows in all.
    """
    states = all_states(setting.process.states, setting.length)
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    if begin is None:
        every = torch.arange(len(states)).split(max(1, _NUMBERS // (setting.length * setting.process.states**2)))
        waiting = [Beginnings(some, some, torch.ones(len(some), dtype=torch.float64)) for some in every]
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


def _place(setting: Setting, states: Tensor, begin: Beginnings, paths: Paths, now: float) -> tuple[State, At]:
    """Return the arguments to run a program on all rows of ``paths``: a state and an ``At``."""
    rows, start = paths.rows, paths.start.repeat_interleave(paths.copies)
    run = Asked.start(setting.model, rows, 0, listen=True)
    run.paths, frozen = paths, None if setting.frozen is None else setting.frozen.expand(rows, -1)
    run.models, run.within = setting.models, setting.within
    if setting.before is not None:
        prefix, total = setting.before
        given = prefix.new_full((rows, total), -1)
        run.before = prefix.expand(rows, -1), torch.full_like(run.rows, len(prefix)), given
    state, at = run.begin(states[begin.state[start]], setting.t, setting.s, 1, frozen)
    state = replace(state, t=now)
    if begin.past is not None:
        past = replace(state, tokens=states[begin.past[0][start]], t=begin.past[1])
        earlier = past.t > setting.t  # then the guides were those of the earlier step
        state = state.after(past, replace(at, t=past.t, s=setting.t).predict(past) if earlier else None)
    return state, at
