"""A joint law of clean tokens that no product of laws of single sites gives, for the tests of guides."""

from dataclasses import dataclass

import torch
from torch import Tensor

import discdiff as dd
from discdiff.choices import Choice, Key, Tokens
from discdiff.operator import GuideAt

__all__ = ["Alike", "Equal"]


class Equal(Choice):
    """One token for all chosen sites of a row, drawn from O of the first of them; other positions keep their token."""

    def __init__(self, prediction: dd.Prediction, where: Tensor, keep: Tensor) -> None:
        super().__init__(keep.shape[0], (keep.shape[1],), keep.device)
        self.where, self.keep, self.first = where, keep, where.int().argmax(-1, keepdim=True)
        some = torch.zeros_like(where).scatter(1, self.first, where.any(-1, keepdim=True))
        self.one = Tokens(prediction[some].loo, keep)

    def _spread(self, value: Tensor, rows: Tensor) -> Tensor:
        return torch.where(self.where[rows], value.gather(-1, self.first[rows]), self.keep[rows])

    def _draw(self, key: Key) -> Tensor:
        return self._spread(self.one._draw(key), torch.arange(len(self.keep)))

    def _log_prob(self, value: Tensor) -> Tensor:
        rows = torch.arange(len(self.keep))
        told = value.gather(-1, self.first.expand(*value.shape[:-1], 1))
        fits = torch.where(self.where, value == told, value == self.keep).all(-1)
        alone = self.keep.expand(value.shape).scatter(-1, self.first.expand(*value.shape[:-1], 1), told)
        return self.one._log_prob(alone).where(fits, -torch.inf) + 0.0 * rows

    def fork(self) -> tuple[Tensor, Tensor, Tensor]:
        parent, value, log_p = self.one.fork()
        return parent, self._spread(value, parent), log_p


@dataclass(frozen=True, eq=False)
class Alike(dd.Guide):
    """The tokens that are drawn together are equal; with ``log_g`` (B, V) they are tilted by the row's id, mod B."""

    log_g: Tensor | None = None

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        of_row = None if self.log_g is None else self.log_g[state.rows % len(self.log_g)]

        def law(said: dd.Prediction, row: Tensor, where: Tensor, keep: Tensor) -> Choice:
            assert row.shape == (len(said.x),) == where.shape[:1]
            if of_row is not None:
                said = said.tilted(lambda n, position: of_row[row[n]])
            return Equal(said, where, keep)

        return prediction.joint(law)
