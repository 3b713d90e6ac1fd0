"""The gallery: its blocks run as written and draw each picture that the page shows."""

import re
from pathlib import Path

import pytest
from places import ROOT

PAGE = ROOT / "docs" / "guide" / "plots.md"


def unlike(page: Path, folder: Path) -> set[str]:
    """Run the blocks of a page in a folder; return the pictures that only the page or only the folder has."""
    import plots

    plots.run(folder, page)
    shown = set(re.findall(r"!\[[^\]]+\]\(plots/(\w+\.png)\)", page.read_text()))
    assert shown
    return shown ^ {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_the_gallery_runs_and_draws_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from discdiff import plots as functions

    assert unlike(PAGE, tmp_path) == set()
    assert {file.name for file in (PAGE.parent / "plots").iterdir()} == {file.name for file in tmp_path.iterdir()}
    called = set(re.findall(r"plots\.(\w+)\(", PAGE.read_text()))
    assert called == set(functions.__all__)  # no function without a picture
    assert all(len(line) < 120 for line in PAGE.read_text().splitlines())


def test_a_page_without_a_picture_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a page that shows a picture which none of its blocks draws."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    page, folder = tmp_path / "page.md", tmp_path / "made"
    folder.mkdir()
    page.write_text('```python\nopen("one.png", "w").close()\n```\n![one](plots/one.png)\n![two](plots/two.png)\n')
    assert unlike(page, folder) == {"two.png"}
