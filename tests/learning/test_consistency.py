"""Consistency over paths: the tower rule, fixed points of the divergences, the anchor, draws against enumeration."""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from learners import Pairs, ends_alike_if_killed
from problems import families, joint, states, two_sites
from scipy import stats
from strategies import any_process, worlds
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.learning import Consistency, Trainer, bridge_paths
from discdiff.learning.consistency import DIVERGENCES
from discdiff.learning.run import told
from discdiff.theory.consistency import exact_reverse

UNIFORM, MASKED = dd.Uniform(3, dd.Linear()), dd.Masked(3, dd.Linear())
CHAINS = [(0.7, 0.3), (0.9, 0.8, 0.5, 0.05), (1.0, 0.6, 0.2, 0.0), (0.4, 0.4)]


# --- the tower rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", families(), ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("times", CHAINS, ids=str)
def test_the_exact_denoiser_is_the_mean_of_itself_over_any_chain_of_times(
    process: dd.Process, times: tuple[float, ...]
) -> None:
    world = two_sites(2)
    assert float(T.path_residual(world, world.denoiser(process), times).abs().max()) < 1e-12
    if times[0] < 1 and times[-1] > 0 and len(set(times)) > 1:  # the planted fault: another law's denoiser
        assert float(T.path_residual(world, two_sites(3).denoiser(process), times).abs().max()) > 1e-3


@given(worlds(), any_process())
def test_the_tower_rule_in_any_world(world: T.Enumeration, process: dd.Process) -> None:
    assert float(T.path_residual(world, world.denoiser(process), (0.8, 0.55, 0.3)).abs().max()) < 1e-12


def test_the_leave_one_out_has_a_residual_on_uniform_noise() -> None:
    world = two_sites(2)
    for predicts in ("denoiser", "loo"):  # whatever the network says, the loss reads its denoiser
        assert float(T.path_residual(world, world.denoiser(UNIFORM, predicts), (0.7, 0.3)).abs().max()) < 1e-12
    assert float(T.path_residual(world, world.denoiser(UNIFORM), (0.7, 0.3), loo=True).abs().max()) > 0.02


