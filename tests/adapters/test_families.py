"""Every family through the whole library: sampled, enumerated, corrected, converted at the ends, diagnosed."""

import math

import numpy as np
import pytest
import torch
from ledger import caught
from problems import dirichlet, families, irreversible, mislabelled, pairs, states, strong
from scipy import stats

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters import diagnostics
from discdiff.losses import base as losses
from discdiff.theory.world import state_index

ALL = [*[(p, 3) for p in families(3)], *[(p, 2) for p in pairs(2)]]


def world_of(size: int) -> T.Enumeration:
    return dirichlet(0.8, 4, size, 2)


@pytest.mark.parametrize(("process", "size"), ALL, ids=str)
def test_samples_follow_the_exact_law(process: dd.Process, size: int, failure_rate: float) -> None:
    world = world_of(size)
    sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), S.Ancestral() >> S.Gibbs(), steps=3)
    out, law = sampler.sample(40_000, seed=0), T.law(sampler)
    count = torch.bincount(state_index(out.tokens, size), minlength=size**2)
    assert stats.chisquare(count, 40_000 * law).pvalue > failure_rate
    assert stats.chisquare(count, 40_000 * law.flip(0)).pvalue < failure_rate
    part = sampler.sample(8, seed=0, first_row=16)
    assert torch.equal(part.tokens, out.tokens[16:24]), "rows are keyed by id"


@pytest.mark.parametrize(("process", "size"), ALL, ids=str)
def test_the_law_converges(process: dd.Process, size: int) -> None:
    if isinstance(process, dd.TimeVarying):
        return  # alpha(1) > 0: its prior is near the law at t = 1, not equal to it
    world = world_of(size)
    model = world.denoiser(process, predicts="loo")
    kl = [T.kl(world.p0, T.law(dd.Sampler(process, model, S.Ancestral(), steps=n))) for n in (1, 8, 64)]
    marginals = [world.p0.view(size, size).sum(i) for i in (1, 0)]
    assert kl[0] == pytest.approx(T.kl(world.p0, torch.outer(*marginals).flatten()), abs=1e-10)
    assert kl[0] > 10 * kl[1] > 100 * kl[2] or kl[2] < 1e-4, kl


