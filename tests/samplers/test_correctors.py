"""Correctors: their matrices against formulas in p_t alone, what keeps p_t, and by how much the others miss it."""

import itertools
from dataclasses import replace

import pytest
import torch
from ledger import caught, within
from problems import dirichlet, product_of_marginals, rank_one, slots, states, strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

pytestmark = pytest.mark.usefixtures("as_user")  # many small enumerations; shapes are checked by the tests that sample

MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
TIME = 0.4
RULES = ("margin", "max_prob", "current_prob")
BALANCE = {
    "barker": lambda r: r / (1 + r),
    "sqrt": lambda r: r.sqrt(),
    "min": lambda r: r.clamp(max=1),
    "max": lambda r: torch.where(r > 0, r.clamp(min=1), 0.0),
}
EXACT = [
    S.Gibbs(), S.Gibbs(scan="systematic"), S.ForwardBackward(0.7), S.EntropyRedraw(1.0, sites=1),
    *(S.InformedGibbs(rule, exact=True) for rule in RULES), S.InformedGibbs(exact=True, temperature=0.3),
    *(S.LocallyBalanced(balance) for balance in BALANCE),
]  # fmt: skip
INEXACT = [
    S.Gibbs(2), S.Gibbs(3, scan="systematic"), S.ForwardBackward(0.7, sites=2), S.TauForwardBackward(0.3),
    S.TauLocallyBalanced(0.3), S.EntropyRedraw(1.0), S.RePaint(0.6), *(S.InformedGibbs(rule) for rule in RULES),
    S.InformedGibbs(sites=2),
]  # fmt: skip


def number(operator: dd.Operator) -> int:
    """Of the identity: a choice by what the tokens look like has one of its own."""
    return 20 if isinstance(operator, S.InformedGibbs) else 19


def matrix(operator: dd.Operator, process: dd.Process, world: T.Enumeration, t: float = TIME) -> tuple[Tensor, Tensor]:
    """The exact matrix among the states that have mass, and p_t on them."""
    p = world.marginal(process, t)
    k = T.kernel(operator, process, world.denoiser(process, predicts="loo"), t=t)
    assert float((k.sum(-1) - 1).abs().max()) < 1e-12
    assert float(k[p > 0][:, p == 0].sum()) < 1e-13
    return k[p > 0][:, p > 0], p[p > 0]


def stationary(k: Tensor) -> Tensor:
    """The law that a matrix keeps."""
    q = torch.ones(len(k), dtype=torch.float64) / len(k)
    return q @ torch.linalg.matrix_power(k, 1 << 14)


@pytest.mark.parametrize("process", [*rank_one(), dd.AbsorbingUniform(2, dd.Linear())], ids=repr)
@pytest.mark.parametrize("operator", EXACT, ids=repr)
def test_what_claims_to_keep_p_t_keeps_it_and_moves(operator: dd.Operator, process: dd.Process) -> None:
    world = dirichlet(0.5, 3, vocab_size=process.vocab_size)
    k, p = matrix(operator, process, world)
    assert operator.invariant == "exact"
    within(number(operator), float((p @ k - p).abs().max()), 1e-12)
    flow = p[:, None] * k
    if not (isinstance(operator, S.Gibbs) and operator.scan == "systematic"):  # all others are reversible
        within(number(operator), float((flow - flow.T).abs().max()), 1e-12)
    assert float((p * k.diagonal()).sum()) < 0.9


@pytest.mark.parametrize("process", rank_one(), ids=repr)
@pytest.mark.parametrize("operator", INEXACT, ids=repr)
def test_what_claims_less_does_not_keep_it(operator: dd.Operator, process: dd.Process) -> None:
    k, p = matrix(operator, process, strong())
    assert operator.invariant in ("approximate", "none")
    distance = T.tv(stationary(k), p)
    caught(number(operator), distance, 1e-3)
    assert distance < 0.3


def neighbours(process: dd.Process, length: int) -> list[tuple[int, Tensor, Tensor]]:
    """For each site: its number, each state's value there, and the index of the state with another value there."""
    z, size = states(process.states, length), process.states
    found = []
    for site in range(length):
        stride = size ** (length - 1 - site)
        there = torch.arange(len(z))[:, None] + (torch.arange(size) - z[:, site, None]) * stride
        found.append((site, z[:, site], there))
    return found


