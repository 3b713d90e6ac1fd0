"""Bring the errors in docs/identities.md up to date: ``python docs/identities.py`` (nine minutes on one core).

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


def file(name: str) -> str:
    """The path of a file of tests, whose folder is its room."""
    (found,) = (ROOT / "tests").glob(f"*/test_{name}.py")
    return str(found.relative_to(ROOT))


FILES = [file(name) for name in ("identities", "controls", "losses", "oracles", "families", "gibbs")]
# Of the files that hold more, the tests of operators that state a number: orders 12 to 15 and 21b, exactness 16 to 20.
OPERATORS = {
    "ancestral": ("declared_order_is_the_measured_one",),
    "predictors": (
        "declared_order_is_the_measured_one",
        "clipped_rates_have_order_one_at_strong_coupling_and_two_without_the_clip",
        "a_trapezoid_whose_first_stage_is_linear_in_the_rates_has_order_one",
        "a_mislabelled_denoiser_has_no_order",
        "the_joint_midpoint_has_order_two",
        "gibbs_moves_lift_the_order_of_ancestral_steps_to_two",
    ),
    "unmasking": ("any_order_is_exact_whatever_it_looks_at", "sample_then_select_is_biased"),
    "simulation": ("exact_simulations_have_no_step_size", "an_ancestral_step_of_that_length_is_caught"),
    "correctors": (
        "what_claims_to_keep_p_t_keeps_it_and_moves",
        "what_claims_less_does_not_keep_it",
        "tau_leaped_correctors_follow_the_summed_rates",
    ),
}
TESTS = [f"{file(name)}::test_{test}" for name, tests in OPERATORS.items() for test in tests]


def main() -> None:
    """Run the tests, rewrite the numbers."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--ledger", str(ledger), *FILES, *TESTS]
        subprocess.run(command, cwd=ROOT, check=True)
        record = json.loads(ledger.read_text())
    lines = PAGE.read_text().splitlines()
    for at, line in enumerate(lines):
        if re.match(r"\| \d+[a-z]? \|", line):
            cells = re.split(r"(?<!\\)\|", line)
            number = cells[1].strip()
            error, tolerance = record["errors"][number]
            control = record["controls"].get(number)
            cells[4:6] = f" {tolerance:.2g} ", f" {error:.2g} "
            cells[7] = " " if control is None else f" {control:.2g} "
            lines[at] = "|".join(cells)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
