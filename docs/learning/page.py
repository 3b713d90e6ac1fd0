"""Write the tables and the picture of docs/learning.md from stored figures: ``python docs/learning/page.py``."""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t

HERE = Path(__file__).parent
PAGE, PICTURE, FIGURES = HERE.with_suffix(".md"), HERE / "study.png", HERE / "study.json"
sys.path.insert(0, str(HERE.parent / "steering"))
from page import placed, table  # noqa: E402

CALLS = (1, 2, 4, 8, 16, 32)
DATA = {"digits": "nats", "text": "nats", "sudoku4": "solved", "sudoku6": "solved"}
KINDS = {
    "plain": "plain", "forward_kl": "consistent, forward KL", "jsd": "consistent, JSD",
    "reverse_kl": "consistent, reverse KL", "distilled": "distilled",
}  # fmt: skip
STUDENTS = ("teacher", "reflowed, same size", "random pairs, same size", "reflowed, small", "random pairs, small")


def figures() -> dict[str, Any]:
    """The stored figures of all jobs."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return found


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Return "mean ± half of the 95 % interval" over training seeds (Student's t)."""
    found = np.asarray(values, dtype=float)
    half = float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5)
    return f"{found.mean():.{digits}f} ± {half:.{digits}f}"


def line(name: str, rows: Sequence[dict[str, Any]], quality: str) -> list[str]:
    """A row of a table: the quality at each number of calls, and the mean entropy behind it."""
    cells = []
    for calls in CALLS:
        entropy = np.mean([row["calls"][str(calls)]["entropy"] for row in rows])
        cells.append(f"{shown([row['calls'][str(calls)][quality] for row in rows])} ({entropy:.2f})")
    return [name, *cells]


def networks() -> dict[str, str]:
    """One table for each data set: consistent networks beside plain ones."""
    found, tables = figures(), {}
    head = ["network", *(f"{calls} call{'s' * (calls > 1)}" for calls in CALLS)]
    for data, quality in DATA.items():
        rows = [line(label, found[f"{data}: {kind}"]["seeds"], quality)
                for kind, label in KINDS.items() if f"{data}: {kind}" in found]  # fmt: skip
        if rows:
            tables[data] = table(head, rows)
    return tables


def few() -> dict[str, str]:
    """Four calls of a consistent network less sixteen calls of the plain one at the same entropy."""
    found, rows = figures()["compared"], []
    for data, kind in itertools.product(DATA, KINDS):
        if (one := found.get(f"{data}: {kind}")) is None:
            continue
        cells = (one["minus plain at 16 calls, equal entropy"], one["minus plain at 4 calls"])
        what = "nats a token, less is better" if one["figure"] == "nats" else "share solved, more is better"
        rows.append([data, KINDS[kind], what, *(shown(cell["values"], 3) for cell in cells)])
    head = ["data", "network", "figure", "its 4 calls less 16 plain calls of equal entropy", "less 4 plain calls"]
    return {"few": table(head, rows)}


def students() -> dict[str, str]:
    """Students of pairs."""
    found, tables = figures(), {}
    head = ["network", *(f"{calls} call{'s' * (calls > 1)}" for calls in CALLS)]
    for data, quality in DATA.items():
        if f"{data}: reflow" in found:
            job = found[f"{data}: reflow"]
            tables[f"{data}, reflow"] = table(head, [line(one, job[one], quality) for one in STUDENTS if one in job])
    return tables


def rewards() -> dict[str, str]:
    """Policies of Sudoku 4: before and after."""
    rows, exact = [], []
    for name, job in figures().items():
        if not name.startswith("sudoku4: rewarded"):
            continue
        label = name.removeprefix("sudoku4: rewarded, ")
        if "after" in job:
            digits = {"solved": 3, "path KL": 2, "collision": 4}
            before, after = (
                [shown([row[key] for row in job[when]], n) for key, n in digits.items()] for when in ("before", "after")
            )
            rows.append([label, before[0], after[0], after[1], before[2], after[2]])
        else:
            for penalty, found in job.items():
                if penalty.startswith("penalty"):
                    exact.append([penalty.removeprefix("penalty "), *(shown([row[key] for row in found], 3) for key in
                                  ("solved before", "solved after", "KL", "path KL"))])  # fmt: skip
    head = ["training", "solved before", "solved after", "KL of runs to the reference, nats",
            "chance that two solved grids are equal, before", "after"]  # fmt: skip
    other = ["weight of the KL", "solved before", "solved after", "exact KL of the answers", "KL of the runs"]
    return {"rewards": table(head, rows), "rewards, exact": table(other, exact)}


def picture() -> None:
    """Quality and entropy against calls."""
    found = figures()
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    kept = {data: quality for data, quality in DATA.items() if f"{data}: plain" in found}
    axes = figure.subplots(2, len(kept))
    for column, (data, quality) in enumerate(kept.items()):
        for row, key in enumerate((quality, "entropy")):
            ax = axes[row, column]
            for kind, label in KINDS.items():
                if (job := found.get(f"{data}: {kind}")) is None:
                    continue
                shown_calls = CALLS[2:] if (key, quality) == ("entropy", "solved") else CALLS  # of too few solved grids
                values = [[one["calls"][str(calls)][key] for one in job["seeds"]] for calls in shown_calls]
                half = [t.ppf(0.975, len(one) - 1) * np.std(one, ddof=1) / len(one) ** 0.5 for one in values]
                ax.errorbar(shown_calls, np.mean(values, axis=1), half, label=label, capsize=2, marker=".",
                            color="black" if kind == "plain" else None)  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_xticks(CALLS, map(str, CALLS))
            ax.set(ylabel={"nats": "nats a token, by the judge", "solved": "share of solved grids"}.get(key, "entropy"))
            if row == 0:
                ax.set_title(data)
            else:
                ax.set_xlabel("calls of the network")
        axes[0, column].legend(fontsize=7)
    figure.savefig(PICTURE, dpi=90)


PARTS: tuple[Callable[[], dict[str, str]], ...] = (networks, few, students, rewards)


def main() -> None:
    """Put all tables into the page, and draw the picture."""
    for part in PARTS:
        for name, made in part().items():
            PAGE.write_text(placed(PAGE.read_text(), name, made))
    picture()


if __name__ == "__main__":
    main()