@pytest.mark.parametrize("process", [p for p in families(3) if not p.absorbing], ids=str)
def test_gibbs_is_brute_force_on_any_process(process: dd.Process) -> None:
    """c = O Q_t at a random site; at L = 2 the matrix tells, where invariance would not."""
    world = world_of(3)
    p_t, z = world.marginal(process, 0.5), states(process.states, 2)
    exact = torch.zeros(len(z), len(z), dtype=torch.float64)
    for row, site in ((r, i) for r in range(len(z)) for i in range(2)):
        stride = process.states ** (1 - site)
        targets = row + (torch.arange(process.states) - z[row, site]) * stride
        exact[row, targets] += p_t[targets] / p_t[targets].sum() / 2
    k = T.kernel(S.Gibbs(), process, world.denoiser(process, predicts="loo"), t=0.5)
    torch.testing.assert_close(k, exact, atol=1e-12, rtol=0)
    wrong = T.kernel(S.Gibbs(), process, mislabelled(world, process), t=0.5)
    assert float((wrong - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("process", pairs(2), ids=str)
def test_gibbs_on_pairs_keeps_the_law_and_the_source(process: dd.Process) -> None:
    world = dirichlet(0.8, 4, 2, 3)
    p_t = world.marginal(process, 0.5)
    for predicts in ("loo", "denoiser"):
        k = T.kernel(S.Gibbs(), process, world.denoiser(process, predicts=predicts), t=0.5)
        torch.testing.assert_close(p_t @ k, p_t, atol=1e-12, rtol=0)
    start, end = (k > 0).nonzero(as_tuple=True)
    u = states(4, 3) % 2
    assert (u[start] == u[end]).all()
    assert float((k - torch.eye(len(k))).abs().max()) > 0.3


# --- interpolants between two laws -----------------------------------------------------------------------------------


def coupling() -> T.Coupling:
    # given the source both sites are likely equal, to what the source only leans towards
    joint = np.random.default_rng(8).uniform(0.5, 1.5, (4, 4)) * np.array([[0.5], [0.04], [0.04], [0.4]])
    joint = joint / joint.sum()
    return T.Coupling(torch.as_tensor(joint), vocab_size=2, length=2)


@pytest.mark.parametrize("stochasticity", [0.0, 0.5])
def test_an_interpolant_carries_one_law_to_another(stochasticity: float) -> None:
    """Any coupling of two laws of sequences: from the source's law, the sampler's law tends to the data's."""
    process, laws = dd.Interpolant(2, dd.Linear(), p_uniform=stochasticity), coupling()
    model = laws.denoiser(process)
    kl = []
    for n in (1, 8, 64):
        sampler = dd.Sampler(process, model, S.Ancestral(), steps=n)
        kl.append(T.kl(laws.data.p0, T.law(sampler, initial=laws.initial(process))))
    assert kl[0] > 0.01
    assert kl[2] < kl[1] / 20 < kl[0] / 40
    # a model that is told of independent laws does not know the coupling, and misses
    apart = T.Coupling(torch.outer(laws.data.p0, laws.source.p0), vocab_size=2, length=2).denoiser(process)
    k_true, k_apart = (T.kernel(S.Ancestral(), process, m, t=0.7, s=0.4) for m in (model, apart))
    caught(11, float((k_true - k_apart).abs().max()))


@pytest.mark.parametrize("source", [None, torch.tensor([0.3, 0.7])])
def test_a_couplings_marginal_is_its_own(source: torch.Tensor | None) -> None:
    """log p_t(z, u) against brute force, also where the process has an independent source that would be another law."""
    process, laws = dd.Interpolant(2, dd.Linear(), source, p_uniform=0.4), coupling()
    z, x, kernel = states(4, 2), states(2, 2), process.kernel(0.6)
    exact = torch.zeros(len(z)).double()
    for a, b in ((a, b) for a in range(4) for b in range(4)):
        start = process.join(x[a], x[b])
        exact += laws.joint[a, b] * kernel[start[0], z[:, 0]] * kernel[start[1], z[:, 1]]
    found = laws.log_marginal(process, z, 0.6).exp()
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    apart = T.Coupling(torch.outer(laws.data.p0, laws.source.p0), vocab_size=2, length=2)
    assert float((apart.log_marginal(process, z, 0.6).exp() - exact).abs().max()) > 1e-3, "without the coupling"


def test_interpolant_pairs_follow_their_marginal(failure_rate: float) -> None:
    process = dd.Interpolant(3, dd.Linear(), p_uniform=0.5)
    x0, x1 = torch.zeros(30_000, 1, dtype=torch.int64), torch.ones(30_000, 1, dtype=torch.int64)
    z, u = process.split(process.noised_pair(x0, x1, 0.5).sample())
    assert (u == 1).all()
    mass = float(process.anchored(torch.tensor(0.5).double()))
    rest = (1 - 0.5 - mass) / 3
    count = torch.bincount(z[:, 0], minlength=3)
    assert stats.chisquare(count, 30_000 * np.array([0.5 + rest, mass + rest, rest])).pvalue > failure_rate
    assert stats.chisquare(count, 30_000 * np.array([0.5, 0.5 - rest, rest])).pvalue < failure_rate
    with pytest.raises(ValueError, match="has no source law of its own"):
        process.prior(1, 1)
    out = dd.Sampler(
        process, dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), process, "denoiser"), S.Ancestral(), steps=4
    )
    tokens = out.sample(
        batch=2, length=3, seed=0, initial=process.join(x1[:2].expand(2, 3), x1[:2].expand(2, 3))
    ).tokens
    assert tokens.max() < 3, "tokens, not pairs"


