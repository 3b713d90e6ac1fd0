"""The contexts of a block: what each network of a run knows of the tokens before it."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from discdiff.denoiser import Cached, CachedPrefix, Denoiser, Growing, ShownPrefix, Tally

__all__ = ["Contexts"]


@dataclass(frozen=True)
class Contexts:
    """The clean tokens before the blocks of R rows, for every network that a run may ask.

    A network with a cache has a context of its own; the others share one.

    Attributes:
        of: the context of each network, by the identity of its function.
    """

    of: dict[int, Growing]

    @classmethod
    def begin(
        cls,
        networks: list[Denoiser],
        rows: Int[Tensor, " R"],
        length: Int[Tensor, " R"],
        shown: Int[Tensor, "R P"],
        future: Int[Tensor, "R L"] | None,
        capacity: int,
        tally: Tally,
        index: Int[Tensor, " R"],
    ) -> "Contexts":
        """Make the contexts, and fill caches by one call each.

        Args:
            networks: the denoisers.
            rows: (R,) ids of the rows.
            length: (R,) the number of tokens before the block of each row.
            shown: (R, P) these tokens, as states.
            future: (R, L) noise for the sites after a block, or None.
            capacity: the most tokens that a cache will hold.
            tally: the counts of the run.
            index: (R,) the indices of the rows in the batch.
        """
        of: dict[int, Growing] = {}
        common: Growing | None = None
        for network in networks:
            fn = network.fn
            if id(fn) in of:
                continue
            if isinstance(fn, Cached):
                if shown.shape[1]:
                    tally.count(network.name, index[length > 0], int(length.sum()))
                of[id(fn)] = CachedPrefix(rows, length, fn, fn.prefill(shown, length, capacity))
            else:
                common = ShownPrefix(rows, length, shown, future) if common is None else common
                of[id(fn)] = common
        return cls(of)

    def given(self, model: Denoiser) -> Denoiser:
        """Return the denoiser with its context."""
        return model.given(self.of[id(model.fn)])

    def select(self, index: Int[Tensor, " R"]) -> "Contexts":
        """Return the contexts of the rows with indices ``index`` (R,)."""
        return self._each(lambda context: context.select(index))

    def extend(self, tokens: Int[Tensor, "R n"]) -> None:
        """Append a clean block of states (R, n)."""
        for context in {id(context): context for context in self.of.values()}.values():
            context.extend(tokens)

    def _each(self, function: Callable[[Growing], Growing]) -> "Contexts":
        made = {number: function(one) for number, one in {id(one): one for one in self.of.values()}.items()}
        return Contexts({fn: made[id(context)] for fn, context in self.of.items()})
