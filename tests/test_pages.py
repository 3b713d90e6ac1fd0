"""What the site is made of: docstrings as text, names at their doors, copied tables, pictures, papers."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from places import ROOT

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

WEBSITE = ROOT / "docs" / "website"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WEBSITE))


DOCSTRING = """Draw p_t for (B, *N) tokens | states of `x` and ``y*``.

    p(v) = O(v) * q        a formula

* one thing_
* another

Args:
    x: (B, *N) tokens.
"""
TEXT = r"""Draw p_t for (B, \*N) tokens \| states of ``x`` and ``y*``.

::

    p(v) = O(v) * q        a formula

* one thing\_
* another

Args:
    x: (B, \*N) tokens.
"""


def test_docstrings_become_text() -> None:
    from docstrings import converted

    assert re.sub(r"\n\n+", "\n\n", "\n".join(converted(DOCSTRING.splitlines()))).strip() == TEXT.strip()
    assert converted(["See https://arxiv.org/abs/1_2."]) == ["See https://arxiv.org/abs/1_2."]
    assert converted(["Args:", "    scale: w. At 0"])[-1] == r"    scale: w\. At 0"


def test_every_door_is_open_and_each_object_has_one_address() -> None:
    """All that any room offers in its ``__all__`` has a page."""
    import names

    found = names.public()
    described = {id(one.value) for one in found.values()} | {id(names.door(path)) for path in names.doors()}
    rooms = [f"discdiff.{file.parent.name}" for file in (ROOT / "discdiff").glob("*/__init__.py")]
    assert len(rooms) >= 12
    for room in {"discdiff", *rooms} - set(names.APART):
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            assert id(value) in described or not (callable(value) or hasattr(value, "__all__")), f"{room}.{name}"
    assert found["discdiff.Masked"].value is dd.Masked
    assert "discdiff.process.Masked" not in found
    objects = [id(one.value) for one in found.values() if one.kind in ("class", "function")]
    assert len(objects) == len(set(objects))


def test_every_name_has_a_group_and_a_first_line() -> None:
    import reference

    groups = reference.grouped()
    assert {"processes", "predictors", "correctors", "guides", "losses", "theory"} <= set(groups)
    assert {one.name for one in groups["predictors"] + groups["correctors"]} == set(S.__all__)
    assert {"Masked", "Uniform", "Hybrid"} <= {one.name for one in groups["processes"]}
    assert {"Truncation", "ClassifierFree", "Reward"} <= {one.name for one in groups["guides"]}
    assert [one.address for names in groups.values() for one in names if not reference.first_line(one)] == []


def test_the_facts_of_an_operator_are_those_that_were_found() -> None:
    import facts
    import pictures

    assert facts.declared("SplitLeap") == [["``split_leap``", "2", "-", "2", "yes", "yes", "no"]]
    assert facts.declared("Gibbs")[0][:4] == ["``gibbs``", "-", "exact", "1"]
    text = (ROOT / "docs" / "verified.md").read_text()
    for name in S.__all__:
        assert facts.declared(name)
        for setting, on, _ in facts.checked(name):
            row = re.search(rf"^\| {re.escape(setting.replace('``', '`'))} \| (.*) \|$", text, re.M)
            assert row is not None
            cells = [cell for cell in row[1].split(" | ") if cell[0].isdigit()]
            assert on.count(",") + 1 == len(cells)
            assert [part.split(" ", 1)[1] for part in on.split(", ")] == cells
    page = (ROOT / "docs" / "predictors.md").read_text()
    for _, _, inside, end, kl in facts.small("SplitLeap"):
        assert f"{inside}, {end} | {kl}" in page
    assert len(facts.small("SplitLeap")) == len(facts.long("SplitLeap")) == 4
    assert facts.kept("Gibbs")[0][:2] == ["``Gibbs(sites=1)``", "exact"]
    assert facts.of_process(dd.Masked(3, dd.Linear()))[:2] == [
        ["states of a site", "4 for 3 tokens"],
        ["noise only hides tokens", "yes"],
    ]
    assert facts.of_process(dd.Uniform(3, dd.Linear()))[1][1] == "no"
    assert "first_hitting" in facts.accepted("Masked")
    assert "first_hitting" not in facts.accepted("Uniform")
    assert facts.of_guide(pictures.guide("ClassifierFree"))[0][1] == "1"
    assert facts.of_guide(pictures.guide("Reward"))[1][1] == "yes"
    assert pictures.guide("Truncation") is None


def test_the_page_of_the_command_has_every_command() -> None:
    import commands

    found = commands.commands()
    assert {"discdiff", "discdiff sample digits", "discdiff sample folder", "discdiff train"} <= set(found)
    assert all(text.startswith(f"usage: {name.replace('folder', 'FOLDER')}") for name, text in found.items())
    assert set(re.findall(r"^    (\w+)", found["discdiff"], re.M)) <= {name.split()[1] for name in found if " " in name}


def test_names_in_code_become_links() -> None:
    pytest.importorskip("sphinx", reason="the extra docs")
    from linking import KNOWN, address

    assert address("S.Gibbs(sites=4)", KNOWN) == "discdiff.samplers.Gibbs"
    assert address("dd.grid.by_alpha", KNOWN) == "discdiff.grid.by_alpha"
    assert address("losses.MaskedNELBO", KNOWN) == "discdiff.losses.MaskedNELBO"
    assert [address(text, KNOWN) for text in ("S.Nothing", "torch.rand", "S.Gibbs() ** 2", "x = dd.Masked(3)")] == [
        None
    ] * 4


def test_copied_tables_are_true() -> None:
    import copies

    pages = {page: page.read_text() for page in GUIDE}
    assert sum(len(copies.MARKED.findall(text)) for text in pages.values()) >= 6
    for page, text in pages.items():
        assert copies.renewed(text) == text, page
    text = pages[ROOT / "docs" / "guide" / "choose.md"]
    planted = text.replace("| SplitLeap | 2 |", "| SplitLeap | 3 |")
    assert planted != text
    assert copies.renewed(planted) == text
    with pytest.raises(ValueError, match="no row begins with 'Nothing'"):
        copies.table("predictors.md", "half", ["Nothing"])
    with pytest.raises(ValueError, match="no table between <!-- nothing -->"):
        copies.table("predictors.md", "nothing", [])


def test_pictures_show_the_operators_own_matrices() -> None:
    import pictures

    found, names = pictures.matrix(S.Ancestral(), dd.Masked(3, dd.Linear()))
    model = pictures.world().denoiser(dd.Masked(3, dd.Linear()))
    assert torch.equal(found, T.kernel(S.Ancestral(), model.process, model, t=pictures.T_START, s=pictures.T_END))
    assert len(names) == len(found) == 16
    process = dd.Uniform(3, dd.Linear())
    model = pictures.world().denoiser(process, predicts="loo")
    exact, drawn = (
        pictures.matrix(S.Ancestral(), process)[0],
        pictures.sampled(S.Ancestral(), process, model, 2),
    )
    assert (exact - drawn).abs().max() < 0.12  # 400 runs from each state: four standard errors are 0.1
    other = pictures.matrix(S.Ancestral() >> S.Gibbs(), process)[0]
    assert (other - drawn).abs().max() > 0.12
    assert set(pictures.makers()) >= {*S.__all__, "Masked", "Interpolant", "Reward"}


def test_the_picture_of_two_predictions_is_bayes_rule() -> None:
    import figures
    import pictures

    p0 = pictures.world().p0.view(3, 3)
    other = p0 @ dd.Uniform(3, dd.Linear()).transition(0.5, 1.0)[:, 2]  # p(x1, z2 = c)
    own = dd.Uniform(3, dd.Linear()).transition(0.5, 1.0)[:, 0]
    loo, denoiser = figures.predictions()["Uniform"]
    assert loo.allclose(other / other.sum())
    assert denoiser.allclose(other * own / (other * own).sum())
    masked = figures.predictions()["Masked"]
    assert masked[0].allclose(masked[1])
    assert all((ROOT / "docs" / "guide" / f"{name}.png").exists() for name in ("pipeline", "predictions"))


def named(text: str) -> list[str]:
    """The names of discdiff that a page has in code, outside of blocks."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return re.findall(r"`((?:dd|S|T|losses|discdiff)\.[\w.]+)", prose)


def absent(name: str) -> bool:
    first, _, rest = name.partition(".")
    found: object = {"dd": dd, "S": S, "T": T, "losses": dd.losses, "discdiff": dd}[first]
    for part in rest.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return True
    return False


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_names_in_guides_exist(page: Path) -> None:
    groups = {f"discdiff.{kind}" for kind in ("operators", "processes", "families")}  # of entry points
    assert [name for name in named(page.read_text()) if absent(name) and name not in groups] == []
    assert absent("dd.NoSuchName")
    assert not absent("dd.grid.by_alpha")


def cited(folders: tuple[str, ...]) -> set[str]:
    """The papers that docstrings name with a link to arXiv."""
    files = (file for folder in folders for file in (ROOT / folder).glob("*.py"))
    texts = (ast.get_docstring(node) or "" for file in files for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.Module | ast.ClassDef))  # fmt: skip
    return {link for text in texts for link in re.findall(r"arxiv\.org/abs/(\d+\.\d+)", text)}


def test_papers_lead_to_objects() -> None:
    """The page has each paper that an operator, a process, a guide or a loss cites, and no other."""
    text = (ROOT / "docs" / "guide" / "papers.md").read_text()
    linked = set(re.findall(r"arxiv\.org/abs/(\d+\.\d+)", text))
    everywhere = tuple(f"discdiff/{folder.name}" for folder in (ROOT / "discdiff").iterdir() if folder.is_dir())
    assert linked - cited((*everywhere, "samplers", "theory")) == set()
    minor = {"1102.2922", "1206.7051", "2206.14897", "2212.11972"}  # methods of numerics and schedules
    assert cited(("samplers", "discdiff/process", "discdiff/guidance", "discdiff/losses")) - linked == minor
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| paper")]
    assert len(rows) >= 40
    assert [row for row in rows if not named(row)] == []


def test_reports_open_with_what_to_do() -> None:
    """Each page of evidence says to its reader what to do with it, below its title."""
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert re.match(r"# .+\n\n\*\*What to do\.\*\* [A-Z]", page.read_text()), page.name
