"""Tilted laws: the tilted world, its h, and both forms of Doob's transform, against the listed sequences."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ledger import caught, within
from problems import chain, dirichlet, families, joint, named, pairs, states, strong
from scipy import stats
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory import scan

V, L = 3, 4
NEVER = -math.inf
EVERY = [*families(3), *pairs(3)]
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
SOME = [MASKED, families(3)[3], families(3)[4]]


def logs(*shape: int, seed: int = 5, scale: float = 1.0) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape) * scale)


def laws(*shape: int, seed: int = 0) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.7), size=shape[:-1]))


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference of two arrays of logs, relative to their values; -inf equals -inf alone."""
    assert torch.equal(a == NEVER, b == NEVER)
    finite = b > NEVER
    return float(((a - b)[finite] / b[finite].abs().clamp(min=1)).abs().max()) if bool(finite.any()) else 0.0


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def noisy(world: T.Enumeration, process: dd.Process, t: float, every: int = 1) -> Tensor:
    """States that the world can be in at a time."""
    return states(process.states, world.length)[world.reachable(process, t)][::every]


# --- a listed world ---------------------------------------------------------------------------------------------------


def conditional_mean(world: T.Enumeration, process: dd.Process, times: list[float], w: Tensor) -> Tensor:
    """E[W | z] by the definition; nan where p(z) = 0."""
    both = joint(world, process, times)
    return (w[:, None] * both).sum(0) / both.sum(0)


def test_the_tilted_world_is_p0_w_over_z() -> None:
    world, log_w = strong(), logs(27)
    log_w[[0, 5]] = NEVER
    goal = world.p0 * log_w.exp() / (world.p0 * log_w.exp()).sum()
    within("tilted", gap(world.tilted(log_w).p0, goal), 1e-15)
    within("tilted", gap(world.tilted(log_w - 900).p0, goal), 1e-13)  # whose weights are all below 1e-300
    within("tilted", gap(world.tilted(torch.full((27,), 3.0)).p0, world.p0), 1e-15)
    caught("tilted", gap(world.tilted(2 * log_w).p0, goal), 0.01)


@pytest.mark.parametrize("process", EVERY, ids=named)
def test_h_is_the_conditional_mean(process: dd.Process) -> None:
    world, log_w = dirichlet(0.5, 3, 3, 2), logs(9)
    z, h = states(process.states, 2), world.log_h(process, log_w)
    for times in ([0.6, 0.6], [0.2, 0.2], [0.9, 0.3]):
        mean = conditional_mean(world, process, times, log_w.exp())
        seen = ~mean.isnan()
        t = times[0] if times[0] == times[1] else torch.tensor(times, dtype=torch.float64).expand(len(z), 2)
        found = h(z, t)
        assert found.dtype == torch.float64
        within("log_h", far(found[seen], mean[seen].log()), 1e-13)
        caught("log_h", gap(found[seen], conditional_mean(world, process, times[::-1], log_w.exp() ** 2)[seen].log()))
    if process.pairs is None:
        row = h(z, torch.full((len(z),), 0.6, dtype=torch.float64))
        assert torch.equal(row, h(z, 0.6)), "a time for each row"


@pytest.mark.parametrize("process", EVERY, ids=named)
def test_the_ends_of_h(process: dd.Process) -> None:
    """W at time 0, log Z where all is noise; a constant tilt is its constant, and a factor adds its log."""
    world, log_w = strong(), logs(27)
    h, x = world.log_h(process, log_w), process.data_tokens[states(3, 3)]
    clean = process.place(x, process.prior(27, 3).sample())
    within("ends of h", gap(h(clean, 0.0), log_w), 1e-14)
    log_z = float((world.p0.log() + log_w).logsumexp(0))
    if float(process.schedule.alpha(1.0)) == 0 and process.pairs is None:
        within(
            "ends of h",
            gap(h(process.prior(50, 3).sample(), 1.0), torch.full((50,), log_z, dtype=torch.float64)),
            1e-14,
        )
    z = process.marginal(x, 0.6).sample()
    constant = world.log_h(process, torch.full((27,), -2.5))
    within("ends of h", gap(constant(z, 0.6), torch.full((27,), -2.5)), 1e-14)
    within("ends of h", gap(world.log_h(process, log_w - 700)(z, 0.6), h(z, 0.6) - 700), 1e-12)
    caught("ends of h", gap(h(z, 0.6), torch.full((27,), log_z)), 1e-2)


def neighbours(process: dd.Process, z: Tensor) -> Tensor:
    """(N, L, C, L): every state with one site changed."""
    other = z[:, None, None].repeat(1, z.shape[1], process.columns, 1)
    for i in range(z.shape[1]):
        other[:, i, :, i] = process.place(torch.arange(process.columns), z[:, i, None])
    return other