def test_prompts_on_pairs_are_tokens() -> None:
    process = dd.AbsorbingUniform(3, dd.Linear())
    model = strong().denoiser(process)
    out = dd.Sampler(process, model, S.Ancestral(), steps=4).sample(5, seed=0, prompt=[2, 1])
    assert out.tokens[:, :2].tolist() == [[2, 1]] * 5
    law = T.law(
        dd.Sampler(process, world_of(3).denoiser(process), S.Ancestral(), steps=32), prompt=[2, 0], frozen=[True, False]
    )
    conditional = world_of(3).p0.view(3, 3)[2]
    torch.testing.assert_close(law.view(3, 3)[2], conditional / conditional.sum(), atol=1e-10, rtol=0)


# --- clocks of their own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [dd.Masked, dd.Uniform])
def test_a_clock_for_each_site(family: type, failure_rate: float) -> None:
    process = family(3, dd.PerSite(dd.Linear(), torch.tensor([0.9, -0.9])))
    world = world_of(3)
    sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), S.Ancestral(), steps=4)
    law, tokens = T.law(sampler), sampler.sample(40_000, seed=0).tokens
    assert stats.chisquare(torch.bincount(state_index(tokens, 3), minlength=9), 40_000 * law).pvalue > failure_rate
    shared = family(3, dd.Linear())
    other = T.law(dd.Sampler(shared, world.denoiser(shared, predicts="loo"), S.Ancestral(), steps=4))
    assert T.tv(law, other) > 1e-4, "its own clocks make another law"
    fine = dd.Sampler(process, world.denoiser(process, predicts="loo"), S.Ancestral(), steps=64)
    assert T.kl(world.p0, T.law(fine)) < T.kl(world.p0, law) / 20
    with pytest.raises(ValueError, match="a clock for every site"):
        process.kernel(0.5)


# --- conversions at the ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", families(3)[1:4], ids=str)
def test_conversions_hold_at_both_ends(process: dd.Process) -> None:
    """O -> D -> O for alpha from 1e-12 to 1 - 1e-7, in the error that is documented."""
    x = torch.arange(3)[:, None]
    log_o = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log().expand(3, 1, 3)
    for alpha in (0.0, 1e-12, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-7):
        d = dd.Prediction(log_o, "loo", x, alpha, process).denoiser
        assert bool(torch.isfinite(d).all())
        back = dd.Prediction(d, "denoiser", x, alpha, process).loo
        torch.testing.assert_close(back, log_o, atol=1e-12 / (1 - alpha), rtol=0)
        ratio = dd.Prediction(log_o, "loo", x, alpha, process).ratio
        own = ratio.gather(-1, x[..., None])
        torch.testing.assert_close(own, torch.zeros_like(own), atol=0, rtol=0)
        if alpha >= 1e-4 and not isinstance(process, dd.Hybrid):
            from_ratio = dd.Prediction(ratio, "ratio", x, alpha, process).loo.exp()
            torch.testing.assert_close(from_ratio, log_o.exp(), atol=1e-14 / alpha, rtol=0)
    assert dd.Prediction(log_o, "loo", x, 1.0, process).denoiser.exp()[:, 0].tolist() == torch.eye(3).tolist()
    everywhere = torch.ones_like(x, dtype=torch.bool)
    with pytest.raises(ValueError, match="undefined at row 0, position 0"):
        dd.Prediction(log_o, "denoiser", x, 1.0, process)[everywhere].loo.dense()
    with pytest.raises(ValueError, match="carries no information at alpha = 0"):
        dd.Prediction(log_o.new_zeros(3, 1, process.states), "ratio", x, 0.0, process)[everywhere].loo.dense()


def test_the_error_of_a_ratio_grows_as_documented() -> None:
    process, x = dd.Uniform(3, dd.Linear()), torch.arange(3)[:, None]
    log_o = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log().expand(3, 1, 3)
    for alpha in (1e-2, 1e-4):
        ratio = dd.Prediction(log_o, "loo", x, alpha, process).ratio
        noisy = ratio + 1e-7 * torch.tensor([1.0, -1.0, 1.0])
        error = (dd.Prediction(noisy, "ratio", x, alpha, process).loo.exp() - log_o.exp()).abs().max()
        assert 1e-8 < float(error) * alpha < 1e-6


