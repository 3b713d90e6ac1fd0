"""Record how a checkpoint is called and what its output means.

Families of checkpoints differ only in the fields of this record.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from discdiff.checks import wholes
from discdiff.denoiser import AtOnce, Cached, Call, Denoiser, RowCache, TimeArgument
from discdiff.prediction import Predicts
from discdiff.process import Process

__all__ = ["Attention", "Called", "Convention", "Loaded"]

Attention = Literal["ones", "bidirectional"] | None


@dataclass(frozen=True)
class Convention:
    """All that is needed to use a network as a denoiser.

    Attributes:
        family: the name of the checkpoint's family.
        process: the forward process that the network was trained for, with its schedule.
        predicts: the meaning of the output, as for ``Denoiser``.
        columns: the number of columns of the output. The first V are used, one for each data token. If the network
            predicts ratios, the first S are used, one for each state.
        mask_source: where the mask's id was found, for instance "config.json".
        time: the time argument, as for ``Denoiser``; None if the network takes none or ignores it.
        time_scale: a factor for the time argument.
        integer_time: whether the scaled time is rounded to a whole number.
        scalar_time: whether the time is one number a row.
        shift: whether position i predicts position i + 1.
        suppress: ids that are never predicted, such as special tokens and rows beyond the tokenizer.
        ids: the name of the argument for tokens; "" for the first positional one.
        clock: the name of the argument for the time; "" for the second positional one.
        returns: "tensor", or "logits" if the network returns an object with this attribute.
        attention: the ``attention_mask`` argument: None, "ones" (B, L), or "bidirectional". The value
            "bidirectional" stands for an additive mask of zeros (1, 1, L, L), which replaces a causal mask.
        longest: the largest number of tokens, without those of the frame; None if there is no limit.
        block: the block size of a network that was trained in blocks.
        aligned: True if blocks begin at multiples of ``block``, counted from the start of the prompt. False if the
            whole prompt is one block and the others follow it.
        autocast: the dtype of the computation; None for the dtype of the weights.
        weights: "raw", or "ema" for an exponential moving average of the weights.
        frame: ids of the start and the end token that the network was trained with, or None. A call with tokens x
            passes [start] x [end] to the network and returns the logits of x. Tokens and lengths exclude both ends,
            which are never predicted. On an absorbing process every row of x may already
            include both ends. Then nothing is added, and the logits of every site are returned.
        files: the names of the weight files; "" if there are none.
        notes: other facts for the user, one line each.
    """

    family: str
    process: Process
    predicts: Predicts
    columns: int
    mask_source: str = "none needed"
    time: TimeArgument = None
    time_scale: float = 1.0
    integer_time: bool = False
    scalar_time: bool = True
    shift: bool = False
    suppress: tuple[int, ...] = ()
    ids: str = "input_ids"
    clock: str = "timesteps"
    returns: Literal["tensor", "logits"] = "tensor"
    attention: Attention = None
    longest: int | None = None
    block: int | None = None
    aligned: bool = True
    autocast: torch.dtype | None = None
    weights: Literal["raw", "ema"] = "raw"
    frame: tuple[int, int] | None = None
    files: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Check the frame.

        Raises:
            TypeError, ValueError: if the frame is not two ids or holds the mask. Also if there is a frame and
                ``shift`` is True: the logits at the sites of x would predict the tokens from its second one to
                the end token, but not its first.
        """
        if self.frame is None:
            return
        ends = wholes(self.frame, "Convention: frame", 0)
        if len(ends) != 2:
            raise ValueError(f"Convention: frame must be two ids, of the start and the end token, got {self.frame}")
        if self.process.mask_id in ends:
            raise ValueError(f"Convention: frame must not hold the mask's id, {self.process.mask_id}, got {ends}")
        if self.shift:
            raise ValueError(f"Convention: frame={ends} and shift=True do not go together; pass frame=None")
        object.__setattr__(self, "frame", ends)

    @property
    def unpredicted(self) -> tuple[int, ...]:
        """Ids that are never predicted: those in ``suppress`` and in ``frame``."""
        return tuple(sorted({*self.suppress, *(v for v in self.frame or () if v < self.process.vocab_size)}))

    @property
    def call(self) -> Call:
        """The fields that tell a ``Denoiser`` how to call the network; ``Called`` uses the rest for checkpoints."""
        return Call(self.process, self.time, self.shift, self.unpredicted, self.scalar_time)

    def denoiser(self, network: nn.Module) -> "Loaded":
        """Make the denoiser of a network with this convention."""
        return Loaded(network, self)

    def lines(self) -> dict[str, str]:
        """Return the convention as printable lines, for a person to check: the text of each line by its title."""
        process, mask = self.process, self.process.mask_id
        clock: str = self.time or "none"
        if self.time is not None and (self.time_scale != 1 or self.integer_time):
            clock = f"{'round' if self.integer_time else ''}({self.time_scale:g} {self.time})"
        attention = {
            None: "the network's own" if self.block is None else f"causal between blocks of {self.block}",
            "ones": "a mask of ones",
            "bidirectional": "bidirectional, by an additive mask of zeros",
        }[self.attention]
        found = {
            "family": self.family,
            "process": str(process),
            "predicts": self.predicts,
            "mask id": "none" if mask is None else f"{mask} ({self.mask_source})",
            "time": clock,
            "shift": "position i speaks of i + 1" if self.shift else "none",
            "columns": f"{self.columns}, of which {_kept(self)} count",
            "frame": "none" if self.frame is None else "{} before and {} behind every sequence".format(*self.frame),
            "suppressed ids": _ranges(self.unpredicted),
            "attention": attention,
            "computes in": "the weights' dtype" if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "weights": self.weights,
        }
        if self.files:
            found["file"] = self.files
        return found | {f"note {n}" if n > 1 else "note": note for n, note in enumerate(self.notes, 1)}


