"""The tables and pictures of docs/predictors.md: ``python docs/predictors.py`` (half an hour on two cores).

Small: V = L = 3, exact laws by enumeration. Long: a Markov chain with V = 8 and L = 256, whose exact denoiser is known;
what is measured there is how far the mean log p0 of samples lies below the exact one. Both at weak and at strong
coupling. ``--only pages`` writes the page again from the figures that are there.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import discdiff as dd
from discdiff import plots
from discdiff import samplers as S
from discdiff import theory as T

ROOT = Path(__file__).parent.parent
FIGURES, PAGE = ROOT / "docs" / "predictors.json", ROOT / "docs" / "predictors.md"
NFES, WINDOW, DRAWS = [8, 16, 32, 64], (0.95, 0.1), 1024
sys.path.insert(0, str(ROOT / "tests"))

Row = dict[str, Any]

# name -> (operator, denoiser calls a step); None where the number of calls is measured
Sampler = tuple[dd.Operator, int | None]
COMMON: dict[str, Sampler] = {
    "Ancestral": (S.Ancestral(), 1),
    "TauLeaping, last": (S.TauLeaping(), 1),
    "TauLeaping, reject": (S.TauLeaping("reject"), 1),
    "DFM, eta = 0": (S.DFM(), 1),
    "DFM, eta = 2": (S.DFM(2.0), 1),
    "ThetaRK2(0.5)": (S.ThetaRK2(0.5), 2),
    "ThetaRK2(1)": (S.ThetaRK2(1.0), 2),
    "ThetaTrapezoidal(0.5)": (S.ThetaTrapezoidal(0.5), 2),
    "ThetaTrapezoidal(0.33)": (S.ThetaTrapezoidal(1 / 3), 2),
    "Multistep": (S.Multistep(), 1),
    "SplitLeap": (S.SplitLeap(), 2),
    "Ancestral >> Gibbs": (S.Ancestral() >> S.Gibbs(), 2),
    "Ancestral >> Gibbs ** 3": (S.Ancestral() >> S.Gibbs() ** 3, 4),
    "Adaptive(0.3)": (S.Adaptive(0.3), None),
}
SAMPLERS: dict[str, dict[str, Sampler]] = {
    "masked": {
        **COMMON,
        "ReMDM, cap 0.1": (S.ReMDM(0.1), 1),
        "ReMDM, rescale 0.3": (S.ReMDM(0.3, "rescale"), 1),
        "ReMDM, rate 2": (S.ReMDM(2.0, "rate"), 1),
        "Unmask, random": (S.Unmask(), 1),
        "Unmask, max_prob": (S.Unmask("max_prob"), 1),
        "Unmask, entropy": (S.Unmask("entropy"), 1),
        "Unmask, margin": (S.Unmask("margin"), 1),
        "Unmask, max_prob, noise 1": (S.Unmask("max_prob", noise=1.0), 1),
        "Unmask, blocks of 32": (S.Unmask("max_prob", block=32), 1),
        "Unmask, spread": (S.Unmask("spread"), 1),
        "Unmask, draw_first (biased)": (S.Unmask(draw_first=True), 1),
        "P2 (biased)": (S.P2(), 1),
        "Threshold(0.9)": (S.Threshold(0.9), None),
        "EntropyBounded(0.1)": (S.EntropyBounded(0.1), None),
        "KLStable": (S.KLStable(), None),
        "AnyOrder, entropy": (S.AnyOrder("entropy"), None),
        "FirstHitting": (S.FirstHitting(), None),
    },
    "uniform": {
        **COMMON,
        "Euler": (S.Euler(), 1),
        "MaximalCoupling": (S.MaximalCoupling(), 1),
        "Gillespie": (S.Gillespie(), None),
        "Thinning": (S.Thinning(), None),
        "Uniformization": (S.Uniformization(), None),
    },
}
EXACT = 1e-8  # where the picture puts a KL of 0
PROCESSES: dict[str, Callable[[int], dd.Process]] = {
    "masked": lambda v: dd.Masked(v, dd.Linear()),
    "uniform": lambda v: dd.Uniform(v, dd.Linear()),
}


def world(coupling: str) -> T.Enumeration:
    """The small laws: the suite's own."""
    import problems

    return problems.weak() if coupling == "weak" else problems.strong()


def chain(coupling: str) -> T.MarkovChain:
    """A random chain of 256 sites; at weak coupling three quarters of every step are uniform."""
    rng = np.random.default_rng(5)
    transition = rng.dirichlet(np.full(8, 0.3), size=8)
    transition = transition if coupling == "strong" else 0.25 * transition + 0.75 / 8
    return T.MarkovChain(torch.full((8,), 1 / 8), torch.as_tensor(transition), length=256)


