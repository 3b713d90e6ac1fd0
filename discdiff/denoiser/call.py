"""How a network is called and how its output is read, as one record for denoisers, contexts and conventions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import decided, whole, wholes
from discdiff.prediction import Output
from discdiff.process import Process, Schedule

__all__ = ["Call", "Network", "TimeArgument", "clean_states", "frozen_time"]

Network = Callable[[Tensor, Tensor | None], Tensor]
TimeArgument = Literal["t", "sigma", "alpha"] | None


@dataclass(frozen=True)
class Call:
    """How a denoiser's function is called; see ``Denoiser`` for most attributes.

    Attributes:
        process: the process that the function was trained for. It receives times of the schedule of this process.
        time: the time argument.
        shift: whether the logits at position i predict position i + 1.
        suppress: ids that are never predicted.
        scalar_time: whether the function takes one time a row only.
        length: the sequence length, if only one is accepted.
        time_dtype: dtype of the time argument; torch's default dtype if None.
        head: the last layer, if the function returns hidden states.
        schedule: the schedule of the times at which a denoiser is called, if it is not that of ``process``.

    Raises:
        TypeError, ValueError: for an invalid value; the error names the argument of ``Denoiser``.
    """

    process: Process
    time: TimeArgument = "t"
    shift: bool = False
    suppress: tuple[int, ...] = ()
    scalar_time: bool = False
    length: int | None = None
    time_dtype: torch.dtype | None = None
    head: Callable[[Tensor], Tensor] | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        """Check the fields; numbers of other packages become Python's."""
        if self.head is not None and not callable(self.head):
            raise TypeError(f"Denoiser: head must be callable as head(hidden), got {self.head!r}")
        if self.time is not None and self.time not in get_args(get_args(TimeArgument)[0]):
            raise ValueError(f"Denoiser: time must be 't', 'sigma', 'alpha' or None, got {self.time!r}")
        suppress = wholes(self.suppress, "Denoiser: suppress", 0, self.process.vocab_size - 1)
        length = None if self.length is None else whole(self.length, "Denoiser: length", 1)
        flags = {name: decided(getattr(self, name), f"Denoiser: {name}") for name in ("shift", "scalar_time")}
        dtype = self.time_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"Denoiser: time_dtype must be a floating torch dtype or None, got {dtype!r}")
        self.__dict__.update(flags, suppress=suppress, length=length)

    @property
    def sees_site_times(self) -> bool:
        """Whether the function can be given different times for clean and noisy sites."""
        return self.time is not None and not self.scalar_time

    def argument(self, t: Float[Tensor, "B #L"]) -> Tensor | None:
        """Return the function's time argument at times t (B, 1) or (B, L), or None if it takes no time.

        The argument is (B,), or (B, L) if sites differ. A function of one time a row gets that of the noisiest site.
        """
        if self.time is None:
            return None
        own = self.process.schedule
        schedule = own if self.schedule is None else self.schedule
        if self.time == "t":
            argument = t if own == schedule else own.time(schedule.survival(t))
        else:
            alpha = schedule.survival(t)
            argument = alpha if self.time == "alpha" else -alpha.log()
        argument = argument.to(self.time_dtype or torch.get_default_dtype())
        if argument.shape[1] == 1:
            return argument[:, 0].expand(len(t))
        if self.scalar_time:  # the time of the noisy sites, the largest of the row
            pick = argument.amin if self.time == "alpha" else argument.amax
            return pick(-1).expand(len(t))
        return argument.expand(len(t), -1)

    def __call__(self, fn: Network, x: Int[Tensor, "B L"], t: Float[Tensor, "#B #L"]) -> Tensor:
        """Call the function on copies of x (B, L) at times t (B, L), so that it may edit its inputs in place."""
        time = self.argument(t.expand(len(x), -1))
        if time is not None and (time.data_ptr() == t.data_ptr() or not time.is_contiguous()):
            time = time.clone()
        return fn(x.clone(), time)

    def read(self, out: object) -> Output:
        """Check the type and shape of the function's output; return an ``Output``, which computes logits if needed.

        Raises:
            TypeError: if it is not a tensor of floating numbers with three axes.
        """
        if not isinstance(out, Tensor) or out.ndim != 3 or not out.is_floating_point():
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            what = "logits (B, L, V)" if self.head is None else "hidden states (B, L, D)"
            raise TypeError(f"Denoiser: fn must return a tensor of {what}, got {got}")
        if out.is_inference():  # it has no version counter to detect a reuse of its memory, so copy it
            out = out.clone()
        width = out.shape[2] if self.head is None else self.head(out[:1, 0]).shape[-1]
        return Output(out, width, self.head, self.shift, self.suppress)


def clean_states(process: Process, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return clean tokens (B, L) as states at time 0.

    If states hold a source token, it is set to another token than the clean one, because equality may mean hidden.
    """
    return process.place(tokens, (tokens + 1) % process.vocab_size)


def frozen_time(
    t: float | Float[Tensor, "B 1"], frozen: Bool[Tensor, "B L"] | None, device: torch.device
) -> Float[Tensor, "#B #L"]:
    """Return the time of each site, (B, L) or (1, 1): t (a float or (B, 1)), and 0 at ``frozen`` (B, L)."""
    time = t if isinstance(t, Tensor) else torch.full((1, 1), t, dtype=torch.float64, device=device)
    return time if frozen is None else torch.where(frozen, 0.0, time)
