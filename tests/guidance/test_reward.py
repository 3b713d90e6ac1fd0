"""Rewards by draws: exact bias and error of every estimator, enumerated kernels and end laws, and rollouts."""

import itertools
from typing import Any

import pytest
import torch
from places import ROOT
from problems import named
from rewarded import FIVE, MASKED, UNIFORM, V, apart, doob, log_w, reached, world
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import Run
from discdiff.theory import exact as enumeration
from discdiff.theory import paths
from discdiff.theory.world import all_states, state_index

pytestmark = pytest.mark.usefixtures("as_user")
ESTIMATORS = ("swap", "control_variate", "self_normalised", "standardised")
X = all_states(V, 2)
NAMES = ["Masked", pytest.param("Uniform", marks=pytest.mark.slow)]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import doob

    return doob


def reward(x: Tensor) -> Tensor:
    return log_w(x.shape[1])[state_index(x, V)]


def predicted(
    guide: dd.Reward, process: dd.Process, z: Tensor, draws: Tensor, t: float = 0.5, length: int = 2
) -> dd.Prediction:
    """The guided prediction at states (n, L) if the guide's draws are (n, M, L)."""
    run = Run.start(world(length).denoiser(process, "loo").guided(guide), len(z), 0)
    run.given = lambda site, law, rows, scored: draws
    state, at = run.begin(z, t)
    return at.predict(state)


# --- estimators ------------------------------------------------------------------------------------------------------

