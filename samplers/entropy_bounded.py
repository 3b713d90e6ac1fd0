r"""Entropy-bounded unmasking: as many masks at once as keep the loss of independence below gamma.

Drawing the sites of U independently costs their total correlation, TC(U) <= sum_U H - max_U H. So the masks are taken
in the order of their entropies, and the longest prefix is revealed for which that bound is at most gamma: the error of
a step, in nats, is known beforehand.

Reference: EB-sampler (Ben-Hamu et al., 2025).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.checks import real
from discdiff.prediction import Prediction
from discdiff.samplers.choosing import confidence
from discdiff.samplers.sure import Sure

__all__ = ["EntropyBounded"]


@dataclass(frozen=True)
class EntropyBounded(Sure):
    """Reveal the masks of least entropy while the bound allows; at least one a row, and all in the last step.

    The schedule says nothing here, as in ``Threshold``. With an exact denoiser and steps enough,
    KL(p0 || law) <= gamma times the calls of a row.

    Args:
        gamma: nats a step, at least 0.

    Raises:
        ValueError: for a negative gamma.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", real(self.gamma, "EntropyBounded: gamma", "[0, inf)"))

    def pick(self, masks: Bool[Tensor, "B L"], prediction: Prediction) -> Bool[Tensor, "B L"]:
        entropy = -confidence("entropy", masks, lambda: prediction)
        rising, order = entropy.sort(dim=-1, stable=True)
        # the largest of a prefix is its last, so the sum less the largest is the sum before it
        before = rising.cumsum(-1) - rising
        within = (before <= self.gamma + 1e-12) & (rising < torch.inf)
        return torch.zeros_like(masks).scatter(-1, order, within)
