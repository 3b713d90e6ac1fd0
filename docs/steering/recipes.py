"""Named recipes at equal network calls and rewards, against the exact target: tables of docs/steering.md.

python docs/steering/recipes.py     # six minutes
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from page import table
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import Scheme
from discdiff.sampling import SplitMoves
from discdiff.theory.world import all_states, law_of_data, law_of_prior, state_index

V = L = 3
STEPS, DRAWN = 8, 160_000  # DRAWN: the particles of an estimate
ETAS, FALLING = (0.6, 0.3, 0.15, 0.05), (0.5, 0.3, 0.2, 0.1)
X = all_states(V, L)
DISTANCE = (X[:, None] != X).sum(-1).double()  # between x (row) and z (column)
WORLD = T.Enumeration(torch.as_tensor(np.random.default_rng(3).dirichlet(np.ones(V**L))), vocab_size=V, length=L)
LOG_W = torch.as_tensor(np.random.default_rng(5).normal(size=V**L))
TARGET = WORLD.tilted(LOG_W).p0
PROCESSES: dict[str, dd.Process] = {"Masked": dd.Masked(V, dd.Linear()), "Uniform": dd.Uniform(V, dd.Linear())}
USUAL = [int(WORLD.p0[X[:, site] == v].sum() * 1e12) for site in range(L) for v in range(V)]
FILLED = torch.tensor(USUAL).view(L, V).argmax(-1)  # the most frequent token of each site


def log_w(x: Tensor) -> Tensor:
    """The reward log W of clean sequences."""
    return LOG_W[state_index(x, V)]


def potential(x: Tensor, t: float) -> Tensor:
    """W^(1 - t) of the state, with the most frequent token at hidden sites: one reward for each state."""
    return (1 - t) * log_w(torch.where(x < V, x, FILLED))


def tilt(said: dd.Prediction) -> dd.Prediction:
    """A guide without rewards: the mean of W over the sequences that have a token at a site."""
    log_g = torch.stack([torch.stack([LOG_W[X[:, i] == v].exp().mean().log() for v in range(V)]) for i in range(L)])
    return said.tilted(lambda row, position: log_g[position])


@dataclass(frozen=True, eq=False)
class Row:
    """What a recipe costs for each sample it returns, and the law of the sample."""

    calls: float
    rewards: float
    law: Tensor

    @property
    def distance(self) -> float:
        """The total variation distance to p0 W / Z."""
        return float(T.tv(self.law, TARGET))

    @property
    def reward(self) -> float:
        """The mean of log W."""
        return float((self.law * LOG_W).sum())

    @property
    def entropy(self) -> float:
        """The entropy in nats."""
        return float(T.entropy(self.law))


def sampler(process: dd.Process, tilted: bool = False) -> dd.Sampler:
    """Ancestral steps of the exact denoiser."""
    model = WORLD.denoiser(process, predicts="loo")
    return dd.Sampler(process, model.guided(tilt) if tilted else model, S.Ancestral(), steps=STEPS)


def drawn_law(x: Tensor) -> Tensor:
    """The shares of all sequences among draws."""
    return torch.bincount(state_index(x, V), minlength=V**L).double() / len(x)


# --- best of n --------------------------------------------------------------------------------------------------------


def best_of_law(p: Tensor, reward: Tensor, n: int) -> Tensor:
    """The law of the best of n draws of p: p(x) [F(r)^n - F_(r)^n] / [F(r) - F_(r)] at r = r(x)."""
    below = torch.stack([p[reward < r].sum() for r in reward])
    upto = torch.stack([p[reward <= r].sum() for r in reward])
    return torch.where(p > 0, p * (upto**n - below**n) / (upto - below), 0.0)


# --- particles --------------------------------------------------------------------------------------------------------


class Estimates(NamedTuple):
    """What becomes of the same groups of particles.

    Attributes:
        drawn: one particle of each group, drawn by its weight; its law is the mean of the normalised weights.
        weighted: the same, and each group counts by its evidence.
        best: the particle of each group with the largest reward.
    """

    drawn: Row
    weighted: Row
    best: Row


@cache
def particles(name: str, size: int, scheme: Scheme, tilted: bool, drawn: int) -> Estimates:
    """The laws that ``drawn`` particles estimate, in groups of ``size``."""
    ess, groups = 2.0 if scheme == "one" else 0.5, drawn // size
    steered = dd.Particles(sampler(PROCESSES[name], tilted), potential, size, ess=ess, resample=scheme)
    out = steered.sample(groups * size, seed=1)
    index, weight = state_index(out.tokens, V), out.log_weight.view(groups, size)
    laws = [
        torch.zeros(V**L).double().index_add(0, index, share.flatten())
        for share in (weight.softmax(-1) / groups, weight.flatten().softmax(0))
    ]
    best = log_w(out.tokens).view(groups, size).argmax(-1) + size * torch.arange(groups)
    calls, rewards = float(out.nfe_rows.sum()) / groups, out.rewards / groups
    return Estimates(*(Row(calls, rewards, law) for law in (*laws, drawn_law(out.tokens[best]))))


def limit(name: str) -> Tensor:
    """The law of the steps times W / Z, which particles estimate without bias; the steps' error is left."""
    return (T.law(sampler(PROCESSES[name])).log() + LOG_W).softmax(0)


