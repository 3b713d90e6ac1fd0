r"""Random choices of a run: ``choose`` is the only source of randomness.

An operator is a program of random choices named "step.slot.name", or "step.slot.name@turn" in a loop. A
choice has three uses:

    sampling                its value is drawn as a function of (seed, row, step, slot, name, position)
    ``pyro.poutine.trace``  the value and its log-probability are recorded; ``replay`` sets values
    ``theory.kernel``       every possible value is tried, which gives the exact transition matrix

The distribution carries the key of its randomness, so a run needs no handler. All threads share Pyro's handler stack.
So a run ignores handlers unless it is called with listen=True, and only one run listens at a time.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, ParamSpec, TypeVar

import pyro
import torch
from jaxtyping import Float, Int
from pyro.contrib.autoname import scope
from torch import Tensor

from discdiff.checks import decided
from discdiff.choices import Choice, Key, Watch
from discdiff.denoiser import Counter, Denoiser, frozen_time
from discdiff.kernels.dispatch import fuses, stream
from discdiff.operator.state import State
from discdiff.prediction import Prediction
from discdiff.process import Process, RankOne, learned

__all__ = ["SLOTS", "At", "Run", "alone", "choose", "listening", "stream", "under", "while_listening"]

P = ParamSpec("P")
R = TypeVar("R")
One = TypeVar("One", bound="Run")
_STEPS, SLOTS = 1 << 20, 1 << 12


@dataclass
class Run:
    """The seed, counts and records of one run, shared by its operators.

    Attributes:
        seed: the 64-bit key of the randomness.
        model: the denoiser, in a ``Counter`` of its calls.
        rows: (R,) ids of the rows of this run.
        log_prob: (B,) the summed log-probability of all choices made, or None if it is not recorded.
        faults: flags on a GPU that say whether logits were invalid, read once at the end of the run.
        fuse: whether one compute kernel may make several choices at once when none of them is recorded.
        listen: whether choices are Pyro sites, which handlers can read and change; needs a ``listening()`` block.
        info: the values that operators reported in the last step, by name; each (B,) float64, NaN where a row has none.
    """

    seed: int
    model: Counter
    rows: Int[Tensor, " R"]
    log_prob: Float[Tensor, " B"] | None = None
    faults: list[Tensor] = field(default_factory=list)
    fuse: bool = False
    listen: bool = False
    info: dict[str, Tensor] = field(default_factory=dict)
    _names: set[tuple[int, int]] = field(default_factory=set, init=False)  # (slot, tag) of the current step and turn
    _step: tuple[int, int] = field(default=(-1, 0), init=False)
    _counts: ClassVar[type[Counter]] = Counter

    @classmethod
    def start(
        cls: type[One], model: Denoiser, batch: int, seed: int, *, first_row: int = 0,
        device: torch.device | str = "cpu", record: bool = False, listen: bool = False,
    ) -> One:  # fmt: skip
        """Start a run of ``batch`` rows with ids from ``first_row`` on; with ``record`` it sums log-probabilities."""
        rows = torch.arange(first_row, first_row + batch, device=device)
        log_prob = torch.zeros(batch, dtype=torch.float64, device=device) if record else None
        counts = cls._counts(model, first_row, torch.zeros_like(rows))
        return cls(seed, counts, rows, log_prob, fuse=fuses(rows.device), listen=listen)

    @contextlib.contextmanager
    def part(self, n: int, model: Denoiser, rows: Int[Tensor, " R"], name: str) -> "Iterator[Run]":
        """Yield a run, with its own seed, for the n-th block of the rows with ids ``rows`` (R,).

        The names of its Pyro sites begin with ``name`` and a slash. Its denoiser calls also count in this run.
        """
        counts = replace(self.model, denoiser=model, _last=None)
        part = replace(self, seed=stream(self.seed, 1, n), model=counts, rows=rows, faults=[])
        try:
            with under(name, self.listen):
                yield part
        finally:  # a run that stops leaves a block in the middle
            self.model.nfe, self.model.queries = part.model.nfe, part.model.queries

    def copy(self) -> "Run":
        """Return a run with the same seed and a copy of the counts; calls of one run then leave the other unchanged."""
        calls = replace(self.model, nfe_rows=self.model.nfe_rows.clone())
        log_prob = None if self.log_prob is None else self.log_prob.clone()
        return replace(self, model=calls, log_prob=log_prob, faults=[*self.faults], info={})

    def begin(
        self, tokens: Int[Tensor, "B L"], t: float, s: float | None = None, step: int = 0, frozen: Tensor | None = None
    ) -> "tuple[State, At]":
        """Return the state of tokens (B, L) at time t, and the address of a step from t to s; s None means t."""
        at = At(self.model.denoiser.process, self, t, t if s is None else s, step)
        return State(tokens, t, self.rows, frozen), at

    def check_faults(self) -> None:
        """Raise ValueError if a flag says that a row of logits on a GPU was invalid; call it at the end of the run."""
        if self.faults and bool(torch.stack(self.faults).any()):
            raise ValueError(
                "sample: the denoiser gave NaN, +inf or massless logits; run on the CPU to see the first such site"
            )

    def finish(self, tokens: Int[Tensor, "B L"], what: object) -> None:
        """Raise ValueError if the last tokens (B, L) hold a mask, made by operator ``what``, or logits were invalid."""
        self.check_faults()
        mask_id = self.model.denoiser.process.mask_id
        if mask_id is not None:
            left = f"the mask is left at time 0, where tokens are clean, by {what}"
            Watch(self.rows).refuse(tokens == mask_id, left)

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0) -> Key:
        """Return the key of the randomness of the choice ``name`` in a step, slot and turn.

        Raises:
            ValueError: if the name was used in the same step, slot and turn, or there are too many steps or slots.
        """
        if step >= _STEPS or slot >= SLOTS:
            raise ValueError(f"site {step}.{slot}.{name}: at most {_STEPS} steps and {SLOTS} slots a step can be keyed")
        if (step, turn) != self._step:
            self._names.clear()
            self._step = step, turn
        key = Key(self.seed, state.rows, step, slot, turn, name)
        tag = key.words[2]
        if (slot, tag) in self._names:
            raise ValueError(
                f"site {step}.{slot}.{name}: a site of this name, or of one that hashes alike, "
                "was already drawn in this slot; give each choice its own name, "
                "and an operator with several slots a `width`"
            )
        self._names.add((slot, tag))
        return key


_ONE, _listener = threading.RLock(), threading.local()


def alone() -> contextlib.AbstractContextManager[object]:
    """Hold the lock of listening runs and enumerations, so that other threads wait before they start one.

    Pyro's handlers must be installed before the run. If several threads listen, each must install its handlers within
    this block:

        with dd.alone():
            trace = poutine.trace(lambda: sampler.sample(4, listen=True)).get_trace()
    """
    return _ONE


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let Pyro's handlers see the choices in this block; first wait until no other thread is in such a block.

    Raises:
        RuntimeError: if the thread is inside such a block already.
    """
    if getattr(_listener, "busy", False):
        raise RuntimeError(
            "a run with listen=True, or an enumeration, was started inside another one of the same thread; "
            "Pyro's handlers are shared, so only one listens at a time: run the inner one deaf, or after it"
        )
    with _ONE:
        _listener.busy = True
        try:
            yield
        finally:
            _listener.busy = False


