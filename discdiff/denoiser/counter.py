"""Count the calls of a denoiser in a run."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.denoiser.base import Denoiser
from discdiff.prediction import Output, Prediction

__all__ = ["Counter"]


@dataclass
class Counter:
    """Call a denoiser and measure the NFE; operators call it only through this object.

    ``nfe`` counts batched calls; ``nfe_rows`` (B,) counts for each row the calls that include it; ``queries`` counts
    the tokens evaluated, over all rows. A denoiser without a time input is not called again on the tokens of its last
    call.

    Shapes: a call evaluates R of the B rows: their ids (R,), tokens (R, L), and times (R, L) or broadcast to it.

    Raises:
        ValueError: in a call, if the denoiser fails on fewer than all B rows; it must take any number of rows.
    """

    denoiser: Denoiser
    first_row: int
    nfe_rows: Int[Tensor, " B"]
    nfe: int = field(default=0)
    queries: int = field(default=0)
    _last: tuple[Tensor, Output] | None = None

    def __call__(self, x: Int[Tensor, "R L"], time: Float[Tensor, "#R #L"], rows: Int[Tensor, " R"]) -> Prediction:
        if self._last is not None and self._last[0].shape == x.shape and torch.equal(self._last[0], x):
            return self.denoiser.interpret(self._last[1], x, time)
        self._last = None  # freed before the call, so that memory holds one output
        self._count(x.shape[1], rows)
        try:
            output = self.denoiser.output(x, time, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if len(x) == len(self.nfe_rows):
                raise
            raise ValueError(
                f"the denoiser failed on {len(x)} of the run's {len(self.nfe_rows)} rows ({error}); an operator may "
                "ask for some rows alone, so the function must take any number, without a buffer of a fixed size"
            ) from error
        if self.denoiser.call.time is None:
            self._last = x, output
        return self.denoiser.interpret(output, x, time)

    def autoregressive(self, x: Int[Tensor, "R L"], rows: Int[Tensor, " R"]) -> Prediction:
        """Call ``Denoiser.autoregressive`` and count it."""
        length = x.shape[1]
        if self.denoiser.scores_at_once:
            self._count(2 * length, rows)
        else:
            self._count(length, rows, copies=length)
        return self.denoiser.autoregressive(x, rows)

    def _count(self, width: int, rows: Tensor, copies: int = 1) -> None:
        context = self.denoiser.context
        self.nfe += 1
        self.nfe_rows[rows - self.first_row] += 1
        self.queries += copies * (width * len(rows) if context is None else context.queries(width, rows))