def doob_noisy(law: T.Oracle, process: dd.Process, log_h: Callable[..., Tensor], z: Tensor, t: float) -> Tensor:
    """O' from c'(v) ~ c(v) h(z with z_i = v) and the site's transition matrix."""
    n, length, log_o = len(z), z.shape[1], law.denoiser(process, "loo")(z, t).loo
    alpha = process.schedule.alpha(torch.tensor(t, dtype=torch.float64)).expand(z.shape).flatten()
    log_c = process.conditional(log_o.flatten(0, 1), z.flatten(), alpha).unflatten(0, (n, length))
    h = log_h(neighbours(process, z).flatten(0, 2), t).view(n, length, -1)
    o = process.conditional_to_loo((log_c + h).softmax(-1).flatten(0, 1), z.flatten(), alpha)
    return (o / o.sum(-1, keepdim=True)).unflatten(0, (n, length))


def doob_clean(law: T.Oracle, process: dd.Process, log_g: Callable[..., Tensor], z: Tensor, t: float) -> Tensor:
    """O' ~ O E[W | z, x0_i = v]."""
    return (law.denoiser(process, "loo")(z, t).loo + log_g(z, t)).softmax(-1)


@pytest.mark.parametrize("process", EVERY, ids=named)
def test_doob_both_ways_is_the_tilted_world(process: dd.Process) -> None:
    world, log_w = strong(), logs(27)
    z = states(process.states, 3)[:: 1 if process.pairs is None else 7]
    for t in (0.2, 0.6):
        goal = world.tilted(log_w).denoiser(process, "loo")(z, t).loo.exp()
        within("clean values", gap(doob_clean(world, process, world.log_clean(process, log_w), z, t), goal), 1e-15)
        within("noisy neighbours", gap(doob_noisy(world, process, world.log_h(process, log_w), z, t), goal), 1e-14)
        scaled, constant = log_w + 7, torch.full((27,), 3.0)
        within("clean values", gap(doob_clean(world, process, world.log_clean(process, scaled), z, t), goal), 2e-15)
        plain = world.denoiser(process, "loo")(z, t).loo.exp()
        within("clean values", gap(doob_clean(world, process, world.log_clean(process, constant), z, t), plain), 2e-15)
        if process.absorbing and process.pairs is None:
            continue  # a revealed token leaves the noisy neighbours no part of the clean ones' fault below
        wrong = world.log_h(process, 2 * log_w)
        caught("noisy neighbours", gap(doob_noisy(world, process, wrong, z, t), goal), 0.01)
        caught("clean values", gap(plain, goal), 0.01)


@pytest.mark.parametrize("process", EVERY, ids=named)
def test_clean_values_are_the_conditional_mean(process: dd.Process) -> None:
    """By the definition: the mean of W over sequences with x_i = v, weighed by the other sites' evidence."""
    world, log_w, t = dirichlet(0.5, 3, 3, 2), logs(9), 0.4
    z, x = states(process.states, 2), states(3, 2)
    found = world.log_clean(process, log_w)(z, t)
    assert found.shape == (len(z), 2, process.vocab_size)
    like = process.marginals(t).T[z]  # (N, L, n)
    for site in range(2):
        p = world.p0 * like[:, 1 - site][:, x[:, 1 - site]]
        for rank, token in enumerate(process.data_tokens.tolist()):
            p_v = p * (x[:, site] == rank)
            known = p_v.sum(-1) > 0
            mean = (p_v @ log_w.exp() / p_v.sum(-1)).log()
            within("log_clean", far(found[known, site, token], mean[known]), 1e-13)
            assert (found[~known, site, token] == NEVER).all()
            caught("log_clean", gap(found[known, 1 - site, token], mean[known]))
    if process.mask_id is not None and process.mask_id < process.vocab_size:
        assert (found[..., process.mask_id] == NEVER).all()


def reverse_kernel(world: T.Enumeration, process: dd.Process, t: float, s: float) -> Tensor:
    """q(z_s | z_t) = p_s(z_s) q_{t|s}(z_t | z_s) / p_t(z_t), all sites jointly; rows of p_t = 0 are nan."""
    step = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(world.length):
        step = torch.kron(step, process.kernel(t, s))
    return (world.marginal(process, s)[:, None] * step).T / world.marginal(process, t)[:, None]


@pytest.mark.parametrize("process", EVERY, ids=named)
def test_h_is_a_martingale_of_the_exact_reverse_process(process: dd.Process) -> None:
    """E over one reverse step of h_s is h_t, and the kernel times h_s / h_t is the tilted world's."""
    world, log_w = dirichlet(0.5, 3, 3, 2), logs(9)
    h, z = world.log_h(process, log_w), states(process.states, 2)
    for t, s in ((0.9, 0.7), (0.5, 0.2), (0.6, 0.0)):
        k, seen, now = reverse_kernel(world, process, t, s), world.reachable(process, t), h(z, t).exp()
        earlier = torch.where(world.marginal(process, s) > 0, h(z, s).exp(), 0.0)
        within("martingale", gap((k @ earlier)[seen], now[seen]), 1e-13)
        goal = reverse_kernel(world.tilted(log_w), process, t, s)
        within("martingale", gap((k * earlier / now[:, None])[seen], goal[seen]), 1e-13)
        caught("martingale", gap((k @ earlier**2)[seen].sqrt(), now[seen]), 1e-4)