def candidates(name: str) -> Tensor:
    """The law of a draw after candidate resampling with many candidates: each step is tilted and normalised alone.

    All candidates have one parent, so a draw does not see how probable the parent's step was; the evidence does.
    """
    run = sampler(PROCESSES[name])
    states = all_states(run.process.states, L)
    law = law_of_prior(run.process, L)
    for _, t, s, operator, model in run.parts():
        psi = potential(states.clamp(max=V - 1) if s == 0 else states, s).exp()
        step = T.kernel(operator, run.process, model, t, s) * psi
        law = law @ (step / step.sum(-1, keepdim=True))
    return law_of_data(run.process, law, L)


# --- split Gibbs ------------------------------------------------------------------------------------------------------


class Uncorrected(SplitMoves):
    """Negative control: the weight of a changed site is that of all V - 1 other tokens together."""

    def _log_ratio(self, log_r: Tensor, other: Tensor, farther: Tensor) -> Tensor:
        return super()._log_ratio(log_r, other, farther) + farther.double() * math.log(V - 1)


@cache
def moves(eta: float, kind: type[SplitMoves] = SplitMoves) -> Tensor:
    """The exact kernels of one proposal for z, (x, z, z')."""
    process = PROCESSES["Uniform"]
    model = WORLD.denoiser(process, predicts="loo")
    return torch.stack([T.kernel(kind(x[None], log_w, eta), process, model, t=0.0) for x in X])


def matrix(back: dd.Sampler) -> Tensor:
    """The exact matrix of a run from its first states to data, (z, x)."""
    parts = [T.kernel(operator, back.process, model, t, s) for _, t, s, operator, model in back.parts()]
    return torch.linalg.multi_dot(parts) if len(parts) > 1 else parts[0]


def turn(joint: Tensor, to_z: Tensor, to_x: Tensor, proposals: int) -> Tensor:
    """The law of x and z after a turn; ``to_z`` (x, z, z') is the kernel of a proposal, ``to_x`` (z, x)."""
    moved = torch.einsum("xz,xzy->xy", joint, torch.linalg.matrix_power(to_z, proposals))
    return (moved.sum(0)[:, None] * to_x).T


def law_of(steered: dd.SplitGibbs) -> Tensor:
    """The exact law of split Gibbs on a uniform process, by the matrices of its program."""
    assert steered._reverse is not None
    joint, known = torch.diag(T.law(steered.sampler)), {}
    for eta, back in zip(steered.etas, steered._reverse, strict=True):
        if eta not in known:
            known[eta] = moves(eta), matrix(back)
        joint = turn(joint, *known[eta], steered.proposals)
    return joint.sum(1)


