"""Draw the pictures of docs/guide/plots.md by running its code blocks: python docs/plots.py."""

import os
import re
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
PAGE = HERE / "guide" / "plots.md"


def run(folder: Path, page: Path = PAGE) -> None:
    """Run a page's blocks in a folder, where they leave their pictures."""
    matplotlib.use("Agg")
    scope: dict[str, object] = {"__name__": "page"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            exec(compile(block, str(page), "exec"), scope)
    finally:
        os.chdir(before)


if __name__ == "__main__":
    run(HERE / "guide" / "plots")
