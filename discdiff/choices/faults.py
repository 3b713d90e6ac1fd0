"""Reports of bad logits: an error at once that names the site, or on a GPU a flag checked when the run ends."""

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["AT_ONCE", "BAD_LOGITS", "Watch"]

BAD_LOGITS = "the denoiser gave logits without mass, or with a NaN or +inf"


@dataclass(frozen=True)
class Watch:
    """Reports faults of batch rows.

    Attributes:
        ids: (B,) ids of the rows; if None, an error gives the row's index in the batch.
        flags: the run's list of GPU flags. Raising at once would synchronise the device at every check. If None, the
            error is raised at once on a GPU too.
    """

    ids: Int[Tensor, " B"] | None = None
    flags: list[Tensor] | None = None

    def refuse(
        self, wrong: Bool[Tensor, "..."], what: str, where: Bool[Tensor, "B L"] | None = None, start: int = 0
    ) -> None:
        """Raise for the first wrong site, or on a GPU append a flag.

        Args:
            wrong: (B, L), or (n,) for the sites that ``where`` chooses, from number ``start`` on.
            what: the fault, for the message.
            where: the chosen sites.
            start: the number of the first one among them.

        Raises:
            ValueError: naming row and position.
        """
        if wrong.is_cuda and self.flags is not None:
            self.flags.append(wrong.any())
        elif bool(wrong.any()):
            site = wrong.nonzero()[0] if where is None else where.nonzero()[start + int(wrong.nonzero()[0, 0])]
            row, position = site.tolist()
            raise ValueError(f"row {row if self.ids is None else int(self.ids[row])}, position {position}: {what}")

    def select(self, index: Int[Tensor, " R"]) -> "Watch":
        """Return the watch of the rows at these indices (R,)."""
        return self if self.ids is None else Watch(self.ids[index], self.flags)


AT_ONCE = Watch()  # outside a run
