"""Likelihood bounds: equal to -log p0 pointwise for exact predictions, to each other, and to their own estimates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger import caught, within
from problems import families, mislabelled, pairs, strong
from scipy import stats
from strategies import any_process, worlds

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.losses import base as losses


def correlated(vocab_size: int = 3, length: int = 2) -> T.Enumeration:
    """A correlated law of full support."""
    weights = torch.arange(1.0, vocab_size**length + 1).double() ** 2 % 7 + 0.3
    return T.Enumeration(weights / weights.sum(), vocab_size=vocab_size, length=length)


CONTINUOUS: list[losses.Objective] = [
    losses.ScoreEntropy(),
    losses.PathKL(),
    losses.MaskedNELBO(),
    losses.UniformNELBO(),
    losses.AbsorbingNELBO(),
]
# every family with alpha(1) = 0, so that the prior costs nothing
EXACT = [*[(p, 3) for p in families(3)[:-1]], *[(p, 2) for p in pairs(2)]]


def applies(objective: losses.Objective, process: dd.Process) -> bool:
    try:
        objective.check(process)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("process", "size"), EXACT, ids=str)
def test_24_bounds_are_tight_pointwise_and_agree_at_every_time(process: dd.Process, size: int) -> None:
    """The three views of one process: rates (path KL), score (score entropy) and closed forms of a flow of tokens."""
    world = correlated(size)
    model, truth = world.denoiser(process, predicts="loo"), -world.p0.log()
    used = [objective for objective in CONTINUOUS if applies(objective, process)]
    assert len(used) >= 2
    for objective in used:
        within(24, float((T.bound(objective, model) - truth).abs().max()), 1e-6)
    for a in (0.03, 0.4, 0.9):
        values = [T.likelihood.integrand(objective, model, a) for objective in used]
        for value in values[1:]:
            assert float(((value - values[0]) / (1 + values[0])).abs().max()) < 1e-12


@pytest.mark.parametrize(("process", "size"), EXACT, ids=str)
def test_24_whatever_the_model_predicts(process: dd.Process, size: int) -> None:
    """A denoiser, a leave-one-out and a ratio give the same integrands, revealed sites included."""
    world = correlated(size)
    for objective in (o for o in CONTINUOUS if applies(o, process)):
        values = [
            T.likelihood.integrand(objective, world.denoiser(process, predicts=p), 0.4)
            for p in ("loo", "denoiser", "ratio")
            for p in ("loo", "denoiser", "ratio")
        ]
        for value in values[1:]:
            assert float(((value - values[0]) / (1 + values[0])).abs().max()) < 1e-10
    bounds = [T.bound(losses.DiscreteBound(3), world.denoiser(process, predicts=p)) for p in ("loo", "denoiser")]
    torch.testing.assert_close(*bounds, atol=1e-10, rtol=0)


@given(worlds(), any_process(schedule=dd.Linear()), st.sampled_from([0.05, 0.3, 0.8]))
def test_24_integrands_agree_on_random_worlds(world: T.Enumeration, process: dd.Process, a: float) -> None:
    model = world.denoiser(process, predicts="loo")
    possible = world.p0 > 0
    values = [T.likelihood.integrand(o, model, a)[possible] for o in CONTINUOUS if applies(o, process)]
    for value in values[1:]:
        assert float(((value - values[0]) / (1 + values[0])).abs().max()) < 1e-12


@pytest.mark.parametrize("process", families(3)[:4], ids=str)
def test_24_wrong_objects_are_caught(process: dd.Process) -> None:
    """A denoiser in the LOO's place is a loose bound; a wrong law is one by its KL at least."""
    world, nll = correlated(), -correlated().p0.log()
    if not process.absorbing:
        loose = T.bound(losses.ScoreEntropy(), mislabelled(world, process))
        caught(24, float((world.p0 * (loose - nll)).sum()), 0.05)
    other = T.Enumeration(world.p0.flip(0), vocab_size=3, length=2)
    wrong = T.bound(losses.ScoreEntropy(), other.denoiser(process, predicts="loo"))
    assert float((world.p0 * (wrong - nll)).sum()) > T.kl(world.p0, other.p0) - 1e-6


