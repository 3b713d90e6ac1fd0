"""Bring docs/verified.md up to date: ``python docs/verified.py`` (an hour), or ``python docs/verified.py gibbs euler``.

What ``discdiff verify`` without a name finds: every shipped operator on every kind of process that it accepts. Named
operators alone are checked anew, the others' figures are kept in docs/verified.json.
"""

import json
import sys
from pathlib import Path

import torch

from discdiff.command import verify
from discdiff.command.cli import parse_operator
from discdiff.theory.catalogue import KINDS

PAGE = Path(__file__).with_suffix(".md")
# ruff: noqa: E501, RUF001
TEXT = """# What `discdiff verify` finds

**What to do.** Look up the operator that you use: a number says how many claims were checked on that kind of
process, – that the operator refuses it. To check an operator of yours, run `discdiff verify my_module:MyOperator`.

Written by `python docs/verified.py`, which runs `discdiff verify` without a name: every operator of `discdiff.samplers`, with the settings
in which its declarations differ, on every kind of process that it accepts. A cell is the number of claims that hold;
– is a process that the operator refuses. What there is no way to check is counted apart, never as passed.

Each kind is built anew on 3 sites of 3 tokens (linear clock), 4 of 2 (alpha = 1 - t^2, a third of all sequences impossible) and 2 of 4
(cosine); pairs of tokens on 3, 2 and 2 sites of 2, 3 and 2. Times are the first step, early, middle, late, and the step to 0. The claims:

{claims}

A corrector keeps p_t nearly if its TV from p_t is at most .1, or that of independent sites with the same marginals if that
is more: the figure is the share of it.

{table}

{total}

Not checked:

{unchecked}
"""


def main(names: list[str]) -> None:
    """Check, keep the figures, write the page."""
    torch.set_num_threads(1)
    known: dict[str, dict[str, dict[str, object]]] = {}
    if PAGE.with_suffix(".json").exists():
        known = json.loads(PAGE.with_suffix(".json").read_text())
    for text in names or verify.SHIPPED:
        known[text] = {}
        for verdict in verify.shipped(parse_operator, list(KINDS), only=[text]):
            checks = [] if verdict.report is None else verdict.report.as_json()["checks"]
            known[text][verdict.kind] = {"cell": str(verdict), "checks": checks}
        print(text, {kind: one["cell"] for kind, one in known[text].items()}, flush=True)
        known = {text: known[text] for text in verify.SHIPPED if text in known}
        PAGE.with_suffix(".json").write_text(json.dumps(known) + "\n")
        PAGE.write_text(page(known))


def page(known: dict[str, dict[str, dict[str, object]]]) -> str:
    """The page's text."""
    rows = [["operator", *KINDS], ["---"] * (len(KINDS) + 1)]
    rows += [[f"`{text}`", *(cells[kind]["cell"] for kind in KINDS)] for text, cells in known.items()]
    checks = [(text, check) for text, cells in known.items() for one in cells.values() for check in one["checks"]]
    marks = [check["mark"] for _, check in checks]
    claims = dict.fromkeys(check["name"] for _, check in checks if check["mark"] != "not checked")
    unchecked = {f"* `{text}` on {c['process']}, {c['name']}: {c['where']}" for text, c in checks
                 if c["mark"] == "not checked"}  # fmt: skip
    return TEXT.format(
        claims="\n".join(f"* {claim}" for claim in claims),
        table="\n".join("| " + " | ".join(row) + " |" for row in rows),
        total=f"{marks.count('ok')} hold, {marks.count('FAIL')} do not hold, {marks.count('not checked')} not checked.",
        unchecked="\n".join(sorted(unchecked)) or "nothing",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
