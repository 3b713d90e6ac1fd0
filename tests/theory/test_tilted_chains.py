"""Tilted chains, mixtures and trees: against the listed world, and at thousands of sites."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ledger import caught, within
from problems import families, states, strong
from scipy import stats
from tilting import (
    COUNT,
    MASKED,
    NEVER,
    UNIFORM,
    L,
    V,
    accepted,
    both,
    constrained,
    doob_clean,
    everything,
    far,
    gap,
    hmm,
    laws,
    logs,
    markov,
    mixture,
    neighbouring,
    product,
    tree,
)

from discdiff import theory as T
from discdiff.theory import scan

SOME = [MASKED, families(3)[3], families(3)[4]]
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
    monkeypatch.setattr(scan, "_TOGETHER", 4096)
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
            sums = {(COUNT.start, -1): mpf(1)}
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
    """One component is better by far on the first 900 sites, the other one on the last 1100 and so on the whole."""
    theta = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]], dtype=torch.float64)
    half, z = torch.tensor([0.5, 0.5]), torch.tensor([[0] * 900 + [1] * 1100])
    law = T.ProductMixture(half, theta[:, None].expand(-1, 2000, -1))
    hidden = T.HMM(half, torch.eye(2), theta, 2000)
    goal = law.denoiser(UNIFORM, "loo")(z, 0.05).loo.exp()
    for same in (law.tilted(T.Tilt(pairs=torch.zeros(1999, 3, 3))), hidden.tilted(torch.zeros(2000, 3))):
        within("mixture", gap(same.denoiser(UNIFORM, "loo")(z, 0.05).loo.exp(), goal), 1e-9)
    caught("mixture", gap(hidden.denoiser(UNIFORM, "loo")(z, 0.05).loo.exp(), goal), 0.1)  # messages not in logs


# --- errors -----------------------------------------------------------------------------------------------------------

ZEROS = torch.zeros(4, 3)
ONE = T.Automaton(torch.zeros(1, 3).long(), torch.zeros(1))
REFUSED: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("chain", lambda: markov().tilted(torch.zeros(81)), ValueError, r"\(4, 3\) = \(L, V\), or a Tilt"),
    ("chain, nan", lambda: markov().tilted(ZEROS * math.nan), ValueError, "finite or -inf"),
    ("chain, none", lambda: markov().tilted(None), TypeError, "log_w must be"),
    ("chain, nothing", lambda: markov().tilted(ZEROS + NEVER), ValueError, "Z = 0"),
    ("mixture, nothing", lambda: mixture().log_h(UNIFORM, ZEROS + NEVER), ValueError, "Z = 0"),
    ("tree, nothing", lambda: tree().tilted(ZEROS + NEVER), ValueError, "Z = 0"),
    ("tree, pairs", lambda: tree().tilted(neighbouring()), ValueError, "a product over sites"),
    ("tree, automaton", lambda: tree().log_h(UNIFORM, T.Tilt(ZEROS, automaton=ONE)), ValueError, "sites alone"),
    ("tables", lambda: T.WeightedChain([0.0], [[[0.0]]], [[[0.0]]] * 3, 4), ValueError, r"\(1 or L, H, n\)"),
    ("final", lambda: T.WeightedChain([0.0], [[[0.0]]], [[[0.0]]], 4, [0.0, 0.0]), ValueError, r"final must be \(1,\)"),
]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("call", "kind", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_bad_tilts_are_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
