"""Where bad logits are told of: at once and by name; on a GPU by a flag that the run looks at when it ends."""

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["AT_ONCE", "BAD_LOGITS", "Watch"]

BAD_LOGITS = "the denoiser gave logits without mass, or with a NaN or +inf"


@dataclass(frozen=True)
class Watch:
    """The names of the rows, and who is told of their faults.

    Attributes:
        rows: (B,) ids of the rows; without them a row is named by its place in the batch.
        flags: the run's list, to which a GPU adds a flag, since raising at once would stop the device at every look;
            without one the error is raised at once there too.
    """

    rows: Int[Tensor, " B"] | None = None
    flags: list[Tensor] | None = None

    def refuse(
        self, wrong: Bool[Tensor, "..."], what: str, where: Bool[Tensor, "B L"] | None = None, start: int = 0
    ) -> None:
        """Raise for the first wrong site, or note on a GPU that there is one.

        Args:
            wrong: (B, L), or (n,) of the sites that ``where`` chooses, from number ``start`` on.
            what: what is wrong with it.
            where: the chosen sites.
            start: the number among them of the first.

        Raises:
            ValueError: naming row and position.
        """
        if wrong.is_cuda and self.flags is not None:
            self.flags.append(wrong.any())
        elif bool(wrong.any()):
            site = wrong.nonzero()[0] if where is None else where.nonzero()[start + int(wrong.nonzero()[0, 0])]
            row, position = site.tolist()
            raise ValueError(f"row {row if self.rows is None else int(self.rows[row])}, position {position}: {what}")

    def select(self, index: Int[Tensor, " R"]) -> "Watch":
        """Of the rows at these indices."""
        return self if self.rows is None else Watch(self.rows[index], self.flags)


AT_ONCE = Watch()  # outside a run
