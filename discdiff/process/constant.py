"""Processes of rank one whose noise has one constant law: a uniform token, a token of a given law, or the mask.

References: D3PM (Austin et al., 2021, https://arxiv.org/abs/2107.03006); MDLM (Sahoo et al., 2024,
https://arxiv.org/abs/2406.07524); UDLM (Schiff et al., 2025, https://arxiv.org/abs/2412.10193); DiGress (Vignac et al.,
2023, https://arxiv.org/abs/2209.14734).
"""

from collections.abc import Callable
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import check_law, whole
from discdiff.process.rank_one import RankOne
from discdiff.process.schedule import Schedule

__all__ = ["Marginal", "Masked", "Uniform"]


class Uniform(RankOne):
    """Process whose noise is a uniform token (D3PM-uniform, Austin et al., 2021; UDLM, Schiff et al., 2025).

    A state is a token, and the noise law is pi = 1/V.

    Args:
        vocab_size: V, the number of tokens.
        schedule: the noise schedule.
    """

    @property
    def pi(self) -> Float[Tensor, " S"]:
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)


class Marginal(RankOne):
    """Process whose noise is a token of a given law, such as the tokens' frequencies (DiGress, Vignac et al., 2023).

    A state is one of V tokens.

    Args:
        pi: (V,) the noise law. A token with pi = 0 is never noise, so a site in that state is clean.
        schedule: the noise schedule.

    Raises:
        ValueError: if ``pi`` does not hold probabilities that sum to 1.
    """

    def __init__(self, pi: Float[Tensor, " V"], schedule: Schedule | Callable[[Tensor], Tensor]) -> None:
        self._pi = check_law(pi, "Marginal: pi")
        super().__init__(len(self._pi), schedule)

    @property
    def pi(self) -> Float[Tensor, " S"]:
        return self._pi

    def with_schedule(self, schedule: Schedule) -> "Marginal":
        return Marginal(self._pi, schedule)

    def _identity(self) -> tuple[object, ...]:
        return tuple(self._pi.tolist()), self.schedule

    def __repr__(self) -> str:
        shown = ", ".join(f"{p:.3g}" for p in self._pi[:4].tolist()) + (", ..." if len(self._pi) > 4 else "")
        return f"Marginal([{shown}], {self.schedule})"


class Masked(RankOne):
    """Process whose noise is the mask (D3PM-absorbing, Austin et al., 2021; MDLM, Sahoo et al., 2024).

    Args:
        vocab_size: V, the number of columns of a prediction.
        schedule: the noise schedule.
        mask_id: the mask's id. The default V adds a state to the V tokens (V + 1 states). With an id below V, as in
            ESM and LLaDA, the mask is one of V states; its logit is ignored. Other ids raise ValueError.
    """

    absorbing = True

    def __init__(
        self,
        vocab_size: SupportsIndex,
        schedule: Schedule | Callable[[Tensor], Tensor],
        mask_id: SupportsIndex | None = None,
    ) -> None:
        super().__init__(vocab_size, schedule)
        size = self.vocab_size
        self.mask_id: int = size if mask_id is None else whole(mask_id, "Masked: mask_id", 0, size)
        if self.mask_id < size == 1:
            raise ValueError(f"Masked: mask_id must lie in 0..{size} and leave a data token, got {mask_id}")

    @property
    def pi(self) -> Float[Tensor, " S"]:
        pi = torch.zeros(max(self.vocab_size, self.mask_id + 1), dtype=torch.float64)
        pi[self.mask_id] = 1
        return pi

    def hide(self, x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        return torch.full_like(x, self.mask_id)

    def with_schedule(self, schedule: Schedule) -> "Masked":
        return Masked(self.vocab_size, schedule, self.mask_id)

    def __repr__(self) -> str:
        mask = "" if self.mask_id == self.vocab_size else f", mask_id={self.mask_id}"
        return f"Masked({self.vocab_size}, {self.schedule}{mask})"
