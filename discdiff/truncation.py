r"""Temperature and truncation of what is drawn: a guide, so it works with every operator.

    O'(v)  ~  O(v)^{1/T} on the tokens that are kept

It acts on the leave-one-out prediction, the law of fresh tokens: on the denoiser of a uniform process the site's own
token would be tempered too. The bridges, rates and acceptances that follow from O follow from O', so a step is exact
for the tempered prediction; the law of what is sampled is no longer the data's. In a kernel it costs one or two
operations a logit, and the threshold is found without sorting.

References: top-k (Fan et al., 2018), nucleus (Holtzman et al., 2020), min-p (Nguyen et al., 2024).
"""

from dataclasses import dataclass, replace

import torch

from discdiff.kernels import dispatch as kernels
from discdiff.prediction import Prediction

__all__ = ["Truncation"]


@dataclass(frozen=True)
class Truncation:
    """Draw from a tempered and truncated prediction: ``model.guided(Truncation(temperature=0.8, top_p=0.95))``.

    Args:
        temperature: T; at 0, its limit: the most probable token, or one of those that are equally so.
        top_k: keep the k most probable tokens.
        top_p: of what is left, keep the fewest most probable ones that hold this mass.
        min_p: keep tokens of at least this share of the largest probability.

    Tokens as probable as the last one kept are kept too.

    Raises:
        ValueError: for a negative temperature, k below 1, or a share outside [0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Truncation: temperature must be at least 0 and finite, got {self.temperature}")
        kernels.threshold(torch.zeros(1, 1), top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)  # for its checks

    def rows(self, rows: kernels.Rows) -> kernels.Rows:
        """The same rows, tempered and cut."""
        if self.temperature == 0:
            return replace(rows, floor=kernels.threshold(rows, top_k=1))
        rows = replace(rows, temperature=self.temperature)
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return rows
        floor = kernels.threshold(rows, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return replace(rows, floor=floor)

    def __call__(self, prediction: Prediction) -> Prediction:
        return prediction.truncated(self.rows)

    def __repr__(self) -> str:
        options = ("temperature", 1.0), ("top_k", None), ("top_p", None), ("min_p", None)
        shown = (f"{name}={getattr(self, name)}" for name, default in options if getattr(self, name) != default)
        return f"Truncation({', '.join(shown)})"
