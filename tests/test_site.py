"""The built site: complete, without a link that leads nowhere, offline, and with a search that finds the guide.

``make docs`` builds it and runs these tests with SITE, the folder of its pages. Without SITE they build it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from places import ROOT

WEBSITE = ROOT / "docs" / "website"
pytestmark = [pytest.mark.slow, pytest.mark.site]

QUESTIONS = {
    "how do I infill": "guide/infill",
    "classifier-free": "guide/steer",
    "top-p": "guide/steer",
    "my checkpoint": "guide/checkpoint",
    "which sampler": "guide/choose",
    "train": "guide/train",
    "pyro": "guide/pyro",
    "gibbs": "reference/discdiff.samplers.Gibbs",
    "SplitLeap": "reference/discdiff.samplers.SplitLeap",
}


def built(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WEBSITE / "make_site.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "SITE" in os.environ:
        return Path(os.environ["SITE"]).resolve()
    folder = tmp_path_factory.mktemp("site")
    run = built(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "html"


class Page(HTMLParser):
    """What a page loads, where its links lead, the places in it that links can lead to, and its formulas."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.formulas = 0
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.places |= {has[name] for name in ("id", "name") if name in has}
        self.formulas += tag == "math"
        if tag in ("script", "img", "iframe", "source", "video", "object", "embed"):
            self.loads += [has[name] for name in ("src", "data", "srcset") if name in has]
        if tag == "img":
            self.pictures.append(has.get("src", ""))
        if tag == "link" and has.get("rel", "") not in ("index", "search", "next", "prev", "canonical"):
            self.loads.append(has.get("href", ""))
        if tag == "a" and "href" in has:
            self.links.append(has["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(file.relative_to(site)): Page(file.read_text()) for file in site.rglob("*.html")}


def elsewhere(text: str) -> bool:
    return re.match(r"(https?:)?//", text) is not None


def test_there_are_enough_pages(pages: dict[str, Page]) -> None:
    assert len([name for name in pages if not name.startswith("_modules/")]) >= 100


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    assert [(name, load) for name, page in pages.items() for load in page.loads if elsewhere(load)] == []
    for file in site.rglob("*.css"):
        loads = re.findall(r"(?:@import|url\()\s*[\"']?([^\"')\s;]+)", file.read_text())
        assert [load for load in loads if elsewhere(load)] == [], file
    planted = '<script src="https://cdn.example.org/mathjax.js"></script><link rel="stylesheet" href="//fonts.example">'
    assert [elsewhere(load) for load in Page(planted).loads] == [True, True]


def test_formulas_are_rendered(pages: dict[str, Page], site: Path) -> None:
    assert pages["guide/words.html"].formulas >= 8
    assert r"\propto" not in (site / "guide" / "words.html").read_text()


def test_names_in_code_are_links(site: Path) -> None:
    text = (site / "guide" / "words.html").read_text()
    assert re.search(r'href="../reference/discdiff.samplers.Ancestral.html"><code [^>]*>.*?S.Ancestral', text)


def missing(pages: dict[str, Page], site: Path) -> list[tuple[str, str]]:
    """Return the links of pages to other pages and places that are not there."""
    found = []
    for name, page in pages.items():
        for link in page.links:
            target, _, place = link.partition("#")
            if elsewhere(link) or ":" in target.partition("/")[0]:
                continue
            file = os.path.normpath(os.path.join(os.path.dirname(name), unquote(target))) if target else name
            if not (site / file).exists() or (place and file in pages and unquote(place) not in pages[file].places):
                found.append((name, link))
    return found


def test_links_lead_somewhere(pages: dict[str, Page], site: Path) -> None:
    assert missing(pages, site) == []
    planted = {
        "index.html": Page('<a href="nowhere.html">x</a> <a href="#nowhere">y</a> <a href="#here" id="here">z</a>')
    }
    assert [link for _, link in missing(planted, site)] == ["nowhere.html", "#nowhere"]


def test_every_public_name_is_documented(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a page, and it and the public methods of its class are in the inventory, with a link to the source."""
    monkeypatch.syspath_prepend(str(WEBSITE))
    import names
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    known = {name for kind, entries in inventory.items() if kind.startswith("py:") for name in entries}
    assert len(names.public()) > 300
    for address, one in names.public().items():
        assert (site / "reference" / f"{address}.html").exists(), address
        assert address in known
        if one.kind == "class":
            own = [key for key, value in vars(one.value).items() if key[0] != "_" and getattr(value, "__doc__", None)]
            methods = [
                key for key in own if callable(vars(one.value)[key]) or isinstance(vars(one.value)[key], property)
            ]
            assert [key for key in methods if f"{address}.{key}" not in known] == [], address
        if one.kind in ("class", "function"):
            assert "_modules/" in (site / "reference" / f"{address}.html").read_text(), address


def test_operators_processes_and_guides_have_pictures(pages: dict[str, Page], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WEBSITE))
    import pictures

    for name in pictures.makers():
        found = [page for path, page in pages.items() if re.fullmatch(rf"reference/[\w.]*\.{name}\.html", path)]
        assert any(name in source for page in found for source in page.pictures), name


def test_the_search_finds_what_people_ask(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WEBSITE))
    import finding
    import snowballstemmer

    english = snowballstemmer.stemmer("english")
    found = {question: finding.find(site, question, english.stemWord) for question in QUESTIONS}
    assert {question: pages[0] for question, pages in found.items()} == QUESTIONS
    assert finding.find(site, "no such word as xyzzy", english.stemWord) == []
    node = shutil.which("node")
    if node:  # then Sphinx's own code says the same
        run = [node, str(WEBSITE / "finding.js"), str(site), *QUESTIONS]
        theirs = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        assert [pages[0] for pages in theirs] == list(QUESTIONS.values())
        assert [set(pages) for pages in theirs] == [set(pages) for pages in found.values()]


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("[nowhere](nowhere.md)", "nowhere"),
        ("{py:class}`discdiff.NoSuchName`", "NoSuchName"),
        ("```{nosuchdirective}\n```", "nosuchdirective"),
        ("# T\n\n### Two levels below", "header"),
    ],
)
def test_a_fault_in_a_page_fails_the_build(fault: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(f"# Title\n\n{fault}\n")
    words = ["-b", "html", "-W", "-q", "-c", str(WEBSITE), str(tmp_path), str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode != 0
    assert what in run.stderr
