r"""Best-of-n: of n independent samples keep the one with the largest reward.

Its law is that of an order statistic of the reward under the sampler's own law p:

    P(x) = p(x) [F(r(x))^n - F_(r(x))^n] / [F(r(x)) - F_(r(x))],    F(c) = P_p(r <= c),    F_(c) = P_p(r < c)

It depends on the order of the rewards alone, not on their sizes. So it is not p W / Z with W = exp(r), but for
coincidences such as a constant r. As n grows it tends to p restricted to the largest reward. KL(P, p) is at most
log n - (n - 1) / n.

Reference: Beirami et al. (2024, https://arxiv.org/abs/2401.01879).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import shown, whole
from discdiff.sampling.blocks import Job
from discdiff.sampling.particles import ParticleSamples
from discdiff.sampling.samples import Samples

__all__ = ["BestSamples", "best_of"]


@dataclass(frozen=True, eq=False, repr=False)
class BestSamples(Samples):
    """The result of ``best_of``: ``Samples`` of the G best rows, with the costs of all rows.

    Attributes:
        reward: (G,) float64 reward of each row.
    """

    reward: Float[Tensor, " G"] = None  # type: ignore[assignment]  # behind fields with defaults


def best_of(out: Samples, reward: Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]], n: SupportsIndex) -> BestSamples:
    """Return the row with the largest reward of each n consecutive rows, the first of them if several have it.

    ``nfe``, ``calls``, ``queries`` and ``rewards`` count what all B = G n rows took; ``nfe_rows`` (G,) is the sum over
    the n rows. Rows do not depend on each other, so the result does not depend on a split of the run, if ``batch`` and
    ``first_row`` of each part are multiples of n:

        best = dd.best_of(sampler.sample(batch=100 * 16, length=32, seed=0), reward, n=16)    # 100 rows

    Args:
        out: complete samples of a ``Sampler``, or of any other sampler with independent rows.
        reward: maps tokens (B, L) to numbers (B,); -inf is allowed.
        n: the number of candidates for each row.

    Raises:
        TypeError: if ``out`` is no ``Samples``; for the samples of ``Particles``, whose best row has no law of its own;
            for a reward that cannot be called.
        ValueError: for a number of rows that is no multiple of n, for samples of a run that has not reached time 0, and
            for rewards of another shape, NaN or +inf.
    """
    if not isinstance(out, Samples) or isinstance(out, ParticleSamples):
        raise TypeError(f"best_of: takes Samples with independent rows, got {shown(out)}; of particles take out.draw()")
    if not callable(reward):
        raise TypeError(f"best_of: reward is called with tokens (B, L), got {shown(reward)}")
    n, rows = whole(n, "best_of: n", 1), len(out.tokens)
    if rows % n:
        raise ValueError(f"best_of: the number of rows must be a multiple of n = {n}, got {rows}")
    state = vars(out).get("_state")
    if state is not None and (state.run.groups if isinstance(state.run, Job) else state.t > 0):
        raise ValueError(
            f"best_of: takes complete samples, but this run has come to step {state.step}, t = {state.t:g}"
        )
    found = reward(out.tokens)
    if not isinstance(found, Tensor) or found.shape != (rows,):
        raise ValueError(f"best_of: the reward must give ({rows},) numbers, one a row, got {shown(found)}")
    found = found.to(out.tokens.device, torch.float64)
    wrong = ~(found < torch.inf)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(f"best_of: the reward of row {first}, {out.tokens[first].tolist()}, is {float(found[first])}")
    best = found.view(-1, n).argmax(-1) + n * torch.arange(rows // n, device=found.device)
    return BestSamples(
        out.tokens[best], out.nfe, out.nfe_rows.view(-1, n).sum(-1), out.seed, queries=out.queries, frame=out.frame,
        calls=out.calls, rewards=out.rewards + rows, reward=found[best],
    )  # fmt: skip
