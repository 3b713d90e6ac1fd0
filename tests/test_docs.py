"""The code in README and docs runs as written, and says what it says."""

import json
import math
import re

import pytest
from places import ROOT

from discdiff.command import verify
from discdiff.theory.catalogue import KINDS

# plots.md has a test of its own, which also looks at the pictures
GUIDE = sorted(
    str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "guide").glob("*.md") if page.name != "plots.md"
)
REPORTS = ["docs/guidance.md", "docs/learning.md", "docs/plans.md", "docs/steering.md", "docs/theory.md"]
WITHOUT_CODE = {"docs/guide/papers.md"}


@pytest.mark.parametrize("page", ["README.md", *GUIDE, *REPORTS])
def test_code_blocks_run(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Blocks of a page run in its order; those of README each by itself, so that none depends on another."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks or page in WITHOUT_CODE
    scope: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": "docs"} if page == "README.md" else scope)
    if page == "README.md":
        lines = capfd.readouterr().out.splitlines()
        assert lines[0] == "torch.Size([8, 32]) 16"
        plain, polished = (line.split() for line in lines[1:3])
        assert plain[:2] == polished[:2] == ["16", "calls:"]
        assert float(plain[2]) == pytest.approx(12, abs=0.5)
        assert float(polished[2]) == pytest.approx(0.4, abs=0.2)
        assert float(lines[3]) < 1e-15
        assert [float(line.split()[1]) for line in lines[4:7]] == pytest.approx([0.0044, 0.0012, 0.00029], rel=0.05)
        assert float(lines[7]) == pytest.approx(2.0e-5, rel=0.05)
    if page == "docs/guide/first.md":
        found = re.findall(r"(\d+) (?:steps|calls): ([\d.]+) nats", capfd.readouterr().out)
        assert [first for first, _ in found] == ["4", "16", "16"]
        assert [float(nats) for _, nats in found] == pytest.approx([15.7, 3.2, 1.6], abs=0.15)
    if page == "docs/guide/infill.md":
        found = [float(line) for line in capfd.readouterr().out.splitlines() if line.startswith("0.")]
        assert len(found) == 2
        assert max(found) < 0.01
    if page == "docs/guide/steer.md":
        lines = capfd.readouterr().out.splitlines()
        calls = ["{'model': 6, 'unconditional': 6}", "{'model': 6, 'unconditional': 3}"]
        assert lines[:6] == ["6", *calls, "2", "2", "True"]
        assert [float(word) for word in lines[6].split()] == pytest.approx([2.9, 4.5], abs=0.1)
    if page == "docs/guide/checkpoint.md":
        said = re.search(r"```text\n(.*?)```", (ROOT / page).read_text(), re.S)
        assert said is not None
        assert re.sub(r"[\d.]+", "", capfd.readouterr().out).startswith(re.sub(r"[\d.]+", "", said[1]))
    if page == "docs/guide/words.md":
        assert "[[[0.5000, 0.0625, 0.4375]]]" in capfd.readouterr().out
    if page == "docs/plans.md":
        assert capfd.readouterr().out == "equal steps 0.0669, found 0.0152 nats\n"
    if page == "docs/learning.md":
        printed = capfd.readouterr().out
        assert float(printed.split()[0]) < 1e-15
        nats = [float(found) for found in re.findall(r"([\d.]+) nats", printed)]
        assert nats == pytest.approx([0.032, 0.027, 0.089, 0.060, 0.040, 0.05], abs=0.015)
        before, after = re.findall(r"([\d.]+), then ([\d.]+)", printed)[0]
        assert float(before) == pytest.approx(0.38, abs=0.02)
        assert float(after) > 0.42
    if page == "docs/guide/choose.md":
        assert capfd.readouterr().out == "1.0 3.0\n"
    if page == "docs/guidance.md":
        said = re.findall(r"^prints `(\{.*?\})`", (ROOT / page).read_text(), re.M)
        assert capfd.readouterr().out.splitlines() == said
        assert len(said) == len(blocks) == 4
    if page == "docs/steering.md":
        said = re.findall(r"^prints `(.*?)`", (ROOT / page).read_text(), re.M)
        assert capfd.readouterr().out.splitlines() == said
        assert len(said) == len(blocks) == 2
    if page == "docs/guide/train.md":
        said = re.findall(r"^prints `(.*?)`", (ROOT / page).read_text(), re.M)
        lines, number = capfd.readouterr().out.splitlines()[4:], r"\d+\.\d+"
        assert [re.sub(number, "#", line) for line in lines] == [re.sub(number, "#", line) for line in said]
        found, stated = ([float(one) for one in re.findall(number, "".join(text))] for text in (lines, said))
        assert found == pytest.approx(stated, abs=0.05)
    if page == "docs/guide/pyro.md":
        lines = capfd.readouterr().out.splitlines()
        assert lines[0] == "['0.0.prior', '1.0.where', '1.0.data', '1.0.token']"
        assert lines[1] == "odict_keys(['_INPUT', '_RETURN'])"
        found = [float(line.removeprefix("tensor(").split(",")[0].rstrip(")")) for line in lines[2:]]
        # of six tokens behind masks, two are the one that masks favour: 2 - 6 log(e + 2)
        assert found[0] == pytest.approx(2 - 6 * math.log(math.e + 2), abs=1e-5)
        assert found[1:3] == pytest.approx([1, 2], abs=0.1)
        assert found[3] == pytest.approx(0.3 / 4, abs=1e-4)
        assert found[4] == pytest.approx(0.7 / 0.775, abs=0.05)


def test_the_page_of_guidance_says_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import guidance

    text = (ROOT / "docs" / "guidance.md").read_text()
    held = dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", text, re.S))
    assert list(held) == list(guidance.TABLES)
    assert held["calls"] == guidance.calls()
    found = re.search(r"largest temporary.* \| 1,048,576 \| ([\d,]+) \|", held["cost"])
    assert found is not None
    assert int(found[1].replace(",", "")) <= 2**20
    ratio = re.search(r"draws from two sources.* \| 3 \| ([\d.]+) \|", held["cost"])
    assert ratio is not None
    assert float(ratio[1]) <= 3
    monkeypatch.setattr(guidance, "STEPS", (16,))  # the other columns are checked in tests/guidance
    for old, new in zip(held["laws"].splitlines()[2:], guidance.laws().splitlines()[2:], strict=True):
        one, other = old.split(" | "), new.rstrip(" |").split(" | ")
        assert one[2:6] == other[2:6]
        assert float(one[1]) < 1e-12


def test_the_page_of_steering_says_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import page
    import particles

    text = (ROOT / "docs" / "steering.md").read_text()
    made = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", text, re.S))
    found = [float(line.split(" | ")[1].rstrip(" |")) for line in made["particle_controls"].splitlines()[2:]]
    assert list(particles.controls().values()) == pytest.approx(found, abs=5e-4)
    for line in made["evidence"].splitlines()[2:]:
        assert float(line.split(" | ")[2].rstrip(" |")) < (1e-12 if "Masked" in line else 1e-9)
    assert page.placed(text, "evidence", made["evidence"]) == text
    with pytest.raises(ValueError, match="must have the marks <!-- nothing -->"):
        page.placed(text, "nothing", "")


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guide").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_what_was_verified_holds_all_and_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import verified

    known = json.loads((ROOT / "docs" / "verified.json").read_text())
    assert list(known) == list(verify.SHIPPED)
    assert all(set(cells) == set(KINDS) for cells in known.values())
    assert [c for cells in known.values() for c in cells.values() if "fail" in c["cell"]] == []
    assert verified.page(known) == (ROOT / "docs" / "verified.md").read_text()
