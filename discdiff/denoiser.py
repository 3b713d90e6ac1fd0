"""A denoiser: any callable (x, time) -> logits, with its convention as data."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.output import Output
from discdiff.prediction import Prediction, Predicts, check_predicts
from discdiff.process import Process
from discdiff.schedule import Schedule, Time, site_time

__all__ = ["Counter", "Denoiser", "TimeArgument"]

TimeArgument = Literal["t", "sigma", "alpha"] | None


class Denoiser:
    """A model's function together with what it means.

    Args:
        fn: called as fn(x, time) with x (B, L) int64 states, returning logits (B, L, V) (or log ratios, see
            ``Prediction``). ``time`` is a tensor (B,), or (B, L) where sites differ, for instance next to a prompt;
            None for ``time=None``.
        process: the forward process it was trained for.
        predicts: "denoiser" (trained by cross-entropy), "loo" (trained by the plug-in ELBO of a uniform process) or
            "ratio" (trained by score entropy).
        time: the time argument: "t", "sigma" (-log alpha), "alpha", or None.
        shift: whether the logits at position i speak of position i + 1, as in models made from autoregressive ones.
        suppress: ids that are never predicted.
        scalar_time: whether fn takes one time a row only. Then frozen sites cannot be shown as clean: infill is
            approximate unless the process is absorbing.
        length: the sequence length, where the model has just one.
        time_dtype: dtype of the time argument; torch's default dtype if None.
        head: the model's last layer, from hidden states (n, D) of n sites to logits (n, V); then fn returns hidden
            states (B, L, D), and logits are made only of sites that are read. An ``nn.Linear`` can be fused.
        oracle: the exact law behind the model, where it is one (``theory`` sets it).

    Raises:
        TypeError, ValueError: for a convention that is not understood.
    """

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor | None], Tensor],
        process: Process,
        predicts: Predicts,
        *,
        time: TimeArgument = "t",
        shift: bool = False,
        suppress: Sequence[int] = (),
        scalar_time: bool = False,
        length: int | None = None,
        time_dtype: torch.dtype | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        oracle: object = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"Denoiser: fn must be callable as fn(x, time), got {fn!r}")
        if not isinstance(process, Process):
            raise TypeError(f"Denoiser: process must be a Process such as Masked(V, Linear()), got {process!r}")
        check_predicts(predicts)
        if head is not None and not callable(head):
            raise TypeError(f"Denoiser: head must be callable as head(hidden), got {head!r}")
        if time is not None and time not in get_args(get_args(TimeArgument)[0]):
            raise ValueError(f"Denoiser: time must be 't', 'sigma', 'alpha' or None, got {time!r}")
        outside = [v for v in suppress if not 0 <= v < process.vocab_size]
        if outside:
            raise ValueError(f"Denoiser: suppress holds {outside}; accepted ids: 0..{process.vocab_size - 1}")
        self.fn, self.process, self.predicts, self.time = fn, process, predicts, time
        self.shift, self.suppress, self.scalar_time = shift, tuple(suppress), scalar_time
        self.length, self.time_dtype, self.head, self.oracle = length, time_dtype, head, oracle
        self.guides: tuple[Callable[[Prediction], Prediction], ...] = ()
        self._clock = process.schedule

    def __call__(self, x: Int[Tensor, "B L"], t: Time) -> Prediction:
        """The prediction at noisy tokens x (B, L) and time t: a float, (B,) or (B, L).

        Raises:
            ValueError: for states or times out of range or of a wrong shape, or logits of a wrong shape.
        """
        self.process.check_states(x, "x")
        time = site_time(t, *x.shape)
        self.process.schedule.alpha(time)  # for its look at the times
        return self.evaluate(x, time.to(x.device))

    def evaluate(self, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Prediction:
        """``__call__`` without the look at every id and time, for loops that keep to states and times."""
        return self.interpret(self.output(x, t), x, t)

    def output(self, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Output:
        """What the function returns, with its shape looked at: the only place that calls it."""
        self.process.schedule.check_length(x.shape[1])
        out = self.fn(x, self._time_argument(t, self.process.schedule.survival(t), len(x)))
        if not isinstance(out, Tensor) or out.ndim != 3:
            got = f"one of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            what = "logits (B, L, V)" if self.head is None else "hidden states (B, L, D)"
            raise TypeError(f"Denoiser: fn must return a tensor of {what}, got {got}")
        width = out.shape[2] if self.head is None else self.head(out[:1, 0]).shape[-1]
        return Output(out, width, self.head, self.shift, self.suppress)

    def interpret(self, output: Output, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Prediction:
        """What an output says of x at a time, guides included."""
        prediction = Prediction(output, self.predicts, x, self.process.schedule.survival(t), self.process)
        for guide in self.guides:
            prediction = guide(prediction)
        return prediction

    def _time_argument(self, t: Tensor, alpha: Tensor, batch: int) -> Tensor | None:
        if self.time is None:
            return None
        if self.time == "t":
            argument = t if self._clock == self.process.schedule else self._clock.time(alpha)
        else:
            argument = alpha if self.time == "alpha" else -alpha.log()
        argument = argument.to(self.time_dtype or torch.get_default_dtype())
        if argument.shape[1] == 1:
            return argument[:, 0].expand(batch)
        if self.scalar_time:  # the noisy sites' time, which is the largest of the row
            pick = argument.amin if self.time == "alpha" else argument.amax
            return pick(-1).expand(batch)
        return argument.expand(batch, -1)

    @property
    def sees_site_times(self) -> bool:
        """Whether it can be told that some sites are clean while others are not."""
        return self.time is not None and not self.scalar_time

    def with_schedule(self, schedule: Schedule) -> "Denoiser":
        """The same model on another clock: its time argument is read off its own schedule at equal alpha."""
        other = copy.copy(self)
        other.process = self.process.with_schedule(schedule)
        return other

    def guided(self, guide: Callable[[Prediction], Prediction]) -> "Denoiser":
        """The same model with every prediction changed by a guide, such as ``Truncation(top_p=0.9)``."""
        if not callable(guide):
            raise TypeError(f"guided: a guide is called as guide(prediction), got {guide!r}")
        other = copy.copy(self)
        other.guides = (*self.guides, guide)
        return other

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        options = "".join(
            f", {key}={value!r}"
            for key, value, default in (
                ("time", self.time, "t"),
                ("shift", self.shift, False),
                ("suppress", self.suppress, ()),
                ("scalar_time", self.scalar_time, False),
            )
            if value != default
        )
        guides = "".join(f".guided({guide})" for guide in self.guides)
        return f"Denoiser({name}, {self.process}, predicts={self.predicts!r}{options}){guides}"


@dataclass
class Counter:
    """Counts the calls of one denoiser: operators can reach it only through here, so the NFE is a measurement.

    ``nfe`` counts batched calls; ``nfe_rows`` (B,) the calls each row took part in. A denoiser without a time input is
    not called for tokens it was called for last.
    """

    denoiser: Denoiser
    first_row: int
    nfe_rows: Int[Tensor, " B"]
    nfe: int = field(default=0)
    _last: tuple[Tensor, Output] | None = None

    def __call__(self, x: Int[Tensor, "R L"], time: Float[Tensor, "#R #L"], rows: Int[Tensor, " R"]) -> Prediction:
        if self._last is not None and self._last[0].shape == x.shape and torch.equal(self._last[0], x):
            return self.denoiser.interpret(self._last[1], x, time)
        self._last = None  # before the call: two outputs need not be in memory at once
        self.nfe += 1
        self.nfe_rows[rows - self.first_row] += 1
        output = self.denoiser.output(x, time)
        if self.denoiser.time is None:
            self._last = x, output
        return self.denoiser.interpret(output, x, time)


def frozen_time(
    t: float | Float[Tensor, "B 1"], frozen: Bool[Tensor, "B L"] | None, device: torch.device
) -> Float[Tensor, "#B #L"]:
    """The site-wise time of a state: t, and 0 at frozen sites."""
    time = t if isinstance(t, Tensor) else torch.full((1, 1), t, dtype=torch.float64, device=device)
    return time if frozen is None else torch.where(frozen, 0.0, time)
