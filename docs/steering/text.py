"""Hard constraints on text: how often unguided samples meet them, and what ``Constraint`` and particles give.

    python docs/steering/text.py                # six minutes on two cores; docs/steering/text.json
    python docs/steering/text.py --only pages   # prints the tables of the figures that are there

The network is the demo's masked one for characters of the Python documentation. A text has 64 characters, two of which
are revealed in a step.
"""

import argparse
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page import table
from scipy.stats import binomtest, t
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters.own import load_trained
from discdiff.demo import data
from discdiff.losses import MaskedNELBO

FIGURES = Path(__file__).parent / "text.json"
LENGTH, STEPS, GROUP = 64, 32, 8
SEEDS, ROWS, GROUPS = 5, 512, 8  # unguided texts and groups of weighted ones, for each seed
DRAWS, SHOWN = 8, 3
PLAIN = r"[^()\[\]]"
Row = dict[str, Any]


# --- constraints ------------------------------------------------------------------------------------------------------


def brackets(depth: int) -> str:
    """Text with at least one pair of round or square brackets, all of which match, nested at most ``depth`` deep."""
    return f"{PLAIN}*{pair(depth)}({PLAIN}|{pair(depth)})*"


def pair(depth: int) -> str:
    """A pair of brackets, and what it encloses."""
    inner = f"{PLAIN}*" if depth == 1 else f"({PLAIN}|{pair(depth - 1)})*"
    return rf"(\({inner}\)|\[{inner}\])"


MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
PATTERNS = {
    "no letter e": "[^eE]*",
    "balanced brackets": brackets(2),
    "a date": rf"(.*[^0-9A-Za-z])?(0[1-9]|[12]\d|3[01]) ({MONTHS}) (19|20)\d\d([^0-9A-Za-z].*)?",
    "a keyword": r"(.*\W)?generator(\W.*)?",
}


class Ahead:
    """The log-probability that a text ends up accepted if its hidden characters were independent, from a network.

    As a potential it makes up for what a constraint asks of a text early or late. It costs one more call for each step.
    """

    def __init__(self, constraint: dd.Constraint, model: dd.Denoiser) -> None:
        automaton = constraint.automaton
        self.model, self.class_of, self.accepting = model, automaton.class_of, automaton.accepting.double()
        self.moves = torch.nn.functional.one_hot(automaton.moves.T, len(automaton.moves)).double()

    @torch.no_grad()
    def __call__(self, z: Tensor, time: float) -> Tensor:
        size = len(self.class_of)
        law = self.model(z, time).denoiser.double().exp() if time else torch.nn.functional.one_hot(z, size).double()
        classes = torch.zeros(*z.shape, len(self.moves), dtype=torch.float64).index_add(2, self.class_of, law)
        moves = torch.einsum("blc,cqr->lbqr", classes, self.moves)
        state = torch.zeros(len(z), 1, self.moves.shape[1], dtype=torch.float64)
        state[..., 0] = 1
        log_p = torch.zeros(len(z), dtype=torch.float64)
        for move in moves:
            state = state @ move
            total = state.sum(-1, keepdim=True)
            state, log_p = state / total, log_p + total[:, 0, 0].log()
        return log_p + (state[:, 0] @ self.accepting).log()


# --- runs -------------------------------------------------------------------------------------------------------------


def network() -> tuple[dd.Denoiser, data.Vocabulary]:
    """The demo's masked network and its characters."""
    return load_trained(data.ASSETS / "text-masked.safetensors"), data.text()[1]


def sampler(model: dd.Denoiser) -> dd.Sampler:
    """Reveal sites in a random order."""
    return dd.Sampler(model.process, model, S.Unmask(), steps=STEPS)


def bits(model: dd.Denoiser, tokens: Tensor) -> list[float]:
    """The network's own bound on -log2 p of each text (B, L), bits a character."""
    if not len(tokens):
        return []
    nats = MaskedNELBO().estimate(model, tokens, DRAWS, seed=0).value / tokens.shape[1]
    return [round(value, 4) for value in (nats / math.log(2)).tolist()]


def unguided(seed: int, rows: int = ROWS) -> Row:
    """Texts without a constraint: which are accepted, and their bits."""
    model, vocabulary = network()
    tokens = sampler(model).sample(rows, LENGTH, seed=seed).tokens
    texts = [vocabulary.decode(row) for row in tokens]
    accepted = {name: [bool(re.fullmatch(p, text)) for text in texts] for name, p in PATTERNS.items()}
    cost = bits(model, tokens[: GROUP * GROUPS])
    right = {name: [i for i, ok in enumerate(oks) if ok] for name, oks in accepted.items()}
    return {
        "rows": rows, "bits": cost, "texts": texts[:SHOWN], "accepted": right,
        "accepted bits": {name: bits(model, tokens[few[: GROUP * GROUPS]]) for name, few in right.items()},
    }  # fmt: skip


def constrained(name: str, seed: int, groups: int = GROUPS) -> Row:
    """Texts under a constraint, alone and weighted: at the end only, and by particles with a potential."""
    model, vocabulary = network()
    constraint = dd.Constraint.regex(PATTERNS[name], list(vocabulary.characters))
    guided, row = sampler(model.guided(constraint)), {}
    for kind, particles in {
        "weights": dd.Particles(guided, None, GROUP, ess=0.0),
        "particles": dd.Particles(guided, Ahead(constraint, model), GROUP),
    }.items():
        start = time.process_time()
        out = particles.sample(groups * GROUP, LENGTH, seed=seed)
        seconds, drawn = time.process_time() - start, out.draw(seed)
        row[kind] = {
            "texts": [vocabulary.decode(text) for text in drawn], "bits": bits(model, drawn),
            "log evidence": out.log_evidence.tolist(), "ess": out.ess.tolist(), "calls": out.queries / LENGTH,
            "seconds": round(seconds, 2),
        }  # fmt: skip
        if kind == "weights":  # without resampling, the particles are samples of the constraint alone
            texts = [vocabulary.decode(text) for text in out.tokens]
            row["alone"] = {"texts": texts, "bits": bits(model, out.tokens), "states": constraint.automaton.states}
    row["particles"]["calls"] *= 2  # the potential's, which a run does not count
    return row