@cache
def split_gibbs(name: str, turns: int, proposals: int, each: int = 1, rows: int = 8_000) -> Row:
    """Split Gibbs with ``each`` turns at every eta; counted from draws where the process is not uniform."""
    etas = np.repeat(np.geomspace(0.8, 0.2, turns), each).tolist()
    steered = dd.SplitGibbs(sampler(PROCESSES[name]), log_w, etas, proposals=proposals, per_group=1)
    exact = steered._reverse is not None
    out = steered.sample(4 if exact else rows, seed=1)
    law = law_of(steered) if exact else drawn_law(out.tokens)
    return Row(float(out.nfe_rows.double().mean()), out.rewards / len(out.tokens), law)


# --- stationary laws, from exact conditionals -------------------------------------------------------------------------


def joint(p0: Tensor, log_r: Tensor, pull: Tensor) -> Tensor:
    """The law of x and z, (x, z): p0(x) exp(pull(x, z)) r(z) / Z."""
    return (p0.log()[:, None] + pull + log_r).flatten().softmax(0).view(len(p0), len(p0))


def coupled(eta: float) -> Tensor:
    """The joint law of x and z that split Gibbs keeps."""
    return joint(WORLD.p0, LOG_W, -DISTANCE / eta)


def stationary(to_z: Tensor, to_x: Tensor) -> Tensor:
    """The law of x that is kept by draws from z | x, (x, z), and from x | z, (z, x)."""
    chain = to_z @ to_x
    system = torch.cat([chain.T - torch.eye(len(chain)).double(), torch.ones(1, len(chain)).double()])
    return torch.linalg.lstsq(system, torch.eye(len(system)).double()[-1:].T, driver="gelsd").solution[:, 0]


def faulty(p0: Tensor, log_r: Tensor, distance: Tensor, eta: float, others: int = 1, later: float = 1.0) -> Tensor:
    """The stationary law of x with a weight for ``others`` tokens at a changed site, and x drawn at eta * later."""
    to_z = (distance * (math.log(others) - 1 / eta) + log_r).softmax(-1)
    right = joint(p0, log_r, -distance / (eta * later))
    return stationary(to_z, (right / right.sum(0)).T)


