"""Predictors of first and higher order: their kernels against formulas written from p_t alone, and their orders."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from ledger import caught, within
from pinned import add_flux, direct_rates, posterior_rates
from problems import dirichlet, families, mislabelled, states, strong, weak
from scipy.linalg import expm
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.prediction import MaximalCoupling, ReMDM, mixture

# Enumerations call operators thousands of times; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")

MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
WINDOW = (0.95, 0.1)


def coupled(eps: float) -> T.Enumeration:
    """(1 - eps) uniform + eps Dirichlet(1/2) on two sites: weak or strong coupling for eps small or near 1."""
    world = dirichlet(0.5, 3, length=2)
    return T.Enumeration((1 - eps) / len(world.p0) + eps * world.p0, vocab_size=3, length=2)


def slope(
    operator: dd.Operator,
    process: dd.Process,
    world: T.Enumeration,
    steps: list[int],
    window: tuple[float, float] = WINDOW,
) -> float:
    model = world.denoiser(process, predicts="loo")
    return T.order(steps, lambda n: dd.Sampler(process, model, operator, steps=n), window=window)


def product(rows: Tensor) -> Tensor:
    """(N, L, S) laws of sites as the (N, S**L) law of all."""
    joint = torch.ones(len(rows), 1, dtype=rows.dtype)
    for site in range(rows.shape[1]):
        joint = (joint[:, :, None] * rows[:, site, None]).flatten(1)
    return joint


# --- one step, against p_t ------------------------------------------------------------------------------------------


def site_rates(world: T.Enumeration, process: dd.Process, t: float) -> Tensor:
    """(N, L, S) reverse rates per unit of alpha from the joint generator, which knows p_t and no prediction."""
    generator = T.reverse_generator(world, process, t) / float(process.schedule.alpha(t))
    z, size = states(process.states, world.length), process.states
    rates = torch.zeros(len(z), world.length, size, dtype=torch.float64)
    for row, site in itertools.product(range(len(z)), range(world.length)):
        stride = size ** (world.length - 1 - site)
        targets = row + (torch.arange(size) - z[row, site]) * stride
        rates[row, site] = generator[row, targets].index_fill(0, z[row, site], 0.0)
    return rates


PROBABILITY = {
    S.Euler(): lambda r: r.clamp(max=1),
    S.TauLeaping(): lambda r: 1 - torch.exp(-r),
    S.TauLeaping("reject"): lambda r: r * torch.exp(-r),
}


@pytest.mark.parametrize("process", families(), ids=repr)
@pytest.mark.parametrize("operator", PROBABILITY, ids=repr)
def test_leaps_have_the_rates_of_the_joint_reverse_process(process: dd.Process, operator: dd.Operator) -> None:
    world, t, s = strong(), 0.6, 0.45
    reached = world.marginal(process, t) > 0
    rates = site_rates(world, process, t)
    length = float(process.schedule.alpha(s)) - float(process.schedule.alpha(t))
    total = rates.sum(-1, keepdim=True)
    moves = PROBABILITY[operator](length * total)
    rows = torch.where(total > 0, rates / total, 0.0) * moves
    rows = rows.scatter_add(-1, states(process.states, 3)[..., None], 1 - moves)
    k = T.kernel(operator, process, world.denoiser(process, predicts="loo"), t=t, s=s)
    torch.testing.assert_close(k[reached], product(rows)[reached], atol=1e-10, rtol=0)


@pytest.mark.parametrize("predicts", ["denoiser", "ratio"])
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_leaps_do_not_depend_on_what_is_predicted(process: dd.Process, predicts: str) -> None:
    world = strong()
    for operator in (S.Euler(), S.DFM(2.0), S.ThetaTrapezoidal(), S.SplitLeap()):
        right = T.kernel(operator, process, world.denoiser(process, predicts="loo"), t=0.6, s=0.4)
        other = T.kernel(operator, process, world.denoiser(process, predicts=predicts), t=0.6, s=0.4)
        torch.testing.assert_close(other, right, atol=1e-11, rtol=0)


@pytest.mark.parametrize("operator", [S.Euler(), S.MaximalCoupling(), S.ReMDM(0.0), S.ReMDM(0.0, "rate")], ids=repr)
def test_on_a_masked_process_these_are_ancestral(operator: dd.Operator) -> None:
    for schedule in (dd.Linear(), dd.Cosine()):
        process = dd.Masked(3, schedule)
        model = strong().denoiser(process)
        right = T.kernel(S.Ancestral(), process, model, t=0.6, s=0.4)
        torch.testing.assert_close(T.kernel(operator, process, model, t=0.6, s=0.4), right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("process", families(), ids=repr)
def test_mixture_plug_in_and_tweedie_are_one_kernel(process: dd.Process) -> None:
    """The bridge averaged over D, the bridge with O inside, and the score's formula: all are ``Ancestral``."""
    world, t, s = strong(), 0.6, 0.35
    model, z = world.denoiser(process, predicts="loo"), states(process.states, 3)
    said, alpha_s = model(z, t), float(process.schedule.alpha(s))
    plugged = said[torch.ones_like(z, dtype=torch.bool)].reverse(alpha_s).dense().view(*z.shape, -1).exp()
    mixed = mixture(dd.bridge.Exact(), said, alpha_s).exp()
    forward, at_t = process.kernel(t, s), said.ratio.exp()  # rows p_t(. | rest) / p_t(z | rest)
    earlier = torch.linalg.solve(forward.T, at_t.flatten(0, 1).T).T.view(at_t.shape)  # the score at s, up to p_t(z)
    tweedie = earlier * forward.T[z]
    reached = world.marginal(process, t) > 0
    k = T.kernel(S.Ancestral(), process, model, t=t, s=s)
    for rows in (plugged, mixed, tweedie):
        torch.testing.assert_close(k[reached], product(rows)[reached], atol=1e-10, rtol=0)


