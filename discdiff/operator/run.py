"""A run, and the positions of operators and guides in it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.choices import Choice, Choices, Key, Watch
from discdiff.denoiser import Change, Counter, Denoiser, Guide, Tally, frozen_time
from discdiff.kernels.dispatch import fuses, stream
from discdiff.operator.pyro_sites import under
from discdiff.operator.state import State
from discdiff.prediction import Prediction
from discdiff.process import Process, RankOne, learned

if TYPE_CHECKING:
    from discdiff.operator.guiding import GuideAt

__all__ = ["SLOTS", "At", "Given", "Run", "stream"]

One = TypeVar("One", bound="Run")
# called with the name of a site, its law, the ids of its rows and whether it is scored; returns the value of the choice
Given = Callable[[str, Choice, Tensor, bool], Tensor]
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
        before: the clean tokens before the block of each row (R, P), their number (R,), and the given tokens of whole
            sequences of W sites (R, W), -1 at sites that are not given; None without blocks.
        asked: the counters of the denoisers that guides ask, by the object or the name under which guides know them.
        models: the sampler's denoisers by name.
        within: gives a denoiser the context of the block that this run makes; None without blocks.
        choices: the values of the choices made, or None if they are not recorded.
        given: gives the values of choices in place of draws, or None.
        laws: the scored choices of a step by site: law, value and ids of rows; None if they are not kept.
    """

    seed: int
    model: Counter
    rows: Int[Tensor, " R"]
    log_prob: Float[Tensor, " B"] | None = None
    faults: list[Tensor] = field(default_factory=list)
    fuse: bool = False
    listen: bool = False
    info: dict[str, Tensor] = field(default_factory=dict)
    before: tuple[Int[Tensor, "R P"], Int[Tensor, " R"], Int[Tensor, "R W"]] | None = None
    asked: dict[object, Counter] = field(default_factory=dict)
    models: Mapping[str, Denoiser] = field(default_factory=dict)
    within: Callable[[Denoiser], Denoiser] | None = None
    choices: Choices | None = None
    given: Given | None = None
    laws: dict[str, tuple[Choice, Tensor, Tensor]] | None = None
    _names: set[tuple[int, int, int]] = field(default_factory=set, init=False)  # (seed, slot, tag) of this step, turn
    _step: tuple[int, int] = field(default=(-1, 0), init=False)
    _used: Denoiser | None = None
    _counts: ClassVar[type[Counter]] = Counter
    reports: ClassVar[bool] = True  # whether what operators report is kept

    @classmethod
    def start(
        cls: type[One], model: Denoiser, batch: int, seed: int, *, first_row: int = 0,
        device: torch.device | str = "cpu", record: bool = False, listen: bool = False,
    ) -> One:  # fmt: skip
        """Start a run of ``batch`` rows with ids from ``first_row`` on; with ``record`` it sums log-probabilities."""
        rows = torch.arange(first_row, first_row + batch, device=device)
        log_prob = torch.zeros(batch, dtype=torch.float64, device=device) if record else None
        counts = cls._counts(model, first_row, Tally(torch.zeros_like(rows)))
        return cls(seed, counts, rows, log_prob, fuse=fuses(rows.device), listen=listen, _used=model)

    @contextlib.contextmanager
    def part(
        self,
        n: int,
        within: Callable[[Denoiser], Denoiser],
        rows: Int[Tensor, " R"],
        name: str,
        before: tuple[Int[Tensor, "R P"], Int[Tensor, " R"], Int[Tensor, "R W"]],
    ) -> "Iterator[Run]":
        """Yield a run, with its own seed, for the n-th block of the rows with ids ``rows`` (R,).

        ``within`` gives a denoiser the context of the block, and ``before`` are the attributes of the same names. The
        names of its Pyro sites begin with ``name`` and a slash. Its denoiser calls also count in this run.
        """
        part = replace(
            self, seed=stream(self.seed, 1, n), rows=rows, faults=[], asked={}, within=within, before=before, _used=None
        )
        with under(name, self.listen):
            yield part

    def copy(self) -> "Run":
        """Return a run with the same seed and a copy of the counts; calls of one run then leave the other unchanged."""
        tally = self.tally.copy()
        log_prob = None if self.log_prob is None else self.log_prob.clone()
        choices = None if self.choices is None else self.choices.copy()
        asked = {name: replace(counter, tally=tally) for name, counter in self.asked.items()}
        calls = replace(self.model, tally=tally)
        return replace(
            self, model=calls, log_prob=log_prob, faults=[*self.faults], info={}, asked=asked, choices=choices
        )

    @property
    def tally(self) -> Tally:
        """The counts of calls."""
        return self.model.tally

    def counter(self, model: Denoiser | str) -> Counter:
        """Return the counter of another denoiser that a guide asks; its calls count in this run.

        Raises:
            ValueError: for a name that the sampler did not give to a denoiser.
        """
        if model not in self.asked:
            if isinstance(model, str) and model not in self.models:
                raise ValueError(f"a guide asks the denoiser {model!r}; Sampler(process, {{name: model}}) names them")
            self.asked[model] = self._calls(self.models[model] if isinstance(model, str) else model)
        return self.asked[model]

    def use(self, model: Denoiser) -> None:
        """Take a denoiser for the operators of the next steps."""
        if model is not self._used:
            self.model, self._used = self._calls(model), model

    def go_on(self, before: "Run") -> None:
        """Take the last answers of denoisers and the flags of an earlier run of the same block."""
        if before._used is not None:
            self.use(before._used)
            self.model._last = before.model._last
        for model, counter in before.asked.items():
            assert isinstance(model, Denoiser | str)
            self.counter(model)._last = counter._last
        self.faults = [*before.faults]

    def _calls(self, model: Denoiser) -> Counter:
        model, known = model if self.within is None else self.within(model), self.model.denoiser
        same = model.fn is known.fn and model.call is known.call and model.context is known.context
        return replace(self.model, denoiser=model, _last=self.model._last if same else None)

    def guide(self, guide: Guide | Change, prediction: Prediction, state: State, at: "GuideAt") -> Prediction:
        """Return the prediction that a guide makes of another one."""
        return guide(prediction, state, at) if isinstance(guide, Guide) else guide(prediction)

    def reward(self, function: Callable[[Tensor], Tensor], x: Int[Tensor, "N L"]) -> Tensor:
        """Return what a reward function gives for N sequences x (N, L)."""
        return function(x)

    def rewards(
        self,
        function: Callable[[Tensor], Tensor],
        x: Int[Tensor, "N L"],
        what: object,
        rows: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " N"]:
        """Return the checked rewards (N,) float64 of N sequences x (N, L) and count them.

        Raises:
            ValueError: if ``function`` gives another shape, NaN or +inf; the error names ``what``, and the id in
                ``rows`` (N,) of the sequence's row if they are given, else the row of x.
        """
        self.tally.rewards += len(x)
        found = self.reward(function, x)
        if not isinstance(found, Tensor) or found.shape != (len(x),):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{what}: a reward must give ({len(x)},) numbers, one a sequence, got {got}")
        found = found.double()
        wrong = ~(found < torch.inf)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            whose = f"sequence {first}" if rows is None else f"a sequence of row {int(rows[first])}"
            raise ValueError(f"{what}: the reward of {whose}, {x[first].tolist()}, is {float(found[first])}")
        return found

    def keep(self, site: str, law: Choice, value: Tensor, rows: Int[Tensor, " R"], scored: bool = True) -> None:
        """Keep the value of a choice and, if it is scored, add its log-probability, where the run records them."""
        if self.choices is not None:
            self.choices.keep(site, value, rows, guided=not scored)
        if self.laws is not None and scored:
            self.laws[site] = law, value, rows
        if self.log_prob is not None and scored:
            self.log_prob[rows - self.model.first_row] += law.log_prob(value).to(self.log_prob.dtype)

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

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0, seed: int | None = None) -> Key:
        """Return the key of the randomness of the choice ``name`` in a step, slot and turn.

        ``seed`` is the seed of another stream of random numbers than the run's own.

        Raises:
            ValueError: if the name was used in the same step, slot and turn, or there are too many steps or slots.
        """
        if step >= _STEPS or slot >= SLOTS:
            raise ValueError(f"site {step}.{slot}.{name}: at most {_STEPS} steps and {SLOTS} slots a step can be keyed")
        if (step, turn) != self._step:
            self._names.clear()
            self._step = step, turn
        key = Key(self.seed if seed is None else seed, state.rows, step, slot, turn, name)
        tag = key.words[2]
        if (key.seed, slot, tag) in self._names:
            raise ValueError(
                f"site {step}.{slot}.{name}: a site of this name, or of one that hashes alike, "
                "was already drawn in this slot; give each choice its own name, "
                "and an operator with several slots a `width`"
            )
        self._names.add((key.seed, slot, tag))
        return key


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

    def predict(self, state: State, time: float | Float[Tensor, "B 1"] | None = None, name: str = "") -> Prediction:
        """Call the denoiser on a state at its own time, or at ``time``, a float or (B, 1); frozen sites get time 0.

        The call is counted, and the denoiser's guides are applied. If ``time`` is None and ``state.seen`` is set,
        ``state.seen`` is returned without a call. An operator that makes a second prediction in the same slot and turn
        gives it a ``name``, which tells the random choices of guides apart.
        """
        if state.seen is not None and time is None:
            return state.seen
        told = frozen_time(learned(state.t if time is None else time), state.frozen, state.tokens.device)
        said = self.run.model(state.tokens, told, state.rows)
        return self._guided(said, state, told, name)

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
        return alpha.expand(1, schedule.sites or 1).to(self.run.rows.device)

    def autoregressive(self, state: State) -> Prediction:
        """Return p(x_i | x_{<i}) at all sites of a clean state, by ``Denoiser.autoregressive``; the call is counted."""
        law = self.run.model.score(state.tokens, state.rows)
        return self._guided(law, state, None, "autoregressive")

    def _guided(self, said: Prediction, state: State, times: Float[Tensor, "#B #L"] | None, name: str) -> Prediction:
        said.watch = self.watch(state)
        if not self.run.model.denoiser.guides:
            return said
        from discdiff.operator.guiding import guided  # a guide's position is one of these, with more in it

        return guided(said, self.run.model.denoiser, state, self, times, name)

    @property
    def rank_one(self) -> RankOne:
        """The process, for an operator whose ``check`` accepts only processes of rank one."""
        rank = self.process.rank_one
        assert rank is not None
        return rank

    def report(self, state: State, **values: Callable[[], Tensor]) -> None:
        """Report named numbers of each row to ``on_step`` of ``sample``; of several in a step the last one counts.

        Args:
            state: the state of R rows.
            values: functions that return (R,) numbers. An enumeration does not call them.
        """
        if not self.run.reports:
            return
        index = state.rows - self.run.model.first_row
        for name, value in values.items():
            rows = self.run.tally.nfe_rows
            told = self.run.info.setdefault(name, torch.full_like(rows, torch.nan, dtype=torch.float64))
            told[index] = value().detach().double()

    def watch(self, state: State) -> Watch:
        """Return the ``Watch`` that reports bad numbers at this state; logits are checked in any case."""
        return Watch(state.rows, self.run.faults)

    @property
    def fused(self) -> bool:
        """Whether one kernel may make several choices at once; False if choices are recorded, given or Pyro sites."""
        run = self.run
        recorded = run.log_prob is not None or run.given is not None or run.laws is not None
        return run.fuse and not recorded and not run.listen

    @property
    def scored(self) -> bool:
        """Whether choices made here count in the run's log-probability; those of guides do not."""
        return True

    def key(self, name: str, state: State) -> Key:
        """Return the key of the randomness of a choice; errors as ``Run.key``."""
        return self.run.key(name, state, self.step, self.slot, self.turn)

    def site(self, name: str) -> str:
        """Return the name of a choice as a Pyro site."""
        return f"{self.step}.{self.slot}.{name}{f'@{self.turn}' if self.turn else ''}"

    def moved(self, slots: int) -> "At":
        """Return the address ``slots`` slots later, for the next part of a composition."""
        return replace(self, slot=self.slot + slots)

    def again(self, turn: int) -> "At":
        """Return the address of the turn-th repetition, counted from 1, for the choices of a loop."""
        return replace(self, turn=turn)
