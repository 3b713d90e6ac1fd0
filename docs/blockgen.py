r"""Autoregression, diffusion and what lies between, on one transformer and one text; writes the page.

    python docs/blockgen/train_networks.py       # trains 5 networks: 40 minutes of two cores
    python docs/blockgen.py                      # likelihoods and samples: 20 minutes of two cores
    python docs/blockgen.py --only pages         # docs/blockgen.md and .png from the figures

The judge and the halves of the text are those of docs/parameterisations.
"""

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

import discdiff as dd
from discdiff import plots
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters.own import load_trained
from discdiff.losses import BlockMixture, Estimate

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "tests")]
sys.path.insert(0, str(ROOT / "blockgen"))
from parameterisations import batches, held_out, main, quality, spread  # noqa: E402
from train_networks import LENGTH, MIXTURE, OBJECTIVES, weights  # noqa: E402

FIGURES, PAGE, SEEDS, ROWS, BLOCK = ROOT / "blockgen.json", ROOT / "blockgen.md", 3, 24, 16
STEPS = (1, 2, 4, 8, 16, 32)  # a block of 16; whole sequences take eight times as many
EXACT_STEPS = (4, 8, 16, 32, 64, 128)
Maker = Callable[[dd.Denoiser, int], dd.Sampler | dd.Blockwise]


def whole(operator: dd.Operator) -> Maker:
    """Steps of the whole sequence, as many as all blocks take together."""
    return lambda model, steps: dd.Sampler(model.process, model, operator, steps=steps * LENGTH // BLOCK)


def blocks(block: int | dict[int, float]) -> Maker:
    """Ancestral steps within blocks."""
    return lambda model, steps: dd.Blockwise(model.process, model, S.Ancestral(), block=block, steps=steps)


def guided(score: str) -> Maker:
    """The published schedule, all but the last steps guided."""

    def make(model: dd.Denoiser, steps: int) -> dd.Blockwise:
        operator = S.ARPC(score).scheduled(steps)  # type: ignore[arg-type]
        return dd.Blockwise(model.process, model, operator, block=BLOCK, steps=steps)

    return make


SAMPLERS: dict[tuple[str, str], Maker] = {("autoregressive", "one by one"): blocks(1)}
for kind in ("masked", "uniform"):
    SAMPLERS |= {
        (f"whole-{kind}", "ancestral"): whole(S.Ancestral()),
        (f"blocks-{kind}", "ancestral"): blocks(BLOCK),
        (f"blocks-{kind}", "one by one"): blocks(1),
        (f"blocks-{kind}", "mixture"): blocks(MIXTURE),
        (f"blocks-{kind}", "ARPC nll"): guided("nll"),
        (f"blocks-{kind}", "ARPC random"): guided("random"),
        (f"blocks-{kind}", "ARPC forward"): guided("forward"),
    }


def sample_one(job: tuple[str, str, int]) -> dict[str, Any]:
    """Quality, entropy and cost of a sampler, for every seed."""
    torch.set_num_threads(1)
    name, sampler, steps = job
    start = time.perf_counter()
    made = SAMPLERS[name, sampler](load_trained(weights(name)), steps)
    outs = [made.sample(ROWS, LENGTH, seed=seed) for seed in range(SEEDS)]
    found = [quality("text", out.tokens) for out in outs]
    print(f"{time.perf_counter() - start:5.0f} s  {', '.join(map(str, job))}", file=sys.stderr, flush=True)
    calls = float(np.mean([float(out.nfe_rows.double().mean()) for out in outs]))
    queries = float(np.mean([out.queries / ROWS for out in outs]))
    row = {"network": name, "sampler": sampler, "steps": steps, "found": found}
    return row | {"calls": calls, "queries": queries}


def likelihood(name: str) -> dict[str, Any]:
    """Bounds on -log p of held-out text, nats a token."""
    torch.set_num_threads(1)
    model, objective, x0 = load_trained(weights(name)), OBJECTIVES[name], held_out("text", 96)

    def shown(estimate: Estimate) -> list[float]:
        values = estimate.value / LENGTH
        return [float(values.mean()), float(values.std() / len(values) ** 0.5)]

    if not isinstance(objective, BlockMixture):
        return {"network": name, "bounds": {"its own": shown(objective.estimate(model, x0, 16, seed=0))}}
    both = objective.likelihood(model, x0, draws=16, seed=0)
    parts = {f"blocks of {size}": shown(part) for size, part in both.components.items()}
    mixed = Estimate(both.log_sum_exp, both.jensen.error, 16)
    optimism = float(both.optimism.mean()) / LENGTH
    bounds = parts | {"Jensen": shown(both.jensen), "log-sum-exp": shown(mixed), "optimism": [optimism, 0.0]}
    return {"network": name, "bounds": bounds}


def exact() -> list[dict[str, Any]]:
    """KL(p0 || law) and the law's entropy of guided steps with the exact denoiser, on the suite's coupled law."""
    import problems

    world, rows = problems.strong(), []
    for process in (dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())):
        for score in ("plain", "random", "forward", "nll", "gap", "entropy"):
            found = []
            for steps in EXACT_STEPS:
                operator = S.Ancestral() if score == "plain" else S.ARPC(score).scheduled(steps)  # type: ignore[arg-type]
                law = T.law(dd.Sampler(process, world.denoiser(process), operator, steps=steps))
                found.append([T.kl(world.p0, law), float(torch.special.entr(law).sum())])
            name = type(process).__name__.lower()
            rows.append({"process": name, "score": score, "found": found})
    return [*rows, {"process": "p0", "score": "", "found": [[0.0, float(torch.special.entr(world.p0).sum())]]}]