@pytest.mark.parametrize("process", [MASKED, UNIFORM, families()[2]], ids=repr)
def test_bridges_averaged_over_the_denoiser(process: dd.Process) -> None:
    world, t, s = strong(), 0.6, 0.35
    model, z, alpha_s = world.denoiser(process, predicts="loo"), states(process.states, 3), process.schedule.alpha(s)
    reached = world.marginal(process, t) > 0
    pairs = [(S.MaximalCoupling(), MaximalCoupling())]
    if process == MASKED:
        pairs += [(S.ReMDM(0.2), ReMDM(0.2)), (S.ReMDM(0.5, "rescale"), ReMDM(0.5 * 0.35 / 0.4))]
    for operator, bridge in pairs:
        rows = mixture(bridge, model(z, t), alpha_s).exp()
        k = T.kernel(operator, process, model, t=t, s=s)
        torch.testing.assert_close(k[reached], product(rows)[reached], atol=1e-11, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 2.0])
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_dfm_is_flow_matching_with_a_flux(process: dd.Process, eta: float) -> None:
    """A short step is I + d G, with G the pinned rates of ``dd.bridge`` averaged over the denoiser."""
    world, alpha, d = strong(), 0.4, 1e-6
    model, z = world.denoiser(process, predicts="loo"), states(process.states, 3)
    belief = model(z, 1 - alpha).denoiser.exp()
    rates = torch.zeros(*z.shape, process.states, dtype=torch.float64)
    for v in range(3):
        q = process.transition(alpha, 1.0)[v]
        flux = torch.zeros(process.states, process.states, dtype=torch.float64)
        flux[v] = alpha * process.pi * (torch.arange(process.states) != v)
        g = add_flux(direct_rates(process, v, alpha), q, flux + flux.T, eta)
        rates += belief[..., v, None] * g[z]
    k = T.kernel(S.DFM(eta), process, model, t=1 - alpha, s=1 - alpha - d)
    rows = (d * rates).scatter_add(-1, z[..., None], torch.ones_like(z[..., None], dtype=torch.float64))
    reached = world.marginal(process, 1 - alpha) > 0
    assert float((k - product(rows))[reached].abs().max()) < 1e-9  # second order in d
    if eta == 0 and process == UNIFORM:  # it is not the reverse process, whose pinned rates differ
        assert float((direct_rates(process, 0, alpha) - posterior_rates(process, 0, alpha)).abs().max()) > 0.1