def while_listening(
    held: Callable[[], contextlib.AbstractContextManager[object]],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator for sampling functions; a call with ``listen=True`` then runs inside ``held()``.

    ``held`` is ``listening`` or ``alone``. A call without ``listen=True`` runs under ``torch.no_grad()`` instead.
    """

    def decorate(sample: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(sample)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with held() if decided(kwargs.get("listen", False), "sample: listen") else torch.no_grad():
                return sample(*args, **kwargs)

        return inside

    return decorate


@contextlib.contextmanager
def under(name: str, listen: bool) -> Iterator[None]:
    """Prefix the names of Pyro sites with "name/" if ``listen``, so that names from several runs in one call differ."""
    with scope(prefix=name) if listen else contextlib.nullcontext():
        yield


@dataclass(frozen=True)
class At:
    """The position of an operator in a run: the process, the interval t -> s, and the address (step, slot, turn).

    A predictor moves a state from ``t`` to ``s``; a corrector works at the time of its state. An operator that repeats
    its choices an unknown number of times counts the repetitions in ``turn``.
    """

    process: Process
    run: Run
    t: float
    s: float
    step: int
    slot: int = 0
    turn: int = 0

    def predict(self, state: State, time: float | Float[Tensor, "B 1"] | None = None) -> Prediction:
        """Call the denoiser on a state at its own time, or at ``time``, a float or (B, 1); frozen sites get time 0.

        The call is counted. If ``time`` is None and ``state.seen`` is set, ``state.seen`` is returned without a call.
        """
        if state.seen is not None and time is None:
            return state.seen
        when = frozen_time(learned(state.t if time is None else time), state.frozen, state.tokens.device)
        said = self.run.model(state.tokens, when, state.rows)
        said.watch = self.watch(state)
        return said

    def alpha(self, time: float | Float[Tensor, "B 1"]) -> float | Float[Tensor, "#B #L"]:
        """Return alpha at a time: a float, or a float64 tensor (1, L) if every position has its own schedule.

        For times (B, 1) the result is a tensor (B, 1) or (B, L). If the schedule is learned and gradients are enabled,
        the result at a float time is a differentiable tensor (1, 1).
        """
        schedule, time = self.process.schedule, learned(time)
        if isinstance(time, Tensor):
            return schedule.survival(time)
        alpha = schedule.survival(torch.tensor(time, dtype=torch.float64))
        if schedule.sites is None and (not alpha.requires_grad or float(alpha.detach()) in (0.0, 1.0)):
            return float(alpha.detach())
        return alpha.expand(1, schedule.sites or 1).to(self.run.model.nfe_rows.device)

    def autoregressive(self, state: State) -> Prediction:
        """Return p(x_i | x_{<i}) at all sites of a clean state, by ``Denoiser.autoregressive``; the call is counted."""
        law = self.run.model.autoregressive(state.tokens, state.rows)
        law.watch = self.watch(state)
        return law

    @property
    def rank_one(self) -> RankOne:
        """The process, for an operator whose ``check`` accepts only processes of rank one."""
        rank = self.process.rank_one
        assert rank is not None
        return rank

    def report(self, state: State, **values: Tensor) -> None:
        """Report named values, each (R,) with one number a row of the state, to ``on_step`` of ``Sampler.sample``."""
        index = state.rows - self.run.model.first_row
        for name, value in values.items():
            rows = self.run.model.nfe_rows
            told = self.run.info.setdefault(name, torch.full_like(rows, torch.nan, dtype=torch.float64))
            told[index] = value.detach().double()

    def watch(self, state: State) -> Watch:
        """Return the ``Watch`` that reports bad numbers at this state; logits are checked in any case."""
        return Watch(state.rows, self.run.faults)

    @property
    def fused(self) -> bool:
        """Whether one compute kernel may make several choices at once; False if choices are recorded or Pyro sites."""
        return self.run.fuse and self.run.log_prob is None and not self.run.listen

    def moved(self, slots: int) -> "At":
        """Return the address ``slots`` slots later, for the next part of a composition."""
        return replace(self, slot=self.slot + slots)

    def again(self, turn: int) -> "At":
        """Return the address of the turn-th repetition, counted from 1, for the choices of a loop."""
        return replace(self, turn=turn)


def choose(name: str, distribution: Choice, state: State, at: At) -> Tensor:
    """Make one random choice for every row; operators draw all their randomness through this function.

    Args:
        name: the choice's name, unique in its operator.
        distribution: the law, of batch shape (B,) with B rows in ``state``.
        state: the state in which the choice is made; its row ids key the randomness.
        at: the address of the operator.

    Returns:
        The value, (B, *event).

    Raises:
        TypeError: if the law is not a ``Choice``, because its randomness cannot be keyed.
        ValueError: if the batch shape is not (B,), the name was used before in this step and slot, or a handler
            gives a value of another shape.
    """
    rows = len(state.rows)
    if not isinstance(distribution, Choice):
        raise TypeError(
            f"choice {name!r}: takes a Choice, such as Coins, Tokens or PointMixture, whose randomness is keyed; "
            f"got {distribution!r}"
        )
    if distribution.batch_shape != (rows,):
        raise ValueError(
            f"choice {name!r}: batch shape must be ({rows},), one law a row, got {tuple(distribution.batch_shape)}"
        )
    distribution.key, distribution.faults = at.run.key(name, state, at.step, at.slot, at.turn), at.run.faults
    if at.run.listen:
        turn = f"@{at.turn}" if at.turn else ""
        site = f"{at.step}.{at.slot}.{name}{turn}"
        value = pyro.sample(site, distribution).to(distribution.kind)
        if value.shape != distribution.shape():
            raise ValueError(
                f"site {site}: takes a value of shape {tuple(distribution.shape())}, rows and event; a "
                f"handler gave {tuple(value.shape)}"
            )
    else:
        value = distribution.sample()
    if at.run.log_prob is not None:
        index = state.rows - at.run.model.first_row
        at.run.log_prob[index] += distribution.log_prob(value).to(at.run.log_prob.dtype)
    return value
