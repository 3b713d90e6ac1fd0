"""The code in README and docs runs as written, and says what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/extend.md", "docs/theory.md"])
def test_code_blocks_run(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    scope: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    if page == "README.md":
        lines = capfd.readouterr().out.splitlines()
        assert lines[1] == "torch.Size([8, 32]) 48"
        assert float(lines[2]) < 1e-15
        assert [float(line.split()[1]) for line in lines[3:6]] == pytest.approx([0.0044, 0.0012, 0.00029], rel=0.05)
        assert float(lines[6]) == pytest.approx(2.0e-5, rel=0.05)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
