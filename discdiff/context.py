"""What a denoiser is shown beside the block it denoises: the clean tokens before it, kept or shown again.

A network that keeps what it computed of clean tokens says so by having ``prefill``, ``extend`` and ``evaluate``
(``Cached``); then a call costs the block alone. Any other is shown the whole prefix again in every call.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.output import unshifted

if TYPE_CHECKING:
    from discdiff.denoiser import Denoiser
    from discdiff.process import Process

__all__ = ["Along", "AtOnce", "Behind", "Cached", "Context", "Growing", "Kept", "Shown", "clean_states"]


C = TypeVar("C", bound="RowCache")


def clean_states(process: "Process", tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Tokens as states of time 0; a noise token beside them is another one, so that they are not hidden."""
    return process.place(tokens, (tokens + 1) % process.vocab_size)


@runtime_checkable
class RowCache(Protocol):
    """What a network keeps of the clean tokens of a batch."""

    def select(self: C, rows: Int[Tensor, " R"]) -> C:
        """What it keeps of some rows, which may repeat."""
        ...


@runtime_checkable
class Cached(Protocol[C]):
    """A network with a cache. One that has ``score(cache, x)`` too gives p(. | prefix, x_{<i}) in one call."""

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> C:
        """Keep the first ``length`` tokens of each row; at most ``capacity`` will ever be kept."""
        ...

    def extend(self, cache: C, tokens: Int[Tensor, "B n"]) -> None:
        """Put a clean block, of states, behind the prefix."""
        ...

    def evaluate(self, cache: C, x: Int[Tensor, "B n"], time: Float[Tensor, "B *n"] | None) -> Tensor:
        """What the network says of a noisy block behind the prefix, (B, n, V)."""
        ...


@runtime_checkable
class AtOnce(Protocol):
    """A network that takes every block of given sequences, each behind the clean ones before it, in one pass."""

    def blocks_at_once(
        self, x0: Int[Tensor, "B L"], x: Int[Tensor, "B L"], time: Float[Tensor, "B *L"] | None, block: int
    ) -> Tensor:
        """What the network says of noisy blocks x behind the clean ones of x0, (B, L, V)."""
        ...


