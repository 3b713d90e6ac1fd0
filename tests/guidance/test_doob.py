"""Doob's transform by exact h: the tilted world's predictions, kernels and end laws, and where it changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guides import table
from operators import accepted
from places import ROOT
from problems import named
from rewarded import FIVE, LINEAR, MASKED, RATES, UNIFORM, V, apart, doob, log_w, reached, world
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import Run
from discdiff.theory import exact as enumeration
from discdiff.theory import paths
from discdiff.theory.world import all_states, state_index

pytestmark = pytest.mark.usefixtures("as_user")

# what takes longest is tried on two processes, and on the others in the slow run
FEW = [pytest.param(one, marks=() if one in FIVE[:2] else pytest.mark.slow, id=named(one)) for one in FIVE]
PROCESSES = [*FIVE, dd.General(RATES, LINEAR), dd.AbsorbingUniform(V, LINEAR), dd.Masked(4, LINEAR, mask_id=1)]
OPERATORS = [
    S.Ancestral(), S.SplitLeap(), S.TauLeaping(), S.Euler(), S.DFM(1.0), S.ThetaTrapezoidal(), S.Renoising(),
    S.MaximalCoupling(), S.Unmask("max_prob"), S.Unmask("entropy"), S.P2(), S.ReMDM(eta=0.3), S.Greedy(),
    S.ARPC("forward"), S.Gibbs(), S.LocallyBalanced(), S.InformedGibbs(exact=True), S.ForwardBackward(),
    S.TauForwardBackward(), S.Remask(), S.EntropyRedraw(sites=1), S.Ancestral() >> S.Gibbs(),
]  # fmt: skip
TIMES = (1.0, 0.99995, 0.97, 0.6, 0.1, 0.0)
FORMS = ("neighbours", "clean")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401  # the module that makes the tables
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import doob

    return doob


# --- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("form", FORMS)
def test_a_guided_prediction_is_that_of_the_tilted_world(form: str, process: dd.Process) -> None:
    for length in (2, 3):
        law, weights = world(length), log_w(length)
        base, goal = law.denoiser(process, "loo"), law.tilted(weights).denoiser(process, "loo")
        guided = base.guided(doob(form, process, weights))
        for t in TIMES:
            z = reached(law, process, t)
            found = guided(z, t)
            assert apart(found.loo.exp(), goal(z, t).loo.exp()) < 1e-12
            assert apart(found.denoiser.exp(), goal(z, t).denoiser.exp()) < 1e-12
        other = base.guided(doob(form, process, log_w(length, seed=6)))
        assert apart(other(z, t).loo.exp(), goal(z, t).loo.exp()) > 0.01, "planted: another weight"


@pytest.mark.parametrize("process", FIVE, ids=named)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("predicts", ["denoiser", "ratio"])
def test_it_does_not_matter_what_the_network_predicts(
    predicts: dd.prediction.Predicts, form: str, process: dd.Process
) -> None:
    law, weights, t = world(), log_w(), 0.6
    z = reached(law, process, t)
    known = ~process.settled(z, torch.full(z.shape, 0.4).double())
    goal = law.tilted(weights).denoiser(process, "loo")(z, t)
    found = law.denoiser(process, predicts).guided(doob(form, process, weights))(z, t)
    assert apart(found[known].loo.dense().softmax(-1), goal[known].loo.dense().softmax(-1)) < 1e-12
    assert apart(found.denoiser.exp(), goal.denoiser.exp()) < 1e-12


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("form", [*FORMS, "factorised"])
def test_a_constant_weight_changes_nothing_and_a_scaled_one_nothing_more(form: str, process: dd.Process) -> None:
    if form == "factorised" and process.rank_one is None:
        pytest.skip("refused")
    law, base = world(), world().denoiser(process, "loo")
    for t in (0.9, 0.6, 0.1):
        z = reached(law, process, t)
        constant = base.guided(doob(form, process, torch.full((9,), 2.3).double()))(z, t)
        assert apart(constant.loo.exp(), base(z, t).loo.exp()) < 1e-14
        one, scaled = (base.guided(doob(form, process, log_w() + shift))(z, t).loo.exp() for shift in (0.0, 300.0))
        assert apart(one, scaled) < 1e-12
        assert apart(one, base(z, t).loo.exp()) > 0.01


def test_noise_is_that_of_the_prediction_and_not_of_the_state() -> None:
    """An operator tells the network t = .3 at a state of t = .8; the guide sees .3."""
    for process, form in ((p, f) for p in (MASKED, UNIFORM) for f in (*FORMS, "factorised")):
        law, weights = world(), log_w()
        z, models = reached(law, process, 0.3), []
        for model in (law.denoiser(process, "loo").guided(doob(form, process, weights)),
                      law.tilted(weights).denoiser(process, "loo")):  # fmt: skip
            state, at = Run.start(model, len(z), 0).begin(z, 0.8)
            models.append(at.predict(state, time=0.3).loo.exp())
        assert apart(*models) < 1e-12
        seen: list[Tensor] = []
        guide = dd.Doob(lambda x, t, seen=seen: seen.append(t) or t * 0)
        assert law.denoiser(process, "loo").guided(guide)(z, 0.3).loo.shape == (len(z), 2, V)
        assert {tuple(t.shape[1:]) for t in seen} == {()}
        assert bool((torch.cat(seen) == 0.3).all())


def test_sites_of_different_times() -> None:
    """A frozen site has time 0, also for h; on a masked process rows keep one time."""
    frozen = torch.tensor([True, False, False])
    for process in FIVE:
        law, weights, seen = world(3), log_w(3), []
        log_h = law.log_h(process, weights)

        def watched(x: Tensor, t: Tensor, log_h: Callable[..., Tensor] = log_h, seen: list[Tensor] = seen) -> Tensor:
            seen.append(t)
            return log_h(x, t)

        goal = law.tilted(weights).denoiser(process, "loo")
        t = torch.where(frozen, 0.0, 0.6).double()
        z = reached(law, process, 0.0) if process.absorbing else all_states(V, 3)
        for guide in (dd.Doob(watched), doob("clean", process, weights)):
            found = law.denoiser(process, "loo").guided(guide)(z, t.expand(len(z), -1))
            assert apart(found.loo.exp(), goal(z, t.expand(len(z), -1)).loo.exp()) < 1e-12
        assert {one.ndim for one in seen} == ({1} if process.masks else {2})
        if not process.masks:
            wrong = dd.Doob(lambda x, t, log_h=log_h: log_h(x, t.amax(-1)))
            found = law.denoiser(process, "loo").guided(wrong)(z, t.expand(len(z), -1))
            assert apart(found.loo.exp(), goal(z, t.expand(len(z), -1)).loo.exp()) > 1e-3, "planted: one time a row"


def test_where_h_is_0_a_row_stays_as_it_is() -> None:
    never = torch.full((9,), -torch.inf).double()
    never[4] = 0.0  # one sequence alone
    for process in (*FIVE, dd.General(RATES, LINEAR)):
        law, z = world(), all_states(V, 2)
        base = law.denoiser(process, "loo")
        for form in FORMS:
            guided = base.guided(doob(form, process, never))
            found, plain = guided(z, 0.0).loo.exp(), base(z, 0.0).loo.exp()
            allowed = z.flip(1) == 1  # the other site is that of the sequence
            right = torch.nn.functional.one_hot(torch.ones_like(z), V).double()
            assert apart(found[allowed], right[allowed]) < 1e-12
            assert apart(found[~allowed], plain[~allowed]) < 1e-14
    nowhere = base.guided(dd.Doob(lambda x, t: torch.full((len(x),), -torch.inf)))
    z = reached(law, process, 0.5)
    assert apart(nowhere(z, 0.5).loo.exp(), base(z, 0.5).loo.exp()) < 1e-14


def test_a_hard_weight_leaves_no_other_sequence() -> None:
    weights = torch.where(torch.arange(9) % 4 == 0, 0.0, -torch.inf).double()
    for process in FIVE[:2]:
        for form in FORMS:
            model = world().denoiser(process, "loo").guided(doob(form, process, weights))
            law = T.law(dd.Sampler(process, model, S.Ancestral(), grid=[1.0, 0.5, 0.0]))
            own = world().tilted(weights).denoiser(process, "loo")
            assert apart(law, T.law(dd.Sampler(process, own, S.Ancestral(), grid=[1.0, 0.5, 0.0]))) < 1e-12


def test_a_product_of_weights_of_sites_is_no_product_of_tilts() -> None:
    """The naive D'(v) ~ D(v) w_i(v) is wrong even where W is a product over sites."""
    weights = table(V, 2, seed=1)
    x, t = all_states(V, 2), 0.5
    law, of_sites = world(), weights[0][x[:, 0]] + weights[1][x[:, 1]]
    for process in (MASKED, UNIFORM):
        z = reached(law, process, t)
        goal = law.tilted(of_sites).denoiser(process, "loo")(z, t).denoiser.exp()
        naive = law.denoiser(process, "loo")(z, t).tilted(weights.expand(len(z), -1, -1)).denoiser.exp()
        exact = law.denoiser(process, "loo").guided(doob("neighbours", process, of_sites))(z, t).denoiser.exp()
        assert apart(exact, goal) < 1e-12
        assert apart(naive, goal) > 0.1


