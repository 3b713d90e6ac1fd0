"""Policy gradients against enumerated ones: over all runs and groups exactly, and by a test of the means of many."""

import functools
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learners import kill_self, killed, weights
from scipy import stats
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import Choices
from discdiff.learning import Trainer, policy
from discdiff.learning import run as run_module
from discdiff.learning.likelihoods import one_step_log_prob, path_kl
from discdiff.learning.policy import PolicyGradient, advantages
from discdiff.theory.world import all_states

V, L = 2, 2
PROCESSES = [dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())]
MASKED, UNIFORM = PROCESSES
EMPTY = torch.zeros(1, L, dtype=torch.int64)
ids = repr


class Small(nn.Module):
    """Logits of a site by the other site's state and the time: 16 weights on uniform noise, 20 on masked; float64.

    ``theta`` may be (P,), or (N, P) with weights of each row, so that one backward pass gives N gradients.
    """

    def __init__(self, states: int, seed: int = 1) -> None:
        super().__init__()
        self.states, size = states, L * V * (states + 2)
        generator = torch.Generator().manual_seed(seed)
        self.theta = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        theta = self.theta.expand(len(x), -1) if self.theta.ndim == 1 else self.theta[:: len(self.theta) // len(x)]
        bias, slope, table = theta.split([L * V, L * V, L * self.states * V], 1)
        time = t.expand(x.shape) if t.ndim == 2 else t[:, None].expand(x.shape)
        seen = table.view(-1, L, self.states, V).gather(2, x.flip(1)[:, :, None, None].expand(-1, -1, 1, V))[:, :, 0]
        return seen + bias.view(-1, L, V) + time[..., None] * slope.view(-1, L, V)


def denoiser(network: Small, process: dd.Process) -> dd.Denoiser:
    kind = "denoiser" if process.absorbing else "loo"
    return dd.Denoiser(network, process, kind, length=L, time_dtype=torch.float64)


def sampler_of(process: dd.Process, steps: int = 3, seed: int = 1) -> tuple[dd.Sampler, Small]:
    network = Small(process.states, seed)
    return dd.Sampler(process, denoiser(network, process), S.Ancestral(), steps=steps), network


def reward(tokens: Tensor) -> Tensor:
    return (tokens * torch.tensor([1.0, 2.0])).sum(1) - 1.5 * tokens.prod(1)


REWARDS = reward(all_states(V, L)).double()


def slopes(function: Callable[[], float], network: Small, step: float = 1e-4) -> Tensor:
    """The gradient of a function of the weights by central differences, whose error is of order 1e-9."""
    found, start = [], network.theta.detach().clone()
    with torch.no_grad():
        for n in range(start.numel()):
            values = []
            for factor in (1, -1):
                network.theta.copy_(start)
                network.theta[n] += factor * step
                values.append(function())
            found.append((values[0] - values[1]) / (2 * step))
        network.theta.copy_(start)
    return torch.tensor(found, dtype=torch.float64)


@functools.cache
def whole_gradient(process: dd.Process) -> Tensor:
    """The gradient of the exact mean reward of ``sampler_of(process)``."""
    sampler, network = sampler_of(process)
    return slopes(lambda: float(T.law(sampler) @ REWARDS), network)


def all_runs(sampler: dd.Sampler) -> dd.Samples:
    """All runs of a sampler, each once: those seen among many."""
    out = sampler.sample(20_000, seed=0, record="choices")
    assert out.choices is not None
    flat = torch.cat([out.choices.start, *(value.long().flatten(1) for value in out.choices.values())], 1)
    _, index = flat.unique(dim=0, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), len(flat)).scatter_reduce(0, index, torch.arange(len(flat)), "amin")
    runs = chosen(out, first)
    assert float(sampler.log_prob(runs).detach().exp().sum()) == pytest.approx(1, abs=1e-12), "all are there"
    return runs


def chosen(out: dd.Samples, index: Tensor) -> dd.Samples:
    """The runs of some rows, in this order; each choice must have been made by all rows."""
    assert out.choices is not None
    choices = Choices(out.choices.start[index], times=out.choices.times)
    for site, value in out.choices.items():
        choices.keep(site, value[index], torch.arange(len(index)))
    return dd.Samples(out.tokens[index], 0, torch.zeros(len(index)).long(), 0, choices=choices)


