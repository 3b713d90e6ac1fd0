"""How exact weighted particles are: the tables of particles in docs/steering.md.

python docs/steering/particles.py     # one minute
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import SCHEMES, Scheme
from discdiff.operator import At
from discdiff.sampling import Potential, Weighed, Weighing
from discdiff.theory.world import state_index

V = L = 2
GRID = (1.0, 0.5, 0.0)
WORLD = T.Enumeration(torch.tensor([0.4, 0.1, 0.2, 0.3]), vocab_size=V, length=L)
W = torch.tensor([0.3, 2.0, 1.0, 4.0]).double()
PROCESSES: dict[str, dd.Process] = {"Masked": dd.Masked(V, dd.Linear()), "Uniform": dd.Uniform(V, dd.Linear())}
LOG_G = torch.tensor([[0.5, -0.3], [-0.2, 0.9]]).double()


class Twist:
    """psi_0 = W, and an arbitrary positive potential at times between 0 and 1."""

    def __init__(self, process: dd.Process, last: bool = True) -> None:
        self.states, self.last = process.states, last
        self.middle = torch.rand(self.states**L, generator=torch.Generator().manual_seed(3)).double() + 0.3

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if t == 0 and self.last:
            return W[state_index(x, V)].log()
        return self.middle[state_index(x, self.states)].log() if 0 < t < 1 else torch.zeros(len(x)).double()


def tilt(said: dd.Prediction) -> dd.Prediction:
    """Favour some tokens at each site."""
    return said.tilted(lambda row, position: LOG_G[position])


class WithoutRatio(Weighing):
    """Negative control: weights without K / M; they then belong to the proposal's law."""

    def _weigh(self, *given: object) -> tuple[Tensor, dd.State]:
        log_ratio, reference = super()._weigh(*given)  # type: ignore[arg-type]
        return torch.zeros_like(log_ratio), reference


class Forgetful(Weighing):
    """Negative control: a group that is not resampled goes on with equal weights."""

    def _resampled(self, state: Weighed, at: At) -> Weighed:
        found = super()._resampled(state, at)
        mean = found.log_weight.view(-1, self.per_group).logsumexp(-1) - math.log(self.per_group)
        return found if found.t == 0 else replace(found, log_weight=mean.repeat_interleave(self.per_group))


def particles(
    process: dd.Process, model: dd.Denoiser, ess: float, scheme: Scheme, kind: type[Weighing] = Weighing,
    potential: Potential | None = None,
) -> dd.Particles:  # fmt: skip
    """Two particles over two ancestral steps, with the reference without guides."""
    psi = Twist(process) if potential is None else potential
    steered = dd.Particles(dd.Sampler(process, model, S.Ancestral(), grid=GRID), psi, 2, ess=ess, resample=scheme)
    steered._inner = kind(steered.sampler, steered.reference, psi, 2, ess, scheme)
    return steered


def error(steered: dd.Particles) -> float:
    """The largest error of the estimate of law_ref(x) W(x)."""
    return float((T.evidence(steered, most=2_000_000) - T.law(steered.reference) * W).abs().max())


def evidence() -> str:
    """The errors by process, proposal and resampling."""
    lines = ["| process | proposal | largest error of E[Zhat 1(x)] |", "|---|---|---|"]
    for name, process in PROCESSES.items():
        plain = WORLD.denoiser(process, predicts="loo")
        guided = {"plain": plain, "temperature 2": plain.guided(dd.Truncation(temperature=2.0)),
                  "tilted": plain.guided(tilt)}  # fmt: skip
        schemes: Sequence[Scheme] = SCHEMES if name == "Masked" else ("systematic", "one")
        for proposal, model in guided.items():
            ess = (0.0, 0.8, 2.0) if name == "Masked" else (0.8,)
            worst = max(error(particles(process, model, least, scheme)) for scheme in schemes for least in ess)
            lines.append(f"| {name} | {proposal} | {worst:.0e} |")
    return "\n".join(lines)


def controls() -> dict[str, float]:
    """The errors of weights that are wrong."""
    process = PROCESSES["Masked"]
    plain = WORLD.denoiser(process, predicts="loo")
    warm = plain.guided(dd.Truncation(temperature=2.0))
    return {
        "K / M left out, temperature 2": error(particles(process, warm, 0.8, "systematic", WithoutRatio)),
        "last potential left out, temperature 2": error(
            particles(process, warm, 0.8, "systematic", potential=Twist(process, last=False))
        ),
        "weights lost where a group is not resampled": error(particles(process, plain, 0.8, "systematic", Forgetful)),
    }


def tables() -> dict[str, str]:
    """The tables of the page by name."""
    lines = ["| fault | largest error |", "|---|---|"]
    lines += [f"| {name} | {found:.3f} |" for name, found in controls().items()]
    return {"evidence": evidence(), "particle_controls": "\n".join(lines)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n\n".join(tables().values()))