@pytest.mark.parametrize("process", families(3), ids=named)
def test_h_is_a_martingale_of_an_enumerated_step(process: dd.Process) -> None:
    """With one site an ancestral step is the exact reverse step; with two it moves the sites independently."""
    for length in (1, 2):
        world, log_w = dirichlet(0.5, 3, 3, length), logs(3**length)
        z, h = states(process.states, length), world.log_h(process, log_w)
        model, seen = world.denoiser(process), world.reachable(process, 0.8)
        step = T.kernel(S.Ancestral(), process, model, 0.8, 0.4) @ h(z, 0.4).exp()
        error = gap(step[seen], h(z, 0.8).exp()[seen])
        if length == 1:
            within("enumerated martingale", error, 1e-13)
        else:
            caught("enumerated martingale", error, 1e-3)


@pytest.mark.parametrize("process", SOME, ids=named)
def test_impossible_states_get_minus_infinity_and_harm_no_neighbour(process: dd.Process) -> None:
    """A world with zeros and a tilt with zeros: Doob is still the tilted world, wherever that one can be."""
    p0, log_w = strong().p0.clone(), logs(27)
    p0[states(3, 3)[:, 0] == states(3, 3)[:, 1]] = 0
    log_w[states(3, 3)[:, 2] == 1] = NEVER
    world = T.Enumeration(p0 / p0.sum(), vocab_size=3, length=3)
    tilted, z = world.tilted(log_w), states(process.states, 3)
    h, g = world.log_h(process, log_w), world.log_clean(process, log_w)
    for t in (0.0, 0.5, 1.0):
        found, able = h(z, t), tilted.reachable(process, t)
        assert not found.isnan().any()
        assert torch.equal(found > NEVER, able), "-inf where p_t = 0 or E[W | z] = 0, and nowhere else"
        if 0 < t < 1:
            goal = tilted.denoiser(process, "loo")(z[able], t).loo.exp()
            within("zeros", gap(doob_clean(world, process, g, z[able], t), goal), 1e-14)
            within("zeros", gap(doob_noisy(world, process, h, z[able], t), goal), 1e-13)
            caught("zeros", gap(world.denoiser(process, "loo")(z[able], t).loo.exp(), goal), 0.1)
    if process.absorbing:
        assert not world.reachable(process, 0.5).all()


# --- chains, mixtures, trees ------------------------------------------------------------------------------------------

# Words over 0..2 by their number of 1s and where they end: weights for some last states, none for others.
COUNT = T.Automaton(torch.tensor([[0, 1, 0], [1, 2, 1], [2, 2, 0]]), torch.tensor([0.0, NEVER, 0.7]).double(), start=0)


def markov(length: int = L) -> T.MarkovChain:
    return chain(V, length)


def hmm(length: int = L) -> T.HMM:
    return T.HMM(laws(1, 2)[0], laws(2, 2, seed=1), laws(2, V, seed=2), length)


def constrained(length: int = L) -> T.ConstrainedChain:
    return T.ConstrainedChain(chain(V, length), torch.tensor([[0, 1, 0], [1, 0, 1]]), accepting={0})


def mixture(length: int = L) -> T.ProductMixture:
    theta = laws(3, length, V, seed=6)
    theta[0, 1] = torch.tensor([1.0, 0, 0])
    return T.ProductMixture(laws(1, 3, seed=5)[0], theta)