def test_any_order_is_exact() -> None:
    for process in (dd.Masked(3, dd.Linear()), dd.Masked(4, dd.Cosine(), mask_id=1)):
        world = strong()
        value = T.bound(losses.AnyOrder(), world.denoiser(process))
        torch.testing.assert_close(value, -world.p0.log(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("process", "size"), EXACT, ids=str)
def test_discrete_bounds_fall_to_the_entropy_at_rate_one(process: dd.Process, size: int) -> None:
    world = correlated(size)
    model, h = world.denoiser(process, predicts="loo"), T.entropy(world.p0)
    gaps = [float((world.p0 * T.bound(losses.DiscreteBound(n), model)).sum()) - h for n in (1, 4, 16, 32)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] > 0
    assert math.log2(gaps[2] / gaps[3]) == pytest.approx(1, abs=0.2)
    total_correlation = sum(T.entropy(world.p0.view(size, size).sum(i)) for i in (0, 1)) - h
    assert gaps[0] == pytest.approx(total_correlation, abs=1e-10), "one step knows only the marginals"


ODE = [
    pytest.param(*e, marks=() if isinstance(e[0], dd.Masked | dd.Uniform | dd.Hybrid) else pytest.mark.slow)
    for e in EXACT if not isinstance(e[0], dd.General)
]  # fmt: skip


@pytest.mark.parametrize(("process", "size"), ODE, ids=str)
def test_the_reverse_ode_has_the_data_law(process: dd.Process, size: int) -> None:
    world = correlated(size)
    law = T.reverse_law(world.denoiser(process, predicts="loo"))
    torch.testing.assert_close(law, world.p0, atol=1e-8, rtol=0)
    assert T.kl(world.p0, T.reverse_law(correlated(size).denoiser(process))) < 1e-7, "from the denoiser too"


def test_the_reverse_ode_of_a_wrong_model_is_its_own_law() -> None:
    """On a masked process the model of another law samples that law; the bound exceeds its exact -log likelihood."""
    process, world = dd.Masked(3, dd.Linear()), correlated()
    other = T.Enumeration(world.p0.flip(0), vocab_size=3, length=2)
    law = T.reverse_law(other.denoiser(process))
    torch.testing.assert_close(law, other.p0, atol=1e-8, rtol=0)
    uniform = dd.Uniform(3, dd.Linear())
    wrong = mislabelled(world, uniform)
    exact = -T.reverse_law(wrong).log()
    assert float((T.bound(losses.ScoreEntropy(), wrong) - exact).min()) > -1e-6
    assert float((exact - -world.p0.log()).abs().max()) > 0.05


# --- estimates and training ------------------------------------------------------------------------------------------

DRAWN = [
    (losses.MaskedNELBO(), families(3)[0]),
    (losses.AnyOrder(), families(3)[0]),
    (losses.UniformNELBO(), families(3)[1]),
    (losses.ScoreEntropy(), families(3)[3]),
    (losses.PathKL(), families(3)[2]),
    (losses.DiscreteBound(4), families(3)[2]),
    (losses.AbsorbingNELBO(), dd.AbsorbingUniform(3, dd.Cosine())),
]


@pytest.mark.parametrize(("objective", "process"), DRAWN, ids=str)
def test_estimates_have_the_right_mean_and_error_bar(
    objective: losses.Objective, process: dd.Process, failure_rate: float
) -> None:
    world = correlated()
    model = world.denoiser(process, predicts="loo")
    x0 = process.data_tokens[torch.tensor([[0, 1], [2, 2]])].repeat(64, 1)
    out = objective.estimate(model, x0, draws=32, seed=0)
    exact = T.bound(objective, model)[torch.tensor([1, 8])].repeat(64)
    z = (out.value - exact).view(64, 2).mean(0) / (out.error.view(64, 2).square().mean(0) / 64).sqrt()
    assert 2 * stats.norm.sf(float(z.abs().max())) > failure_rate
    biased = (out.value - 1.15 * exact).view(64, 2).mean(0) / (out.error.view(64, 2).square().mean(0) / 64).sqrt()
    assert 2 * stats.norm.sf(float(biased.abs().max())) < failure_rate, "15 % too little would be seen"
    again = objective.estimate(model, x0, draws=32, seed=0)
    assert torch.equal(out.value, again.value)


@pytest.mark.parametrize(("objective", "process"), DRAWN, ids=str)
def test_gradients_flow_and_are_finite(objective: losses.Objective, process: dd.Process) -> None:
    torch.manual_seed(0)
    table = torch.randn(process.states, 3, dtype=torch.float64, requires_grad=True)
    model = dd.Denoiser(lambda x, _: table[x.flip(1)], process, predicts="loo", time=None)
    x0 = torch.randint(3, (64, 2))
    objective(model, x0).mean().backward()
    assert table.grad is not None
    assert bool(torch.isfinite(table.grad).all())
    assert float(table.grad.abs().max()) > 0


@settings(max_examples=3)
@given(st.sampled_from([losses.MaskedNELBO(), losses.UniformNELBO(), losses.ScoreEntropy()]))
def test_training_finds_the_leave_one_out(objective: losses.Objective) -> None:
    """A table trained by the exact bound ends at the LOO, not at the denoiser, with the entropy as its loss."""
    masked = isinstance(objective, losses.MaskedNELBO)
    process: dd.Process = dd.Masked(2, dd.Linear()) if masked else dd.Uniform(2, dd.Linear())
    world = correlated(2)
    a = 0.4
    logits = torch.zeros(process.states, 2, 2, dtype=torch.float64, requires_grad=True)  # (the other's state, site, v)

    def fn(x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        return logits[x.flip(1), torch.arange(2)]

    model = dd.Denoiser(fn, process, predicts="loo", time=None)
    z = T.world.all_states(process.states, 2)
    x0 = T.world.all_states(2, 2)
    weights = torch.stack([process.noised(x0, a).log_prob(row.expand(4, 2)).exp() for row in z], -1) * world.p0[:, None]

    def loss() -> torch.Tensor:
        value = objective.density(model(z.repeat(4, 1), 1 - a), x0.repeat_interleave(len(z), 0)).sum(-1)
        return (weights * value.view(weights.shape)).sum()

    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    exact = world.denoiser(process, predicts="loo")(z, 1 - a)
    where = z == 2 if masked else torch.ones_like(z, dtype=torch.bool)
    found = model(z, 1 - a)[where].loo.dense().softmax(-1).detach()
    torch.testing.assert_close(found, exact[where].loo.dense().softmax(-1), atol=1e-5, rtol=0)
    if not masked:
        assert float((found - exact.denoiser[where].exp()).abs().max()) > 0.05


def test_a_clock_for_each_site_gives_the_same_bound_and_learns(failure_rate: float) -> None:
    log_power = torch.tensor([0.4, -0.3], requires_grad=True)
    process = dd.Masked(3, dd.PerSite(dd.Linear(), log_power))
    world = correlated()
    model = world.denoiser(process)
    x0 = torch.tensor([[0, 1]]).repeat(128, 1)
    out = losses.MaskedNELBO().estimate(model, x0, draws=32, seed=1)
    z = (out.value.mean() + world.p0[1].log()) / (out.error.square().mean() / 128).sqrt()
    assert 2 * stats.norm.sf(abs(float(z))) > failure_rate
    losses.MaskedNELBO()(model, x0).mean().backward()
    assert log_power.grad is not None
    assert float(log_power.grad.abs().max()) > 0


def test_the_prior_counts() -> None:
    x0 = torch.tensor([[0, 1]])
    assert losses.prior_kl(dd.Uniform(3, dd.Linear()), x0).tolist() == [0]
    process = dd.Uniform(3, dd.LogLinear(0.1))
    p, q = process.marginals(1.0)[0], torch.full((3,), 1 / 3, dtype=torch.float64)
    assert float(losses.prior_kl(process, x0)) == pytest.approx(2 * T.kl(p, q), abs=1e-14)
    masked = dd.Masked(3, dd.LogLinear())
    with pytest.raises(ValueError, match=r"alpha\(1\) = 0, or leave it out"):
        losses.MaskedNELBO().estimate(correlated().denoiser(masked), x0, draws=2, seed=0)
    assert losses.MaskedNELBO().estimate(correlated().denoiser(masked), x0, draws=2, seed=0, prior=False).draws == 2


@pytest.mark.parametrize(
    ("objective", "process"),
    [
        (losses.MaskedNELBO(), dd.Uniform(3, dd.Linear())),
        (losses.UniformNELBO(), dd.Masked(3, dd.Linear())),
        (losses.AbsorbingNELBO(), dd.Uniform(3, dd.Linear())),
        (losses.AnyOrder(), dd.Uniform(3, dd.Linear())),
    ],
    ids=str,
)
def test_bounds_say_where_they_apply(objective: losses.Objective, process: dd.Process) -> None:
    with pytest.raises(ValueError, match=r"applies to .*got Uniform|applies to .*got Masked"):
        objective(correlated().denoiser(process), torch.zeros(1, 2, dtype=torch.int64))


def test_a_discrete_bound_holds_in_the_mean_and_not_pointwise() -> None:
    """E[bound] >= H(p0), by the steps' loss, while single sequences lie below -log p0; the integrals are pointwise."""
    world = strong()
    process = dd.Masked(3, dd.Linear())
    model, exact = world.denoiser(process, predicts="loo"), -world.p0.log()
    for steps in (2, 4):
        excess = T.bound(losses.DiscreteBound(steps), model) - exact
        assert float(world.p0 @ excess) > 1e-3
        assert float(excess.min()) < -1e-2  # the claim of a pointwise bound would be false
    assert float((T.bound(losses.MaskedNELBO(), model) - exact).abs().max()) < 1e-6


def test_hiding_at_another_rate_is_refused() -> None:
    """A process that hides tokens with probability 1 - alpha^2 has a mask, but neither these bounds nor its counts."""

    class Faster(dd.General):
        absorbing = True

    rates = torch.zeros(4, 4, dtype=torch.float64)
    rates[:3, :3], rates[:3, 3] = -2 * torch.eye(3), 2.0
    process = Faster(rates, dd.Linear(), mask_id=3)
    assert process.masks
    assert float(process.kernel(0.5)[0, 3]) == pytest.approx(0.75)
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, process.vocab_size), process, "denoiser")
    x0 = torch.zeros(2, 3, dtype=torch.int64)
    for refused in (
        lambda: losses.MaskedNELBO()(model, x0),
        lambda: losses.AnyOrder()(model, x0),
        lambda: dd.Sampler(process, model, S.Unmask(), steps=2),
    ):
        with pytest.raises(ValueError, match="Masked"):
            refused()
