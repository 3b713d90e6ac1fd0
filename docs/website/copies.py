"""Tables that one page copies from another: ``python docs/website/copies.py`` brings them up to date.

A copy stands between two marks. The first names the page and its table, and the rows, if only some are wanted:

    <!-- copy predictors.md half -->  ...  <!-- end -->
    <!-- copy predictors.md long masked; Ancestral; Unmask, spread -->  ...  <!-- end -->
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"<!-- copy (\S+\.md) ([^;]+?)((?:; [^;]+?)*) -->\n(.*?)<!-- end -->", re.DOTALL)


def table(page: str, name: str, rows: list[str]) -> str:
    """Return a page's table, or the rows of it that begin with the given words."""
    text = (DOCS / page).read_text()
    found = re.search(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"docs/{page} has no table between <!-- {name} --> and <!-- end -->")
    lines = found[1].strip().splitlines()
    if not rows:
        return "\n".join(lines) + "\n"
    kept = lines[:2]
    for row in rows:
        chosen = [line for line in lines[2:] if line.strip("| ").partition(" | ")[0] == row]
        if not chosen:
            raise ValueError(f"docs/{page}, table {name}: no row begins with {row!r}")
        kept += chosen
    return "\n".join(kept) + "\n"


def renewed(text: str) -> str:
    """Return a page's text with its copies as they are at their sources."""

    def one(found: re.Match[str]) -> str:
        rows = [row.strip() for row in found[3].split(";") if row.strip()]
        return f"{found[0][: found.start(4) - found.start()]}{table(found[1], found[2], rows)}<!-- end -->"

    return MARKED.sub(one, text)


if __name__ == "__main__":
    for page in DOCS.glob("guide/*.md"):
        page.write_text(renewed(page.read_text()))
