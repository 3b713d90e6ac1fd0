"""The doctor: a sound machine is found sound, each planted fault is found, with a remedy and exit status 1."""

import json
import time
from pathlib import Path

import pytest
import torch

from discdiff.command import doctor
from discdiff.command.cli import main
from discdiff.kernels import compiled, native


def report(capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status and the findings by name."""
    status = main(["doctor", "--json"])
    told = json.loads(capfd.readouterr().out)
    assert told["ok"] == (status == 0)
    return status, {f"{one['part']}: {one['name']}": one for one in told["findings"]}


def test_a_sound_machine_is_found_sound(capfd: pytest.CaptureFixture[str]) -> None:
    status, found = report(capfd)
    assert status == 0
    assert [name for name, one in found.items() if one["mark"] == "wrong"] == []
    assert found["version: torch"]["found"] == torch.__version__
    tests = {name: one for name, one in found.items() if name.startswith("self-test")}
    assert len(tests) == 3
    assert {one["mark"] for one in tests.values()} == {"ok"}
    assert all(one["remedy"] for one in found.values() if one["mark"] in ("wrong", "slow"))
    assert main(["doctor"]) == 0
    said = capfd.readouterr().out
    assert said.endswith("nothing is wrong\n")
    assert f"torch         {torch.__version__}" in said


def test_the_self_test_takes_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.process_time()
        for test in (doctor._keyed_draw, doctor._two_backends, doctor._exact_law):
            assert doctor._tested(test).mark == "ok"
        times.append(time.process_time() - start)
    assert min(times) < 1


def test_a_wrong_draw_is_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A planted fault: compiled code whose tokens are one too high in one row."""
    draw = native.draw

    def wrong(rows: object, key: object, positions: torch.Tensor, reading: object) -> torch.Tensor | None:
        found = draw(rows, key, positions, reading)  # type: ignore[arg-type]
        if found is not None and len(found) == 256:
            found[3] += 1
        return found

    if not native.available():
        pytest.skip("there is no compiled code on this machine")
    monkeypatch.setattr(native, "draw", wrong)
    status, found = report(capfd)
    one = found["self-test: compiled kernels draw what torch draws"]
    assert (status, one["mark"], one["found"]) == (1, "wrong", "native, 1 of 256 tokens differ")
    assert "reinstall discdiff and torch" in one["remedy"]


def test_other_tokens_of_a_seed_are_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_RECORDED", ((0,) * 8, (1,) * 8))
    status, found = report(capfd)
    assert status == 1
    assert "recorded ((0, 0," in found["self-test: a seed gives its recorded tokens"]["found"]
    assert main(["doctor"]) == 1
    assert "1 of " in capfd.readouterr().out


def test_an_error_in_the_self_test_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[bool, str]:
        """Nothing works: here."""
        raise OSError("no\nsuch file")

    one = doctor._tested(broken)
    assert (one.name, one.mark, one.found) == ("nothing works", "wrong", "OSError: no such file")


def test_a_machine_without_a_compiler_is_slow_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    monkeypatch.setattr(compiled, "library", lambda: None)
    status, found = report(capfd)
    assert status == 0
    assert found["machine: compiled kernels"]["mark"] == "slow"
    assert "Debian: apt install gcc" in found["machine: C compiler"]["remedy"]
    assert found["self-test: compiled kernels draw what torch draws"]["found"] == "torch, 0 of 256 tokens differ"
    assert found["self-test: a seed gives its recorded tokens"]["mark"] == "ok"  # torch gives the same tokens


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["torch<3,>=2.11", "numpy>=99", "no-such-package>=1", 'matplotlib>=3.8; extra == "demo"']
    monkeypatch.setattr(doctor, "requires", lambda name: asked)
    status, found = report(capfd)
    assert status == 1
    assert found["version: torch"]["mark"] == "ok"
    assert found["version: numpy"]["found"].endswith("but discdiff takes >=99")
    assert found["version: numpy"]["remedy"] == "run: pip install 'numpy>=99'"
    assert found["version: no-such-package"]["mark"] == "wrong"
    for version, accepted, fits in (
        ("2.13.0+cpu", "<3,>=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("3.0", "<3", False),
        ("1.0", "==1", True),
        ("0.1.3", "==0.1.2", False),
        ("2.0.0rc1", ">=2", True),
    ):
        assert doctor._fits(version, accepted) is fits


def test_a_cache_that_cannot_be_written_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    one = next(iter(doctor._caches()))
    assert (one.mark, one.found) == ("slow", f"{tmp_path / 'discdiff'} cannot be written")
    assert "XDG_CACHE_HOME" in one.remedy
