"""Denoisers: a callable (x, time) -> logits, and the convention by which it is called and read."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, SupportsIndex, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, Renamed, array, real, shown, token_ids, unmade, whole
from discdiff.denoiser.call import Call, Network, TimeArgument, clean_states
from discdiff.denoiser.conditions import Along, HeldSites
from discdiff.denoiser.context import Cached, CachedPrefix, Context
from discdiff.denoiser.dropout import device_of
from discdiff.denoiser.guide import Change, Guide, check_guide, refuse_asking
from discdiff.prediction import Output, Prediction, Predicts, check_predicts, unshifted
from discdiff.process import Process, Schedule, Time, noise, require_process, site_time

__all__ = ["Denoiser", "check_denoiser"]

D = TypeVar("D", bound="Denoiser")


class Denoiser(Renamed):
    """A model's function, how to call it and what it predicts.

    Args:
        fn: called as fn(x, time) with x (B, L) int64 states; returns logits (B, L, V), or log ratios (see
            ``Prediction``). ``time`` is a tensor (B,), or (B, L) if sites have different times, for instance after a
            prompt; it is None for ``time=None``.
        process: the forward process it was trained for.
        predicts: "denoiser" (trained by cross-entropy), "loo" (trained by the plug-in ELBO of a uniform process) or
            "ratio" (trained by score entropy).
        time: the time argument: "t", "sigma" (-log alpha), "alpha", or None.
        shift: whether the logits at position i predict position i + 1, as in models made from autoregressive ones.
        suppress: ids that are never predicted.
        scalar_time: whether fn takes only one time for each row. If so, frozen sites cannot be marked as clean, and
            infill is approximate unless the process is absorbing.
        length: the sequence length, if the model accepts only one.
        time_dtype: dtype of the time argument; torch's default dtype if None.
        head: the model's last layer, from hidden states (n, D) of n sites to logits (n, V). Then fn returns hidden
            states (B, L, D), and logits are computed only at the sites that are read. An ``nn.Linear`` can be fused.
        oracle: the exact law behind the model, or None if the model is not exact; ``theory`` sets it.
        name: the name under which ``Samples.calls`` counts its calls, "model" if None.
        cost: the cost of a call, in any unit that the models of a plan share; None if it is not known.

    Attributes:
        call: how the function is called, as a ``Call``. fn receives times of the schedule given at construction, even
            after ``with_schedule``.

    Raises:
        TypeError, ValueError: for an invalid argument.
    """

    _now: ClassVar[dict[str, str]] = {
        **{
            name: f"Denoiser.call.{name}" for name in ("time", "time_dtype", "scalar_time", "shift", "suppress", "head")
        },
        "time_dtype": "Denoiser.call.time_dtype",
        "sees_site_times": "Denoiser.call.sees_site_times",
        "own_schedule": "Denoiser.call.process.schedule",
    }

    def __init__(
        self,
        fn: Network,
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
        name: str | None = None,
        cost: float | None = None,
    ) -> None:
        if not callable(fn) or isinstance(fn, type):
            raise TypeError(f"Denoiser: fn must be callable as fn(x, time), got {unmade(fn)}")
        require_process(process, "Denoiser")
        check_predicts(predicts)
        self.call: Call = Call(process, time, shift, suppress, scalar_time, length, time_dtype, head)  # type: ignore[arg-type]
        if not isinstance(name, str | None):
            raise TypeError(f"Denoiser: name must be a string or None, got {shown(name)}")
        self.fn: Network = fn
        self.process: Process = process
        self.predicts: Predicts = predicts
        self.oracle: object = oracle
        self.name: str = "model" if name is None else name
        self.cost: float | None = None if cost is None else real(cost, "Denoiser: cost", "[0, inf)")
        self.guides: tuple[Guide | Change, ...] = ()
        self.context: Context | None = None

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
        """The device of the parameters of the function, its head or its guides; the CPU if there are none."""
        return device_of((self.fn, self.call.head, *self.guides))

    @property
    def length(self) -> int | None:
        """The sequence length, if the model accepts only one."""
        return self.call.length

    @property
    def frame(self) -> tuple[int, int] | None:
        """The ids of the start and end token that the function puts around every sequence, from ``fn.frame``."""
        found = None if self.context is not None else getattr(self.fn, "frame", None)
        return found if isinstance(found, tuple) else None

    def check_data(self, x: Int[Tensor, "B L"], name: str, given: Bool[Tensor, "B L"] | None = None) -> None:
        """Raise ValueError unless x is data without the start and end tokens that the function adds itself.

        If ``given`` is not None, only sites where it is True are checked.
        """
        data = x if given is None else x.where(given, self.process.data_tokens[0])
        self.process.check_data(data, name)
        self._check_ends(x, name, given)

    def check_states(self, x: Int[Tensor, "B L"], name: str) -> None:
        """Raise ValueError unless x holds states; on an absorbing process, start and end tokens are refused too."""
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
        """Return the prediction as ``__call__`` does, but without checks, for states and times that are valid."""
        return self._guided(self.interpret(self.output(x, t), x, t), x, t)

    def output(
        self, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"], rows: Tensor | None = None, fresh: bool = False
    ) -> Output:
        """Call the function and return its output after a check of its shape.

        ``rows`` are the ids of the rows of x; a context needs them. With ``fresh`` the function gets x itself, which it
        may edit; otherwise it gets a copy.

        Raises:
            TypeError: if the output is not a floating tensor of logits or hidden states.
        """
        self.process.schedule.check_length(x.shape[1])
        if self.context is None:
            return self.call.read(self.call(self.fn, x, t, fresh))
        rows = x.new_zeros(len(x)) if rows is None else rows
        return replace(self.call.read(self.context.logits(self.call, self.fn, x, t, rows)), shift=False)

    def given(self, context: Context, length: int | None = None) -> "Denoiser":
        """Return the same model with a context: clean tokens before the block, or another extra input.

        ``length`` is the number of sites that the new model accepts, or None if it accepts any number.
        """
        return self._with(context=context, call=replace(self.call, length=length))

    def condition(self, x0: Int[Tensor, "*B L"], moving: Bool[Tensor, " L"], first_row: int = 0) -> "Denoiser":
        """Return the denoiser of p(x_A | x_B) for the moving sites A; the other sites B hold the clean tokens of x0.

        The sequences of the new denoiser consist of the sites A alone.

        Args:
            x0: (L,) or (B, L) tokens; those of moving sites are ignored.
            moving: (L,) the sites A.
            first_row: the id of the first row of x0.

        Raises:
            ValueError: if the function takes no separate time for each site and the process is not absorbing, or if
                tokens or sites are out of range.
        """
        x0, first_row = token_ids(x0, "condition: x0", "tokens"), whole(first_row, "condition: first_row", 0)
        if x0.ndim not in (1, 2):
            raise ValueError(f"condition: x0 must be (L,) or (B, L), got {tuple(x0.shape)}")
        moving = self._moving(moving, x0.shape[-1], "condition")
        known = torch.where(moving, self.process.data_tokens[0], x0.view(-1, x0.shape[-1]))
        self.check_data(known, "x0", (~moving).expand(known.shape))
        return self._held(moving, clean_states(self.process, known), 0.0, first_row)

    def marginal(self, moving: Bool[Tensor, " L"], seed: int = 0) -> "Denoiser":
        """Return the denoiser of p(x_A) for the moving sites A; the other sites hold one draw of noise.

        The sequences of the new denoiser consist of the sites A alone. If the network is exact, the draw does not
        matter, as the output does not depend on noise at time 1.

        Args:
            moving: (L,) the sites A.
            seed: the seed of the noise.

        Raises:
            ValueError: if sites are out of range, or as ``condition`` for the function and the process.
        """
        moving, seed = self._moving(moving, None, "marginal"), whole(seed, "marginal: seed", 0, LAST_SEED)
        return self._held(moving, noise(self.process, 1, len(moving), seed), 1.0, 0)

    def with_condition(self, condition: Tensor, first_row: int = 0) -> "Denoiser":
        """Return the same model with an extra input for each row, a class or an embedded text: fn(x, time, condition).

        Args:
            condition: (B, ...), one entry for each row; a single entry is used for all rows.
            first_row: the id of the first row.

        Raises:
            ValueError: if ``condition`` has no row.
        """
        first_row = whole(first_row, "with_condition: first_row", 0)
        if not isinstance(condition, Tensor) or condition.ndim < 1 or len(condition) < 1:
            raise ValueError(f"with_condition: condition must have a row for each sequence, got {shown(condition)}")
        rows = torch.arange(first_row, first_row + len(condition), device=condition.device)
        return self.given(Along(rows, condition), self.length)

    def _held(self, moving: Tensor, states: Tensor, time: float, first_row: int) -> "Denoiser":
        rows, times = torch.arange(first_row, first_row + len(states)), torch.full((len(moving),), time).double()
        return self.given(HeldSites(rows, moving, states, times), int(moving.sum()))

    def _moving(self, moving: Tensor, length: int | None, where: str) -> Tensor:
        """Check the mask of moving sites and the model, and return the mask; ``length`` None allows any length."""
        refuse_asking(self, where)
        moving = array(moving, f"{where}: moving")
        length = moving.numel() if length is None else length
        if not (self.process.absorbing or self.call.sees_site_times):
            raise ValueError(
                f"{where}: {self} takes one time a row, or none, and cannot be told that some sites are held; "
                "a denoiser with a time for every site can, or one of an absorbing process"
            )
        if moving.dtype != torch.bool or tuple(moving.shape) != (length,) or not bool(moving.any()):
            raise ValueError(f"{where}: moving must be a bool mask ({length},) with a site in it, got {moving}")
        if self.length not in (None, length):
            raise ValueError(f"{where}: the model is for length {self.length}, got {length}")
        return moving

    def calling(self, fn: Network) -> "Denoiser":
        """Return a denoiser with the same convention and another function."""
        return self._with(fn=fn, oracle=None)

    @property
    def scores_at_once(self) -> bool:
        """Whether ``autoregressive`` uses the network's ``score``, which evaluates two tokens a site, not L."""
        fn, context = self.fn, self.context
        return isinstance(context, CachedPrefix | None) and isinstance(fn, Cached) and hasattr(fn, "score")

    def autoregressive(self, x: Int[Tensor, "B L"]) -> Prediction:
        """Return the prediction of p(x_i | x_{<i}) at every site i of clean tokens x (B, L), given the context.

        It takes one call, as described for ``score``; the guides are applied to the result.

        Raises:
            ValueError, TypeError: as ``score``; TypeError for a guide that draws.
        """
        said = self.score(x)
        return self._guided(said, x, said.alpha.new_ones(1, 1), sequential=True)

    def score(self, x: Int[Tensor, "B L"], rows: Tensor | None = None) -> Prediction:
        r"""Return the prediction of p(x_i | x_{<i}) as ``autoregressive`` does, but without the guides.

        It takes one call, either of the network's ``score`` or of the function on L copies of the batch. In copy i the
        sites before i are clean and the others are noise.

        Raises:
            ValueError: if the network cannot take clean and noisy sites in one row.
            TypeError: if the network returns no logits.
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
                context = CachedPrefix(rows, none, self.fn, self.fn.prefill(x[:, :0], none, length))
            assert isinstance(context, CachedPrefix)
            out = replace(self.call.read(context.score(x, rows)), shift=False)
        elif process.absorbing or self.call.sees_site_times:
            clean = torch.ones(length, length, device=x.device).tril(-1).bool()[:, None]
            z, time = torch.where(clean, x, blank).flatten(0, 1), (~clean).double().expand(-1, len(x), -1).flatten(0, 1)
            out = self.output(z, time, rows.repeat(length), fresh=True)
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
        return Prediction(out, self.predicts, blank, 0.0, process)

    def interpret(self, output: Output, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Prediction:
        """Make a prediction from the function's output at x and time t; no guide is applied."""
        return Prediction(output, self.predicts, x, self.process.schedule.survival(t), self.process)

    def _guided(self, said: Prediction, x: Tensor, t: Float[Tensor, "#B #L"], sequential: bool = False) -> Prediction:
        """Apply the guides to a prediction that no run asked for."""
        if not self.guides:
            return said
        from discdiff.operator import guided_alone  # guides are programs, and programs need a run

        return guided_alone(self, said, x, t, sequential)

    def with_schedule(self: D, schedule: Schedule) -> D:
        """Return the same model with another schedule.

        fn still gets times of the schedule it was trained with: those at which that schedule has the same alpha.
        """
        process = self.process.with_schedule(schedule)
        guides = tuple(check_guide(guide, process, "with_schedule") for guide in self.guides)
        return self._with(process=process, call=replace(self.call, schedule=schedule), guides=guides)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model, weights as safetensors and all else as JSON, to a folder that ``load`` reads; return it.

        The folder is written completely or not at all. ``load`` rebuilds a network of this package or of a known
        family by its name. Your own network must be passed again: ``load(folder, network=mine)``.

        Args:
            folder: a path that does not exist, or an empty folder.
            overwrite: whether to replace a folder saved before, with all its contents.

        Raises:
            FileExistsError: if the folder is not empty.
            ValueError: if a function, guides or a learned schedule would have to be written; the error names it.
        """
        from discdiff.adapters.saving import save

        return save(self, folder, overwrite=overwrite)

    def guided(self, guide: Guide | Change) -> "Denoiser":
        """Return the same model with a guide applied to every prediction, after the guides that it has.

        Args:
            guide: a function of the prediction, such as ``Truncation(top_p=0.9)``, or a ``Guide``.

        Raises:
            TypeError: if the guide cannot be called, is a class or an operator, or its attributes have a wrong type.
            ValueError: if the guide is not defined on the process, or asks a denoiser of another process.
        """
        return self._with(guides=(*self.guides, check_guide(guide, self.process, "guided")))

    def with_name(self, name: str) -> "Denoiser":
        """Return the same model with another name; raise TypeError if it is no string."""
        if not isinstance(name, str):
            raise TypeError(f"with_name: name must be a string, got {shown(name)}")
        return self._with(name=name)

    def _with(self: D, **fields: object) -> D:
        other = copy.copy(self)
        vars(other).update(fields)
        return other

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        options = "".join(
            f", {name}={getattr(self.call, name)!r}"
            for name in ("time", "shift", "suppress", "scalar_time")
            if getattr(self.call, name) != getattr(Call, name)
        )
        options += "" if self.name == "model" else f", name={self.name!r}"
        options += "" if self.cost is None else f", cost={self.cost:g}"
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
