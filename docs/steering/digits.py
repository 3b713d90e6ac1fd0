"""Inverse problems on images of digits, by guides, particles and heuristics, against best-of-n; tables and pictures.

    python docs/steering/train_digits.py      # the masked network: ten minutes on one core
    python docs/steering/digits.py            # seven minutes on two cores; docs/steering/digits.json and digits.png
    python docs/steering/digits.py --only pages

An answer is one image for one measurement. Best of 8 takes 120 calls of the network for an answer, each for one image.
Particles that swap tokens take 8,840 likelihoods, so that the best of as many images is shown too. No method takes more
of either, except where its name has a star.
"""

import argparse
import functools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import digit_problems as D  # noqa: E402
from page import table  # noqa: E402

FIGURES, PICTURE = HERE / "digits.json", HERE / "digits.png"
SEEDS, GROUP, STEPS, LONG = 6, 8, 16, 64
POOL = GROUP * (D.LENGTH * len(D.LEVELS) + STEPS + 1)  # as many likelihoods as particles take that swap tokens
ETAS = [0.35] * 4 + [0.3] * 3 + [0.25] * 3 + [0.2] * 2 + [0.15, 0.1]
Row = dict[str, Any]
Figures = dict[str, dict[str, list[Row]]]  # by problem and method, one row for each seed


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers of a method for all true images, and what one of them cost on average.

    Attributes:
        images: (T, 64) grey levels.
        calls: calls of the network, for one image each.
        likelihoods: images whose likelihood was computed.
    """

    images: Tensor
    calls: float
    likelihoods: float


Method = Callable[[D.Problem, int], Answers]


def sampler(model: dd.Denoiser, steps: int = STEPS, operator: dd.Operator | None = None) -> dd.Sampler:
    """Reveal as many pixels in each step as the schedule sets, or go through the steps of a uniform process."""
    operator = operator or (S.Unmask() if model.process.absorbing else S.Ancestral())
    return dd.Sampler(model.process, model, operator, steps=steps)


def key(seed: int, number: int) -> int:
    """The seed of the run for a true image, so that no two images share random numbers."""
    return 10 * seed + number


def each(answer: Callable[[D.Problem, int, int], tuple[Tensor, dd.Samples]]) -> Method:
    """One run for each true image."""

    def method(problem: D.Problem, seed: int) -> Answers:
        found = [answer(problem, number, key(seed, number)) for number in range(len(problem.measurements))]
        images, outs = zip(*found, strict=True)
        calls, likelihoods = (float(np.mean([getattr(out, name) for out in outs])) for name in ("queries", "rewards"))
        return Answers(torch.stack(images), calls / D.LENGTH, likelihoods)

    return method


# --- methods ----------------------------------------------------------------------------------------------------------


@functools.cache
def pool(process: str, count: int, seed: int, operator: dd.Operator | None = None) -> tuple[Tensor, float]:
    """Images without a measurement, and the calls for each."""
    model = sampler(D.network(process), operator=operator)
    parts = [(first, min(512, count - first)) for first in range(0, count, 512)]
    outs = [model.sample(size, D.LENGTH, seed=seed, first_row=first) for first, size in parts]
    return torch.cat([out.tokens for out in outs]), sum(out.queries for out in outs) / D.LENGTH / count


def best_of(n: int, process: str = "masked", operator: dd.Operator | None = None) -> Method:
    """The best of n unguided images; if they are many, all true images choose among the same ones."""

    def method(problem: D.Problem, seed: int) -> Answers:
        number = len(problem.measurements)
        some, calls = pool(process, POOL if n == POOL else n * number, seed, operator)
        some = some.expand(number, -1, -1) if n == POOL else some.view(number, n, -1)
        best = problem.log_likelihood(some).argmax(-1)
        return Answers(some[torch.arange(number), best], n * calls, n)

    return method


def frozen() -> Method:
    """The known pixels are given as a prompt."""
    given = torch.arange(D.LENGTH) < D.LENGTH // 2

    def answer(problem: D.Problem, number: int, seed: int) -> tuple[Tensor, dd.Samples]:
        image = D.truths()[0][number]
        out = sampler(D.network("masked")).sample(1, D.LENGTH, seed=seed, prompt=image, frozen=given)
        return out.tokens[0], out

    return each(answer)


def guided(
    guide: Callable[[dd.Measurement], dd.Guide], rows: int = GROUP, steps: int = STEPS,
    operator: dd.Operator | None = None,
) -> Method:  # fmt: skip
    """The best of some guided images."""

    def answer(problem: D.Problem, number: int, seed: int) -> tuple[Tensor, dd.Samples]:
        measured = problem.measurements[number]
        model = D.network("masked").guided(guide(measured))
        best = dd.best_of(sampler(model, steps, operator).sample(rows, D.LENGTH, seed=seed), measured, n=rows)
        return best.tokens[0], best

    return each(answer)


def weighted(guide: Callable[[D.Problem, int], dd.Guide] | None, rewarded: bool = True) -> Method:
    """One of some weighted images."""

    def answer(problem: D.Problem, number: int, seed: int) -> tuple[Tensor, dd.Samples]:
        model = D.network("masked")
        model = model if guide is None else model.guided(guide(problem, number))
        potential = problem.potentials[number] if rewarded else None
        out = dd.Particles(sampler(model), potential, GROUP).sample(GROUP, D.LENGTH, seed=seed)
        return out.draw(seed)[0], out

    return each(answer)


def constrained() -> Method:
    """One image that has the measured remainders, or the known pixels."""

    def answer(problem: D.Problem, number: int, seed: int) -> tuple[Tensor, dd.Samples]:
        out = sampler(D.network("masked").guided(exactly(problem, number))).sample(1, D.LENGTH, seed=seed)
        return out.tokens[0], out

    return each(answer)


def exactly(problem: D.Problem, number: int) -> dd.Constraint:
    """The measurement without noise, as a constraint."""
    image = D.truths()[0][number]
    return D.same_pixels(image) if problem.name == "inpainting" else D.same_remainders(D.remainders(image))


def variational(steps: int) -> Method:
    """One draw of the product law that is nearest to the posterior."""

    def method(problem: D.Problem, seed: int) -> Answers:
        model, keys = D.network("masked"), [key(seed, number) for number in range(len(problem.measurements))]
        fits = [
            dd.variational_posterior(model, one, length=D.LENGTH, samples=1, steps=steps, seed=own)
            for one, own in zip(problem.measurements, keys, strict=True)
        ]
        costs = (float(np.mean([getattr(fit, name) for fit in fits])) for name in ("sequences", "rewards"))
        return Answers(torch.cat([fit.sample(1, own) for fit, own in zip(fits, keys, strict=True)]), *costs)

    return method


def split_gibbs(proposals: int) -> Method:
    """One image by split Gibbs on the uniform network; all true images in one run."""

    def method(problem: D.Problem, seed: int) -> Answers:
        number = len(problem.measurements)

        def log_likelihood(x: Tensor) -> Tensor:
            return problem.log_likelihood(x[:, None])[:, 0]

        chain = dd.SplitGibbs(sampler(D.network("uniform")), log_likelihood, ETAS, proposals=proposals)
        out = chain.sample(number, D.LENGTH, seed=seed)
        return Answers(out.tokens, out.queries / D.LENGTH / number, out.rewards / number)

    return method


def swap(samples: int) -> Callable[[dd.Measurement], dd.Guide]:
    """The rewards of drawn images with one pixel exchanged."""
    return lambda measured: dd.Reward(measured, samples=samples)


def aps(measured: dd.Measurement) -> dd.Guide:
    """Gradients at the quantised mean."""
    return dd.APS(measured, inner=20)


def mean_field(sweeps: int) -> Callable[[dd.Measurement], dd.Guide]:
    """The mean-field posterior of each prediction."""
    return lambda measured: dd.MeanField(measured, sweeps=sweeps, samples=1)


COMMON: dict[str, Method] = {
    f"best of {GROUP}": best_of(GROUP),
    f"best of {POOL} *": best_of(POOL),
    f"swap, best of {GROUP}": guided(swap(1)),
    "swap, one pixel a step, best of 2": guided(swap(4), rows=2, steps=LONG),
    "particles": weighted(None),
    "swap, particles": weighted(lambda problem, number: swap(1)(problem.measurements[number])),
    f"AnchoredRemask, best of {GROUP}": best_of(GROUP, operator=S.AnchoredRemask()),
    "swap, AnchoredRemask": guided(swap(1), rows=1, operator=S.AnchoredRemask()),
    f"APS, best of {GROUP}": guided(aps),
    f"APS, AnchoredRemask, best of {GROUP}": guided(aps, operator=S.AnchoredRemask()),
    "MeanField, 1 sweep": guided(mean_field(1), rows=1),
    "MeanField, 8 sweeps *": guided(mean_field(8), rows=1),
    "variational_posterior *": variational(20),
    f"uniform: best of {GROUP}": best_of(GROUP, "uniform"),
    "uniform: SplitGibbs": split_gibbs(600),
}
CONSTRAINED: dict[str, Method] = {
    "Constraint": constrained(),
    "Constraint, particles": weighted(exactly, rewarded=False),
}
OWN: dict[str, dict[str, Method]] = {
    "inpainting": {"frozen pixels": frozen(), **CONSTRAINED}, "super-resolution": {}, "row sums modulo 3": CONSTRAINED,
}  # fmt: skip


def methods(problem: str) -> dict[str, Method]:
    """All methods for a problem, by name."""
    return OWN[problem] | COMMON


# --- runs -------------------------------------------------------------------------------------------------------------


def run(job: tuple[str, str, int]) -> Row:
    """The answers of a method for one seed, and their measures."""
    torch.set_num_threads(1)
    name, method, seed = job
    problem, (images, digits) = D.PROBLEMS[name](), D.truths()
    start, clock = time.process_time(), time.perf_counter()
    found = methods(name)[method](problem, seed)
    seconds = (time.process_time() - start) / len(images)
    x = found.images
    distance = (x - images)[:, problem.scored].double().square().mean(-1).sqrt()
    print(f"{time.perf_counter() - clock:5.0f} s  {name}, {method}, seed {seed}", file=sys.stderr, flush=True)
    return {
        "calls": found.calls, "likelihoods": found.likelihoods, "seconds": round(seconds, 3),
        "images": list(map(D.text_of, x)), "error": rounded(problem.errors(x)), "distance": rounded(distance),
        "nats": rounded(D.nats(x)), "same digit": (D.classifier()(x) == digits).long().tolist(),
    }  # fmt: skip


def rounded(values: Tensor) -> list[float]:
    """Numbers with four decimals."""
    return [round(value, 4) for value in values.tolist()]


def measure(match: str) -> None:
    """Run what matches, and keep the figures of everything else."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    jobs = [(name, method, seed) for seed in range(SEEDS) for name in D.PROBLEMS for method in methods(name)]
    jobs = [job for job in jobs if re.search(match, ", ".join(map(str, job)))]
    jobs.sort(key=lambda job: job[1] != f"best of {POOL} *")  # the three problems of a seed share its unguided images
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        rows = dict(zip(jobs, workers.map(run, jobs, chunksize=3), strict=True))
    figures: Figures = {}
    for name in D.PROBLEMS:
        figures[name] = {}
        for method in methods(name):
            old = known.get(name, {}).get(method, [None] * SEEDS)
            figures[name][method] = [rows.get((name, method, seed), old[seed]) for seed in range(SEEDS)]
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


