"""Count the calls of a run's denoisers."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.denoiser.base import Denoiser
from discdiff.prediction import Output, Prediction

__all__ = ["Counter", "Tally"]


@dataclass
class Tally:
    """Number of function evaluations (NFE) of a run, over all its denoisers.

    Attributes:
        nfe_rows: (B,) the calls that include each row.
        nfe: batched calls.
        queries: the tokens evaluated, over all rows.
        calls: batched calls by the name of the denoiser.
        rewards: the sequences whose reward was computed.
    """

    nfe_rows: Int[Tensor, " B"]
    nfe: int = 0
    queries: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    rewards: int = 0

    def count(self, name: str, rows: Int[Tensor, " R"], queries: int) -> None:
        """Count one call of the denoiser ``name`` for the rows at indices ``rows`` (R,)."""
        self.nfe += 1
        self.calls[name] = self.calls.get(name, 0) + 1
        self.nfe_rows[rows] += 1
        self.queries += queries

    def copy(self) -> "Tally":
        """Return a copy that counts on its own."""
        return replace(self, nfe_rows=self.nfe_rows.clone(), calls=dict(self.calls))


@dataclass
class Counter:
    """Call a denoiser and count its calls; operators call a denoiser only through this object.

    A denoiser without a time input is not called again on the tokens of its last call. Guides are not applied here.

    Shapes of a call for R of the B rows: ids (R,), tokens (R, L), times (R, L) or broadcastable to it.

    Attributes:
        denoiser: the denoiser.
        first_row: the id of the run's first row.
        tally: the counts, shared by all denoisers of a run.

    Raises:
        ValueError: if the denoiser fails on fewer than all B rows; it must take any number of rows.
    """

    denoiser: Denoiser
    first_row: int
    tally: Tally
    _last: tuple[Tensor, Output] | None = None

    def __call__(self, x: Int[Tensor, "R L"], time: Float[Tensor, "#R #L"], rows: Int[Tensor, " R"]) -> Prediction:
        if self._last is not None and self._last[0].shape == x.shape and torch.equal(self._last[0], x):
            return self.denoiser.interpret(self._last[1], x, time)
        self._last = None  # freed before the call, so that memory holds one output
        self._count(x.shape[1], rows)
        total = len(self.tally.nfe_rows)
        try:
            output = self.denoiser.output(x, time, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if len(x) == total:
                raise
            raise ValueError(
                f"the denoiser failed on {len(x)} of the run's {total} rows ({error}); an operator may "
                "ask for some rows alone, so the function must take any number, without a buffer of a fixed size"
            ) from error
        if self.denoiser.call.time is None:
            self._last = x, output
        return self.denoiser.interpret(output, x, time)

    def score(self, x: Int[Tensor, "R L"], rows: Int[Tensor, " R"]) -> Prediction:
        """Return the prediction of ``Denoiser.score`` and count the call."""
        length = x.shape[1]
        if self.denoiser.scores_at_once:
            self._count(2 * length, rows)
        else:
            self._count(length, rows, copies=length)
        return self.denoiser.score(x, rows)

    def _count(self, width: int, rows: Tensor, copies: int = 1) -> None:
        context = self.denoiser.context
        queries = copies * (width * len(rows) if context is None else context.queries(width, rows))
        self.tally.count(self.denoiser.name, rows - self.first_row, queries)
