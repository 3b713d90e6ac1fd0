"""The conformance suite: a process of the user's own passes, and each planted error is found and named."""

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import theory as T
from discdiff.distributions import Choice, PointMixture


class Reset(dd.RankOne):
    """A user's process in five lines: noise is always token 0."""

    @property
    def pi(self) -> Tensor:
        return torch.eye(self.vocab_size, dtype=torch.float64)[0]


class Cyclic(dd.Process):
    """A user's process from the three things a process must say; everything else is derived."""

    @property
    def states(self) -> int:
        return self.vocab_size

    def generator(self, alpha: float) -> Tensor:
        step = torch.eye(self.states, dtype=torch.float64).roll(1, 1)
        return step - torch.eye(self.states, dtype=torch.float64)

    def transition(self, alpha_t: float, alpha_s: float) -> Tensor:
        if alpha_t == alpha_s:
            return torch.eye(self.states, dtype=torch.float64)
        if alpha_t == 0:
            return torch.full((self.states, self.states), 1 / self.states, dtype=torch.float64)
        sigma = torch.log(torch.tensor(alpha_s / alpha_t, dtype=torch.float64))
        return torch.linalg.matrix_power(torch.matrix_exp(self.generator(1.0) * sigma / 1024), 1024)

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        law = torch.full((self.states,), 1 / self.states, dtype=torch.float64)
        return PointMixture(law, [], [], shape=(batch, length), device=device)


@pytest.mark.parametrize("process", [Reset(3, dd.Linear()), Cyclic(3, dd.Linear())], ids=lambda p: type(p).__name__)
def test_a_users_own_process_conforms(process: dd.Process) -> None:
    report = T.check_process(process)
    assert report.ok, str(report)
    assert len(report.checks) == 22
    assert str(report).count("ok  ") == 22


def test_a_users_own_process_samples() -> None:
    """Nothing but its transition matrix was written, and the exact sampler of one site has the data's law."""
    world = T.Enumeration(torch.tensor([0.6, 0.1, 0.3]), vocab_size=3, length=1)
    process = Cyclic(3, dd.Linear())
    law = T.law(dd.Sampler(process, world.denoiser(process), dd.samplers.Ancestral(), steps=3))
    torch.testing.assert_close(law, world.p0, atol=1e-10, rtol=0)


class WrongBridge(Reset):
    def bridge(self, x_t: Tensor, x0: Tensor, t: object, s: object) -> Choice:
        return self.noised(x0, self.schedule.alpha(0.7 * s))  # forgets x_t, at another time


class SlightlyWrongBridge(dd.Uniform):
    def posterior(self, x_t: Tensor, x0: Tensor, alpha_t: object, alpha_s: Tensor, where: object = None) -> object:
        return super().posterior(x_t, x0, alpha_t, alpha_s * 0.999, where)


class NotNormalised(Cyclic):
    def transition(self, alpha_t: float, alpha_s: float) -> Tensor:
        return super().transition(alpha_t, alpha_s) * (1 if alpha_t == alpha_s else 1.001)


class NotMonotone(dd.Schedule):
    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) * (1 + 0.9 * torch.sin(6 * t) ** 2) / (1 + 0.9 * t)

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            v = t.clone().requires_grad_()
            return torch.autograd.grad(self._alpha(v).sum(), v)[0]

    def _time(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


class WrongDerivative(dd.Linear):
    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.01)


class WrongWeight(dd.Uniform):
    def log_weight(self, x: Tensor, alpha: object) -> Tensor:
        return super().log_weight(x, alpha) + 0.01


class WrongNoise(dd.Uniform):
    def noised(self, x0: Tensor, alpha: object) -> Choice:
        return super().noised(x0, self.sitewise(alpha, x0) * 0.9)


class BiasedDraws(dd.Uniform):
    def noised(self, x0: Tensor, alpha: object) -> Choice:
        law = super().noised(x0, alpha)
        law._draw = lambda key: dd.Uniform.noised(self, x0, self.sitewise(alpha, x0) * 0.8)._draw(key)
        return law


class Crashes(Cyclic):
    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        raise RuntimeError("not written yet")


@pytest.mark.parametrize(
    ("process", "names"),
    [
        (WrongBridge(3, dd.Linear()), {"bridge: Bayes' rule", "bridge: keeps the marginal"}),
        (SlightlyWrongBridge(3, dd.Linear()), {"bridge: Bayes' rule", "bridge: keeps the marginal"}),
        (NotNormalised(3, dd.Linear()), {"kernel: rows are laws"}),
        (dd.Uniform(3, NotMonotone()), {"schedule: alpha falls within [0, 1]"}),
        (dd.Uniform(3, WrongDerivative()), {"schedule: alpha_derivative is the derivative"}),
        (WrongWeight(3, dd.Linear()), {"evidence: a column of the kernel", "conversion: denoiser from leave-one-out"}),
        (WrongNoise(3, dd.Linear()), {"marginal: a row of the kernel"}),
        (BiasedDraws(3, dd.Linear()), {"sampling: draws follow log_prob (-log10 p)"}),
        (Crashes(3, dd.Linear()), {"prior: where the kernel ends"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, dd.Process) else "",
)
def test_planted_errors_are_named(process: dd.Process, names: set[str], as_user: None) -> None:
    report = T.check_process(process)
    assert not report.ok
    assert names <= set(report.failed), str(report)
    if type(process) in (WrongNoise, BiasedDraws, Crashes, WrongWeight):
        innocent = {"kernel: rows are laws", "kernel: nothing happens in no time", "generator: rates are rates"}
        assert not innocent & set(report.failed), "only what is wrong is named"
    with pytest.raises(AssertionError, match="FAIL"):
        T.check_process(process, strict=True)


def test_a_report_says_where(as_user: None) -> None:
    text = str(T.check_process(NotNormalised(3, dd.Linear())))
    assert "FAIL kernel: rows are laws: 0.001 (allowed 1e-12), a row does not sum to 1 at t = " in text
    assert "RuntimeError: not written yet" in str(T.check_process(Crashes(3, dd.Linear())))
    assert "alpha(" in str(T.check_process(dd.Uniform(3, NotMonotone())))
