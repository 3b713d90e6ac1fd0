r"""What a uniform denoiser should predict, and what sampler goes with it: samples, judges, writes the page.

    python docs/parameterisations/networks.py       # trains 9 denoisers and 2 judges: 50 minutes of two cores
    python docs/parameterisations.py                # samples and their quality: an hour of two cores
    python docs/parameterisations.py --only pages   # docs/parameterisations.md and .png from the figures

Three networks of the same size on the same noise: one trained by the plug-in bound, which learns the leave-one-out O;
one trained by cross-entropy, which learns the denoiser D; one trained by the bound of the absorbing reformulation.
Three kinds of data: a Markov chain, whose likelihood is known; digits and text, which an autoregressive network judges
that was trained on the half of the data that no denoiser saw.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import discdiff as dd
from discdiff import plots
from discdiff import samplers as S
from discdiff.adapters.own import load_trained
from discdiff.losses import base as losses

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "parameterisations"))
from networks import BATCH, DATA, LOSSES, WEIGHTS, batches, chain, judge, size  # noqa: E402

FIGURES, PAGE = ROOT / "parameterisations.json", ROOT / "parameterisations.md"
NFES, SEEDS = (8, 16, 32, 64, 128, 256), 5
ROWS = {"chain": 128, "digits": 96, "text": 24}  # a seed
COLD = dd.Truncation(temperature=0.8)
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def corrected(corrector: Callable[[int], dd.Operator]) -> Callable[[dd.Denoiser, int, int], dd.Sampler]:
    """The published schedule: two corrector moves, of a sixteenth of the sites each, after all but the last steps."""
    return lambda model, nfe, length: dd.predictor_corrector(
        model.process, model, S.Ancestral(), corrector(length // 16), nfe=nfe, repeats=2
    )


def plain(operator: dd.Operator) -> Callable[[dd.Denoiser, int, int], dd.Sampler]:
    """Equal steps."""
    return lambda model, nfe, length: dd.Sampler(model.process, model, operator, steps=nfe)


SAMPLERS: dict[tuple[str, str], Callable[[dd.Denoiser, int, int], dd.Sampler]] = {
    ("loo", "ancestral"): plain(S.Ancestral()),
    ("loo", "informed PC"): corrected(lambda sites: S.InformedGibbs("margin", sites=sites)),
    ("loo", "random PC"): corrected(lambda sites: S.Gibbs(sites)),
    ("loo", "ancestral, T = 0.8"): lambda model, nfe, length: plain(S.Ancestral())(model.guided(COLD), nfe, length),
    ("denoiser", "ancestral"): plain(S.Ancestral()),
    ("denoiser", "informed PC"): corrected(lambda sites: S.InformedGibbs("margin", sites=sites)),
    ("denoiser called LOO", "ancestral"): plain(S.Ancestral()),
    ("absorbing", "ancestral"): plain(S.Ancestral()),
    ("absorbing", "re-noising"): plain(S.Renoising()),
}


def denoiser(data: str, kind: str) -> dd.Denoiser:
    """The trained one; one kind is the cross-entropy network under the wrong name."""
    model = load_trained(WEIGHTS / f"{data}-{kind.split()[0]}.safetensors")
    if kind == "denoiser called LOO":
        model.predicts = "loo"
    return model


def quality(data: str, tokens: Tensor) -> tuple[float, float]:
    """(nats a token under the chain or the judge, entropy in nats).

    The chain's entropy is that of a token given the one before it, over all sequences; elsewhere it is that of the
    tokens within a sequence, averaged, as the field reports it.
    """
    if data == "chain":
        pairs = torch.bincount((tokens[:, :-1] * 8 + tokens[:, 1:]).flatten(), minlength=64).double().view(8, 8)
        p = pairs / pairs.sum()
        given = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        return float(-chain().log_prob(tokens).mean() / 64), float(-torch.special.xlogy(p, given).sum())
    with torch.no_grad():
        nats = judge(data)(tokens).mean()
    counts = torch.nn.functional.one_hot(tokens, size(data)[0]).double().mean(1)
    return float(nats), float(torch.special.entr(counts).sum(-1).mean())


def held_out(data: str, count: int) -> Tensor:
    """Data that no denoiser saw: the judge's half, or fresh draws."""
    draw, generator = batches(data, 1), torch.Generator().manual_seed(99)
    return torch.cat([draw(generator) for _ in range(-(-count // BATCH[data]))])[:count]


def sample_one(job: tuple[str, str, str, int]) -> dict[str, object]:
    """Quality and entropy of a sampler at a number of calls, for every seed."""
    torch.set_num_threads(1)
    data, kind, name, nfe = job
    model, length, start = denoiser(data, kind), size(data)[1], time.perf_counter()
    sampler = SAMPLERS[kind, name](model, nfe, length)
    outs = [sampler.sample(ROWS[data], length, seed=seed) for seed in range(SEEDS)]
    found = [quality(data, out.tokens) for out in outs]
    print(f"{time.perf_counter() - start:5.0f} s  {', '.join(map(str, job))}", file=sys.stderr, flush=True)
    row: dict[str, object] = {"data": data, "kind": kind, "sampler": name, "nfe": nfe, "found": found}
    return row | {"repr": repr(sampler.operator), "made": max(out.nfe for out in outs)}


def judge_networks(data: str) -> dict[str, object]:
    """What the data itself scores; the networks' bounds on held-out data, in nats a token, and their sensitivity.

    Of the chain it is the excess of the bound over -log p0.
    """
    torch.set_num_threads(1)
    seen = batches(data, 0)
    reference = quality(data, torch.cat([seen(torch.Generator().manual_seed(n)) for n in range(32)]))
    bounds, looks, x0 = {}, {}, held_out(data, 256)
    for kind in LOSSES:
        model = denoiser(data, kind)
        objective = losses.AbsorbingNELBO() if kind == "absorbing" else losses.UniformNELBO()
        estimate = objective.estimate(model, x0, draws=16, seed=0)
        value = (estimate.value + chain().log_prob(x0) if data == "chain" else estimate.value) / x0.shape[1]
        bounds[kind] = [float(value.mean()), float(value.std() / len(value) ** 0.5)]
    for kind in ("loo", "denoiser"):
        curves = dd.diagnostics.sensitivity_curve(denoiser(data, kind), x0, ALPHAS)
        looks[kind] = {read: curve.tolist() for read, curve in curves.items()}
    return {"data": data, "reference": reference, "bounds": bounds, "sensitivity": looks}


def measure(match: str) -> None:
    """Sample and judge whatever matches; figures of other jobs are kept."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"samples": [], "networks": {}}
    jobs = [(data, *pair, nfe) for data in DATA for nfe in reversed(NFES) for pair in SAMPLERS]
    jobs = [job for job in jobs if re.search(match, ", ".join(map(str, job)))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        fresh = pool.map(sample_one, jobs, chunksize=1)
        networks = pool.map(judge_networks, [data for data in DATA if re.search(match, data)], chunksize=1)
    rows = {tuple(row[name] for name in ("data", "kind", "sampler", "nfe")): row for row in [*known["samples"], *fresh]}
    known["networks"] |= {row["data"]: row for row in networks}
    FIGURES.write_text(json.dumps({"samples": list(rows.values()), "networks": known["networks"]}, indent=1) + "\n")


# --- the page -------------------------------------------------------------------------------------------------------


def pages() -> None:
    """Fill the tables of the page and draw its pictures."""
    figures = json.loads(FIGURES.read_text())
    text = PAGE.read_text()
    tables = {f"samples {data}": samples_table(figures, data) for data in DATA}
    tables |= {"networks": networks_table(figures), "sensitivity": sensitivity_table(figures)}
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
    PAGE.write_text(text)
    pictures(figures)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over the seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def samples_table(figures: dict[str, Any], data: str) -> str:
    """Quality, entropy of every sampler at every number of calls."""
    lines = ["| network, sampler | " + " | ".join(str(n) for n in NFES) + " |", "|---|" + "---|" * len(NFES)]
    for kind, name in SAMPLERS:
        cells = []
        for nfe in NFES:
            row = pick(figures, data, kind, name, nfe)
            (nats, error), (entropy, _) = (spread(list(part)) for part in zip(*row["found"], strict=True))
            cells.append(f"{nats:.3f} ± {error:.3f}, {entropy:.2f}")
        lines.append(f"| {kind}, {name} | " + " | ".join(cells) + " |")
    nats, entropy = figures["networks"][data]["reference"]
    lines.append(f"| *the data itself* | {nats:.3f}, {entropy:.2f} |" + " |" * (len(NFES) - 1))
    return "\n".join(lines) + "\n"


def pick(figures: dict[str, Any], data: str, kind: str, name: str, nfe: int) -> dict[str, Any]:
    """The row of these."""
    wanted = (data, kind, name, nfe)
    return next(
        row for row in figures["samples"] if tuple(row[k] for k in ("data", "kind", "sampler", "nfe")) == wanted
    )


def networks_table(figures: dict[str, Any]) -> str:
    """The bounds."""
    lines = ["| data | loo | denoiser, as the LOO that follows | absorbing |", "|---|---|---|---|"]
    for data in DATA:
        row = figures["networks"][data]
        cells = [f"{value:.4f} ± {error:.4f}" for value, error in (row["bounds"][kind] for kind in LOSSES)]
        what = "chain, excess over -log p0" if data == "chain" else data
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sensitivity_table(figures: dict[str, Any]) -> str:
    """How much each network's LOO looks at its own token, read either way."""
    head = " | ".join(f"alpha = {alpha:g}" for alpha in ALPHAS)
    lines = [f"| data, network | read as | {head} |", "|---|---|" + "---|" * len(ALPHAS)]
    for data in DATA:
        for kind, curves in figures["networks"][data]["sensitivity"].items():
            for read, curve in curves.items():
                lines.append(f"| {data}, {kind} | {read} | " + " | ".join(f"{mean:.3f}" for mean, _ in curve) + " |")
    return "\n".join(lines) + "\n"


def pictures(figures: dict[str, Any]) -> None:
    """Against calls, quality and entropy; below, one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"loo": "C0", "denoiser": "C1", "denoiser called LOO": "C3", "absorbing": "C2"}
    styles = {"ancestral": "-", "informed PC": "--", "random PC": ":", "re-noising": "-.", "ancestral, T = 0.8": "-."}
    figure, axes = plt.subplots(3, 3, figsize=(14, 11.5), layout="constrained")
    looks = {f"{kind}, {name}": {"color": colours[kind], "linestyle": styles[name]} for kind, name in SAMPLERS}
    for column, data in zip(axes.T, DATA, strict=True):
        reference, curves = figures["networks"][data]["reference"], {}
        for kind, name in SAMPLERS:
            label = f"{kind}, {name}"
            found = np.array([pick(figures, data, kind, name, nfe)["found"] for nfe in NFES])
            means, errors = found.mean(1), found.std(1, ddof=1) / found.shape[1] ** 0.5
            for part in (0, 1):
                column[part].errorbar(NFES, means[:, part], errors[:, part], capsize=2, label=label, **looks[label])
            if kind != "denoiser called LOO":  # far outside
                curves[label] = means[:, 1], means[:, 0], errors[:, 1], errors[:, 0]
        for axis, value in zip(column, reference, strict=False):
            axis.axhline(value, color="black", linewidth=0.8)
            axis.set_xscale("log")
            axis.set_xticks(NFES, [str(n) for n in NFES])
            axis.minorticks_off()
            axis.set_xlabel("denoiser calls")
            axis.grid(alpha=0.3)
        small = {label: {**look, "marker": "."} for label, look in looks.items()}
        plots.frontier(curves, column[2], data=reference[::-1], quality="", looks=small).get_legend().remove()
        for axis, what in zip(column, ("nats a token", "entropy, nats", "nats a token against entropy"), strict=True):
            axis.set_title(f"{data}: {what}")
    axes[0, 2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(ROOT / "parameterisations.png", dpi=110)
    losses_figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, data in zip(axes, DATA, strict=True):
        for kind in LOSSES:
            axis.plot(*zip(*json.loads((WEIGHTS / f"{data}-{kind}.json").read_text()), strict=True), label=kind)
        axis.set(title=data, xlabel="training step", ylabel="loss, nats a token")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    losses_figure.savefig(WEIGHTS / "training.png", dpi=90)


def main(
    description: str = __doc__,
    measure: Callable[[str], None] = measure,
    pages: Callable[[], None] = pages,
) -> None:
    """Measure, unless only the page is wanted."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", choices=["all", "pages"], default="all", help="pages: from the committed figures")
    parser.add_argument("--match", default="", help="measure again only what matches this expression")
    arguments = parser.parse_args()
    if arguments.only == "all":
        measure(arguments.match)
    pages()


if __name__ == "__main__":
    main()