# --- tables and the picture -------------------------------------------------------------------------------------------

MEASURES = {
    "error": "off the measurement",
    "distance": "from the true image",
    "nats": "nats a pixel",
    "same digit": "same digit",
}


NAMES = {  # of the tables
    "inpainting": "digits_inpainting",
    "super-resolution": "digits_super_resolution",
    "row sums modulo 3": "digits_remainders",
}


def baseline(method: str) -> str:
    """What a method is compared with: best-of-n with the same network and the same number of calls."""
    return f"uniform: best of {GROUP}" if method.startswith("uniform") else f"best of {GROUP}"


def means(rows: list[Row], measure: str) -> np.ndarray:
    """The mean of a measure over the true images, for each seed."""
    return np.array([np.mean(row[measure]) for row in rows])


def difference(rows: list[Row], other: list[Row], measure: str) -> tuple[float, float]:
    """Mean difference over seeds, and half its 95 % interval by Student's t of the pairs."""
    apart = means(rows, measure) - means(other, measure)
    half = float(t.ppf(0.975, len(apart) - 1)) * apart.std(ddof=1) / len(apart) ** 0.5
    return float(apart.mean()), half


def values(found: dict[str, list[Row]]) -> str:
    """Costs of an answer, and the means of all measures."""
    lines = []
    for method, rows in found.items():
        spread = D.apart(torch.stack([torch.stack(list(map(D.image_of, row["images"]))) for row in rows]))
        costs = [f"{np.mean([row[cost] for row in rows]):,.0f}" for cost in ("calls", "likelihoods")]
        seconds = f"{np.mean([row['seconds'] for row in rows]):.2f}"
        cells = [f"{means(rows, measure).mean():.2f}" for measure in MEASURES]
        lines.append([method, *costs, seconds, *cells, f"{float(spread):.2f}"])
    return table(["method", "calls", "likelihoods", "seconds", *MEASURES.values(), "between answers"], lines)


