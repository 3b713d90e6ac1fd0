"""Tokens are what they were before the last refactoring, and one changed name of a choice would show."""

import json

import pytest
from recorded import FILE, SETTINGS, recorded

from discdiff.operator import run as handlers

KNOWN: dict[str, str] = json.loads(FILE.read_text())


def compare(settings: list[tuple[str, str, str]]) -> None:
    found = {" | ".join(setting): recorded(*setting) for setting in settings}
    assert {key: value for key, value in found.items() if value is not None} == {
        key: KNOWN[key] for key in found if key in KNOWN
    }


def test_tokens_are_those_that_were_recorded() -> None:
    compare(SETTINGS[::23])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(22))
def test_all_tokens_are_those_that_were_recorded(part: int) -> None:
    compare(SETTINGS[part + 1 :: 23])


def test_the_record_covers_operators_processes_and_kinds_of_prediction() -> None:
    for kept, asked in zip(
        zip(*(key.split(" | ") for key in KNOWN), strict=True), zip(*SETTINGS, strict=True), strict=True
    ):
        assert set(kept) == set(asked)
    assert len(KNOWN) > 500


def test_a_choice_with_another_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    key = handlers.Run.key
    monkeypatch.setattr(
        handlers.Run, "key", lambda run, name, *rest, **more: key(run, name.replace("data", "datum"), *rest, **more)
    )
    with pytest.raises(AssertionError):
        compare([("ancestral", "uniform", "loo")])
