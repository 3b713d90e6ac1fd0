r"""Random choices of a run: ``choose`` is the only source of randomness.

An operator is a program of random choices named "step.slot.name" ("@turn" in a loop). A choice has three uses:

    sampling                its value is drawn as a function of (seed, row, step, slot, name, position)
    ``pyro.poutine.trace``  the value and its log-probability are recorded; ``replay`` sets values
    ``theory.kernel``       every possible value is tried: the exact transition matrix

The distribution carries the key of its randomness, so a run needs no handler. Pyro's handler stack belongs to the
process, not to a thread. So a run ignores handlers unless called with listen=True, and only one listens at a time.
"""

import contextlib
import functools
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import pyro
import torch
from jaxtyping import Float, Int
from pyro.contrib.autoname import scope
from torch import Tensor

from discdiff.checks import decided
from discdiff.choices import Choice, Key, Watch
from discdiff.denoiser import Counter, frozen_time
from discdiff.kernels.dispatch import TAGS, rounds
from discdiff.operator.state import State
from discdiff.prediction import Prediction
from discdiff.process import Process, RankOne, learned

__all__ = ["SLOTS", "At", "Run", "alone", "choose", "listening", "stream", "under", "while_listening"]

P = ParamSpec("P")
R = TypeVar("R")
_STEPS, SLOTS = 1 << 20, 1 << 12


@dataclass
class Run:
    """The seed, counts and records of one run, shared by its operators.

    Attributes:
        seed: the 64-bit key of its randomness.
        model: the counted denoiser.
        log_prob: (B,) the summed log-probability of all choices made, or None if it is not recorded.
        faults: GPU flags of bad rows, checked once at the end of the run.
        fuse: whether a kernel may replace several choices when nothing records them.
        listen: whether choices are Pyro sites, which handlers can read and change. The caller holds ``listening()``.
    """

    seed: int
    model: Counter
    log_prob: Float[Tensor, " B"] | None = None
    faults: list[Tensor] = field(default_factory=list)
    fuse: bool = False
    listen: bool = False
    _names: set[tuple[int, int]] = field(default_factory=set)  # (slot, tag) drawn in the current step and turn
    _step: tuple[int, int] = (-1, 0)

    def check_faults(self) -> None:
        """Raise ValueError if some row of logits was invalid; on a GPU this is checked only at the end."""
        if self.faults and bool(torch.stack(self.faults).any()):
            raise ValueError(
                "sample: the denoiser gave NaN, +inf or massless logits; run on the CPU to see the first such site"
            )

    def finish(self, tokens: Int[Tensor, "B L"], rows: Int[Tensor, " B"], process: Process, what: object) -> None:
        """Raise ValueError if the tokens at time 0 hold a mask, or if some logits were bad.

        Args:
            tokens: the tokens to return.
            rows: ids of their rows.
            process: the forward process.
            what: the operator that made them, for the message.
        """
        self.check_faults()
        if process.mask_id is not None:
            left = f"the mask is left at time 0, where tokens are clean, by {what}"
            Watch(rows).refuse(tokens == process.mask_id, left)

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0) -> Key:
        """Return the key of a site; raise ValueError if its name was used in the same step, turn and slot."""
        if step >= _STEPS or slot >= SLOTS:
            raise ValueError(f"site {step}.{slot}.{name}: at most {_STEPS} steps and {SLOTS} slots a step can be keyed")
        if (step, turn) != self._step:
            self._names.clear()
            self._step = step, turn
        tag = zlib.crc32(name.encode()) % TAGS
        if (slot, tag) in self._names:
            raise ValueError(
                f"site {step}.{slot}.{name}: a site of this name, or of one that hashes alike, "
                "was already drawn in this slot; give each choice its own name, "
                "and an operator with several slots a `width`"
            )
        self._names.add((slot, tag))
        return Key(stream(self.seed, 0, turn), state.rows, slot << 20 | step, tag, self.faults)


_ONE, _listener = threading.RLock(), threading.local()


