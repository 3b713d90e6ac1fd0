"""Reflow: couplings by enumeration, what a reflow gains and costs, pairs, the loss, and a resumed training."""

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import Pairs as Network
from learners import ends_alike_if_killed
from problems import dirichlet, states, two_sites
from scipy import stats
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.learning import Pairs, Reflow, Trainer, reflow
from discdiff.learning.run import told

UNIFORM, BETWEEN = dd.Uniform(3, dd.Linear()), dd.Interpolant(3, dd.Linear())
STEPS = 32


# --- couplings --------------------------------------------------------------------------------------------------------


def random_pairs(world: T.Enumeration) -> T.Coupling:
    """Data and a uniform source, independent."""
    source = torch.full_like(world.p0, 1 / len(world.p0))
    return T.Coupling(world.p0[:, None] * source, vocab_size=world.alphabet, length=world.length)


def teacher(pairs: T.Coupling, steps: int = STEPS) -> dd.Sampler:
    process = dd.Uniform(pairs.alphabet, dd.Linear())
    return dd.Sampler(process, pairs.without_source(process), S.MaximalCoupling(), steps=steps)


def one_step(pairs: T.Coupling) -> float:
    """KL from the data of the pairs to the samples of one step of the exact student that sees the source."""
    process = dd.Interpolant(pairs.alphabet, dd.Linear())
    student = dd.Sampler(process, pairs.denoiser(process), S.Ancestral(), steps=1)
    return float(T.kl(pairs.data.p0, T.law(student, pairs.initial(process))))


@functools.cache
def reflows(world: str) -> list[T.Coupling]:
    """Random pairs, then three reflows."""
    found = [random_pairs({"two sites": two_sites(2), "three coins": dirichlet(0.4, 5, 2, 3)}[world])]
    for _ in range(3):
        found.append(T.coupling(teacher(found[-1])))
    return found


@pytest.mark.parametrize("world", ["two sites", "three coins"])
def test_a_reflow_keeps_both_laws_and_lowers_the_kl_of_one_step(world: str) -> None:
    chain = reflows(world)
    for before, after in itertools.pairwise(chain):
        assert float((after.source.p0 - 1 / len(after.source.p0)).abs().max()) < 1e-12
        assert float((after.data.p0 - T.law(teacher(before))).abs().max()) < 1e-12
        # the planted fault: a teacher of fewer steps has another law of samples
        assert float((after.data.p0 - T.law(teacher(before, 8))).abs().max()) > 1e-4
    kl = [one_step(pairs) for pairs in chain]
    drift = [float(T.kl(chain[0].data.p0, pairs.data.p0)) for pairs in chain]
    print(world, "one step", [f"{value:.4f}" for value in kl], "drift", [f"{value:.5f}" for value in drift])
    assert all(after < 0.85 * before for before, after in itertools.pairwise(kl))
    assert all(value < 0.1 * kl[0] for value in drift)
    total = [float(T.kl(chain[0].data.p0, law_of_one_step(pairs))) for pairs in chain]  # from the law of the data
    assert total == sorted(total, reverse=True)


def law_of_one_step(pairs: T.Coupling) -> Tensor:
    """By the definition: the source draws u, then every site of x0 by itself from p(x0_i | u)."""
    x = states(pairs.alphabet, pairs.length)
    law = torch.zeros_like(pairs.data.p0)
    for u in range(len(pairs.source.p0)):
        given = pairs.joint[:, u] / pairs.joint[:, u].sum()
        each = torch.ones_like(given)
        for site in range(pairs.length):
            p = torch.zeros(pairs.alphabet, dtype=torch.float64).index_add(0, x[:, site], given)
            each = each * p[x[:, site]]
        law += pairs.source.p0[u] * each
    return law


@pytest.mark.parametrize("world", ["two sites", "three coins"])
def test_the_interpolant_of_a_coupling_draws_that_law_in_one_step(world: str) -> None:
    for pairs in reflows(world)[:2]:
        process = dd.Interpolant(pairs.alphabet, dd.Linear())
        student = dd.Sampler(process, pairs.denoiser(process), S.Ancestral(), steps=1)
        assert float((T.law(student, pairs.initial(process)) - law_of_one_step(pairs)).abs().max()) < 1e-12


