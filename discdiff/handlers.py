r"""The one door for randomness: ``choose``.

An operator is a program whose every random choice is a Pyro site named "step.slot.name" ("@turn" in a loop). What a
site does depends on who listens:

    nobody                  its value is drawn as a function of (seed, row, step, slot, name, position): the sampler
    ``pyro.poutine.trace``  the value and its log-probability are kept; ``replay`` puts values back
    ``theory.kernel``       every possible value is tried: the exact transition matrix

The key of the randomness rides on the distribution, so nothing is on Pyro's global handler stack while sampling.
"""

import functools
import zlib
from dataclasses import dataclass, field, replace

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.denoiser import Counter, frozen_time
from discdiff.distributions import Choice, Key
from discdiff.kernels.dispatch import TAGS, philox
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.state import State

__all__ = ["SLOTS", "At", "Run", "choose", "stream"]

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
    """

    seed: int
    model: Counter
    log_prob: Float[Tensor, " B"] | None = None
    faults: list[Tensor] = field(default_factory=list)
    fuse: bool = False
    _names: set[tuple[int, int]] = field(default_factory=set)  # (slot, tag) drawn in the current step and turn
    _step: tuple[int, int] = (-1, 0)

    def check_faults(self) -> None:
        """Raise ValueError if a row of logits could not be drawn from: what a GPU says only at the end."""
        if self.faults and bool(torch.stack(self.faults).any()):
            raise ValueError(
                "sample: the denoiser gave NaN, +inf or massless logits; run on the CPU to see the first such site"
            )

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


@functools.lru_cache(maxsize=64)
def stream(seed: int, kind: int, n: int) -> int:
    """The seed of the n-th part of a run: turns of a loop are of kind 0, blocks of kind 1, stages of kind 2.

    The first part has the seed itself, the others words of Philox at a counter that no choice uses (kind 3).
    """
    if n == 0:
        return seed
    high, low, _, _ = philox(seed, 3 << 30, n, kind, 0)
    return int(high) << 32 | int(low)


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
        when = frozen_time(state.t if time is None else time, state.frozen, state.tokens.device)
        return self.run.model(state.tokens, when, state.rows)

    def alpha(self, time: float | Float[Tensor, "B 1"]) -> float | Float[Tensor, "#B #L"]:
        """alpha at a time in float64, on the host; a row of them where every position has a clock of its own.

        For a time of every row, (B, 1), a column of them, or (B, L).
        """
        schedule = self.process.schedule
        if isinstance(time, Tensor):
            return schedule.survival(time)
        if schedule.sites is None:
            return float(schedule.alpha(time))
        return schedule.alpha(torch.full((1, 1), time, dtype=torch.float64)).detach().to(self.run.model.nfe_rows.device)

    def autoregressive(self, state: State) -> Prediction:
        """p(x_i | x_{<i}) at every site of a clean state, as ``Denoiser.autoregressive`` gives it; counted."""
        return self.run.model.autoregressive(state.tokens, state.rows)

    @property
    def fused(self) -> bool:
        """Whether a kernel may stand in for a run of choices: nobody records or listens to a single one."""
        return self.run.fuse and self.run.log_prob is None and not pyro.poutine.runtime.am_i_wrapped()

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
        ValueError: if the batch shape is not the rows, or the name was used before in this step and slot.
    """
    rows = len(state.rows)
    if distribution.batch_shape != (rows,):
        raise ValueError(
            f"choice {name!r}: batch shape must be ({rows},), one law a row, got {tuple(distribution.batch_shape)}"
        )
    distribution.key = at.run.key(name, state, at.step, at.slot, at.turn)
    turn = f"@{at.turn}" if at.turn else ""
    value = pyro.sample(f"{at.step}.{at.slot}.{name}{turn}", distribution)
    if at.run.log_prob is not None:
        index = state.rows - at.run.model.first_row
        at.run.log_prob[index] += distribution.log_prob(value).to(at.run.log_prob.dtype)
    return value
