r"""Temperature and truncation of the prediction, as a guide that works with every operator.

    O'(v)  ~  O(v)^{1/T} on the tokens that are kept

It changes the leave-one-out prediction O, the law of fresh tokens. Bridges, rates and acceptances are computed from O',
so a step is exact for the tempered prediction; the samples no longer follow the data's law. With a single site they
follow p0^{1/T}, normalised, for any number of steps. A kernel tempers and cuts with one or two operations a logit, and
finds the threshold without sorting.

``of="denoiser"`` is for comparison and is what most code does: it tempers and cuts D. The resulting O' is

    log O'(v) = log O(v) / T + (1/T - 1) log w(z) 1(v = z) + const

so the evidence of the site's own token is sharpened as well. On an absorbing process a hidden site has no evidence, and
both settings of ``of`` give the same law.

References: top-k (Fan et al., 2018, https://arxiv.org/abs/1805.04833), nucleus (Holtzman et al., 2020,
https://arxiv.org/abs/1904.09751), min-p (Nguyen et al., 2024, https://arxiv.org/abs/2407.01082); temperature on the
leave-one-out: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.kernels import dispatch as kernels
from discdiff.prediction.base import Prediction

__all__ = ["Truncation"]


@dataclass(frozen=True)
class Truncation:
    """Temper and truncate a prediction: ``model.guided(Truncation(temperature=0.8, top_p=0.95))``.

    Args:
        temperature: T. At 0 the most probable token is taken, or one of those that tie for it.
        top_k: keep the k most probable tokens.
        top_p: keep the fewest most probable tokens that hold this share of the mass of the tokens kept by ``top_k``.
        min_p: keep tokens of at least this share of the largest probability.
        of: which law is changed: "loo", the leave-one-out O; or "denoiser", the posterior D, for comparison.

    Tokens that tie with the least probable kept token are kept too.

    Raises:
        ValueError: if the temperature is negative, ``top_k`` below 1, ``top_p`` or ``min_p`` outside [0, 1], or ``of``
            is neither "loo" nor "denoiser".
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    of: Literal["loo", "denoiser"] = "loo"

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", real(self.temperature, "Truncation: temperature", "[0, inf)"))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole(self.top_k, "Truncation: top_k", 1))
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, real(getattr(self, name), f"Truncation: {name}", "[0, 1]"))
        if self.of not in ("loo", "denoiser"):
            raise ValueError(f"Truncation: of must be 'loo' or 'denoiser', got {self.of!r}")

    def rows(self, rows: kernels.Rows) -> kernels.Rows:
        """Return the rows of logits with the temperature and a threshold; tokens below the threshold are cut."""
        if self.temperature == 0:
            return replace(rows, floor=kernels.threshold(rows, top_k=1))
        rows = replace(rows, temperature=self.temperature)
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return rows
        floor = kernels.threshold(rows, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return replace(rows, floor=floor)

    def __call__(self, prediction: Prediction) -> Prediction:
        if self.of == "loo":
            return prediction.truncated(lambda rows, x, alpha: self.rows(rows))
        process = prediction.process

        def through_denoiser(rows: kernels.Rows, x: Tensor, alpha: Tensor) -> kernels.Source:
            settled = process.settled(x, alpha)  # there D is a point mass, truncated or not, and O stays unchanged
            evidence = alpha.where(~settled, 0.0)
            cut = self.rows(rows.then(lambda raw, n: process.loo_to_denoiser(raw, x[n], evidence[n])))

            def tempered(n: Tensor) -> Tensor:
                forgotten = process.denoiser_to_loo(cut.dense(n), x[n], evidence[n])
                return torch.where(settled[n][:, None], rows.dense(n), forgotten)

            return kernels.Computed(tempered, cut.width, torch.arange(len(x), device=x.device), cut.dtype)

        return prediction.truncated(through_denoiser)

    def __repr__(self) -> str:
        options = ("temperature", 1.0), ("top_k", None), ("top_p", None), ("min_p", None), ("of", "loo")
        shown = (f"{name}={getattr(self, name)!r}" for name, default in options if getattr(self, name) != default)
        return f"Truncation({', '.join(shown)})"
