"""Change rows of the leave-one-out prediction when they are read, and keep what is found for a site."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.kernels import dispatch as kernels
from discdiff.prediction import Prediction

__all__ = ["Kept", "changed"]

# maps normalised rows log O (n, V) of sites, with their batch rows (n,) and positions (n,), to log O' (n, V)
Change = Callable[[Float[Tensor, "n V"], Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n V"]]


def changed(prediction: Prediction, change: Change) -> Prediction:
    """Return the prediction with rows ``change(log O, row, position)``, found when they are read.

    O is the prediction without truncations, which are applied to the result. No token comes back that O rules out. A
    row that would be left without mass stays O.

    Args:
        prediction: the prediction.
        change: maps normalised log O (n, V) of n sites, their batch rows (n,) and positions (n,) to log O' (n, V), up
            to a constant for each row.
    """
    base, (batch, length) = prediction.untruncated, prediction.x.shape

    def log_g(row: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
        if type(row) is not Tensor:  # one that follows choices in an enumeration, which knows look-ups in a table
            site = torch.arange(batch * length, device=prediction.x.device)
            return log_g(site // length, site % length).view(batch, length, -1)[row, position]
        log_o = _rows(base, row, position)
        found, possible = change(log_o, row, position), log_o > -torch.inf
        some = (possible & (found > -torch.inf)).any(-1, keepdim=True)
        return torch.where(possible & some, found - log_o, 0.0)

    return prediction.tilted(log_g)


def _rows(prediction: Prediction, row: Tensor, position: Tensor) -> Float[Tensor, "n V"]:
    """Return normalised rows of log O at sites in any order, which may occur several times.

    They are not checked, because the operator checks the rows that it reads.
    """
    index = row * prediction.x.shape[1] + position
    where = torch.zeros_like(prediction.x, dtype=torch.bool).view(-1).index_fill(0, index, True)
    view = replace(prediction[where.view(prediction.x.shape)], checked=False)
    return kernels.log_softmax(view.loo.rows.dense()[where.cumsum(0)[index] - 1].double())


class Kept:
    """Numbers (n, K) of n sites of (B, L), found when a site is first read, and then kept.

    Gradients do not flow through them.

    Args:
        find: maps the batch rows (n,) and positions (n,) of different sites to numbers (n, K).
        x: (B, L) a tensor of the shape of the sites.
    """

    def __init__(
        self, find: Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n K"]], x: Int[Tensor, "B L"]
    ) -> None:
        self._find, self._length = find, x.shape[1]
        self._slot = x.new_full((x.numel(),), -1)
        self._found: Tensor | None = None

    def __call__(self, row: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Float[Tensor, "n K"]:
        """Return the numbers (n, K) of sites in any order, given by batch rows (n,) and positions (n,)."""
        site = row * self._length + position
        new = site[self._slot[site] < 0].unique()
        if len(new) or self._found is None:
            known = self._found
            found = self._find(new // self._length, new % self._length).detach()
            self._slot[new] = torch.arange(len(new), device=new.device) + (0 if known is None else len(known))
            self._found = found if known is None else torch.cat([known, found])
        return self._found[self._slot[site]]