class Context(ABC):
    """Clean prefixes of a batch of rows.

    Attributes:
        rows: (B,) ids of the rows; one row stands for any.
    """

    rows: Int[Tensor, " B"]

    @abstractmethod
    def logits(self, model: "Denoiser", x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        """What the denoiser's function says of the block x of these rows, at times t."""

    @abstractmethod
    def queries(self, width: int, rows: Tensor) -> int:
        """Tokens that a call for a block of this width puts through the network."""

    def places(self, rows: Tensor) -> Int[Tensor, " R"]:
        """Where in the batch these rows are."""
        return torch.zeros_like(rows) if len(self.rows) == 1 else torch.searchsorted(self.rows, rows)


class Growing(Context):
    """Prefixes that grow while a sequence is generated.

    Attributes:
        length: (B,) clean tokens of each.
    """

    length: Int[Tensor, " B"]

    @abstractmethod
    def extend(self, tokens: Int[Tensor, "B n"]) -> None:
        """Put a clean block, of states, behind the prefix."""

    @abstractmethod
    def select(self, index: Int[Tensor, " R"]) -> "Growing":
        """The context of some rows, by their place in the batch."""


@dataclass
class Shown(Growing):
    """The prefix is shown again in every call, at time 0; what comes after the block, if anything, at time 1.

    Attributes:
        tokens: (B, P) the prefixes, as states; a row's own length says how much of it counts.
        future: (B, L) noise for the sites after the block, for a network that always sees whole sequences; or None.
    """

    rows: Int[Tensor, " B"]
    length: Int[Tensor, " B"]
    tokens: Int[Tensor, "B P"]
    future: Int[Tensor, "B L"] | None = None

    def logits(self, model: "Denoiser", x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        place, n, found = self.places(rows), x.shape[1], None
        time = t.expand(x.shape)
        for length in self.length[place].unique().tolist():  # a network without a cache knows no padding
            which = (self.length[place] == length).nonzero()[:, 0]
            parts = [self.tokens[place[which], :length], x[which]]
            if self.future is not None:
                parts.append(self.future[place[which], length + n :])
            z = torch.cat(parts, 1)
            times = torch.ones(z.shape, dtype=t.dtype, device=t.device)
            times[:, :length], times[:, length : length + n] = 0.0, time[which]
            out = unshifted(model.called(z, times)) if model.shift else model.called(z, times)
            found = out.new_empty(len(x), n, out.shape[2]) if found is None else found
            found[which] = out[:, length : length + n]
        assert found is not None
        return found

    def extend(self, tokens: Int[Tensor, "B n"]) -> None:
        columns = self.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        room = int(columns.max()) + 1 - self.tokens.shape[1]
        self.tokens = torch.nn.functional.pad(self.tokens, (0, max(room, 0))).scatter(1, columns, tokens)
        self.length = self.length + tokens.shape[1]

    def select(self, index: Int[Tensor, " R"]) -> "Shown":
        future = None if self.future is None else self.future[index]
        return Shown(self.rows[index], self.length[index], self.tokens[index], future)

    def queries(self, width: int, rows: Tensor) -> int:
        if self.future is not None:
            return self.future.shape[1] * len(rows)
        return int(self.length[self.places(rows)].sum()) + width * len(rows)


@dataclass
class Kept(Growing, Generic[C]):
    """The network keeps the prefix.

    Attributes:
        network: has ``prefill``, ``extend``, ``evaluate``, and perhaps ``score``.
        cache: what it keeps.
        pending: tokens a row that the next call takes in beside the block.
    """

    rows: Int[Tensor, " B"]
    length: Int[Tensor, " B"]
    network: Cached[C]
    cache: C
    pending: int = 0

    def logits(self, model: "Denoiser", x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        time = model.time_argument(t.expand(len(x), -1))
        return self.network.evaluate(self._of(rows), x.clone(), None if time is None else time.clone())

    def score(self, x: Int[Tensor, "R n"], rows: Tensor) -> Tensor:
        """The network's own ``score``."""
        return self.network.score(self._of(rows), x.clone())  # type: ignore[attr-defined]

    def _of(self, rows: Tensor) -> C:
        place = self.places(rows)
        if torch.equal(place, torch.arange(len(self.rows), device=place.device)):
            self.pending = 0  # taken in for good
            return self.cache
        return self.cache.select(place)

    def extend(self, tokens: Int[Tensor, "B n"]) -> None:
        self.network.extend(self.cache, tokens)
        self.length, self.pending = self.length + tokens.shape[1], self.pending + tokens.shape[1]

    def select(self, index: Int[Tensor, " R"]) -> "Kept[C]":
        return replace(self, rows=self.rows[index], length=self.length[index], cache=self.cache.select(index))

    def queries(self, width: int, rows: Tensor) -> int:
        return (self.pending + width) * len(rows)


@dataclass
class Behind(Context):
    """Every block of given sequences at once, each behind the clean ones before it: what likelihoods and training need.

    A network that has ``blocks_at_once(x0, x, time, block)`` takes one pass; another is shown each block with its
    prefix.

    Attributes:
        tokens: (B, L) the clean sequences, as states.
        block: the block size.
        future: as of ``Shown``.
    """

    tokens: Int[Tensor, "B L"]
    block: int
    future: Int[Tensor, "B L"] | None = None

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.tokens), device=self.tokens.device)

    def logits(self, model: "Denoiser", x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        time = t.expand(x.shape)
        if isinstance(model.fn, AtOnce):
            return model.fn.blocks_at_once(self.tokens, x, model.time_argument(time), self.block)
        parts = []
        for begin in range(0, x.shape[1], self.block):
            here = slice(begin, begin + self.block)
            shown = Shown(self.rows, torch.full_like(self.rows, begin), self.tokens[:, :begin], self.future)
            parts.append(shown.logits(model, x[:, here], time[:, here], self.rows))
        return torch.cat(parts, 1)

    def queries(self, width: int, rows: Tensor) -> int:
        return 2 * width * len(rows)


@dataclass
class Along(Context):
    """No prefix, but something for every row that the function takes as a third argument, fn(x, time, condition).

    Attributes:
        condition: (B, ...), one entry a row.
    """

    rows: Int[Tensor, " B"]
    condition: Tensor

    def logits(self, model: "Denoiser", x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        return model.fn(x, model.time_argument(t.expand(len(x), -1)), self.condition[self.places(rows)])  # type: ignore[call-arg]

    def queries(self, width: int, rows: Tensor) -> int:
        return width * len(rows)
