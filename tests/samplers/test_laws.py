"""Every operator on every process it accepts: its exact law has the order that is declared, or ends at the data.

A step's error is h^(order + 1) from the exact p_t, which two kernels tell; the orders over a window are the slow test.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import dirichlet, irreversible, pairs, turning
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.prediction import View

pytestmark = pytest.mark.usefixtures("as_user")  # many small enumerations

ZERO = torch.tensor([0.4, 0.6, 0.0]).double()  # a token that noise never takes
PROCESSES = {
    "masked": dd.Masked(3, dd.Linear()),
    "uniform": dd.Uniform(3, dd.LogLinear()),
    "marginal": dd.Marginal(torch.tensor([1.0, 2.0, 3.0]).double() / 6, dd.Cosine()),
    "a zero in the noise": dd.Marginal(ZERO, dd.Linear()),
    "hybrid": dd.Hybrid(3, dd.Linear(), p_uniform=0.4),
    "ordinal": dd.Ordinal(3, dd.Linear()),
    "general": dd.General(irreversible(), dd.Linear()),
    "time-varying": dd.TimeVarying(turning(), dd.LogLinear(1e-3), pieces=5),
    "pairs": pairs()[0],
    "noisy pairs": pairs()[1],
    "pairs with a source": dd.Interpolant(2, dd.Linear(), torch.tensor([0.3, 0.7]).double()),
}
PREDICTORS = [
    S.Ancestral(), S.Euler(), S.TauLeaping(), S.TauLeaping("reject"), S.DFM(), S.DFM(2.0), S.MaximalCoupling(),
    S.ReMDM(2.0, "rate"), S.ThetaRK2(0.5), S.ThetaRK2(1.0), S.ThetaTrapezoidal(), S.ThetaTrapezoidal(1 / 3),
    S.SplitLeap(), S.Multistep(),
]  # fmt: skip
CLIPPED = (S.ThetaTrapezoidal, S.Multistep)  # of order 2 where nothing is clipped
TIME, LENGTHS = 0.58, (0.008, 0.004)  # within one piece of the time-varying generator
NOTHING = 1e-12


def world_for(process: dd.Process, length: int = 2) -> T.Enumeration:
    """0.05 uniform + 0.95 Dirichlet(1/2): strongly coupled."""
    world = dirichlet(0.5, 7, process.vocab_size, length)
    return T.Enumeration(0.05 / len(world.p0) + 0.95 * world.p0, vocab_size=process.vocab_size, length=length)


def accepts(operator: dd.Operator, process: dd.Process) -> bool:
    try:
        operator.check(process)
    except ValueError:
        return False
    return True


def cases(operators: list[dd.Operator]) -> list[tuple[dd.Operator, str]]:
    return [(op, name) for op, name in itertools.product(operators, PROCESSES) if accepts(op, PROCESSES[name])]


def slope(errors: list[float], steps: tuple[float, ...]) -> float:
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def local_slope(operator: dd.Operator, process: dd.Process, t: float = TIME) -> float:
    """The slope of a step's error against its length; infinite where there is no error."""
    world = world_for(process)
    model, p, errors = world.denoiser(process, predicts="loo"), world.marginal(process, t), []
    for h in LENGTHS:
        if operator.remembers:  # the second of two steps, so that there is something to remember
            law = T.law(dd.Sampler(process, model, operator, grid=[t, t - h, t - 2 * h]), p)
            errors.append(T.tv(law, world.marginal(process, t - 2 * h)))
        else:
            errors.append(T.tv(p @ T.kernel(operator, process, model, t, t - h), world.marginal(process, t - h)))
    return slope(errors, LENGTHS) if max(errors) > NOTHING else math.inf


@pytest.mark.parametrize(("operator", "name"), cases(PREDICTORS), ids=str)
def test_a_step_errs_by_one_more_than_the_declared_order(operator: dd.Operator, name: str) -> None:
    declared, found = operator.order, local_slope(operator, PROCESSES[name])
    assert declared is not None
    assert found > declared + 1 - 0.15
    assert found < declared + 1.15 or isinstance(operator, CLIPPED) or found == math.inf


