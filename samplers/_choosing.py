r"""Choose which masked sites to reveal by confidence, and how many by the schedule.

If one token is revealed at a time, the law is exact for every selection that does not depend on the token about to be
drawn. Confidence is read from the denoiser's own output: temperature and truncation act on the drawn tokens, not on the
order.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Sites, Tokens, spread
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Operator, State, choose
from discdiff.prediction import View
from discdiff.process import Process

__all__ = [
    "Select", "believed", "best", "check_mask", "check_masked", "check_select", "compare", "confidence", "draw_clean",
    "hidden", "kl_rows", "quota", "total_variation",
]  # fmt: skip

Select = Literal["random", "max_prob", "entropy", "margin", "left_to_right", "spread"]


def check_select(select: str, where: str) -> None:
    """Raise ValueError for an unknown selection."""
    if select not in get_args(Select):
        raise ValueError(f"{where}: select must be one of {', '.join(map(repr, get_args(Select)))}, got {select!r}")


def check_masked(operator: Operator, process: Process) -> None:
    """Raise ValueError unless noise only hides tokens, by a mask or by a noise token that each site has of its own."""
    if not process.absorbing:
        raise ValueError(f"{operator} needs a process that hides tokens, Masked or AbsorbingUniform, got {process}")


def check_mask(operator: Operator, process: Process) -> None:
    """Raise ValueError unless the process has a true mask: unmasking rules count the revealed sites.

    On ``AbsorbingUniform`` a revealed token may equal the site's noise token. It would be revealed again in every step,
    and with more steps the law would depart from p0.
    """
    if not process.masks:
        raise ValueError(f"{operator} needs a process with a true mask, Masked, got {process}")


def hidden(state: State, at: At) -> Bool[Tensor, "B L"]:
    """Find the free sites of (B, L) that hold their mask, or a clean token equal to their noise token."""
    return state.free & (state.tokens == at.process.hide(state.tokens))


def believed(view: View) -> Sites:
    """Return D at the hidden sites of a view, unread, from which revealed tokens are drawn; at a true mask D = O."""
    return view.loo if view.prediction.process.masks else view.denoiser


def draw_clean(state: State, where: Bool[Tensor, "B L"], at: At) -> Int[Tensor, "B L"]:
    """Draw the chosen hidden sites from D and return all tokens, (B, L); choice "token"."""
    z = state.tokens
    drawn = choose("token", Tokens(believed(at.predict(state)[where]), at.process.column(z)), state, at)
    return torch.where(where, at.process.place(drawn, z), z)


def quota(state: State, at: At) -> Int[Tensor, " B"]:
    """Count the masks of each row to reveal, (B,), so that 1 - alpha_s of the free sites are left on average."""
    free = state.free.sum(-1)
    share = 1 - at.process.sitewise(at.alpha(at.s), state.tokens).mean(-1)
    return (hidden(state, at).sum(-1) - (free * share + 0.5).floor().to(free)).clamp(min=0)


def confidence(state: State, where: Bool[Tensor, "B L"], select: Select, at: At) -> Float[Tensor, "B L"]:
    """Score each chosen site of (B, L); sites with larger scores are revealed first; -inf elsewhere.

    "max_prob": log of the largest probability. "entropy": minus the entropy. "margin": log of the largest minus the
    second largest probability. These three read the prediction. "left_to_right": by position. "spread": by the reversed
    binary digits of the position, so that sites revealed together lie far from each other (dilated unmasking,
    Luxembourg et al., 2025, https://arxiv.org/abs/2506.19037).
    """
    position = torch.arange(where.shape[1], device=where.device)
    if select == "left_to_right":
        score = -position.double()
    elif select == "spread":
        digits = max(1, (where.shape[1] - 1).bit_length())
        bits = torch.stack([((position >> k) & 1) << (digits - 1 - k) for k in range(digits)])
        score = -bits.sum(0).double()
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


def best(score: Float[Tensor, "B L"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """Choose the ``count`` (B,) largest scores of each row of (B, L), or all above -inf if fewer.

    Ties go to the lowest position.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & (score > -torch.inf)


def compare(one: Sites, other: Sites, divergence: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, " N"]:
    """Compute ``divergence`` of the log-probabilities of two predictions at the same N sites, (N,), chunk by chunk."""
    size = max(1, (1 << 16) // one.rows.width)
    parts = [divergence(one.log_probs(n, size), other.log_probs(n, size)) for n in range(0, len(one.rows), size)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=one.where.device)


def total_variation(one: Sites, other: Sites) -> Float[Tensor, " N"]:
    """Compute the total variation between two predictions at the same N sites, (N,)."""
    found = kernels.total_variation(one.rows, other.rows)
    if found is not None and not torch.is_grad_enabled():
        return found
    path = compare(one, other, lambda log_p, log_q: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2)
    return path if found is None else kernels.graft(found, path)


def kl_rows(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Compute KL(p || q) of each row of (N, V), (N,), for ``compare``."""
    apart = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    ruled_out = apart == torch.inf  # by q alone: the divergence is the constant +inf, without a gradient
    return (log_p.exp() * apart.masked_fill(ruled_out, 0.0)).masked_fill(ruled_out, torch.inf).sum(-1)
