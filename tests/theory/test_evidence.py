"""Weighted particles estimate law_ref psi_0 without bias: by enumeration of two particles, for every operator."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from guides import Coin, table
from operators import CORRECTORS, PREDICTORS, accepted
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import SCHEMES, Scheme
from discdiff.operator import At
from discdiff.sampling import Potential, Weighed, Weighing
from discdiff.theory.world import state_index

V = L = 2
MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())
WORLD = T.Enumeration(torch.tensor([0.4, 0.1, 0.2, 0.3]), vocab_size=V, length=L)
W = torch.tensor([0.3, 2.0, 1.0, 4.0]).double()
GRID = (1.0, 0.5, 0.0)
LOG_G = table(V, L, seed=4)
pytestmark = pytest.mark.usefixtures("as_user")


class Twist:
    """psi_0 = W and an arbitrary positive potential at times between 0 and 1."""

    def __init__(self, process: dd.Process) -> None:
        self.states = process.states
        self.middle = torch.rand(self.states**L, generator=torch.Generator().manual_seed(3)).double() + 0.3

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if t == 0:
            return W[state_index(x, V)].log()
        return self.middle[state_index(x, self.states)].log() if t < 1 else torch.zeros(len(x)).double()


def name(one: object) -> str:
    return repr(one).partition(" at 0x")[0]


def plain(process: dd.Process) -> dd.Denoiser:
    return WORLD.denoiser(process, predicts="loo")


def tilted(process: dd.Process) -> dd.Denoiser:
    """A proposal far from the reference, at every step."""
    return plain(process).guided(lambda said: said.tilted(LOG_G.expand(len(said.x), L, V)))


def error(steered: dd.Particles, law: Tensor | None = None, most: int = 400_000) -> float:
    """The largest error of the estimate of law_ref W."""
    exact = T.law(steered.reference, law, length=L)
    tokens = torch.cartesian_prod(*[torch.arange(steered.process.states if steered.sampler.grid[-1] else V)] * L)
    assert steered.potential is not None
    psi = steered.potential(tokens, steered.sampler.grid[-1]).exp()
    return float((T.evidence(steered, law, length=L, most=most) - exact * psi).abs().max())


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=name)
@pytest.mark.parametrize("model", [plain, tilted])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_resampling_is_unbiased(
    process: dd.Process, model: Callable[[dd.Process], dd.Denoiser], scheme: Scheme
) -> None:
    for ess in (0.0, 0.8, 2.0) if process is MASKED else (0.8,):
        sampler = dd.Sampler(process, model(process), S.Ancestral(), grid=GRID)
        steered = dd.Particles(sampler, Twist(process), 2, ess=ess, resample=scheme)
        assert error(steered) < (1e-12 if process is MASKED else 1e-9)


LONG = (S.SplitLeap, S.ThetaRK2, S.RePaint, S.ARPC)  # many runs on a uniform process
WEIGHABLE = [
    pytest.param(one, process, id=f"{name(one)}-{type(process).__name__}",
                 marks=pytest.mark.slow if process is UNIFORM and isinstance(one, LONG) else ())
    for one in (*PREDICTORS, *CORRECTORS) for process in (MASKED, UNIFORM)
    if one.weighable and one.enumerable and accepted(one, process)
]  # fmt: skip


@pytest.mark.parametrize(("operator", "process"), WEIGHABLE)
def test_every_operator_is_weighed_exactly(operator: dd.Operator, process: dd.Process) -> None:
    """A predictor in two steps from the prior to data, or in one from p_t; a corrector alone from p_t."""
    whole = operator.moves and process is MASKED
    run: Any = {"grid": GRID} if whole else {"grid": (0.8, 0.7)} if operator.moves else {"time": 0.5}
    law = None if whole else WORLD.marginal(process, 0.8 if operator.moves else 0.5)
    steered = dd.Particles(dd.Sampler(process, tilted(process), operator, **run), Twist(process), 2, ess=2.0)
    assert error(steered, law, most=2_000_000) < (1e-12 if process is MASKED else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [S.TauLeaping(), S.ThetaRK2()], ids=name)
def test_two_steps_on_a_uniform_process(operator: dd.Operator) -> None:
    steered = dd.Particles(dd.Sampler(UNIFORM, tilted(UNIFORM), operator, grid=GRID), Twist(UNIFORM), 2, ess=0.8)
    assert error(steered, most=4_000_000) < 1e-9


def test_the_others_are_refused_by_name_where_a_guide_acts() -> None:
    refused = [one for one in (*PREDICTORS, *CORRECTORS) if not one.weighable]
    names = {type(one).__name__ for one in refused}
    assert {"Greedy", "Threshold", "Adaptive", "Gillespie", "LocallyBalanced", "KLStable", "EntropyBounded"} <= names
    for one in refused:
        if not accepted(one, MASKED):
            continue
        run: Any = {"grid": GRID} if one.moves else {"time": 0.5}
        with pytest.raises(ValueError, match=rf"Particles: {type(one).__name__}.*Accepted are operators such as"):
            dd.Particles(dd.Sampler(MASKED, tilted(MASKED), one, **run), Twist(MASKED), 2)
        dd.Particles(dd.Sampler(MASKED, plain(MASKED), one, **run), Twist(MASKED), 2)  # nothing to weigh


UNWEIGHABLE = [
    S.AnyOrder("margin"), S.ARPC("nll"), S.EntropyBounded(0.5), S.Greedy(), S.KLStable(), S.P2(), S.Threshold(),
    S.Unmask("max_prob"), S.Unmask(draw_first=True),
]  # fmt: skip


@pytest.mark.parametrize("operator", UNWEIGHABLE, ids=name)
def test_a_false_claim_of_weighable_is_found_in_the_run(operator: dd.Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an operator that decides by the prediction and does not say so."""
    monkeypatch.setattr(type(operator), "weighable", True)
    far = plain(MASKED).guided(lambda said: said.tilted(-5 * LOG_G.expand(len(said.x), L, V)))
    steered = dd.Particles(dd.Sampler(MASKED, far, operator, grid=GRID), Twist(MASKED), 2, ess=0.8)
    with pytest.raises(ValueError, match=r"Particles: for row \d+ at site .* No weight makes up for that"):
        T.evidence(steered)