def alone() -> contextlib.AbstractContextManager[object]:
    """Hold the lock of listening runs and enumerations, so that those of other threads wait.

    Pyro's handlers must be installed before the run. If several threads listen, each installs its own in this block:

        with dd.alone():
            trace = poutine.trace(lambda: sampler.sample(4, listen=True)).get_trace()
    """
    return _ONE


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let Pyro's handlers see this run or enumeration; wait while another thread's is seen.

    Raises:
        RuntimeError: inside another one of the same thread, which would wait for ever.
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
    """Make a sampling function hold ``held()`` when called with ``listen=True``: ``listening`` or ``alone``.

    Without listen=True the function runs under ``torch.no_grad()``; otherwise torch's grad mode is left unchanged.
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
    """Prefix all Pyro sites: "name/step.slot.site". This keeps names unique if a call makes several runs."""
    with scope(prefix=name) if listen else contextlib.nullcontext():
        yield


@functools.lru_cache(maxsize=64)
def stream(seed: int, kind: int, n: int) -> int:
    """Return the seed of the n-th part of a run: kind 0 for turns of a loop, 1 for blocks, 2 for stages.

    Part 0 keeps the seed. The others take it from Philox at counters that no choice uses (kind 3).
    """
    if n == 0:
        return seed
    high, low, _, _ = rounds(seed, 3 << 30, n, kind, 0)
    return high << 32 | low


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
        """Call the denoiser on a state at its own time, or at ``time``; frozen sites get time 0.

        The call is counted. If ``state.seen`` holds the prediction and ``time`` is None, it is returned without a call.
        """
        if state.seen is not None and time is None:
            return state.seen
        when = frozen_time(learned(state.t if time is None else time), state.frozen, state.tokens.device)
        said = self.run.model(state.tokens, when, state.rows)
        said.watch = self.watch(state)
        return said

    def alpha(self, time: float | Float[Tensor, "B 1"]) -> float | Float[Tensor, "#B #L"]:
        """Return alpha at a time, float64: a float on the host, or (1, L) if every position has its own schedule.

        For times (B, 1) it is (B, 1) or (B, L). If the schedule is learned and gradients are enabled, it is a
        differentiable (1, 1) tensor.
        """
        schedule, time = self.process.schedule, learned(time)
        if isinstance(time, Tensor):
            return schedule.survival(time)
        alpha = schedule.survival(torch.tensor(time, dtype=torch.float64))
        if schedule.sites is None and (not alpha.requires_grad or float(alpha.detach()) in (0.0, 1.0)):
            return float(alpha.detach())
        return alpha.expand(1, schedule.sites or 1).to(self.run.model.nfe_rows.device)

    def autoregressive(self, state: State) -> Prediction:
        """Return p(x_i | x_{<i}) at every site of a clean state, by ``Denoiser.autoregressive``; counted."""
        law = self.run.model.autoregressive(state.tokens, state.rows)
        law.watch = self.watch(state)
        return law

    @property
    def rank_one(self) -> RankOne:
        """The process, for an operator whose ``check`` refuses any that is not of rank one."""
        rank = self.process.rank_one
        assert rank is not None
        return rank

    def watch(self, state: State) -> Watch:
        """Return the ``Watch`` that reports bad numbers at this state; logits read are checked automatically."""
        return Watch(state.rows, self.run.faults)

    @property
    def fused(self) -> bool:
        """Whether a kernel may replace several choices: no single choice is recorded or seen by a handler."""
        return self.run.fuse and self.run.log_prob is None and not self.run.listen

    def moved(self, slots: int) -> "At":
        """Return the address ``slots`` further, for the next part of a composition."""
        return replace(self, slot=self.slot + slots)

    def again(self, turn: int) -> "At":
        """Return the address of the turn-th repetition, counted from 1, for the choices of a loop."""
        return replace(self, turn=turn)


def choose(name: str, distribution: Choice, state: State, at: At) -> Tensor:
    """Make one random choice for every row. An operator draws all its randomness through it.

    Args:
        name: the choice's name, unique in its operator.
        distribution: the law, of batch shape (B,) with B rows in ``state``.
        state: the state in which the choice is made; its row ids key the randomness.
        at: the address of the operator.

    Returns:
        The value, (B, *event).

    Raises:
        TypeError: for a law that is not a ``Choice``: its randomness cannot be keyed.
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
    distribution.key = at.run.key(name, state, at.step, at.slot, at.turn)
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