BIASES = {  # shared/steering.md: the bias of D^h at M = 1, 2, 4, 8, and the root mean square error at 8
    ("Masked", "self_normalised"): (0.0905, 0.0556, 0.0295, 0.0148, 0.282),
    ("Masked", "control_variate"): (0.0905, 0.0413, 0.0182, 0.0079, 0.163),
    ("Masked", "swap"): (0.0200, 0.0162, 0.0153, 0.0148, 0.083),
    ("Uniform", "self_normalised"): (0.1497, 0.0947, 0.0549, 0.0290, 0.391),
    ("Uniform", "control_variate"): (0.1497, 0.0803, 0.0409, 0.0209, 0.242),
    ("Uniform", "swap"): (0.0573, 0.0485, 0.0438, 0.0415, 0.142),
}
PRODUCT = {  # at M = 8, if the draws are from the product of D
    ("Masked", "self_normalised"): 0.0241,
    ("Masked", "control_variate"): 0.0182,
    ("Masked", "swap"): 0.0148,
    ("Uniform", "self_normalised"): 0.0514,
    ("Uniform", "control_variate"): 0.0470,
    ("Uniform", "swap"): 0.0415,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_bias_and_error_over_all_draws(estimator: str, name: str, page: Any) -> None:  # noqa: ANN401
    *biases, rmse = BIASES[name, estimator]
    found = [page.errors(name, True, estimator, samples) for samples in (1, 2, 4, 8)]
    assert [bias for bias, _ in found] == pytest.approx(biases, rel=0.02)
    assert found[-1][1] == pytest.approx(rmse, rel=0.02)
    assert page.errors(name, False, estimator, 8)[0] == pytest.approx(PRODUCT[name, estimator], rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_standardised_weights_have_another_target(name: str, page: Any) -> None:  # noqa: ANN401
    """More draws do not help, as the weights do not depend on the scale of the reward."""
    four, eight = (page.errors(name, True, "standardised", samples)[0] for samples in (4, 8))
    assert eight > 1.3 * four > page.errors(name, True, "self_normalised", 8)[0]
    z = X
    draws = torch.randint(V, (9, 6, 2), generator=torch.Generator().manual_seed(0))
    one, other = (
        predicted(dd.Reward(lambda x, k=k: k * reward(x), 6, "standardised", temperature=0.6), UNIFORM, z, draws)
        for k in (1.0, 5.0)
    )
    assert apart(one.denoiser.exp(), other.denoiser.exp()) < 1e-12
    r = reward(draws.flatten(0, 1)).view(9, 6)
    w = ((r - r.mean(-1, keepdim=True)) / (0.6 * r.std(-1, keepdim=True))).softmax(-1)
    by_hand = torch.einsum("bm,bmlv->blv", w, torch.nn.functional.one_hot(draws, V).double())
    assert apart(one.denoiser.exp(), by_hand) < 1e-12
    one, other = (
        predicted(dd.Reward(lambda x, k=k: k * reward(x), 6, "self_normalised"), UNIFORM, z, draws) for k in (1.0, 5.0)
    )
    assert apart(one.denoiser.exp(), other.denoiser.exp()) > 0.1, "planted: weights that depend on it"


def test_formulas_of_the_estimators() -> None:
    """By hand, in whole arrays, from draws that are given."""
    for process in (MASKED, UNIFORM):
        z = reached(world(), process, 0.5)
        open_ = ~process.revealed(z, torch.full(z.shape, 0.5).double())
        draws = torch.randint(V, (len(z), 3, 2), generator=torch.Generator().manual_seed(0))
        draws = torch.where(open_[:, None], draws, z[:, None])
        d = world().denoiser(process, "loo")(z, 0.5).denoiser.exp()
        w, hit = reward(draws.flatten(0, 1)).view(-1, 3).exp(), torch.nn.functional.one_hot(draws, V).double()
        normalised = torch.einsum("bm,bmlv->blv", w / w.sum(-1, keepdim=True), hit)
        rest = (w.sum(-1, keepdim=True) - w) / 2
        varied = d + torch.einsum("bm,bmlv->blv", (w - rest) / w.mean(-1, keepdim=True) / 3, hit)
        swapped = torch.zeros_like(d)
        for i, v in itertools.product(range(2), range(V)):
            y = draws.clone()
            y[..., i] = v
            swapped[:, i, v] = reward(y.flatten(0, 1)).exp().view(-1, 3).mean(-1)
        for estimator, right in (
            ("self_normalised", normalised),
            ("control_variate", varied.clamp(min=0) * (d > 0)),
            ("swap", d * swapped),
        ):
            found = predicted(dd.Reward(reward, 3, estimator), process, z, draws).denoiser.exp()  # type: ignore[arg-type]
            assert apart(found, right / right.sum(-1, keepdim=True)) < 1e-12, estimator


@pytest.mark.parametrize("process", FIVE, ids=named)
def test_a_constant_weight_and_a_scaled_one(process: dd.Process) -> None:
    z = reached(world(), process, 0.5)
    open_ = ~process.revealed(z, torch.full(z.shape, 0.5).double())
    d, moved = world().denoiser(process, "loo")(z, 0.5).denoiser.exp(), {}
    for estimator in ESTIMATORS:
        guides = [
            dd.Reward(lambda x, shift=shift: torch.full((len(x),), shift), 3, estimator)  # type: ignore[arg-type]
            for shift in (0.1, -800.0)  # the mean of three times .1 is not .1
        ]
        moved[estimator] = 0.0
        for seed in range(4):
            draws = torch.randint(V, (len(z), 3, 2), generator=torch.Generator().manual_seed(seed))
            draws = torch.where(open_[:, None], draws, process.column(z)[:, None])
            found = [predicted(guide, process, z, draws).denoiser.exp() for guide in guides]
            assert apart(*found) < 1e-14
            moved[estimator] = max(moved[estimator], apart(found[0], d))
    assert max(moved["swap"], moved["control_variate"]) < 1e-14
    assert min(moved["self_normalised"], moved["standardised"]) > 0.7  # .99 for one draw of the rarest


def test_a_constant_weight_moves_the_self_normalised_one_by_up_to_99_percent() -> None:
    found = []
    for process in (MASKED, UNIFORM):
        z = reached(world(), process, 0.5)
        d = world().denoiser(process, "loo")(z, 0.5).denoiser.exp()
        for x in X:
            fits = ((d.gather(-1, x.expand(len(z), -1)[..., None])[..., 0]) > 0).all(-1)
            guide = dd.Reward(lambda x: torch.zeros(len(x)), 1, "self_normalised")
            draws = x.expand(int(fits.sum()), 1, -1)
            found.append(apart(predicted(guide, process, z[fits], draws).denoiser.exp(), d[fits]))
    assert 0.98 < max(found) < 1


def test_the_bias_under_a_strong_reward_falls_with_the_draws(page: Any) -> None:  # noqa: ANN401
    for name in ("Masked", "Uniform"):
        found = page.strong_biases(name)
        assert found[0] > 0.25
        assert all(less < more for more, less in itertools.pairwise(found))
        assert found[3] / found[4] == pytest.approx(4, rel=0.35), "of order 1 / M in the end"
        weak = page.strong_biases(name, 1.0)
        assert weak[0] == pytest.approx(BIASES[name, "self_normalised"][0], rel=1e-3)
        assert weak[1] == pytest.approx(BIASES[name, "self_normalised"][2], rel=0.01)


# --- enumeration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_end_laws_by_one_draw(name: str, page: Any) -> None:  # noqa: ANN401
    right = {"Masked": (0.256, 0.075, 0.009), "Uniform": (0.254, 0.066, 0.013)}
    assert [*page.guided_ends(name).values()] == pytest.approx(right[name], rel=0.05)


def test_the_number_of_paths_that_are_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = paths.Paths.add_ends

    def counted(self: paths.Paths, *given: Any) -> None:  # noqa: ANN401
        seen.append(self.rows)
        whole(self, *given)

    monkeypatch.setattr(paths.Paths, "add_ends", counted)
    monkeypatch.setattr(paths, "JOINT", 1 << 15)
    model = world().denoiser(MASKED, "loo")
    joint = [T.kernel(S.Ancestral(), MASKED, model.guided(dd.Reward(reward, m)), 0.5, 0.375) for m in (1, 2, 3)]
    assert seen == [324, 2304, 19044]
    monkeypatch.setattr(paths, "JOINT", 0)
    monkeypatch.setattr(enumeration, "JOINT", 0)
    for samples, right in enumerate(joint, start=1):
        guided = model.guided(dd.Reward(reward, samples))
        assert apart(T.kernel(S.Ancestral(), MASKED, guided, 0.5, 0.375), right) < 1e-12
        assert apart(right.sum(1), torch.ones(16).double()) < 1e-12
    assert apart(joint[0], joint[1]) > 1e-3, "planted: another number of draws"


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=named)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_runs_have_the_enumerated_law(estimator: str, process: dd.Process, failure_rate: float) -> None:
    samples = 2 if process.masks else 1
    model = world().denoiser(process, "loo").guided(dd.Reward(reward, samples, estimator))  # type: ignore[arg-type]
    sampler = dd.Sampler(process, model, S.Ancestral(), steps=3)
    law, out = T.law(sampler), sampler.sample(8000, seed=1)
    seen = torch.bincount(state_index(out.tokens, V), minlength=9)
    assert chisquare(seen, 8000 * law).pvalue > failure_rate
    if estimator == "swap":
        assert chisquare(seen, 8000 * world().p0).pvalue < failure_rate, "planted: no guide"


# --- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=named)
def test_a_rollout_draws_the_end_of_ancestral_steps(process: dd.Process) -> None:
    """With one self-normalised draw x the step is the bridge to x, so its kernel is a mean over the rollout's law."""
    plain, t, s = world().denoiser(process, "loo"), 0.6, 0.3
    found, z = {}, reached(world(), process, t)
    for rollout in (1, 2) if process.masks else (2,):
        guide = dd.Reward(reward, 1, "self_normalised", rollout, model=None if rollout == 1 else plain)
        found = T.kernel(S.Ancestral(), process, plain.guided(guide), t, s)[state_index(z, process.states)]
        law = T.kernel(S.Ancestral(), process, plain, t, 0.0)
        if rollout == 2:
            law = T.kernel(S.Ancestral(), process, plain, t, t / 2)
            law = law @ T.kernel(S.Ancestral(), process, plain, t / 2, 0.0)
        law = law[state_index(z, process.states)][:, state_index(X, process.states)]
        right = torch.zeros_like(found)
        for x, weight in zip(X, law.T, strict=True):
            fits = weight > 0
            bridge = process.bridge(z[fits], x.expand(int(fits.sum()), -1), t, s)
            states = all_states(process.states, 2)
            right[fits] += weight[fits, None] * bridge.log_prob(states[:, None].expand(-1, int(fits.sum()), -1)).exp().T
        assert apart(found, right) < 1e-12
    other = T.kernel(S.Ancestral(), process, plain, t, 0.0)[state_index(z, process.states)]
    assert apart(law, other[:, state_index(X, process.states)]) > 0.01, "planted: one step"


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_remove_the_bias_of_a_product_of_laws(name: str, page: Any) -> None:  # noqa: ANN401
    """Of the estimators that weigh whole draws; the swap, which redraws a site on its own, keeps its bias."""
    found = [page.limits(name, rollout) for rollout in (1, 2, 4)]
    weighed = [one["self_normalised and control_variate"] for one in found]
    assert weighed[1] < 0.6 * weighed[0]
    assert weighed[2] < 0.6 * weighed[1]
    swapped = [one["swap"] for one in found]
    assert swapped == pytest.approx([weighed[0]] * 3, rel=0.02)
    assert page.errors(name, False, "swap", 8)[0] > swapped[0] > 0.95 * page.errors(name, True, "swap", 8)[0]


# --- optimisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [MASKED, pytest.param(UNIFORM, marks=pytest.mark.slow)], ids=named)
def test_as_the_temperature_falls_along_a_plan_the_law_tends_to_the_argmax(process: dd.Process) -> None:
    """The temperature of each of eight steps is lower than that before it, from ``first`` to a tenth of it."""
    weights, grid = log_w(), torch.linspace(1, 0, 9).tolist()
    best = int(weights.argmax())

    def mass(process: dd.Process, first: float, made: Any) -> float:  # noqa: ANN401
        temperatures = (first * torch.logspace(0, -1, 8)).tolist()
        plan = dd.Plan(grid, [dd.Step(S.Ancestral(), guides=[made(process, one)]) for one in temperatures])
        return float(T.law(dd.Sampler(process, world().denoiser(process, "loo"), plan=plan))[best])

    def exact(process: dd.Process, temperature: float) -> dd.Guide:
        return doob("neighbours", process, weights / temperature)

    def drawn(samples: int) -> Any:  # noqa: ANN401
        return lambda process, temperature: dd.Reward(reward, samples, temperature=temperature)

    found = [mass(process, first, exact) for first in (1.0, 0.3, 0.1, 0.03)]
    assert all(less < more + 1e-12 for less, more in itertools.pairwise(found))
    assert 1 - found[-1] < 1e-4 < 0.01 < 1 - found[0]
    assert mass(process, 1e4, exact) == pytest.approx(float(world().p0[best]), abs=0.05), "planted: hot"
    one = mass(process, 0.03, drawn(1))  # the best token given one draw of the others
    assert 0.3 < one < 0.55
    many = [dd.Step(S.Ancestral(), guides=[drawn(32)(process, 0.03 * 0.7**k)]) for k in range(8)]
    run = dd.Sampler(process, world().denoiser(process, "loo"), plan=dd.Plan(grid, many)).sample(400, seed=0)
    assert float((state_index(run.tokens, V) == best).double().mean()) > 0.9
