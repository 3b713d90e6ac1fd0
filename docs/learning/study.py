"""Networks that need fewer calls, on digits, text and Sudoku: ``python docs/learning/study.py``; study.json.

Every job begins with a kept network and trains it on with five seeds, each for the same number of steps and rows:

* plain: its own bound. The comparison at equal entropy needs its samples at several temperatures.
* forward_kl, jsd, reverse_kl: ``dd.learning.Consistency``; distilled: the same with the kept network as teacher.
* reflow: students of a teacher on uniform noise, on its pairs or on the same sequences in random pairs.
* rewarded: ``dd.learning.PolicyGradient`` on Sudoku; see rewards.py.

A job's figures are stored when it ends. Two processes may run different jobs at once.
"""

import argparse
import fcntl
import functools
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import discdiff as dd
from discdiff import losses
from discdiff import samplers as S
from discdiff.adapters.own import load_trained, load_written
from discdiff.demo.models import build
from discdiff.learning.objectives import Loss
from discdiff.prediction import Truncation

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "parameterisations")]
import networks  # noqa: E402
import rewards  # noqa: E402
import sudoku  # noqa: E402

L = dd.learning
FIGURES = HERE / "study.json"
CALLS, SEEDS, FEW, MANY = (1, 2, 4, 8, 16, 32), 5, 4, 16
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3)  # of the plain network at MANY calls
COLD = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # those of Sudoku, whose law is uniform and hardly changes with a temperature
STEP = (0.5, 0.05)  # t - s of the consistency losses, at the first and the last step
PATHS, ANCHOR, ANNEAL = 2, 0.25, 0.3


# --- data sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A data set: its networks, its measure, and how much is trained and sampled."""

    name: str
    length: int
    steps: int  # of every further training
    batch: int
    rows: int  # samples of a figure
    pairs: int
    masked: Callable[[], dd.Denoiser]
    uniform: Callable[[], dd.Denoiser]
    small: Callable[[], dd.Denoiser]  # the smaller student, with fresh weights
    draw: Callable[[torch.Generator], Tensor]
    measure: Callable[[Tensor], dict[str, float]]
    quality: str  # the figure that is compared
    kinds: tuple[str, ...]  # consistency losses
    temperatures: tuple[float, ...] = TEMPERATURES
    rate: float = 5e-4


def trainable(path: str) -> dd.Denoiser:
    """A kept network of another study."""
    model = load_trained(HERE.parent / f"{path}.safetensors")
    assert isinstance(model.fn, nn.Module)
    model.fn.requires_grad_(True)
    return model


