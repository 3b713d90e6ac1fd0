"""Compare the supports of two laws of one choice: importance weights need a proposal that covers its target."""

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.choices.choice import Choice
from discdiff.choices.distributions import Branch, SiteWise, Tokens
from discdiff.choices.where import Ranking, Subset

__all__ = ["uncovered"]

_AT_ONCE = 1 << 20  # limit of the numbers that are compared at a time
_LEAST = 1e-9  # a smaller probability may be a rounding error


def uncovered(target: Choice, proposal: Choice) -> Bool[Tensor, " B"]:
    """Return the rows (B,) in which a value that is possible under ``target`` is impossible under ``proposal``.

    Laws of a kind that is not known here count as covered if both are of one class, and as uncovered otherwise. A joint
    law of tokens that declares ``sites``, the laws of single sites that it restricts, is compared by these.
    """
    match target, proposal:
        case Tokens(), _ if hasattr(proposal, "sites"):
            return _tokens(target, proposal)
        case SiteWise(), SiteWise():
            return _tables(target, proposal)
        case Subset(), Subset():
            free, size = (target.free & ~proposal.free).any(-1), target.size != proposal.size
            return free | size
        case Ranking(), Ranking():
            missing = (target.log_weight > -torch.inf) & (proposal.log_weight == -torch.inf)
            return missing.any(-1) | (target.count != proposal.count)
        case Branch(), Branch():
            missing = ((target.weights > 0) & (proposal.weights == 0)).any()
            return missing.expand(target.batch_shape)
    return torch.full(target.batch_shape, type(target) is not type(proposal), device=target.device)


def _tokens(target: Tokens, proposal: Choice) -> Bool[Tensor, " B"]:
    """Compare two laws of tokens, site by site; tokens at other chosen sites are uncovered."""
    one, other = target.sites, proposal.sites  # type: ignore[attr-defined]
    wrong = (one.where & ~other.where).any(-1)
    wrong |= (other.where & ~one.where).any(-1)
    both = one.where & other.where
    one, other = one.narrow(both), other.narrow(both)
    row = both.nonzero()[:, 0]
    step = max(1, _AT_ONCE // max(1, one.rows.width))
    for start in range(0, len(row), step):
        here = slice(start, start + step)
        target_rows, rows = one.rows.dense(here), other.rows.dense(here)
        width = min(target_rows.shape[-1], rows.shape[-1])
        missing = (target_rows[:, :width] > -torch.inf) & (rows[:, :width] == -torch.inf)
        wrong[row[here][missing.any(-1)]] = True
    return wrong


def _tables(target: SiteWise, proposal: SiteWise) -> Bool[Tensor, " B"]:
    """Compare two laws of independent sites by the lists of their values."""
    (log_p, value), (other_p, other) = target.table(), proposal.table()
    possible, offered = log_p > torch.tensor(_LEAST).log(), other_p > -torch.inf
    if log_p.shape == other_p.shape and torch.equal(value, other):
        return (possible & ~offered).flatten(1).any(-1)
    same = (value[..., :, None] == other[..., None, :]) & offered[..., None, :]
    return (possible & ~same.any(-1)).flatten(1).any(-1)
