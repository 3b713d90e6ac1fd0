"""Write the tables of docs/steering.md: ``python docs/steering/page.py``, or ``page.py particles doob`` for some parts.

All parts take about ten minutes on one core. The last three read what text.py, digits.py and third_loops.py stored.
"""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

PAGE = Path(__file__).parent.with_suffix(".md")
PARTS = ("doob", "particles", "recipes", "constraints", "posteriors", "text", "digits", "third_loops")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def placed(page: str, name: str, table: str) -> str:
    """Return the page with a table between its two marks.

    Raises:
        ValueError: if the page has no such marks.
    """
    marks = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    made, count = re.subn(marks, lambda found: f"{found[1]}{table.strip(chr(10))}\n{found[2]}", page, flags=re.S)
    if count != 1:
        raise ValueError(f"{PAGE.name} must have the marks <!-- {name} --> and <!-- end --> once, and has them {count}")
    return made


def main(parts: list[str]) -> None:
    """Make the tables of some parts and put them into the page."""
    torch.set_num_threads(1)
    for part in parts or PARTS:
        for name, table in import_module(part).tables().items():
            PAGE.write_text(placed(PAGE.read_text(), name, table))
        print(part, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