# --- kernels and end laws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", FEW)
def test_every_operator_has_the_kernel_of_the_tilted_world(process: dd.Process) -> None:
    law, weights = world(), log_w()
    base, goal = law.denoiser(process, "loo"), law.tilted(weights).denoiser(process, "loo")
    models = [base.guided(doob(form, process, weights)) for form in FORMS]
    count = 0
    for operator in OPERATORS:
        if not accepted(operator, process):
            continue
        times = (0.8, 0.4) if operator.moves else (0.4,)
        some = law.reachable(process, times[0])
        right = T.kernel(operator, process, goal, *times)
        for model in models:
            assert apart(T.kernel(operator, process, model, *times)[some], right[some]) < 1e-11, operator
        assert apart(T.kernel(operator, process, base, *times)[some], right[some]) > 1e-3, operator
        count += 1
    assert count >= 10


def test_sites_that_are_kept_apart_give_the_joint_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    law, weights = world(3), log_w(3)
    model = law.denoiser(UNIFORM, "loo").guided(doob("neighbours", UNIFORM, weights))
    own = law.tilted(weights).denoiser(UNIFORM, "loo")
    for operator in (S.Ancestral(), S.SplitLeap()):
        right = T.kernel(operator, UNIFORM, own, 0.8, 0.4)
        monkeypatch.setattr(paths, "JOINT", 0)
        monkeypatch.setattr(enumeration, "JOINT", 0)
        assert apart(T.kernel(operator, UNIFORM, model, 0.8, 0.4), right) < 1e-11