def conditionals(p: Tensor, process: dd.Process, length: int) -> Tensor:
    """c[z, site, v] = p(site = v | the rest of z)."""
    rows = [p[there] / p[there].sum(-1, keepdim=True) for _, _, there in neighbours(process, length)]
    return torch.stack(rows, 1).nan_to_num(0.0)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("rule", RULES)
def test_informed_gibbs_is_its_formula(rule: str, process: dd.Process) -> None:
    world, temperature = strong(), 0.7
    p = world.marginal(process, TIME)
    c, around = conditionals(p, process, 3), neighbours(process, 3)
    own = torch.stack([c[:, site].gather(1, value[:, None])[:, 0] for site, value, _ in around], 1)
    rest = torch.stack([c[:, site].scatter(1, value[:, None], 0.0).amax(-1) for site, value, _ in around], 1)
    score = {"current_prob": -own.log(), "max_prob": -c.amax(-1).log(), "margin": rest.log() - own.log()}[rule]
    w = (score / temperature).softmax(-1)
    plain, tested = torch.zeros(len(p), len(p)).double(), torch.zeros(len(p), len(p)).double()
    for (site, _, there), v in itertools.product(around, range(process.states)):
        to, start = there[:, v], torch.arange(len(p))
        move = w[:, site] * c[:, site, v]
        plain.index_put_((start, to), move, accumulate=True)
        accept = (w[to, site] / w[:, site]).clamp(max=1)
        tested.index_put_((start, to), move * accept, accumulate=True)
        tested.index_put_((start, start), move * (1 - accept), accumulate=True)
    on = p > 0
    for exact, brute in ((False, plain), (True, tested)):
        k, _ = matrix(S.InformedGibbs(rule, exact, temperature=temperature), process, world)
        torch.testing.assert_close(k, brute[on][:, on], atol=1e-10, rtol=0)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("balance", BALANCE)
def test_locally_balanced_moves_are_their_formula(balance: str, process: dd.Process) -> None:
    world, h = strong(), 1e-4
    p = world.marginal(process, TIME)
    rates = torch.zeros(len(p), len(p), dtype=torch.float64)
    start = torch.arange(len(p))
    for (_, _, there), v in itertools.product(neighbours(process, 3), range(process.states)):
        to = there[:, v]
        rates[start, to] = torch.where(to == start, 0.0, BALANCE[balance]((p[to] / p).nan_to_num(0.0)))
    on = p > 0
    rates, flow = rates[on][:, on], p[on][:, None] * rates[on][:, on]
    assert float((flow - flow.T).abs().max()) < 1e-15  # detailed balance of the process itself
    total = rates.sum(-1)
    jump = rates / total[:, None] * (total[:, None] / total).clamp(max=1)
    jump = jump + torch.diag(1 - jump.sum(-1))
    k, _ = matrix(S.LocallyBalanced(balance), process, world)
    torch.testing.assert_close(k, jump, atol=1e-10, rtol=0)
    short, _ = matrix(S.TauLocallyBalanced(h, balance), process, world)
    off = (short - torch.diag(short.diagonal())) / h
    torch.testing.assert_close(off, rates, atol=0.05 * float(total.max()), rtol=0.01)


@pytest.mark.parametrize("process", rank_one(), ids=repr)
def test_forward_backward_is_bayes_at_one_site(process: dd.Process) -> None:
    """Noise one site by the forward kernel, and draw it back from c_i(v) q_{u|t}(. | v)."""
    world, u = strong(), 0.8
    p = world.marginal(process, TIME)
    c, forward = conditionals(p, process, 3), process.kernel(u, TIME)
    brute = torch.zeros(len(p), len(p), dtype=torch.float64)
    for (site, value, there), v in itertools.product(neighbours(process, 3), range(process.states)):
        back = c[:, site, :, None] * forward  # (z, v, noised)
        back = (back / back.sum(1, keepdim=True)).nan_to_num(0.0)
        move = (forward[value] * back[:, v]).sum(-1) / 3
        brute.index_put_((torch.arange(len(p)), there[:, v]), move, accumulate=True)
    k, _ = matrix(S.ForwardBackward(u), process, world)
    torch.testing.assert_close(k, brute[p > 0][:, p > 0], atol=1e-11, rtol=0)
    later = T.kernel(S.ForwardBackward(0.3), process, world.denoiser(process, predicts="loo"), t=TIME)
    assert torch.equal(later, torch.eye(len(p), dtype=torch.float64))  # nothing to add at a time later than u


