"""Denoisers: a callable (x, time) -> logits, and the convention by which it is called and read."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, SupportsIndex, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import decided, whole, wholes
from discdiff.denoiser.context import Cached, Context, Kept
from discdiff.denoiser.dropout import device_of
from discdiff.prediction import Output, Prediction, Predicts, check_predicts, unshifted
from discdiff.process import Process, Schedule, Time, require_process, site_time

__all__ = ["Counter", "Denoiser", "TimeArgument", "check_denoiser", "frozen_time"]

TimeArgument = Literal["t", "sigma", "alpha"] | None


class Denoiser:
    """A model's function, how to call it and what it predicts.

    Args:
        fn: called as fn(x, time) with x (B, L) int64 states; returns logits (B, L, V), or log ratios (see
            ``Prediction``). ``time`` is a tensor (B,), or (B, L) where sites differ, for instance next to a prompt;
            None for ``time=None``.
        process: the forward process it was trained for.
        predicts: "denoiser" (trained by cross-entropy), "loo" (trained by the plug-in ELBO of a uniform process) or
            "ratio" (trained by score entropy).
        time: the time argument: "t", "sigma" (-log alpha), "alpha", or None.
        shift: whether the logits at position i predict position i + 1, as in models made from autoregressive ones.
        suppress: ids that are never predicted.
        scalar_time: whether fn takes one time a row only. Then frozen sites cannot be marked as clean: infill is
            approximate unless the process is absorbing.
        length: the sequence length, if the model accepts only one.
        time_dtype: dtype of the time argument; torch's default dtype if None.
        head: the model's last layer, from hidden states (n, D) of n sites to logits (n, V). Then fn returns hidden
            states (B, L, D), and logits are computed only at the sites that are read. An ``nn.Linear`` can be fused.
        oracle: the exact law behind the model, if it is exact (set by ``theory``).

    Attributes:
        own_schedule: the schedule given at construction. fn receives times of this schedule, even after
            ``with_schedule``.

    Raises:
        TypeError, ValueError: for an invalid argument.
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
        length: SupportsIndex | None = None,
        time_dtype: torch.dtype | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        oracle: object = None,
    ) -> None:
        if not callable(fn) or isinstance(fn, type):
            hint = "; it is a class: make one of it" if isinstance(fn, type) else ""
            raise TypeError(f"Denoiser: fn must be callable as fn(x, time), got {fn!r}{hint}")
        require_process(process, "Denoiser")
        check_predicts(predicts)
        if head is not None and not callable(head):
            raise TypeError(f"Denoiser: head must be callable as head(hidden), got {head!r}")
        if time is not None and time not in get_args(get_args(TimeArgument)[0]):
            raise ValueError(f"Denoiser: time must be 't', 'sigma', 'alpha' or None, got {time!r}")
        suppress = wholes(suppress, "Denoiser: suppress", 0, process.vocab_size - 1)
        length = None if length is None else whole(length, "Denoiser: length", 1)
        shift, scalar_time = decided(shift, "Denoiser: shift"), decided(scalar_time, "Denoiser: scalar_time")
        if time_dtype is not None and not (isinstance(time_dtype, torch.dtype) and time_dtype.is_floating_point):
            raise TypeError(f"Denoiser: time_dtype must be a floating torch dtype or None, got {time_dtype!r}")
        self.fn, self.process, self.predicts, self.time = fn, process, predicts, time
        self.shift, self.suppress, self.scalar_time = shift, suppress, scalar_time
        self.length, self.time_dtype, self.head, self.oracle = length, time_dtype, head, oracle
        self.guides: tuple[Callable[[Prediction], Prediction], ...] = ()
        self.context: Context | None = None
        self.own_schedule = process.schedule

    def __call__(self, x: Int[Tensor, "B L"], t: Time) -> Prediction:
        """Return the prediction at noisy tokens x (B, L) and time t: a float, (B,) or (B, L).

        Raises:
            ValueError: for states or times out of range or of a wrong shape, or logits of a wrong shape.
        """
        self.check_states(x, "x")
        time = site_time(t, *x.shape)
        self.process.schedule.alpha(time)  # checks the range of the times
        return self.evaluate(x, time.to(x.device))

    @property
    def device(self) -> torch.device:
        """Where the parameters of the function, or of its head or guides, lie; the CPU if there are none."""
        return device_of((self.fn, self.head, *self.guides))

    @property
    def frame(self) -> tuple[int, int] | None:
        """The ids of the start and end token that the function puts around every sequence, from ``fn.frame``."""
        found = None if self.context is not None else getattr(self.fn, "frame", None)
        return found if isinstance(found, tuple) else None

    def check_data(self, x: Int[Tensor, "B L"], name: str, given: Bool[Tensor, "B L"] | None = None) -> None:
        """Raise ValueError unless x is data without the start and end tokens that the function adds itself.

        If ``given`` is not None, only its sites are checked.
        """
        data = x if given is None else x.where(given, self.process.data_tokens[0])
        self.process.check_data(data, name)
        self._check_ends(x, name, given)

    def check_states(self, x: Int[Tensor, "B L"], name: str) -> None:
        """Raise ValueError unless x are states; on an absorbing process without both ends, as in ``check_data``."""
        self.process.check_states(x, name)
        if self.process.absorbing:  # on other processes noise may equal an end
            self._check_ends(x, name, None)

    def _check_ends(self, x: Tensor, name: str, given: Tensor | None) -> None:
        frame = self.frame
        if frame is None or x.numel() == 0:
            return
        for column, end, said in ((0, frame[0], "begins with the start"), (-1, frame[1], "ends with the end")):
            held = x[:, column] == end
            held = held if given is None else held & given[:, column]
            if bool(held.any()):
                raise ValueError(
                    f"{name}: row {int(held.nonzero()[0])} {said} token, {end}; leave both ends out, they are put "
                    "around every sequence (Convention.frame)"
                )

    def evaluate(self, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Prediction:
        """``__call__`` without the checks of ids and times, for loops whose states and times are valid."""
        return self.interpret(self.output(x, t), x, t)

    def output(self, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"], rows: Tensor | None = None) -> Output:
        """Return the function's output after a check of its shape.

        ``rows`` are the ids of the rows of x; a context needs them.
        """
        self.process.schedule.check_length(x.shape[1])
        if self.context is None:
            return self._output(self.called(x, t))
        rows = x.new_zeros(len(x)) if rows is None else rows
        return replace(self._output(self.context.logits(self, x, t, rows)), shift=False)

    def _output(self, out: Tensor) -> Output:
        if not isinstance(out, Tensor) or out.ndim != 3 or not out.is_floating_point():
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            what = "logits (B, L, V)" if self.head is None else "hidden states (B, L, D)"
            raise TypeError(f"Denoiser: fn must return a tensor of {what}, got {got}")
        if out.is_inference():  # it has no version counter to detect a reuse of its memory, so copy it
            out = out.clone()
        width = out.shape[2] if self.head is None else self.head(out[:1, 0]).shape[-1]
        return Output(out, width, self.head, self.shift, self.suppress)

    def called(self, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Tensor:
        """Call the function at times t on copies, so that it may edit its inputs in place."""
        time = self.time_argument(t.expand(len(x), -1))
        if time is not None and (time.data_ptr() == t.data_ptr() or not time.is_contiguous()):
            time = time.clone()
        return self.fn(x.clone(), time)

    def given(self, context: Context) -> "Denoiser":
        """Return the same model with a context: clean tokens before the block, or another extra input."""
        other = copy.copy(self)
        other.context, other.length = context, None
        return other

    def calling(self, fn: Callable[[Tensor, Tensor | None], Tensor]) -> "Denoiser":
        """Return a denoiser with the same convention and another function."""
        other = copy.copy(self)
        other.fn, other.oracle = fn, None
        return other

    @property
    def scores_at_once(self) -> bool:
        """Whether ``autoregressive`` takes two queries a token; otherwise it takes L queries a token."""
        return isinstance(self.context, Kept | None) and isinstance(self.fn, Cached) and hasattr(self.fn, "score")

    def autoregressive(self, x: Int[Tensor, "B L"], rows: Tensor | None = None) -> Prediction:
        r"""Return p(x_i | x_{<i}) at every site of clean tokens x, given the context: blocks of a single noisy site.

        It takes one call: the network's own ``score``, or L copies of the batch; in the i-th copy the sites before i
        are clean and the others noise.

        Raises:
            ValueError: if the network cannot take clean and noisy sites in one row.
        """
        process, length = self.process, x.shape[1]
        try:
            blank = process.hide(x)
        except ValueError:  # not absorbing: at alpha = 0 the token does not matter
            blank = x.new_full(x.shape, int(process.data_tokens[0]))
        rows = x.new_zeros(len(x)) if rows is None else rows
        if self.scores_at_once and isinstance(self.fn, Cached):
            context, none = self.context, x.new_zeros(len(x))
            if context is None:
                context = Kept(rows, none, self.fn, self.fn.prefill(x[:, :0], none, length))
            assert isinstance(context, Kept)
            out = replace(self._output(context.score(x, rows)), shift=False)
        elif process.absorbing or self.sees_site_times:
            clean = torch.ones(length, length, device=x.device).tril(-1).bool()[:, None]
            z, time = torch.where(clean, x, blank).flatten(0, 1), (~clean).double().expand(-1, len(x), -1).flatten(0, 1)
            out = self.output(z, time, rows.repeat(length))
            own = (
                (unshifted(out.source) if out.shift else out.source)
                .unflatten(0, (length, len(x)))
                .diagonal(dim1=0, dim2=2)
                .transpose(1, 2)
            )
            out = replace(out, source=own, shift=False)
        else:
            raise ValueError(
                f"autoregressive: {self} takes one time a row, or none, and cannot be told that the first tokens are "
                "clean; a network with score() can, or one with a time for every site"
            )
        return self._guided(Prediction(out, self.predicts, blank, 0.0, process))

    def interpret(self, output: Output, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Prediction:
        """Make a prediction of an output at x and time t, and apply the guides."""
        prediction = Prediction(output, self.predicts, x, self.process.schedule.survival(t), self.process)
        return self._guided(prediction)

    def _guided(self, prediction: Prediction) -> Prediction:
        for guide in self.guides:
            prediction = guide(prediction)
        return prediction

    def time_argument(self, t: Float[Tensor, "B #L"]) -> Tensor | None:
        """Return the function's time argument at times t: (B,), or (B, L) where sites differ."""
        if self.time is None:
            return None
        batch, schedule = len(t), self.process.schedule
        if self.time == "t":
            argument = t if self.own_schedule == schedule else self.own_schedule.time(schedule.survival(t))
        else:
            alpha = schedule.survival(t)
            argument = alpha if self.time == "alpha" else -alpha.log()
        argument = argument.to(self.time_dtype or torch.get_default_dtype())
        if argument.shape[1] == 1:
            return argument[:, 0].expand(batch)
        if self.scalar_time:  # the time of the noisy sites, the largest of the row
            pick = argument.amin if self.time == "alpha" else argument.amax
            return pick(-1).expand(batch)
        return argument.expand(batch, -1)

    @property
    def sees_site_times(self) -> bool:
        """Whether the function can be given different times for clean and noisy sites."""
        return self.time is not None and not self.scalar_time

    def with_schedule(self, schedule: Schedule) -> "Denoiser":
        """Return the same model with another schedule; fn still gets the time of its own schedule of equal alpha."""
        other = copy.copy(self)
        other.process = self.process.with_schedule(schedule)
        return other

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model to a folder that ``load`` reads: weights as safetensors, all else as JSON.

        The folder is written completely or not at all. ``load`` rebuilds a network of this package or of a known
        family by its name. Your own network must be passed again: ``load(folder, network=mine)``.

        Args:
            folder: a path that does not exist, or an empty folder.
            overwrite: whether to replace a folder saved before, with all its contents.

        Returns:
            The folder.

        Raises:
            FileExistsError: for a folder that is not empty.
            ValueError: for what cannot be written, by name: a function, guides, a learned schedule.
        """
        from discdiff.adapters.saving import save

        return save(self, folder, overwrite=overwrite)

    def guided(self, guide: Callable[[Prediction], Prediction]) -> "Denoiser":
        """Return the same model with a guide applied to every prediction, such as ``Truncation(top_p=0.9)``."""
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


def check_denoiser(model: object, where: str) -> Denoiser:
    """Return the model if it is a Denoiser; otherwise raise a TypeError that names its type."""
    if not isinstance(model, Denoiser):
        raise TypeError(
            f"{where}: model must be a Denoiser, got {type(model).__name__}; "
            "wrap a function with Denoiser(fn, process, predicts='denoiser' | 'loo' | 'ratio')"
        )
    return model


@dataclass
class Counter:
    """Counts the calls of one denoiser. Operators reach it only through here, so the NFE is measured.

    ``nfe`` counts batched calls; ``nfe_rows`` (B,) counts the calls that include each row; ``queries`` counts the
    tokens evaluated, over all rows. A denoiser without a time input is not called again on the tokens of its last call.
    """

    denoiser: Denoiser
    first_row: int
    nfe_rows: Int[Tensor, " B"]
    nfe: int = field(default=0)
    queries: int = field(default=0)
    _last: tuple[Tensor, Output] | None = None

    def __call__(self, x: Int[Tensor, "R L"], time: Float[Tensor, "#R #L"], rows: Int[Tensor, " R"]) -> Prediction:
        if self._last is not None and self._last[0].shape == x.shape and torch.equal(self._last[0], x):
            return self.denoiser.interpret(self._last[1], x, time)
        self._last = None  # freed before the call, so that memory holds one output
        self._count(x.shape[1], rows)
        try:
            output = self.denoiser.output(x, time, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if len(x) == len(self.nfe_rows):
                raise
            raise ValueError(
                f"the denoiser failed on {len(x)} of the run's {len(self.nfe_rows)} rows ({error}); an operator may "
                "ask for some rows alone, so the function must take any number, without a buffer of a fixed size"
            ) from error
        if self.denoiser.time is None:
            self._last = x, output
        return self.denoiser.interpret(output, x, time)

    def autoregressive(self, x: Int[Tensor, "R L"], rows: Int[Tensor, " R"]) -> Prediction:
        """Call ``Denoiser.autoregressive`` and count it."""
        length = x.shape[1]
        if self.denoiser.scores_at_once:
            self._count(2 * length, rows)
        else:
            self._count(length, rows, copies=length)
        return self.denoiser.autoregressive(x, rows)

    def _count(self, width: int, rows: Tensor, copies: int = 1) -> None:
        context = self.denoiser.context
        self.nfe += 1
        self.nfe_rows[rows - self.first_row] += 1
        self.queries += copies * (width * len(rows) if context is None else context.queries(width, rows))


def frozen_time(
    t: float | Float[Tensor, "B 1"], frozen: Bool[Tensor, "B L"] | None, device: torch.device
) -> Float[Tensor, "#B #L"]:
    """Return the site-wise time of a state: t, and 0 at frozen sites."""
    time = t if isinstance(t, Tensor) else torch.full((1, 1), t, dtype=torch.float64, device=device)
    return time if frozen is None else torch.where(frozen, 0.0, time)
