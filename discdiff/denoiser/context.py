"""Extra inputs of a denoiser: the clean tokens before a block, or a condition.

A network with a cache of clean tokens has ``prefill``, ``extend`` and ``evaluate`` (``Cached``); a call then evaluates
only the block. Any other network evaluates the whole prefix again in every call.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.denoiser.call import Call, Network
from discdiff.prediction import unshifted

__all__ = ["AtOnce", "Behind", "Cached", "CachedPrefix", "Context", "Growing", "RowCache", "ShownPrefix"]


C = TypeVar("C", bound="RowCache")


@runtime_checkable
class RowCache(Protocol):
    """A network's cache of the clean tokens of a batch."""

    def select(self: C, rows: Int[Tensor, " R"]) -> C:
        """Return the cache of the rows at indices (R,), which may repeat."""
        ...


@runtime_checkable
class Cached(Protocol[C]):
    """Network with a cache of clean tokens.

    It may also have a method ``score(cache, x)``, which returns p(x_i | prefix, x_{<i}) for all i in one call.

    Shapes: prefix (B, P) with lengths (B,), blocks (B, n), their times (B,) or (B, n).
    """

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> C:
        """Cache the first ``length`` tokens of each row; the cache will hold at most ``capacity`` tokens."""
        ...

    def extend(self, cache: C, tokens: Int[Tensor, "B n"]) -> None:
        """Append a clean block of states (B, n) to the cached prefix."""
        ...

    def evaluate(self, cache: C, x: Int[Tensor, "B n"], time: Float[Tensor, "B *n"] | None) -> Tensor:
        """Return the network's output for a noisy block after the prefix, (B, n, V)."""
        ...


@runtime_checkable
class AtOnce(Protocol):
    """A network that evaluates all blocks of given sequences in one pass, each after the clean blocks before it.

    Shapes: x0 and x (B, L), times (B,) or (B, L).
    """

    def blocks_at_once(
        self, x0: Int[Tensor, "B L"], x: Int[Tensor, "B L"], time: Float[Tensor, "B *L"] | None, block: int
    ) -> Tensor:
        """Return the network's output for noisy blocks x, each after the clean blocks of x0 before it, (B, L, V)."""
        ...


class Context(ABC):
    """Extra input of a denoiser for a batch of B rows, such as clean prefixes.

    Shapes of a call for R of the rows: row ids (R,), a block x (R, n), its times t (R, n) or broadcastable to it.

    Attributes:
        rows: (B,) ids of the rows; if there is only one row, it is used for every id.
    """

    rows: Int[Tensor, " B"]

    @abstractmethod
    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        """Return the function's output for the block x at times t, for the rows with ids ``rows``."""

    @abstractmethod
    def queries(self, width: int, rows: Tensor) -> int:
        """Return the number of tokens that the network evaluates in a call for ``width`` sites of ``rows``."""

    def places(self, rows: Tensor) -> Int[Tensor, " R"]:
        """Return the indices (R,) in the batch of the rows with ids ``rows``."""
        return torch.zeros_like(rows) if len(self.rows) == 1 else torch.searchsorted(self.rows.to(rows.device), rows)


class Growing(Context):
    """Prefixes that grow while a sequence is generated.

    Attributes:
        length: (B,) the number of clean tokens of each prefix.
    """

    length: Int[Tensor, " B"]

    @abstractmethod
    def extend(self, tokens: Int[Tensor, "B n"]) -> None:
        """Append a clean block of states (B, n) to the prefix."""

    @abstractmethod
    def select(self, index: Int[Tensor, " R"]) -> "Growing":
        """Return the context of the rows with indices ``index`` (R,) in the batch."""


