"""Posteriors given a measurement, by exact and by heuristic guides, against enumerated ones.

python docs/steering/posteriors.py     # three minutes; prints the tables
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from page import table
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import GuideAt
from discdiff.theory.world import all_states

STEPS, COUNTS = 16, (16, 32, 64)
DRAWS = (64, 200)  # draws a step, and steps, of the variational posterior
REMASKED = ("unguided", "exact h", "swap, many draws", "quantised, 10")
# vocabulary, length, number of seeds; each for a linear and for a nonlinear measurement
SIZES = ((3, 2, 4), (4, 2, 4), (3, 3, 2))
COLUMNS = tuple((v, n, linear) for v, n, _ in SIZES for linear in (True, False))


@dataclass(frozen=True, eq=False)
class Case:
    """A law of the data, its masked denoiser, a measurement, and the posterior."""

    world: T.Enumeration
    measurement: dd.Measurement
    process: dd.Masked

    @property
    def model(self) -> dd.Denoiser:
        return self.world.denoiser(self.process)

    @property
    def log_w(self) -> Tensor:
        return self.measurement(all_states(self.world.alphabet, self.world.length))

    @property
    def posterior(self) -> T.Enumeration:
        return self.world.tilted(self.log_w)

    def law(self, model: dd.Denoiser, steps: int | None = None, operator: dd.Operator | None = None) -> Tensor:
        """The exact law of a sampler."""
        return T.law(dd.Sampler(self.process, model, operator or S.Ancestral(), steps=steps or STEPS))

    def kl(self, model: dd.Denoiser, steps: int | None = None, operator: dd.Operator | None = None) -> float:
        """KL(posterior, law of a sampler) in nats."""
        return T.kl(self.posterior.p0, self.law(model, steps, operator))


def measurement(v: int, length: int, linear: bool, seed: int) -> dd.Measurement:
    """Two values of the embedded sequence (E = 2) of a random truth, with noise .3; the likelihood takes it for .5."""
    rng = np.random.default_rng(seed)
    codes = torch.as_tensor(rng.normal(size=(v, 2)))
    matrix = torch.as_tensor(rng.normal(size=(2, 2 * length)))

    def forward(e: Tensor) -> Tensor:
        if linear:
            return e.flatten(1) @ matrix.T
        return torch.stack([torch.sin(2 * (e.flatten(1) @ matrix[0])), (e[:, 0] * e[:, 1]).sum(-1)], -1)

    x = all_states(v, length)
    truth = x[rng.integers(len(x))]
    y = forward(codes[truth][None])[0] + 0.3 * torch.as_tensor(rng.normal(size=2))
    return dd.Measurement(codes, matrix if linear else forward, dd.GaussianNoise(y, 0.5))


def case(v: int, length: int, linear: bool, seed: int) -> Case:
    """One of the measurements, of data whose law is 5 % uniform and 95 % drawn from Dirichlet(.7)."""
    drawn = np.random.default_rng(seed + 50).dirichlet(np.full(v**length, 0.7))
    world = T.Enumeration(torch.as_tensor(0.05 / v**length + 0.95 * drawn), vocab_size=v, length=length)
    return Case(world, measurement(v, length, linear, seed), dd.Masked(v, dd.Linear()))


def cases(v: int, length: int, linear: bool) -> list[Case]:
    """The measurements of a column."""
    seeds = next(count for size in SIZES for *shape, count in [size] if shape == [v, length])
    return [case(v, length, linear, seed) for seed in range(seeds)]


@dataclass(frozen=True, eq=False)
class ManyDraws(dd.Guide):
    """What ``Reward(measurement)`` tends to with many draws, for enumerations: g_i(v) = E_D [W(x with x_i = v)]."""

    measurement: dd.Measurement

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        p = prediction.denoiser.exp()
        batch, length, size = p.shape
        x = all_states(size, length)
        w = at.reward(self.measurement, x).exp()
        log_g = torch.zeros_like(p)
        for site in range(length):
            others = [p[:, j, x[:, j]] for j in range(length) if j != site]
            weight = torch.stack(others).prod(0) * w
            log_g[:, site] = p.new_zeros(batch, size).index_add(1, x[:, site], weight).log()
        return prediction.tilted(log_g)


Build = Callable[[Case], dd.Denoiser]
GUIDES: dict[str, Build] = {
    "unguided": lambda one: one.model,
    "exact h": lambda one: one.model.guided(dd.Doob(clean=one.world.log_clean(one.process, one.log_w))),
    "swap, 1 draw": lambda one: one.model.guided(dd.Reward(one.measurement, samples=1)),
    "swap, 2 draws": lambda one: one.model.guided(dd.Reward(one.measurement, samples=2)),
    "swap, many draws": lambda one: one.model.guided(ManyDraws(one.measurement)),
    "soft mean, 10 inner steps": lambda one: one.model.guided(dd.APS(one.measurement, inner=10, quantised=False)),
    "quantised, 1 inner step": lambda one: one.model.guided(dd.APS(one.measurement, inner=1)),
    "quantised, 10": lambda one: one.model.guided(dd.APS(one.measurement, inner=10)),
    "quantised, 100": lambda one: one.model.guided(dd.APS(one.measurement)),
    "mean field": lambda one: one.model.guided(dd.MeanField(one.measurement)),
}


@cache
def cell(guide: str, v: int, length: int, linear: bool) -> float:
    """The mean KL(posterior, law) of a guide over the measurements of a column."""
    return float(np.mean([one.kl(GUIDES[guide](one)) for one in cases(v, length, linear)]))


def pairs() -> Iterator[tuple[int, int, str]]:
    """The sizes and their headings."""
    for v, length, _ in SIZES:
        yield v, length, f"V = {v}, L = {length}"


def guides() -> str:
    """KL of every guide, linear / nonlinear."""
    rows = []
    for name in GUIDES:
        found = [(cell(name, v, n, True), cell(name, v, n, False)) for v, n, _ in pairs()]
        rows.append([name, *(f"{one:.3f} / {other:.3f}" for one, other in found)])
    return table(["guide", *(heading for _, _, heading in pairs())], rows)


def steps() -> str:
    """KL with more steps: the exact guide tends to the posterior, the heuristics do not."""
    rows = []
    for name in GUIDES:
        if name != "quantised, 100":  # a minute, and the same is seen at 10
            one = case(3, 2, True, 0)
            rows.append([name, *(f"{one.kl(GUIDES[name](one), n):.2g}" for n in COUNTS)])
    return table(["guide", *(f"{n} steps" for n in COUNTS)], rows)


def remasking() -> str:
    """KL of anchored remasking in place of ancestral steps, one measurement."""
    one, rows = case(*SIZES[-1][:2], True, 0), []
    for name in REMASKED:
        model = GUIDES[name](one)
        rows.append([name, *(f"{one.kl(model, operator=op):.3f}" for op in (S.Ancestral(), S.AnchoredRemask()))])
    return table(["guide", "`Ancestral`", "`AnchoredRemask`"], rows)


def variational() -> str:
    """The mean-field posterior q of each column's first measurement: what is minimised, and the other direction."""
    rows = []
    for v, length, linear in COLUMNS:
        one = case(v, length, linear, 0)
        found = dd.variational_posterior(one.model, one.measurement)
        drawn = dd.variational_posterior(one.model, one.measurement, samples=DRAWS[0], steps=DRAWS[1], seed=1)
        q, p = found.log_prob(all_states(v, length)).exp(), one.posterior.p0
        gap = float((drawn.log_q.exp() - found.log_q.exp()).abs().max())
        what = f"V = {v}, L = {length}, {'linear' if linear else 'nonlinear'}"
        rows.append([what, f"{T.kl(q, p):.3f}", f"{T.kl(p, q):.3f}", f"{gap:.1g}"])
    header = ["measurement", "KL(q, posterior)", "KL(posterior, q)", "by draws: largest difference of q"]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "posteriors": guides, "posteriors_by_steps": steps, "anchored_remasking": remasking, "variational": variational
}  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of the page by name."""
    return {name: build() for name, build in TABLES.items()}


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for name, made in tables().items():
        print(f"{name}\n\n{made}")


if __name__ == "__main__":
    main()
