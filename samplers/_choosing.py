r"""Choose which masked sites to reveal by confidence, and how many by the schedule.

If one token is revealed at a time, the samples follow the model's law exactly, for every selection that does not depend
on the token about to be drawn. Confidence is computed from the prediction before truncation. So temperature and
truncation change the drawn tokens, but not the order in which sites are revealed.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Sites, spread
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Operator, State, choose
from discdiff.prediction import View
from discdiff.process import Process

__all__ = [
    "POSITIONAL", "Select", "believed", "best", "by_position", "check_mask", "check_masked", "check_select",
    "compare", "confidence", "draw_clean", "hidden", "kl_rows", "quota", "total_variation",
]  # fmt: skip

Select = Literal["random", "max_prob", "entropy", "margin", "left_to_right", "spread"]
POSITIONAL = ("left_to_right", "spread")


def check_select(select: str, where: str) -> None:
    """Raise ValueError for an unknown selection."""
    if select not in get_args(Select):
        raise ValueError(f"{where}: select must be one of {', '.join(map(repr, get_args(Select)))}, got {select!r}")


def check_masked(operator: Operator, process: Process) -> None:
    """Raise ValueError unless the process is absorbing, such as ``Masked`` or ``AbsorbingUniform``.

    On such a process noise only hides a token: behind the mask, or behind a noise token that the site keeps.
    """
    if not process.absorbing:
        raise ValueError(f"{operator} needs a process that hides tokens, Masked or AbsorbingUniform, got {process}")


def check_mask(operator: Operator, process: Process) -> None:
    """Raise ValueError unless the process has rank one and the mask is its only noise.

    Unmasking rules count the revealed sites, which are those without a mask. On ``AbsorbingUniform`` a revealed token
    may equal the site's noise token. Then the site would count as hidden and be revealed again in every step, and with
    more steps the law of the samples would depart from p0.
    """
    if not (process.one_noise_law and process.masks):
        raise ValueError(f"{operator} needs a process with a true mask, Masked, got {process}")


def hidden(state: State, at: At) -> Bool[Tensor, "B L"]:
    """Return which free sites are hidden, (B, L) bool: those at the mask, or where token and noise token are equal.

    On ``AbsorbingUniform`` a revealed token may equal the site's noise token by chance; it then counts as hidden.
    """
    return state.free & (state.tokens == at.process.hide(state.tokens))


def believed(view: View) -> Sites:
    """Return the denoiser's rows at the hidden sites of a view; clean tokens are drawn from these rows.

    At a mask the denoiser equals the leave-one-out prediction, whose rows are returned there. No logits are read yet.
    """
    return view.loo if view.prediction.process.masks else view.denoiser


def draw_clean(state: State, where: Bool[Tensor, "B L"], at: At) -> Int[Tensor, "B L"]:
    """Draw clean tokens at the chosen hidden sites (B, L) and return all tokens (B, L); random choice "token"."""
    z = state.tokens
    said = at.predict(state)
    sites = believed(said[where]) if said.law is None else None
    drawn = choose("token", said.tokens(where, at.process.column(z), sites), state, at)
    return torch.where(where, at.process.place(drawn, z), z)


def quota(state: State, at: At) -> Int[Tensor, " B"]:
    """Return how many masks of each row (B,) to reveal, so that a share 1 - alpha_s of the free sites stays masked.

    alpha_s is the survival probability at the end of the step. The number that stays masked is rounded. If every
    position has a clock of its own, the share is the mean over positions.
    """
    free = state.free.sum(-1)
    share = 1 - at.process.sitewise(at.alpha(at.s), state.tokens).mean(-1)
    return (hidden(state, at).sum(-1) - (free * share + 0.5).floor().to(free)).clamp(min=0)


def confidence(state: State, where: Bool[Tensor, "B L"], select: Select, at: At) -> Float[Tensor, "B L"]:
    """Return a score (B, L) of each chosen site, -inf elsewhere; sites with larger scores are revealed first.

    Three scores use the prediction. "max_prob" is the log of the largest probability, "entropy" is minus the entropy,
    and "margin" is the log of the difference between the two largest probabilities. Two scores use the position only.
    "left_to_right" is minus the position. "spread" is minus the position with its binary digits reversed, so that sites
    revealed together lie far from each other (dilated unmasking, Luxembourg et al., 2025,
    https://arxiv.org/abs/2506.19037).
    """
    if select in POSITIONAL:
        score = by_position(select, where.shape[1], where.device)
    else:
        sites = believed(at.predict(state).untruncated[where])
        reading = sites.known(top=select == "margin", entropy=select == "entropy")
        known = {
            "max_prob": lambda: reading.max_prob.log(),
            "entropy": lambda: -reading.entropy,
            "margin": lambda: reading.margin.clamp(min=1e-300).log(),
        }[select]()
        score = spread(known, where)
    return score.expand(where.shape).masked_fill(~where, -torch.inf)


def by_position(select: Select, length: int, device: torch.device | str = "cpu") -> Float[Tensor, " L"]:
    """Return the scores (L,) of an order by position; ``confidence`` defines them."""
    position = torch.arange(length, device=device)
    if select == "left_to_right":
        return -position.double()
    digits = max(1, (length - 1).bit_length())
    bits = torch.stack([((position >> k) & 1) << (digits - 1 - k) for k in range(digits)])
    return -bits.sum(0).double()


def best(score: Float[Tensor, "B L"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """Return a mask (B, L) of the sites with the ``count`` (B,) largest scores of each row.

    Sites with score -inf are never chosen, so there may be fewer. Ties go to the lowest position.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & (score > -torch.inf)


def compare(one: Sites, other: Sites, divergence: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, " N"]:
    """Return a divergence (N,) between two predictions at the same N sites, computed in chunks of rows.

    ``divergence`` maps two tensors of log-probabilities (n, V), for the n sites of a chunk, to (n,).
    """
    size = max(1, (1 << 16) // one.rows.width)
    parts = [divergence(one.log_probs(n, size), other.log_probs(n, size)) for n in range(0, len(one.rows), size)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=one.where.device)


def total_variation(one: Sites, other: Sites) -> Float[Tensor, " N"]:
    """Return the total variation distance (N,) between two predictions at the same N sites."""
    found = kernels.total_variation(one.rows, other.rows)
    if found is not None and not torch.is_grad_enabled():
        return found
    path = compare(one, other, lambda log_p, log_q: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2)
    return path if found is None else kernels.graft(found, path)


def kl_rows(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Return KL(p || q) of each row, (N,), from log-probabilities (N, V); a ``divergence`` for ``compare``."""
    apart = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    ruled_out = apart == torch.inf  # by q alone: the divergence is the constant +inf, without a gradient
    return (log_p.exp() * apart.masked_fill(ruled_out, 0.0)).masked_fill(ruled_out, torch.inf).sum(-1)
