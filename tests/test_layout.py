"""The tree: folders map to packages, imports go one way, nothing heavy is imported, files stay small."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch

import discdiff as dd

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "discdiff": "discdiff",
    "theory": "discdiff.theory",
    "samplers": "discdiff.samplers",
    "kernels": "discdiff.kernels",
    "adapters": "discdiff.adapters",
}
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("folder", ["theory", "samplers", "kernels", "adapters"])
def test_links_point_to_the_root_folders(folder: str) -> None:
    link = ROOT / "discdiff" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_kernels_is_no_root_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_folders_are_flat() -> None:
    for folder in FOLDERS:
        inner = [p.name for p in (ROOT / folder).iterdir() if p.is_dir() and not p.is_symlink()]
        assert set(inner) <= {"__pycache__", "assets"}, folder


def test_the_wheel_holds_everything_and_nothing_else(tmp_path: Path) -> None:
    # From a copy: a build/ folder left in the checkout would find its way into the next wheel.
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {f"{FOLDERS[file.parent.name].replace('.', '/')}/{file.name}" for file in FILES}
    assets = {f"discdiff/assets/{file.name}" for file in (ROOT / "discdiff" / "assets").iterdir()}
    assert held == code | assets | {"discdiff/py.typed"} | {
        f"discdiff/kernels/{name}.c" for name in ("keyed", "mixture", "row_pass", "row_wide")
    }


def imports(file: Path) -> set[str]:
    """Every discdiff module a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "discdiff"}


def violations(file: Path) -> set[str]:
    """Imports that the one-way rule forbids."""
    room, own = file.parent.name, imports(file)
    kernels = {n for n in own if n.startswith("discdiff.kernels.") and not n.startswith("discdiff.kernels.dispatch")}
    samplers = {n for n in own if n.startswith("discdiff.samplers")}
    theory = {n for n in own if n.startswith("discdiff.theory")}
    if room == "kernels":
        return {n for n in own if not n.startswith(("discdiff.kernels", "discdiff.checks"))} - {"discdiff"}
    if room == "theory":
        return samplers | {n for n in own if n.startswith("discdiff.kernels")}
    if room == "samplers":
        return kernels | theory
    above = {"__init__", "cli", "bench", "bench_steps", "expression", "verify"}
    return kernels | (theory | samplers if file.stem not in above else set())


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_imports_go_one_way(file: Path) -> None:
    assert violations(file) == set()


def test_the_import_rule_can_fail(tmp_path: Path) -> None:
    (tmp_path / "theory").mkdir()
    fault = tmp_path / "theory" / "oracle.py"
    fault.write_text("def f():\n    from discdiff.samplers import Gibbs\n    from discdiff.kernels import dispatch\n")
    assert violations(fault) >= {"discdiff.samplers.Gibbs", "discdiff.kernels.dispatch"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_files_keep_to_one_idea(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 400
    assert file.name == "__init__.py" or ast.get_docstring(ast.parse("\n".join(lines)))


def test_import_is_light() -> None:
    code = (
        "import sys, time, torch, pyro; start = time.process_time(); import discdiff; "
        "took = time.process_time() - start; "
        "print([m for m in ('triton', 'transformers', 'matplotlib', 'sklearn') if m in sys.modules], took)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    loaded, took = out.rsplit(" ", 1)
    assert loaded == "[]"
    assert float(took) < 2


def test_shapes_are_checked_in_tests_and_only_there() -> None:
    state = dd.State(torch.zeros(2, 3, dtype=torch.int64), 0.5, torch.arange(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        state.select(torch.zeros(2, 2, dtype=torch.int64))
    code = "import torch, discdiff; discdiff.State(torch.zeros(2, 3), 0.5, torch.zeros(5, 5)); print('free')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "free\n"
