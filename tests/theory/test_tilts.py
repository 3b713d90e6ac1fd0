"""Tilted worlds: the law, its h, and both forms of Doob's transform, against the listed sequences."""

import math
from collections.abc import Callable

import pytest
import torch
from ledger import caught, within
from problems import dirichlet, families, joint, named, pairs, states, strong
from tilting import COUNT, NEVER, UNIFORM, L, V, accepted, doob_clean, everything, far, gap, logs, markov
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

EVERY, SOME = [*families(3), *pairs(3)], [families(3)[0], *families(3)[3:5]]


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