def differences(found: dict[str, list[Row]]) -> str:
    """Differences to best-of-n at the same number of calls."""
    lines = []
    for method, rows in found.items():
        if method != baseline(method):
            pairs = [difference(rows, found[baseline(method)], measure) for measure in MEASURES]
            lines.append([method, *(f"{mean:+.2f} ± {half:.2f}" for mean, half in pairs)])
    return table(["method", *MEASURES.values()], lines)


def tables() -> dict[str, str]:
    """The tables of the figures that are stored."""
    figures: Figures = json.loads(FIGURES.read_text())
    made = {}
    for name, found in figures.items():
        made[NAMES[name]] = values(found)
        made[f"{NAMES[name]}_differences"] = differences(found)
    return made


def picture() -> None:
    """The true images, what was measured, and the answers of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures: Figures = json.loads(FIGURES.read_text())
    height = 2 + max(map(len, figures.values()))
    figure, axes = plt.subplots(1, len(figures), figsize=(17, 0.3 * height + 0.5), layout="constrained")
    for axis, (name, found) in zip(axes, figures.items(), strict=True):
        answers = {method: torch.stack(list(map(D.image_of, rows[0]["images"]))) for method, rows in found.items()}
        rows = {"true image": D.truths()[0], "measured": D.observed(D.PROBLEMS[name]()), **answers}
        canvas = np.full((len(rows) * 9 - 1, 10 * 9 - 1), np.nan)
        for line, images in enumerate(rows.values()):
            for column, image in enumerate(images.double().view(-1, D.SIDE, D.SIDE)):
                canvas[9 * line : 9 * line + D.SIDE, 9 * column : 9 * column + D.SIDE] = image
        colours = plt.get_cmap("gray_r").with_extremes(bad="#cfe3f5")
        axis.imshow(canvas, cmap=colours, vmin=0, vmax=16, interpolation="nearest")
        axis.set(title=name, xticks=[], yticks=[9 * line + 3.5 for line in range(len(rows))])
        axis.set_yticklabels(rows)
        axis.tick_params(length=0)
        axis.set_anchor("N")
        axis.spines[:].set_visible(False)
    figure.savefig(PICTURE, dpi=90)


def main() -> None:
    """Measure, unless only the tables and the picture are wanted; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["all", "pages"], default="all", help="pages: from the stored figures")
    parser.add_argument("--match", default="", help="measure again only what matches this expression")
    arguments = parser.parse_args()
    if arguments.only == "all":
        measure(arguments.match)
    picture()
    for name, made in tables().items():
        print(f"{name}\n\n{made}")


if __name__ == "__main__":
    main()
