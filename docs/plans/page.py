"""Write the tables and the picture of docs/plans.md from stored figures: ``python docs/plans/page.py``."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest, t

HERE = Path(__file__).parent
PAGE, PICTURE = HERE.with_suffix(".md"), HERE / "networks.png"
sys.path.insert(0, str(HERE.parent / "steering"))
from page import placed, table  # noqa: E402

SHOWN = {
    "ancestral, 4": "ancestral, 4 calls", "ancestral, 8": "ancestral, 8", "ancestral, 16": "ancestral, 16",
    "ancestral, 64": "ancestral, 64", "found, 8": "found with the judge, 8",
    "reveal spread, 8": "Reveal('spread'), 8", "reveal random, 8": "Reveal('random'), 8",
    "reveal max_prob, 8": "Reveal('max_prob'), 8", "reveal max_prob, 16": "Reveal('max_prob'), 16",
    "unmask spread, 8": "Unmask('spread'), 8", "unmask max_prob, 8": "Unmask('max_prob'), 8",
    "split leap, 8": "SplitLeap, 8", "ancestral and Gibbs, 8 + 8": "a Gibbs call behind every step, 16",
    "Gibbs where the excess is large, 16": "two behind the steps of large excess, 16",
    "Gibbs where the excess is small, 16": "two behind the steps of small excess, 16",
}  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half of its 95 % interval (Student's t)."""
    found = np.asarray(values, dtype=float)
    return float(found.mean()), float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5)


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Return "mean ± half of the interval"."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def apart(one: Sequence[float], other: Sequence[float], digits: int = 3) -> str:
    """Return the interval of the difference, seed by seed."""
    return shown([a - b for a, b in zip(one, other, strict=True)], digits)


def networks() -> dict[str, str]:
    """The tables of networks of digits and text."""
    found = json.loads((HERE / "networks.json").read_text())
    tables, grids = {}, []
    for name, figures in found.items():
        judged, bound = figures["judge"], figures["bound"]
        base = judged["ancestral, 16"]
        rows = [
            [
                "the judge's own data",
                f"{judged['held out']['nats'][0]:.3f}",
                f"{judged['held out']['entropy'][0]:.2f}",
                "",
            ]
        ]
        for key, label in SHOWN.items():
            if key in judged:
                one = judged[key]
                rows.append([label, shown(one["nats"]), f"{np.mean(one['entropy']):.2f}",
                             "" if one is base else apart(one["nats"], base["nats"])])  # fmt: skip
        head = ["sampler, calls", "nats a token, by the judge", "entropy", "nats less those of 16 ancestral calls"]
        tables[name] = table(head, rows)
        eight = bound["8 equal steps"]["nats"]
        grids.append([name] + [apart(bound[key]["nats"], eight, 2)
                               for key in ("grid", "grid and temperature", "16 equal steps")])  # fmt: skip
    head = ["network", "8 steps, measured grid", "and a measured temperature at each step", "16 equal steps"]
    return tables | {"grids": table(head, grids)}


def excess() -> dict[str, str]:
    """The table of excesses."""
    found = json.loads((HERE / "networks.json").read_text())
    times = next(iter(found.values()))["excess"]["times"]
    rows = [[name, *(f"{nats:.1f} ± {1.96 * error:.1f}" for nats, error in
                     zip(one["excess"]["nats"], one["excess"]["error"], strict=True))]
            for name, one in found.items()]  # fmt: skip
    return {"excess": table(["network", *(f"t = {time:g}" for time in times)], rows)}


def antibody() -> dict[str, str]:
    """The tables of the antibody network."""
    found = json.loads((HERE / "antibody.json").read_text())
    bound, domains = found["bound"], found["domains"]
    eight = bound["8 equal steps"]["nats"]
    rows = [
        [name, apart(one["nats"], eight, 2)] for name, one in bound.items() if name not in ("rows", "8 equal steps")
    ]
    drawn = []
    for name, one in domains.items():
        if name == "rows":
            continue
        kept, count = sum(one["kept"]), domains["rows"] * len(one["kept"])
        limits = binomtest(kept, count).proportion_ci(0.95, method="exact")
        drawn.append([name, f"{one['calls']:g}", f"{kept} of {count} ({limits.low:.2f} to {limits.high:.2f})",
                      shown(one["alike"], 2)])  # fmt: skip
    return {
        "antibody bound": table(["steps", "nats a sequence less those of 8 equal steps"], rows),
        "antibody domains": table(["sampler", "calls", "with all residues of the rules", "alike"], drawn),
    }


def picture() -> None:
    """Nats a token against calls, for four networks."""
    found = json.loads((HERE / "networks.json").read_text())
    names = ["text, masked", "text, uniform", "digits, masked", "digits, uniform, a time for every site"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    for ax, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        judged = found[name]["judge"]
        line = [(n, *interval(judged[f"ancestral, {n}"]["nats"])) for n in (4, 8, 16, 32, 64)]
        ax.errorbar(*zip(*line, strict=True), label="Ancestral, equal steps", color="black", capsize=2)
        for select, mark in (("spread", "s"), ("random", "o"), ("max_prob", "^")):
            points = [
                (n, *interval(judged[key]["nats"])) for n in (8, 16) if (key := f"reveal {select}, {n}") in judged
            ]
            if points:
                ax.errorbar(*zip(*points, strict=True), label=f"Reveal({select!r})", marker=mark, capsize=2, ls=":")
        ax.errorbar(
            8, *interval(judged["found, 8"]["nats"]), label="found with the judge", marker="*", ms=11, capsize=2
        )
        ax.set(title=name, xlabel="calls of the network", ylabel="nats a token, by the judge")
        ax.set_xscale("log", base=2)
        ax.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        ax.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=90)


PARTS: tuple[Callable[[], dict[str, str]], ...] = (networks, excess, antibody)


def main() -> None:
    """Put all tables into the page, and draw the picture."""
    for part in PARTS:
        for name, made in part().items():
            PAGE.write_text(placed(PAGE.read_text(), name, made))
    picture()


if __name__ == "__main__":
    main()