def tree(length: int = L) -> T.Tree:
    parents = [-1, 0, 0, 1] if length == L else [-1, *(i // 3 for i in range(length - 1))]
    return T.Tree(parents, laws(1, V, seed=3)[0], laws(length, V, V, seed=4))


def product(length: int = L) -> T.Tilt:
    sites = logs(length, V, seed=1)
    sites[2, 1] = NEVER
    return T.Tilt(sites)


def neighbouring(length: int = L) -> T.Tilt:
    table = logs(length - 1, V, V, seed=2)
    table[1, 0, 2] = NEVER
    return T.Tilt(pairs=table)


def both(length: int = L) -> T.Tilt:
    return T.Tilt(product(length).sites, neighbouring(length).pairs)


def accepted(length: int = L) -> T.Tilt:
    return T.Tilt(automaton=COUNT)


def everything(length: int = L) -> T.Tilt:
    return T.Tilt(product(length).sites, neighbouring(length).pairs, COUNT)


CHAINS = [markov, hmm, constrained, mixture]
TILTS = [product, neighbouring, both, accepted, everything]
CASES = [*((law, tilt) for law in CHAINS for tilt in TILTS), (tree, product)]
cases = pytest.mark.parametrize(("make", "tilt"), CASES, ids=[f"{law.__name__}-{tilt.__name__}" for law, tilt in CASES])
Law, Weight = Callable[..., T.Oracle], Callable[..., T.Tilt]


def listed(law: T.Oracle) -> T.Enumeration:
    p = law.log_prob(states(V, L)).exp()
    return T.Enumeration(p / p.sum(), vocab_size=V, length=L)


def weight(tilt: T.Tilt, x: list[int]) -> float:
    """Log W of one sequence, by the definition."""
    total = 0.0
    if tilt.sites is not None:
        total += sum(float(tilt.sites[i, v]) for i, v in enumerate(x))
    if tilt.pairs is not None:
        total += sum(float(tilt.pairs[i, x[i], x[i + 1]]) for i in range(len(x) - 1))
    if tilt.automaton is not None:
        q = tilt.automaton.start
        for v in x:
            q = int(tilt.automaton.moves[q, v])
        total += float(tilt.automaton.log_accept[q])
    return total


@pytest.mark.parametrize("tilt", TILTS, ids=lambda tilt: tilt.__name__)
def test_a_tilt_weighs_sequences_by_its_definition(tilt: Weight) -> None:
    x = states(V, L)
    goal = torch.tensor([weight(tilt(), row) for row in x.tolist()], dtype=torch.float64)
    within("tilt", far(tilt()(x), goal), 1e-15)
    caught("tilt", gap(tilt()(x).exp(), tilt()(x.flip(1)).exp()), 0.1)
    world = strong()
    log_w = T.Tilt(logs(3, 3), logs(2, 3, 3, seed=8), COUNT)
    within("tilt", gap(world.tilted(log_w).p0, world.tilted(log_w(states(3, 3))).p0), 1e-16)


@cases
def test_tilted_chains_are_the_tilted_world(make: Law, tilt: Weight) -> None:
    """Law, predictions, h and clean values, of every state and for times of rows and of sites."""
    law, w = make(), tilt()
    world, tilted = listed(law), law.tilted(w)
    goal = world.tilted(torch.tensor([weight(w, x) for x in states(V, L).tolist()], dtype=torch.float64))
    within("tilted chains", gap(tilted.log_prob(states(V, L)).exp(), goal.p0), 1e-14)
    caught("tilted chains", gap(law.log_prob(states(V, L)).exp(), goal.p0), 1e-3)
    for process in SOME:
        z = states(process.states, L)[::3]
        for t in (0.3, torch.rand(len(z), L, dtype=torch.float64)):
            for call in ("log_h", "log_clean"):
                fast, slow = (getattr(x, call)(process, w)(z, t) for x in (law, world))
                within("tilted chains", far(fast, slow), 1e-12)
            fast, slow = (x.denoiser(process, "loo")(z, t).loo.exp() for x in (tilted, goal))
            within("tilted chains", gap(fast, slow), 1e-12)
            caught("tilted chains", gap(law.denoiser(process, "loo")(z, t).loo.exp(), slow), 1e-3)
        fast, slow = (x.log_marginal(process, z, 0.3) for x in (tilted, goal))
        within("tilted chains", far(fast, slow), 1e-12)


def test_kinds_are_kept_where_they_are_closed() -> None:
    for make, tilt in CASES:
        kept = T.WeightedChain
        if make in {product: (markov, mixture, tree), neighbouring: (markov,), both: (markov,)}.get(tilt, ()):
            kept = type(make())
        assert type(make().tilted(tilt())) is kept, (make, tilt)
    sites = product().sites
    for make in (*CHAINS, tree):
        x = states(V, L)
        assert torch.equal(make().tilted(sites).log_prob(x), make().tilted(T.Tilt(sites)).log_prob(x))


@pytest.mark.parametrize("make", [markov, hmm, mixture, tree], ids=lambda make: make.__name__)
def test_a_tilt_of_a_tilt_is_their_product(make: Law) -> None:
    one, two = product(), T.Tilt(logs(L, V, seed=9))
    twice = make().tilted(one).tilted(two).log_prob(states(V, L)).exp()
    within("twice", gap(twice, make().tilted(T.Tilt(one.sites + two.sites)).log_prob(states(V, L)).exp()), 1e-14)
    caught("twice", gap(twice, make().tilted(one).log_prob(states(V, L)).exp()), 1e-2)


@pytest.mark.parametrize("make", [*CHAINS, tree], ids=lambda make: make.__name__)
def test_constants_and_factors_of_chains(make: Law) -> None:
    law, z = make(), UNIFORM.marginal(make().sample(20, seed=0), 0.5).sample()
    constant = torch.full((L, V), 0.25, dtype=torch.float64)
    within("factor", gap(law.log_h(UNIFORM, constant)(z, 0.5), torch.ones(20).double()), 1e-14)
    within("factor", gap(law.tilted(constant).log_prob(states(V, L)).exp(), law.log_prob(states(V, L)).exp()), 1e-15)
    h, scaled = (law.log_h(UNIFORM, product().sites + shift)(z, 0.5) for shift in (0.0, -300.0))
    within("factor", gap(scaled, h - 1200), 1e-11)
    caught("factor", gap(h, torch.zeros(20)), 0.1)


@pytest.mark.parametrize(
    ("make", "tilt"), [(markov, both), (markov, everything), (mixture, accepted)], ids=["chain", "automaton", "mixture"]
)
def test_draws_follow_the_tilted_posterior(make: Law, tilt: Weight, failure_rate: float) -> None:
    law, z = make().tilted(tilt()), torch.tensor([[0, 2, 0, 2]])
    x, p = states(V, L), law.log_prob(states(V, L)).exp()
    like = torch.stack([UNIFORM.kernel(0.7)[x[:, i], z[0, i]] for i in range(L)]).prod(0)
    drawn = law.posterior(UNIFORM, z.expand(20_000, -1), 0.7, seed=0)
    count = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81).double()
    for posterior, right in ((p * like / (p * like).sum(), True), (p / p.sum(), False)):
        possible = posterior > 0
        assert count[~possible].sum() == 0
        rare = posterior < 5e-4
        seen, expected = (
            torch.cat([v[possible & ~rare], v[possible & rare].sum()[None]]) for v in (count, 20_000 * posterior)
        )
        keep = expected > 0
        assert (
            stats.chisquare(seen[keep], expected[keep] * seen.sum() / expected.sum()).pvalue > failure_rate
        ) == right
    assert torch.equal(drawn, law.posterior(UNIFORM, z.expand(20_000, -1), 0.7, seed=0))


def test_a_chain_with_a_matrix_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments, long draws in both ways of drawing, an automaton on it, and the test that needs one matrix."""
    law = markov().tilted(both())
    p, log_p = (f(law.log_prob(states(V, L))) for f in (torch.exp, lambda x: x.clamp(min=-1e6)))
    mean = float((p * log_p).sum())
    found = law.log_prob_moments()
    within("inhomogeneous", abs(found[0] - mean), 1e-13)
    within("inhomogeneous", abs(found[1] - float((p * (log_p - mean) ** 2).sum())), 1e-13)
    caught("inhomogeneous", abs(markov().log_prob_moments()[0] - mean), 0.1)
    even = T.ConstrainedChain(law, torch.tensor([[0, 1, 0], [1, 0, 1]]), accepting={0})
    goal = p * ((states(V, L) == 1).sum(-1) % 2 == 0)
    within("inhomogeneous", gap(even.log_prob(states(V, L)).exp(), goal / goal.sum()), 1e-14)
    long = markov(300).tilted(both(300))
    drawn = long.sample(5, seed=0)
    monkeypatch.setattr(scan, "_SHORT", 10**6)
    assert torch.equal(long.sample(5, seed=0), drawn)
    with pytest.raises(ValueError, match="one transition matrix"):
        T.fit.transition_test(long, drawn)


@pytest.mark.parametrize("make", [*CHAINS, tree], ids=lambda make: make.__name__)
@pytest.mark.parametrize("length", [1, 2])
def test_one_and_two_sites(make: Law, length: int) -> None:
    law, x = (
        make(length) if make is not mixture else T.ProductMixture(laws(1, 3)[0], laws(3, length, V)),
        states(V, length),
    )
    terms = {"sites": logs(length, V)}
    if make is not tree:
        terms |= {"pairs": logs(length - 1, V, V, seed=8), "automaton": COUNT}
    p, w = law.log_prob(x).exp(), T.Tilt(**terms)
    goal = p * w(x).exp() / (p * w(x).exp()).sum()
    for tilted in (law.tilted(w), law.tilted(w).tilted(logs(length, V) * 0)):
        within("short", gap(tilted.log_prob(x).exp(), goal), 1e-14)
    if make is not tree:
        only = T.Tilt(terms["sites"], terms["pairs"])
        goal = p * only(x).exp() / (p * only(x).exp()).sum()
        within("short", gap(law.tilted(only).log_prob(x).exp(), goal), 1e-14)
    caught("short", gap(p, goal), 1e-2)
    mean = (p * w(x).exp()).sum().log()
    within("short", abs(float(law.log_h(MASKED, w)(torch.full((1, length), 3), 1.0) - mean)), 1e-14)


@pytest.mark.parametrize("tilt", [both, everything], ids=lambda tilt: tilt.__name__)
def test_float32_is_float64_to_its_precision(tilt: Weight) -> None:
    law = markov().tilted(tilt())
    z = MASKED.marginal(law.sample(30, seed=0), 0.5).sample()
    single = law.to(dtype=torch.float32).denoiser(MASKED)(z, 0.5).logits
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.exp().double(), law.denoiser(MASKED)(z, 0.5).logits.exp(), atol=5e-6, rtol=0)


# --- thousands of sites -----------------------------------------------------------------------------------------------


def transfer(c: T.MarkovChain, tilt: T.Tilt | None, log_e: np.ndarray) -> list[np.ndarray]:
    """Log matrices of one row of evidence (L, V) whose product is the sum, over (automaton state, token)."""
    length, size = c.length, c.alphabet
    machine = None if tilt is None else tilt.automaton
    moves = np.zeros((1, size), dtype=int) if machine is None else machine.moves.numpy()
    last = np.zeros(1) if machine is None else machine.log_accept.numpy()
    with np.errstate(divide="ignore"):
        initial, step = np.log(c.initial.numpy()), np.log(c.transition.numpy())
    own = log_e + (0 if tilt is None or tilt.sites is None else tilt.sites.numpy())
    extra = np.zeros((length - 1, size, size)) if tilt is None or tilt.pairs is None else tilt.pairs.numpy()
    places = [(q, v) for q in range(len(moves)) for v in range(size)]
    index = {place: k for k, place in enumerate(places)}
    first = np.full((1, len(places)), NEVER)
    for v in range(size):
        start = 0 if machine is None else machine.start
        first[0, index[int(moves[start, v]), v]] = initial[v] + own[0, v]
    found = [first]
    for i in range(1, length):
        matrix = np.full((len(places), len(places)), NEVER)
        for (q, v), k in index.items():
            for w in range(size):
                matrix[k, index[int(moves[q, w]), w]] = step[v, w] + extra[i - 1, v, w] + own[i, w]
        found.append(matrix)
    return [*found, np.array([[last[q]] for q, _ in places])]


def multiplied(matrices: list[np.ndarray]) -> float:
    """The log of their product, halves first: another order of sums than forward messages."""
    if len(matrices) == 1:
        return matrices[0]
    half = len(matrices) // 2
    a, b = multiplied(matrices[:half]), multiplied(matrices[half:])
    together = a[:, :, None] + b[None]
    top = together.max(1)
    safe = np.where(top > NEVER, top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(together - safe[:, None]).sum(1)) + safe


@pytest.mark.parametrize("tilt", [product, both, accepted, everything], ids=lambda tilt: tilt.__name__)
def test_h_of_2000_sites_is_another_computation(tilt: Weight) -> None:
    c, w = markov(2000), tilt(2000)
    z = UNIFORM.marginal(c.sample(1, seed=0), 0.6).sample()
    found = float(c.log_h(UNIFORM, w)(z, 0.6))
    alpha = UNIFORM.schedule.alpha(torch.full((1, 2000), 0.6, dtype=torch.float64))
    log_e = UNIFORM.evidence(z, alpha).log()[0].numpy()
    goal = (multiplied(transfer(c, w, log_e)) - multiplied(transfer(c, None, log_e))).item()
    assert math.isfinite(goal)
    within("2000 sites", abs(found - goal) / max(1, abs(goal)), 1e-11)
    machine = None if w.automaton is None else T.Automaton(COUNT.moves, COUNT.log_accept.flip(0))
    wrong = T.Tilt(None if w.sites is None else w.sites.roll(1, 0), w.pairs, machine)
    caught("2000 sites", abs(float(c.log_h(UNIFORM, wrong)(z, 0.6)) - goal), 1e-3)


@pytest.mark.parametrize("tilt", [product, both, accepted, everything], ids=lambda tilt: tilt.__name__)
def test_predictions_of_2000_sites_agree(tilt: Weight) -> None:
    """Clean values and the tilted chain's own prediction come from different sums, one in logs and one not."""
    c, w = markov(2000), tilt(2000)
    law, process = c.tilted(w), UNIFORM
    x = law.sample(2, seed=0)
    assert torch.isfinite(law.log_prob(x)).all()
    assert torch.isfinite(w(x)).all()
    z = process.marginal(x, 0.5).sample()
    goal = law.denoiser(process, "loo")(z, 0.5).loo.exp()
    within("2000 sites", gap(doob_clean(c, process, c.log_clean(process, w), z, 0.5), goal), 1e-11)
    end = x.clone()
    end[:, -1] = (end[:, -1] + 1) % 3
    ratio = law.log_prob(end) - law.log_prob(x)
    direct = c.log_prob(end) - c.log_prob(x) + w(end) - w(x)
    within("2000 sites", far(ratio, direct), 1e-10)
    caught("2000 sites", gap(c.denoiser(process, "loo")(z, 0.5).loo.exp(), goal), 1e-2)


def test_h_of_50_sites_in_exact_arithmetic() -> None:
    """Weights from e^-900 to e^900, which no double holds, in 60 digits; one state is all shown."""
    from mpmath import mp, mpf

    c = markov(50)
    w = T.Tilt(logs(50, 3, seed=3, scale=300.0), logs(49, 3, 3, seed=4, scale=300.0), COUNT)
    z = MASKED.marginal(c.sample(4, seed=1), 0.5).sample()
    z[0] = torch.tensor([0, 0, 2, 0, 2] * 10)  # all is shown, the tilt likes it or not
    assert float(w(z[:1])) < -800 or float(w(z[:1])) > 800
    found = c.log_h(MASKED, w)(z, 0.5)
    moves, last = COUNT.moves.tolist(), COUNT.log_accept.tolist()
    with mp.workdps(60):
        a, begin = ([mpf(v) for v in row] for row in (c.transition.flatten().tolist(), c.initial.tolist()))

        def total(row: list[int], tilted: bool) -> mpf:
            sums = {(0, -1): mpf(1)}
            for i, shown in enumerate(row):
                new: dict[tuple[int, int], mpf] = {}
                for (q, v), mass in sums.items():
                    for u in range(3) if shown == 3 else [shown]:
                        one = mass * (begin[u] if v < 0 else a[3 * v + u])
                        if tilted:
                            one *= mp.exp(mpf(float(w.sites[i, u])))
                            one *= 1 if v < 0 else mp.exp(mpf(float(w.pairs[i - 1, v, u])))
                        place = (moves[q][u], u)
                        new[place] = new.get(place, mpf(0)) + one
                sums = new
            return sum(mass * (mp.exp(mpf(last[q])) if tilted else 1) for (q, _), mass in sums.items())

        goal = [mp.log(total(row, True) / total(row, False)) for row in z.tolist()]
        errors = [abs((mpf(v) - u) / u) for v, u in zip(found.tolist(), goal, strict=True)]
    within("50 sites", float(max(errors)), 1e-14)
    caught("50 sites", abs(float(c.log_h(MASKED, T.Tilt(w.sites, w.pairs))(z[1:2], 0.5)) - float(goal[1])), 1e-3)


def test_a_language_of_one_word_in_2000_sites() -> None:
    """The accepted word has probability e^-850, less than any double: nothing underflows."""
    c = markov(2000)
    only = T.Tilt(automaton=T.Automaton(torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([0.0, NEVER])))
    word = torch.zeros(1, 2000, dtype=torch.int64)
    log_z, hidden = float(c.log_prob(word)), torch.full((1, 2000), 3)
    assert log_z < -800
    within("one word", abs(float(c.log_h(MASKED, only)(hidden, 1.0)) / log_z - 1), 1e-13)
    law = c.tilted(only)
    assert torch.equal(law.sample(2, seed=0), word.expand(2, -1))
    within("one word", abs(float(law.log_prob(word))), 1e-9)
    within("one word", gap(law.denoiser(MASKED)(hidden, 1.0).logits.exp()[..., 0], torch.ones(1, 2000)), 1e-12)
    other = hidden.clone()
    other[0, 1000] = 1
    assert float(c.log_h(MASKED, only)(other, 0.5)) == NEVER
    caught("one word", abs(float(c.log_h(MASKED, T.Tilt(automaton=COUNT))(hidden, 1.0)) / log_z - 1), 0.1)


def test_components_that_never_mix_are_not_lost() -> None:
    """Two components, one better by e^1500 on the first half and the other by e^1400 on the second."""
    theta = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]]).double()[:, None].expand(-1, 2000, -1)
    law = T.ProductMixture(torch.tensor([0.5, 0.5]), theta)
    sticky = law.tilted(T.Tilt(pairs=torch.zeros(1999, 3, 3)))
    z = torch.tensor([[0] * 1100 + [1] * 900])
    a, b = (x.denoiser(UNIFORM, "loo")(z, 0.05).loo.exp() for x in (law, sticky))
    within("mixture", gap(a, b), 1e-9)
    caught("mixture", gap(a, law.denoiser(UNIFORM, "loo")(z.flip(1), 0.05).loo.exp()) + float(a[0, :, 1].min()), 1e-3)