def test_an_order_of_a_rule_that_clips_is_that_of_the_worst_process() -> None:
    """Where noise never takes some token the clip is felt at once."""
    process = PROCESSES["a zero in the noise"]
    model = world_for(process).denoiser(process, predicts="loo")
    found = T.order([16, 32, 64], lambda n: dd.Sampler(process, model, S.Multistep(), steps=n), window=(0.95, 0.1))
    assert found == pytest.approx(S.Multistep().order, abs=0.1)


@pytest.mark.parametrize("name", ["ordinal", "general"])
def test_slow_modes_of_noise_do_not_spoil_the_step_from_pure_noise(name: str) -> None:
    coarse, fine = (ends(S.SplitLeap(), PROCESSES[name], steps) for steps in (4, 16))
    assert fine < coarse / 3.5


def test_a_reverse_step_that_ignores_its_survival_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: where noise has no rank one, the draw starts from the time that the denoiser was told."""
    right = View.reverse
    told = lambda self, alpha_s, alpha_t=None: right(self, alpha_s)  # noqa: E731
    monkeypatch.setattr(View, "reverse", told)
    for name in ("ordinal", "general", "time-varying"):
        assert local_slope(S.SplitLeap(), PROCESSES[name]) < 1.5
        assert local_slope(S.Ancestral(), PROCESSES[name]) == pytest.approx(2, abs=0.15)  # told its own time


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "name"), cases(PREDICTORS), ids=str)
def test_the_declared_order_over_a_window(operator: dd.Operator, name: str) -> None:
    """As api.md defines it. The pieces of the time-varying generator are met by a window and steps that fit them."""
    process, declared = PROCESSES[name], operator.order
    fit = name == "time-varying"
    world, window = world_for(process), (0.8, 0.2) if fit else (0.95, 0.1)
    model = world.denoiser(process, predicts="loo")
    best = -math.inf
    assert declared is not None
    for steps in ([9, 18, 36], [36, 72, 144]) if fit else ([8, 16, 32], [32, 64, 128], [64, 128, 256]):
        errors = []
        for n in steps:
            sampler = dd.Sampler(process, model, operator, grid=np.linspace(*window, n + 1).tolist())
            errors.append(T.tv(T.law(sampler, world.marginal(process, window[0])), world.marginal(process, window[1])))
        best = -slope(errors, tuple(steps)) if max(errors) > NOTHING else math.inf
        if abs(best - declared) < 0.1:
            return
    assert best > declared - 0.1
    assert isinstance(operator, CLIPPED) or best == math.inf


# --- what declares no order, but ends at the data -------------------------------------------------------------------

ENDING = [S.ARPC("forward"), S.ReMDM(0.3), S.ReMDM(1.0, "rescale"), S.Renoising()]


def ends(operator: dd.Operator, process: dd.Process, steps: int) -> float:
    """TV of the end law from the data."""
    world = world_for(process)
    return T.tv(T.law(dd.Sampler(process, world.denoiser(process, predicts="loo"), operator, steps=steps)), world.p0)


@pytest.mark.parametrize(("operator", "name"), cases(ENDING), ids=str)
def test_with_more_steps_the_law_comes_nearer_to_the_data(operator: dd.Operator, name: str) -> None:
    coarse, fine = (ends(operator, PROCESSES[name], steps) for steps in (3, 12))
    assert fine < coarse / 1.6


class FromThePrior(S.ARPC):
    """Planted: the noise of time 1 in the place of that of time s."""

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        class Prior:
            def __getattr__(self, name: str) -> object:
                return getattr(at.process, name)

            def renoise(self, x: Tensor, where: Tensor, noise: Tensor, alpha: Tensor) -> object:
                return at.process.renoise(x, noise, noise, 0.0)

        from dataclasses import replace

        return super().__call__(state, replace(at, process=Prior()))  # type: ignore[arg-type]


def test_noise_of_another_time_is_caught() -> None:
    process = PROCESSES["hybrid"]
    coarse, fine = (ends(FromThePrior("forward"), process, steps) for steps in (3, 12))
    assert fine > coarse / 1.2


ORDERS = [S.Unmask(), S.Unmask("max_prob"), S.AnyOrder(), S.Threshold(), S.EntropyBounded(), S.KLStable()]


@pytest.mark.parametrize("operator", ORDERS, ids=str)
def test_one_mask_a_step_is_exact(operator: dd.Operator) -> None:
    assert ends(operator, PROCESSES["masked"], 8) < 1e-12


@pytest.mark.parametrize("operator", [*ORDERS, S.P2()], ids=str)
def test_orders_of_unmasking_need_a_true_mask(operator: dd.Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revealed token that coincides with its noise token looks hidden: it is drawn again in every step."""
    for name in ("pairs", "pairs with a source", "uniform"):
        process = PROCESSES[name]
        with pytest.raises(ValueError, match="needs a process with a true mask, Masked, got"):
            dd.Sampler(process, world_for(process).denoiser(process, predicts="loo"), operator, steps=4)
    if isinstance(operator, S.Threshold):
        monkeypatch.setattr(type(operator), "check", lambda self, process: None)
        assert ends(operator, PROCESSES["pairs"], 16) > 3 * ends(operator, PROCESSES["pairs"], 2)


