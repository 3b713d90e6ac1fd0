"""``load`` on damaged and odd files: a share of them here, all in the slow tests; and planted faults that are caught.

``python tests/fuzzed.py`` runs all and prints their number by what came of them.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fuzzed
import pytest
import torch
from fuzz_files import cases
from fuzzed import Case, Outcome, examined
from torch import nn

import discdiff as dd

pytestmark = pytest.mark.usefixtures("as_user")  # errors as users meet them, without the tests' own shape checker
SHARE, PARTS = 24, 8


def wrong(chosen: list[Case]) -> list[str]:
    found = [(case.name, outcome) for case, outcome in fuzzed.run(chosen)]
    assert len(found) == len(chosen)
    return [f"{o.kind}: {name}: {o.text}" for name, o in found if o.kind not in ("right", "refused")]


def test_a_share_of_the_files_ends_in_our_errors() -> None:
    assert wrong(cases()[:: len(cases()) // SHARE]) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_file_ends_in_our_errors(part: int) -> None:
    assert wrong(cases()[part::PARTS]) == []


def test_there_are_many_files_of_many_kinds_and_always_the_same() -> None:
    assert len(cases()) >= 600
    assert [case.name for case in cases.__wrapped__()] == [case.name for case in cases()]
    assert {case.like for case in cases()} >= set(fuzzed.names())


# --- the undamaged ----------------------------------------------------------------------------------------------------


def copy(name: str) -> Case:
    from fuzz_files import spoilt

    return spoilt(name, "as it is", lambda folder: None)


@pytest.mark.parametrize("name", ["BERT", "MDLM", "saved"])
def test_the_undamaged_is_loaded_rightly(name: str) -> None:
    found = examined(copy(name))
    assert found.kind == "right", found.text


# --- planted faults ---------------------------------------------------------------------------------------------------


def foreign(path: Path) -> dd.Denoiser:
    raise KeyError("x")


def unsaid(path: Path) -> dd.Denoiser:
    raise ValueError("of ours, and it does not say where it is from")


def named(path: Path) -> dd.Denoiser:
    raise ValueError("load: it is refused")


def dies(path: Path) -> dd.Denoiser:
    os.abort()


def spins(path: Path) -> dd.Denoiser:
    while True:
        sum(range(10_000))


def waits(path: Path) -> dd.Denoiser:
    time.sleep(1000)
    raise AssertionError


def swells(path: Path) -> dd.Denoiser:
    torch.ones(3 * 2**28)
    raise AssertionError


def swells_and_says_it_is_ours(path: Path) -> dd.Denoiser:
    try:
        bytearray(3 * 2**30)
    except MemoryError as error:
        raise ValueError("load: too large") from error
    raise AssertionError


def runs(path: Path) -> dd.Denoiser:
    os.system("true")
    raise ValueError("load: it is refused, too late")


def evaluates(path: Path) -> dd.Denoiser:
    eval("1 + 1")
    raise ValueError("load: it is refused, too late")


def writes(path: Path) -> dd.Denoiser:
    (path / "ran").write_text("x")
    raise ValueError("load: it is refused, too late")


def asks_the_hub(path: Path) -> dd.Denoiser:
    import kernels  # noqa: TID251

    try:
        kernels.get_kernel("somebody/attention")
    except OSError as error:
        raise ValueError("load: there is no such kernel") from error
    raise AssertionError


def imports_what_lies_there(path: Path) -> dd.Denoiser:
    import sys

    (path / "modelling.py").touch()
    sys.path.insert(0, str(path))
    __import__("modelling")
    raise ValueError("load: it is refused, too late")


def changed(model: dd.adapters.Loaded, change: Callable[[nn.Module], None]) -> dd.adapters.Loaded:
    with torch.no_grad():
        change(model.network)
    return model


def says_something_else(path: Path) -> dd.Denoiser:
    return changed(dd.load(path, quiet=True), lambda network: next(network.parameters()).mul_(2))


def of_another_process(path: Path) -> dd.Denoiser:
    return dd.load(path, quiet=True).with_schedule(dd.Cosine())


def fails_when_called(path: Path) -> dd.Denoiser:
    model = dd.load(path, quiet=True)

    def fail(x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    return model.calling(fail)


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (named, "refused"),
        (foreign, "foreign"),
        (unsaid, "foreign"),
        (dies, "foreign"),
        (fails_when_called, "foreign"),
        (swells, "memory"),
        (swells_and_says_it_is_ours, "memory"),
        (runs, "code"),
        (evaluates, "code"),
        (writes, "code"),
        (asks_the_hub, "code"),
        (imports_what_lies_there, "code"),
        (says_something_else, "silent"),
        (of_another_process, "silent"),
    ],
)
def test_a_planted_fault_is_caught(load: Callable[[Path], dd.Denoiser], kind: str) -> None:
    found = examined(copy("MDLM"), load)
    assert found.kind == kind, found.text


@pytest.mark.parametrize("load", [spins, waits])
def test_a_hang_is_caught(load: Callable[[Path], dd.Denoiser], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzed, "SECONDS", 0)
    monkeypatch.setattr(fuzzed, "_WAIT", 3)
    assert examined(copy("MDLM"), load).kind == "hang"


def test_the_count_is_told_by_kind() -> None:
    found = [Outcome("right", ""), Outcome("silent", ""), Outcome("right", "")]
    said = fuzzed.line(found)
    assert said == "3 files: 2 right, 0 refused, 0 foreign, 0 hang, 0 memory, 0 code, 1 silent"
    assert Counter(one.kind for one in found)["right"] == 2
