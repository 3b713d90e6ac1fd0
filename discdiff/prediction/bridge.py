r"""Bridges q(x_s | x_t, x0) that keep the marginals of the forward process; the exact posterior is one of many.

A sampler can use a law q(x_s | x_t, x0) if

    sum_{x_t} q_t(x_t | x0) q(x_s | x_t, x0) = q_s(x_s | x0)

Many laws satisfy this. They differ in how much is noised again in a step (``ReMDM``), or in how much of x_t is kept
(``MaximalCoupling``, ``Between``). Only ``Exact`` is the bridge of the forward Markov process.

``mixture`` averages any bridge over the denoiser of a prediction. For the exact bridge this equals the plug-in of the
leave-one-out, ``prediction[where].reverse(alpha_s)``.

References: ReMDM (Wang et al., 2025, https://arxiv.org/abs/2503.00307); Uniform Diffusion Models Revisited (2026,
https://arxiv.org/abs/2605.22765); DDIM-like families (Song et al., 2021, https://arxiv.org/abs/2010.02502); discrete
flow matching (Gat et al., 2024, https://arxiv.org/abs/2407.15595).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real
from discdiff.choices import BAD_LOGITS, Choice
from discdiff.prediction.base import Prediction
from discdiff.process import Process, Survival, Time

__all__ = ["Between", "Bridge", "Exact", "MaximalCoupling", "ReMDM", "mixture"]


class Bridge(ABC):
    """A law of x_s given x_t and x0 that keeps the marginals of a process.

    Shapes: x_t and x0 (B, L).
    """

    @abstractmethod
    def law(
        self, process: Process, x_t: Int[Tensor, "B L"], x0: Int[Tensor, "B L"], alpha_t: Survival, alpha_s: Survival
    ) -> Choice:
        """Return q(x_s | x_t, x0), batch shape (B,), event shape (L,).

        Raises:
            ValueError: if the bridge does not support the process or the survival probabilities.
        """

    def __call__(self, process: Process, x_t: Int[Tensor, "B L"], x0: Int[Tensor, "B L"], t: Time, s: Time) -> Choice:
        """Return q(x_s | x_t, x0) for times s <= t, batch shape (B,), event shape (L,).

        Raises:
            ValueError: if states, data or times are invalid, or the bridge does not support the process.
        """
        return self.law(process, x_t, x0, *process.pinned(x_t, x0, t, s))


@dataclass(frozen=True)
class Exact(Bridge):
    """Bridge that is the posterior by Bayes' rule, q_{t|s}(x_t | x_s) q_s(x_s | x0) / q_t(x_t | x0)."""

    def law(self, process: Process, x_t: Tensor, x0: Tensor, alpha_t: Survival, alpha_s: Survival) -> Choice:
        return process.posterior(x_t, x0, alpha_t, alpha_s)


@dataclass(frozen=True)
class Between(Bridge):
    r"""Bridge that is the exact posterior with probability ``weight``, and otherwise the maximal coupling.

    The maximal coupling keeps x_t as often as the marginals allow:

        x_s = x0 with probability (alpha_s - alpha_t) / (1 - alpha_t), else x_s = x_t

    The process must be of rank one with a constant noise law.

    Args:
        weight: the probability of the exact posterior, in [0, 1].

    Raises:
        TypeError, ValueError: if ``weight`` is not in [0, 1]; when used, if the process is not of rank one with a
            constant noise law.
    """

    weight: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", real(self.weight, "Between: weight", "[0, 1]"))

    def law(self, process: Process, x_t: Tensor, x0: Tensor, alpha_t: Survival, alpha_s: Survival) -> Choice:
        # the share of an anchor changes with time, unless the anchor is all the noise
        if not process.one_noise_law:
            raise ValueError(f"{type(self).__name__} needs a rank-one process with one noise law, got {process}")
        a_t, a_s = process.sitewise(alpha_t, x_t), process.sitewise(alpha_s, x_t)
        clean = process.place(x0, x_t)
        jump = (1 - self.weight) * torch.where(a_t < 1, (a_s - a_t) / (1 - a_t), 0.0)
        exact = process.posterior(x_t, x0, alpha_t, alpha_s)
        points = [*exact.points, x_t, clean]  # type: ignore[attr-defined]
        weights = [self.weight * w for w in exact.weights] + [1 - self.weight - jump, jump]  # type: ignore[attr-defined]
        return exact.like(points, weights)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class MaximalCoupling(Between):
    """Bridge ``Between`` with weight 0: x_s is x0 or x_t, never fresh noise.

    Reference: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).
    """

    weight: float = 0.0


@dataclass(frozen=True)
class ReMDM(Bridge):
    r"""Bridge of masked processes with remasking (Wang et al., 2025, https://arxiv.org/abs/2503.00307):

        revealed:  mask again with probability sigma
        masked:    reveal x0 with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)

    It keeps the marginals for 0 <= sigma <= min(1, (1 - alpha_s) / alpha_t).

    Args:
        sigma: the probability of remasking a revealed token in a step.

    Raises:
        TypeError, ValueError: if sigma is outside [0, 1]; when used, if the process is not masked, or sigma is too
            large for a step.
    """

    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", real(self.sigma, "ReMDM: sigma", "[0, 1]"))

    def law(self, process: Process, x_t: Tensor, x0: Tensor, alpha_t: Survival, alpha_s: Survival) -> Choice:
        if not process.masks:
            raise ValueError(f"ReMDM applies to a Masked process, got {process}")
        a_t, a_s = process.sitewise(alpha_t, x_t), process.sitewise(alpha_s, x_t)
        if bool((self.sigma * a_t > 1 - a_s + 1e-12).any()):
            most = float(((1 - a_s) / a_t).min())
            raise ValueError(f"ReMDM: sigma = {self.sigma} exceeds (1 - alpha_s) / alpha_t = {most:.6g} in this step")
        masked = x_t == process.hide(x_t)
        reveal = torch.where(a_t < 1, (a_s - (1 - self.sigma) * a_t) / (1 - a_t), 0.0).clamp(0.0, 1.0)
        exact = process.posterior(x_t, x0, alpha_t, alpha_s)  # refuses impossible pairs
        return exact.like([x0], [torch.where(masked, reveal, 1 - self.sigma)])  # type: ignore[attr-defined]


def mixture(bridge: Bridge, prediction: Prediction, alpha_s: Survival) -> Float[Tensor, "B L C"]:
    """Return log sum_v D(v) q(x_s | x_t, v), the bridge averaged over the denoiser D, (B, L, C).

    With ``Exact`` the result is the exact one-site reverse marginal, equal to the plug-in of the leave-one-out. One law
    is computed for each data token, so this function is for small V only.
    """
    process, x = prediction.process, prediction.x
    d = prediction.denoiser.double().exp()
    prediction.watch.refuse(d.isnan().any(-1), BAD_LOGITS)
    total = torch.zeros(*x.shape, process.columns, dtype=torch.float64, device=x.device)
    for v in process.data_tokens.tolist():
        share = d[..., v]
        possible = share > 0  # a token with D = 0 is replaced by a possible one, with weight 0
        token = torch.where(possible, v, d.argmax(-1))
        rows = bridge.law(process, x, token, prediction.alpha, alpha_s).table()[0].exp()  # type: ignore[attr-defined]
        total = total + torch.where(possible, share, 0.0)[..., None] * rows
    return total.log()


# --- rates, per unit of alpha, towards data; row = from, column = to; all generate d q / d alpha ---------------------