def one_site(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A law of one site with many tokens, a reward, and distances."""
    rng = np.random.default_rng(0)
    p0, log_r = torch.as_tensor(rng.dirichlet(np.ones(size))), torch.as_tensor(rng.normal(size=size))
    return p0, log_r, 1 - torch.eye(size).double()


def controls() -> dict[str, list[float]]:
    """The distances from the posterior of what split Gibbs, and two faults of public code, keep; by eta."""
    ours, sites = (WORLD.p0, LOG_W, DISTANCE), {size: one_site(size) for size in (32, 256)}
    found = {"split Gibbs": [T.tv(faulty(*ours, eta), TARGET) for eta in FALLING]}
    found["1 / (V - 1) left out"] = [T.tv(faulty(*ours, eta, V - 1), TARGET) for eta in FALLING]
    found["x drawn at the next eta, .7 times this"] = [T.tv(faulty(*ours, eta, later=0.7), TARGET) for eta in FALLING]
    for size, (p0, log_r, distance) in sites.items():
        aim = (p0.log() + log_r).softmax(0)
        for what, others in (("split Gibbs", 1), ("1 / (V - 1) left out", size - 1)):
            laws = [faulty(p0, log_r, distance, eta, others) for eta in FALLING]
            found[f"{what}, V = {size}, one site"] = [T.tv(law, aim) for law in laws]
    return {name: [float(one) for one in row] for name, row in found.items()}


# --- tables -----------------------------------------------------------------------------------------------------------


def recipes(name: str, drawn: int = DRAWN) -> Iterator[tuple[str, Row]]:
    """All recipes at 64 calls for each sample, and best of n at the same number of rewards too."""
    plain = T.law(sampler(PROCESSES[name]))
    yield "unguided", Row(STEPS, 0, plain)
    yield "best of 8", Row(STEPS * 8, 8, best_of_law(plain, LOG_W, 8))
    yield "best of 72", Row(STEPS * 72, 72, best_of_law(plain, LOG_W, 72))
    found, one = particles(name, 8, "systematic", False, drawn), particles(name, 8, "one", False, drawn)
    yield "8 particles", found.drawn
    yield "8 particles, guided", particles(name, 8, "systematic", True, drawn).drawn
    yield "8 candidates in each step", one.drawn
    yield "the same, groups weighted by evidence", one.weighted
    turns, proposals = (18, 3) if name == "Uniform" else (7, 9)
    yield f"split Gibbs, {turns} turns", split_gibbs(name, turns, proposals, rows=min(8_000, drawn))
    yield "the best of 8 particles", found.best


def budgets(drawn: int = DRAWN, sizes: tuple[int, ...] = (8, 32, 128)) -> dict[str, list[float]]:
    """The distances to p0 W / Z with more calls and rewards, on the uniform process."""
    plain, name = T.law(sampler(PROCESSES["Uniform"])), "Uniform"
    found = {n: particles(name, n, "systematic", False, drawn) for n in sizes}
    one = {n: particles(name, n, "one", False, drawn) for n in sizes}
    return {
        "best of n": [float(T.tv(best_of_law(plain, LOG_W, n), TARGET)) for n in sizes],
        "n particles": [found[n].drawn.distance for n in sizes],
        "n candidates in each step": [one[n].drawn.distance for n in sizes],
        "split Gibbs, 9 n / 4 turns": [split_gibbs(name, 18, 3, n // 8).distance for n in sizes],
        "the best of n particles": [found[n].best.distance for n in sizes],
        "the limit of particles: the law of 8 steps, tilted": [float(T.tv(limit(name), TARGET))] * len(sizes),
        "the limit of candidates": [float(T.tv(candidates(name), TARGET))] * len(sizes),
    }


def tables() -> dict[str, str]:
    """Return the tables by name, as markdown."""
    header = ["recipe", "calls", "rewards", "TV to p0 W / Z", "mean log W", "entropy"]
    found = {}
    for name in PROCESSES:
        rows = [
            [what, f"{row.calls:.0f}", f"{row.rewards:.0f}", f"{row.distance:.3f}", f"{row.reward:.2f}",
             f"{row.entropy:.2f}"] for what, row in (*recipes(name), ("p0 W / Z", Row(0, 0, TARGET)))
        ]  # fmt: skip
        rows[-1][1:3] = ["", ""]
        found[f"recipes_{name.lower()}"] = table(header, rows)
    sizes = (8, 32, 128)
    found["budgets"] = table(
        ["TV to p0 W / Z, calls", *(str(STEPS * n) for n in sizes)],
        [[what, *(f"{one:.3f}" for one in row)] for what, row in budgets(sizes=sizes).items()],
    )
    errors = [float(T.tv(coupled(eta).sum(1), TARGET)) for eta in ETAS]
    found["coupling"] = table(
        ["eta", *(f"{eta:g}" for eta in ETAS)],
        [["TV to p0 W / Z", *(f"{one:.2g}" for one in errors)],
         ["times e^(1 / eta)", *(f"{one * math.exp(1 / eta):.2f}" for one, eta in zip(errors, ETAS, strict=True))]],
    )  # fmt: skip
    found["split_controls"] = table(
        ["TV to p0 W / Z, eta", *(f"{eta:g}" for eta in FALLING)],
        [[what, *(f"{one:.3f}" for one in row)] for what, row in controls().items()],
    )
    return found


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for name, text in tables().items():
        print(f"<!-- {name} -->\n{text}", flush=True)


if __name__ == "__main__":
    main()
