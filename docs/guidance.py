"""Which law classifier-free guidance samples from, and what it costs: the tables of docs/guidance.md.

python docs/guidance.py     # two minutes
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.command import bench, bench_goals
from discdiff.command.bench_steps import named, one_thread
from discdiff.theory.world import all_states

PAGE = Path(__file__).parent / "guidance.md"
V, L = 3, 2
PROCESSES: dict[str, dd.Process] = {
    "Masked": dd.Masked(V, dd.Linear()),
    "Uniform": dd.Uniform(V, dd.Linear()),
    "Marginal": dd.Marginal(torch.tensor([0.5, 0.3, 0.2]), dd.Linear()),
}
STEPS = (16, 32, 64, 128)
OPERATORS: list[dd.Operator] = [
    S.Ancestral(), S.SplitLeap(), S.Euler(), S.ThetaTrapezoidal(), S.Ancestral() >> S.Gibbs(),
    S.Ancestral() >> S.LocallyBalanced(), S.Unmask("max_prob"), S.ReMDM(0.5), S.P2(), S.FirstHitting(),
]  # fmt: skip


def world(seed: int) -> T.Enumeration:
    """A law of two sites: 5 % uniform, 95 % drawn from Dirichlet(1/2)."""
    p0 = 0.05 / V**L + 0.95 * np.random.default_rng(seed).dirichlet(np.full(V**L, 0.5))
    return T.Enumeration(torch.as_tensor(p0), vocab_size=V, length=L)


CONDITIONAL, UNCONDITIONAL = world(1), world(2)


def models(process: dd.Process, predicts: dd.prediction.Predicts = "loo") -> tuple[dd.Denoiser, dd.Denoiser]:
    """The exact denoisers of both worlds."""
    return CONDITIONAL.denoiser(process, predicts), UNCONDITIONAL.denoiser(process, predicts)


def tilted(scale: float) -> Tensor:
    """The law p_c^{1 + w} / p_u^w, normalised."""
    p = CONDITIONAL.p0 ** (1 + scale) * UNCONDITIONAL.p0**-scale
    return p / p.sum()


def law(model: dd.Denoiser, steps: int) -> Tensor:
    """The exact law of ancestral sampling."""
    return T.law(dd.Sampler(model.process, model, S.Ancestral(), steps=steps))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def tv(one: Tensor, other: Tensor) -> str:
    """A TV; what is below rounding is 0."""
    value = T.tv(one, other)
    return "0" if value < 1e-15 else f"{value:.4f}"


def combination(process: dd.Process) -> tuple[float, float]:
    """The largest difference of D combined by hand and D of the combined O: weights (2, -1), and weights (1, 1)."""
    found, z = [], all_states(process.states, L)
    known = ~process.settled(z, torch.full(z.shape, 0.4).double())
    for weights in ((2.0, -1.0), (1.0, 1.0)):
        (c, u), (d_c, d_u) = ([model(z, 0.6) for model in models(process, kind)] for kind in ("loo", "denoiser"))
        by_hand = (weights[0] * d_c.denoiser[known] + weights[1] * d_u.denoiser[known]).softmax(-1)
        found.append(float((by_hand - c.combined([u], weights).denoiser[known].exp()).abs().max()))
    return found[0], found[1]


def laws() -> str:
    """What is exact, and how far samples are from the tilted law, by steps."""
    rows = []
    for name, process in PROCESSES.items():
        c, u = models(process)
        right, wrong = combination(process)
        for scale in (0.0, -1.0):
            assert T.tv(law(dd.classifier_free(c, u, scale), 8), law(c if scale == 0 else u, 8)) <= 1e-15
        ends = [law(dd.classifier_free(c, u, scale), 8) for scale in (0.0, -1.0)]
        exact = [tv(ends[0], law(c, 8)), tv(ends[1], law(u, 8))]
        far = [tv(law(dd.classifier_free(c, u, 1.0), steps), tilted(1.0)) for steps in STEPS]
        assert right < 1e-12
        rows.append([name, f"{right:.0e}", "0" if wrong < 1e-12 else f"{wrong:.2f}", *exact, *far])
    header = ["process", "D against O, weights 2 and -1", "weights 1 and 1", "w = 0", "w = -1"]
    return table([*header, *(f"w = 1, {steps} steps" for steps in STEPS)], rows)


def scales() -> str:
    """How far samples are from the tilted law, by scale, beside one network of the tilted law itself; 64 steps."""
    rows, scales = [], (-0.5, 0.25, 0.5, 1.0, 2.0)
    for name, process in PROCESSES.items():
        c, u = models(process)
        rows.append([name, "guided", *(tv(law(dd.classifier_free(c, u, w), 64), tilted(w)) for w in scales)])
        exact = [T.Enumeration(tilted(w), vocab_size=V, length=L).denoiser(process, "loo") for w in scales]
        one = [tv(law(model, 64), tilted(w)) for model, w in zip(exact, scales, strict=True)]
        rows.append(["", "a network of the tilted law", *one])
    return table(["process", "", *(f"w = {w:g}" for w in scales)], rows)


def calls() -> str:
    """Calls of both networks over 8 steps."""
    rows = []
    for operator in OPERATORS:
        cells = []
        for process in PROCESSES.values():
            try:
                operator.check(process)
            except ValueError:
                cells.append("-")
                continue
            c, u = (
                dd.Denoiser(model.fn, process, "loo", time="alpha", time_dtype=torch.float64, length=L, name=name)
                for model, name in zip(models(process), ("c", "u"), strict=True)
            )
            out = dd.Sampler(process, dd.classifier_free(c, u), operator, steps=8).sample(64, seed=0)
            assert out.nfe == out.calls["c"] + out.calls["u"]
            cells.append(f"{out.calls['c']} and {out.calls['u']}")
        rows.append([f"`{operator}`", *cells])
    return table(["operator", *PROCESSES], rows)


def cost() -> str:
    """Draws from two sources against one, and memory, at the size of a language model."""
    with one_thread():
        found, machine = bench_goals.sums(), bench.machine()
    said = ", ".join(f"{name}: {value}" for name, value in machine.items())
    where = named(bench.Problem(**found["problem"]))
    rows = [
        [f"draws from two sources / draws from one, {where}", "3", f"{found['ratio']:.2f}"],
        [f"elements of a guided step's largest temporary, {where}", f"{2**20:,}", f"{found['elements']:,}"],
    ]
    return f"{said}.\n\n" + table(["figure", "at most", "found"], rows)


TABLES: dict[str, Callable[[], str]] = {"laws": laws, "scales": scales, "calls": calls, "cost": cost}


def main() -> None:
    """Make the tables and write them into the page."""
    text = PAGE.read_text()
    for name, build in TABLES.items():
        made = build()
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=made: m[1] + t + m[2], text, flags=re.S)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
