"""``discdiff doctor``: what is installed, whether compiled code runs, and a self-test, each with a remedy.

A finding is "ok", "slow" (all works, but slower), "absent" (an extra that is not installed) or "wrong".
"""

import argparse
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

import discdiff.kernels.dispatch as kernels
from discdiff import theory
from discdiff.denoiser import Denoiser
from discdiff.kernels import compiled
from discdiff.process import Linear, Masked, Uniform
from discdiff.samplers import Ancestral, AnyOrder, Gibbs
from discdiff.sampling import Sampler

__all__ = ["Finding", "add_arguments", "findings", "run"]

Mark = Literal["ok", "slow", "absent", "wrong"]

# The extra that brings a package that discdiff does not need for everything; "test" brings all of them.
_EXTRAS = {"matplotlib": "demo", "scikit-learn": "demo", "transformers": "hf", "interegular": "steer", "triton": "test"}
# What this seed gave when the self-test was written: it does not depend on the machine, torch's version or the backend.
_RECORDED = ((3, 0, 4, 4, 2, 0, 0, 0), (0, 4, 1, 2, 0, 4, 1, 3))
_REPORT = "; if this stays, open an issue with the output of: discdiff doctor --json"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        part: "version", "machine", "cache" or "self-test".
        name: what was looked at.
        mark: "ok", "slow", "absent" or "wrong".
        found: what was found.
        remedy: what to do, or "".
    """

    part: str
    name: str
    mark: Mark
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for an issue")


def run(arguments: argparse.Namespace) -> int:
    """Print all findings and return the exit status: 1 if something is wrong, else 0."""
    found = list(findings())
    wrong = [one for one in found if one.mark == "wrong"]
    if arguments.json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(one) for one in found]}, indent=1))
        return 1 if wrong else 0
    console, colours = Console(highlight=False), {"ok": "green", "slow": "yellow", "absent": "dim", "wrong": "red"}
    for part in dict.fromkeys(one.part for one in found):
        console.print(part)
        mine = [one for one in found if one.part == part]
        width = max(len(one.name) for one in mine)
        for one in mine:
            mark = f"[{colours[one.mark]}]{one.mark:6}[/]"
            console.print(f"  {mark}  {one.name:{width}}  {escape(one.found)}", soft_wrap=True)
    for one in found:
        if one.remedy:
            console.print(f"{one.mark}: {one.name}: {one.remedy}", markup=False, soft_wrap=True)
    console.print(f"{len(wrong)} of {len(found)} findings are wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def findings() -> Iterator[Finding]:
    """Yield what is found on this machine: versions, the machine, caches, and the self-test."""
    yield from _versions()
    yield from _machine()
    yield from _caches()
    for test in (_keyed_draw, _two_backends, _exact_law):
        yield _tested(test)


# --- versions ---------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding("version", "python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    try:
        asked = requires("discdiff") or []
        yield Finding("version", "discdiff", "ok", f"{version('discdiff')} in {Path(__file__).parents[1]}")
    except PackageNotFoundError:
        asked = []
        remedy = "run: pip install -e . in the checkout, so that versions of other packages can be compared"
        yield Finding("version", "discdiff", "absent", f"a checkout in {Path(__file__).parents[1]}", remedy)
    needed = dict(_parted(line) for line in asked if "extra ==" not in line)
    optional = dict(_parted(line) for line in asked if "extra ==" in line)
    for name in needed or ("torch", "pyro-ppl", "numpy", "scipy", "rich", "safetensors", "jaxtyping"):
        yield _package(name, needed.get(name, ""), f"run: pip install '{name}{needed.get(name, '')}'", "wrong")
    for name, extra in _EXTRAS.items():
        yield _package(name, optional.get(name, ""), f"if you need it: pip install 'discdiff[{extra}]'", "absent")


def _parted(line: str) -> tuple[str, str]:
    """Return the name and the versions of a requirement such as "torch<3,>=2.11; extra == 'test'"."""
    match = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)", line)
    assert match is not None
    return match[1], match[2].strip()


def _package(name: str, accepted: str, remedy: str, missing: Mark) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("version", name, missing, "not installed", remedy)
    if not _fits(found, accepted):
        return Finding("version", name, "wrong", f"{found}, but discdiff takes {accepted}", remedy)
    return Finding("version", name, "ok", found)


def _fits(found: str, accepted: str) -> bool:
    """Return whether a version lies in bounds such as ">=2.11,<3"; only the numbers at its front count."""
    numbers = _numbers(found)
    for bound in filter(None, accepted.split(",")):
        match = re.match(r"\s*(>=|<|==)\s*([\d.]+)$", bound)
        if match is None:
            continue
        limit = _numbers(match[2])
        if {">=": numbers < limit, "<": numbers >= limit, "==": numbers != limit}[match[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    front = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in front[0].split(".")] if front else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# --- the machine and caches -------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "processor", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    command = compiled.compiler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of is a finding
        library = compiled.library()
    if command is not None:
        yield Finding("machine", "C compiler", "ok", " ".join(command))
    else:
        remedy = "" if library else "install one (Debian: apt install gcc), or name yours in the variable CC"
        yield Finding("machine", "C compiler", "absent", "none", remedy)
    if library is not None:
        yield Finding("machine", "compiled kernels", "ok", str(library._name))
    else:
        remedy = "install a C compiler" if command is None else "read what the compiler says: CC=... selects another"
        yield Finding("machine", "compiled kernels", "slow", "none, so torch draws", f"{remedy}; results are the same")
    if torch.cuda.is_available():
        yield Finding("machine", "GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    elif torch.version.cuda is not None:
        remedy = "if this machine has a GPU, see whether nvidia-smi lists it and its driver fits this CUDA"
        yield Finding("machine", "GPU", "absent", f"none that torch (CUDA {torch.version.cuda}) can use", remedy)
    else:
        yield Finding("machine", "GPU", "absent", "torch is a build for CPUs")


def _caches() -> Iterator[Finding]:
    folder = compiled.cache()
    files = list(folder.glob("*.so")) if folder.is_dir() else []
    size = sum(file.stat().st_size for file in files) / 2**20
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(place, os.W_OK):
        yield Finding("cache", "compiled kernels", "ok", f"{len(files)} files, {size:.1f} MiB in {folder}")
    else:
        remedy = "set XDG_CACHE_HOME to a folder that you may write to; until then each run compiles anew"
        yield Finding("cache", "compiled kernels", "slow", f"{folder} cannot be written", remedy)
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    yield Finding("cache", "checkpoints of the hub", "ok", str(Path(hub).expanduser()))


# --- the self-test ----------------------------------------------------------------------------------------------------


def _tested(test: Callable[[], tuple[bool, str]]) -> Finding:
    name = " ".join((test.__doc__ or "").partition(":")[0].split()).lower()
    try:
        ok, found = test()
    except Exception as error:  # whatever it is, it is the finding
        ok, found = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    remedy = f"reinstall discdiff and torch, and delete {compiled.cache()}{_REPORT}"
    return Finding("self-test", name, "ok" if ok else "wrong", found, "" if ok else remedy)


def _keyed_draw() -> tuple[bool, str]:
    """A seed gives its recorded tokens: the logits are exact in binary, so no rounding decides."""
    process, site, token = Uniform(5, Linear()), torch.arange(8)[:, None], torch.arange(5)

    def network(x: Tensor, t: Tensor | None) -> Tensor:
        return ((x[..., None] * 7 + site * 3 + token * 5) % 11).float() / 4

    sampler = Sampler(process, Denoiser(network, process, "loo"), Ancestral() >> Gibbs(), steps=4)
    found = sampler.sample(2, 8, seed=1).tokens.tolist()
    told = "2 x 8 tokens" if found == [list(row) for row in _RECORDED] else f"{found}, recorded {_RECORDED}"
    return found == [list(row) for row in _RECORDED], told


def _two_backends() -> tuple[bool, str]:
    """Compiled kernels draw what torch draws: for 256 rows of 1000 logits."""
    generator = torch.Generator().manual_seed(0)
    logits, at = 3 * torch.randn(256, 1000, generator=generator), torch.arange(256)
    one = kernels.draw(logits, seed=7, rows=at, positions=at, backend="torch")
    other = kernels.draw(logits, seed=7, rows=at, positions=at)
    differ = int((one != other).sum())
    return differ == 0, f"{kernels.row_pass()}, {differ} of 256 tokens differ"


def _exact_law() -> tuple[bool, str]:
    """Two sites have the exact law: one site a step leaves no error, and the enumerated law shows it."""
    p0 = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    world, process = theory.Enumeration(p0, vocab_size=2, length=2), Masked(2, Linear())
    error = theory.tv(theory.law(Sampler(process, world.denoiser(process), AnyOrder(), steps=2)), p0)
    return error < 1e-12, f"total variation {error:.0e} from p0"