@pytest.mark.parametrize("operator", [S.InformedGibbs(exact=True), S.LocallyBalanced()], ids=name)
def test_a_coin_that_only_one_prediction_makes_sure_is_found(
    operator: dd.Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(operator), "weighable", True)
    far = plain(MASKED).guided(lambda said: said.tilted(-5 * LOG_G.expand(len(said.x), L, V)))
    sampler = dd.Sampler(MASKED, far, operator, time=0.0)
    with pytest.raises(ValueError, match=r"at site .*accept the reference allows a value that the proposal rules out"):
        T.evidence(dd.Particles(sampler, None, 1), WORLD.marginal(MASKED, 0.0))


DRAWS = plain(MASKED).guided(Coin(torch.stack([LOG_G, -LOG_G])))
WARM = plain(MASKED).guided(dd.Truncation(temperature=2.0))
REWARDED = plain(MASKED).guided(dd.Reward(lambda x: W[state_index(x, V)].log(), samples=1))
OTHER = T.Enumeration(torch.tensor([0.1, 0.4, 0.3, 0.2]), vocab_size=V, length=L).denoiser(MASKED, predicts="loo")


@pytest.mark.parametrize(
    ("model", "operator", "reference"),
    [
        (WARM, S.Ancestral(), None),
        (DRAWS, S.Ancestral(), None),
        (DRAWS, S.ReMDM(0.5), None),
        (REWARDED, S.Ancestral(), None),
        (plain(MASKED).guided(dd.Doob(WORLD.log_h(MASKED, W.log()))), S.Ancestral(), None),
        pytest.param(DRAWS, S.SplitLeap(), None, marks=pytest.mark.slow),
        (tilted(MASKED), S.Ancestral() >> S.Remask(), None),
        pytest.param(tilted(MASKED), S.Ancestral() >> S.Gibbs(), None, marks=pytest.mark.slow),
        (tilted(MASKED), dd.mix({S.Ancestral(): 0.5, S.Unmask("left_to_right"): 0.5}), None),
        (tilted(MASKED), S.Ancestral(), OTHER),
        (tilted(MASKED), S.Ancestral(), WARM),
        (plain(MASKED), S.Ancestral(), OTHER),
    ],
)
def test_proposals_of_every_kind_are_weighed(
    model: dd.Denoiser, operator: dd.Operator, reference: dd.Denoiser | None
) -> None:
    """A temperature, a guide that draws, another reference, compositions, correctors that hide tokens again."""
    sampler = dd.Sampler(MASKED, model, operator, grid=GRID)
    steered = dd.Particles(sampler, Twist(MASKED), 2, ess=0.8, reference=reference)
    assert error(steered, most=2_000_000) < 1e-12


def test_guides_of_single_steps_are_weighed() -> None:
    guide = tilted(MASKED).guides[0]
    plan = dd.Plan(GRID, [dd.Step(S.Ancestral(), guides=[guide]), dd.Step(S.SplitLeap())])
    steered = dd.Particles(dd.Sampler(MASKED, plain(MASKED), plan=plan), Twist(MASKED), 2, ess=0.8)
    assert error(steered) < 1e-12
    sampler = dd.Sampler(MASKED, plain(MASKED).guided(dd.when(dd.before(0.7), guide)), S.Ancestral(), grid=GRID)
    assert error(dd.Particles(sampler, Twist(MASKED), 2, ess=0.8)) < 1e-12


def test_an_operator_that_remembers_is_followed_from_its_first_step() -> None:
    grid = (1.0, 0.6, 0.3, 0.0)
    steered = dd.Particles(dd.Sampler(MASKED, plain(MASKED), S.Multistep(), grid=grid), Twist(MASKED), 1)
    assert error(steered) < 1e-12


