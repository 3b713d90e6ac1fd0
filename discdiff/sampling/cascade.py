"""Two stages: the samples of the first sampler condition the second.

    y ~ p(y),    x ~ p(x | y)

For instance a coarse image and then a fine one, or a plan and then a text: the second denoiser takes y as an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from discdiff.checks import decided, shown, whole, wholes
from discdiff.operator import State, alone, stream, under, while_listening
from discdiff.sampling.beginning import check_rows
from discdiff.sampling.blockwise import Blockwise
from discdiff.sampling.loop import OnStep, check_on_step, check_resumed, refuse_beginning
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples

__all__ = ["Cascade", "Stages"]


class Stages(NamedTuple):
    """The samples of both stages of a ``Cascade``, as a pair.

    If the run stopped in the first stage, the tokens of ``second`` are all -1 and its trajectory has no state.

    Attributes:
        first: the samples y of the first stage, (B, L1).
        second: the samples x of the second stage, (B, L2).
    """

    first: Samples
    second: Samples

    @property
    def state(self) -> State:
        """The last state of the cascade, for ``resume=`` and ``Cascade.step``.

        Raises:
            ValueError: if the samples come from a file, a pickle or a copy.
        """
        return self.second.state


@dataclass(frozen=True)
class _Begun:
    """What the state of a cascade carries.

    Attributes:
        maker: the cascade.
        length: L2, the length of the second stage.
        first: the last state of the first stage.
        sampler: the sampler of the second stage with its condition, once the first stage is complete; else None.
        second: the last state of the second stage, or None.
    """

    maker: "Cascade"
    length: int
    first: State
    sampler: Sampler | None = None
    second: State | None = None

    @property
    def state(self) -> State:
        """The state of the stage that is under way, with its number in the whole run."""
        last = self.first if self.second is None else self.second
        made = 0 if self.second is None else self.first.step
        return replace(last, past=None, seen=None, step=made + last.step, run=self)


class _Counted:
    """Calls ``on_step`` of a cascade with the number of the step in the whole run."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step, self.made, self.stopped = on_step, 0, False

    def __call__(self, step: int, state: State, info: dict[str, Tensor]) -> bool:
        if self.on_step is not None:
            step += self.made
            self.stopped = self.on_step(step, replace(state, step=step), info) is False
        return not self.stopped