class ShownPrefix(Growing):
    """Prefixes that the network evaluates in every call, at time 0; sites after the block, if any, have time 1.

    Rows with prefixes of equal length are evaluated together, as a network without a cache has no padding. If torch has
    lazy copies, the prefix is copied once for each new block; a call for all rows then copies only the block.

    Args:
        rows: (B,) ids of the rows; if there is only one row, it is used for every id.
        length: (B,) the number of valid tokens of each prefix.
        tokens: (B, P) the prefixes, as states.
        future: (B, L) noise for the sites after the block, for a network that takes only whole sequences; or None.
    """

    def __init__(
        self,
        rows: Int[Tensor, " B"],
        length: Int[Tensor, " B"],
        tokens: Int[Tensor, "B P"],
        future: Int[Tensor, "B L"] | None = None,
    ) -> None:
        self.rows: Tensor = rows
        self.length = length
        self.future: Tensor | None = future
        self._aligned: list[_Aligned] = []
        for count in length.unique().tolist():
            place = (length == count).nonzero()[:, 0]
            self._aligned.append(_Aligned(place, tokens[place, :count], None if future is None else future[place]))

    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        time, found = t.expand(x.shape), None
        if len(self._aligned) == 1 and torch.equal(rows, self.rows):
            return self._aligned[0].logits(call, fn, x, time, self._aligned[0].place)
        place = self.places(rows)
        for part in self._aligned:
            which = (self.length[place] == part.length).nonzero()[:, 0]
            if len(which):
                out = part.logits(call, fn, x[which], time[which], place[which])
                found = out.new_empty(len(x), *out.shape[1:]) if found is None else found
                found[which] = out
        assert found is not None
        return found

    def extend(self, tokens: Int[Tensor, "B n"]) -> None:
        for part in self._aligned:
            part.extend(tokens[part.place])
        self.length: Tensor = self.length + tokens.shape[1]

    def select(self, index: Int[Tensor, " R"]) -> "ShownPrefix":
        tokens = self.rows.new_zeros(len(self.rows), max(part.length for part in self._aligned))
        for part in self._aligned:
            tokens[part.place, : part.length] = part.prefix
        future = None if self.future is None else self.future[index]
        return ShownPrefix(self.rows[index], self.length[index], tokens[index], future)

    def queries(self, width: int, rows: Tensor) -> int:
        if self.future is not None:
            return self.future.shape[1] * len(rows)
        return int(self.length[self.places(rows)].sum()) + width * len(rows)


class _Aligned:
    """Rows with prefixes of equal length; one tensor holds prefix, block and future for all calls of a block.

    The network gets a copy made by ``_when_written``. The function may edit this copy in place. Later calls do not
    change it, so it is still right when gradients are computed.

    Args:
        place: (A,) the index of the rows in the batch, in order.
        prefix: (A, P) clean states.
        future: (A, L), or None.
    """

    def __init__(self, place: Int[Tensor, " A"], prefix: Int[Tensor, "A P"], future: Int[Tensor, "A L"] | None) -> None:
        self.place, self.length, self.future = place, prefix.shape[1], future
        self._tokens = prefix if future is None else torch.cat([prefix, future[:, prefix.shape[1] :]], 1)
        self._width = 0  # of the block after the prefix
        self._time: Tensor | None = None
        self._timed: Call | None = None  # what made self._time

    @property
    def prefix(self) -> Int[Tensor, "A P"]:
        """The clean states."""
        return self._tokens[:, : self.length]

    def extend(self, clean: Int[Tensor, "A n"]) -> None:
        """Append a clean block to the prefix."""
        self._put(clean)
        self.length, self._width, self._timed = self.length + clean.shape[1], 0, None

    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "R n"], place: Tensor) -> Tensor:
        """Return the function's output for the block x of the rows at ``place``; if these are all, only x is copied."""
        if torch.equal(place, self.place):
            self._put(x)
            z, kept = self._tokens, self._time if call is self._timed else None
        else:
            z, kept = self._beside(x, torch.searchsorted(self.place, place)), None
        time = self._times(call, t, kept)
        if z is self._tokens:
            self._time, self._timed = time, call
        begin, end = self.length, self.length + x.shape[1]
        out = fn(_when_written(z), None if time is None else _when_written(time))
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != z.shape:
            raise (ValueError if isinstance(out, Tensor) else TypeError)(
                f"Denoiser: fn was shown {z.shape[0]} rows of {z.shape[1]} sites and must return logits (or hidden "
                f"states, for a head) of shape ({z.shape[0]}, {z.shape[1]}, _), got {got}"
            )
        if call.shift:
            return out[:, begin - 1 : end - 1].clone() if begin else unshifted(out[:, :end])
        return out[:, begin:end].clone()  # so that the rest can be freed

    def _put(self, x: Int[Tensor, "A n"]) -> None:
        begin, n = self.length, x.shape[1]
        if self.future is None and self._width != n:
            self._tokens, self._timed = self._beside(x), None
        else:
            if self.future is not None and self._width > n:
                self._tokens[:, begin + n :], self._timed = self.future[:, begin + n :], None
            self._tokens[:, begin : begin + n] = x
        self._width = n

    def _beside(self, x: Int[Tensor, "R n"], which: Tensor | slice = slice(None)) -> Int[Tensor, "R W"]:
        after = [] if self.future is None else [self.future[which, self.length + x.shape[1] :]]
        return torch.cat([self.prefix[which], x, *after], 1)

    def _times(self, call: Call, t: Float[Tensor, "R n"], kept: Tensor | None) -> Tensor | None:
        """Return the function's time argument of all sites; of ``kept``, an earlier one, only the block changes."""
        begin, n = self.length, t.shape[1]
        if kept is not None and kept.ndim == 2 and not kept.requires_grad:
            own = call.argument(t)
            if own is not None and not own.requires_grad:
                kept[:, begin : begin + n] = own.view(len(t), n)
                return kept
        rest = 0 if self.future is None else self.future.shape[1] - begin - n
        before, after = t.new_zeros(len(t), min(begin, 1)), t.new_ones(len(t), min(rest, 1))
        time = call.argument(torch.cat([before, t, after], 1))
        if time is None or time.ndim == 1:  # one time a row
            return time
        first, own, last = time.split([before.shape[1], n, after.shape[1]], 1)
        return torch.cat([first.expand(-1, begin), own, last.expand(-1, rest)], 1)