# --- correctors -----------------------------------------------------------------------------------------------------

EXACT = [
    S.Gibbs(), S.ForwardBackward(0.7), S.InformedGibbs(exact=True), S.InformedGibbs("max_prob", exact=True),
    S.InformedGibbs("current_prob", exact=True, temperature=0.3), S.LocallyBalanced(), S.LocallyBalanced("max"),
    S.EntropyRedraw(1.0, sites=1), S.Remask(0.3, sites=1),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "name"), cases(EXACT), ids=str)
def test_an_exact_corrector_keeps_p_t_at_every_time_also_of_a_law_with_zeros(operator: dd.Operator, name: str) -> None:
    process = PROCESSES[name]
    full = world_for(process)
    p0 = full.p0.clone()
    p0[[0, -1]] = 0
    holes = T.Enumeration(p0 / p0.sum(), vocab_size=process.vocab_size, length=2)
    for world, t in itertools.product((full, holes), (0.98, 0.4, 0.0)):
        p = world.marginal(process, t)
        k = T.kernel(operator, process, world.denoiser(process, predicts="loo"), t=t)
        assert float((k.sum(-1) - 1).abs().max()) < 1e-11
        assert float((p @ k - p).abs().max()) < 1e-12


@pytest.mark.parametrize("rule", ["margin", "max_prob", "current_prob"])
def test_informed_moves_where_one_token_is_all_that_can_be(rule: str) -> None:
    """Two sites that always agree, clean: no site has another token, all scores are alike, and nothing moves."""
    world = T.Enumeration(torch.tensor([0.5, 0.0, 0.0, 0.5]).double(), vocab_size=2, length=2)
    process = dd.Uniform(2, dd.Linear())
    k = T.kernel(S.InformedGibbs(rule, exact=True), process, world.denoiser(process, "loo"), t=0.0)  # type: ignore[arg-type]
    assert float((k[[0, 3]] - torch.eye(4).double()[[0, 3]]).abs().max()) < 1e-12


# --- a token that noise never takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", [op for op in PREDICTORS if accepts(op, PROCESSES["a zero in the noise"])], ids=str
)
def test_a_denoiser_is_asked_for_no_leave_one_out_that_it_does_not_have(operator: dd.Operator) -> None:
    """It is a point mass at a token that noise never takes; the law is that of the leave-one-out."""
    process = PROCESSES["a zero in the noise"]
    world = world_for(process)
    if operator.remembers:
        grid = [0.9, 0.7, 0.5]
        laws = [
            T.law(dd.Sampler(process, world.denoiser(process, predicts=predicts), operator, grid=grid),
                  world.marginal(process, 0.9))
            for predicts in ("loo", "denoiser")
        ]  # fmt: skip
    else:
        laws = [
            T.kernel(operator, process, world.denoiser(process, predicts=predicts), t=0.6, s=0.4)
            for predicts in ("loo", "denoiser")
        ]
    torch.testing.assert_close(laws[0], laws[1], atol=1e-11, rtol=0)