class Cascade:
    """Two samplers in sequence: the second one's denoiser is called as fn(x, time, y) with the first one's tokens y.

    y is (B, L1), where L1 is the length of the first stage. Steps are counted from 1 through the whole run: those of
    the first stage, then those of the second.

    Args:
        first: a ``Sampler`` or a ``Blockwise``.
        second: a ``Sampler``.

    Raises:
        TypeError: if ``first`` or ``second`` is anything else.
    """

    def __init__(self, first: Sampler | Blockwise, second: Sampler) -> None:
        if not isinstance(first, Sampler | Blockwise) or not isinstance(second, Sampler):
            raise TypeError(f"Cascade: takes a Sampler or Blockwise, then a Sampler; got {first!r}, {second!r}")
        self.first: Sampler | Blockwise = first
        self.second: Sampler = second

    def start(
        self,
        batch: SupportsIndex,
        lengths: Sequence[SupportsIndex],
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        device: torch.device | str | None = None,
    ) -> State:
        """Return the first state of the first stage, for ``step``; arguments as in ``sample``.

        Raises:
            TypeError, ValueError: as ``sample``.
        """
        batch, first_row, own, length = _sizes(batch, lengths, first_row)
        first = self.first.start(batch, own, seed=seed, first_row=first_row, device=device)
        return _Begun(self, length, first).state

    def step(self, state: State) -> State:
        """Return the state after one more step; the given state is unchanged, so that two calls give equal states.

        The second stage begins with its first step. The tokens of a state are those of the stage under way, (B, L1) or
        (B, L2).

        Raises:
            ValueError: if the state does not come from ``start`` or ``step``, or all steps are made; as ``sample``.
        """
        begun = self._begun(state, "step")
        if not self.first._ended(begun.first):
            return replace(begun, first=self.first.step(begun.first)).state
        sampler = begun.sampler or self._conditioned(begun)
        second = sampler.start(**self._beginning(begun)) if begun.second is None else begun.second
        if sampler._ended(second):
            raise ValueError(f"step: all {state.step} steps are made")
        return replace(begun, sampler=sampler, second=sampler.step(second)).state

    def _begun(self, state: State, where: str) -> _Begun:
        """Return what a state of this cascade carries."""
        if not isinstance(state, State) or not isinstance(state.run, _Begun):
            raise ValueError(f"{where}: takes a state of start(), step() or Samples.state, got {shown(state)}")
        begun: _Begun = state.run
        self.first._run_of(begun.first, where)
        known, maker = begun.state, begun.maker
        same = maker.second.models == self.second.models and maker.second.plan == self.second.plan
        if not same or (state.step, state.t) != (known.step, known.t):
            raise ValueError(f"{where}: the state, after {state.step} steps at t = {state.t}, is not of {self}")
        if not torch.equal(state.tokens, known.tokens):
            raise ValueError(f"{where}: the tokens of the state were changed, but its stage holds the earlier ones")
        return begun

    @while_listening(alone)
    def sample(
        self,
        batch: SupportsIndex | None = None,
        lengths: Sequence[SupportsIndex] | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        record: bool = False,
        listen: bool = False,
        progress: bool = False,
        device: torch.device | str | None = None,
        until: SupportsIndex | None = None,
        resume: State | None = None,
        on_step: OnStep | None = None,
    ) -> Stages:
        """Draw both stages; row b depends on (seed, first_row + b).

        Args:
            batch: B.
            lengths: the lengths of the first and of the second stage.
            seed: 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: id of the first row.
            record: whether to keep the trajectory and the log-probability of each stage.
            listen: whether every choice is a Pyro site, as in ``Sampler.sample``; sites begin "first/" or "second/".
            progress: whether to show a progress bar of each stage on standard error.
            device: where to sample; by default where the first model's parameters lie.
            until: stop after this step, counted from 1 through both stages. ``Stages.state`` continues the run.
            resume: continue from ``Stages.state`` of a run that stopped. The tokens are the same as without the stop.
                If it stopped in the second stage, the trajectory of the first holds its last state alone.
            on_step: called after each step as on_step(step, state, info), as in ``Sampler.sample``; the run stops if it
                returns False. The state is that of the stage under way, with tokens (B, L1) or (B, L2).

        Returns:
            The samples of both stages, a pair.

        Raises:
            TypeError, ValueError: unless ``lengths`` is two whole numbers >= 1, if a stage refuses an argument, or if
                ``resume`` is given together with an argument for the beginning of a run.
        """
        known = self.first._last + self.second._last if isinstance(self.first, Sampler) else None
        until = None if until is None else whole(until, "sample: until", 1, known)
        check_on_step(on_step)
        record, counted = decided(record, "sample: record"), _Counted(on_step)
        common: dict[str, Any] = {"record": record, "listen": listen, "progress": progress}
        common["on_step"] = None if on_step is None else counted
        told: dict[str, Any]
        if resume is None:
            batch, first_row, own, length = _sizes(batch, lengths, first_row)
            told = {"batch": batch, "length": own, "seed": seed, "first_row": first_row, "device": device}
            begun = None
        else:
            refuse_beginning(batch=batch, lengths=lengths, seed=seed, device=device, first_row=first_row or None)
            begun = self._begun(resume, "sample: resume")
            check_resumed(begun.first.run.log_prob, resume.step, until, record)
            told, length = {"resume": begun.first}, begun.length
        if begun is None or not self.first._ended(begun.first):
            enough = until if until is None or known is None else min(until, known - self.second._last)
            with under("first", listen):
                drawn = self.first.sample(until=enough, **told, **common)
            begun = _Begun(self, length, drawn.state)
            if counted.stopped or begun.first.step == until:
                return _pair(begun, drawn, self._unbegun(begun, record))
        else:
            drawn = self.first._samples(begun.first, begun.first.tokens[None] if record else None)
            drawn = drawn if record else replace(drawn, log_prob=None)
            vars(drawn)["_state"] = begun.first
        sampler, counted.made = begun.sampler or self._conditioned(begun), begun.first.step
        if begun.second is not None and sampler._ended(begun.second):
            raise ValueError(f"sample: the run to resume has made all its {begun.state.step} steps")
        told = self._beginning(begun) if begun.second is None else {"resume": begun.second}
        enough = None if until is None else min(until - counted.made, sampler._last)
        with under("second", listen):
            after = sampler.sample(until=enough, **told, **common)
        return _pair(replace(begun, sampler=sampler, second=after.state), drawn, after)

    def _conditioned(self, begun: _Begun) -> Sampler:
        """Return the sampler of the second stage, given the tokens of the first."""
        drawn = self.first._samples(begun.first, None)
        first_row = int(begun.first.rows[0])
        models = {name: one.with_condition(drawn.tokens, first_row) for name, one in self.second.models.items()}
        return Sampler(self.second.process, models, plan=self.second.plan)

    def _beginning(self, begun: _Begun) -> dict[str, Any]:
        """Return the arguments with which the second stage begins."""
        rows, seed = begun.first.rows, stream(begun.first.run.seed, 2, 1)
        return {"batch": len(rows), "length": begun.length, "seed": seed, "first_row": int(rows[0]),
                "device": rows.device}  # fmt: skip

    def _unbegun(self, begun: _Begun, record: bool) -> Samples:
        """Return the samples of a second stage that has not begun: no calls, and -1 at all sites."""
        told = self._beginning(begun)
        rows = torch.zeros_like(begun.first.rows)
        tokens = rows.new_full((len(rows), begun.length), -1)
        path, log_prob = (tokens.new_empty(0, *tokens.shape), rows.double()) if record else (None, None)
        return Samples(tokens, 0, rows, told["seed"], path, log_prob, 0, self.second.model.frame)

    def __repr__(self) -> str:
        return f"Cascade({self.first}, {self.second})"


def _sizes(batch: object, lengths: object, first_row: object) -> tuple[int, int, int, int]:
    """Return the batch size, the id of the first row and the lengths of both stages, all checked."""
    batch, first_row = check_rows("sample", batch, first_row)
    both = wholes(lengths, "sample: lengths", 1)
    if len(both) != 2:
        raise ValueError(f"sample: lengths must be two, of the first stage and of the second, got {both}")
    return batch, first_row, *both


def _pair(begun: _Begun, first: Samples, second: Samples) -> Stages:
    """Return the samples of both stages, with the state of the cascade."""
    vars(second)["_state"] = begun.state
    return Stages(first, second)
