"""Several independent draws of whole sequences, as one choice."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.choices.choice import Key
from discdiff.choices.distributions import SiteWise, Tokens
from discdiff.choices.faults import BAD_LOGITS
from discdiff.choices.sites import Sites
from discdiff.kernels import dispatch as kernels

__all__ = ["Draws"]


class Draws(SiteWise):
    """M independent draws of whole sequences for each row, the sites independent too; the value is (B, M, L).

    A draw has a token at each chosen site, from the softmax of the site's logits. The other positions keep their token.
    The randomness of position i in draw m is that of position m L + i. Logits are not copied for each draw.

    Args:
        sites: the chosen sites (B, L) and their logits, which are the same in all M draws of a row. If ``apart``, they
            are the sites (B M, L) of the draws: row b M + m is that of draw m of row b.
        keep: the tokens of the other positions, of the shape of the sites.
        samples: M.
        apart: whether each draw has its own sites and logits.

    Raises:
        ValueError: if a row of logits that a draw reads has no mass, a NaN or +inf; the error names the site.
    """

    def __init__(self, sites: Sites, keep: Int[Tensor, "B L"], samples: int, apart: bool = False) -> None:
        super().__init__(len(keep) // samples if apart else len(keep), (samples, keep.shape[1]), keep.device)
        self.samples = samples
        self.each: Tokens = Tokens(
            sites if apart else _repeated(sites, samples), keep if apart else _each(keep, samples)
        )

    def _draw(self, key: Key) -> Int[Tensor, "B M L"]:
        sites, length = self.each.sites, self.each.keep.shape[1]
        row, position = sites.where.nonzero(as_tuple=True) if sites.place is None else sites.place
        owner, number = row // self.samples, row % self.samples
        drawn = kernels.drawn(sites.rows, key[owner], number * length + position)
        watch = replace(sites.watch, ids=_each(key.ids, self.samples), flags=self.faults)
        watch.refuse(drawn < 0, BAD_LOGITS, sites.where)
        return self.each.keep.masked_scatter(sites.where, drawn.clamp(min=0)).view(self.shape())

    def _log_prob(self, value: Int[Tensor, "*sample B M L"]) -> Float[Tensor, "*sample B"]:
        return self.site_log_prob(value).sum((-1, -2))

    def site_log_prob(self, value: Int[Tensor, "*sample B M L"]) -> Float[Tensor, "*sample B M L"]:
        """Return the log-probability of each token, (*sample, B, M, L); 0 at a position that keeps its token."""
        where, flat = self.each.sites.where, value.flatten(-3, -2)
        log_p = kernels.log_prob(self.each.sites.rows, flat[..., where].movedim(-1, 0)).movedim(0, -1)
        fixed = torch.where(flat == self.each.keep, 0.0, -torch.inf).to(log_p.dtype)
        return fixed.masked_scatter(where.expand(flat.shape), log_p).view(value.shape)

    def table(self) -> tuple[Float[Tensor, "B L K"], Int[Tensor, "B L K"]]:
        """Return the log-probabilities and values of the K categories of each of the M L positions, (B, L, K) each."""
        log_p, value = self.each.table()
        shape = (*self.batch_shape, self.event_shape.numel(), -1)
        return log_p.reshape(shape), value.reshape(shape)

    def fork(self) -> tuple[Int[Tensor, " N"], Int[Tensor, "N M L"], Float[Tensor, " N"]]:
        """List every possible value of every row: row indices (N,), values (N, M, L), log-probabilities (N,)."""
        parent, value, log_p = super().fork()
        return parent, value.view(-1, *self.event_shape), log_p


def _each(x: Tensor, samples: int) -> Tensor:
    return x.repeat_interleave(samples, 0)


def _repeated(sites: Sites, samples: int) -> Sites:
    """Return the sites of M equal rows in place of each row; their logits are read from the same place."""
    where, number = _each(sites.where, samples), torch.zeros_like(sites.where, dtype=torch.int64)
    number[sites.where] = torch.arange(len(sites.rows), device=number.device)
    row, position = where.nonzero(as_tuple=True)
    rows = sites.rows.subset(_each(number, samples)[row, position])
    return Sites(where, rows, None, sites.watch, sites.empty, (row, position))
