"""Denoisers: the convention as data."""

import math

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff.denoiser import TimeArgument


class Spy:
    """A model that remembers what time it was told."""

    def __init__(self, width: int = 3) -> None:
        self.width, self.time = width, None

    def __call__(self, x: Tensor, time: Tensor | None) -> Tensor:
        self.time = time
        return torch.arange(self.width).expand(*x.shape, -1) + 10.0 * torch.arange(x.shape[1])[:, None]


@pytest.mark.parametrize(("time", "expected"), [("t", 0.25), ("alpha", 0.75), ("sigma", -math.log(0.75)), (None, None)])
def test_time_argument(time: TimeArgument, expected: float | None) -> None:
    spy = Spy()
    model = dd.Denoiser(spy, dd.Uniform(3, dd.Linear()), predicts="loo", time=time)
    model(torch.zeros(2, 4, dtype=torch.int64), 0.25)
    if expected is None:
        assert spy.time is None
    else:
        assert spy.time.shape == (2,)
        assert spy.time.dtype == torch.float32
        assert spy.time.tolist() == pytest.approx([expected] * 2)


def test_time_shapes() -> None:
    spy, x = Spy(), torch.zeros(2, 4, dtype=torch.int64)
    model = dd.Denoiser(spy, dd.Uniform(3, dd.Linear()), predicts="loo")
    model(x, torch.tensor([0.1, 0.2]))
    assert spy.time.tolist() == pytest.approx([0.1, 0.2])
    model(x, torch.full((2, 4), 0.5))
    assert spy.time.shape == (2, 4)
    with pytest.raises(ValueError, match=r"time t must be a float, \(2,\) or \(2, 4\), got shape \(3,\)"):
        model(x, torch.zeros(3))


def test_a_scalar_time_model_hears_the_noisy_sites_time() -> None:
    for time, expected in (("t", 0.5), ("alpha", 0.5)):
        spy = Spy()
        model = dd.Denoiser(spy, dd.Uniform(3, dd.Linear()), predicts="loo", time=time, scalar_time=True)
        model(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0.0, 0.5, 0.5]]))
        assert spy.time.tolist() == pytest.approx([expected])


def test_shift_and_suppress() -> None:
    x = torch.zeros(1, 3, dtype=torch.int64)
    shifted = dd.Denoiser(Spy(), dd.Uniform(3, dd.Linear()), predicts="loo", shift=True)(x, 0.5)
    assert shifted.logits[0, :, 0].tolist() == [0, 0, 10]
    quiet = dd.Denoiser(Spy(), dd.Uniform(3, dd.Linear()), predicts="loo", suppress=(1,))(x, 0.5)
    assert quiet.logits[0, 0].tolist() == [0, -math.inf, 2]


def test_another_clock_gives_the_same_prediction_at_equal_alpha() -> None:
    spy = Spy()
    model = dd.Denoiser(spy, dd.Masked(3, dd.Linear()), predicts="denoiser").with_schedule(dd.Cosine())
    assert model.process == dd.Masked(3, dd.Cosine())
    model(torch.zeros(1, 2, dtype=torch.int64), 0.5)
    assert spy.time.tolist() == pytest.approx([1 - math.cos(math.pi / 4)])


def test_repr_says_the_convention() -> None:
    model = dd.Denoiser(Spy(), dd.Masked(3, dd.Linear()), predicts="denoiser", time=None, shift=True)
    assert repr(model) == "Denoiser(Spy, Masked(3, Linear()), predicts='denoiser', time=None, shift=True)"


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fn": 3}, TypeError, "fn must be callable"),
        ({"predicts": "x0"}, ValueError, "predicts must be one of 'denoiser', 'loo', 'ratio'"),
        ({"time": "step"}, ValueError, "time must be 't', 'sigma', 'alpha' or None"),
        ({"suppress": (7,)}, ValueError, "suppress must lie in 0"),
    ],
)
def test_misunderstood_conventions_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    defaults = {"fn": Spy(), "process": dd.Uniform(3, dd.Linear()), "predicts": "loo"}
    with pytest.raises(error, match=message):
        dd.Denoiser(**defaults | arguments)
