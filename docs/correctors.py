"""Which correctors keep p_t, by how much the others miss it, and what a call buys: the tables of docs/correctors.md.

python docs/correctors.py     # two minutes
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TIME, DRAWS = 0.4, 200_000
PROCESSES: dict[str, dd.Process] = {
    "masked": dd.Masked(3, dd.Linear()),
    "uniform": dd.Uniform(3, dd.Linear()),
    "marginal": dd.Marginal(torch.tensor([1, 2, 3]).double() / 6, dd.Linear()),
    "hybrid": dd.Hybrid(3, dd.Linear(), p_uniform=0.4),
}
CORRECTORS: list[dd.Operator] = [
    S.Gibbs(), S.Gibbs(scan="systematic"), S.Gibbs(2), S.Gibbs(3),
    *(S.InformedGibbs(rule, exact=True) for rule in ("margin", "max_prob", "current_prob")),
    *(S.InformedGibbs(rule) for rule in ("margin", "max_prob", "current_prob")),
    *(S.LocallyBalanced(balance) for balance in ("barker", "sqrt", "min", "max")), S.TauLocallyBalanced(0.2),
    S.ForwardBackward(0.6), S.ForwardBackward(1.0), S.ForwardBackward(0.6, sites=2), S.TauForwardBackward(0.2),
    S.RePaint(0.6), S.EntropyRedraw(1.0, sites=1), S.EntropyRedraw(1.0), S.Remask(1.0, 1), S.Remask(0.1),
]  # fmt: skip
CALLS = {S.Gibbs(scan="systematic"): 3.0}


def world() -> T.Enumeration:
    """The suite's strongly coupled law of three sites."""
    import problems

    return problems.strong()


def measure(operator: dd.Operator, process: dd.Process) -> tuple[float, float, float, float]:
    """(TV of p_t after one move, TV of the stationary law, probability to move, spectral gap a call), all exact."""
    p = world().marginal(process, TIME)
    k = T.kernel(operator, process, world().denoiser(process, predicts="loo"), t=TIME)
    p, k = p[p > 0], k[p > 0][:, p > 0]
    still = torch.full_like(p, 1 / len(p)) @ torch.linalg.matrix_power(k, 1 << 16)
    size = np.sort(np.abs(scipy.linalg.eigvals(k.numpy())))[-2]
    calls = CALLS.get(operator, operator.nfe)
    assert calls is not None
    return T.tv(p @ k, p), T.tv(still / still.sum(), p), 1 - float((p * k.diagonal()).sum()), (1 - float(size)) / calls


def invariance() -> str:
    """The table of all correctors on all processes."""
    lines = [
        "| corrector | declared | calls | " + " | ".join(PROCESSES) + " |",
        "|---|---|---|" + "---|" * len(PROCESSES),
    ]
    for operator in CORRECTORS:
        cells = []
        for process in PROCESSES.values():
            try:
                operator.check(process)
            except ValueError:
                cells.append("-")
                continue
            once, still, moves, gap = measure(operator, process)
            cells.append(f"{number(once)}, {number(still)}; {moves:.2f}; {gap:.3f}")
        calls = CALLS.get(operator, operator.nfe)
        lines.append(f"| `{short(operator)}` | {operator.invariant} | {calls:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short(operator: dd.Operator) -> str:
    """Without the options that are as usual."""
    return re.sub(r"(, )?(temperature=1.0|exact=False|sites=None)", "", repr(operator))


def number(value: float) -> str:
    """A TV; what is below rounding is 0."""
    return "0" if value < 1e-12 else f"{value:.1e}"


def steps() -> str:
    """KL(p0 || law) against steps, for what the uniform process and its reformulations offer."""
    law, counts = world(), (1, 2, 4, 8, 16, 32)
    uniform, masked, pairs = PROCESSES["uniform"], PROCESSES["masked"], dd.AbsorbingUniform(3, dd.Linear())
    rows: dict[str, Callable[[int], Tensor]] = {}
    for name, process, operator in (
        ("LOO plugged in", uniform, S.Ancestral()), ("maximal coupling", uniform, S.MaximalCoupling()),
        ("absorbing, frozen noise", pairs, S.Ancestral()), ("absorbing, re-noising", pairs, S.Renoising()),
        ("masked", masked, S.Ancestral()), ("LOO, then Gibbs", uniform, S.Ancestral() >> S.Gibbs()),
        ("LOO, then informed, exact", uniform, S.Ancestral() >> S.InformedGibbs(exact=True)),
        ("LOO, then informed, published", uniform, S.Ancestral() >> S.InformedGibbs()),
    ):  # fmt: skip
        model = law.denoiser(process, predicts="loo")
        rows[name] = lambda n, p=process, m=model, o=operator: T.law(dd.Sampler(p, m, o, steps=n))  # type: ignore[misc]
    lines = ["| sampler | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    for name, build in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{T.kl(law.p0, build(n)):.1e}" for n in counts) + " |")
    return "\n".join(lines) + "\n"