# --- diagnostics of a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", families(3)[1:7], ids=str)
def test_exact_predictions_pass_the_diagnostics(process: dd.Process) -> None:
    world = strong()
    z = states(process.states, 3)
    loo = world.denoiser(process, predicts="loo")
    assert float(diagnostics.loo_sensitivity(loo, z, 0.5).max()) < 1e-12
    cycles = diagnostics.cycle_residual(world.denoiser(process, predicts="ratio"), z, 0.5)
    assert float(torch.stack([cycles.there_and_back, cycles.square]).abs().max()) < 1e-10
    wrong = mislabelled(world, process)
    assert float(diagnostics.loo_sensitivity(wrong, z, 0.5).mean()) > 0.05, "a denoiser looks at its own token"
    assert float(diagnostics.cycle_residual(wrong, z, 0.5).square.abs().max()) > 0.01, (
        "and its ratios are those of no law"
    )


@pytest.mark.parametrize("true", ["loo", "denoiser"])
@pytest.mark.parametrize("declared", ["loo", "denoiser"])
def test_the_sensitivity_shows_what_a_network_learned(true: str, declared: str) -> None:
    """Whatever it is declared to be: the true reading does not move at all, the other does at every alpha."""
    process, world = dd.Uniform(3, dd.Cosine()), strong()

    def network(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        said = world.denoiser(process, predicts="loo").evaluate(x, process.schedule.time(alpha)[:, None])
        return said.loo if true == "loo" else said.denoiser

    model = dd.Denoiser(network, process, predicts=declared, time="alpha", time_dtype=torch.float64)
    curves = diagnostics.sensitivity_curve(model, world.sample(200, seed=0), [0.2, 0.5, 0.8], seed=1)
    assert float(curves[true].max()) < 1e-12
    (other,) = set(curves) - {true}
    mean, error = curves[other].T
    assert (mean > 0.05).all()
    assert (mean > 5 * error).all()


def test_diagnostics_say_what_they_need() -> None:
    exact = strong().denoiser(dd.Uniform(3, dd.Linear()))
    with pytest.raises(ValueError, match=r"alphas must lie in \(0, 1\)"):
        diagnostics.sensitivity_curve(exact, torch.zeros(2, 3, dtype=torch.int64), [0.5, 1.0])
    with pytest.raises(ValueError, match="at least 2 rows"):
        diagnostics.sensitivity_curve(exact, torch.zeros(1, 3, dtype=torch.int64), [0.5])
    masked = strong().denoiser(dd.Masked(3, dd.Linear()))
    with pytest.raises(ValueError, match="tokens can be noise"):
        diagnostics.loo_sensitivity(masked, torch.zeros(1, 3, dtype=torch.int64), 0.5)
    uniform = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), dd.Uniform(3, dd.Linear()), "ratio")
    with pytest.raises(ValueError, match="two sites"):
        diagnostics.cycle_residual(uniform, torch.zeros(1, 1, dtype=torch.int64), 0.5)


