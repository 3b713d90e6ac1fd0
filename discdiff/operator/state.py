"""The state of a sampler: tokens, their time, and which of them are fixed."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from discdiff.prediction import Prediction

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """Noisy tokens of a batch of rows.

    Attributes:
        tokens: (B, L) int64 states.
        t: the time of the sites that are not frozen.
        rows: (B,) ids of the rows. They key the randomness, so a row keeps its id in every sub-batch.
        frozen: (B, L) sites that never change and are clean (a prompt), or None if there are none.
        past: an earlier state of the same rows, if an operator uses it; else None.
        seen: the prediction made at this state, or None. Its use costs no further denoiser call.
        step: the number of steps made.
        run: the ``Run`` that made this state, with its seed and counts; None inside a step.
    """

    tokens: Int[Tensor, "B L"]
    t: float
    rows: Int[Tensor, " B"]
    frozen: Bool[Tensor, "B L"] | None = None
    past: "State | None" = None
    seen: Prediction | None = None
    step: int = 0
    run: Any = field(default=None, repr=False, compare=False)

    @property
    def free(self) -> Bool[Tensor, "B L"]:
        """The sites that may change."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.frozen is None else ~self.frozen

    def at(self, tokens: Int[Tensor, "B L"], t: float | None = None) -> "State":
        """Return the same rows with other tokens, at time t if it is given, otherwise at the same time."""
        return replace(self, tokens=tokens, t=self.t if t is None else t, seen=None)

    def after(self, before: "State", seen: Prediction | None = None) -> "State":
        """Return this state with ``past`` set to ``before``, which holds ``seen``, the prediction made at it."""
        return replace(self, past=replace(before, past=None, seen=seen))

    def select(self, which: Int[Tensor, " R"]) -> "State":
        """Return the state of the rows with indices ``which`` (R,)."""
        frozen = None if self.frozen is None else self.frozen[which]
        past = None if self.past is None else self.past.select(which)
        seen = None if self.seen is None else self.seen.select(which)
        return replace(self, tokens=self.tokens[which], rows=self.rows[which], frozen=frozen, past=past, seen=seen)
