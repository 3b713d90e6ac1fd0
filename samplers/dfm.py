r"""Step with the rates of discrete flow matching on the mixture path, with adjustable stochasticity.

Given x0, every other state jumps to x0 at rate 1 / (1 - alpha) per unit of alpha. Any rates in detailed balance with
q_t(. | x0) may be added. The added rates here turn x0 to noise and noise to x0, in proportion to eta:

    z = x0 -> v:  eta alpha pi(v) / (alpha + (1 - alpha) pi(z)),        v -> x0:  eta alpha / (1 - alpha)

Averaged over x0 drawn from the denoiser D, the rates from z are

    to data v, v != z:    (1 + eta alpha) D(v) / (1 - alpha)
    to noise v, v != z:   eta alpha D(z) pi(v) / (alpha + (1 - alpha) pi(z))

On a masked process eta is the rate of remasking, as in ``ReMDM(rule="rate")``.

References: Campbell et al. (2024, https://arxiv.org/abs/2402.04997), whose added rates on a uniform process differ
from the ones here by a factor that depends on alpha alone; Gat et al. (2024, https://arxiv.org/abs/2407.15595).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real
from discdiff.process import Exit, Process, RankOne, Survival
from discdiff.samplers._leap import Leap

__all__ = ["DFM"]


@dataclass(frozen=True)
class DFM(Leap):
    """Let each site jump with flow-matching rates that are frozen for a step.

    In a step of length d in alpha a site with total rate R jumps with probability 1 - exp(-d R). A step makes one
    denoiser call. The method has order 1.

    Args:
        eta: the stochasticity, per unit of alpha; at 0 no clean token turns to noise.

    Raises:
        ValueError: for a negative eta; in sampling, for a process that is not rank-one or has an anchor.
    """

    eta: float = 0.0
    order: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", real(self.eta, "DFM: eta", "[0, inf)"))

    def check(self, process: Process) -> None:
        if (rank := process.rank_one) is None or rank.anchor(torch.zeros(1, 1, dtype=torch.int64)) is not None:
            raise ValueError(f"DFM needs a process of rank one without an anchor, such as Masked, got {process}")

    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        return -torch.expm1(-rate)

    def exit(self, process: RankOne, x: Int[Tensor, "B L"], alpha: Survival, own: Float[Tensor, "B L"]) -> Exit:
        odds = process.odds(x, alpha)
        known = odds < torch.inf  # else alpha = 0, where z does not depend on x0
        finite = odds.where(known, 1.0)
        clean = torch.where(known, own * (1 + finite) / (own + finite).clamp(min=1e-300), own)
        return self._exit(process, x, alpha, clean)

    def most(self, process: RankOne, x: Int[Tensor, "B L"], alpha: Survival) -> Exit:
        noise, data = (self._exit(process, x, alpha, torch.full_like(x, d, dtype=torch.float64)) for d in (0.0, 1.0))
        if process.masks:  # D(z) is 0 at a mask and 1 at a token
            hidden = x == process.hide(x)
            return Exit(*(torch.where(hidden, one, two) for one, two in zip(noise, data, strict=True)))
        return Exit(torch.maximum(noise.total, data.total), noise.data, noise.anchored)  # linear in D(z)

    def _exit(self, process: RankOne, x: Tensor, alpha: Survival, clean: Tensor) -> Exit:
        a, share = process.sitewise(alpha, x), process.noise(x.device).pi[process.column(x)]
        data = (1 - clean) * (1 + self.eta * a) / (1 - a)
        noise = clean * self.eta * a * (1 - share) / (a + (1 - a) * share).clamp(min=1e-300)
        total = data + noise
        some = noise > 0
        return Exit(total, torch.where(some, data / total.where(some, 1.0), 1.0), torch.zeros_like(total))
