"""The probe finds each way in which a convention can be wrong, and has nothing to say against a right one."""

from collections.abc import Callable
from functools import partial

import problems
import pytest
import torch
from torch import Tensor

import discdiff as dd

V, ROWS = 5, 64
CHAIN = problems.chain(V, 12)
X0 = CHAIN.sample(ROWS, seed=2)
MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())
Function = Callable[[Tensor, Tensor | None], Tensor]


def function(process: dd.Process, predicts: str = "denoiser") -> Function:
    """The exact network, told t; its own argument is alpha."""
    fn = CHAIN.denoiser(process, predicts=predicts).fn  # type: ignore[arg-type]
    return lambda x, time: fn(x, 1 - time)


def sees_ahead(fn: Function, x: Tensor, time: Tensor | None) -> Tensor:
    """A network whose position i speaks of i + 1."""
    return fn(x, time).roll(-1, 1)


def at_half_time(fn: Function, x: Tensor, time: Tensor | None) -> Tensor:
    """One that ignores its time."""
    return fn(x, torch.full((len(x),), 0.5, dtype=torch.float64))


def told_sigma(fn: Function, x: Tensor, time: Tensor) -> Tensor:
    """One that wants -log alpha."""
    return fn(x, 1 - (-time).exp())


def hides_behind_five(fn: Function, x: Tensor, time: Tensor | None) -> Tensor:
    """One of seven columns whose mask is 5; 6 is a token that no data holds."""
    shown = torch.where(x < V, x, torch.where(x == 5, V, 0))
    return torch.nn.functional.pad(fn(shown, time), (0, 2), value=-30.0)


made = partial(dd.Denoiser, length=12)
RIGHT = {
    "masked": made(function(MASKED), MASKED, "denoiser"),
    "masked, shifted": made(partial(sees_ahead, function(MASKED)), MASKED, "denoiser", shift=True),
    "uniform": made(function(UNIFORM), UNIFORM, "denoiser"),
    "uniform, loo": made(function(UNIFORM, "loo"), UNIFORM, "loo"),
    "uniform, sigma": made(partial(told_sigma, function(UNIFORM)), UNIFORM, "denoiser", time="sigma"),
    "mask within": made(partial(hides_behind_five, function(MASKED)), dd.Masked(7, dd.Linear(), mask_id=5), "denoiser"),
}
WRONG = {
    "shift that is not told": (made(partial(sees_ahead, function(MASKED)), MASKED, "denoiser"), "shift"),
    "shift that is not there": (made(function(UNIFORM), UNIFORM, "denoiser", shift=True), "shift"),
    "another mask": (
        made(partial(hides_behind_five, function(MASKED)), dd.Masked(7, dd.Linear(), mask_id=6), "denoiser"),
        "mask id",
    ),
    "time is ignored": (made(partial(at_half_time, function(UNIFORM)), UNIFORM, "denoiser"), "time"),
    "another time": (made(partial(told_sigma, function(UNIFORM)), UNIFORM, "denoiser"), "time"),
    "a denoiser called loo": (made(function(UNIFORM), UNIFORM, "loo"), "predicts"),
    "a loo called denoiser": (made(function(UNIFORM, "loo"), UNIFORM, "denoiser"), "predicts"),
}
MASKED_TIME = {"masked", "masked, shifted", "mask within"}  # exact masked networks do ignore time


@pytest.mark.parametrize("name", list(RIGHT))
def test_nothing_is_said_against_a_right_convention(name: str) -> None:
    found = dd.probe(RIGHT[name], X0)
    assert {finding.name for finding in found.wrong} == ({"time"} if name in MASKED_TIME else set()), str(found)
    assert found["shift"].verdict == "right"
    assert found["mask id"].verdict == ("right" if name in MASKED_TIME else "unknown")
    if name not in MASKED_TIME:
        assert found["predicts"].verdict == "right"
        assert found["time"].verdict == "right"


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_convention_is_caught_and_named(name: str) -> None:
    model, kind = WRONG[name]
    found = dd.probe(model, X0)
    wrong = {finding.name for finding in found.wrong} - ({"time"} if model.process.absorbing else set())
    assert kind in wrong, str(found)


def test_what_it_says_is_what_to_do() -> None:
    assert "hidden by 5" in dd.probe(WRONG["another mask"][0], X0)["mask id"].said
    assert "pass None" in dd.probe(WRONG["time is ignored"][0], X0)["time"].said
    assert "time='sigma'" in dd.probe(WRONG["another time"][0], X0)["time"].said
    assert "it is a 'denoiser'" in dd.probe(WRONG["a denoiser called loo"][0], X0)["predicts"].said


def test_without_data_only_time_is_looked_at() -> None:
    found = dd.probe(WRONG["time is ignored"][0])
    assert [finding.name for finding in found.wrong] == ["time"]
    assert dd.probe(RIGHT["uniform"]).wrong == ()
    assert "pass a few rows of its data" in str(found)


def test_data_must_be_data() -> None:
    with pytest.raises(ValueError, match="x0"):
        dd.probe(RIGHT["masked"], torch.full((2, 12), V))
    with pytest.raises(ValueError, match="at least 2 rows"):
        dd.probe(RIGHT["masked"], X0[:1])
