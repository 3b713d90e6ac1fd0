"""Measurements against brute force; exact guides against enumerated posteriors; the table of heuristics."""

import itertools
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from places import ROOT
from problems import strong
from scipy import stats
from scipy.special import log_ndtr, ndtr
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states

pytestmark = pytest.mark.usefixtures("as_user")  # enumerations and errors of users

CODES = torch.tensor([[0.3, -1.2], [1.1, 0.4], [-0.7, 0.9]], dtype=torch.float64)
MATRIX = torch.tensor([[0.5, -1.0, 0.3, 0.8, -0.2, 1.4], [1.0, 0.1, -0.6, 0.2, 0.7, -0.9]], dtype=torch.float64)
X = all_states(3, 3)
EDGES, Y, SCALE = (-1.0, 0.2, 1.5), (0.4, -0.8), (0.5, 1.3)
# STEERING: the table of steering.md, section 6, a row for each guide, linear and nonlinear for each size.
STEERING = {
    "unguided": (1.42, 1.31, 1.94, 1.24, 1.05, 1.01),
    "exact h": (0.005, 0.012, 0.005, 0.008, 0.003, 0.006),
    "swap, many draws": (0.031, 0.037, 0.076, 0.070, 0.073, 0.049),
    "soft mean, 10 inner steps": (1.40, 2.52, 0.59, 0.79, 0.69, 0.18),
    "quantised, 1 inner step": (1.38, 5.45, 3.53, 5.23, 1.28, 0.99),
    "quantised, 10": (1.86, 0.38, 0.73, 1.81, 0.79, 0.44),
    "quantised, 100": (0.77, 0.91, 0.81, 1.04, 0.80, 0.45),
    "mean field": (0.40, 33.0, 0.27, 2.1, 0.09, 0.09),
}
DIGITS = {name: 3 if "h" in name.split() or "swap" in name else 2 for name in STEERING}  # decimals that it gives


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import posteriors

    return posteriors


def by_hand(x: Tensor) -> np.ndarray:
    """The linear measurement of each sequence, sum by sum."""
    return np.array([[sum(float(MATRIX[k, 2 * i + d] * CODES[t, d]) for i, t in enumerate(row) for d in (0, 1))
                      for k in (0, 1)] for row in x.tolist()])  # fmt: skip


def cubes(e: Tensor) -> Tensor:
    return torch.stack([e[:, 0, 0] * e[:, 1, 1], e.pow(3).sum((1, 2))], -1)


def gap(one: Tensor, other: object) -> float:
    return float((one.detach() - torch.as_tensor(np.asarray(other)).double()).abs().max())


# --- measurements -----------------------------------------------------------------------------------------------------


def test_a_linear_measurement_is_the_gaussian_of_the_sums() -> None:
    found = dd.Measurement(CODES, MATRIX, dd.GaussianNoise(Y, SCALE))(X)
    mean = by_hand(X)
    exact = stats.norm.logpdf(np.array(Y), mean, np.array(SCALE)).sum(-1)
    assert found.dtype == torch.float64
    assert gap(found, exact) < 1e-13
    assert gap(dd.Measurement(CODES, MATRIX, dd.GaussianNoise(Y, 0.5))(X), exact) > 0.1, "planted: one scale for both"
    assert gap(dd.Measurement(CODES.flip(1), MATRIX, dd.GaussianNoise(Y, SCALE))(X), exact) > 0.1, (
        "planted: other codes"
    )


def test_a_nonlinear_measurement_is_any_function_of_the_embedding() -> None:
    found = dd.Measurement(CODES, cubes, dd.GaussianNoise(Y, SCALE))(X)
    rows = [[CODES[r[0], 0] * CODES[r[1], 1], sum(CODES[t, d] ** 3 for t in r for d in (0, 1))] for r in X.tolist()]
    assert gap(found, stats.norm.logpdf(np.array(Y), np.array(rows), np.array(SCALE)).sum(-1)) < 1e-12


def test_levels_are_exact_or_noisy() -> None:
    """The probability of a level is that of the interval; over all levels it sums to 1."""
    mean, edges = by_hand(X), np.array([-np.inf, *EDGES, np.inf])
    for y in itertools.product(range(4), repeat=2):
        low, high = edges[np.array(y)], edges[np.array(y) + 1]
        sharp = dd.Measurement(CODES, MATRIX, dd.LevelNoise(y, EDGES))(X).exp()
        assert gap(sharp, ((mean >= low) & (mean < high)).all(-1)) == 0
        noisy = dd.Measurement(CODES, MATRIX, dd.LevelNoise(y, EDGES, SCALE))(X).exp()
        scale = np.array(SCALE)
        assert gap(noisy, (ndtr((high - mean) / scale) - ndtr((low - mean) / scale)).prod(-1)) < 1e-14
    total = sum(dd.Measurement(CODES, MATRIX, dd.LevelNoise(y, EDGES, 0.3))(X).exp()
                for y in itertools.product(range(4), repeat=2))  # fmt: skip
    assert gap(total, 1.0) < 1e-14
    edge = dd.Measurement([EDGES[0], EDGES[1]], lambda e: e[:, :, 0], dd.LevelNoise([1], EDGES))
    assert edge(torch.tensor([[0], [1]])).tolist() == [0.0, -math.inf], "a level has its lower edge"


