"""Antibody domains from masks alone, by a network that somebody else trained: the tables of docs/antibodies.md.

make antibody     # a quarter of an hour on two cores
"""

import csv
import importlib.metadata
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from scipy.stats import binomtest

import discdiff as dd
from discdiff import samplers as S

HERE = Path(__file__).parent
DATA, PAGE = HERE / "antibodies.csv", HERE / "antibodies.md"
STEPS, SEED, COUNT, TEMPERATURE = 64, 0, 200, 0.35
SOURCE, MIXED = "sampled at the lengths of heavy chains", "sampled at the lengths of both"
HEAVY = r"WG.G.{3,12}$"  # tryptophan 118, which begins the strand behind the third loop; light chains have F there
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
FIRST = 5  # the id of A; the others follow in order

# What holds an immunoglobulin domain together, by the numbers of IMGT: cysteines 23 and 104 of its bridge, tryptophan
# 41 packed against it, and the glycines 119 and 121 of the strand behind the third loop. Numbers say how far apart they
# may be, gaps included; nothing is aligned.
RULES = {
    "Cys 23, Trp 41": r"C.{10,17}W",
    "and Cys 104": r"C.{10,17}W.{49,65}C",
    "and [FW]-G-x-G 118-121": r"C.{10,17}W.{49,65}C.{4,36}[FW]G.G",
}


def antiberty() -> Path:
    """The folder of antiberty's weights, found without importing the package.

    Raises:
        importlib.metadata.PackageNotFoundError: if it is not installed.
    """
    package = importlib.metadata.distribution("antiberty")
    return Path(str(package.locate_file("antiberty/trained_models/AntiBERTy_md_smooth")))


def tokens(sequence: str) -> list[int]:
    return [FIRST + LETTERS.index(letter) for letter in sequence]


def letters(ids: Sequence[int]) -> str:
    return "".join(LETTERS[v - FIRST] for v in ids)


def known() -> dict[str, list[str]]:
    """Sequences by where they are from: natural ones first, then those that were sampled for the page."""
    with DATA.open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, list[str]] = {"PDB, heavy": [], "PDB, light": []}
    for row in rows:
        kind = "PDB, heavy" if re.search(HEAVY, row["sequence"]) else "PDB, light"
        found.setdefault(kind if row["source"].startswith("PDB ") else row["source"], []).append(row["sequence"])
    return found


def sampled(model: dd.Denoiser, lengths: Sequence[int], steps: int, seed: int) -> Iterator[str]:
    """A domain of each of these lengths, from masks alone; rows of one length are denoised together."""
    sampler = dd.Sampler(model.process, model, S.Ancestral(), steps=steps)
    first = 0
    for length, batch in sorted(Counter(lengths).items()):
        out = sampler.sample(batch, length, seed=seed, first_row=first)
        yield from (letters(row) for row in out.tokens.tolist())
        first += batch


def alike(sequences: Sequence[str]) -> float:
    """The share of places where two of them have the same residue, the mean over all pairs; nothing is aligned."""
    pairs = list(itertools.combinations(sequences, 2))
    return sum(sum(map(str.__eq__, one, other)) / min(len(one), len(other)) for one, other in pairs) / len(pairs)


def table(by_source: dict[str, list[str]]) -> str:
    """How many sequences keep to each rule, with exact 95% intervals of the proportion (Clopper and Pearson)."""
    lines = [f"| domains | distinct | alike | {' | '.join(RULES)} |", "|---" * (3 + len(RULES)) + "|"]
    for source, sequences in by_source.items():
        cells = []
        for rule in RULES.values():
            kept = sum(bool(re.search(rule, sequence)) for sequence in sequences)
            interval = binomtest(kept, len(sequences)).proportion_ci(0.95, method="exact")
            cells.append(f"{kept} of {len(sequences)} ({interval.low:.3f} to {interval.high:.3f})")
        lines.append(f"| {source} | {len(set(sequences))} | {alike(sequences):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Sample, keep the sequences, put the table into the page."""
    torch.set_num_threads(max(1, int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads()))
    model = dd.load(antiberty(), dtype=torch.bfloat16).guided(dd.Truncation(temperature=TEMPERATURE))
    natural = [(source, row) for source, row in _rows() if source.startswith("PDB ")]
    both = [len(sequence) for _, sequence in natural]
    heavy = [len(sequence) for _, sequence in natural if re.search(HEAVY, sequence)]
    drawn = [
        (source, sequence)
        for source, lengths in ((SOURCE, 2 * heavy), (MIXED, both))
        for sequence in sampled(model, lengths[:COUNT], STEPS, SEED)
    ]
    with DATA.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("source", "sequence"), *natural, *drawn])
    found = table(known())
    print(found)
    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?<=<!-- domains -->\n).*?(?=\n<!-- end -->)", lambda _: found, text, flags=re.S))


def _rows() -> list[tuple[str, str]]:
    with DATA.open() as file:
        return [(row["source"], row["sequence"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    main()
