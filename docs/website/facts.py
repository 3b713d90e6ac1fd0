"""What is known of an operator: what it declares, which claims were checked, and which errors were measured.

The figures are those of docs/verified.json, docs/predictors.json and docs/correctors.md; nothing is computed anew.
"""

import json
import re
from functools import cache
from pathlib import Path

from discdiff.command.cli import parse_operator
from discdiff.command.verify import SHIPPED
from discdiff.denoiser import Guide
from discdiff.operator import Operator
from discdiff.process import Process

DOCS = Path(__file__).resolve().parent.parent
DECLARED = ("setting", "order", "keeps p_t", "calls a step", "exact matrix", "weights", "remembers")
LONG = "nats below the exact log-likelihood at 8, 16, 32, 64 calls, ± one standard error"


@cache
def _shipped() -> dict[str, Operator]:
    return {text: parse_operator(text) for text in SHIPPED if ">>" not in text}


def settings(name: str) -> dict[str, Operator]:
    """Map each checked setting of an operator, as the command line writes it, to the operator."""
    return {text: one for text, one in _shipped().items() if type(one).__name__ == name}


def declared(name: str) -> list[list[str]]:
    """Return a row for each setting: what the operator declares."""
    return [
        [
            f"``{text}``",
            "-" if one.order is None else f"{one.order:g}",
            one.invariant or "-",
            "its choices decide" if one.nfe is None else f"{one.nfe:g}",
            "yes" if one.enumerable else "no: its choices have no end",
            "yes" if one.weighable else "no",
            "yes" if one.remembers else "no",
        ]
        for text, one in settings(name).items()
    ]


@cache
def _verified() -> dict[str, dict[str, dict[str, object]]]:
    return json.loads((DOCS / "verified.json").read_text())


def checked(name: str) -> list[list[str]]:
    """Return a row for each setting: the kinds of process that it runs on, with the number of claims that hold."""
    rows = []
    for text in settings(name):
        cells = {kind: str(one["cell"]) for kind, one in _verified().get(text, {}).items()}
        on = [f"{kind} {cell}" for kind, cell in cells.items() if cell[0].isdigit()]
        off = [kind for kind, cell in cells.items() if not cell[0].isdigit()]
        rows.append([f"``{text}``", ", ".join(on), ", ".join(off) or "none"])
    return rows


@cache
def _predictors() -> list[dict[str, object]]:
    return json.loads((DOCS / "predictors.json").read_text())


def _of(entry: dict[str, object], name: str) -> bool:
    text = str(entry.get("repr", ""))
    return text.startswith(f"{name}(") and ">>" not in text


def small(name: str) -> list[list[str]]:
    """Return measured orders and errors on laws of three sites: setting, law, slopes, and KL at 8 to 64 calls."""
    rows = []
    for one in _predictors():
        if one["kind"] == "small" and _of(one, name):
            slopes = ["-" if one.get(key) is None else f"{one[key]:.2f}" for key in ("slope", "end_slope")]
            if "kl" in one:
                kl = ", ".join("0" if value < 1e-14 else f"{value:.1e}" for value in one["kl"])
            else:  # it chooses its own number of calls: total variation of draws
                kl = f"TV {one['tv'][0]:.3f} at {one['nfe']:.1f} calls"
            rows.append([f"``{one['repr']}``", f"{one['family']}, {one['coupling']}", *slopes, kl])
    return rows


def long(name: str) -> list[list[str]]:
    """Return measured errors on chains of 256 sites: setting, law, and nats that are lost at 8 to 64 calls."""
    rows = []
    for one in _predictors():
        if one["kind"] == "long" and _of(one, name):
            lost = ", ".join(
                f"{nats:.1f} ± {error:.1f}" + (f" at {calls:.0f} calls" if len(one["deficit"]) == 1 else "")
                for calls, nats, error in one["deficit"]
            )
            rows.append([f"``{one['repr']}``", f"{one['family']}, {one['coupling']}", lost])
    return rows


def kept(name: str) -> list[list[str]]:
    """Return the rows of docs/correctors.md on a corrector: what it leaves of p_t, how it moves, how fast it mixes."""
    page = (DOCS / "correctors.md").read_text()
    table = re.search(r"<!-- invariance -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in table[1].splitlines()] if table else []
    return [[cell.replace("`", "``") for cell in row] for row in rows[2:] if row[0].startswith(f"`{name}(")]


def kept_on() -> list[str]:
    """Return the head of the table that ``kept`` reads."""
    line = re.search(r"<!-- invariance -->\n\| (.*?) \|\n", (DOCS / "correctors.md").read_text())
    return line[1].split(" | ") if line else []


KINDS_OF = {
    "Masked": ("masked", "masked_inside"), "Uniform": ("uniform",), "Marginal": ("marginal", "marginal_zero"),
    "Hybrid": ("hybrid",), "Ordinal": ("ordinal",), "General": ("general",), "TimeVarying": ("time_varying",),
    "AbsorbingUniform": ("absorbing_uniform",), "Interpolant": ("interpolant",),
}  # fmt: skip


def of_process(process: Process) -> list[list[str]]:
    """Return what is known of a process: its states, and which closed forms it has."""
    return [
        ["states of a site", f"{process.states} for 3 tokens"],
        ["noise only hides tokens", "yes" if process.absorbing else "no"],
        ["closed forms of rank one", "yes" if process.rank_one else "no"],
        ["one law of noise at all times", "yes" if process.one_noise_law else "no"],
        ["states are pairs of tokens", "yes" if process.pairs else "no"],
    ]


def accepted(process: str) -> list[str]:
    """List the shipped operators whose claims were checked on a process, by their names on the command line."""
    kinds = KINDS_OF.get(process, ())
    cells = {text: [str(found[kind]["cell"]) for kind in kinds] for text, found in _verified().items()}
    return [text for text, said in cells.items() if said and all(cell[0].isdigit() for cell in said)]


def of_guide(guide: Guide) -> list[list[str]]:
    """Return what a guide declares."""
    return [
        ["further network calls for a prediction", f"{guide.nfe:g}"],
        ["makes random choices", "yes" if guide.random else "no"],
        ["in ``Blockwise``", "refused: it needs the sites after a block" if guide.whole else "yes"],
    ]
