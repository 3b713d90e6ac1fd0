"""Schedules: ends, monotone, derivative and inverse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules

import discdiff as dd


@given(schedules)
def test_alpha_falls_from_one(schedule: dd.Schedule) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha[0] == 1
    assert (alpha.diff() < 0).all()
    assert alpha[-1] >= 0


def test_linear_and_cosine_end_at_exactly_zero() -> None:
    assert dd.Linear().alpha(1.0) == 0
    assert dd.Cosine().alpha(1.0) == 0
    assert dd.LogLinear(0.01).alpha(1.0) == pytest.approx(0.01, abs=1e-15)


@given(schedules)
def test_derivative_is_the_derivative(schedule: dd.Schedule) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.alpha_derivative(t), slope, atol=1e-12, rtol=0)


@given(schedules, st.floats(0, 1))
def test_time_inverts_alpha(schedule: dd.Schedule, t: float) -> None:
    assert schedule.time(schedule.alpha(t)) == pytest.approx(t, abs=1e-7)


def test_floats_stay_floats_and_sigma_is_minus_log_alpha() -> None:
    assert isinstance(dd.Linear().alpha(0.3), float)
    assert dd.Linear().sigma(0.3) == pytest.approx(-math.log(0.7))
    assert dd.Linear().sigma(1.0) == math.inf


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan, torch.tensor([0.5, 2.0])])
def test_times_outside_the_unit_interval_are_refused(t: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"time t must lie in \[0, 1\]"):
        dd.Linear().alpha(t)


def test_survivals_that_are_never_reached_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha must lie in \[0.1, 1\]"):
        dd.LogLinear(0.1).time(0.01)
    with pytest.raises(ValueError, match="eps"):
        dd.LogLinear(0.0)