def test_levels_far_away_keep_their_digits_and_gradients() -> None:
    """Where 1 - Phi rounds to 0: log Phi(-a) is the log-probability of [a, a + 1), up to exp(-a)."""
    for a in (30.0, 300.0, -31.0, -301.0):
        e = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
        noise = dd.LevelNoise([1], [a, a + 1], 1.0)
        value = dd.Measurement([0.0], lambda e: e[:, :, 0], noise).of_embedded(e)
        near = a if a > 0 else -(a + 1)
        assert float(value.detach()) == pytest.approx(log_ndtr(-near), rel=1e-12)
        (slope,) = torch.autograd.grad(value.sum(), e)
        assert float(slope) == pytest.approx(math.copysign(near, a), rel=0.01)


def test_gradients_of_measurements_are_differences() -> None:
    e = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    for forward in (MATRIX, cubes):
        for noise in (
            dd.GaussianNoise(Y, SCALE),
            dd.LevelNoise([1, 2], EDGES, SCALE),
            dd.LevelNoise([0, 3], EDGES, 0.4),
        ):
            assert torch.autograd.gradcheck(dd.Measurement(CODES, forward, noise).of_embedded, (e,))


@pytest.mark.parametrize("kind", ["linear", "quantised", "nonlinear", "black box"])
def test_a_measurement_is_a_weight_for_oracles_and_guides(kind: str) -> None:
    measured: dict[str, object] = {
        "linear": dd.Measurement(CODES, MATRIX, dd.GaussianNoise(Y, SCALE)),
        "quantised": dd.Measurement(CODES, MATRIX, dd.LevelNoise([2, 1], EDGES, SCALE)),
        "nonlinear": dd.Measurement(CODES, cubes, dd.GaussianNoise(Y, SCALE)),
        "black box": lambda x: torch.where(x.sum(-1) % 3 == 1, 0.0, -2.0),  # float32, without codes
    }
    log_likelihood, world, process = measured[kind], strong(), dd.Masked(3, dd.Linear())
    log_w = log_likelihood(X).double()  # type: ignore[operator]
    exact = world.p0 * log_w.exp() / (world.p0 * log_w.exp()).sum()
    assert gap(world.tilted(log_w).p0, exact) < 1e-15
    model = world.denoiser(process)
    for guide in (dd.Doob(world.log_h(process, log_w)), dd.Doob(clean=world.log_clean(process, log_w))):
        own = T.law(dd.Sampler(process, world.tilted(log_w).denoiser(process), S.Ancestral(), steps=8))
        assert gap(T.law(dd.Sampler(process, model.guided(guide), S.Ancestral(), steps=8)), own) < 1e-14
    out = dd.Sampler(process, model.guided(dd.Reward(log_likelihood)), S.Ancestral(), steps=4).sample(8, seed=0)
    assert out.rewards is not None and out.rewards > 0
    steered = dd.Sampler(process, model.guided(dd.MeanField(log_likelihood)), S.Ancestral(), steps=4).sample(8, seed=0)  # type: ignore[arg-type]
    assert steered.rewards is not None and steered.rewards >= 27
    assert dd.variational_posterior(model, log_likelihood).bound < float(world.p0.log().logsumexp(0)) + 30  # type: ignore[arg-type]


def test_a_measurement_is_a_potential_of_particles() -> None:
    """Without a guide, with the measurement at the end alone: the evidence is p0 p(y | x), for two particles."""
    world = T.Enumeration(torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64), vocab_size=2, length=2)
    process = dd.Masked(2, dd.Linear())
    measured = dd.Measurement(CODES[:2], MATRIX[:, :4], dd.GaussianNoise(Y, 1.5))

    def potential(x: Tensor, t: float) -> Tensor:
        return measured(x) if t == 0 else torch.zeros(len(x), dtype=torch.float64)

    sampler = dd.Sampler(process, world.denoiser(process), S.Ancestral(), steps=2)
    law = T.law(sampler)
    exact = law * measured(all_states(2, 2)).exp()
    assert gap(T.evidence(dd.Particles(sampler, potential, per_group=2)), exact) < 1e-12