def divergence(sampler: dd.Sampler, runs: dd.Samples, reference: dd.Denoiser) -> float:
    """KL(runs || runs of the reference), enumerated."""
    with torch.no_grad():
        log_p = sampler.log_prob(runs)
        return float((log_p.exp() * (log_p - sampler.log_prob(runs, model=reference))).sum())


def estimates(loss: PolicyGradient, network: Small, rows: int = 3000, clean: Tensor = EMPTY) -> Tensor:
    """The gradients (rows, P) of independent groups, those of the reward: minus the loss's."""
    shared = network.theta
    del network.theta
    network.theta = shared.detach().repeat(rows * loss.copies, 1).requires_grad_()
    try:
        values = loss(loss.sampler.model, clean.expand(rows, -1))
        (found,) = torch.autograd.grad(-values.sum(), network.theta)
    finally:
        del network.theta
        network.theta = shared
    return found.view(rows, loss.copies, -1).sum(1)


def pvalue(found: Tensor, right: Tensor) -> float:
    """Hotelling's test that vectors (n, P) have the mean ``right``, in the directions in which they vary."""
    n, centred = len(found), found - found.mean(0)
    scale, basis = torch.linalg.eigh(centred.T @ centred / (n - 1))
    varies = scale > 1e-9 * scale.max()
    off = (found.mean(0) - right) @ basis
    if bool((off[~varies].abs() > 1e-6).any()):
        return 0.0
    size, square = int(varies.sum()), float((off[varies] ** 2 / scale[varies]).sum()) * n
    return float(stats.f.sf(square * (n - size) / (size * (n - 1)), size, n - size))


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_the_mean_over_all_groups_of_two_runs_is_the_gradient(
    process: dd.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair of runs, weighed by its probability, gives the gradient of sum_x law(x) r(x) - c KL(runs)."""
    sampler, network = sampler_of(process, 2 if process.absorbing else 1)
    _, other = sampler_of(process, seed=2)
    reference, runs = denoiser(other, process), all_runs(sampler)
    count = len(runs.tokens)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count)).flatten()
    both, log_p = chosen(runs, pairs), sampler.log_prob(runs).detach()
    chance = (log_p[:, None] + log_p).exp().flatten()
    for kl in (0.0, 0.7):
        loss = PolicyGradient(sampler, reward, copies=2, kl=kl, reference=reference if kl else None)
        monkeypatch.setattr(loss, "runs", lambda *_: both)
        values = loss(sampler.model, EMPTY.expand(count**2, -1))

        def objective(kl: float = kl) -> float:
            return float(T.law(sampler) @ REWARDS) - kl * divergence(sampler, runs, reference)

        assert float((chance * values).sum().detach()) == pytest.approx(-objective(), abs=1e-12)
        (found,) = torch.autograd.grad(-(chance * values).sum(), network.theta)
        right = slopes(objective, network)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-8)
        assert float(right.abs().max()) > 0.05


# --- by chance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_the_estimated_gradient_is_the_enumerated_one(process: dd.Process, failure_rate: float) -> None:
    sampler, network = sampler_of(process)
    right = whole_gradient(process)
    for loss in (
        PolicyGradient(sampler, reward, copies=4),
        PolicyGradient(sampler, reward, copies=2, branch=0, updates=3, clip=0.2),
    ):
        assert pvalue(estimates(loss, network), right) > failure_rate, loss


def with_itself(reward: Tensor, normalise: bool = False) -> Tensor:
    return reward - reward.mean(1, keepdim=True)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
@pytest.mark.parametrize("fault", ["baseline", "first step", "last step", "normalised", "one step"])
def test_a_wrong_gradient_is_caught(
    fault: str, process: dd.Process, failure_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, network = sampler_of(process)
    right = whole_gradient(process)
    loss = PolicyGradient(sampler, reward, copies=4, normalise=fault == "normalised")
    plain = loss.log_prob
    if fault == "baseline":
        monkeypatch.setattr(policy, "advantages", with_itself)
    elif fault == "first step":
        monkeypatch.setattr(loss, "log_prob", lambda model, out, k: plain(model, out, 1))
    elif fault == "last step":
        monkeypatch.setattr(loss, "log_prob", lambda model, out, k: plain(model, out, k)[:, :-1])
    elif fault == "one step":
        if not process.absorbing:
            pytest.skip("not for this process")
        loss = PolicyGradient(sampler, reward, copies=4, likelihood="one_step")
    assert pvalue(estimates(loss, network), right) < failure_rate


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_the_penalty_is_the_gradient_of_the_divergence_of_runs(process: dd.Process, failure_rate: float) -> None:
    sampler, network = sampler_of(process, 2 if process.absorbing else 1)
    reference, runs = denoiser(Small(process.states, 2), process), all_runs(sampler)
    right = slopes(lambda: float(T.law(sampler) @ REWARDS) - 0.5 * divergence(sampler, runs, reference), network)
    loss = PolicyGradient(sampler, reward, copies=4, kl=0.5, reference=reference)
    assert pvalue(estimates(loss, network), right) > failure_rate
    for wrong in (-0.5, 0.4):
        loss.kl = wrong
        assert pvalue(estimates(loss, network), right) < failure_rate, "planted: another weight"


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_branches_give_the_gradient_of_the_later_steps(process: dd.Process, k: int, failure_rate: float) -> None:
    """That of a plan whose later steps have a network of their own, with the same weights."""
    sampler, network = sampler_of(process)
    early = denoiser(Small(process.states), process)
    steps = [dd.Step(S.Ancestral(), model="early" if n < k else "late") for n in range(3)]
    both = dd.Sampler(process, {"early": early, "late": sampler.model}, plan=dd.Plan(sampler.grid, steps))
    right = slopes(lambda: float(T.law(both) @ REWARDS), network)
    found = estimates(PolicyGradient(sampler, reward, copies=4, branch=k), network)
    assert pvalue(found, right) > failure_rate
    assert pvalue(found, whole_gradient(process)) < failure_rate, "planted: the gradient of all steps"


@pytest.mark.parametrize("process", [MASKED, pytest.param(UNIFORM, marks=pytest.mark.slow)], ids=ids)
def test_a_prompt_is_given_to_each_group(process: dd.Process, failure_rate: float) -> None:
    sampler, network = sampler_of(process)
    frozen, rows = torch.tensor([True, False]), 4000
    clean = torch.arange(rows)[:, None].remainder(V).expand(-1, L)

    def mean(token: int) -> float:
        return float(T.law(sampler, prompt=[token, 0], frozen=frozen) @ REWARDS)

    for options in ({}, {"branch": 1}):
        loss = PolicyGradient(sampler, reward, copies=4, frozen=frozen, **options)  # type: ignore[arg-type]
        out = loss.runs(sampler.model, clean, loss.step(0.0))
        assert torch.equal(out.tokens[:, 0], clean[:, 0].repeat_interleave(4))
        if options:
            continue
        found = estimates(loss, network, rows, clean)
        for token in range(V):
            right = slopes(lambda token=token: mean(token), network)  # type: ignore[misc]
            assert pvalue(found[token::V], right) > failure_rate
            assert pvalue(found[1 - token :: V], right) < failure_rate, "planted: the other prompt"


def test_weights_that_rows_share_get_the_mean_of_their_gradients() -> None:
    sampler, network = sampler_of(UNIFORM)
    loss = PolicyGradient(sampler, reward, copies=4)
    torch.manual_seed(5)
    each = estimates(loss, network, 50)
    torch.manual_seed(5)
    (found,) = torch.autograd.grad(-loss(sampler.model, EMPTY.expand(50, -1)).mean(), network.theta)
    torch.testing.assert_close(found, each.mean(0), rtol=0, atol=1e-13)


# --- one step in place of the run -------------------------------------------------------------------------------------


def test_one_step_is_exact_for_a_sampler_of_one_step() -> None:
    sampler, network = sampler_of(MASKED, 1)
    x = all_states(V, L)
    torch.testing.assert_close(one_step_log_prob(sampler.model, x).exp(), T.law(sampler), rtol=0, atol=1e-12)
    frozen = torch.tensor([False, True])
    for token in range(V):
        law = T.law(sampler, prompt=[0, token], frozen=frozen)
        here = x[:, 1] == token
        found = one_step_log_prob(sampler.model, x, frozen)
        torch.testing.assert_close(found[here].exp(), law[here], rtol=0, atol=1e-12)
    more = sampler_of(MASKED, 3)[0]
    assert float((one_step_log_prob(sampler.model, x).detach().exp() - T.law(more)).abs().max()) > 0.02, "planted"
    assert network.theta.grad is None


def one_step_bias(steps: int) -> tuple[float, float]:
    """Relative error and cosine of the mean one-step gradient, enumerated: sum_x law(x) r(x) grad log p_1(x)."""
    sampler, network = sampler_of(MASKED, steps)
    law, x = T.law(sampler), all_states(V, L)
    right = slopes(lambda: float(T.law(sampler) @ REWARDS), network)
    centred = REWARDS - law @ REWARDS  # the baseline: the one-step gradient of a constant is not 0
    (found,) = torch.autograd.grad((law * centred * one_step_log_prob(sampler.model, x)).sum(), network.theta)
    return float((found - right).norm() / right.norm()), float(found @ right / found.norm() / right.norm())


def test_the_bias_of_one_step_is_a_figure(failure_rate: float) -> None:
    figures = {steps: one_step_bias(steps) for steps in (1, 2, 4)}
    print({steps: [round(value, 3) for value in pair] for steps, pair in figures.items()})
    assert figures[1][0] < 1e-8
    errors = [error for error, _ in figures.values()]
    assert errors == sorted(errors)
    assert errors[-1] > 0.3
    sampler, network = sampler_of(MASKED, 4)
    law, x = T.law(sampler), all_states(V, L)
    centred = REWARDS - law @ REWARDS
    (mean,) = torch.autograd.grad((law * centred * one_step_log_prob(sampler.model, x)).sum(), network.theta)
    loss = PolicyGradient(sampler, reward, copies=4, likelihood="one_step")
    assert pvalue(estimates(loss, network), mean) > failure_rate, "the estimator has this mean"


# --- the clipped objective --------------------------------------------------------------------------------------------


def test_the_clipped_objective_by_hand() -> None:
    """Two runs of one step: rewards 1 and 0 have advantages 1 and -1."""
    sampler, _ = sampler_of(MASKED)
    loss = PolicyGradient(sampler, reward, copies=2, updates=2, clip=0.2)
    rewards, old = torch.tensor([1.0, 0.0]).double(), torch.zeros(2, 1).double()
    for ratios, right in (
        ((1.0, 1.0), (-0.5, 0.5)),
        ((1.1, 0.9), (-0.55, 0.45)),
        ((1.3, 0.7), (0.0, 0.0)),  # both have gone as far as they may
        ((0.7, 1.3), (-0.35, 0.65)),  # the pessimistic side has no bound
        ((1.3, 1.1), (0.0, 0.55)),
    ):
        new = torch.tensor(ratios).double().log()[:, None].requires_grad_()
        value = loss.objective(rewards, new, old)
        assert value.tolist() == [-0.5], "the value is minus the mean reward"
        (found,) = torch.autograd.grad(value.sum(), new)
        torch.testing.assert_close(found[:, 0], torch.tensor(right).double(), rtol=0, atol=1e-12)
    new = torch.tensor([[0.0, 0.5], [0.0, 0.0]]).double().requires_grad_()  # each step has a ratio of its own
    (found,) = torch.autograd.grad(loss.objective(rewards, new, old.expand(-1, 2)).sum(), new)
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.0], [0.5, 0.5]]).double(), rtol=0, atol=1e-12)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).double()
    assert advantages(rewards).tolist() == [[3.0, -1.5, -1.5], [0.0, 0.0, 0.0]]
    right = torch.tensor([[3.0, -1.5, -1.5], [0.0, 0.0, 0.0]]).double() / 3**0.5
    torch.testing.assert_close(advantages(rewards, True), right, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("branch", [None, 1])
def test_updates_go_on_from_the_same_runs(branch: int | None) -> None:
    sampler, network = sampler_of(UNIFORM)
    loss = PolicyGradient(sampler, reward, copies=2, updates=3, clip=0.2, branch=branch)
    torch.manual_seed(3)
    found = []
    for value in loss.updates(sampler.model, sampler.model, EMPTY.expand(4, -1), 0.0):
        (slope,) = torch.autograd.grad(value.mean(), network.theta)
        found.append((value.detach(), slope))
        with torch.no_grad():
            network.theta -= 0.5 * slope
    assert len(found) == 3
    assert torch.equal(found[0][0], found[2][0]), "the value is the reward of the runs, which are the same"
    assert not torch.equal(found[0][1], found[1][1])
    torch.manual_seed(3)
    fresh, other = sampler_of(UNIFORM)
    plain = PolicyGradient(fresh, reward, copies=2, branch=branch)
    (first,) = torch.autograd.grad(plain(fresh.model, EMPTY.expand(4, -1)).mean(), other.theta)
    torch.testing.assert_close(found[0][1], first, rtol=0, atol=1e-15)


# --- schedules and modes ----------------------------------------------------------------------------------------------


def test_the_last_step_is_trained_first() -> None:
    sampler, _ = sampler_of(MASKED, 5)
    loss = PolicyGradient(sampler, reward, branch="progressive")
    for total in (5, 10, 37, 100):
        visited = [loss.step(n / total) for n in range(total)]
        assert [*dict.fromkeys(visited)] == [4, 3, 2, 1, 0]
        assert visited == sorted(visited, reverse=True)
        assert loss.step(1.0) == 0
    assert [visited.count(k) for k in range(5)] == [20] * 5
    other = PolicyGradient(sampler, reward, branch=lambda done: 3 if done < 0.5 else 1)
    assert [other.step(done) for done in (0.0, 0.4, 0.5, 1.0)] == [3, 3, 1, 1]
    assert PolicyGradient(sampler, reward).step(0.3) == 0


def test_only_later_steps_are_called_for_the_gradient() -> None:
    sampler, network = sampler_of(MASKED, 4)
    loss = PolicyGradient(sampler, reward, copies=3, branch=2)
    out = loss.runs(sampler.model, EMPTY.expand(5, -1), 2)
    assert out.choices is not None
    for site, value in out.choices.items():
        same = bool((value.view(5, 3, -1) == value.view(5, 3, -1)[:, :1]).all())
        assert same or int(site[0]) > 2
    assert loss.log_prob(sampler.model, out, 2).shape == (15, 2)
    assert network.training


class Dropping(Small):
    """Weights with dropout, and the modes in which it was called."""

    def __init__(self) -> None:
        super().__init__(MASKED.states)
        self.drop, self.modes = nn.Dropout(0.5), []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.modes.append(self.drop.training)
        return self.drop(super().forward(x, t))


def test_a_network_with_dropout_runs_without_it() -> None:
    network = Dropping()
    sampler = dd.Sampler(MASKED, denoiser(network, MASKED), S.Ancestral(), steps=2)
    loss = PolicyGradient(sampler, reward, copies=2, updates=2, clip=0.2)
    for value in loss.updates(sampler.model, sampler.model, EMPTY, 0.0):
        value.sum().backward()
    assert network.modes
    assert not any(network.modes)
    assert network.training
    assert network.drop.training
    with pytest.warns(UserWarning, match="drops units at random"):
        loss(sampler.model, EMPTY)


# --- the divergence of runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_the_divergence_of_runs_is_within_its_error(process: dd.Process) -> None:
    steps = 2 if process.absorbing else 1
    sampler, _ = sampler_of(process, steps)
    reference = denoiser(Small(process.states, 2), process)
    exact = divergence(sampler, all_runs(sampler), reference)
    found = path_kl(sampler, reference, batch=20_000, length=L, seed=3)
    assert found.draws == 20_000
    assert abs(float(found.value) - exact) < 5 * float(found.error) < 0.1 * exact
    assert float(found.error) * 5 < abs(float(found.value) - 2 * exact), "planted: twice the divergence"
    of_samples = T.kl(T.law(sampler), T.law(dd.Sampler(process, reference, S.Ancestral(), steps=steps)))
    assert exact > of_samples + 1e-3, "samples say less than runs"
    again = path_kl(sampler, sampler.model, batch=50, length=L, seed=3)
    assert (float(again.value.abs()), float(again.error)) < (1e-12, 1e-12)
    both = torch.tensor([True, True])
    given = path_kl(sampler, reference, batch=50, seed=3, prompt=torch.tensor([1, 0]), frozen=both)
    assert abs(float(given.value)) < 1e-12, "nothing is drawn but what is given"


# --- training ---------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits of every state: any denoiser of two masked sites that does not ask the time."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(MASKED.states**L, L, V, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        return self.logits[x[:, 0] * MASKED.states + x[:, 1]]


def table_sampler(steps: int) -> dd.Sampler:
    model = dd.Denoiser(Table(), MASKED, "denoiser", time=None, length=L)
    return dd.Sampler(MASKED, model, S.Ancestral(), steps=steps)


def trained(loss: PolicyGradient, steps: int, **options: object) -> Trainer:
    data = EMPTY.expand(16, -1).contiguous()
    said = {"batch": 16, "rate": 0.1, "warmup": 5, "every": 1000, "progress": False, "time": None, "ema": 0.9}
    said |= options
    trainer = Trainer(Table(), MASKED, loss, data, **said)  # type: ignore[arg-type]
    trainer.fit(steps)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"branch": "progressive"},
        {"updates": 2, "clip": 0.2, "normalise": True},
    ],
)
def test_training_raises_the_exact_mean_reward(options: dict[str, object]) -> None:
    sampler = table_sampler(3)
    before = float(T.law(sampler) @ REWARDS)
    loss = PolicyGradient(sampler, reward, copies=4, **options)  # type: ignore[arg-type]
    model = trained(loss, 40).model
    after = float(T.law(loss.policy(model), length=L) @ REWARDS)
    assert before == pytest.approx(float(REWARDS.mean()))
    assert after > 1.7, (before, after)  # of at most 2


@pytest.mark.slow
def test_training_with_a_penalty_leads_to_the_tilted_law() -> None:
    """The best law of runs is that of the reference times exp(r / c), which no table makes if a step draws two sites.

    So with more steps, which draw two sites together more seldom, the samples come nearer to p exp(r / c) / Z.
    """
    found = {}
    for steps in (1, 4):
        sampler = table_sampler(steps)
        reference = T.law(sampler)
        target = reference * (REWARDS / 0.5).exp()
        loss = PolicyGradient(sampler, reward, copies=8, kl=0.5, reference=sampler.model)
        law = T.law(loss.policy(trained(loss, 100, batch=64, ema=0.98).model), length=L)
        found[steps] = T.kl(law, target / target.sum())
        assert T.kl(reference, target / target.sum()) > 0.3
    print(found)
    assert found[4] < 0.5 * found[1]


# --- kills ------------------------------------------------------------------------------------------------------------

STEPS = 9


def resuming(folder: Path | None) -> Trainer:
    loss = PolicyGradient(table_sampler(3), reward, copies=4, updates=2, clip=0.2, branch="progressive")
    torch.manual_seed(7)
    said = {"batch": 4, "rate": 0.1, "warmup": 2, "every": 3, "progress": False, "time": None, "held_out": EMPTY}
    return Trainer(Table(), MASKED, loss, EMPTY.expand(16, -1), folder=folder, **said)  # type: ignore[arg-type]


def kill_in(owner: object, name: str, count: int, folder: Path) -> None:
    calls, plain = [], getattr(owner, name)

    def counted(*arguments: object, **named: object) -> object:
        calls.append(0)
        if len(calls) == count:
            kill_self()
        return plain(*arguments, **named)

    setattr(owner, name, counted)
    resuming(folder).fit(STEPS)


@pytest.mark.parametrize(
    ("owner", "name", "count", "kept"),
    [
        (PolicyGradient, "rewards", 2, None),
        (torch.optim.AdamW, "step", 10, 3),  # between the two updates of a batch
        (run_module.os, "replace", 2, 3),
    ],
)
def test_a_killed_training_ends_with_the_same_weights(
    owner: object, name: str, count: int, kept: int | None, tmp_path: Path
) -> None:
    assert killed(lambda: kill_in(owner, name, count, tmp_path)) == signal.SIGKILL
    path = tmp_path / run_module.CHECKPOINT
    assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == kept
    ends = []
    for folder, seed in ((tmp_path, 99), (None, 3)):
        torch.manual_seed(seed)
        trainer = resuming(folder)
        trainer.fit(STEPS)
        ends.append(weights(trainer))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_repr_says_all_settings_and_no_address() -> None:
    sampler, _ = sampler_of(MASKED)
    loss = PolicyGradient(
        sampler, reward, copies=3, frozen=[True, False], reference=sampler.model, kl=0.5, updates=2, clip=0.2,
        normalise=True, branch=reward,  # type: ignore[arg-type]
    )  # fmt: skip
    assert repr(loss) == (
        f"PolicyGradient({sampler}, reward, copies=3, frozen=10, reference={sampler.model}, kl=0.5, updates=2, "
        "clip=0.2, normalise=True, branch=reward, likelihood='run')"
    )
    assert " at 0x" not in repr(PolicyGradient(sampler, lambda x: x.sum(1), branch="progressive"))


def bad() -> Iterator[tuple[Callable[[], object], type[Exception], str]]:
    sampler, network = sampler_of(MASKED)
    model, other = sampler.model, denoiser(Small(V), UNIFORM)

    def made(**options: object) -> Callable[[], object]:
        return lambda: PolicyGradient(sampler, reward, **options)  # type: ignore[arg-type]

    def called(function: object, x: Tensor = EMPTY) -> Callable[[], object]:
        return lambda: PolicyGradient(sampler, function)(model, x)  # type: ignore[arg-type]

    guided = dd.Sampler(MASKED, model.guided(dd.Truncation(top_k=1)), S.Ancestral(), steps=3)
    yield lambda: PolicyGradient(model, reward), TypeError, "takes a Sampler"  # type: ignore[arg-type]
    yield lambda: PolicyGradient(sampler, 3), TypeError, "a function of tokens"  # type: ignore[arg-type]
    yield lambda: PolicyGradient(guided, reward), ValueError, "its guides and context"
    yield lambda: PolicyGradient(sampler.on_grid([1.0, 0.5]), reward), ValueError, "grid from 1 to 0"
    yield made(copies=1), ValueError, "copies must be at least 2"
    yield made(frozen=[0, 1]), ValueError, "frozen must be a bool mask"
    yield made(kl=0.5), ValueError, "kl > 0 and reference= go together"
    yield made(reference=model), ValueError, "kl > 0 and reference= go together"
    yield made(kl=-1.0, reference=model), ValueError, "kl must lie in"
    yield made(kl=1.0, reference=other), ValueError, "reference: the process is"
    yield made(kl=1.0, reference=network), TypeError, "must be a Denoiser"
    yield made(updates=2), ValueError, "2 updates on the same runs need clip="
    yield made(updates=0, clip=0.2), ValueError, "updates must be at least 1"
    yield made(clip=1.5), ValueError, "clip must lie in"
    yield made(normalise=1), TypeError, "normalise must be True or False"
    yield made(branch="last"), ValueError, "branch must be 'progressive'"
    yield made(branch=3), ValueError, "branch must lie in 0..2"
    yield made(branch=0.5), TypeError, "branch must be a whole number"
    yield lambda: PolicyGradient(sampler, reward, branch=lambda done: 7).step(0.1), ValueError, "branch must lie in"
    yield made(likelihood="two_step"), ValueError, "likelihood must be"
    yield made(likelihood="one_step", branch=1), ValueError, "no branch="
    yield lambda: PolicyGradient(sampler, reward)(other, EMPTY), ValueError, "the network for Uniform"
    yield called(lambda x: x), ValueError, r"must give \(8,\) numbers, one a row, got \(8, 2\)"
    yield called(lambda x: 1.0), ValueError, r"must give \(8,\) numbers"
    yield called(lambda x: x.sum(1) / 0.0), ValueError, "PolicyGradient: the reward of"
    yield called(reward, EMPTY.double()), ValueError, "x0 must be an int64"
    yield lambda: one_step_log_prob(other, EMPTY), ValueError, "takes a process with a mask"
    yield lambda: one_step_log_prob(network, EMPTY), TypeError, "must be a Denoiser"  # type: ignore[arg-type]
    yield lambda: one_step_log_prob(model, EMPTY + V), ValueError, "one_step_log_prob: tokens"
    yield lambda: one_step_log_prob(model, EMPTY, torch.ones(3)), ValueError, "frozen must be a bool mask"
    yield lambda: path_kl(model, model, batch=9, seed=0), TypeError, "takes a Sampler"  # type: ignore[arg-type]
    yield lambda: path_kl(sampler, other, batch=9, seed=0), ValueError, "the model is for"
    yield lambda: path_kl(sampler, network, batch=9, seed=0), TypeError, "must be a Denoiser"  # type: ignore[arg-type]
    yield lambda: path_kl(sampler, model, batch=1, seed=0), ValueError, "batch must be at least 2"
    yield lambda: path_kl(sampler, replaced(model), batch=99, seed=0), ValueError, "impossible under this model"


def replaced(model: dd.Denoiser) -> dd.Denoiser:
    """A denoiser that never predicts token 1."""
    other = dd.Denoiser(model.fn, MASKED, "denoiser", length=L, suppress=(1,))
    assert replace(other.call).suppress
    return other


@pytest.mark.usefixtures("as_user")
def test_what_cannot_be_is_refused() -> None:
    for call, error, text in bad():
        with pytest.raises(error, match=text):
            call()


def test_late_steps_without_a_choice_have_a_gradient_of_zero() -> None:
    """All tokens may be revealed before the last step; a sampler that never draws from the network is refused."""
    sampler = dd.Sampler(MASKED, denoiser(Small(MASKED.states), MASKED), S.Unmask(), steps=4)
    loss = PolicyGradient(sampler, reward, copies=2, branch=3)
    (value,) = loss.updates(sampler.model, sampler.model, EMPTY, 0.0)
    value.sum().backward()
    assert float(sampler.model.fn.theta.grad.abs().max()) == 0  # type: ignore[union-attr]
    greedy = PolicyGradient(dd.Sampler(MASKED, sampler.model, S.Greedy(), steps=1), reward)
    with pytest.raises(ValueError, match=r"no choice of .* depends on the network's weights"):
        greedy(sampler.model, EMPTY)


def test_a_reward_that_changes_its_tokens_changes_nothing_else() -> None:
    sampler, _ = sampler_of(MASKED)

    def careless(tokens: Tensor) -> Tensor:
        found = reward(tokens)
        tokens.zero_()
        return found

    values = []
    for one in (reward, careless):
        torch.manual_seed(3)
        loss = PolicyGradient(sampler, one, reference=denoiser(Small(MASKED.states, 2), MASKED), kl=0.5,
                              likelihood="one_step")  # fmt: skip
        values.append(loss(sampler.model, EMPTY.expand(6, -1)).detach())
    assert torch.equal(*values)


def test_another_reward_reference_or_grid_is_another_run() -> None:
    sampler, _ = sampler_of(MASKED)
    other = dd.Sampler(MASKED, sampler.model, S.Ancestral(), grid=[1.0, 0.7, 0.3, 0.0])
    references = [denoiser(Small(MASKED.states, seed), MASKED) for seed in (2, 3)]
    losses = [
        PolicyGradient(sampler, lambda x: x.sum(1).double()), PolicyGradient(sampler, lambda x: x.prod(1).double()),
        PolicyGradient(other, lambda x: x.sum(1).double()),
        *(PolicyGradient(sampler, lambda x: x.sum(1).double(), reference=one, kl=0.1) for one in references),
    ]  # fmt: skip
    assert len({run_module.told(loss) for loss in losses}) == len(losses)
    with pytest.raises(ValueError, match="has the network that is trained"):
        PolicyGradient(sampler, reward, reference=sampler.model, kl=0.1)(sampler.model, EMPTY)
