"""The tree: folders map to packages, imports go one way, nothing heavy is imported, files stay small."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import jaxtyping
import pytest
import torch
from places import ROOT

import discdiff as dd

LINKED = ("kernels", "samplers", "theory")

# Rooms from the lowest to the highest, and the rooms that each may import: a staircase, no arrow points up.
STAIRS = {
    "checks": "",
    "plugins": "",
    "kernels": "checks",
    "choices": "kernels",
    "process": "checks kernels choices",
    "prediction": "checks kernels choices process",
    "denoiser": "checks process prediction",
    "operator": "checks kernels choices process prediction denoiser",
    "guidance": "checks kernels choices prediction process denoiser operator",
    "losses": "checks process prediction denoiser",
    "samplers": "checks plugins kernels choices process prediction operator",
    "sampling": "checks choices process prediction denoiser operator guidance samplers",
    "plots": "checks process prediction sampling",
    "theory": "checks choices process prediction denoiser operator losses sampling",
    "plans": "checks kernels process prediction denoiser operator samplers sampling theory",
    "learning": "checks kernels choices process prediction denoiser losses sampling",
    "demo": "process prediction denoiser losses learning",
    "adapters": "checks plugins kernels choices process prediction denoiser operator samplers sampling demo",
    "command": "checks plugins kernels process prediction denoiser operator guidance losses samplers sampling plots "
    "theory learning demo adapters",
    "discdiff": "checks kernels choices process prediction denoiser operator guidance losses samplers sampling plots "
    "theory plans learning adapters",
}
ALLOWED = {room: set(below.split()) for room, below in STAIRS.items()}
# Imported when they are called: the writer by Denoiser.save, and the run that a guide needs by Denoiser.__call__.
UP = {("denoiser", "adapters"), ("denoiser", "operator")}
# Rooms whose names are imported from the room, never from a module in it.
CLOSED = ("choices", "process", "prediction", "denoiser", "operator", "guidance", "losses", "sampling")


def room_of(module: str) -> str:
    """Return the room of a module by its full name; the package itself is a room of its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in STAIRS else parts[0]


def module_of(file: Path) -> str:
    """Return the full name of the module in a file."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "discdiff" else ("discdiff", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(
    file
    for folder in ("discdiff", *LINKED)
    for file in (ROOT / folder).rglob("*.py")
    if not any(above.is_symlink() for above in file.parents)
)


@pytest.mark.parametrize("folder", LINKED)
def test_links_point_to_the_root_folders(folder: str) -> None:
    link = ROOT / "discdiff" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_kernels_is_no_root_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_file_is_in_a_room_and_rooms_are_flat() -> None:
    assert {room_of(module_of(file)) for file in FILES} == set(STAIRS)
    assert {len(module_of(file).split(".")) for file in FILES} <= {1, 2, 3}


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
    places = [file.relative_to(ROOT).as_posix() for file in FILES]
    code = {place if place.startswith("discdiff/") else f"discdiff/{place}" for place in places}
    assets = {f"discdiff/demo/assets/{file.name}" for file in (ROOT / "discdiff" / "demo" / "assets").iterdir()}
    compiled = {f"discdiff/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.c")}
    others = {"discdiff/py.typed", "discdiff/command/ratios.json", "discdiff/kernels/__init__.pyi"}
    assert held == code | assets | compiled | others


def imports(file: Path) -> set[str]:
    """Every discdiff module that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if room_of(name) in STAIRS} if module == "discdiff" else {module}
    return {name for name in found if name.split(".")[0] == "discdiff"}


def arrows(module: str, imported: set[str]) -> set[tuple[str, str]]:
    """The arrows from a module's room to other rooms; one with a dot passes by a closed room's door."""
    own = room_of(module)
    others = {name for name in imported if room_of(name) != own}
    doors = {(own, name) for name in others if room_of(name) in CLOSED and name.count(".") > 1}
    return doors | {(own, room_of(name)) for name in others}


def forbidden(module: str, imported: set[str]) -> set[tuple[str, str]]:
    """Arrows that the staircase does not have."""
    own = room_of(module)
    return {arrow for arrow in arrows(module, imported) if arrow[1] not in ALLOWED[own]} - UP


@pytest.mark.parametrize("file", FILES, ids=lambda f: module_of(f).removeprefix("discdiff."))
def test_imports_are_arrows_of_the_staircase(file: Path) -> None:
    assert forbidden(module_of(file), imports(file)) == set()


def test_the_staircase_goes_down_and_every_arrow_of_it_is_used() -> None:
    order = list(STAIRS)
    drawn = set().union(*(arrows(module_of(file), imports(file)) for file in FILES))
    for room, below in ALLOWED.items():
        assert all(order.index(other) < order.index(room) for other in below), room
        for other in below:
            assert (room, other) in drawn, f"no file of {room} imports {other}: the table can lose this arrow"
    assert drawn >= UP


def test_the_staircase_test_can_fail(tmp_path: Path) -> None:
    fault = tmp_path / "oracle.py"
    fault.write_text("def f():\n    from discdiff.samplers import Gibbs\n    import discdiff.kernels.dispatch\n")
    found = forbidden("discdiff.theory.oracle", imports(fault))
    assert found == {("theory", "samplers"), ("theory", "kernels")}
    fault.write_text("from discdiff.process.rank_one import Masked\nimport discdiff as dd\n")
    assert forbidden("discdiff.samplers.one", imports(fault)) == {
        ("samplers", "discdiff.process.rank_one"),
        ("samplers", "discdiff"),
    }


def test_no_module_is_named_like_a_name_that_it_exports() -> None:
    for file in FILES:
        module = import_module(module_of(file)) if "triton_" not in file.name else None
        assert file.stem not in getattr(module, "__all__", ()), file


def test_the_dispatcher_does_not_hide_its_package() -> None:
    assert import_module("discdiff.kernels.rows").Rows is dd.kernels.Rows
    assert dd.kernels.draw is import_module("discdiff.kernels.dispatch").draw


def test_the_error_for_an_old_name_says_the_new_one() -> None:
    rows = re.findall(r"^\| `dd\.(\w+).*?` \| `(.+?)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {old for old, _ in rows} == set(dd._RENAMED)
    for old, new in rows:
        assert old not in dir(dd)
        with pytest.raises(AttributeError, match=re.escape(f"discdiff.{old} is now {new}")):
            getattr(dd, old)
    process = dd.Masked(2, dd.Linear())
    for thing, old, new in (
        (dd.samplers, "Cycle", "RePaint"),
        (process, "unmix", "conditional_to_loo"),
        (dd.Denoiser(lambda x, t: x, process, "loo"), "shift", "Denoiser.call.shift"),
    ):
        with pytest.raises(AttributeError, match=f"{old} is now {new}"):
            getattr(thing, old)


@pytest.mark.parametrize("file", FILES, ids=lambda f: module_of(f).removeprefix("discdiff."))
def test_files_keep_to_one_idea(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 400
    assert ast.get_docstring(ast.parse("\n".join(lines)))


def test_import_is_light() -> None:
    late = ["triton", "transformers", "matplotlib", "sklearn", "scipy.stats", "discdiff.theory", "discdiff.adapters"]
    late += ["discdiff.learning"]
    code = (
        "import sys, time, torch, pyro; start = time.process_time(); import discdiff; "
        f"took = time.process_time() - start; print([m for m in {late} if m in sys.modules], took)"
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