def test_a_falling_temperature_leads_to_the_best_sequences() -> None:
    """Optimisation as conditional sampling: the exact guide of W^(1 / temperature), colder in each step of a plan."""
    world, process = strong(), dd.Masked(3, dd.Linear())
    log_w = dd.Measurement(CODES, MATRIX, dd.LevelNoise([2, 1], EDGES, SCALE))(X).round(decimals=1)
    best = log_w == log_w.max()
    assert int(best.sum()) == 2
    goal = world.p0 * best / (world.p0 * best).sum()

    def law(*temperatures: float) -> Tensor:
        guides = [dd.Doob(clean=world.log_clean(process, log_w / one)) for one in temperatures]
        steps = [dd.Step(S.Unmask(), guides=[guide]) for guide in guides]  # a token a step, so that nothing else errs
        return T.law(dd.Sampler(process, world.denoiser(process), plan=dd.Plan([1.0, 0.6, 0.3, 0.0], steps)))

    assert gap(law(0.5, 0.5, 0.5), world.tilted(log_w / 0.5).p0) < 1e-14
    far = [T.tv(law(4 * last, 2 * last, last), goal) for last in (1.0, 0.1, 0.01)]
    assert far[0] > 0.4 > 0.15 > far[1] > 0.001 > far[2]
    assert T.tv(law(0.01, 1.0, 1.0), goal) > 0.05, "planted: warmer again"


