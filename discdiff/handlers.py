r"""The one door for randomness: ``choose``.

An operator is a program of random choices named "step.slot.name" ("@turn" in a loop). What a choice does depends on
who listens:

    nobody                  its value is drawn as a function of (seed, row, step, slot, name, position): the sampler
    ``pyro.poutine.trace``  the value and its log-probability are kept; ``replay`` puts values back
    ``theory.kernel``       every possible value is tried: the exact transition matrix

The key of the randomness rides on the distribution, so a run needs no handler. Pyro's handler stack belongs to the
process and not to a thread, so a run is deaf to it unless it was asked to listen, and only one listens at a time.
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
from discdiff.choice import Choice, Key
from discdiff.denoiser import Counter, frozen_time
from discdiff.faults import Watch
from discdiff.kernels.dispatch import TAGS, rounds
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.schedule import learned
from discdiff.state import State

__all__ = ["SLOTS", "At", "Run", "alone", "choose", "listening", "stream", "under", "while_listening"]

P = ParamSpec("P")
R = TypeVar("R")
_STEPS, SLOTS = 1 << 20, 1 << 12


@dataclass
class Run:
    """What belongs to one run of a program and to none of its operators: seed, counts and records.

    Attributes:
        seed: the 64-bit key of its randomness.
        model: the counted denoiser.
        log_prob: (B,) the summed log-probability of all choices made, or None if it is not kept.
        faults: flags of bad rows on a GPU, looked at once, at the end.
        fuse: whether kernels may stand in for runs of choices where nobody listens.
        listen: whether choices are Pyro sites, for handlers to see and change. Its owner is inside ``listening()``.
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
        """Raise ValueError if a row of logits was no law: what a GPU says only at the end."""
        if self.faults and bool(torch.stack(self.faults).any()):
            raise ValueError(
                "sample: the denoiser gave NaN, +inf or massless logits; run on the CPU to see the first such site"
            )

    def finish(self, tokens: Int[Tensor, "B L"], rows: Int[Tensor, " B"], process: Process, what: object) -> None:
        """Raise ValueError if the tokens of time 0 hold a mask, or come of bad logits.

        Args:
            tokens: what the run would hand out.
            rows: ids of its rows.
            process: the forward process.
            what: the operator that made them.
        """
        self.check_faults()
        if process.mask_id is not None:
            left = f"the mask is left at time 0, where tokens are clean, by {what}"
            Watch(rows).refuse(tokens == process.mask_id, left)

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0) -> Key:
        """The key of a site, refusing a name that was used before in the same step, turn and slot."""
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
    """Keep other threads' listening runs and enumerations waiting, for as many of this thread's as follow.

    Pyro's handlers go up before the run that they are for. Where several threads listen, each puts its own up inside:

        with dd.alone():
            trace = poutine.trace(lambda: sampler.sample(4, listen=True)).get_trace()
    """
    return _ONE


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Be the one run or enumeration of this process that Pyro's handlers hear; wait while another thread's is.

    Raises:
        RuntimeError: inside another one of the same thread, which could never end.
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
    """Make a function hold ``listening()`` where it is called with ``listen=True``; ``alone()`` for several runs.

    A run that nobody listens to keeps no gradients; one that listens leaves that to torch's own mode.
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
    """Name all Pyro sites inside "name/step.slot.site": names stay unique where a call makes several runs."""
    with scope(prefix=name) if listen else contextlib.nullcontext():
        yield


@functools.lru_cache(maxsize=64)
def stream(seed: int, kind: int, n: int) -> int:
    """The seed of the n-th part of a run: turns of a loop are of kind 0, blocks of kind 1, stages of kind 2.

    The first part has the seed itself, the others words of Philox at a counter that no choice uses (kind 3).
    """
    if n == 0:
        return seed
    high, low, _, _ = rounds(seed, 3 << 30, n, kind, 0)
    return high << 32 | low


@dataclass(frozen=True)
class At:
    """Where in a run an operator stands: the process, the interval t -> s, and the address (step, slot, turn).

    A predictor moves a state from ``t`` to ``s``; a corrector works at the time its state carries. An operator that
    repeats its choices an unknown number of times counts the turns.
    """

    process: Process
    run: Run
    t: float
    s: float
    step: int
    slot: int = 0
    turn: int = 0

    def predict(self, state: State, time: float | Float[Tensor, "B 1"] | None = None) -> Prediction:
        """Call the denoiser on a state, frozen sites at time 0; at its own time, unless another is given.

        The call is counted. What was ``seen`` at the state before is not asked again.
        """
        if state.seen is not None and time is None:
            return state.seen
        when = frozen_time(learned(state.t if time is None else time), state.frozen, state.tokens.device)
        said = self.run.model(state.tokens, when, state.rows)
        said.watch = self.watch(state)
        return said

    def alpha(self, time: float | Float[Tensor, "B 1"]) -> float | Float[Tensor, "#B #L"]:
        """alpha at a time in float64, on the host; a row of them where every position has a clock of its own.

        For a time of every row, (B, 1), a column of them, or (B, L). Where the clock is learned and gradients are
        enabled, (1, 1) with its derivatives.
        """
        schedule, time = self.process.schedule, learned(time)
        if isinstance(time, Tensor):
            return schedule.survival(time)
        alpha = schedule.survival(torch.tensor(time, dtype=torch.float64))
        if schedule.sites is None and (not alpha.requires_grad or float(alpha.detach()) in (0.0, 1.0)):
            return float(alpha.detach())
        return alpha.expand(1, schedule.sites or 1).to(self.run.model.nfe_rows.device)

    def autoregressive(self, state: State) -> Prediction:
        """p(x_i | x_{<i}) at every site of a clean state, as ``Denoiser.autoregressive`` gives it; counted."""
        law = self.run.model.autoregressive(state.tokens, state.rows)
        law.watch = self.watch(state)
        return law

    def watch(self, state: State) -> Watch:
        """Who is told of bad numbers at a state: what an operator reads of a prediction is looked at by itself."""
        return Watch(state.rows, self.run.faults)

    @property
    def fused(self) -> bool:
        """Whether a kernel may stand in for a run of choices: nobody records or listens to a single one."""
        return self.run.fuse and self.run.log_prob is None and not self.run.listen

    def moved(self, slots: int) -> "At":
        """The same place, ``slots`` further: where the next part of a composition stands."""
        return replace(self, slot=self.slot + slots)

    def again(self, turn: int) -> "At":
        """The same place for the turn-th time, counted from 1: where the choices of a loop are made."""
        return replace(self, turn=turn)


def choose(name: str, distribution: Choice, state: State, at: At) -> Tensor:
    """Make one random choice for every row: the only way an operator may be random.

    Args:
        name: the choice's name, unique in its operator.
        distribution: the law, batch shape (B,) equal to the rows of ``state``.
        state: the state the choice is made in; its row ids key the randomness.
        at: where the operator stands.

    Returns:
        The value, (B, *event).

    Raises:
        TypeError: for a law that is no ``Choice``, whose randomness could not be keyed.
        ValueError: if the batch shape is not the rows, the name was used before in this step and slot, or a handler
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
