r"""Choose which masks to reveal, then draw their tokens.

The schedule sets the number: after a step to s, a share 1 - alpha_s of the free sites is masked. Revealed tokens stay.
Sites revealed together are drawn independently of each other, which is the only error. If the order is fixed,
KL(p0 || law) is the sum over steps of the expected total correlation of the sites revealed. Entropies bound this sum
(Ben-Hamu et al., 2025, https://arxiv.org/abs/2505.24857).

References: MaskGIT (Chang et al., 2022, https://arxiv.org/abs/2202.04200); token ordering (Kim et al., 2025,
https://arxiv.org/abs/2502.06768); LLaDA (Nie et al., 2025, https://arxiv.org/abs/2502.09992); dilated unmasking
(Luxembourg et al., 2025, https://arxiv.org/abs/2506.19037).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import decided, real, whole
from discdiff.choices import Ranking, Subset, spread
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import Process
from discdiff.samplers._choosing import (
    Select,
    believed,
    best,
    check_mask,
    check_select,
    confidence,
    draw_clean,
    hidden,
    quota,
)

__all__ = ["Unmask", "reveal", "taken"]


@dataclass(frozen=True)
class Unmask(Predictor):
    """Reveal in each step as many masks as the schedule sets, in a chosen order.

    A step makes one denoiser call, or none if it reveals no mask.

    Args:
        select: the order of the sites. "random" chooses uniformly; "max_prob", "entropy" and "margin" by confidence;
            "left_to_right" and "spread" by position. Scores are defined in ``confidence`` in samplers/_choosing.py.
        noise: the temperature of Gumbel noise on the scores (MaskGIT); 0 takes the largest scores.
        block: reveal blocks of this many sites from left to right (semi-autoregressive).
        draw_first: draw a token at every mask and keep the most probable ones, as LLaDA does. BIASED: the choice
            depends on the drawn tokens, so even one token at a time does not give p0. ``select`` is not used.

    Raises:
        ValueError: for an unknown order, a negative noise or a block below 1.
    """

    select: Select = "random"
    noise: float = 0.0
    block: int | None = None
    draw_first: bool = False

    def __post_init__(self) -> None:
        check_select(self.select, "Unmask")
        object.__setattr__(self, "noise", real(self.noise, "Unmask: noise", "[0, inf)"))
        if self.block is not None:
            object.__setattr__(self, "block", whole(self.block, "Unmask: block", 1))
        decided(self.draw_first, "Unmask: draw_first")

    @property
    def weighable(self) -> bool:
        return not self.draw_first and (self.noise > 0 or self.select not in ("max_prob", "entropy", "margin"))

    def check(self, process: Process) -> None:
        check_mask(self, process)

    def __call__(self, state: State, at: At) -> State:
        after = reveal(state, self, quota(state, at), at)
        return after.at(after.tokens, at.s)


def reveal(state: State, how: Unmask, count: Int[Tensor, " B"], at: At) -> State:
    """Reveal ``count`` (B,) masks of each row, and return the new state, whose time is unchanged.

    Random choices: "token", and "order" if the order is random or noisy.
    """
    if not bool((count > 0).any()):
        return state
    masks, state = hidden(state, at), replace(state, seen=at.predict(state))
    if how.draw_first:
        drawn = draw_clean(state, masks, at)
        log_p = believed(at.predict(state).untruncated[masks]).log_prob(at.process.column(drawn)[masks])
        chosen = taken(state, masks, how, count, spread(log_p, masks), at)
        return state.at(torch.where(chosen, drawn, state.tokens))
    by = None if how.select == "random" else confidence(state, masks, how.select, at)
    chosen = taken(state, masks, how, count, by, at)
    return state.at(draw_clean(state, chosen, at))


def taken(
    state: State,
    masks: Bool[Tensor, "B L"],
    how: Unmask,
    count: Int[Tensor, " B"],
    score: Float[Tensor, "B L"] | None,
    at: At,
) -> Bool[Tensor, "B L"]:
    """Return a mask (B, L) of ``count`` (B,) sites of each row, chosen among ``masks`` (B, L); random choice "order".

    Without blocks, the sites with the largest ``score`` are taken, or uniformly chosen ones if it is None. With blocks,
    the leftmost blocks are taken whole as far as ``count`` suffices. The remaining sites are taken by ``score``, or
    uniformly, from the next block.
    """
    sure = torch.zeros_like(masks)
    if how.block is not None:
        block = torch.arange(masks.shape[1], device=masks.device) // how.block
        of_block = torch.zeros(len(masks), int(block[-1]) + 1, dtype=torch.int64, device=masks.device)
        of_block = of_block.index_add(1, block, masks.long())
        until = of_block.cumsum(-1)
        sure = masks & (until <= count[:, None])[:, block]
        masks = masks & ~sure & (until - of_block < count[:, None])[:, block]
        count = count - sure.sum(-1)
    if score is None:
        return sure | choose("order", Subset(masks, count), state, at)
    score = score.masked_fill(~masks, -torch.inf)
    if how.noise > 0:
        return sure | (choose("order", Ranking(score / how.noise, count), state, at) >= 0)
    return sure | best(score, count)