def grid(operator: dd.Operator, family: str, steps: int) -> list[float]:
    """Equal steps; what needs finite rates starts a little below t = 1 and ends with a short ancestral step."""
    if family == "uniform" and not operator.enumerable:
        return [1.0, 0.99, 0.95, 0.85, 0.6, 0.3, 0.1, 0.03, 0.01, 0.0]
    return np.linspace(1, 0, steps + 1).tolist()


def small(job: tuple[str, str, str]) -> Row:
    """Exact slopes and divergences at V = L = 3."""
    family, name, coupling = job
    operator, cost = SAMPLERS[family][name]
    law, process = world(coupling), PROCESSES[family](3)
    model = law.denoiser(process, predicts="loo")
    row: Row = {"kind": "small", "family": family, "name": name, "coupling": coupling, "repr": repr(operator)}
    row["declared"] = operator.order
    if cost is None or not operator.enumerable:
        draws = dd.Sampler(process, model, operator, grid=grid(operator, family, 64)).sample(60_000, seed=0)
        count = torch.bincount((draws.tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
        row |= {"tv": [T.tv(count / count.sum(), law.p0)], "nfe": float(draws.nfe_rows.double().mean())}
        return row
    ends = [T.law(dd.Sampler(process, model, operator, steps=nfe // cost)) for nfe in NFES]
    tv, kl = [T.tv(q, law.p0) for q in ends], [T.kl(law.p0, q) for q in ends]
    row |= {"kl": kl, "tv": tv, "end_slope": slope(NFES[1:], tv[1:])}
    if not name.startswith(("Unmask", "P2")):  # which end where they should, not in between
        steps, begin = [16, 32, 64], law.marginal(process, WINDOW[0])
        goal = law.marginal(process, WINDOW[1])
        inner = [
            T.tv(T.law(dd.Sampler(process, model, operator, grid=np.linspace(*WINDOW, n + 1).tolist()), begin), goal)
            for n in steps
        ]
        row["slope"] = slope(steps, inner)
    return row


def slope(steps: list[int], errors: list[float]) -> float | None:
    """Minus the slope of log error against log steps; None where there is no error left."""
    return None if min(errors) < 1e-13 else -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def long(job: tuple[str, str, str]) -> Row:
    """The deficit of the mean log-likelihood at L = 256, in nats, with its standard error."""
    family, name, coupling = job
    operator, cost = SAMPLERS[family][name]
    law, process = chain(coupling), PROCESSES[family](8)
    model, exact = law.to(dtype=torch.float32).denoiser(process, predicts="loo"), law.log_prob_moments()[0]
    row: Row = {"kind": "long", "family": family, "name": name, "coupling": coupling, "repr": repr(operator)}
    found = []
    for nfe in NFES if cost is not None else [256]:
        steps = nfe // (cost or 1)
        sampler = dd.Sampler(process, model, operator, grid=grid(operator, family, steps))
        batch = DRAWS if cost is not None else 64
        draws = sampler.sample(batch, seed=0)
        log_p = law.log_prob(draws.tokens)
        calls = float(draws.nfe_rows.double().mean())
        found.append([calls, exact - float(log_p.mean()), float(log_p.std()) / batch**0.5])
    row["deficit"] = found
    return row


def reference(job: tuple[str, str, str]) -> Row:
    """The joint midpoint method, which moves all sites together: the slope that order 2 has."""
    family, _, coupling = job
    law, process = world(coupling), PROCESSES[family](3)
    begin, goal = law.marginal(process, WINDOW[0]), law.marginal(process, WINDOW[1])
    errors = []
    for n in (8, 16, 32):
        q, times = begin, np.linspace(*WINDOW, n + 1)
        for t, s in itertools.pairwise(times):
            q = q @ T.reversal.joint_midpoint(law, process, float(t), float(s))
        errors.append(T.tv(q, goal))
    found = slope([8, 16, 32], errors)
    return {"kind": "small", "family": family, "name": "joint midpoint", "coupling": coupling, "slope": found}


def peers(job: tuple[str, str, str]) -> Row:
    """Another package's sampler on the small law: chi-square divergence at every NFE, with its standard error."""
    from peers import PEERS, chi_square_divergence

    family, name, coupling = job
    torch.manual_seed(0)
    law, found = world(coupling), []
    for nfe in NFES:
        draws = PEERS[family][name](law, nfe, 200_000)
        found.append(None if draws is None else chi_square_divergence(draws, law))
    return {"kind": "peer", "family": family, "name": name, "coupling": coupling, "chi2": found}


def ours(job: tuple[str, str, str]) -> Row:
    """The same divergence of one of ours, from its exact law."""
    family, name, coupling = job
    operator, cost = SAMPLERS[family][name]
    law, process = world(coupling), PROCESSES[family](3)
    model = law.denoiser(process, predicts="loo")
    laws = [T.law(dd.Sampler(process, model, operator, steps=nfe // (cost or 1))) for nfe in NFES]
    chi2 = [[float(((q - law.p0) ** 2 / law.p0).sum()), 0.0] for q in laws]
    return {"kind": "peer", "family": family, "name": f"discdiff {name}", "coupling": coupling, "chi2": chi2}


def jobs() -> list[tuple[Callable[..., Row], tuple[str, str, str]]]:
    """Everything to be measured, the slow ones first."""
    from peers import PEERS

    found: list[tuple[Callable[..., Row], tuple[str, str, str]]] = []
    for coupling in ("weak", "strong"):
        for family in ("uniform", "masked"):
            found += [(small, (family, name, coupling)) for name in SAMPLERS[family]]
            found += [(reference, (family, "", coupling))]
            found += [(long, (family, name, coupling)) for name in SAMPLERS[family]]
    for family in ("uniform", "masked"):
        found += [(peers, (family, name, "strong")) for name in PEERS[family]]
        mine = ["Ancestral", "SplitLeap", "Ancestral >> Gibbs", "Ancestral >> Gibbs ** 3"]
        found += [
            (ours, (family, name, "strong")) for name in [*mine, *(["Unmask, spread"] if family == "masked" else [])]
        ]
    return found


def run(job: tuple[Callable[..., Row], tuple[str, str, str]]) -> Row:
    """One measurement, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    row = job[0](job[1])
    print(f"{time.perf_counter() - start:6.0f} s  {job[0].__name__} {' '.join(job[1])}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Measure, then write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["all", "pages"], default="all", help="pages: from the committed figures")
    parser.add_argument("--match", default="", help="measure again only what matches this expression")
    arguments = parser.parse_args()
    rows = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    if arguments.only == "all":
        todo = [job for job in jobs() if re.search(arguments.match, f"{job[0].__name__} {' '.join(job[1])}")]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            fresh = pool.map(run, todo, chunksize=1)
        known = {key(row): row for row in [*rows, *fresh]}
        rows = list(known.values()) if arguments.match else fresh
        FIGURES.write_text(json.dumps(rows, indent=1) + "\n")
    pictures(rows)
    text = PAGE.read_text()
    for name, table in tables(rows).items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
    PAGE.write_text(text)


def key(row: Row) -> tuple[object, ...]:
    """What a row is of."""
    return (*(row[name] for name in ("kind", "family", "name", "coupling")), "deficit" in row)


def tables(rows: list[Row]) -> dict[str, str]:
    """The page's tables, by name."""
    found = {}
    for family in SAMPLERS:
        names = [*SAMPLERS[family], "joint midpoint"]
        head = "| sampler | declared | " + " | ".join(
            f"{c}: slope inside, end to end | KL at 8, 16, 32, 64" for c in ("weak", "strong")
        )
        lines = [head + " |", "|---|---|" + "---|---|" * 2]
        for name in names:
            both = [pick(rows, "small", family, name, c) for c in ("weak", "strong")]
            declared = both[0].get("declared")
            cells = [name, "-" if declared is None else f"{declared:g}"]
            for row in both:
                cells.append(", ".join(number(row.get(part), ".2f") for part in ("slope", "end_slope")))
                if "kl" in row:
                    cells.append(", ".join(nats(value) for value in row["kl"]))
                elif "nfe" in row:
                    cells.append(f"TV {row['tv'][0]:.3f} at {row['nfe']:.1f} calls")
                else:
                    cells.append("")
            lines.append("| " + " | ".join(cells) + " |")
        found[f"small {family}"] = "\n".join(lines) + "\n"
        lines = ["| sampler | weak: nats at 8, 16, 32, 64 calls | strong |", "|---|---|---|"]
        for name in SAMPLERS[family]:
            cells = [name]
            for coupling in ("weak", "strong"):
                deficit = pick(rows, "long", family, name, coupling).get("deficit", [])
                values = [f"{gap:.1f} ± {error:.1f}" for _, gap, error in deficit]
                calls = f" at {deficit[0][0]:.0f} calls" if len(deficit) == 1 else ""
                cells.append(", ".join(values) + calls)
            lines.append("| " + " | ".join(cells) + " |")
        found[f"long {family}"] = "\n".join(lines) + "\n"
        lines = ["| sampler | chi-square divergence at 8, 16, 32, 64 calls |", "|---|---|"]
        for row in sorted(
            (r for r in rows if r["kind"] == "peer" and r["family"] == family), key=lambda r: (r["chi2"][1] or [9])[0]
        ):
            values = [
                "-" if one is None else nats(one[0]) if one[1] == 0 else f"{one[0]:.2g} ± {one[1]:.1g}"
                for one in row["chi2"]
            ]
            lines.append(f"| {row['name']} | {', '.join(values)} |")
        found[f"peers {family}"] = "\n".join(lines) + "\n"
    found["half"] = half(rows)
    return found


def half(rows: list[Row]) -> str:
    """Calls that a sampler needs for what Ancestral reaches with 64, by interpolating log KL in log calls."""
    lines = ["| where | goal | Ancestral | first there | calls |", "|---|---|---|---|---|"]
    for family in SAMPLERS:
        for kind, measure in (("small", "KL"), ("long", "nats")):
            for coupling in ("weak", "strong"):
                curves = {name: curve(pick(rows, kind, family, name, coupling)) for name in SAMPLERS[family]}
                goal = curves["Ancestral"][-1][1]
                needs = {
                    name: least(points, goal) for name, points in curves.items() if points and "biased" not in name
                }
                best = min(needs, key=lambda name: needs[name])
                where = f"{family}, {'L = 3' if kind == 'small' else 'L = 256'}, {coupling}"
                calls = f"at most {NFES[0]}" if needs[best] <= NFES[0] else f"{needs[best]:.0f}"
                lines.append(f"| {where} | {goal:.2g} {measure} | 64 | {best} | {calls} |")
    return "\n".join(lines) + "\n"


def curve(row: Row) -> list[tuple[float, float]]:
    """(calls, error) of a row, for those with several numbers of calls."""
    if "kl" in row:
        return list(zip(NFES, row["kl"], strict=True))
    deficit = row.get("deficit", [])
    return [(calls, gap) for calls, gap, _ in deficit] if len(deficit) > 1 else []


def least(points: list[tuple[float, float]], goal: float) -> float:
    """The calls at which a curve first goes below the goal; infinite if it does not."""
    if points[0][1] <= goal:
        return points[0][0]
    for (n, above), (m, below) in itertools.pairwise(points):
        if below <= goal:
            below, above = max(below, 1e-16), max(above, 1e-16)
            part = math.log(above / goal) / math.log(above / below)
            return n * (m / n) ** part
    return math.inf


def pick(rows: list[Row], kind: str, family: str, name: str, coupling: str) -> Row:
    """The row of these, or an empty one."""
    wanted = (kind, family, name, coupling)
    return next((row for row in rows if tuple(row[k] for k in ("kind", "family", "name", "coupling")) == wanted), {})


def number(value: object, form: str) -> str:
    """A figure, or a dash."""
    return f"{value:{form}}" if isinstance(value, float) else "-"


def nats(value: float) -> str:
    """A divergence; what is below rounding is 0."""
    return "0" if abs(value) < 1e-13 else f"{value:.1e}"


def pictures(rows: list[Row]) -> None:
    """Error against calls, for both processes, small and long, at strong coupling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    usual = ["ThetaTrapezoidal(0.5)", "Multistep", "SplitLeap", "Ancestral >> Gibbs"]
    shown = {
        "masked": ["Ancestral", *usual, "ReMDM, cap 0.1", "Unmask, entropy", "Unmask, spread"],
        "uniform": ["Ancestral", "Euler", "MaximalCoupling", *usual, "Ancestral >> Gibbs ** 3"],
    }
    names = list(dict.fromkeys(itertools.chain(*shown.values())))
    looks = {name: {"color": f"C{n}" if n < 10 else "black"} for n, name in enumerate(names)}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (exact, gaps), family in zip(axes, shown, strict=True):
        curves = {name: curve(pick(rows, "small", family, name, "strong")) for name in shown[family]}
        kl = {name: list(zip(*points, strict=True)) for name, points in curves.items() if points}
        plots.kl_against_calls(kl, exact, floor=EXACT, looks=looks).set_title(
            f"{family}, L = 3; 0 is drawn at {EXACT:.0e}"
        )
        exact.get_legend().remove()  # the one on the right serves both
        for name in shown[family]:
            points = curve(pick(rows, "long", family, name, "strong"))
            gaps.plot(*zip(*points, strict=True), marker="o", label=name, **looks[name])
        gaps.set_xscale("log")
        gaps.set_yscale("symlog", linthresh=3.0)
        gaps.set_xticks(NFES, [str(n) for n in NFES])
        gaps.minorticks_off()
        gaps.axhline(0.0, color="grey", linewidth=0.8)  # a perfect sampler is there, give or take the noise
        gaps.set(title=f"{family}, L = 256", xlabel="denoiser calls", ylabel="log-likelihood deficit, nats")
        gaps.set_ylim(bottom=-2.0)
        gaps.grid(alpha=0.3)
        gaps.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(ROOT / "docs" / "predictors.png", dpi=110)


if __name__ == "__main__":
    main()
