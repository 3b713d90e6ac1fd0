"""Reports of bad logits: an error at once that names the site, or on a GPU a flag checked when the run ends."""

import reprlib
from dataclasses import dataclass, replace

from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["AT_ONCE", "BAD_LOGITS", "Watch"]

_SHORT = reprlib.Repr()
_SHORT.maxother = 100  # characters of a guide

BAD_LOGITS = "the denoiser gave logits without mass, or with a NaN or +inf"


@dataclass(frozen=True)
class Watch:
    """Reports faults of batch rows.

    Attributes:
        ids: (B,) ids of the rows; if None, an error gives the row's index in the batch.
        flags: a list to which checks on a GPU append flags, because raising at once would synchronise the device. If
            None, checks on a GPU raise at once too.
        guides: what changed the logits, for the error.
    """

    ids: Int[Tensor, " B"] | None = None
    flags: list[Tensor] | None = None
    guides: tuple[object, ...] = ()

    def refuse(
        self, wrong: Bool[Tensor, "..."], what: str, where: Bool[Tensor, "B L"] | None = None, start: int = 0
    ) -> None:
        """Raise ValueError for the first wrong site; on a GPU append a flag instead if ``flags`` is not None.

        Args:
            wrong: True at wrong sites, (B, L). If ``where`` is given, the shape is (n,), for n successive chosen sites.
            what: the fault, for the message.
            where: (B, L) the chosen sites.
            start: the index, among all chosen sites, of the site of the first entry of ``wrong``.

        Raises:
            ValueError: if a site is wrong; the error names its row and position.
        """
        if wrong.is_cuda and self.flags is not None:
            self.flags.append(wrong.any())
        elif bool(wrong.any()):
            site = wrong.nonzero()[0] if where is None else where.nonzero()[start + int(wrong.nonzero()[0, 0])]
            row, position = site.tolist()
            row = row if self.ids is None else int(self.ids[row])
            guides = f"; guides changed them: {', '.join(map(_SHORT.repr, self.guides))}" if self.guides else ""
            remedy = "; look at what the network returns there" if what == BAD_LOGITS and not self.guides else ""
            raise ValueError(f"row {row}, position {position}: {what}{guides}{remedy}")

    def select(self, index: Int[Tensor, " R"]) -> "Watch":
        """Return a watch for the batch rows with indices ``index`` (R,)."""
        return self if self.ids is None else replace(self, ids=self.ids[index])


AT_ONCE = Watch()  # outside a run
