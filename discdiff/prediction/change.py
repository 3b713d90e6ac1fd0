r"""Changes of a prediction's leave-one-out law, applied to rows of logits when they are read.

    tilt          O'(v) ~ O(v) g(v)
    combination   O'(v) ~ prod_k O_k(v)^{w_k}
    truncation    O'(v) ~ O(v)^{1/T} on some tokens

Tilts and combinations change what the prediction means, so confidences are computed from them. A truncation changes
only the tokens that are drawn. Changes act on O and never on the denoiser D, which is a point mass at a revealed site
and at alpha = 1, where it does not determine O'.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import shown
from discdiff.kernels import dispatch as kernels
from discdiff.prediction.view import View

if TYPE_CHECKING:
    from discdiff.prediction.base import Prediction

__all__ = ["Combination", "Cut", "LogWeight", "RowChange", "Tilt", "Truncate"]

# maps rows of O, with their (N,) states and survival probabilities, to other rows
Truncate = Callable[[kernels.Rows, Tensor, Tensor], kernels.Source]
# maps batch rows (n,) and positions (n,) to log g (n, V)
LogWeight = Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n V"]]


class RowChange(ABC):
    """A change of rows of O at chosen sites."""

    @abstractmethod
    def __call__(self, rows: kernels.Source, view: View) -> kernels.Source:
        """Return the changed rows of the sites of a view."""

    @abstractmethod
    def select(self, index: Int[Tensor, " R"]) -> "RowChange":
        """Return the change for the batch rows with indices ``index`` (R,)."""

    @abstractmethod
    def untruncated(self) -> "RowChange | None":
        """Return the change without truncations, or None if nothing is left of it."""

    @property
    def parts(self) -> "tuple[Prediction, ...]":
        """The other predictions in the change."""
        return ()

    def of_parts(self, function: "Callable[[Prediction], Prediction]") -> "RowChange":
        """Return the change with a function applied to the other predictions in it."""
        return self


@dataclass(frozen=True, eq=False)
class Cut(RowChange):
    """Truncation of rows."""

    truncate: Truncate

    def __call__(self, rows: kernels.Source, view: View) -> kernels.Source:
        return self.truncate(_uncut(rows), view.x, view.alpha)

    def select(self, index: Int[Tensor, " R"]) -> "Cut":
        return self

    def untruncated(self) -> None:
        return None


@dataclass(frozen=True, eq=False)
class Tilt(RowChange):
    """Tilt by log g, a tensor (B, L, V) or a function of chosen sites.

    Attributes:
        log_g: the tilt, with entries -inf for tokens that are ruled out.
        batch_rows: (R,) the selected rows of ``log_g``; None for all in order.
    """

    log_g: Float[Tensor, "B L V"] | LogWeight
    batch_rows: Int[Tensor, " R"] | None = None

    def __call__(self, rows: kernels.Source, view: View) -> kernels.Source:
        row, position = view.place
        row = row if self.batch_rows is None else self.batch_rows[row]

        def tilted(raw: Tensor, n: Tensor) -> Tensor:
            raw = raw[:, : view.prediction.process.vocab_size]  # a ratio may have the mask's column too
            log_g = self.log_g(row[n], position[n]) if callable(self.log_g) else self.log_g[row[n], position[n]]
            if not isinstance(log_g, Tensor) or log_g.shape != raw.shape:
                raise ValueError(f"tilted: log_g must give {tuple(raw.shape)} at {len(n)} sites, got {shown(log_g)}")
            # where O rules a token out, no weight brings it back, and inf - inf would be NaN
            rows = torch.where(raw == -torch.inf, -torch.inf, raw + log_g.to(raw.device))
            top = rows.detach().amax(-1, keepdim=True)  # a large constant in log_g would cost digits in float32
            return (rows - top.where(top.isfinite(), 0.0)).to(raw.dtype)

        plain = _uncut(rows)  # a shift of one logit and a tilt are added in any order
        return (plain.settled() if plain.summed else plain).then(tilted)

    def select(self, index: Int[Tensor, " R"]) -> "Tilt":
        return replace(self, batch_rows=index if self.batch_rows is None else self.batch_rows[index])

    def untruncated(self) -> "Tilt":
        return self


@dataclass(frozen=True, eq=False)
class Combination(RowChange):
    """Product of powers of O with the O of other predictions at the same noisy tokens.

    Attributes:
        others: the other predictions.
        weights: the exponents; the first is that of the changed prediction.
    """

    others: "tuple[Prediction, ...]"
    weights: tuple[float, ...]

    def __call__(self, rows: kernels.Source, view: View) -> kernels.Source:
        first, rest = self.weights[0], self.weights[1:]
        others = (replace(view, prediction=other).loo.rows for other in self.others)
        return _uncut(rows).plus(first, list(zip(rest, others, strict=True)))

    @property
    def parts(self) -> "tuple[Prediction, ...]":
        return self.others

    def select(self, index: Int[Tensor, " R"]) -> "Combination":
        return self.of_parts(lambda other: other.select(index))

    def untruncated(self) -> "Combination":
        return self.of_parts(lambda other: other.untruncated)

    def of_parts(self, function: "Callable[[Prediction], Prediction]") -> "Combination":
        return replace(self, others=tuple(map(function, self.others)))


def _uncut(rows: kernels.Source) -> kernels.Rows:
    """Return the same rows without temperature and floor, which a further operation would replace."""
    if isinstance(rows, kernels.Computed):
        return kernels.Rows.computed(rows)
    return rows if rows.temperature == 1 and rows.floor is None else rows.settled()
