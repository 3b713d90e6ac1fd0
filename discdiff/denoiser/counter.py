"""Count the calls of a run's denoisers."""

import copy
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.denoiser.base import Denoiser
from discdiff.prediction import Output, Prediction

__all__ = ["Answers", "Counter", "Tally"]


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


@dataclass(frozen=True)
class Answers:
    """Outputs of denoisers in one step, with the calls that gave them.

    A second pass over the step finds them here, so that it calls no network.
    """

    made: list[tuple[Denoiser, Tensor, Tensor | None, Tensor, Output | Prediction]] = field(default_factory=list)

    def keep(self, model: Denoiser, x: Tensor, time: Tensor | None, rows: Tensor, answer: Output | Prediction) -> None:
        """Keep the answer of a denoiser to tokens (R, L) of rows (R,) at a time; None for an autoregressive one."""
        self.made.append((model, x, time, rows, answer))

    def find(self, model: Denoiser, x: Tensor, time: Tensor | None, rows: Tensor) -> Output | Prediction | None:
        """Return the answer of the same network to the same call, or None."""
        for known, tokens, when, ids, answer in self.made:
            if known.fn is not model.fn or known.call is not model.call or known.context is not model.context:
                continue
            if (time is None) != (when is None) or tokens.shape != x.shape:
                continue
            timed = time is None or when is None or (time.shape == when.shape and torch.equal(time, when))
            if timed and torch.equal(tokens, x) and torch.equal(ids, rows):
                return answer
        return None


@dataclass
class Counter:
    """Call a denoiser and count its calls; operators call a denoiser only through this object.

    A denoiser without a time input is not called again on the tokens of its last call. Guides are not applied here.

    Shapes of a call for R of the B rows: ids (R,), tokens (R, L), times (R, L) or broadcastable to it.

    Attributes:
        denoiser: the denoiser.
        first_row: the id of the run's first row.
        tally: the counts, shared by all denoisers of a run.
        answers: where answers are kept, or None.
        again: whether a call whose answer is kept is not made again.

    Raises:
        ValueError: if the denoiser fails on fewer than all B rows; it must take any number of rows.
    """

    denoiser: Denoiser
    first_row: int
    tally: Tally
    answers: Answers | None = None
    again: bool = False
    _last: tuple[Tensor, Output] | None = None

    def __call__(self, x: Int[Tensor, "R L"], time: Float[Tensor, "#R #L"], rows: Int[Tensor, " R"]) -> Prediction:
        known = self._known(x, time, rows)
        if known is not None:
            assert isinstance(known, Output)
            return self.denoiser.interpret(known, x, time)
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
        if self.answers is not None and not self.again:
            self.answers.keep(self.denoiser, x, time, rows, output)
        return self.denoiser.interpret(output, x, time)

    def _known(self, x: Tensor, time: Tensor | None, rows: Tensor) -> Output | Prediction | None:
        if self.answers is not None and self.again:
            return self.answers.find(self.denoiser, x, time, rows)
        if time is None or self._last is None or self._last[0].shape != x.shape or not torch.equal(self._last[0], x):
            return None
        if self.answers is not None:
            self.answers.keep(self.denoiser, x, time, rows, self._last[1])
        return self._last[1]

    def score(self, x: Int[Tensor, "R L"], rows: Int[Tensor, " R"]) -> Prediction:
        """Return the prediction of ``Denoiser.score`` and count the call."""
        known = self._known(x, None, rows)
        if known is not None:
            assert isinstance(known, Prediction)
            return copy.copy(known)
        length = x.shape[1]
        if self.denoiser.scores_at_once:
            self._count(2 * length, rows)
        else:
            self._count(length, rows, copies=length)
        said = self.denoiser.score(x, rows)
        if self.answers is not None and not self.again:
            self.answers.keep(self.denoiser, x, None, rows, copy.copy(said))
        return said

    def _count(self, width: int, rows: Tensor, copies: int = 1) -> None:
        context = self.denoiser.context
        queries = copies * (width * len(rows) if context is None else context.queries(width, rows))
        self.tally.count(self.denoiser.name, rows - self.first_row, queries)