LINEAR = dd.Measurement(CODES, MATRIX, dd.GaussianNoise(Y, SCALE))
REFUSED = [
    (lambda: dd.Measurement(torch.zeros(3, 2, 2), MATRIX, sum), ValueError, r"codebook must be \(V, E\) numbers"),
    (lambda: dd.Measurement([[1.0], [math.nan]], cubes, sum), ValueError, "codebook must be finite, got nan"),
    (lambda: dd.Measurement("codes", cubes, sum), TypeError, "codebook must be an array"),  # type: ignore[arg-type]
    (lambda: dd.Measurement(CODES, torch.zeros(2), sum), ValueError, r"must be a matrix \(K, L E\) or a function"),
    (lambda: dd.Measurement(CODES, MATRIX, dd.GaussianNoise), TypeError, "noise must map values"),  # type: ignore[arg-type]
    (lambda: LINEAR(X[:, :2]), ValueError, "a matrix for L E = 6 numbers, but a sequence of 2 tokens has 4"),
    (lambda: LINEAR(X + 1), ValueError, "x: row 2, position 2 holds 3; accepted ids: 0..2, which have a code"),
    (lambda: LINEAR(X.tolist()), ValueError, r"x must be an int64 \(B, L\) tensor, got list"),  # type: ignore[arg-type]
    (lambda: LINEAR.of_embedded(CODES), ValueError, r"e must be \(N, L, 2\), got \(3, 2\)"),
    (lambda: dd.Measurement(CODES, MATRIX, dd.GaussianNoise([1.0], 1.0))(X), ValueError, "1 values, but .* gives 2"),
    (lambda: dd.Measurement(CODES, lambda e: e[:, 0, 0], sum)(X), ValueError, r"forward must give \(27, K\) values"),
    (lambda: dd.Measurement(CODES, MATRIX, lambda m: m)(X), ValueError, r"noise must give \(27,\) log-likelihoods"),
    (lambda: dd.Measurement(CODES, MATRIX, lambda m: m[:, 0] / 0)(X), ValueError, r"of sequence \d+ is inf"),
    (lambda: dd.GaussianNoise(Y, 0.0), ValueError, "scale must be positive, got 0"),
    (lambda: dd.GaussianNoise(Y, [1.0]), ValueError, "a finite number, or one for each value"),
    (lambda: dd.GaussianNoise([[1.0]], 1.0), ValueError, r"y must be \(K,\) numbers"),
    (lambda: dd.LevelNoise([4], EDGES), ValueError, "y must lie in 0..3, got 4"),
    (lambda: dd.LevelNoise([1], EDGES[::-1]), ValueError, "edges must increase"),
    (lambda: dd.LevelNoise([1], EDGES, -1.0), ValueError, "scale must be positive, or 0 for all values"),
    (lambda: dd.LevelNoise([1, 1], EDGES, [0.0, 1.0]), ValueError, "scale must be positive, or 0 for all values"),
    (lambda: dd.LevelNoise([0.5], EDGES), TypeError, "y must be a whole number"),  # type: ignore[list-item]
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_is_no_measurement_is_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


# --- posteriors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [True, False])
def test_an_exact_guide_has_the_posterior(page: ModuleType, linear: bool) -> None:
    """Its end law is that of the posterior's own denoiser, which has order 1 in TV and 2 in KL."""
    one = page.case(3, 3, linear, 0)
    model = page.GUIDES["exact h"](one)
    laws = [one.law(model, steps) for steps in (8, 16, 32)]
    own = one.law(one.posterior.denoiser(one.process), 16)
    assert gap(laws[1], own) < 3e-16
    far = [T.tv(law, one.posterior.p0) for law in laws]
    assert math.log2(far[0] / far[1]) == pytest.approx(1, abs=0.1)
    assert math.log2(far[1] / far[2]) == pytest.approx(1, abs=0.1)
    assert T.tv(one.law(one.model), one.posterior.p0) > 20 * far[2], "planted: no guide at all"


def expected(name: str, column: int) -> tuple[float, float]:
    """A figure of steering.md, and how far off a right build may be: 5 %, or the rounding of the figure."""
    figure = STEERING[name][column]
    return figure, max(0.05 * figure, 0.51 * 10 ** -DIGITS[name])


@pytest.mark.parametrize("name", [name for name in STEERING if name != "quantised, 100"])
def test_the_table_for_three_sites(page: ModuleType, name: str) -> None:
    for column in (4, 5):
        figure, slack = expected(name, column)
        assert abs(page.cell(name, *page.COLUMNS[column]) - figure) <= slack


def test_one_quantised_step_can_be_worse_than_none(page: ModuleType) -> None:
    """The negative control, and more inner steps help: three sites, the linear measurement."""
    none, one, ten = (page.cell(name, 3, 3, True) for name in ("unguided", "quantised, 1 inner step", "quantised, 10"))
    assert one > 1.2 * none > 1.2 * ten


@pytest.mark.slow
def test_the_whole_table_and_its_order(page: ModuleType) -> None:
    found = {name: [page.cell(name, *column) for column in page.COLUMNS] for name in STEERING}
    wrong = {
        (name, column): found[name][column]
        for name, column in itertools.product(STEERING, range(6))
        if abs(found[name][column] - expected(name, column)[0]) > expected(name, column)[1]
    }
    assert wrong == {}
    for column in range(6):
        exact, swap, hundred, none = (found[name][column] for name in
                                      ("exact h", "swap, many draws", "quantised, 100", "unguided"))  # fmt: skip
        assert exact < swap < hundred < none
        few = [page.cell(name, *page.COLUMNS[column]) for name in ("swap, 2 draws", "swap, 1 draw")]
        assert swap < few[0] < few[1] < none
    worse = [one > none for one, none in zip(found["quantised, 1 inner step"], found["unguided"], strict=True)]
    assert sum(worse) == 4, "one step is worse than none in four columns of six"


@pytest.mark.slow
def test_more_steps_help_the_exact_guide_alone(page: ModuleType) -> None:
    one = page.case(3, 2, True, 0)
    for name in ("exact h", "swap, many draws", "soft mean, 10 inner steps", "quantised, 10", "mean field"):
        few, many = (one.kl(page.GUIDES[name](one), steps) for steps in (16, 64))
        ratio = few / many
        assert ratio > 12 if name == "exact h" else ratio < 1.2


def test_swapped_tokens_by_draws_tend_to_their_limit(page: ModuleType, failure_rate: float) -> None:
    """``Reward`` with 128 draws against ``ManyDraws`` of the table, which is no exact posterior."""
    one, count = page.case(4, 2, True, 0), 4000
    law = one.law(page.GUIDES["swap, many draws"](one), 2)
    guided = one.model.guided(dd.Reward(one.measurement, samples=128))
    tokens = dd.Sampler(one.process, guided, S.Ancestral(), steps=2).sample(count, seed=4).tokens
    seen = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16)
    assert stats.chisquare(seen, law * count).pvalue > failure_rate
    assert stats.chisquare(seen, one.law(page.GUIDES["exact h"](one), 2) * count).pvalue < failure_rate, "planted"


def test_the_tables_of_the_page_are_made(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SIZES", ((3, 2, 1),))
    monkeypatch.setattr(page, "COLUMNS", ((3, 2, True),))
    monkeypatch.setattr(page, "COUNTS", (2, 4))
    monkeypatch.setattr(page, "DRAWS", (4, 5))
    monkeypatch.setattr(page, "STEPS", 4)
    monkeypatch.setattr(page, "GUIDES", {name: page.GUIDES[name] for name in page.REMASKED})
    monkeypatch.setattr(page, "cell", page.cell.__wrapped__)
    made = page.tables()
    assert {name: text.count("\n") for name, text in made.items()} == {
        "posteriors": 6, "posteriors_by_steps": 6, "anchored_remasking": 6, "variational": 3
    }  # fmt: skip
    assert "| exact h | " in made["posteriors"]
