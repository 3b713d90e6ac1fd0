"""Measure what docs/bench.md says and write it there: ``python docs/bench.py``, about ten minutes on two cores.

Figures go to docs/bench/*.json with the machine's description, curves to docs/bench/*.png.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot

from discdiff import bench

HERE = Path(__file__).parent
OURS = ["masked step", "uniform step", "dense pass: read and draw all rows"]


def table(results: Sequence[bench.Result]) -> str:
    """A Markdown table, with every case against the masked step."""
    step = next(result.milliseconds for result in results if result.name == "masked step")
    lines = [
        "| case | ms | reads of the logits | against the masked step | MiB allocated |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.name} | {r.milliseconds:.1f} | {r.reads:.2f} | {r.milliseconds / step:.1f} | {r.peak_mib:.1f} |"
        for r in results
    ]
    return "\n".join(lines)


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


def main() -> None:
    """Measure, write the files and replace the tables of bench.md."""
    torch.manual_seed(0)
    text = (HERE / "bench.md").read_text()
    for name, problem in (
        ("float32", bench.Problem()),
        ("bfloat16", bench.Problem(1, 1024, 126_464, dtype="bfloat16")),
    ):
        results = bench.measure(bench.cases(problem, problem.logits(), peers=name == "float32"), rounds=15)
        record = bench.report(problem, results)
        (HERE / "bench" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        said = ", ".join(f"{key}: {value}" for key, value in bench.machine().items())
        text = f"{head}{begin}\n{said}.\n\n{table(results)}\n{end}{rest.split(end)[1]}"
        (HERE / "bench.md").write_text(text)
    shares = {share: bench.Problem(share=share) for share in (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 0.499)}
    sizes = {v: bench.Problem(vocab=v, length=max(16, 2**24 // v // 8)) for v in (256, 2048, 8192, 32_768, 131_072)}
    lengths = {n: bench.Problem(length=n) for n in (16, 64, 256, 512)}
    batches = {b: bench.Problem(batch=b) for b in (1, 2, 4, 8, 16)}
    sweeps = {}
    for name, label, problems in (
        ("share", "share of the sites that change in the masked step", shares),
        ("vocab", "V, at 16.8 million logits", sizes),
        ("length", "L, at B = 8 and V = 50257", lengths),
        ("batch", "B, at L = 256 and V = 50257", batches),
    ):
        curves = curve(problems)
        sweeps[name] = {"x": list(problems), "reads": curves}
        draw(name, label, curves, list(problems))
        assert all(math.isfinite(y) for values in curves.values() for y in values)
    record = {"machine": bench.machine(), "sweeps": sweeps}
    (HERE / "bench" / "sweeps.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