def informed() -> str:
    """KL(p_t || law) against calls, from the product of the marginals of p_t."""
    import problems

    process = dd.Uniform(2, dd.Linear())
    laws = {
        "two open slots of ten, t = .02": (problems.slots(10, 1.5, 3.0, 0.0), 0.02),
        "a ring of nine, t = .1": (problems.slots(9, 0.7, 2.5, 0.2), 0.1),
    }
    moves: list[dd.Operator] = [S.Gibbs()]
    moves += [S.InformedGibbs("max_prob", exact=True, temperature=tau) for tau in (1.0, 0.2, 0.05, 0.02)]
    moves += [S.InformedGibbs(rule, exact=True) for rule in ("current_prob", "margin")]
    counts = (4, 8, 16, 32)
    lines = [
        "| law | corrector | " + " | ".join(f"{n} calls" for n in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for name, (law, t) in laws.items():
        p, start = law.marginal(process, t), problems.product_of_marginals(law, process, t)
        lines.append(f"| {name} | none |" + f" {T.kl(p, start):.1e} |" * len(counts))
        for operator in moves:
            k = T.kernel(operator, process, law.denoiser(process, predicts="loo"), t=t)
            assert operator.nfe is not None
            ends = [start @ torch.linalg.matrix_power(k, int(n / operator.nfe)) for n in counts]
            lines.append(f"| | `{short(operator)}` | " + " | ".join(number(max(T.kl(p, q), 0.0)) for q in ends) + " |")
    return "\n".join(lines) + "\n"


def budgets() -> str:
    """KL(p0 || law) within a number of calls, two Gibbs moves after the first steps or after the last ones."""
    law, process, counts = world(), PROCESSES["uniform"], (8, 16, 32, 64)
    model = law.denoiser(process, predicts="loo")
    lines = ["| sampler | " + " | ".join(f"{n} calls" for n in counts) + " |", "|---|" + "---|" * len(counts)]
    rows: dict[str, Callable[[int], dd.Sampler]] = {
        "`Ancestral()`, equal steps": lambda n: dd.Sampler(process, model, S.Ancestral(), steps=n),
    }
    for where in ("first", "last"):
        rows[f"two `Gibbs()` after each of the {where} steps"] = lambda n, w=where: dd.predictor_corrector(  # type: ignore[misc]
            process, model, S.Ancestral(), S.Gibbs(), nfe=n, repeats=2, corrected=w
        )
    for name, build in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{T.kl(law.p0, T.law(build(n))):.1e}" for n in counts) + " |")
    return "\n".join(lines) + "\n"


def diffusers() -> str:
    """diffusers' corrector alone: from exact draws of p_t, TV after one and after 20 sweeps."""
    from peers import ddim_correct

    p = world().marginal(PROCESSES["uniform"], TIME)
    states = torch.cartesian_prod(*[torch.arange(3)] * 3)
    start = states[torch.multinomial(p, DRAWS, True, generator=torch.Generator().manual_seed(0))]
    lines = ["| selection | sites | TV at the start | after 1 | after 20 |", "|---|---|---|---|---|"]
    torch.manual_seed(0)
    for selection in ("random", "lowest_maxprob", "lowest_current_prob", "lowest_log_margin"):
        for sites in (1, 2):
            x, found = start, [distance(start, p)]
            for sweep in range(20):
                x = ddim_correct(selection, sites)(world(), x)
                if sweep in (0, 19):
                    found.append(distance(x, p))
            lines.append(f"| {selection} | {sites} | " + " | ".join(f"{tv:.3f}" for tv in found) + " |")
    return "\n".join(lines) + "\n"


def distance(x: Tensor, p: Tensor) -> float:
    """The TV between draws and a law."""
    count = torch.bincount((x * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    return T.tv(count / count.sum(), p / p.sum())


def main() -> None:
    page = ROOT / "docs" / "correctors.md"
    text = page.read_text()
    tables = {
        "invariance": invariance,
        "informed": informed,
        "steps": steps,
        "budgets": budgets,
        "diffusers": diffusers,
    }
    for name, build in tables.items():
        table = build()
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
    page.write_text(text)


if __name__ == "__main__":
    main()