def smaller(path: str) -> dd.Denoiser:
    """A fresh network like a kept one, of half its width and half its depth."""
    card = load_written(HERE.parent / f"{path}.safetensors")[1]
    return build(replace(card, width=card.width // 2, depth=card.depth // 2))[1]


@functools.cache
def judge(data: str) -> networks.Judge:
    """The autoregressive network that has seen the other half of the data."""
    return networks.judge(data).requires_grad_(False)


def judged(data: str, tokens: Tensor) -> dict[str, float]:
    """Nats a token under the judge, and nats of the frequencies of tokens within a sequence."""
    return {"nats": float(judge(data)(tokens).mean()), "entropy": dd.plans.Judge.entropy(tokens)}


def ruled(side: int, tokens: Tensor) -> dict[str, float]:
    """The share of solved grids, the symbols that a grid lacks, and how much the grids differ.

    Of side 4 the entropy is -log of the probability that two solved grids are equal (collision entropy, unbiased in the
    probability), at most log 288 = 5.66 nats. Of side 6 equal grids are too rare; it is the entropy of the law of a
    cell, averaged over the cells of all samples, solved or not, at most log 6 = 1.79 nats.
    """
    right = sudoku.solved(tokens, side)
    good = tokens[right]
    found = {"solved": float(right.double().mean()), "lacks": float(sudoku.violations(tokens, side).double().mean())}
    _, counts = torch.unique(good, dim=0, return_counts=True)
    found["distinct"] = len(counts) / max(1, len(good))
    if side == 4:
        met = float((counts * (counts - 1)).sum()) / max(1, len(good) * (len(good) - 1))
        return found | {"entropy": -math.log(met) if met else math.log(max(1, len(good))), "grids": len(counts)}
    cells = torch.nn.functional.one_hot(tokens, side).double().mean(0)
    return found | {"entropy": float(-torch.special.xlogy(cells, cells).sum(-1).mean())}


def puzzle(side: int, steps: int, batch: int, rows: int, pairs: int) -> Data:
    """The Sudoku grids of a side."""
    name = f"sudoku{side}"
    return Data(
        name, side * side, steps, batch, rows, pairs,
        masked=lambda: sudoku.load(f"{name}-masked")[1],
        uniform=lambda: sudoku.load(f"{name}-uniform")[1],
        small=lambda: sudoku.fresh(f"{name}-uniform", sudoku.WIDTH[side] // 2, sudoku.DEPTH[side] // 2)[1],
        draw=functools.partial(sudoku.batches, side, batch),
        measure=functools.partial(ruled, side),
        quality="solved",
        kinds=("forward_kl", "jsd", "reverse_kl", "distilled"),
        temperatures=COLD,
    )  # fmt: skip


def half(data: str, masked: str, steps: int, batch: int, rows: int, pairs: int) -> Data:
    """Digits or text, of the half that the judge has not seen."""
    uniform = f"parameterisations/{data}-denoiser"
    return Data(
        data, networks.size(data)[1], steps, batch, rows, pairs,
        masked=functools.partial(trainable, masked),
        uniform=functools.partial(trainable, uniform),
        small=functools.partial(smaller, uniform),
        draw=lambda generator: networks.batches(data, 0)(generator)[:batch],
        measure=functools.partial(judged, data),
        quality="nats",
        kinds=("forward_kl", "jsd"),
    )  # fmt: skip


def sets(tiny: bool) -> dict[str, Data]:
    """The data sets by name."""
    found = [
        half("digits", "steering/digits-masked", steps=400, batch=64, rows=512, pairs=4096),
        half("text", "blockgen/whole-masked", steps=250, batch=16, rows=128, pairs=1024),
        puzzle(4, steps=600, batch=64, rows=2048, pairs=8192),
        puzzle(6, steps=500, batch=64, rows=1024, pairs=4096),
    ]
    if tiny:
        found = [replace(one, steps=2, batch=4, rows=8, pairs=8) for one in found]
    return {one.name: one for one in found}


# --- training and figures -------------------------------------------------------------------------------------------


def trained(
    data: Data, model: dd.Denoiser, loss: Loss, draw: Callable[[torch.Generator], Tensor], seed: int,
    rate: float | None = None, steps: int | None = None,
) -> dd.Denoiser:  # fmt: skip
    """Train a model on by a loss; the weights are averaged over about the last fifth of the steps."""
    assert isinstance(model.fn, nn.Module)
    steps = steps or data.steps
    trainer = dd.Trainer(
        model.fn, model.process, loss, draw, predicts="denoiser", time=model.call.time, rate=rate or data.rate,
        warmup=steps // 10, ema=1 - 10 / (steps + 10), seed=seed, progress=False,
    )  # fmt: skip
    return trainer.fit(steps)


def figures(
    data: Data, model: dd.Denoiser, operator: dd.Operator, seed: int, temperatures: tuple[float, ...] = ()
) -> dict[str, Any]:
    """The measure of samples at 1 to 32 calls, and at other temperatures with 16 calls.

    Of Sudoku there are more samples at few calls, of which few are solved.
    """

    def at(model: dd.Denoiser, calls: int) -> dict[str, float]:
        sampler = dd.Sampler(model.process, model, operator, steps=calls)
        rows = data.rows * (min(4, max(1, MANY // calls)) if data.quality == "solved" else 1)
        return data.measure(sampler.sample(rows, data.length, seed=100 + seed).tokens)

    found: dict[str, Any] = {"calls": {str(calls): at(model, calls) for calls in CALLS}}
    tempered = {T: model.guided(Truncation(temperature=T)) if T != 1 else model for T in temperatures}
    found["temperatures"] = {str(T): at(one, MANY) for T, one in tempered.items()}
    return found


def loss_of(kind: str, model: dd.Denoiser, plain: dd.Denoiser) -> Loss:
    """The loss of a kind of training."""
    if kind == "plain":
        return losses.MaskedNELBO()
    distilled = kind == "distilled"
    divergence: Any = "forward_kl" if distilled else kind
    return L.Consistency(
        model.process, divergence=divergence, paths=PATHS, step=STEP, anchor=ANCHOR,
        teacher=plain if distilled else None,
    )  # fmt: skip


def masked_job(data: Data, kind: str, seeds: int) -> dict[str, Any]:
    """Train on by one loss, with each seed; the kept network's own figures beside it if the loss is the plain one."""
    found: dict[str, Any] = {"steps": data.steps, "batch": data.batch, "rows": data.rows, "seeds": [], "seconds": []}
    tempered = data.temperatures if kind == "plain" else ()
    if kind == "plain":
        found["kept"] = [figures(data, data.masked(), S.Ancestral(), seed) for seed in range(min(2, seeds))]
    for seed in range(seeds):
        begin, model = time.perf_counter(), data.masked()
        learned = trained(data, model, loss_of(kind, model, data.masked()), data.draw, seed)
        found["seconds"].append(round(time.perf_counter() - begin, 1))
        found["seeds"].append(figures(data, learned, S.Ancestral(), seed, tempered))
    return found


def reflow_job(data: Data, seeds: int) -> dict[str, Any]:
    """Students of the teacher on uniform noise: of its size and a smaller one, on its pairs and on random pairs."""
    operator, teacher = S.MaximalCoupling(), data.uniform()
    begin = time.perf_counter()
    pairs = L.reflow(dd.Sampler(teacher.process, teacher, operator, steps=64), data.pairs, length=data.length, seed=7)
    found: dict[str, Any] = {
        "steps": data.steps, "batch": data.batch, "rows": data.rows, "pairs": len(pairs),
        "pairs, seconds": round(time.perf_counter() - begin, 1), "of pairs": data.measure(pairs.x0),
        "weights": {}, "teacher": [figures(data, teacher, operator, seed) for seed in range(min(2, seeds))],
    }  # fmt: skip
    for size, make, rate, steps in (
        ("same size", data.uniform, data.rate, data.steps),
        ("small", data.small, 2e-3, 2 * data.steps),
    ):
        if data.name == "text" and size == "small":  # it would need more time than the study has
            continue
        for kind in ("reflowed", "random pairs"):
            rows: list[dict[str, Any]] = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make()
                assert isinstance(model.fn, nn.Module)
                found["weights"][size] = sum(part.numel() for part in model.fn.parameters())
                some, anneal = (pairs, ANNEAL) if kind == "reflowed" else (pairs.shuffled(seed), 0.0)
                learned = trained(data, model, L.Reflow(anneal=anneal), some.batches(data.batch), seed, rate, steps)
                rows.append(figures(data, learned, operator, seed))
            found[f"{kind}, {size}"] = rows
    return found


# --- what follows from the figures ----------------------------------------------------------------------------------


def at_entropy(data: str, row: dict[str, Any], entropy: float) -> tuple[float, bool]:
    """The plain network's best quality at 16 calls and at least an entropy, over temperatures and between them.

    If no temperature has that entropy, it is the quality at the largest one, and the second value is True.
    """
    sudokus = data.startswith("sudoku")
    quality, best = ("solved", max) if sudokus else ("nats", min)
    by_temperature = sorted((float(T), one) for T, one in row["temperatures"].items())
    found = [(one["entropy"], one[quality]) for _, one in by_temperature]
    able = [level for other, level in found if other >= entropy]
    if not able:
        return max(found)[1], True
    for (left, one), (right, two) in itertools.pairwise(found):
        if min(left, right) < entropy < max(left, right):
            able.append(one + (two - one) * (entropy - left) / (right - left))
    return best(able), False


def interval(values: list[float]) -> dict[str, Any]:
    """The mean and its 95 % interval by Student's t."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "values": values}


def compared(found: dict[str, Any], few: int = FEW) -> dict[str, Any]:
    """Quality of each consistent network at few calls minus the plain network's at 16 calls and the same entropy."""
    out: dict[str, Any] = {}
    for name, job in found.items():
        data, _, kind = name.partition(": ")
        if kind not in ("forward_kl", "jsd", "reverse_kl", "distilled") or f"{data}: plain" not in found:
            continue
        quality = "solved" if data.startswith("sudoku") else "nats"
        plain = found[f"{data}: plain"]["seeds"]
        pairs = list(zip(job["seeds"], plain, strict=False))
        if len(pairs) < 2:
            continue
        mine = [row["calls"][str(few)] for row, _ in pairs]
        there = [at_entropy(data, base, one["entropy"]) for one, (_, base) in zip(mine, pairs, strict=True)]
        same = [one[quality] - base["calls"][str(few)][quality] for one, (_, base) in zip(mine, pairs, strict=True)]
        out[name] = {
            "figure": quality,
            "minus plain at 16 calls, equal entropy": interval(
                [one[quality] - level for one, (level, _) in zip(mine, there, strict=True)]
            ),
            "entropies outside the plain network's": sum(outside for _, outside in there),
            f"minus plain at {few} calls": interval(same),
            "entropy": float(np.mean([one["entropy"] for one in mine])),
        }
    return out


def store(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Write the figures of a job into the file; another process may do the same at once."""
    with (Path(tempfile.gettempdir()) / f"{path.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(path.read_text()) if path.exists() else {}
        found[name] = figures
        found["compared"] = compared(found)
        path.write_text(json.dumps(found, indent=1) + "\n")


def jobs(tiny: bool) -> dict[str, Callable[[int], dict[str, Any]]]:
    """All jobs by name; each takes the number of seeds."""
    found: dict[str, Callable[[int], dict[str, Any]]] = {}
    for name, data in sets(tiny).items():
        for kind in ("plain", *data.kinds):
            found[f"{name}: {kind}"] = functools.partial(masked_job, data, kind)
        found[f"{name}: reflow"] = functools.partial(reflow_job, data)
    return found | rewards.jobs(tiny)


def main() -> None:
    """Run the jobs that match, and store their figures one by one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only jobs whose name matches this expression")
    parser.add_argument("--tiny", action="store_true", help="see that it runs")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--list", action="store_true", help="name the jobs")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = arguments.seeds or (2 if arguments.tiny else SEEDS)
    for name, job in jobs(arguments.tiny).items():
        if not re.search(arguments.match, name):
            continue
        if not arguments.list:
            begin = time.perf_counter()
            found = job(seeds)
            store(arguments.out, name, found | {"all, seconds": round(time.perf_counter() - begin, 1)})
            print(f"{time.perf_counter() - begin:7.1f} s  ", end="", file=sys.stderr)
        print(name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