def bridged(world: T.Enumeration, process: dd.Process, f: Tensor, times: tuple[float, ...]) -> Tensor:
    """E[f(x_s) | x_t] by the library's bridges, from x0 ~ p(x0 | x_t) along a chain of times; f is (S**2, n)."""
    z, x = states(process.states, 2), process.data_tokens[states(3, 2)]
    both = joint(world, process, [times[0]] * 2)
    posterior = (both / both.sum(0)).nan_to_num()
    total = torch.zeros(len(z), f.shape[1], dtype=torch.float64)
    for k, x0 in enumerate(x):
        met = (posterior[k] > 0).nonzero()[:, 0]
        value = f
        for late, early in reversed(list(itertools.pairwise(times))):
            from_x0 = (process.marginals(late)[x0[0], z[:, 0]] * process.marginals(late)[x0[1], z[:, 1]]) > 0
            rows = from_x0.nonzero()[:, 0]
            law = process.bridge(z[rows], x0.expand(len(rows), 2), late, early)
            move = torch.stack([law.log_prob(z_s.expand(len(rows), 2)).exp() for z_s in z], -1)
            value = torch.zeros_like(f).index_copy(0, rows, move @ value)
        total[met] += posterior[k, met, None] * value[met]
    return total


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=["uniform", "masked"])
def test_a_chain_of_bridges_has_the_law_of_the_reverse_process(process: dd.Process) -> None:
    world, model = two_sites(2), two_sites(2).denoiser(process)
    f = torch.rand(process.states**2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direct = exact_reverse(world, model.process, 0.8, 0.3) @ f
    for times in ((0.8, 0.3), (0.8, 0.6, 0.3), (0.8, 0.7, 0.5, 0.3)):
        assert float((bridged(world, process, f, times) - direct).abs().max()) < 1e-12


# --- fixed points -----------------------------------------------------------------------------------------------------


def fixed_point(process: dd.Process, divergence: str, t: float, s: float) -> Tensor:
    """Total variation (reached states, 2) between argmin_f E div(D_s(x_s) || f) and D_t, for the exact D_s."""
    world = two_sites(2)
    model, z = world.denoiser(process), states(process.states, 2)
    met, sooner = world.reachable(process, t), world.reachable(process, s)
    weights = exact_reverse(world, model.process, t, s)[met][:, sooner]
    target = model(z[sooner], s).denoiser.double()  # (M, 2, 3)
    exact = model(z[met], t).denoiser.double()
    logits = exact.clamp(min=-40).clone().requires_grad_()
    search = torch.optim.LBFGS([logits], lr=1, max_iter=3000, tolerance_grad=1e-13, tolerance_change=1e-18,
                               history_size=60, line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        log_f = logits.log_softmax(-1)[:, None].expand(-1, len(target), -1, -1)
        value = (weights[..., None] * DIVERGENCES[divergence](target.expand_as(log_f), log_f)).sum()
        search.zero_grad()
        value.backward()
        return value

    for _ in range(4):
        search.step(loss)
    found = logits.detach().log_softmax(-1).exp()
    return (found - exact.exp()).abs().sum(-1) / 2


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=["uniform", "masked"])
@pytest.mark.parametrize("alpha_s", [0.9, 0.6, 0.305])
def test_the_fixed_point_of_forward_kl_is_the_denoiser(process: dd.Process, alpha_s: float) -> None:
    hidden = fixed_point(process, "forward_kl", 0.7, 1 - alpha_s)
    assert float(hidden.max()) < 1e-8


def test_the_mean_of_the_targets_is_the_minimum_of_forward_kl_exactly() -> None:
    """KL(p || f) averaged over p has the gradient f - E[p] in the logits of f: 0 at f = E[D_s] = D_t."""
    for process in (UNIFORM, MASKED):
        world, model, z = two_sites(2), two_sites(2).denoiser(process), states(process.states, 2)
        for t, s in ((0.7, 0.1), (0.7, 0.4), (0.95, 0.3)):
            met, sooner = world.reachable(process, t), world.reachable(process, s)
            weights = exact_reverse(world, model.process, t, s)[met][:, sooner]
            target, exact = model(z[sooner], s).denoiser.double(), model(z[met], t).denoiser.double()
            logits = exact.clone().requires_grad_()
            log_f = logits.log_softmax(-1)[:, None].expand(-1, len(target), -1, -1)
            (weights[..., None] * DIVERGENCES["forward_kl"](target.expand_as(log_f), log_f)).sum().backward()
            assert logits.grad is not None
            assert float(logits.grad.nan_to_num().abs().max()) < 1e-8


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
def test_the_other_divergences_are_biased_and_less_so_for_smaller_steps(divergence: str) -> None:
    bias = [float(fixed_point(UNIFORM, divergence, 0.7, 1 - alpha).max()) for alpha in (0.9, 0.6, 0.4, 0.305)]
    print(divergence, [f"{value:.2g}" for value in bias])
    assert bias[0] > 0.05
    assert bias == sorted(bias, reverse=True)
    assert bias[-1] < 0.01 * bias[0]


def accumulated(process: dd.Process, divergence: str, anchor: float, size: float) -> float:
    """TV from D at t = .7 of the fixed point of a whole training, found step by step from s = 0; worst state."""
    world, z = two_sites(2), states(process.states, 2)
    model, count = world.denoiser(process), round(0.7 / size)

    def exact(t: float) -> tuple[Tensor, Tensor]:
        met = world.reachable(process, t)
        return met, model(z[met], t).denoiser.double().exp()

    met, f = exact(size)  # the first step is anchored
    for n in range(2, count + 1):
        sooner, (met, d) = met, exact(n * size)
        weights = exact_reverse(world, model.process, n * size, (n - 1) * size)[met][:, sooner]
        logits = d.clamp(min=1e-9).log().requires_grad_()
        search = torch.optim.LBFGS([logits], max_iter=150, tolerance_grad=1e-11, tolerance_change=1e-15,
                                   history_size=30, line_search_fn="strong_wolfe")  # fmt: skip

        def loss(weights: Tensor = weights, f: Tensor = f, d: Tensor = d, logits: Tensor = logits) -> Tensor:
            log_f = logits.log_softmax(-1)
            each = DIVERGENCES[divergence](
                f.log().expand(len(log_f), -1, -1, -1), log_f[:, None].expand(-1, len(f), -1, -1)
            )
            value = (1 - anchor) * (weights[..., None] * each).sum() - anchor * (d * log_f).sum()
            logits.grad = None
            value.backward()
            return value

        search.step(loss)
        f = logits.detach().softmax(-1)
    return float((f - exact(count * size)[1]).abs().sum(-1).max() / 2)


def test_the_biases_of_small_steps_add_up_unless_there_is_an_anchor() -> None:
    """Forward KL has none; JSD without an anchor gets worse with smaller steps, and better with one."""
    assert accumulated(UNIFORM, "forward_kl", 0.0, 0.1) < 1e-6
    free = [accumulated(UNIFORM, "jsd", 0.0, size) for size in (0.35, 0.1, 0.05)]
    held = [accumulated(UNIFORM, "jsd", 0.25, size) for size in (0.35, 0.1, 0.05)]
    print(
        "jsd, steps of .35, .1, .05:", [f"{value:.3f}" for value in free], "with an anchor", [f"{v:.3f}" for v in held]
    )
    assert free == sorted(free)
    assert free[-1] > 0.1
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.01


def test_the_divergences_are_those_of_scipy() -> None:
    p, q = (torch.rand(5, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (0, 1))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    m = (p + q) / 2
    expected = {
        "forward_kl": stats.entropy(p, q, axis=-1), "reverse_kl": stats.entropy(q, p, axis=-1),
        "jsd": (stats.entropy(p, m, axis=-1) + stats.entropy(q, m, axis=-1)) / 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert torch.allclose(DIVERGENCES[name](p.log(), q.log()), torch.as_tensor(value), atol=1e-12)
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()  # certain targets, as at revealed sites
    for name, value in (("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.0)):
        assert float(DIVERGENCES[name](one, one).abs().max()) == value
    assert float(DIVERGENCES["jsd"](one, one.flip(0))[0]) == pytest.approx(math.log(2))
    for name in ("reverse_kl", "jsd"):  # q has a 0, as where the mask is a token
        log_q = torch.tensor([[0.3, -0.2, -torch.inf]], requires_grad=True)
        DIVERGENCES[name](torch.tensor([[0.5, 0.5, 0.0]]).log(), log_q.log_softmax(-1)).sum().backward()
        assert bool(torch.isfinite(log_q.grad).all())  # type: ignore[arg-type]
    for name in expected:  # gradients are finite where probabilities are 0
        log_q = torch.tensor([[0.3, -0.2]]).log_softmax(-1).requires_grad_()
        DIVERGENCES[name](one[:1], log_q).sum().backward()
        assert bool(torch.isfinite(log_q.grad).all())  # type: ignore[arg-type]


# --- the anchor -------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.0, 0.3, -1.0]], dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        return self.logits.expand(len(x), 2, 3)


def test_a_constant_prediction_has_no_residual_and_the_anchor_cures_it() -> None:
    world, table = two_sites(2), Table()
    model = dd.Denoiser(table, UNIFORM, "denoiser", time=None, length=2)
    assert float(T.path_residual(world, model, (0.9, 0.5, 0.1)).abs().max()) < 1e-12
    assert float(T.path_residual(world, model, (0.9, 0.0)).abs().max()) > 0.1  # at s = 0 it is not constant
    x0 = world.draw(torch.ones(64, 2, 3, dtype=torch.float64), seed=0)
    t, s = torch.full((64,), 0.8).double(), torch.full((64,), 0.2).double()
    for divergence in DIVERGENCES:
        loss, x_t = Consistency(UNIFORM, divergence), UNIFORM.marginal(x0, 0.8).sample()  # type: ignore[arg-type]
        value = loss.residual(model.evaluate(x_t, t[:, None]).denoiser, x_t, x0, t, s, target=model)
        (gradient,) = torch.autograd.grad(value.sum(), table.logits)
        assert float(value.detach().abs().max()) < 1e-12
        assert float(gradient.abs().max()) < 1e-10
    # the anchored part alone trains it to the law of the data at each site
    torch.manual_seed(0)
    trainer = Trainer(table, UNIFORM, Consistency(UNIFORM, step=(0.01, 0.01), anchor=0.5), world_rows(), time=None,
                      batch=256, rate=0.05, ema=0.9, progress=False)  # fmt: skip
    trainer.fit(200)
    law = world.p0.view(3, 3)
    sites = torch.stack([law.sum(1), law.sum(0)])
    assert float((table.logits.detach().softmax(-1) - sites).abs().max()) < 0.03
    lazy = Consistency(UNIFORM, step=(1e-9, 1e-9), anchor=0.0)  # no row is anchored: nothing is learned
    before = table.logits.detach().clone()
    Trainer(table, UNIFORM, lazy, world_rows(), time=None, rate=0.05, progress=False).fit(20)
    assert torch.allclose(table.logits.detach(), before, atol=2e-2)  # what AdamW's weight decay takes


@functools.cache
def world_rows() -> Tensor:
    return two_sites(2).draw(torch.ones(20000, 2, 3, dtype=torch.float64), seed=3)


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=["uniform", "masked"])
@pytest.mark.parametrize("chained", [False, True])
def test_every_state_of_a_path_has_the_law_of_the_bridge(process: dd.Process, chained: bool) -> None:
    count, hide = 40_000, 3 if process is MASKED else 2
    x0, x_t = torch.tensor([[0, 1]]).expand(count, 2), torch.tensor([[hide, 1]]).expand(count, 2)
    paths = bridge_paths(process, x_t, x0, 0.8, [0.6, 0.5, 0.2], paths=2, chained=chained, seed=20)
    assert paths.shape == (2, 3, count, 2)
    for path in range(2):
        for place, s in enumerate((0.6, 0.5, 0.2)):
            expected = process.bridge(x_t[:1], x0[:1], 0.8, s)
            z = states(process.states, 2)
            law = torch.stack([expected.log_prob(one[None]).exp()[0] for one in z])
            seen = torch.stack([(paths[path, place] == one).all(-1).sum() for one in z]).double()
            assert chi_square(seen, law) > 1e-7
            wrong = process.bridge(x_t[:1], x0[:1], 0.8, s + 0.03)
            assert chi_square(seen, torch.stack([wrong.log_prob(one[None]).exp()[0] for one in z])) < 1e-7


def chi_square(seen: Tensor, law: Tensor) -> float:
    assert float(seen[law == 0].sum()) == 0
    kept = law > 1e-12
    return float(stats.chisquare(seen[kept], law[kept] * seen.sum()).pvalue)


def test_a_chain_that_used_the_same_numbers_again_would_have_another_law() -> None:
    """The planted fault: at a site still hidden at m, the number that kept it hidden says that it is large."""
    count = 20_000
    x0, x_t = torch.zeros(count, 1, dtype=torch.int64), torch.full((count, 1), 3)
    good = bridge_paths(MASKED, x_t, x0, 0.8, [0.5, 0.2], chained=True, seed=1)[0, 1]
    middle = bridge_paths(MASKED, x_t, x0, 0.8, [0.5], seed=1)[0, 0]
    bad = bridge_paths(MASKED, middle, x0, 0.5, [0.2], seed=1)[0, 0]  # the numbers of the first step once more
    hidden = float(torch.exp(MASKED.bridge(x_t[:1], x0[:1], 0.8, 0.2).log_prob(x_t[:1])))
    for states_s, right in ((good, True), (bad, False)):
        p = stats.binomtest(int((states_s == 3).sum()), count, hidden).pvalue
        assert bool(p > 1e-7) is right


def test_parallel_paths_share_their_numbers_over_times_and_rows_do_not_depend_on_the_batch() -> None:
    x0, x_t = torch.randint(3, (50, 4), generator=torch.Generator().manual_seed(0)), torch.full((50, 4), 3)
    late, early = bridge_paths(MASKED, x_t, x0, 0.9, [0.6, 0.2], seed=4)[0]
    assert bool(((late == 3) | (early == late)).all())  # what is revealed at .6 is revealed at .2
    apart = [bridge_paths(MASKED, x_t, x0, 0.9, [s], seed=seed)[0, 0] for s, seed in ((0.6, 4), (0.2, 5))]
    assert torch.equal(apart[0], late)
    assert not bool(((apart[0] == 3) | (apart[1] == apart[0])).all())
    whole = bridge_paths(UNIFORM, x0.flip(0), x0, 0.9, [0.6, 0.2], paths=3, chained=True, seed=7, first_row=10)
    for part in (slice(0, 20), slice(20, 50)):
        some = bridge_paths(UNIFORM, x0.flip(0)[part], x0[part], 0.9, [0.6, 0.2], paths=3, chained=True, seed=7,
                            first_row=10 + part.start)  # fmt: skip
        assert torch.equal(some, whole[:, :, part])
    assert not torch.equal(whole[0], whole[1])


def network(process: dd.Process, dtype: torch.dtype = torch.float32) -> dd.Denoiser:
    torch.manual_seed(5)
    fn = Pairs(process, 2, width=16).to(dtype)
    return dd.Denoiser(fn, process, "denoiser", time="alpha", scalar_time=True, length=2)


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=["uniform", "masked"])
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_the_mean_of_the_loss_is_the_enumerated_one(process: dd.Process, divergence: str) -> None:
    """At one t and s; targets from one network, predictions from another."""
    world, model, target = two_sites(2), network(process), two_sites(3).denoiser(process)
    t, s, count, z = 0.8, 0.3, 20_000, states(process.states, 2)
    with torch.no_grad():
        p_t, sooner, met = world.marginal(process, t), world.reachable(process, s), world.reachable(process, t)
        log_f, log_p = model(z[met], t).denoiser.double(), target(z[sooner], s).denoiser.double()
        move = exact_reverse(world, process, t, s)[met][:, sooner]
        shape = (len(log_f), len(log_p), 2, 3)
        each = DIVERGENCES[divergence](log_p.expand(shape), log_f[:, None].expand(shape)).sum(-1)
        exact = float((p_t[met] * torch.where(move > 0, move * each, 0.0).sum(-1)).sum())
        x0 = world_rows()[:count]
        loss = Consistency(process, divergence, paths=2)  # type: ignore[arg-type]
        x_t = process.marginal(x0, t).sample()
        one = torch.ones(count, dtype=torch.float64)
        value = loss.residual(model(x_t, t).denoiser.double(), x_t, x0, t * one, s * one, target=target, seed=3)
        p = stats.ttest_1samp(value, exact).pvalue
        assert p > 1e-6, (float(value.mean()), exact)
        early = loss.residual(model(x_t, t).denoiser.double(), x_t, x0, t * one, 0.4 * one, target=target, seed=3)
        assert stats.ttest_1samp(early, exact).pvalue < 1e-6


def test_a_teacher_that_is_exact_draws_paths_of_the_reverse_process() -> None:
    """One site has no factorisation error, so one ancestral step of an exact teacher has the exact law."""
    p0 = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    world = T.Enumeration(p0, vocab_size=3, length=1)
    for process in (UNIFORM, MASKED):
        model = world.denoiser(process)
        x_t = torch.full((20_000, 1), 3 if process is MASKED else 1)
        one = torch.ones(len(x_t), dtype=torch.float64)
        for steps in (1, 3):
            loss = Consistency(process, teacher=model, teacher_steps=steps)
            (x_s,) = loss._taught(x_t, 0.8 * one, [0.3 * one], 11, 0)
            law = exact_reverse(world, model.process, 0.8, 0.3)[int(x_t[0])]
            seen = torch.bincount(x_s[:, 0], minlength=process.states).double()
            assert chi_square(seen, law) > 1e-7
            assert chi_square(seen, exact_reverse(world, model.process, 0.8, 0.4)[int(x_t[0])]) < 1e-7


@pytest.mark.parametrize("taught", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=["uniform", "masked"])
def test_a_network_that_is_trained_by_forward_kl_finds_the_denoiser(process: dd.Process, taught: bool) -> None:
    """From data alone, or from the paths of a teacher. A random network is far from it."""
    world = two_sites(2)
    exact, z = world.denoiser(process), states(process.states, 2)

    def error(model: dd.Denoiser) -> float:
        gaps = []
        for t in (0.9, 0.6, 0.3):
            met = world.reachable(process, t)
            gaps.append((model(z[met], t).denoiser.exp() - exact(z[met], t).denoiser.exp()).abs().amax(-1).mean())
        return float(torch.stack(gaps).mean())

    loss = Consistency(process, paths=1, teacher=exact, teacher_steps=2) if taught else Consistency(process, paths=2)
    torch.manual_seed(5)
    trainer = Trainer(Pairs(process, 2, width=32), process, loss, world_rows(), time="alpha", batch=128, rate=0.01,
                      ema=0.98, progress=False)  # fmt: skip
    before = error(trainer.model)
    assert error(trainer.fit(250)) < 0.25 * before
    assert error(trainer.model) < 0.06


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_step_falls_and_the_targets_are_the_averaged_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, bool]] = []
    plain = Consistency.at

    def at(self: Consistency, model: dd.Denoiser, target: dd.Denoiser, x0: Tensor, step: float) -> Tensor:
        seen.append((step, target is trainer.model))
        return plain(self, model, target, x0, step)

    monkeypatch.setattr(Consistency, "at", at)
    trainer = Trainer(Pairs(MASKED, 2, width=8), MASKED, Consistency(MASKED, step=(0.5, 0.1), paths=1), world_rows(),
                      time="alpha", progress=False)  # fmt: skip
    trainer.fit(4)
    assert [step for step, _ in seen] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert all(averaged for _, averaged in seen)


def training(folder: Path | None) -> Trainer:
    torch.manual_seed(5)
    loss = Consistency(MASKED, "jsd", paths=2, times=2, chained=True)
    return Trainer(Pairs(MASKED, 2, width=8), MASKED, loss, world_rows()[:64], time="alpha", batch=8, every=3,
                   progress=False, folder=folder)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("place", [2, 7, 11])
def test_a_killed_training_resumes_to_the_same_weights(place: int, tmp_path: Path) -> None:
    ends_alike_if_killed(training, Consistency, "residual", place, tmp_path)
    torch.manual_seed(5)
    other_loss = Trainer(Pairs(MASKED, 2, width=8), MASKED, Consistency(MASKED, "jsd", paths=1), world_rows()[:64],
                         time="alpha", batch=8, every=3, progress=False, folder=tmp_path)  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(ValueError, match="another run: loss"):
        other_loss.fit(12)
    one, two = Consistency(MASKED, teacher=network(MASKED)), Consistency(MASKED, teacher=two_sites(2).denoiser(MASKED))
    three = Consistency(MASKED, teacher=network(MASKED))
    assert told(one) == told(three)  # the same weights
    next(three.teacher.fn.parameters()).data.add_(1e-3)  # type: ignore[union-attr]
    assert len({told(one), told(two), told(three)}) == 3


def test_few_steps_of_the_trained_network_are_ancestral_steps() -> None:
    """x0 from f_t, then x_s from the bridge: that mixture is the law of ``Ancestral`` at each site."""
    world = two_sites(2)
    for process in (UNIFORM, MASKED):
        model, z = world.denoiser(process), states(process.states, 2)
        t, s = 0.8, 0.3
        met = world.reachable(process, t)
        d = model(z[met], t).denoiser.double().exp()
        law = torch.zeros(int(met.sum()), process.states**2, dtype=torch.float64)
        for x0 in process.data_tokens[states(3, 2)]:
            weight = d[:, 0, x0[0]] * d[:, 1, x0[1]]
            rows = (weight > 0).nonzero()[:, 0]
            bridge = process.bridge(z[met][rows], x0.expand(len(rows), 2), t, s)
            move = torch.stack([bridge.log_prob(one.expand(len(rows), 2)).exp() for one in z], -1)
            law[rows] += weight[rows, None] * move
        assert float((T.kernel(S.Ancestral(), process, model, t=t, s=s)[met] - law).abs().max()) < 1e-12


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
def test_bad_arguments_are_refused() -> None:
    for options, message in (
        ({"divergence": "kl"}, "divergence must be one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'"),
        ({"paths": 0}, "paths must be at least 1"),
        ({"step": (0.5,)}, "step takes the first and the last step size"),
        ({"step": (0.5, 0.0)}, r"a step size must lie in \(0, 1\]"),
        ({"anchor": 0.0, "divergence": "jsd"}, "'jsd' needs an anchor above 0"),
        ({"teacher_steps": 2}, "teacher_steps= needs a teacher"),
        ({"chained": True}, "chained=True needs times= above 1"),
        ({"anchor": 1.5}, r"anchor must lie in \[0, 1\]"),
        ({"teacher": two_sites(2).denoiser(UNIFORM)}, "the teacher's process is Uniform"),
    ):
        with pytest.raises(ValueError, match=message):
            Consistency(MASKED, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Consistency"):
        Consistency("masked")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the loss is for Masked.* and the network for Uniform"):
        Trainer(Pairs(UNIFORM, 2), UNIFORM, Consistency(MASKED), world_rows())
    with pytest.raises(ValueError, match="the loss is for"):
        Consistency(MASKED)(network(UNIFORM), world_rows()[:4])
    x0 = world_rows()[:4]
    with pytest.raises(ValueError, match="s must not exceed t"):
        bridge_paths(UNIFORM, x0, x0, 0.5, [0.6], seed=0)
    with pytest.raises(ValueError, match="at least one time"):
        bridge_paths(UNIFORM, x0, x0, 0.5, [], seed=0)
    with pytest.raises(ValueError, match=r"row ids must lie in \[0, 2\*\*32\)"):
        bridge_paths(UNIFORM, x0, x0, 0.5, [0.2], seed=0, first_row=2**32)
    ratios = dd.Denoiser(Pairs(UNIFORM, 2), UNIFORM, "ratio", time="alpha", scalar_time=True, length=2)
    with pytest.raises(ValueError, match="a network of ratios gives no denoiser"):
        Consistency(UNIFORM)(ratios, x0)
    own = network(MASKED)
    with pytest.raises(ValueError, match="has the network that is trained"):
        Consistency(MASKED, teacher=own)(own, x0)
    with pytest.raises(ValueError, match="times must be at least two"):
        T.path_residual(two_sites(2), network(UNIFORM), [0.5])
    with pytest.raises(ValueError, match="none after the one before it"):
        T.path_residual(two_sites(2), network(UNIFORM), [0.5, 0.6])
