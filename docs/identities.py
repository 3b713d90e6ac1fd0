"""Bring the errors in docs/identities.md up to date: ``python docs/identities.py`` (three minutes on one core).

The page is prose; this runs the tests and rewrites the columns "largest error" and "seen at" of its table.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "identities.md"
FILES = [f"tests/test_{name}.py" for name in ("identities", "controls", "losses", "oracles", "families")]


def main() -> None:
    """Run the tests, rewrite the numbers."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--ledger", str(ledger), *FILES]
        subprocess.run(command, cwd=ROOT, check=True)
        record = json.loads(ledger.read_text())
    lines = PAGE.read_text().splitlines()
    for at, line in enumerate(lines):
        if re.match(r"\| \d+ \|", line):
            cells = re.split(r"(?<!\\)\|", line)
            number = cells[1].strip()
            error, tolerance = record["errors"][number]
            control = record["controls"].get(number)
            cells[4:6] = f" {tolerance:.0e} ", f" {error:.1e} "
            cells[7] = " " if control is None else f" {control:.2g} "
            lines[at] = "|".join(cells)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
