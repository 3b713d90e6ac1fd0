"""What is released: sdist and wheel install and run away from the checkout, types are complete, no name is dropped."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from places import ROOT

# Modules and names that Python 3.12, 3.13 or 3.14 removed, or deprecated with a warning.
DROPPED_MODULES = {
    "aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr", "imp",
    "lib2to3", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd",
    "sunau", "telnetlib", "uu", "xdrlib",
}  # fmt: skip
DROPPED_NAMES = {
    "ast.Num", "ast.Str", "ast.Bytes", "ast.NameConstant", "ast.Ellipsis", "datetime.utcnow",
    "datetime.utcfromtimestamp", "collections.abc.ByteString", "typing.ByteString", "pkgutil.find_loader",
    "pkgutil.get_loader", "pkgutil.ImpImporter", "importlib.abc.ResourceReader", "importlib.abc.Traversable",
    "locale.getdefaultlocale", "locale.resetlocale", "unittest.makeSuite", "unittest.findTestCases",
    "configparser.SafeConfigParser", "logging.warn", "asyncio.get_event_loop_policy",
    "asyncio.set_event_loop_policy", "asyncio.iscoroutinefunction", "inspect.getargspec", "shutil.ExecError",
    "sys.last_type", "typing.no_type_check_decorator", "pty.master_open", "tempfile.template",
    "webbrowser.MacOSX",
}  # fmt: skip
LAST = {name.rpartition(".")[2] for name in DROPPED_NAMES}
# Of the suite, what looks at no file of the checkout.
AGAINST_THE_WHEEL = (
    "choices/test_choices.py", "command/test_cli.py", "command/test_doctor.py", "operator/test_operator.py",
    "plots/test_plots.py", "prediction/test_prediction.py", "process/test_process.py",
)  # fmt: skip


def dropped(source: str) -> set[str]:
    """The names of the two lists above that a source uses, and ``onerror`` of shutil.rmtree."""
    found, tree = set(), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in DROPPED_MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module.split(".")[0] in DROPPED_MODULES else set()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & DROPPED_NAMES
        elif isinstance(node, ast.Attribute) and node.attr in LAST:
            found |= {name for name in DROPPED_NAMES if f".{ast.unparse(node)}".endswith(f".{name}")}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("rmtree"):
            found |= {"rmtree(onerror=)"} if any(word.arg == "onerror" for word in node.keywords) else set()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            found |= {"~bool"} if isinstance(node.operand, ast.Constant) else set()
    return found


def test_no_file_uses_what_later_pythons_dropped() -> None:
    folders = ("discdiff", "docs", "kernels", "samplers", "tests", "theory")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files = [file for file in files if not any(above.is_symlink() for above in file.parents)]
    assert len(files) > 200
    assert {str(file): names for file in files if (names := dropped(file.read_text()))} == {}


def test_dropped_names_are_found() -> None:
    faults = {
        "import distutils.core": {"distutils.core"},
        "from imp import reload": {"imp"},
        "from typing import ByteString": {"typing.ByteString"},
        "import datetime\ndatetime.datetime.utcnow()": {"datetime.utcnow"},
        "import ast\nisinstance(x, ast.Num)": {"ast.Num"},
        "shutil.rmtree(path, onerror=print)": {"rmtree(onerror=)"},
        "~True": {"~bool"},
        "import ast, datetime\nast.Name, datetime.datetime.now(), ~mask": set(),
    }
    assert {source: dropped(source) for source in faults} == faults


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel that was built from it, and a venv ``v`` that holds this wheel.

    The venv sees the packages of this interpreter, behind the wheel's.
    """
    folder = tmp_path_factory.mktemp("released")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    done = subprocess.run(build, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    venv.create(folder / "v", with_pip=False, symlinks=True)
    (inside,) = (folder / "v" / "lib").glob("python*/site-packages")
    # a path in a .pth file: the .pth files there, such as an editable install's, are not read
    (inside / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = (folder / "dist").glob("*.whl")
    python = folder / "v" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def ran(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the venv in an empty folder, without this process's path."""
    (folder / "empty").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    kept["PATH"] = f"{folder / 'v' / 'bin'}{os.pathsep}{kept['PATH']}"
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder / "empty", env=kept)


@pytest.mark.slow
def test_the_sdist_holds_what_it_takes_to_build(released: Path) -> None:
    (sdist,) = (released / "dist").glob("*.tar.gz")
    (wheel,) = (released / "dist").glob("*.whl")
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    roots = {"README.md", "LICENSE", "pyproject.toml", "setup.py", "kernels/keyed.c", "kernels/__init__.pyi"}
    assert roots <= held
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert all(name.startswith("discdiff/") for name in names)
    assert {"discdiff/py.typed", "discdiff/kernels/keyed.c", "discdiff/theory/__init__.py"} <= set(names)


@pytest.mark.slow
def test_the_installed_command_finds_nothing_wrong(released: Path) -> None:
    done = ran(released, released / "v" / "bin" / "discdiff", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["name"]: one["found"] for one in json.loads(done.stdout)["findings"]}
    assert str(released / "v") in found["discdiff"]
    done = ran(released, released / "v" / "bin" / "discdiff", "demo", "--out", released / "demo.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (released / "demo.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_part_of_the_suite_runs_against_the_wheel(released: Path) -> None:
    place = released / "suite"
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    files = [str(place / "tests" / name) for name in AGAINST_THE_WHEEL]
    words = ["-m", "pytest", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--rootdir", str(place)]
    done = ran(released, released / "v" / "bin" / "python", *words, "-c", str(place / "pyproject.toml"), *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


@pytest.mark.slow
def test_the_types_of_the_public_interface_are_complete(released: Path) -> None:
    """By ``pyright --verifytypes``; an annotation taken away from the installed wheel is found."""
    beside = Path(sys.executable).parent / "pyright"
    pyright = str(beside) if beside.exists() else shutil.which("pyright")
    if pyright is None or ran(released, pyright, "--version").returncode != 0:
        pytest.skip("pyright is not installed: make .venv/test tries to")
    words = [pyright, "--verifytypes", "discdiff", "--ignoreexternal"]
    done = ran(released, *words)
    assert "Type completeness score: 100%" in done.stdout, done.stdout[-3000:]
    (module,) = (released / "v").rglob("discdiff/command/pictures.py")
    sound = module.read_text()
    assert sound.count('def picture(tokens: Int[Tensor, "B 64"],') == 1
    try:
        module.write_text(sound.replace('def picture(tokens: Int[Tensor, "B 64"],', "def picture(tokens,"))
        assert 'Type annotation for parameter "tokens" is missing' in ran(released, *words).stdout
    finally:
        module.write_text(sound)
