r"""Statistics in place of a search: the error of a network's step over every interval of a grid, from a few batches.

Noise of data x0 is drawn along one path through all times of the grid, u_0 = 1 > u_1 > ... > u_G = 0. For a step from
u_i to u_j the bound's part and the error are

    b(i, j) = E[ log q(z_i | z_j) - log K(z_j | z_i) ],      error(i, j) = b(i, j) - sum_{k=i}^{j-1} b(k, k+1)

K is the network's ancestral step. The error is what one step loses against the grid's finest steps. With an exact
network it equals the difference of the enumerated KLUB terms. It takes G + 1 predictions of the data in all.

Reference: empirical model statistics, DPM-Solver-v3 (Zheng et al., 2023, https://arxiv.org/abs/2310.13268).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import seeded, token_ids, whole
from discdiff.denoiser import Denoiser
from discdiff.prediction import Prediction
from discdiff.process import Process, listed
from discdiff.samplers import Ancestral
from discdiff.sampling import Plan, Sampler, Step

__all__ = ["Measured", "measure"]


@dataclass(frozen=True)
class Measured:
    """What ``measure`` found on a grid of n = G + 1 times.

    Attributes:
        times: the grid, u_0 > ... > u_G.
        bound: (n, n), b(i, j) for i < j, in nats a sequence.
        error: (n, n), the error of a step from u_i to u_j for i < j, in nats a sequence.
        standard_error: (n, n), the standard error of ``error`` over the data.
    """

    times: tuple[float, ...]
    bound: Float[Tensor, "n n"]
    error: Float[Tensor, "n n"]
    standard_error: Float[Tensor, "n n"]

    def fine(self, i: int, j: int) -> float:
        """Return the bound's part of all finest steps from u_i to u_j."""
        return float(self.bound.diagonal(1)[i:j].sum())

    def grid(self, steps: SupportsIndex) -> tuple[float, ...]:
        """Return the grid of this many steps with the least sum of errors, by dynamic programming.

        Raises:
            TypeError, ValueError: for a number of steps that is not whole, or is not in 1..G.
        """
        last = len(self.times) - 1
        steps = whole(steps, "grid: steps", 1, last)
        best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, (0,))] + [(torch.inf, ())] * last]
        error = self.error.tolist()
        for _ in range(steps):
            before = best[-1]
            best.append([min(((before[i][0] + error[i][j], (*before[i][1], j)) for i in range(j)),
                             default=(torch.inf, ())) for j in range(last + 1)])  # fmt: skip
        return tuple(self.times[index] for index in best[-1][last][1])


@torch.no_grad()
def measure(
    process: Process,
    model: Denoiser | Mapping[str, Denoiser],
    data: Int[Tensor, "N L"],
    times: Iterable[float],
    *,
    step: Step | None = None,
    seed: SupportsIndex = 0,
) -> Measured:
    """Measure the error of a network's ancestral step over every interval of a grid, from data.

    ``found.grid(8)`` is then a grid of 8 steps. Comparing ``found.bound`` of the same network under several guides says
    which temperature to use where.

    Args:
        process: the forward process, whose states are few enough for a matrix.
        model: the denoiser, or several by name.
        data: (N, L) data tokens, on the device of the denoiser; the errors are means over the N rows.
        times: the grid, decreasing.
        step: the step that is measured: ``Ancestral`` with guides and the name of a model.
        seed: the seed of the noise.

    Raises:
        TypeError: for a step with another operator.
        ValueError: for tokens that are no data.
    """
    step, times, seed = Step(Ancestral()) if step is None else step, listed(times), seeded(seed, "measure: seed")
    if step.operator != Ancestral():
        raise TypeError(f"measure: takes steps of Ancestral(), whose law is known site by site; got {step.operator}")
    data = token_ids(data, "measure: data", "data tokens (N, L)")
    process.check_data(data, "measure: data")
    asked = Sampler(process, model, plan=Plan([times[0], times[-1]], [step])).model
    path = [z.to(data.device) for z in noise_path(process, data.cpu(), times, seed)]
    last = len(times) - 1
    parts = torch.full((last + 1, last + 1, len(data)), torch.nan, dtype=torch.float64, device=data.device)
    for i in range(last):
        said = asked(path[i], times[i])
        for j in range(i + 1, last + 1):
            parts[i, j] = _forward(process, path[j], path[i], times[i], times[j]) - log_step(said, path[j], times[j])
    parts = parts.cpu()
    finest = torch.cat([torch.zeros(1, len(data), dtype=torch.float64), parts.diagonal(1, 0, 1).T.cumsum(0)])
    errors = parts - (finest[None] - finest[:, None])
    spread = errors.std(-1) / len(data) ** 0.5
    return Measured(times, parts.mean(-1), errors.mean(-1), spread)


def noise_path(
    process: Process, data: Int[Tensor, "N L"], times: tuple[float, ...], seed: int
) -> list[Int[Tensor, "N L"]]:
    """Draw noisy states (N, L) of data along one path, for every time, on the CPU; the last time is drawn first."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    z = process.place(data, (data + 1) % process.vocab_size)
    found, before = [], 0.0
    for time in reversed(times):
        if time > before:
            rows = process.kernel(time, before)[z]
            z = torch.multinomial(rows.flatten(0, 1), 1, generator=generator).view(z.shape)
        found.append(z)
        before = time
    return found[::-1]


def log_step(said: Prediction, z_s: Int[Tensor, "N L"], s: float) -> Float[Tensor, " N"]:
    """Return the log-probability (N,) that the ancestral step of a prediction ends in states z_s at time s."""
    process = said.process
    where = ~process.revealed(said.x, said.alpha.expand(said.x.shape))  # the other sites stay for certain
    alpha = process.schedule.survival(torch.tensor(s, dtype=torch.float64))
    rows = said[where].reverse(alpha.expand(1, 1)).known(at=process.column(z_s)[where])
    total = torch.zeros(z_s.shape, dtype=torch.float64, device=z_s.device)
    return total.masked_scatter(where, rows.log_prob.double()).sum(-1)


def _forward(process: Process, z_s: Tensor, z_t: Tensor, t: float, s: float) -> Float[Tensor, " N"]:
    return process.kernel(t, s).to(z_s.device)[z_s, z_t].log().sum(-1)
