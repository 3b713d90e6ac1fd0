"""Measure what docs/bench.md says and write it there: ``python docs/bench.py``, about ten minutes on two cores.

``python docs/bench.py steps`` measures small steps, growth and promises alone (four minutes) and stores the ratios that
``discdiff bench --check`` compares with; ``large`` and ``sweeps`` are the other parts. Figures go to docs/bench/*.json
with the machine's description, curves to docs/bench/*.png.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from discdiff.command import bench, bench_check, bench_goals

HERE = Path(__file__).parent
OURS = ["masked step", "uniform step", "dense pass: read and draw all rows"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words and whose others are figures."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)).replace("| --- |", "|---|")


def large_table(results: Sequence[bench.Result]) -> str:
    """Every case against the masked step."""
    step = next(result.milliseconds for result in results if result.name == "masked step")
    header = ["case", "ms", "reads of the logits", "against the masked step", "MiB allocated"]
    rows = [
        [r.name, f"{r.milliseconds:.1f}", f"{r.reads:.2f}", f"{r.milliseconds / step:.1f}", f"{r.peak_mib:.1f}"]
        for r in results
    ]
    return markdown(header, rows)


def keep(name: str, record: dict[str, Any], body: str | None = None) -> None:
    """Write docs/bench/NAME.json, and what bench.md says between the marks of that name."""
    (HERE / "bench" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if body is not None:
        page = HERE / "bench.md"
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, rest = page.read_text().split(begin)
        said = ", ".join(f"{key}: {value}" for key, value in record["machine"].items())
        page.write_text(f"{head}{begin}\n{said}.\n\n{body}\n{end}{rest.split(end)[1]}")


def steps() -> None:
    """Small steps, growth and promises, and the ratios that are stored."""
    record = bench_goals.figures(told=print)
    tables = [
        f"### {table.title}\n\n{markdown(table.header, table.rows, table.words)}"
        for table in bench_goals.tables(record)
    ]
    keep("steps", record, "\n\n".join(tables))
    bench_check.store()


def large() -> None:
    """One step on large logits."""
    for name, problem in (
        ("float32", bench.Problem()),
        ("bfloat16", bench.Problem(1, 1024, 126_464, dtype="bfloat16")),
    ):
        results = bench.measure(bench.cases(problem, problem.logits(), peers=name == "float32"), rounds=15)
        keep(name, bench.report(problem, results), large_table(results))


def curve(problems: dict[float, bench.Problem]) -> dict[str, list[float]]:
    """Reads of the logits by what is varied, for our own cases."""
    curves: dict[str, list[float]] = {name: [] for name in OURS}
    for problem in problems.values():
        made = bench.cases(problem, problem.logits(), textbook=False)
        kept = {name: run for name, run in made.items() if name in OURS or name.startswith("one read")}
        for result in bench.measure(kept, rounds=7):
            if result.name in curves:
                curves[result.name].append(result.reads)
    return curves


def draw(name: str, label: str, curves: dict[str, list[float]], x: Sequence[float]) -> None:
    """Curves as a picture."""
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for case, y in curves.items():
        axes.plot(x, y, marker="o", label=case)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time / one read of the logits")
    axes.legend(fontsize="small")
    figure.savefig(HERE / "bench" / f"{name}.png", dpi=110)
    pyplot.close(figure)


def sweeps() -> None:
    """Curves by share, vocabulary, length and batch."""
    shares = {share: bench.Problem(share=share) for share in (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 0.499)}
    sizes = {v: bench.Problem(vocab=v, length=max(16, 2**24 // v // 8)) for v in (256, 2048, 8192, 32_768, 131_072)}
    lengths = {n: bench.Problem(length=n) for n in (16, 64, 256, 512)}
    batches = {b: bench.Problem(batch=b) for b in (1, 2, 4, 8, 16)}
    found = {}
    for name, label, problems in (
        ("share", "share of the sites that change in the masked step", shares),
        ("vocab", "V, at 16.8 million logits", sizes),
        ("length", "L, at B = 8 and V = 50257", lengths),
        ("batch", "B, at L = 256 and V = 50257", batches),
    ):
        curves = curve(problems)
        found[name] = {"x": list(problems), "reads": curves}
        draw(name, label, curves, list(problems))
        assert all(math.isfinite(y) for values in curves.values() for y in values)
    keep("sweeps", {"machine": bench.machine(), "sweeps": found})


PARTS = {"steps": steps, "large": large, "sweeps": sweeps}


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
