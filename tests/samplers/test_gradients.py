"""Gradients: a replayed run's log-probability has the derivatives that differences give, or an error says why not."""

import gradients
import pytest
import torch
from gradients import OPERATORS, Outcome, count, examine
from problems import turning

import discdiff as dd
from discdiff import samplers as S
from discdiff.kernels import dispatch as kernels
from discdiff.kernels.reference import Reading
from discdiff.operator import At

UNIFORM = ("Uniform", "loo", "fixed")


def test_every_operator_is_in_the_table() -> None:
    assert set(OPERATORS) == set(S.__all__)


def test_the_table_in_part() -> None:
    """Every operator on every process, with kinds of predictions and clocks in turn."""
    found, wrong = count(whole=False)
    assert wrong == []
    assert found["right"] > 120
    print(dict(found))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_whole_table(operator: str) -> None:
    found, wrong = count(whole=True, only=operator)
    assert wrong == []
    assert found["right"] > 0 or operator == "Renoising"  # which is no program of sites
    print(dict(found))


@pytest.mark.parametrize("operator", [S.Ancestral(), S.Euler(), S.TauLocallyBalanced(), S.InformedGibbs()], ids=repr)
def test_a_detached_reading_is_caught(operator: dd.Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(operator, *UNIFORM).kind == "right"
    monkeypatch.setattr(Reading, "along", lambda self, path: self)
    assert examine(operator, *UNIFORM).kind == "wrong", "planted: what was read is a constant"


@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap(), S.ThetaTrapezoidal()], ids=repr)
def test_a_detached_clock_is_caught(operator: dd.Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = ("Uniform", "denoiser", "learned function")
    assert examine(operator, *learned).kind == "right"

    def alpha(self: At, time: float) -> float:
        return float(self.process.schedule.alpha(float(time)))

    monkeypatch.setattr(At, "alpha", alpha)
    assert examine(operator, *learned).kind == "wrong", "planted: alpha is a number"


def test_a_time_that_follows_a_learned_clock_is_more_than_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discdiff.process.schedule.Moment.of", classmethod(lambda cls, tensor: float(tensor.detach())))
    assert examine(S.ThetaTrapezoidal(), "Uniform", "denoiser", "learned function").kind == "wrong"


@pytest.mark.parametrize("clock", [dd.Linear(), dd.Cosine(), dd.Polynomial(1.5), dd.Geometric(0.1, 5.0), dd.Sigmoid()])
def test_a_time_has_the_derivative_of_the_inverse(clock: dd.Schedule) -> None:
    alpha = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(clock.time(alpha).sum(), alpha)
    torch.testing.assert_close(slope, 1 / clock.alpha_derivative(clock.time(alpha.detach())), atol=0, rtol=1e-10)


@pytest.mark.parametrize("width", [5, 2100])
def test_readings_have_the_derivatives_of_their_definitions(width: int) -> None:
    """Groups and entries without mass included; and the same values as without gradients."""
    x = torch.randn(4, width, dtype=torch.float64)
    x[1, : max(1, width - 1100)] = -torch.inf
    x[2, 0] = x[2].amax()  # a tie
    at = torch.tensor([0, width - 1, 2, 3])
    x.requires_grad_()
    read, log_p = kernels.read(x, at=at, top=True), x.log_softmax(-1)
    p = log_p.exp()
    two = p.topk(2, -1).values
    right = {
        "log_sum_exp": x.logsumexp(-1),
        "log_prob": log_p.gather(-1, at[:, None])[:, 0],
        "entropy": -torch.where(p > 0, p * log_p.masked_fill(p == 0, 0.0), 0.0).sum(-1),
        "max_prob": two[:, 0],
        "margin": two[:, 0] - two[:, 1],
    }
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)  # nothing is asked of the row with a tie
    with torch.no_grad():
        plain = kernels.read(x, at=at, top=True)
    for name, value in right.items():
        assert torch.equal(getattr(read, name), getattr(plain, name)), name
        found, exact = (
            torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (getattr(read, name), value)
        )
        torch.testing.assert_close(found, exact, atol=1e-13, rtol=1e-10)


def test_rows_without_mass_have_no_derivative_and_no_nan() -> None:
    x = torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kernels.read(x).log_sum_exp.exp().sum(), x)
    torch.testing.assert_close(slope, torch.tensor([[1.0, torch.e], [0.0, 0.0]], dtype=torch.float64))


def test_a_reading_costs_nothing_more_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reading, "along", lambda self, path: pytest.fail("read twice"))
    x = torch.randn(3, 4)
    kernels.read(x)
    with torch.no_grad():
        kernels.read(x.requires_grad_())


def test_a_clock_that_cannot_be_learned_says_so() -> None:
    bend = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="clock cannot be learned"):
        dd.TimeVarying(turning(3), lambda t: 1 - 0.9 * t**bend)
    with pytest.raises(ValueError, match="one clock for all positions"):
        dd.TimeVarying(turning(3), dd.PerSite(dd.LogLinear(), torch.zeros(2)))


def test_an_outcome_names_what_was_refused() -> None:
    outcome = examine(S.Renoising(), *UNIFORM)
    assert outcome == Outcome("refused", said=outcome.said)
    assert "Renoising" in outcome.said
    assert any(words in outcome.said for words in gradients.REFUSALS)