FOUND = {  # TV to p0 W / Z at 8, 16 and 32 steps of shared/steering.md
    "Masked": (1.73e-2, 8.6e-3, 4.3e-3),
    "Uniform": (2.66e-2, 1.34e-2, 6.7e-3),
}


@pytest.mark.parametrize("process", FEW)
@pytest.mark.parametrize("form", ["neighbours", pytest.param("clean", marks=pytest.mark.slow)])
def test_end_laws_tend_to_the_tilted_law_at_order_1(form: str, process: dd.Process, page: Any) -> None:  # noqa: ANN401
    name = type(process).__name__
    assert page.PROCESSES[name] == process
    own, base = page.tilted().denoiser(process, "loo"), page.world().denoiser(process, "loo")
    errors = page.end_errors(process, form)
    assert errors == pytest.approx(FOUND.get(name, errors), rel=0.02)
    assert page.slope((8, 16, 32), errors) == pytest.approx(1, abs=0.05)
    assert apart(page.law(base.guided(page.guides(process)[form]), 4), page.law(own, 4)) < 1e-12
    assert T.tv(page.law(base, 8), page.tilted().p0) > 0.2, "planted: no guide"


def test_a_frozen_site_keeps_the_order(page: Any) -> None:  # noqa: ANN401
    errors = page.frozen_errors()
    assert errors[::2] == pytest.approx((0.037, 0.0093), rel=0.02)
    assert page.slope((8, 16, 32), errors) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("process", FEW)
def test_a_frozen_site_on_every_process(process: dd.Process) -> None:
    law, weights = world(3), log_w(3)
    own = law.tilted(weights).denoiser(process, "loo")
    given = {"prompt": [2, 0, 0], "frozen": [True, False, False]}
    for form in FORMS:
        model = law.denoiser(process, "loo").guided(doob(form, process, weights))
        laws = [T.law(dd.Sampler(process, one, S.Ancestral(), steps=3), **given) for one in (model, own)]
        assert apart(*laws) < 1e-12
        assert float(laws[0][all_states(V, 3)[:, 0] != 2].sum()) == 0


def test_a_random_run_has_the_law_of_the_kernel(failure_rate: float) -> None:
    from scipy.stats import chisquare

    for process in (MASKED, UNIFORM):
        model = world().denoiser(process, "loo").guided(doob("neighbours", process, log_w()))
        sampler = dd.Sampler(process, model, S.Ancestral(), steps=4)
        out, law = sampler.sample(5000, seed=3), T.law(sampler)
        seen = torch.bincount(state_index(out.tokens, V), minlength=9)
        assert chisquare(seen, 5000 * law).pvalue > failure_rate
        assert chisquare(seen, 5000 * world().p0).pvalue < failure_rate, "planted: no guide"
        parts = [sampler.sample(size, seed=3, first_row=first).tokens for first, size in ((0, 3), (3, 1), (4, 40))]
        assert torch.equal(torch.cat(parts), out.tokens[:44])
