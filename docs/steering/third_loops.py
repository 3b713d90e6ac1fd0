"""Third loops of antibodies that meet conditions, by a network that somebody else trained: data, tables and a logo.

make antibody-loops                           # twenty minutes on two cores
python docs/steering/third_loops.py           # the same, with the extras antibody, demo and steer
"""

import csv
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from loop_methods import (
    BEST,
    CANDIDATES,
    CONSTRAINED,
    METHODS,
    STEERED,
    STEERED_BEST,
    SWAP,
    Design,
    Task,
    alone,
    designed,
    everywhere,
)
from loop_rules import LENGTHS, LETTERS, Framework, frameworks, natural
from scipy.stats import sem, t, ttest_rel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA = Path(__file__).parent / "third_loops"
DESIGNS, NATURAL = DATA / "designs.csv", DATA / "natural.csv"
FASTA, LOGO, PLANE = DATA / "designs.fasta", DATA / "logo.png", DATA / "plane.png"
SEEDS, END, OWN = 5, 5, "their own loops"
# what most natural loops begin and end with
KINDS = {
    "A[RK]...": "A[RK].*",
    "...D.": ".*D.",
    "...[FML]D.": ".*[FML]D.",
}


# --- data -------------------------------------------------------------------------------------------------------------


def made(processes: int, tasks: Sequence[Sequence[Task]]) -> None:
    """Design loops and keep them, with the naturalness of natural ones."""
    start, found = time.monotonic(), list[Design]()
    for number, designs in enumerate(everywhere(designed, tasks, processes), start=1):
        found += designs
        print(f"{number} of {len(tasks)}, {time.monotonic() - start:.0f} s", end="\r", flush=True)
    print()
    names = [one.name for one in frameworks()]
    found.sort(key=lambda one: (names.index(one.framework), one.length, one.seed))
    DATA.mkdir(exist_ok=True)
    _write(DESIGNS, [{**asdict(one), "natural": f"{one.natural:.4f}"} for one in found])
    values = everywhere(alone, natural(), processes)
    _write(
        NATURAL,
        [
            {"framework": one.name, "loop": one.natural, "natural": f"{value:.4f}"}
            for one, value in zip(natural(), values, strict=True)
        ],
    )


def _write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read() -> list[Design]:
    """The designs that are kept, after those of nature as designs of their own frameworks."""
    with NATURAL.open() as file:
        own = [
            Design(OWN, row["framework"], len(row["loop"]), 0, row["loop"], 1, 0, 0, 0, float(row["natural"]))
            for row in csv.DictReader(file)
        ]
    with DESIGNS.open() as file:
        kinds = {field.name: str if field.type in (str, "str") else float for field in fields(Design)}
        kinds |= dict.fromkeys(("length", "seed", "rows", "met", "calls", "rewards"), int)
        rows = [{name: kinds[name](value) for name, value in row.items()} for row in csv.DictReader(file)]
    return own + [Design(**row) for row in rows]


