"""The gallery: its blocks run as written and draw each picture that the page shows."""

import re
from pathlib import Path

import pytest
from places import ROOT

PAGE = ROOT / "docs" / "guide" / "plots.md"


@pytest.mark.slow
def test_the_gallery_runs_and_draws_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import plots

    from discdiff import plots as functions

    plots.run(tmp_path)
    shown = re.findall(r"!\[[^\]]+\]\(plots/(\w+\.png)\)", PAGE.read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(shown)
    assert sorted(file.name for file in (PAGE.parent / "plots").iterdir()) == sorted(shown)
    called = set(re.findall(r"plots\.(\w+)\(", PAGE.read_text()))
    assert called == set(functions.__all__)  # no function without a picture
    assert all(len(line) < 120 for line in PAGE.read_text().splitlines())


def test_a_page_without_a_picture_would_be_seen() -> None:
    """The planted fault: a block that saves nothing leaves a picture shown that is not drawn."""
    assert re.findall(r"!\[[^\]]+\]\(plots/(\w+\.png)\)", "![a picture](plots/none.png)") == ["none.png"]
