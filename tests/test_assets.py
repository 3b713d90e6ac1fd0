"""What the repository ships beside code: checksums of weights and text, and licences of each file."""

import hashlib
from pathlib import Path

import pytest
from places import ROOT

FOLDERS = [ROOT / "discdiff" / "demo" / "assets", ROOT / "docs"]


def listed(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_are_those_of_their_checksums(folder: Path) -> None:
    own = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    own |= {path.name: path for path in folder.glob("topics.txt")}
    assert own
    assert listed(folder) == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in own.items()}


def test_every_asset_has_its_licence_beside_it() -> None:
    said, folder = (FOLDERS[0] / "LICENSES.md").read_text(), FOLDERS[0]
    patterns = {
        word.strip("` ") for line in said.splitlines() if line.startswith("| `") for word in line.split("|")[1:2]
    }
    lacking = [
        path.name
        for path in folder.iterdir()
        if not path.name.startswith("LICENSE") and not any(path.match(pattern) for pattern in patterns)
    ]
    assert lacking == []
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (folder / "LICENSE-PSF.txt").read_text()
