"""The page of learning against its stored figures, and jobs of the study that run."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {"page", "study", "rewards", "sudoku", "networks"}  # other folders of docs/ have scripts of the same names


Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """A function that loads a script of docs/learning."""
    for folder in ("steering", "parameterisations", "learning"):
        monkeypatch.syspath_prepend(str(DOCS / folder))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str) -> ModuleType:
        if name == "page":  # its own import of that name is another file
            monkeypatch.syspath_prepend(str(DOCS / "steering"))
        spec = import_module("importlib.util").spec_from_file_location(
            f"learning_{name}", DOCS / "learning" / f"{name}.py"
        )
        module = import_module("importlib.util").module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # a dataclass looks its module up
        spec.loader.exec_module(module)
        return module

    yield load
    for name in NAMES:
        sys.modules.pop(name, None)


def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "learning" / "study.json").read_text())
    return found


def test_the_tables_are_those_of_the_stored_figures(script: Script) -> None:
    page = script("page")
    text = (DOCS / "learning.md").read_text()
    made = {name: table for part in page.PARTS for name, table in part().items()}
    assert set(re.findall(r"<!-- (?!end )(.*?) -->", text)) == set(made)
    for name, table in made.items():
        (found,) = re.findall(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", text, re.S)
        assert found == table, name
    assert page.shown([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 ± 1.96"


def test_the_comparison_is_made_again_from_the_figures_of_each_seed(script: Script) -> None:
    found, study = figures(), script("study")
    assert study.compared(found) == found["compared"]
    kinds = {name.partition(": ")[0] for name in found["compared"]}
    assert kinds >= {"digits", "text", "sudoku4"}
    for name, one in found["compared"].items():
        assert len(one["minus plain at 16 calls, equal entropy"]["values"]) >= 5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sudoku4: jsd", "sudoku4: distilled", "sudoku4: reflow", "sudoku4: rewarded, runs, penalty"]
)
def test_a_job_of_the_study_runs(name: str, script: Script) -> None:
    job = script("study").jobs(True)[name](2)
    assert json.loads(json.dumps(job))
    if name == "sudoku4: jsd":
        assert [set(row["calls"]) for row in job["seeds"]] == [{"1", "2", "4", "8", "16", "32"}] * 2