def fasta(designs: Iterable[Design]) -> str:
    """The whole domains of the designs with a constraint and a reward."""
    known = {one.name: one for one in frameworks()}
    return "".join(
        f">{one.framework.replace(' ', '_')}|{one.length}|{one.seed}|{one.method}\n"
        f"{known[one.framework].before}{one.loop}{known[one.framework].after}\n"
        for one in designs
        if one.method in (STEERED, STEERED_BEST)
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def framework_of(design: Design) -> Framework:
    """The framework of a design."""
    return {one.name: one for one in natural()}[design.framework]


MEASURES: dict[str, Callable[[Design], float]] = {
    "meet all": lambda one: float(framework_of(one).meets(one.loop)),
    "reward": lambda one: framework_of(one).reward(one.loop),
    "naturalness": lambda one: one.natural,
}


def apart(loops: Sequence[str]) -> float:
    """The share of places where two loops of one length differ, the mean over all pairs."""
    pairs = list(itertools.combinations(loops, 2))
    return sum(sum(map(str.__ne__, one, other)) / len(one) for one, other in pairs) / len(pairs)


def by(designs: Iterable[Design], *names: str) -> dict[tuple[object, ...], list[Design]]:
    """The designs in groups with the same values of some fields."""
    found: dict[tuple[object, ...], list[Design]] = {}
    for one in designs:
        found.setdefault(tuple(getattr(one, name) for name in names), []).append(one)
    return found


def difference(one: Sequence[float], other: Sequence[float], digits: int = 2) -> str:
    """The mean of paired differences with its interval of 95 %, by Student's t on the differences."""
    gaps = np.subtract(one, other)
    if np.ptp(gaps) < 1e-12:  # no spread, no t
        return f"{gaps.mean():+.{digits}f}"
    interval = ttest_rel(one, other).confidence_interval(0.95)
    return f"{gaps.mean():+.{digits}f} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def blocks(designs: Iterable[Design], measure: Callable[[Design], float]) -> list[float]:
    """The means of a measure over the lengths, for each framework and seed: what differences are paired over."""
    return [float(np.mean([*map(measure, some)])) for some in by(designs, "framework", "seed").values()]


def spreads(designs: Iterable[Design]) -> list[float]:
    """How far apart the loops of the seeds are, for each framework and length."""
    return [apart([one.loop for one in some]) for some in by(designs, "framework", "length").values()]


def results(all_of: Sequence[Design]) -> str:
    """What the designs are, and the differences to both baselines: of equal calls, and of equal rewards too."""
    heads, (first, *measures) = ["method", *MEASURES], MEASURES.values()
    heads += [f"{name}, to {base}" for base in (BEST, "candidates") for name in [*MEASURES][1:]]
    groups, lines = by(all_of, "method"), [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in (OWN, *METHODS):
        designs = groups[method,]
        cells = [f"{sum(map(first, designs)):.0f} of {len(designs)}"]
        cells += [f"{np.mean([*map(measure, designs)]):.2f}" for measure in measures]
        for base in (BEST, CANDIDATES):
            same = method in (OWN, base)
            other = groups[base,]
            cells += ["" if same else difference(blocks(designs, one), blocks(other, one)) for one in measures]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds(all_of: Sequence[Design]) -> str:
    """Diversity and canonical residues."""
    heads = ["method", "distinct", "apart", "difference", *(f"`{kind}`" for kind in KINDS)]
    groups, lines = by(all_of, "method"), [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in (OWN, *METHODS):
        designs = groups[method,]
        loops, cells = [one.loop for one in designs], []
        if method != OWN:  # which are one for each framework
            gap = "" if method == BEST else difference(spreads(designs), spreads(groups[BEST,]))
            cells = [f"{np.mean(spreads(designs)):.2f}", gap]
        shares = [f"{np.mean([bool(re.fullmatch(kind, loop)) for loop in loops]):.2f}" for kind in KINDS.values()]
        cells = [f"{len(set(loops))} of {len(loops)}", *(cells or ["", ""]), *shares]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(all_of: Sequence[Design]) -> str:
    """The network calls and rewards of a design, and the share of the rows behind it that meet the hard conditions."""
    lines = ["| method | calls | rewards | rows that meet all |", "|---|---|---|---|"]
    for (method,), designs in by(all_of, "method").items():
        if method != OWN:
            calls, rewards = (np.mean([getattr(one, name) for one in designs]) for name in ("calls", "rewards"))
            met = sum(one.met for one in designs) / sum(one.rows for one in designs)
            share = "" if method == CANDIDATES else f"{met:.2f}"  # the best one alone is known there
            lines.append(f"| {method} | {calls:,.1f} | {rewards:,.0f} | {share} |")
    return "\n".join(lines)


def given() -> str:
    """The frameworks in full, with the own loop in brackets."""
    lines = ["| framework | domain, its own loop in brackets |", "|---|---|"]
    lines += [f"| {one.name} | `{one.before}[{one.natural}]{one.after}` |" for one in frameworks()]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The tables of the page by name, from the data that are kept."""
    found = read()
    return {
        "antibody_frameworks": given(), "antibodies": results(found), "antibody_kinds": kinds(found),
        "antibody_costs": costs(found),
    }  # fmt: skip


# --- logo -------------------------------------------------------------------------------------------------------------


def heights(loops: Sequence[str]) -> np.ndarray:
    """The heights (2 END, 20) of the letters in bits: of the first and last sites of loops, p_v (log2 20 - entropy)."""
    ends = [loop[:END] + loop[-END:] for loop in loops]
    counts = np.array([[[loop[site] == letter for letter in LETTERS] for loop in ends] for site in range(2 * END)])
    p = counts.mean(1)
    entropy = -(p * np.log2(np.where(p > 0, p, 1))).sum(-1, keepdims=True)
    return p * (np.log2(len(LETTERS)) - entropy)


COLOURS = dict.fromkeys("KRH", "#2158a8") | dict.fromkeys("DE", "#b3261e") | dict.fromkeys("AVILMFWC", "#222222")


def draw(all_of: Sequence[Design]) -> None:
    """Draw the logo and the plane of reward and naturalness."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups, methods = by(all_of, "method"), (OWN, BEST, SWAP, STEERED)
    figure, axes = plt.subplots(len(methods), 1, figsize=(6.4, 7.2), sharex=True, sharey=True)
    for panel, method in zip(axes, methods, strict=True):
        for site, column in enumerate(heights([one.loop for one in groups[method,]])):
            _stack(panel, site + (site >= END), column)
        panel.set(xlim=(-0.2, 2 * END + 1.1), ylim=(0, np.log2(len(LETTERS))), ylabel="bits")
        panel.set_title(method, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    ticks = [site + (site >= END) + 0.45 for site in range(2 * END)]
    axes[-1].set_xticks(ticks, [*range(1, END + 1), *range(-END, 0)])
    axes[-1].set_xlabel("site of the third loop, from its beginning and from its end")
    figure.tight_layout()
    figure.savefig(LOGO, dpi=120, metadata={"Software": None})

    figure, panel = plt.subplots(figsize=(8.4, 4.2))
    pair = MEASURES["reward"], MEASURES["naturalness"]
    for method in METHODS:
        values = [np.array(blocks(groups[method,], one)) for one in pair]
        across, up = (t.ppf(0.975, len(value) - 1) * sem(value) for value in values)
        mark = "o" if method in CONSTRAINED else "s" if method in (BEST, CANDIDATES) else "^"
        panel.errorbar(*map(np.mean, values), yerr=up, xerr=across, marker=mark, ls="", label=method)
    panel.plot(*(np.mean([*map(one, groups[OWN,])]) for one in pair), "kx", label=OWN)
    panel.set(xlabel="reward", ylabel="naturalness, nats a residue")
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(PLANE, dpi=120, metadata={"Software": None})
    plt.close("all")


def _stack(panel: "Axes", left: float, column: np.ndarray) -> None:
    """Draw the letters of a site, the highest on top."""
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    bottom = 0.0
    for height, letter in sorted(zip(column, LETTERS, strict=True)):
        if height >= 0.01:
            path = TextPath((0, 0), letter, size=1)
            box = path.get_extents()
            move = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height / box.height)
            move = move.translate(left, bottom) + panel.transData
            panel.add_patch(PathPatch(path, lw=0, fc=COLOURS.get(letter, "#3a7d44"), transform=move))
            bottom += height


def main() -> None:
    """Design, keep the data, draw the logo, print the tables."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = [[Task(one, n, seed) for seed in range(SEEDS)] for one in frameworks() for n in reversed(LENGTHS)]
    made(int(sys.argv[1]) if len(sys.argv) > 1 else cores, tasks)
    found = read()
    FASTA.write_text(fasta(found))
    draw(found)
    for name, table in tables().items():
        print(f"<!-- {name} -->\n{table}\n<!-- end -->\n")


if __name__ == "__main__":
    main()
