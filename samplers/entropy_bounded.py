r"""Reveal as many masks at once as a bound on the error of independent draws allows.

If the sites of a set U are drawn independently, the error is their total correlation, TC(U) <= sum_U H - max_U H, with
H the entropy of a site's prediction. The masks are sorted by entropy, and the longest prefix whose bound is at most
gamma is revealed. So a bound on the error of a step, in nats, is known before the step.

Reference: EB-sampler (Ben-Hamu et al., 2025, https://arxiv.org/abs/2505.24857).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.checks import real
from discdiff.operator import At, State
from discdiff.samplers._choosing import confidence
from discdiff.samplers._sure import Sure

__all__ = ["EntropyBounded"]


@dataclass(frozen=True)
class EntropyBounded(Sure):
    """Reveal the masks of least entropy H while sum H - max H is at most gamma, but at least one in each row.

    The sum and the maximum are over a row's masks that the step reveals. The step to time 0 reveals all masks.

    The schedule does not set the number of revealed masks. With an exact denoiser and enough steps,
    KL(p0 || law) <= gamma times the number of denoiser calls of a row.

    Args:
        gamma: the bound on the error of a step, in nats; at least 0.

    Raises:
        ValueError: for a negative gamma.
    """

    gamma: float = 0.1
    weighable = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", real(self.gamma, "EntropyBounded: gamma", "[0, inf)"))

    def pick(self, state: State, masks: Bool[Tensor, "B L"], at: At) -> Bool[Tensor, "B L"]:
        entropy = -confidence(state, masks, "entropy", at)
        rising, order = entropy.sort(dim=-1, stable=True)
        # sorted, so the sum of a prefix minus its largest entropy is the sum before its last
        before = rising.cumsum(-1) - rising
        within = (before <= self.gamma + 1e-12) & (rising < torch.inf)
        return torch.zeros_like(masks).scatter(-1, order, within)