def run(job: tuple[str, int]) -> Row:
    """One constraint, or none, with one seed."""
    torch.set_num_threads(1)
    name, seed = job
    start = time.perf_counter()
    row = constrained(name, seed) if name else unguided(seed)
    print(f"{time.perf_counter() - start:5.0f} s  {name or 'unguided'}, seed {seed}", file=sys.stderr, flush=True)
    return row


def measure() -> None:
    """Make all runs and keep the figures."""
    jobs = [(name, seed) for name in PATTERNS for seed in range(SEEDS)] + [("", seed) for seed in range(SEEDS)]
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        rows = dict(zip(jobs, workers.map(run, jobs, chunksize=1), strict=True))
    figures = {
        "unguided": [rows["", seed] for seed in range(SEEDS)],
        "constrained": {name: [rows[name, seed] for seed in range(SEEDS)] for name in PATTERNS},
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


# --- tables -----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    """The mean of one value for each seed, with its 95 % interval by Student's t."""
    x = np.array(values)
    half = float(t.ppf(0.975, len(x) - 1)) * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():.2f} ± {half:.2f}"


def share(log_evidence: Sequence[float]) -> tuple[float, float, float]:
    """The mean evidence of groups, and the 95 % interval of the bootstrap over groups."""
    log_z = np.array(log_evidence)
    top = log_z.max()
    drawn = np.random.default_rng(0).choice(np.exp(log_z - top), size=(10_000, len(log_z))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975]) * math.exp(top)
    return float(np.exp(log_z - top).mean() * math.exp(top)), float(low), float(high)


def accepted(figures: Row) -> str:
    """How often texts are accepted, without a constraint and with it."""
    lines, count = [], sum(row["rows"] for row in figures["unguided"])
    for name in PATTERNS:
        rows = figures["constrained"][name]
        right = sum(len(row["accepted"][name]) for row in figures["unguided"])
        low, high = binomtest(right, count).proportion_ci(0.95)
        best = sum(len({i // GROUP for i in row["accepted"][name]}) for row in figures["unguided"])
        texts = [text for row in rows for kind in ("alone", "weights", "particles") for text in row[kind]["texts"]]
        wrong = sum(re.fullmatch(PATTERNS[name], text) is None for text in texts)
        cells = [name, f"{right} of {count}: {low:.2g} to {high:.2g}", f"{best} of {count // GROUP}"]
        for kind in ("weights", "particles"):
            mean, low, high = share([z for row in rows for z in row[kind]["log evidence"]])
            cells.append(f"{mean:.1e} ({low:.0e} to {high:.0e})")
        lines.append([*cells, f"{wrong} of {len(texts)}", str(rows[0]["alone"]["states"])])
    head = [
        "constraint", "accepted without it, 95 %", f"groups of {GROUP} with an accepted one", "share by weights",
        "share by particles", "rejected with it", "states",
    ]  # fmt: skip
    return table(head, lines)


def surprise(figures: Row) -> str:
    """Bits a character under the network, and how even the weights are."""
    lines = []
    plain = interval([float(np.mean(row["bits"])) for row in figures["unguided"]])
    for name in PATTERNS:
        rows = figures["constrained"][name]
        few = [bit for row in figures["unguided"] for bit in row["accepted bits"][name]]
        mean = {kind: [float(np.mean(row[kind]["bits"])) for row in rows] for kind in ("alone", "weights", "particles")}
        ess = [f"{np.mean([e for row in rows for e in row[kind]['ess']]):.1f}" for kind in ("weights", "particles")]
        calls = [f"{rows[0][kind]['calls'] / GROUPS:.0f}" for kind in ("weights", "particles")]
        right = f"{np.mean(few):.2f} ({len(few)} texts)" if few else "none"
        lines.append([name, plain, right, *map(interval, mean.values()), " / ".join(ess), " / ".join(calls)])
    head = [
        "constraint", "unguided", "unguided, accepted", "`Constraint`", "with weights", "with particles",
        f"effective of {GROUP}", "calls for a text",
    ]  # fmt: skip
    return table(head, lines)


def samples(figures: Row) -> str:
    """Some texts."""
    lines = [["none", code(text)] for text in figures["unguided"][0]["texts"]]
    for name in PATTERNS:
        for kind in ("alone", "particles"):
            texts = figures["constrained"][name][0][kind]["texts"][:SHOWN]
            lines += [[name + ("" if kind == "alone" else ", particles"), code(text)] for text in texts]
    return table(["constraint", "text"], lines)


def code(text: str) -> str:
    """A text as code in a table."""
    return (
        f"<code>{text.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;').replace('`', '&#96;')}</code>"
    )


def tables() -> dict[str, str]:
    """The tables of the figures that are stored."""
    figures = json.loads(FIGURES.read_text())
    return {"text_accepted": accepted(figures), "text_bits": surprise(figures), "text_samples": samples(figures)}


def main() -> None:
    """Measure, unless only the tables are wanted, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["all", "pages"], default="all", help="pages: from the stored figures")
    if parser.parse_args().only == "all":
        measure()
    for name, made in tables().items():
        print(f"{name}\n\n{made}")


if __name__ == "__main__":
    main()
