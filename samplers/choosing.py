r"""Which masked sites to reveal: confidence, read before any temperature, and how many by the schedule.

A selection that does not look at the tokens it is about to draw leaves the law exact when one token is revealed at a
time, whatever else it looks at. Confidence is that of the denoiser itself: a temperature acts on what is drawn, not on
the order.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.distributions import Tokens
from discdiff.handlers import At, choose
from discdiff.operator import Operator
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.rank_one import Masked
from discdiff.sites import Sites
from discdiff.state import State

__all__ = [
    "Select",
    "believed_at",
    "best",
    "check_mask",
    "check_masked",
    "check_select",
    "compare",
    "confidence",
    "draw_at",
    "hidden",
    "kl_rows",
    "quota",
]

Select = Literal["random", "max_prob", "entropy", "margin", "left_to_right", "spread"]


def check_select(select: str, where: str) -> None:
    """Raise ValueError for an unknown selection."""
    if select not in get_args(Select):
        raise ValueError(f"{where}: select must be one of {', '.join(map(repr, get_args(Select)))}, got {select!r}")


def check_masked(operator: Operator, process: Process) -> None:
    """Raise ValueError unless noise only hides tokens, behind a mask or a noise token of each site's own."""
    if not process.absorbing:
        raise ValueError(f"{operator} needs a process that hides tokens, Masked or AbsorbingUniform, got {process}")


def check_mask(operator: Operator, process: Process) -> None:
    """Raise ValueError unless a site shows whether it is hidden: orders count what they have revealed.

    Beside a noise token a revealed one may coincide with it. It would be revealed again in every step, and with more
    steps the law would leave the data's.
    """
    if not isinstance(process, Masked):
        raise ValueError(f"{operator} needs a process with a true mask, Masked, got {process}")


def hidden(state: State, at: At) -> Bool[Tensor, "B L"]:
    """The free sites that hold their mask. With noise tokens, clean ones that coincide with theirs are among them."""
    return state.free & (state.tokens == at.process.hide(state.tokens))


def believed_at(prediction: Prediction, where: Bool[Tensor, "B L"]) -> Sites:
    """D at hidden sites, unread: what a revealed token is drawn from. Behind a true mask it is O."""
    return (prediction.loo_at if isinstance(prediction.process, Masked) else prediction.denoiser_at)(where)


def draw_at(where: Bool[Tensor, "B L"], prediction: Prediction, state: State, at: At) -> Int[Tensor, "B L"]:
    """The tokens after the chosen hidden sites were revealed; choice "token"."""
    z = state.tokens
    drawn = choose("token", Tokens(believed_at(prediction, where), at.process.column(z)), state, at)
    return torch.where(where, at.process.place(drawn, z), z)


def quota(state: State, at: At) -> Int[Tensor, " B"]:
    """How many masks of each row to reveal so that the expected number, 1 - alpha_s of the free sites, is left."""
    free = state.free.sum(-1)
    share = 1 - at.process.sitewise(at.alpha(at.s), state.tokens).mean(-1)
    return (hidden(state, at).sum(-1) - (free * share + 0.5).floor().to(free)).clamp(min=0)


def confidence(select: Select, where: Bool[Tensor, "B L"], predict: Callable[[], Prediction]) -> Float[Tensor, "B L"]:
    """A score of each chosen site, the largest first; -inf elsewhere. Three of them read the prediction.

    "max_prob": log of the largest probability. "entropy": less entropy first. "margin": log of the largest less the
    second largest probability. "left_to_right": by position. "spread": positions in the order of their reversed binary
    digits, so that sites revealed together lie far from each other (dilated unmasking, Luxembourg et al., 2025).
    """
    position = torch.arange(where.shape[1], device=where.device)
    if select == "left_to_right":
        score = -position.double()
    elif select == "spread":
        digits = max(1, (where.shape[1] - 1).bit_length())
        bits = torch.stack([((position >> k) & 1) << (digits - 1 - k) for k in range(digits)])
        score = -bits.sum(0).double()
    else:
        reading = believed_at(predict().untruncated, where).known(top=select == "margin", entropy=select == "entropy")
        known = {
            "max_prob": lambda: reading.max_prob.log(),
            "entropy": lambda: -reading.entropy,
            "margin": lambda: reading.margin.clamp(min=1e-300).log(),
        }[select]()
        score = torch.zeros(where.shape, dtype=torch.float64, device=where.device).masked_scatter(where, known)
    return score.expand(where.shape).masked_fill(~where, -torch.inf)


def best(score: Float[Tensor, "B L"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """The ``count`` largest scores of each row, fewer where fewer are not -inf; ties go to the lowest position."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & (score > -torch.inf)


def compare(one: Sites, other: Sites, divergence: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, " N"]:
    """A divergence between the rows of two predictions at the same sites, in chunks; from log-probabilities."""
    size = max(1, (1 << 16) // one.rows.width)
    parts = [divergence(one.log_probs(n, size), other.log_probs(n, size)) for n in range(0, len(one.rows), size)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=one.where.device)


def kl_rows(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(p || q) of rows, for ``compare``."""
    apart = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    ruled_out = apart == torch.inf  # by q alone: the divergence is infinite, and does not change
    return (log_p.exp() * apart.masked_fill(ruled_out, 0.0)).masked_fill(ruled_out, torch.inf).sum(-1)