def test_a_student_that_sees_the_source_keeps_the_pairs_and_gains_nothing_by_another_reflow() -> None:
    """The gain needs a teacher that forgets the source: with it in the state, the pairs stay as they are."""
    process = dd.Interpolant(2, dd.Linear(), torch.full((2,), 0.5, dtype=torch.float64))
    first = T.coupling(teacher(random_pairs(dirichlet(0.4, 5, 2, 2))))
    errors = []
    for steps in (16, 64):
        again = T.coupling(dd.Sampler(process, first.denoiser(process), S.Ancestral(), steps=steps), length=2)
        errors.append(float((again.joint - first.joint).abs().max()))
    assert errors[1] < 0.35 * errors[0] < 0.01
    forgetful = T.coupling(teacher(first, 64))
    assert float((forgetful.joint - first.joint).abs().max()) > 10 * errors[1]


def test_the_denoiser_without_source_is_the_conditional_law() -> None:
    pairs = reflows("two sites")[1]
    model, z, x = pairs.without_source(UNIFORM), states(3, 2), states(3, 2)
    for t in (0.9, 0.4):
        alpha = 1 - t
        either = (z[:, None, None] == x[:, None]).double() * alpha + (z[:, None, None] == x[None, :]).double() * (
            1 - alpha
        )
        both = either.prod(-1) * pairs.joint  # (z, x0, x1)
        for site in range(2):
            law = torch.zeros(9, 3, dtype=torch.float64).index_add(1, x[:, site], both.sum(-1))
            law = law / law.sum(-1, keepdim=True)
            assert float((model(z, t).denoiser[:, site].exp() - law).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="takes a process of 3 states"):
        pairs.without_source(dd.Masked(3, dd.Linear()))
    certain = torch.zeros(9, 9, dtype=torch.float64)
    certain[4, 4] = 1.0  # most states never occur; there the law is uniform
    rows = T.Coupling(certain, vocab_size=3, length=2).without_source(UNIFORM)(z, 0.5).denoiser.exp()
    assert torch.allclose(rows[0], torch.tensor(1 / 3, dtype=torch.float64))
    assert float(rows[4, 0, 1]) == 1


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_drawn_from_the_enumerated_coupling() -> None:
    pairs = random_pairs(two_sites(2))
    sampler = teacher(pairs, 6)
    joint = T.coupling(sampler).joint
    drawn = reflow(sampler, 20_000, seed=3, batch=7000)
    place = torch.tensor([3, 1])
    seen = torch.zeros(9, 9, dtype=torch.float64).index_put(
        ((drawn.x0 * place).sum(-1), (drawn.x1 * place).sum(-1)), torch.ones(20_000).double(), accumulate=True
    )
    assert stats.chisquare(seen.flatten(), joint.flatten() * 20_000).pvalue > 1e-7
    mixed = drawn.shuffled(0)
    assert torch.equal(mixed.x0, drawn.x0)
    assert torch.equal(mixed.x1.sort(0).values, drawn.x1.sort(0).values)
    seen = torch.zeros(9, 9, dtype=torch.float64).index_put(
        ((mixed.x0 * place).sum(-1), (mixed.x1 * place).sum(-1)), torch.ones(20_000).double(), accumulate=True
    )
    assert stats.chisquare(seen.flatten(), joint.flatten() * 20_000).pvalue < 1e-7
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert stats.chisquare(seen.flatten(), apart.flatten() * 20_000).pvalue > 1e-7


def test_a_pair_depends_on_its_row_alone() -> None:
    sampler = teacher(random_pairs(two_sites(2)), 4)
    whole, some = reflow(sampler, 50, seed=1), reflow(sampler, 20, seed=1, first_row=30, batch=9)
    assert torch.equal(whole.x0[30:], some.x0)
    assert torch.equal(whole.x1[30:], some.x1)
    out = sampler.sample(50, seed=1, record=True)
    assert out.trajectory is not None
    assert torch.equal(whole.x0, out.tokens)
    assert torch.equal(whole.x1, out.trajectory[0].long())


def test_the_pairs_of_an_interpolant_hold_its_source_tokens() -> None:
    process = dd.AbsorbingUniform(3, dd.Linear())
    sampler = dd.Sampler(process, two_sites(2).denoiser(process), S.Ancestral(), steps=3)
    pairs, out = reflow(sampler, 30, seed=2), sampler.sample(30, seed=2, record=True)
    assert out.trajectory is not None
    assert torch.equal(pairs.x1, process.split(out.trajectory[0].long())[1])
    assert torch.equal(pairs.x0, out.tokens)


