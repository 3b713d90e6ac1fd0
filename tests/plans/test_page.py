"""The page of plans against its stored figures, and a part of the figures made again by the networks."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters.own import load_trained

DOCS = Path(__file__).parents[2] / "docs"
TABLES = (
    "text, masked", "text, uniform", "digits, masked", "digits, uniform", "digits, uniform, a time for every site",
    "grids", "excess", "antibody bound", "antibody domains",
)  # fmt: skip


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for known in ("page", "networks"):  # other folders of docs/ have scripts of the same name
        monkeypatch.delitem(sys.modules, known, raising=False)
    monkeypatch.syspath_prepend(str(DOCS / "steering"))
    monkeypatch.syspath_prepend(str(DOCS / "parameterisations"))
    spec = import_module("importlib.util").spec_from_file_location(f"plans_{name}", DOCS / "plans" / f"{name}.py")
    module = import_module("importlib.util").module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "plans" / "networks.json").read_text())
    return found


def test_the_tables_are_those_of_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    page = script("page", monkeypatch)
    made = {name: table for part in page.PARTS for name, table in part().items()}
    assert set(made) == set(TABLES)
    text = (DOCS / "plans.md").read_text()
    for name, table in made.items():
        (found,) = re.findall(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", text, re.S)
        assert found == table, name
    assert page.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(2.776445 * 2.5**0.5 / 5**0.5))


def test_the_rules_of_thumb_hold_in_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    page, found = script("page", monkeypatch), figures()

    def apart(network: str, one: str, other: str) -> tuple[float, float]:
        judged = found[network]["judge"]
        mean, half = page.interval([a - b for a, b in zip(judged[one]["nats"], judged[other]["nats"], strict=True)])
        return mean - half, mean + half

    assert apart("text, masked", "reveal spread, 8", "ancestral, 16")[1] < 0
    assert apart("text, masked", "reveal spread, 8", "ancestral, 64")[1] < 0.03
    assert apart("digits, masked", "reveal spread, 8", "ancestral, 16")[0] > 0, "on images the order is another"
    assert apart("digits, masked", "reveal random, 8", "ancestral, 16")[1] < 0.05
    assert apart("digits, uniform, a time for every site", "reveal random, 8", "ancestral, 8")[0] > 0
    for network in ("text, masked", "text, uniform", "digits, masked", "digits, uniform"):
        assert apart(network, "found, 8", "ancestral, 16")[1] < 0
    for network in ("text, masked", "digits, masked", "text, uniform"):
        bound = found[network]["bound"]
        mean, half = page.interval([a - b for a, b in zip(bound["grid"]["nats"], bound["8 equal steps"]["nats"],
                                                          strict=True)])  # fmt: skip
        assert mean + half < 0


@pytest.mark.slow
def test_a_part_of_the_figures_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first samples of a seed, by the network on this machine: they differ where rounding decides."""
    networks = script("networks", monkeypatch)
    model = load_trained(DOCS / "blockgen" / "whole-masked.safetensors")
    sampler = dd.Sampler(model.process, model, S.Reveal("spread", calls=8), grid=[1.0, 0.0])
    judge, stored = networks.judge_of("text", "cpu"), figures()["text, masked"]["judge"]
    nats = judge(sampler.sample(256, 128, seed=0).tokens).mean(1)
    error = float(nats.std()) / len(nats) ** 0.5
    assert abs(float(nats.mean()) - stored["reveal spread, 8"]["nats"][0]) < 3 * error
    assert abs(float(nats.mean()) - stored["ancestral, 16"]["nats"][0]) > 3 * error, "planted: another sampler"