# --- orders ---------------------------------------------------------------------------------------------------------

FIRST = [
    S.Euler(), S.TauLeaping(), S.TauLeaping("reject"), S.MaximalCoupling(), S.DFM(), S.DFM(2.0), S.ThetaRK2(0.5),
    S.ThetaRK2(1.0),
]  # fmt: skip


@pytest.mark.parametrize("world", [coupled(0.25), coupled(0.95)], ids=["weak", "strong"])
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("operator", FIRST, ids=repr)
def test_declared_order_is_the_measured_one(operator: dd.Operator, process: dd.Process, world: T.Enumeration) -> None:
    steps = [32, 64, 128] if operator == S.DFM(2.0) else [8, 16, 32]  # where eta d is small
    number = 14 if isinstance(operator, S.ThetaRK2) else 12
    within(number, abs(slope(operator, process, world, steps) - operator.order), 0.1)


@pytest.mark.parametrize("world", [weak(), strong()], ids=["weak", "strong"])
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_split_leap_has_order_two_at_any_coupling(process: dd.Process, world: T.Enumeration) -> None:
    op = S.SplitLeap()
    assert slope(op, process, world, [8, 16, 32]) == pytest.approx(op.order, abs=0.1)


@pytest.mark.parametrize(
    ("operator", "process", "steps"),
    [
        pytest.param(S.ThetaTrapezoidal(0.5), MASKED, [32, 64, 128], marks=pytest.mark.slow),
        (S.ThetaTrapezoidal(1 / 3), MASKED, [32, 64, 128]),
        pytest.param(S.ThetaTrapezoidal(0.5), UNIFORM, [32, 64, 128], marks=pytest.mark.slow),
        pytest.param(S.Multistep(), MASKED, [96, 192, 384], marks=pytest.mark.slow),
        pytest.param(S.Multistep(), UNIFORM, [96, 192, 384], marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_clipped_rates_have_order_one_at_strong_coupling_and_two_without_the_clip(
    operator: dd.Operator, process: dd.Process, steps: list[int]
) -> None:
    clipped = slope(operator, process, coupled(0.95), steps)
    assert clipped == pytest.approx(operator.order, abs=0.1)
    caught(13, 2 - clipped, 0.5)
    finer = [64, 128, 256] if (operator, process) == (S.Multistep(), MASKED) else [24, 48, 96]
    within(13, abs(slope(operator, process, coupled(0.05), finer) - 2), 0.1)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_a_trapezoid_whose_first_stage_is_linear_in_the_rates_has_order_one(
    process: dd.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discdiff.samplers.theta.TauLeaping", S.Euler)  # P(r) = r in place of 1 - exp(-r)
    caught(13, 2 - slope(S.ThetaTrapezoidal(), process, coupled(0.05), [8, 16, 32]), 0.5)


@pytest.mark.slow
def test_remasking_at_a_rate_has_order_one_and_in_shares_none_inside_and_one_half_at_the_end() -> None:
    world = coupled(0.95)
    operator = S.ReMDM(2.0, "rate")
    assert slope(operator, MASKED, world, [32, 64, 128]) == pytest.approx(operator.order, abs=0.1)
    for operator in (S.ReMDM(0.3), S.ReMDM(1.0, "rescale")):
        assert slope(operator, MASKED, world, [256, 512, 1024]) == pytest.approx(operator.order, abs=0.1)
    model = world.denoiser(MASKED, predicts="loo")
    whole = T.order([64, 256, 1024], lambda n: dd.Sampler(MASKED, model, S.ReMDM(1.0, "rescale"), steps=n))
    assert whole == pytest.approx(0.5, abs=0.1)


def test_a_mislabelled_denoiser_has_no_order() -> None:
    wrong = mislabelled(weak(), UNIFORM)
    for number, op in ((12, S.Euler()), (14, S.ThetaRK2()), (None, S.SplitLeap())):
        measured = T.order([4, 8, 16], lambda n, op=op: dd.Sampler(UNIFORM, wrong, op, steps=n), window=WINDOW)
        assert measured < 0.5
        if number:
            caught(number, op.order - measured, 0.5)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_the_joint_midpoint_has_order_two(process: dd.Process) -> None:
    """With the rates of the middle of a step; with those of its start, frozen, it has order one."""
    world = strong()

    def frozen(world: T.Enumeration, process: dd.Process, t: float, s: float) -> Tensor:
        a_t, a_s = float(process.schedule.alpha(t)), float(process.schedule.alpha(s))
        return torch.as_tensor(expm(((a_s - a_t) / a_t * T.reverse_generator(world, process, t)).numpy()))

    def measured(step: Callable[[T.Enumeration, dd.Process, float, float], Tensor]) -> float:
        errors = []
        for n in (16, 32):
            q, times = world.marginal(process, 0.95), torch.linspace(0.95, 0.1, n + 1, dtype=torch.float64).tolist()
            for t, s in itertools.pairwise(times):
                q = q @ step(world, process, t, s)
            errors.append(T.tv(q, world.marginal(process, 0.1)))
        return math.log2(errors[0] / errors[1])

    within(15, abs(measured(T.reversal.joint_midpoint) - 2), 0.1)
    caught(15, 2 - measured(frozen), 0.5)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_gibbs_moves_lift_the_order_of_ancestral_steps_to_two(process: dd.Process) -> None:
    """On three sites, from short steps on; the declared order is a lower bound."""
    op = S.Ancestral() >> S.Gibbs()
    assert op.order == 1.0
    assert op.nfe == 2.0
    short = (0.5, 0.2)
    within("21b", abs(slope(op, process, strong(), [16, 32, 64], short) - 2), 0.1)
    caught("21b", 2 - slope(S.Ancestral(), process, strong(), [8, 16, 32], short), 0.5)


@pytest.mark.parametrize(
    ("process", "operators"),
    [(MASKED, [S.SplitLeap(), S.Ancestral() >> S.Gibbs()]), (UNIFORM, [S.SplitLeap(), S.Ancestral() >> S.Gibbs()])],
    ids=repr,
)
def test_half_the_calls_of_ancestral_suffice(process: dd.Process, operators: list[dd.Operator]) -> None:
    """What Ancestral reaches end to end with 32 calls, these do with 16."""
    world = strong()
    model = world.denoiser(process, predicts="loo")
    goal = T.kl(world.p0, T.law(dd.Sampler(process, model, S.Ancestral(), steps=32)))
    for operator in operators:
        assert T.kl(world.p0, T.law(dd.Sampler(process, model, operator, steps=8))) <= goal


# --- stages and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [S.ThetaTrapezoidal(), S.ThetaRK2(), S.SplitLeap()], ids=repr)
@pytest.mark.parametrize("process", [dd.Masked(2, dd.Linear()), dd.Uniform(2, dd.Linear())], ids=repr)
def test_a_staged_operator_is_its_program(operator: dd.Operator, process: dd.Process) -> None:
    """The product of the stages' kernels over pairs of states equals the enumeration of the whole text."""
    world = dirichlet(0.5, 3, vocab_size=2, length=2)
    model = world.denoiser(process, predicts="loo")
    parts = T.kernel(operator, process, model, t=0.7, s=0.3)
    whole = T.kernel(operator, process, model, t=0.7, s=0.3, whole=True)
    torch.testing.assert_close(parts, whole, atol=1e-13, rtol=0)


@pytest.mark.parametrize("operator", [S.Multistep(), S.Multistep() >> S.Gibbs()], ids=repr)
def test_the_law_of_an_operator_that_looks_back(operator: dd.Operator, failure_rate: float) -> None:
    from scipy.stats import chisquare

    draws = 60_000
    for process in (MASKED, UNIFORM):
        world = strong() if operator == S.Multistep() else coupled(0.95)
        sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), operator, steps=5)
        law = T.law(sampler)
        out = sampler.sample(draws, seed=1)
        place = 3 ** torch.arange(world.length).flip(0)
        count = torch.bincount((out.tokens * place).sum(-1), minlength=len(law))
        assert chisquare(count.numpy(), (law * draws).numpy()).pvalue > failure_rate
        assert out.nfe == 5 * (1 if operator == S.Multistep() else 2)  # looking back costs no call
        plain = T.law(dd.Sampler(process, sampler.model, S.TauLeaping(), steps=5))
        if operator == S.Multistep():  # forgetting the past would be seen
            assert chisquare(count.numpy(), (plain * draws).numpy()).pvalue < 1e-6


@pytest.mark.parametrize(
    ("operator", "process"),
    [
        (S.ReMDM(), UNIFORM), (S.MaximalCoupling(), dd.Hybrid(3, dd.Linear(), p_uniform=0.3)), (S.Unmask(), UNIFORM),
        (S.DFM(), dd.Hybrid(3, dd.Linear(), p_uniform=0.3)), (S.Ancestral() >> S.Remask(), UNIFORM),
        (S.FirstHitting(), UNIFORM), (S.Thinning(), dd.Ordinal(3, dd.Linear())),
        (S.Adaptive(), dd.Ordinal(3, dd.Linear())),
    ],
    ids=repr,
)  # fmt: skip
def test_an_operator_says_where_it_has_no_meaning(operator: dd.Operator, process: dd.Process) -> None:
    model = weak().denoiser(process, predicts="loo")
    with pytest.raises(ValueError, match=r"needs a .* got "):
        dd.Sampler(process, model, operator, steps=4)
    if operator.enumerable:
        with pytest.raises(ValueError, match=r"needs a .* got "):
            T.kernel(operator, process, model, t=0.5, s=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.TauLeaping("first"), "several must be"), (lambda: S.ThetaTrapezoidal(1.0), "theta must lie"),
        (lambda: S.ThetaRK2(0.0), "theta must lie"), (lambda: S.ReMDM(0.1, "loop"), "rule must be"),
        (lambda: S.ReMDM(1.5), "eta must lie"), (lambda: S.DFM(-1.0), "eta must lie"),
        (lambda: S.Remask(2.0), "sigma must lie"), (lambda: S.Remask(0.1, 0), "sites must be"),
        (lambda: S.Unmask("best"), "select must be one of"), (lambda: S.Unmask(noise=-1.0), "noise must lie"),
        (lambda: S.AnyOrder(block=0), "block must be"), (lambda: S.Threshold(2.0), "threshold must lie"),
        (lambda: S.EntropyBounded(-1.0), "gamma must lie"), (lambda: S.KLStable(kl=-1.0), "kl must lie"),
        (lambda: S.P2(-1.0), "eta must lie"), (lambda: S.Uniformization(0.0), "bound must lie"),
        (lambda: S.Adaptive(0.0), "tolerance must lie"),
    ],
)  # fmt: skip
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("family", [dd.Masked, dd.Uniform])
def test_every_position_may_have_a_clock_of_its_own(family: type[dd.Masked] | type[dd.Uniform]) -> None:
    """The laws of predictors that allow it converge to p0 on such a schedule too."""
    process, world = family(3, dd.PerSite(dd.Linear(), torch.tensor([0.0, 0.7, -0.4]))), strong()
    model = world.denoiser(process, predicts="loo")
    for operator in (S.Euler(), S.TauLeaping(), S.MaximalCoupling(), S.DFM(1.0), S.ThetaTrapezoidal(), S.SplitLeap()):
        coarse, fine = (T.tv(T.law(dd.Sampler(process, model, operator, steps=n)), world.p0) for n in (4, 12))
        assert fine < coarse / 1.5, operator