# --- negative controls ------------------------------------------------------------------------------------------------


class WithoutRatio(Weighing):
    """Planted: weights without K / M; they then belong to the proposal's law."""

    def _weigh(self, *given: object) -> tuple[Tensor, dd.State]:
        log_ratio, reference = super()._weigh(*given)  # type: ignore[arg-type]
        return torch.zeros_like(log_ratio), reference


class Forgetful(Weighing):
    """Planted: a group that is not resampled goes on with equal weights."""

    def _resampled(self, state: Weighed, at: At) -> Weighed:
        found = super()._resampled(state, at)
        mean = found.log_weight.view(-1, self.per_group).logsumexp(-1) - math.log(self.per_group)
        return found if found.t == 0 else replace(found, log_weight=mean.repeat_interleave(self.per_group))


def planted(kind: type[Weighing], model: dd.Denoiser, potential: Potential, ess: float = 0.8) -> dd.Particles:
    steered = dd.Particles(dd.Sampler(MASKED, model, S.Ancestral(), grid=GRID), potential, 2, ess=ess)
    steered._inner = kind(steered.sampler, steered.reference, potential, 2, ess, "systematic")
    return steered


def test_weights_without_the_ratio_are_caught() -> None:
    warm = plain(MASKED).guided(dd.Truncation(temperature=2.0))
    assert error(planted(Weighing, warm, Twist(MASKED))) < 1e-12
    assert error(planted(WithoutRatio, warm, Twist(MASKED))) == pytest.approx(9.0e-2, rel=0.05)  # steering.md: .090


def test_a_forgotten_last_potential_is_caught() -> None:
    class Forgets(Twist):
        def __call__(self, x: Tensor, t: float) -> Tensor:
            return super().__call__(x, t) * (t > 0)

    warm = plain(MASKED).guided(dd.Truncation(temperature=2.0))
    steered = planted(Weighing, warm, Forgets(MASKED))
    exact = T.law(steered.reference) * W
    assert float((T.evidence(steered) - exact).abs().max()) == pytest.approx(0.75, rel=0.05)  # steering.md: .75


def reward(measure: Tensor) -> float:
    """The expected W of a measure."""
    return float((measure * W).sum() / measure.sum())


def test_the_faults_of_a_public_class_are_caught() -> None:
    """Weights that are lost where a group is not resampled: the expected reward is that of no target."""
    model = plain(MASKED)
    exact = T.law(dd.Sampler(MASKED, model, S.Ancestral(), grid=GRID)) * W
    lost = T.evidence(planted(Forgetful, model, Twist(MASKED)))
    kept = T.evidence(planted(Forgetful, model, Twist(MASKED), ess=2.0))
    assert abs(reward(lost) - reward(exact)) > 5e-3
    assert float((lost - exact).abs().max()) > 0.05
    assert float((kept - exact).abs().max()) < 1e-12  # always resampled, so nothing is lost


def test_what_is_cut_off_raises() -> None:
    """top_k = 1: the estimate would be 0.480 in place of 1.655, and no sample shows it."""
    cut = plain(MASKED).guided(dd.Truncation(top_k=1))
    with pytest.raises(ValueError, match=r"the reference allows a value that the proposal rules out.*Truncation"):
        T.evidence(dd.Particles(dd.Sampler(MASKED, cut, S.Ancestral(), grid=GRID), Twist(MASKED), 2))
    same = dd.Particles(dd.Sampler(MASKED, cut, S.Ancestral(), grid=GRID), Twist(MASKED), 2, reference=cut)
    assert error(same) < 1e-12


def test_bad_arguments_are_refused() -> None:
    sampler = dd.Sampler(MASKED, plain(MASKED), S.Ancestral(), grid=GRID)
    with pytest.raises(ValueError, match="at most two particles, got per_group = 3"):
        T.evidence(dd.Particles(sampler, None, 3))
    with pytest.raises(TypeError, match="evidence: takes Particles"):
        T.evidence(sampler)  # type: ignore[arg-type]
    part = dd.Sampler(MASKED, plain(MASKED), S.Ancestral(), grid=(0.5, 0.0))
    with pytest.raises(ValueError, match="give initial=, the law there"):
        T.evidence(dd.Particles(part, None, 1))
    with pytest.raises(ValueError, match="evidence: length= must say how many sites"):
        net = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, V), MASKED, "denoiser")
        T.evidence(dd.Particles(dd.Sampler(MASKED, net, S.Ancestral(), grid=GRID), None, 1))
    with pytest.raises(TypeError, match=r"FirstHitting.*unbounded number of choices"):
        T.evidence(dd.Particles(dd.Sampler(MASKED, plain(MASKED), S.FirstHitting(), grid=GRID), None, 1))
    with pytest.raises(ValueError, match="more than 50 runs"):
        T.evidence(dd.Particles(sampler, None, 2), most=50)