# --- errors -----------------------------------------------------------------------------------------------------------

WORLD = T.Enumeration(torch.full((9,), 1 / 9), vocab_size=3, length=2)
ZEROS = torch.zeros(4, 3)
ONE = T.Automaton(torch.zeros(1, 3).long(), torch.zeros(1))
REFUSED: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("shape", lambda: WORLD.tilted(torch.zeros(8)), ValueError, r"log_w must be \(9,\) = \(V\*\*L,\), or a Tilt"),
    ("two axes", lambda: WORLD.log_h(UNIFORM, torch.zeros(3, 3)), ValueError, r"got shape \(3, 3\)"),
    ("nan", lambda: WORLD.tilted([0.0] * 8 + [math.nan]), ValueError, r"finite or -inf; at index \[8\] it holds nan"),
    ("inf", lambda: WORLD.tilted([math.inf] + [0.0] * 8), ValueError, r"at index \[0\] it holds inf"),
    ("nothing", lambda: WORLD.tilted(torch.full((9,), NEVER)), ValueError, "Z = 0"),
    ("nothing, h", lambda: WORLD.log_h(UNIFORM, torch.full((9,), NEVER)), ValueError, "Z = 0"),
    ("text", lambda: WORLD.tilted("w"), TypeError, "log_w must be an array of numbers"),
    ("no tilt", lambda: WORLD.tilted(None), TypeError, "log_w must be"),
    ("length", lambda: WORLD.tilted(T.Tilt(ZEROS)), ValueError, "for 3 tokens and 2 sites"),
    ("process", lambda: WORLD.log_h(dd.Uniform(4, dd.Linear()), torch.zeros(9)), ValueError, "4 data tokens"),
    ("states", lambda: WORLD.log_h(UNIFORM, torch.zeros(9))(torch.zeros(1, 3).long(), 0.5), ValueError, "length 2"),
    ("time", lambda: WORLD.log_h(UNIFORM, torch.zeros(9))(torch.zeros(1, 2).long(), 1.5), ValueError, "time"),
    (
        "coupling",
        lambda: T.Coupling(torch.eye(4) / 4, vocab_size=2, length=2).tilted(torch.zeros(4)),
        TypeError,
        "Coupl",
    ),
    ("chain", lambda: markov().tilted(torch.zeros(81)), ValueError, r"\(4, 3\) = \(L, V\), or a Tilt"),
    ("chain, nan", lambda: markov().tilted(ZEROS * math.nan), ValueError, "finite or -inf"),
    ("chain, none", lambda: markov().tilted(None), TypeError, "log_w must be"),
    ("chain, nothing", lambda: markov().tilted(ZEROS + NEVER), ValueError, "Z = 0"),
    ("mixture, nothing", lambda: mixture().log_h(UNIFORM, ZEROS + NEVER), ValueError, "Z = 0"),
    ("tree, nothing", lambda: tree().tilted(ZEROS + NEVER), ValueError, "Z = 0"),
    ("tree, pairs", lambda: tree().tilted(neighbouring()), ValueError, "a product over sites"),
    ("tree, automaton", lambda: tree().log_h(UNIFORM, T.Tilt(ZEROS, automaton=ONE)), ValueError, "sites alone"),
    ("empty", lambda: T.Tilt(), ValueError, "at least one of"),
    ("sites", lambda: T.Tilt(torch.zeros(3)), ValueError, r"sites must be \(L, V\)"),
    ("pairs", lambda: T.Tilt(pairs=torch.zeros(3, 3)), ValueError, r"pairs must be \(L-1, V, V\)"),
    ("pairs, inf", lambda: T.Tilt(pairs=torch.zeros(3, 3, 3) + math.inf), ValueError, "finite or -inf"),
    ("disagree", lambda: T.Tilt(ZEROS, torch.zeros(1, 3, 3)), ValueError, r"\(4, 3\) and \(2, 3\)"),
    ("tokens", lambda: T.Tilt(torch.zeros(4, 2), automaton=ONE), ValueError, r"number of tokens: \[2, 3\]"),
    ("automaton", lambda: T.Tilt(automaton=[[0]]), TypeError, "must be an Automaton"),
    ("called", lambda: T.Tilt(ZEROS)(torch.zeros(1, 2).long()), ValueError, "must have length 4"),
    ("moves", lambda: T.Automaton([[0, 2]], [0.0]), ValueError, r"states in 0\.\.0"),
    ("moves, shape", lambda: T.Automaton([0, 0], [0.0]), ValueError, r"\(Q, V\) states"),
    ("accept", lambda: T.Automaton([[0, 0]], [0.0, 0.0]), ValueError, r"log_accept must be \(1,\)"),
    ("start", lambda: T.Automaton([[0, 0]], [0.0], start=1), ValueError, "start must lie in 0..0"),
    ("tables", lambda: T.WeightedChain([0.0], [[[0.0]]], [[[0.0]]] * 3, 4), ValueError, r"\(1 or L, H, n\)"),
    ("final", lambda: T.WeightedChain([0.0], [[[0.0]]], [[[0.0]]], 4, [0.0, 0.0]), ValueError, r"final must be \(1,\)"),
]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("call", "kind", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_bad_tilts_are_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.usefixtures("as_user")
def test_lists_and_arrays_are_tilts_too() -> None:
    log_w = logs(9)
    for given in (log_w.tolist(), log_w.numpy()):
        assert torch.equal(WORLD.tilted(given).p0, WORLD.tilted(log_w).p0)
    sites = logs(L, V)
    assert torch.equal(markov().tilted(sites.tolist()).transition, markov().tilted(sites).transition)
    assert torch.equal(T.Tilt(sites.numpy())(states(V, L)), T.Tilt(sites)(states(V, L)))


def test_tilts_tell_what_they_are() -> None:
    assert repr(everything()) == "Tilt(sites and pairs and automaton: 3 tokens, 4 sites)"
    assert repr(accepted()) == "Tilt(automaton: 3 tokens, any length)"
    assert repr(COUNT) == "Automaton(3 states, 3 tokens)"
    assert repr(markov().tilted(accepted())) == "WeightedChain(3 tokens, 4 sites)"