# --- the loss ---------------------------------------------------------------------------------------------------------


@functools.cache
def drawn(count: int = 20_000) -> Pairs:
    """Pairs of the first reflow."""
    joint = reflows("two sites")[1].joint
    place = torch.as_tensor(np.random.default_rng(0).choice(81, size=count, p=joint.flatten().numpy()))
    x = states(3, 2)
    return Pairs(x[place // 9], x[place % 9])


@pytest.mark.parametrize("process", [UNIFORM, BETWEEN], ids=["uniform", "interpolant"])
def test_the_mean_of_the_loss_is_that_of_the_exact_denoiser(process: dd.Process) -> None:
    """By numerical integration over t of the enumerated cross-entropy; random pairs have another one."""
    coupling, x = reflows("two sites")[1], states(3, 2)
    model = coupling.denoiser(BETWEEN) if process is BETWEEN else coupling.without_source(UNIFORM)
    exact = 0.0
    nodes, weight = np.polynomial.legendre.leggauss(12)
    for node, share in zip((nodes + 1) / 2, weight / 2, strict=True):
        z0, z1 = (z.flatten() for z in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
        for kept in states(2, 2).bool():  # which sites still hold x0
            z = torch.where(kept, x[z0], x[z1])
            shown = process.pairs.join(z, x[z1]) if process.pairs is not None else z
            nats = -model(shown, float(node)).denoiser.gather(-1, x[z0][..., None])[..., 0].sum(-1)
            p = coupling.joint[z0, z1] * torch.where(kept, 1 - node, node).prod()
            exact += share * float(torch.where(p > 0, p * nats, 0.0).sum())
    torch.manual_seed(0)
    with torch.no_grad():
        value = Reflow()(model, torch.stack([drawn().x0, drawn().x1], -1))
        mixed = Reflow().at(model, torch.stack([drawn().x0, drawn().x1], -1), 1.0)
    assert stats.ttest_1samp(value, exact).pvalue > 1e-6, (float(value.mean()), exact)
    finite = mixed[torch.isfinite(mixed)]
    assert len(finite) < len(mixed) or stats.ttest_1samp(finite, exact).pvalue < 1e-6


def test_random_pairs_give_way_to_the_teachers() -> None:
    seen: list[float] = []

    class Watched(Reflow):
        def at(self, model: dd.Denoiser, pairs: Tensor, share: float) -> Tensor:
            seen.append(share)
            return super().at(model, pairs, share)

    trainer = Trainer(Network(UNIFORM, 2, 8), UNIFORM, Watched(anneal=0.5), drawn().batches(8), time="alpha",
                      progress=False)  # fmt: skip
    trainer.fit(8)
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25, 0, 0, 0, 0])
    pairs = torch.stack([drawn().x0, drawn().x1], -1)
    rows: list[Tensor] = []

    def keep(x: Tensor, time: Tensor | None) -> Tensor:
        rows.append(x)
        return torch.zeros(*x.shape, 3)

    foreign = []
    for random in (0.0, 0.5, 1.0):  # rows with a token of neither sequence of their pair
        rows.clear()
        Reflow().at(dd.Denoiser(keep, UNIFORM, "denoiser", time=None), pairs, random)
        own = (rows[0] == pairs[..., 0]) | (rows[0] == pairs[..., 1])
        foreign.append(int((~own.all(-1)).sum()))
    assert foreign[0] == 0 < foreign[1]
    assert foreign[2] / foreign[1] == pytest.approx(2, abs=0.1)
    clocks = dd.Uniform(3, dd.PerSite(dd.Linear(), torch.tensor([-9.0, 9.0])))  # the first site is noise early, late
    rows.clear()
    Reflow().at(dd.Denoiser(keep, clocks, "denoiser", time=None), pairs, 0.0)
    kept = (rows[0] == pairs[..., 0]).double().mean(0)
    alpha = clocks.schedule.alpha(torch.linspace(0, 1, 999, dtype=torch.float64)[:, None]).mean(0)
    assert (kept[0] > kept[1]) == (alpha[0] > alpha[1])
    assert abs(float(kept[0] - kept[1])) > 0.2
    assert len({told(drawn().batches(4)), told(drawn().batches(8)), told(drawn().shuffled(0).batches(8))}) == 3


def training(folder: Path | None, process: dd.Process = UNIFORM) -> Trainer:
    torch.manual_seed(5)
    return Trainer(Network(process, 2, 8), process, Reflow(anneal=0.5), drawn().batches(8), time="alpha", every=3,
                   progress=False, folder=folder)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("place", [2, 7, 11])
def test_a_killed_training_resumes_to_the_same_weights(place: int, tmp_path: Path) -> None:
    ends_alike_if_killed(training, Reflow, "at", place, tmp_path)


@pytest.mark.slow
def test_a_student_learns_the_coupling_and_draws_better_in_one_step() -> None:
    """The trained student's exact law, beside one that was trained on random pairs."""
    world, kl = two_sites(2), {}
    for name, pairs in (("reflowed", drawn()), ("random", drawn().shuffled(0))):
        torch.manual_seed(0)
        trainer = Trainer(Network(BETWEEN, 2, 64), BETWEEN, Reflow(), pairs.batches(256), time="alpha", rate=0.01,
                          ema=0.98, progress=False)  # fmt: skip
        model = trainer.fit(1500)
        first = reflows("two sites")[0].initial(BETWEEN)
        law = T.law(dd.Sampler(BETWEEN, model, S.Ancestral(), steps=1), first, length=2)
        kl[name] = float(T.kl(world.p0, law))
    best = one_step(reflows("two sites")[1])
    print(kl, "the exact student's", best)
    assert kl["reflowed"] < 0.85 * kl["random"]
    assert best < kl["reflowed"] < best + 0.03


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
def test_bad_arguments_are_refused() -> None:
    sampler = teacher(random_pairs(two_sites(2)), 2)
    masked = dd.Masked(3, dd.Linear())
    other = dd.Sampler(masked, two_sites(2).denoiser(masked), S.Ancestral(), steps=2)
    with pytest.raises(ValueError, match="source has tokens"):
        reflow(other, 3, seed=0)
    for process in (dd.Hybrid(3, dd.Linear()), dd.Ordinal(3, dd.Linear())):
        with pytest.raises(ValueError, match="noise law does not change with time"):
            reflow(dd.Sampler(process, two_sites(2).denoiser(process), S.Ancestral(), steps=2), 3, seed=0)
        with pytest.raises(ValueError, match="noise law does not change with time"):
            Reflow().check(process)
    with pytest.raises(ValueError, match="takes a process of 3 states with one noise law"):
        random_pairs(two_sites(2)).without_source(dd.Ordinal(3, dd.Linear()))
    with pytest.raises(TypeError, match=r"give .batches\(B\) of it"):
        Trainer(Network(UNIFORM, 2), UNIFORM, Reflow(), drawn())
    with pytest.raises(ValueError, match="Reflow takes no held_out="):
        Trainer(Network(UNIFORM, 2), UNIFORM, Reflow(), drawn().batches(4), held_out=drawn().x0)
    with pytest.raises(ValueError, match="token ids must be at least 0"):
        Pairs(torch.tensor([[-1]]), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="the grid must end at 0"):
        reflow(sampler.on_grid([1.0, 0.5]), 3, seed=0)
    with pytest.raises(TypeError, match="must be a Sampler"):
        reflow(masked, 3, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be at least 1"):
        reflow(sampler, 0, seed=0)
    with pytest.raises(ValueError, match=r"one shape \(N, L\)"):
        Pairs(torch.zeros(2, 3).long(), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match=r"anneal must lie in \[0, 1\]"):
        Reflow(anneal=math.nan)
    with pytest.raises(ValueError, match="source has tokens"):
        Trainer(Network(masked, 2), masked, Reflow(), drawn().batches(4))
    with pytest.raises(ValueError, match=r"takes pairs \(B, L, 2\)"):
        Reflow()(teacher(random_pairs(two_sites(2))).model, drawn().x0[:3])
    with pytest.raises(ValueError, match="source has tokens"):
        T.coupling(other)
    with pytest.raises(ValueError, match="takes a grid from 1 to 0"):
        T.coupling(sampler.on_grid([1.0, 0.5]))