class Called(nn.Module):
    """Function fn(x, time) for a ``Denoiser``: it calls a network by its convention.

    Raises:
        TypeError: when called, if the output's type or its number of columns differs from the convention's.
        ValueError: when called, for more tokens than the network takes.
    """

    network: Any  # a module; ``_called`` has checked its other methods

    def __init__(self, network: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.network = network
        self.convention: Convention = convention
        self.__name__: str = convention.family

    @property
    def frame(self) -> tuple[int, int] | None:
        """The ids of the start and the end token around every sequence, or None."""
        return self.convention.frame

    def forward(self, x: Int[Tensor, "B L"], time: Float[Tensor, "B *L"] | None) -> Float[Tensor, "B L C"]:
        """Call the network for tokens (B, L) at times (B,) or (B, L); return its logits (B, L, C).

        Raises:
            ValueError: for more tokens than the network takes.
            TypeError: if the output's type or its number of columns differs from the convention's.
        """
        said, positional, named = self.convention, [], {}
        held = self._has_ends(x)
        inner = x.shape[1] - 2 * held
        if said.longest is not None and inner > said.longest:
            between = "" if said.frame is None else " between its start and its end"
            raise ValueError(f"{said.family}: the network takes at most {said.longest} tokens{between}, got {inner}")
        if said.frame is not None and not held:
            x, time = self._framed(x, time, said.frame)
        if said.ids:
            named[said.ids] = x
        else:
            positional.append(x)
        time = self._clock(time)
        if time is not None:
            if said.clock:
                named[said.clock] = time
            else:
                positional.append(time)
        if said.attention is not None:
            named["attention_mask"] = self._mask(x)
        with self._autocast(x.device):
            out = self.network(*positional, **named)
        logits = self._columns(out)
        return logits if said.frame is None or held else logits[:, 1:-1]

    def _has_ends(self, x: Int[Tensor, "B L"]) -> bool:
        """Return whether every row begins and ends with the frame's tokens.

        Return False if the process is not absorbing, as its noise can be an end token.
        """
        said = self.convention
        if said.frame is None or not said.process.absorbing or x.shape[1] < 2:
            return False
        start, end = said.frame
        return len(x) > 0 and bool(((x[:, 0] == start) & (x[:, -1] == end)).all())

    def _framed(
        self, x: Int[Tensor, "B L"], time: Tensor | None, frame: tuple[int, int]
    ) -> tuple[Int[Tensor, "B N"], Tensor | None]:
        """Put the two ends around the tokens; if each site has its own time, the ends get the time of clean tokens."""
        x = nn.functional.pad(x, (1, 1))
        x[:, 0], x[:, -1] = frame
        if time is not None and time.ndim == 2:
            time = nn.functional.pad(time, (1, 1), value=1.0 if self.convention.time == "alpha" else 0.0)
        return x, time

    def _clock(self, time: Tensor | None) -> Tensor | None:
        if time is None:
            return None
        scaled = time * self.convention.time_scale
        return scaled.round().long() if self.convention.integer_time else scaled

    def _columns(self, out: object) -> Float[Tensor, "B L C"]:
        """Check the output and return the columns of it that are used."""
        said = self.convention
        logits = out if said.returns == "tensor" else getattr(out, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(f"{said.family}: the network returned {type(out).__name__}, expected {said.returns}")
        if logits.ndim != 3 or logits.shape[-1] != said.columns:
            raise TypeError(
                f"{said.family}: the convention says logits of {said.columns} columns, got {tuple(logits.shape)}"
            )
        return logits[..., : _kept(said)]

    def _mask(self, x: Int[Tensor, "B L"]) -> Tensor:
        length = x.shape[1]
        if self.convention.attention == "ones":
            return torch.ones_like(x)
        return torch.zeros(1, 1, length, length, dtype=_dtype(self.network), device=x.device)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        dtype = self.convention.autocast
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class _Keeping(Called):
    """``Called`` for a network with a cache of clean prefixes, as in ``Cached``."""

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> RowCache:
        with self._autocast(tokens.device):
            return self.network.prefill(tokens, length, capacity)

    def extend(self, cache: RowCache, tokens: Int[Tensor, "B n"]) -> None:
        with self._autocast(tokens.device):
            self.network.extend(cache, tokens)

    def evaluate(self, cache: RowCache, x: Int[Tensor, "B n"], time: Float[Tensor, "B *n"] | None) -> Tensor:
        with self._autocast(x.device):
            return self._columns(self.network.evaluate(cache, x, self._clock(time)))


class _AtOnce(_Keeping):
    """``Called`` for a network with a cache that also evaluates all blocks in one pass."""

    def blocks_at_once(
        self,
        x0: Int[Tensor, "B L"],
        x: Int[Tensor, "B L"],
        time: Float[Tensor, "B *L"] | None,
        block: int | Int[Tensor, "B 1"],
    ) -> Tensor:
        with self._autocast(x.device):
            return self._columns(self.network.blocks_at_once(x0, x, self._clock(time), block))


class _Scoring(_AtOnce):
    """``Called`` for a network with a cache that also gives autoregressive scores."""

    def score(self, cache: RowCache, x: Int[Tensor, "B n"]) -> Tensor:
        with self._autocast(x.device):
            return self._columns(self.network.score(cache, x))


def _called(network: nn.Module, convention: Convention) -> Called:
    """Wrap a network in the class here that has the network's methods."""
    if convention.frame is not None:
        _check_frame(network, convention.frame)
    if not isinstance(network, Cached):
        return Called(network, convention)
    if not isinstance(network, AtOnce):
        return _Keeping(network, convention)
    return (_Scoring if hasattr(network, "score") else _AtOnce)(network, convention)


class Loaded(Denoiser):
    """Denoiser made from a network and its ``convention``.

    To correct the convention, replace a field:

        model = replace(model.convention, shift=True).denoiser(model.network)

    Attributes:
        convention: how the network is called and what its output means.

    Raises:
        TypeError, ValueError: if the convention does not fit the network.
    """

    def __init__(self, network: nn.Module, convention: Convention) -> None:
        super().__init__(_called(network, convention), convention.process, convention.predicts)
        self.call: Call = convention.call
        self.convention: Convention = convention

    @property
    def network(self) -> nn.Module:
        """The network as a module.

        Raises:
            AttributeError: if the denoiser calls a function that is not a module, set by its method ``calling``.
        """
        if isinstance(self.fn, Called):
            return self.fn.network
        if isinstance(self.fn, nn.Module):
            return self.fn
        raise AttributeError(f"{self} calls {self.fn!r}, which is no network")


def _check_frame(network: nn.Module, frame: tuple[int, int]) -> None:
    """Raise ValueError if a network does not support the frame: it has a cache, or lacks one of the ids."""
    if isinstance(network, Cached):
        raise ValueError(f"Convention: frame={frame} needs a network of whole sequences, not one that keeps a prefix")
    embedding = network.get_input_embeddings() if hasattr(network, "get_input_embeddings") else None  # type: ignore[operator]
    if isinstance(embedding, nn.Embedding) and max(frame) >= embedding.num_embeddings:
        raise ValueError(f"Convention: frame={frame}, but the network knows ids 0..{embedding.num_embeddings - 1}")


def _kept(said: Convention) -> int:
    """Return the number of used columns; for ratios it includes the mask's."""
    return min(said.columns, said.process.columns) if said.predicts == "ratio" else said.process.vocab_size


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _ranges(ids: tuple[int, ...]) -> str:
    """Format ids as ranges: (1, 2, 3, 7) -> 1..3, 7."""
    runs: list[list[int]] = []
    for v in sorted(ids):
        if runs and v == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], v]
        else:
            runs.append([v, v])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) or "none"