def _when_written(x: Tensor) -> Tensor:
    """Return a copy of x; if torch has lazy copies, the data is copied only when x or the copy is written to."""
    lazy = getattr(torch, "_lazy_clone", None)
    return lazy(x) if lazy is not None and x.device.type in ("cpu", "cuda") else x.clone()


@dataclass
class CachedPrefix(Growing, Generic[C]):
    """Prefixes that the network holds in its cache.

    Attributes:
        network: has ``prefill``, ``extend``, ``evaluate``, and possibly ``score``.
        cache: the network's cache.
        pending: the number of tokens of each row that the next call evaluates together with the block.
    """

    rows: Int[Tensor, " B"]
    length: Int[Tensor, " B"]
    network: Cached[C]
    cache: C
    pending: int = 0

    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        time = call.argument(t.expand(len(x), -1))
        return self.network.evaluate(self._of(rows), x.clone(), None if time is None else time.clone())

    def score(self, x: Int[Tensor, "R n"], rows: Tensor) -> Tensor:
        """Return the output of the network's ``score`` for clean tokens x (R, n) of the rows with ids ``rows``."""
        return self.network.score(self._of(rows), x.clone())  # type: ignore[attr-defined]

    def _of(self, rows: Tensor) -> C:
        place = self.places(rows)
        if torch.equal(place, torch.arange(len(self.rows), device=place.device)):
            self.pending = 0  # this call adds them to the cache
            return self.cache
        return self.cache.select(place)

    def extend(self, tokens: Int[Tensor, "B n"]) -> None:
        self.network.extend(self.cache, tokens)
        self.length, self.pending = self.length + tokens.shape[1], self.pending + tokens.shape[1]

    def select(self, index: Int[Tensor, " R"]) -> "CachedPrefix[C]":
        return replace(self, rows=self.rows[index], length=self.length[index], cache=self.cache.select(index))

    def queries(self, width: int, rows: Tensor) -> int:
        return (self.pending + width) * len(rows)


@dataclass
class Behind(Context):
    """Context of all blocks of given sequences, each after the clean blocks before it, for likelihoods and training.

    A network with ``blocks_at_once(x0, x, time, block)`` evaluates them in one pass. Any other network evaluates the
    blocks one after another, each with its prefix.

    Attributes:
        tokens: (B, L) the clean sequences, as states.
        block: the block size.
        future: (B, L) noise for the sites after each block, as in ``ShownPrefix``, or None.
    """

    tokens: Int[Tensor, "B L"]
    block: int
    future: Int[Tensor, "B L"] | None = None

    def __post_init__(self) -> None:
        self.rows: Tensor = torch.arange(len(self.tokens), device=self.tokens.device)

    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        time = t.expand(x.shape)
        if isinstance(fn, AtOnce):
            return fn.blocks_at_once(self.tokens, x, call.argument(time), self.block)
        parts, shown = [], ShownPrefix(self.rows, torch.zeros_like(self.rows), self.tokens[:, :0], self.future)
        for begin in range(0, x.shape[1], self.block):
            here = slice(begin, begin + self.block)
            parts.append(shown.logits(call, fn, x[:, here], time[:, here], self.rows))
            shown.extend(self.tokens[:, here])
        return torch.cat(parts, 1)

    def queries(self, width: int, rows: Tensor) -> int:
        return 2 * width * len(rows)