def measure(match: str) -> None:
    """Sample and judge whatever matches; figures of other jobs are kept."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"samples": [], "likelihoods": {}}
    jobs = [(*pair, steps) for pair in SAMPLERS for steps in reversed(STEPS if pair[1] != "one by one" else (1,))]
    jobs = [job for job in jobs if re.search(match, ", ".join(map(str, job)))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        fresh = pool.map(sample_one, jobs, chunksize=1)
        bounds = pool.map(likelihood, [name for name in OBJECTIVES if re.search(match, name)], chunksize=1)
    rows = {tuple(row[key] for key in ("network", "sampler", "steps")): row for row in [*known["samples"], *fresh]}
    figures = {"samples": list(rows.values()), "likelihoods": known["likelihoods"]}
    figures["likelihoods"] |= {row["network"]: row["bounds"] for row in bounds}
    seen = [batches("text", 0)(torch.Generator().manual_seed(n)) for n in range(32)]
    figures |= {"data": quality("text", torch.cat(seen)), "exact": exact()}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


# --- the page -------------------------------------------------------------------------------------------------------


def pages() -> None:
    """Fill the tables of the page and draw its picture."""
    figures, text = json.loads(FIGURES.read_text()), PAGE.read_text()
    tables = {"samples": samples_table, "likelihoods": likelihoods_table, "exact": exact_table}
    for name, table in tables.items():
        made = table(figures)
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=made: m[1] + t + m[2], text, flags=re.S)
    PAGE.write_text(text)
    picture(figures)


def of(figures: dict[str, Any], network: str, sampler: str) -> list[dict[str, Any]]:
    """The rows of a sampler, by the number of its steps."""
    rows = [row for row in figures["samples"] if (row["network"], row["sampler"]) == (network, sampler)]
    return sorted(rows, key=lambda row: row["steps"])


def samples_table(figures: dict[str, Any]) -> str:
    """Cost, quality, entropy of every sampler at every number of steps."""
    lines = ["| network, sampler | " + " | ".join(str(n) for n in STEPS) + " |", "|---|" + "---|" * len(STEPS)]
    for network, sampler in SAMPLERS:
        cells = []
        for row in of(figures, network, sampler):
            (nats, error), (entropy, _) = (spread(list(part)) for part in zip(*row["found"], strict=True))
            cells.append(f"{nats:.2f} ± {error:.2f}, {entropy:.2f} ({row['calls']:.0f}; {row['queries']:,.0f})")
        lines.append(f"| {network}, {sampler} | " + " | ".join(cells) + " |" + " |" * (len(STEPS) - len(cells)))
    nats, entropy = figures["data"]
    lines.append(f"| *the data itself* | {nats:.2f}, {entropy:.2f} |" + " |" * (len(STEPS) - 1))
    return "\n".join(lines) + "\n"


def likelihoods_table(figures: dict[str, Any]) -> str:
    """The bounds of every network."""
    columns = ("its own", "blocks of 1", "blocks of 16", "Jensen", "log-sum-exp", "optimism")
    lines = [f"| network | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, bounds in figures["likelihoods"].items():
        cells = (f"{bounds[c][0]:.4f} ± {bounds[c][1]:.4f}" if c in bounds else "" for c in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).replace(" ± 0.0000", "") + "\n"


def exact_table(figures: dict[str, Any]) -> str:
    """What guided steps do to a known law."""
    lines = ["| process, choice | " + " | ".join(map(str, EXACT_STEPS)) + " |", "|---|" + "---|" * len(EXACT_STEPS)]
    *rows, data = figures["exact"]
    for row in rows:
        cells = (f"{kl:.1e}, {entropy:.2f}" for kl, entropy in row["found"])
        lines.append(f"| {row['process']}, {row['score']} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nThe law itself has entropy {data['found'][0][1]:.2f}.\n"


def picture(figures: dict[str, Any]) -> None:
    """Quality and entropy against denoiser calls, and one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"autoregressive": "black", "masked": "C0", "uniform": "C1"}
    styles = {
        "ancestral": "-",
        "mixture": "-.",
        "ARPC nll": "--",
        "ARPC random": ":",
        "ARPC forward": (0, (5, 2, 1, 2, 1, 2)),
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    curves: dict[str, Any] = {}
    looks: dict[str, Any] = {}
    for network, sampler in SAMPLERS:
        rows = of(figures, network, sampler)
        found = np.array([row["found"] for row in rows])
        means, errors, calls = found.mean(1), found.std(1, ddof=1) / SEEDS**0.5, [row["calls"] for row in rows]
        look: dict[str, Any] = {"label": f"{network}, {sampler}", "color": colours[network.split("-")[-1]]}
        whole_sequence = network.startswith("whole")
        look |= {"linestyle": styles.get(sampler, ""), "marker": "o" if whole_sequence else ".", "markersize": 5}
        look |= (
            {"marker": "x", "markersize": 7} if sampler == "one by one" else {"alpha": 0.5 if whole_sequence else 1.0}
        )
        axes[0].errorbar(calls, means[:, 0], errors[:, 0], **look)
        axes[1].errorbar(calls, means[:, 1], errors[:, 1], **look)
        curves[look.pop("label")] = means[:, 1], means[:, 0], errors[:, 1], errors[:, 0]
        looks[f"{network}, {sampler}"] = look
    nats, entropy = figures["data"]
    plots.frontier(curves, axes[2], data=(entropy, nats), quality="nats a token", looks=looks)
    for axis, level, what in zip(axes, (nats, entropy, None), ("nats a token", "entropy, nats", "both"), strict=True):
        axis.set(title=what, xlabel="denoiser calls" if level else "entropy, nats")
        if level:
            axis.axhline(level, color="black", linewidth=0.8)
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    figure.savefig(ROOT / "blockgen.png", dpi=110)


if __name__ == "__main__":
    main(__doc__, measure, pages)