@pytest.mark.parametrize("process", [MASKED, UNIFORM, rank_one()[3]], ids=repr)
def test_tau_leaped_correctors_follow_the_summed_rates(process: dd.Process) -> None:
    """A short leap is I + h (R + Rbar), which keeps p_t; the stationary bias is O(h)."""
    world, h = strong(), 1e-5
    p = world.marginal(process, TIME)
    on, alpha = p > 0, float(process.schedule.alpha(TIME))
    forward = torch.zeros(len(p), len(p), dtype=torch.float64)
    for (_, value, there), v in itertools.product(neighbours(process, 3), range(process.states)):
        forward.index_put_((torch.arange(len(p)), there[:, v]), process.generator(alpha)[value, v], accumulate=True)
    both = (forward + T.reverse_generator(world, process, TIME))[on][:, on]
    flow = p[on][:, None] * both
    within(19, float((flow - flow.T).abs().max()), 1e-12)
    within(19, float((p[on] @ both).abs().max()), 1e-12)
    k, _ = matrix(S.TauForwardBackward(h), process, world)
    torch.testing.assert_close((k - torch.eye(len(k)).double()) / h, both, atol=2e-3, rtol=1e-3)
    biases = [T.tv(stationary(matrix(S.TauForwardBackward(d), process, world)[0]), p[on]) for d in (0.1, 0.05, 0.025)]
    slopes = [float(torch.tensor(a / b).log2()) for a, b in itertools.pairwise(biases)]
    assert slopes == pytest.approx([1, 1], abs=0.15)


def test_a_systematic_scan_is_one_site_after_another() -> None:
    world = strong()
    model = world.denoiser(UNIFORM, predicts="loo")
    p = world.marginal(UNIFORM, TIME)
    c, sweep = conditionals(p, UNIFORM, 3), torch.eye(len(p), dtype=torch.float64)
    for site, _, there in neighbours(UNIFORM, 3):
        sweep = sweep @ torch.zeros_like(sweep).scatter_(1, there, c[:, site])
    k = T.kernel(S.Gibbs(scan="systematic"), UNIFORM, model, t=TIME)
    torch.testing.assert_close(k, sweep, atol=1e-12, rtol=0)
    out = dd.Sampler(UNIFORM, model, S.Ancestral() >> S.Gibbs(2, scan="systematic"), steps=4).sample(5, seed=0)
    assert out.nfe == 4 * (1 + 2)  # a call for every two sites


def test_cycles_forget_where_they_started_but_for_the_clamped_sites() -> None:
    """Resampling of an infill: from any tokens the law comes near to p_t given the prompt, whose site never moves."""
    world = strong()
    frozen = torch.tensor([True, False, False])
    model = world.denoiser(UNIFORM, predicts="loo")
    k = T.kernel(S.RePaint(0.95, steps=2), UNIFORM, model, t=0.1, frozen=frozen)
    forward = UNIFORM.kernel(0.1)
    goal = torch.einsum("vij,ia,jb->vab", world.p0.view(3, 3, 3), forward, forward)[2].flatten()
    goal, law = goal / goal.sum(), torch.zeros(27, dtype=torch.float64)
    law[18 + int(goal.argmin())] = 1.0
    before = T.tv(law.view(3, 9)[2], goal)
    for _ in range(4):
        law = law @ k
    assert float(law[:18].sum()) == 0
    assert T.tv(law.view(3, 9)[2], goal) < 0.1 * before