# --- large sparse generators -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch says it once, whatever one opts for
def test_a_large_sparse_generator_never_becomes_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of 20,000 states: draws and bridges by uniformization, rows that sum to 1, and no S x S array."""
    size = 20_000
    v = torch.arange(size)
    index = torch.cat([torch.stack([v, (v + 1) % size]), torch.stack([v, (v - 1) % size]), torch.stack([v, v])], 1)
    rates = torch.cat([torch.ones(size), torch.ones(size), torch.full((size,), -2.0)]).double()
    process = dd.General(torch.sparse_coo_tensor(index, rates, (size, size), check_invariants=True), dd.LogLinear(1e-3))
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda self: pytest.fail("made dense"))
    x0 = torch.tensor([[0, 500]])
    x_t = process.marginal(x0, 0.9).sample()
    assert int(((x_t - x0 + size // 2) % size - size // 2).abs().max()) < 40
    x_s = process.bridge(x_t, x0, 0.9, 0.3).sample()
    assert math.isfinite(float(process.bridge(x_t, x0, 0.9, 0.3).log_prob(x_s)))
    row = process._forward(torch.tensor([7]), torch.tensor([0.1]).double())
    assert float(row.sum()) == pytest.approx(1, abs=1e-12)


def test_a_sparse_generator_is_the_dense_one() -> None:
    q = irreversible(5)
    dense, sparse = dd.General(q, dd.Linear()), dd.General(q.to_sparse(), dd.Linear())
    for process in (dense, sparse):
        torch.testing.assert_close(process.pi @ q, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(dense.pi, sparse.pi, atol=1e-12, rtol=0)
    torch.testing.assert_close(dense.kernel(0.9, 0.2), sparse.kernel(0.9, 0.2), atol=1e-12, rtol=0)


# --- size -------------------------------------------------------------------------------------------------------------


def large() -> list[dd.Process]:
    size = 200_000  # S x S float64 would take 320 GB
    pi = torch.full((size,), 1 / size, dtype=torch.float64)
    return [
        dd.Masked(size, dd.Linear()),
        dd.Uniform(size, dd.Linear()),
        dd.Marginal(pi, dd.Linear()),
        dd.Hybrid(size, dd.Linear(), p_uniform=0.3),
        dd.AbsorbingUniform(size, dd.Linear()),
        dd.Interpolant(size, dd.Linear(), pi, p_uniform=0.3),
    ]


@pytest.mark.parametrize("process", large(), ids=lambda p: type(p).__name__)
def test_rank_one_processes_build_no_square(process: dd.Process) -> None:
    x0 = torch.tensor([[3, 199_999]])
    x_t = process.marginal(x0, 0.7).sample()
    x_s = process.bridge(x_t, x0, 0.7, 0.2).sample()
    assert math.isfinite(float(process.bridge(x_t, x0, 0.7, 0.2).log_prob(x_s)))
    assert process.prior(1, 2).sample().shape == (1, 2)
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, process.vocab_size), process, "loo")
    assert model(x_t, 0.7).denoiser.shape == (1, 2, process.vocab_size)
    everywhere = torch.ones_like(x_t, dtype=torch.bool)
    assert model(x_t, 0.7)[everywhere].conditional.dense().shape == (2, process.columns)
    out = dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(), steps=3).sample(1, 2, seed=0)
    assert out.tokens.max() < process.vocab_size
    assert bool(torch.isfinite(losses.ScoreEntropy()(model, x0)).all())


@pytest.mark.parametrize(("process", "size"), ALL, ids=str)
def test_times_may_differ_by_position(process: dd.Process, size: int) -> None:
    """Marginal, bridge and prediction at two times in one call are those of two calls."""
    x0, t, s = torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.9]]).double(), torch.tensor([[0.0, 0.4]]).double()
    x_t = process.marginal(x0, t).sample()
    log_o = torch.randn(1, 2, process.vocab_size, dtype=torch.float64).log_softmax(-1)
    alpha = process.schedule.alpha(t)
    joint = dd.Prediction(log_o, "loo", x_t, alpha, process)
    for i in (0, 1):
        one = slice(i, i + 1)
        at = float(t[0, i]), float(s[0, i])
        pair = x_t[:, one], x0[:, one]
        alone = dd.Prediction(log_o[:, one], "loo", x_t[:, one], alpha[:, one], process)
        torch.testing.assert_close(joint.denoiser[:, one], alone.denoiser, atol=1e-14, rtol=0)
        torch.testing.assert_close(joint.rates[:, one], alone.rates, atol=1e-12, rtol=1e-12)
        whole, part = process.bridge(x_t, x0, t, s).table()[0], process.bridge(*pair, *at).table()[0]
        torch.testing.assert_close(whole[:, one].exp(), part.exp(), atol=1e-13, rtol=0)