def test_a_choice_by_what_sees_the_token_is_caught() -> None:
    """EntropyRedraw re-noising by the entropy of D in place of O: not invariant, though one site."""

    class Seeing(S.EntropyRedraw):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            from discdiff.choices import Coins, Subset
            from discdiff.samplers._redraw import redraw

            some = dd.choose("site", Subset(state.free, 1), state, at)
            said = at.predict(state)
            redo = -(said.denoiser.exp() * said.denoiser.clamp(min=-1e9)).sum(-1).where(some, 0.0)
            where = dd.choose("where", Coins(redo.clamp(0, 1)), state, at)
            return state.at(redraw(replace(state, seen=said), where, at.alpha(state.t), at))

    k, p = matrix(Seeing(1.0, sites=1), UNIFORM, strong())
    assert T.tv(p @ k, p) > 1e-3


def test_a_masked_denoiser_cannot_inform() -> None:
    model = strong().denoiser(MASKED, predicts="denoiser")
    for operator in (S.InformedGibbs(exact=True), S.LocallyBalanced()):
        with pytest.raises(ValueError, match="leave-one-out prediction is undefined"):
            T.kernel(operator, MASKED, model, t=TIME)
    for operator in (S.ForwardBackward(), S.EntropyRedraw(1.0, sites=1)):  # they hide the site they ask about
        k = T.kernel(operator, MASKED, model, t=TIME)
        p = strong().marginal(MASKED, TIME)
        assert float((p @ k - p).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.InformedGibbs("best"), "select must be one of"),
        (lambda: S.InformedGibbs(exact=True, sites=2), "1 if exact"),
        (lambda: S.InformedGibbs(temperature=0.0), "temperature must lie in"),
        (lambda: S.LocallyBalanced("half"), "balance must be one of"),
        (lambda: S.TauLocallyBalanced(0.0), "h must lie in"),
        (lambda: S.TauForwardBackward(-1.0), "h must lie in"),
        (lambda: S.ForwardBackward(1.5), "u must lie in"), (lambda: S.ForwardBackward(0.5, 0), "sites must be"),
        (lambda: S.RePaint(0.0), "u must lie in"), (lambda: S.RePaint(steps=0), "steps must be"),
        (lambda: S.EntropyRedraw(0.0), "budget must lie"), (lambda: S.EntropyRedraw(sites=0), "sites must be"),
        (lambda: S.Gibbs(scan="sideways"), "scan must be"),
    ],
)  # fmt: skip
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_cycle_takes_a_predictor() -> None:
    with pytest.raises(TypeError, match="takes a predictor"):
        S.RePaint(predictor=S.Gibbs())


# --- where informed selection pays -----------------------------------------------------------------------------------


def after_calls(operator: dd.Operator, world: T.Enumeration, t: float, calls: int) -> float:
    """KL(p_t || law) when a law that a single step left, a product of marginals, is corrected for some calls."""
    process = dd.Uniform(2, dd.Linear())
    k = T.kernel(operator, process, world.denoiser(process, predicts="loo"), t=t)
    assert operator.nfe is not None
    law = product_of_marginals(world, process, t)
    return T.kl(world.marginal(process, t), law @ torch.linalg.matrix_power(k, int(calls / operator.nfe)))


SHARP = S.InformedGibbs("max_prob", exact=True, temperature=0.02)


def test_metropolised_informed_moves_beat_random_ones_where_few_sites_are_open() -> None:
    """Two of nine sites must agree and the others are settled: twice the calls a move, and far nearer for as many."""
    world = slots(9, coupling=1.5, field=3.0, ring=0.0)
    random, informed = (after_calls(operator, world, 0.02, 8) for operator in (S.Gibbs(), SHARP))
    assert random > 0.01
    assert informed < random / 100
    for rule in ("margin", "current_prob"):  # these look at the token, so the way back is not chosen: refused
        assert after_calls(S.InformedGibbs(rule, exact=True, temperature=0.02), world, 0.02, 8) > random


def test_they_lose_where_every_site_is_a_little_wrong() -> None:
    world = slots(9, coupling=0.7, field=2.5, ring=0.2)
    assert after_calls(SHARP, world, 0.1, 16) > 10 * after_calls(S.Gibbs(), world, 0.1, 16)
