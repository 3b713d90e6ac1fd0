"""The enumeration of programs against brute force over joint choices: what merges and what is independent is exact."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from prefixes import brute_force
from problems import dirichlet, families, pairs
from pyro import poutine
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import Coins, Subset, Tokens
from discdiff.theory import exact as theory_program
from discdiff.theory import paths as theory_paths

SHIPPED: list[dd.Operator] = [getattr(S, name)() for name in S.__all__]
OTHERS: list[dd.Operator] = [
    S.Gibbs(2),
    S.Gibbs(scan="systematic"),
    S.InformedGibbs(exact=True),
    S.ReMDM(confident=True),
    S.Remask(sites=1),
    S.Unmask("entropy"),
    S.Unmask("margin", noise=1.0),
    S.Unmask(draw_first=True),
    S.ARPC("random"),
    S.ARPC("kl", temperature=1.0),
    S.EntropyRedraw(sites=1),
    S.DFM(eta=0.5),
    S.TauLeaping("reject"),
    S.P2(eta=0.0),
    S.AnyOrder("max_prob"),
    S.RePaint(steps=2),
    dd.mix({S.Gibbs(): 0.3, S.Gibbs(2) >> S.Gibbs(): 0.7}),
]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small worlds too keep their sites' choices apart, which otherwise begins with thousands of joint prefixes."""
    for module in (theory_paths, theory_program):
        monkeypatch.setattr(module, "JOINT", 0)


def model_of(process: dd.Process, length: int) -> dd.Denoiser:
    n = len(process.data_tokens)
    if isinstance(process, dd.Interpolant):
        joint = dirichlet(1.0, 4, n**2, length).p0.view([n, n] * length)
        order = [*range(0, 2 * length, 2), *range(1, 2 * length, 2)]
        world = T.Coupling(joint.permute(order).reshape(n**length, -1), vocab_size=n, length=length)
        return world.denoiser(process, predicts="loo")
    return dirichlet(0.5, 3, n, length).denoiser(process, predicts="loo")


def differences(process: dd.Process, length: int, operators: list[dd.Operator]) -> tuple[float, int]:
    """The largest difference from brute force, and how many matrices were compared."""
    model, worst, count = model_of(process, length), 0.0, 0
    for operator in operators:
        if not operator.enumerable or isinstance(operator, S.Adaptive):
            continue
        try:
            operator.check(process)
        except ValueError:
            continue
        for t, s in ((0.6, 0.4), (0.4, 0.0)):
            interval = (t, s) if operator.moves else (s,)
            try:
                expected = brute_force(operator, process, model, *interval)
            except ValueError:
                with pytest.raises(ValueError):
                    T.kernel(operator, process, model, *interval)
                continue
            for whole in (False, True):
                found = T.kernel(operator, process, model, *interval, whole=whole)
                worst, count = max(worst, float((found - expected).abs().max())), count + 1
    return worst, count


@pytest.mark.parametrize("process", [families(2)[0], pytest.param(families(2)[1], marks=pytest.mark.slow)], ids=repr)
def test_every_operator_has_the_kernel_of_brute_force(process: dd.Process) -> None:
    worst, count = differences(process, 2, [*SHIPPED, *OTHERS])
    assert count > 20
    assert worst < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("process", [*families(3), *pairs(2)], ids=repr)
def test_every_operator_has_the_kernel_of_brute_force_on_every_process(process: dd.Process) -> None:
    worst, count = differences(process, 2, [*SHIPPED, *OTHERS])
    assert count > 20
    assert worst < 1e-12


@pytest.mark.parametrize("process", families(2)[:2], ids=repr)
def test_few_prefixes_are_joint_with_the_same_kernel(process: dd.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    worst, count = differences(process, 2, [*SHIPPED[::3], *OTHERS[::4]])
    assert count > 5
    assert worst < 1e-12


@pytest.mark.parametrize("process", [families(2)[0], pytest.param(families(2)[1], marks=pytest.mark.slow)], ids=repr)
def test_three_sites(process: dd.Process) -> None:
    some: list[dd.Operator] = [S.Ancestral(), S.Euler(), S.SplitLeap(), S.ThetaTrapezoidal(), S.Gibbs(2), S.ReMDM()]
    worst, count = differences(process, 3, some)
    assert count >= 16
    assert worst < 1e-12


# --- programs whose sites are not independent -------------------------------------------------------------------------

Program = Callable[[Tensor, Tensor, dd.State, dd.At], Tensor]


@dataclass(frozen=True)
class Coupled(dd.Corrector):
    """Coins at all sites, then what ``program`` makes of them."""

    program: Program

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        p = (state.tokens + 1).double() / 8
        coins = dd.choose("first", Coins(p), state, at)
        return state.at(self.program(coins, p, state, at))


def flip(tokens: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, 1 - tokens, tokens)


def second(p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    return flip(state.tokens, dd.choose("second", Coins(p), state, at))


def in_place(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    q = p.clone()
    q[c] = 0.9
    q[:, 1:] += c[:, :-1].double() * 0.01
    return second(q, state, at)


def written_into(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    x = state.tokens.clone()
    x[:, 0] = c[:, -1].long()
    return x


def half(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    if not bool(c.any()):
        return state.tokens
    return second(torch.where(c, 0.5, 0.0), state, at)


def by_row(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    """A loop in Python over rows, which hides everything from torch."""
    ends = [sum(x.tolist()) % 2 for x in c]
    return flip(state.tokens, torch.tensor(ends)[:, None].bool().expand(c.shape))


def ranks(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    """The rank of a chosen site among those of its row, by compact numbers."""
    row, _ = c.nonzero(as_tuple=True)
    number = torch.arange(len(row))
    least = torch.full((len(c),), len(row)).scatter_reduce(0, row, number, "amin")
    rank = torch.zeros(c.shape, dtype=torch.int64).masked_scatter(c, number - least[row])
    return second(torch.where(c, (rank + 1).double() / 8, 0.0), state, at)


def again(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    """The denoiser at a state that the coins made."""
    x = state.at(flip(state.tokens, c))
    return dd.choose("token", Tokens(at.predict(x)[c].loo, x.tokens), state, at)


def subset(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    kept = dd.choose("kept", Subset(c, 1), state, at)
    more = dd.choose("more", Coins(torch.where(kept, 0.25, p)), state, at)
    return flip(state.tokens, kept ^ more)


def recompacted(c: Tensor, p: Tensor, state: dd.State, at: dd.At) -> Tensor:
    """Chosen numbers put back at other sites."""
    other = c.flip(1)
    return second(torch.zeros_like(p).masked_scatter(other, p[c]), state, at)


PROGRAMS: dict[str, Program] = {
    "its own coin": lambda c, p, state, at: second(torch.where(c, p / 2, p), state, at),
    "another site's coin": lambda c, p, state, at: second(torch.where(c.roll(1, 1), p / 2, p), state, at),
    "a coin of the first site": lambda c, p, state, at: second(torch.where(c[:, :1], p / 2, p), state, at),
    "all coins are true": lambda c, p, state, at: second(torch.where(c.all(-1, keepdim=True), p / 2, p), state, at),
    "parity": lambda c, p, state, at: second(torch.where(c.sum(-1, keepdim=True) % 2 == 1, p / 2, p), state, at),
    "parity, by products": lambda c, p, state, at: flip(state.tokens, (1 - 2 * c.long()).prod(-1, keepdim=True) < 0),
    "sites permuted": lambda c, p, state, at: flip(state.tokens, c[:, torch.arange(c.shape[1] - 1, -1, -1)]),
    "an order": lambda c, p, state, at: flip(state.tokens, (p * c).argsort(dim=-1, stable=True) == 0),
    "a matrix": lambda c, p, state, at: second(
        (c.double() @ torch.ones(c.shape[1], c.shape[1]).double()) / 9, state, at
    ),
    "numpy": lambda c, p, state, at: flip(state.tokens, torch.as_tensor(c.numpy().all(-1))[:, None].expand(c.shape)),
    "views": lambda c, p, state, at: flip(
        state.tokens, c.flatten().view(c.shape[1], -1).T.reshape(-1).view(c.shape) & c
    ),
    "a table looked up": lambda c, p, state, at: second(torch.tensor([0.2, 0.7]).double()[c.long()], state, at),
    "a count of the batch": lambda c, p, state, at: (
        second(p[c].new_full(c.shape, 0.3), state, at) if int(c.sum()) else c
    ),
    "in place": in_place,
    "written into": written_into,
    "a branch in Python": half,
    "a loop in Python": by_row,
    "ranks": ranks,
    "a call in between": again,
    "a subset": subset,
    "put back elsewhere": recompacted,
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_what_sites_know_of_each_other_is_found(name: str) -> None:
    process, operator = dd.Uniform(2, dd.Linear()), Coupled(PROGRAMS[name])
    model = model_of(process, 3)
    found = T.kernel(operator, process, model, t=0.5)
    torch.testing.assert_close(found, brute_force(operator, process, model, 0.5), atol=1e-12, rtol=0)


def test_independence_taken_for_granted_would_be_wrong() -> None:
    """The planted fault: the product of the sites' marginal laws is another matrix where sites meet."""
    process, model = dd.Uniform(2, dd.Linear()), model_of(dd.Uniform(2, dd.Linear()), 3)
    z, wrong = torch.cartesian_prod(*[torch.arange(2)] * 3), set()
    for name, program in PROGRAMS.items():
        k = T.kernel(Coupled(program), process, model, t=0.5)
        product = torch.ones_like(k)
        for site in range(3):
            one = k @ torch.nn.functional.one_hot(z[:, site], 2).double()
            product *= one[:, z[:, site]]
        if float((product - k).abs().max()) > 1e-6:
            wrong.add(name)
    assert wrong >= {"parity", "all coins are true", "ranks", "a call in between", "a subset"}
    assert not wrong & {"its own coin", "a branch in Python", "a table looked up", "sites permuted"}


def test_a_law_that_looks_at_other_rows_is_refused() -> None:
    @dataclass(frozen=True)
    class Tied(dd.Corrector):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            dd.choose("first", Coins(torch.full(state.tokens.shape, 0.5).double()), state, at)
            odd = (state.rows % 2 == 1)[:, None].expand(state.tokens.shape)
            return state.at(flip(state.tokens, dd.choose("second", Coins(odd.double() / 2), state, at)))

    process = dd.Uniform(2, dd.Linear())
    with pytest.raises(
        ValueError, match=r"site 1\.0\.second: its law depends on other rows of the batch, or on the ids"
    ):
        T.kernel(Tied(), process, model_of(process, 2), t=0.5)


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "sites"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("kind", [dd.Uniform, dd.Masked])
def test_kernels_of_some_hundred_states_take_seconds(tokens: int, sites: int, kind: type) -> None:
    process = kind(tokens, dd.Linear())
    model = model_of(process, sites)
    begin = time.process_time()
    for operator in (S.Ancestral(), S.Euler(), S.TauLeaping(), S.Gibbs()):
        k = T.kernel(operator, process, model, 0.6, 0.4 if operator.moves else None)
        assert k.shape == (process.states**sites,) * 2
        torch.testing.assert_close(k.sum(-1), torch.ones(len(k)).double(), atol=1e-12, rtol=0)
    assert time.process_time() - begin < 30  # two of an idle core; never the minutes of joint choices


# --- handlers inside a program ----------------------------------------------------------------------------------------

HANDLERS: dict[str, Callable[[], poutine.messenger.Messenger]] = {
    "BlockMessenger": lambda: poutine.block(),
    "ConditionMessenger": lambda: poutine.condition(data={"1.0.where": torch.ones(4, 2, dtype=torch.bool)}),
    "MaskMessenger": lambda: poutine.mask(mask=torch.tensor(False)),
    "ScaleMessenger": lambda: poutine.scale(scale=2.0),
    "DoMessenger": lambda: poutine.do(data={"1.0.where": torch.ones(4, 2, dtype=torch.bool)}),
    "ReplayMessenger": lambda: poutine.replay(trace=poutine.Trace()),
}


@dataclass(frozen=True)
class Handled(dd.Corrector):
    handler: Callable[[], poutine.messenger.Messenger]

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        with self.handler():
            where = dd.choose("where", Coins(torch.full(state.tokens.shape, 0.3).double()), state, at)
        return state.at(flip(state.tokens, where))


@pytest.mark.parametrize("name", list(HANDLERS))
def test_a_handler_inside_a_program_is_refused_by_name(name: str) -> None:
    process = dd.Uniform(2, dd.Linear())
    with pytest.raises(ValueError, match=rf"choice 1\.0\.where: .*{name}.*only trace is accepted"):
        T.kernel(Handled(HANDLERS[name]), process, model_of(process, 2), t=0.5)


def test_a_trace_inside_and_any_handler_outside_change_nothing() -> None:
    process = dd.Uniform(2, dd.Linear())
    model = model_of(process, 2)
    one = torch.tensor([[0.7, 0.3], [0.3, 0.7]]).double()
    for outer in (*HANDLERS.values(), poutine.trace):
        with outer():
            k = T.kernel(Handled(poutine.trace), process, model, t=0.5)
        torch.testing.assert_close(k, torch.kron(one, one), atol=1e-15, rtol=0)


# --- sizes and laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10, 128])
@pytest.mark.parametrize("kind", [dd.Uniform, dd.Masked])
def test_sizes_are_told_before_they_are_tried(length: int, kind: type, as_user: None) -> None:
    rows = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    process, chain = kind(8, dd.Linear()), T.MarkovChain(rows[0], rows, length=length)
    model = chain.denoiser(process)
    sampler = dd.Sampler(process, model, S.Ancestral(), steps=2)
    network = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 8), process, "denoiser")
    blocks = dd.Blockwise(process, network, S.Ancestral(), block=length, steps=2)
    begin = time.process_time()
    for call in (
        lambda: T.law(sampler),
        lambda: T.kernel(S.Gibbs(), process, model, t=0.5),
        lambda: T.kernel(S.Ancestral(), process, model, 0.5, 0.4),
        lambda: T.law(blocks, length=length),
        lambda: T.Enumeration(rows[0], vocab_size=8, length=length),
    ):
        with pytest.raises(ValueError, match=rf"\*\*{length}.* states are too many.*the limit is 2 GiB"):
            call()
    assert time.process_time() - begin < 2


def test_divergences_refuse_what_is_no_law(as_user: None) -> None:
    half = [0.5, 0.5]
    for call, says in (
        (lambda: T.kl(half, [0.5, 0.6]), "kl: q sums to 1.1"),
        (lambda: T.tv([1.5, -0.5], half), "tv: p is -0.5 at index 1"),
        (lambda: T.entropy([math.nan, 1.0]), "entropy: p has a NaN at index 0"),
        (lambda: T.entropy([math.inf, 0.0]), "entropy: p sums to inf"),
        (lambda: T.entropy([]), "entropy: p must be a law"),
        (lambda: T.tv(half, [1.0]), r"tv: laws over the same outcomes are compared, got shapes \(2,\) and \(1,\)"),
        (lambda: T.kl([half], [half]), r"kl: p must be a law.*got shape \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert T.tv(torch.tensor([0.25, 0.75]), [0.5, 0.5]) == pytest.approx(0.25)


@pytest.mark.parametrize("rows", [0, 1 << 20])
def test_a_law_after_equal_steps_is_the_product_of_kernels(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By products of a row and a matrix, and by squaring; another number of steps would be seen."""
    monkeypatch.setattr(theory_program, "_ROWS", rows)
    process = dd.Masked(2, dd.Linear())
    model = model_of(process, 2)

    def step(n: int) -> dd.Operator:
        return S.Ancestral() >> dd.mix({S.Gibbs() ** n: 0.3, S.Gibbs(2) >> S.Gibbs(): 0.7})

    grid = [0.9, 0.6, 0.3]
    start = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, found = start / start.sum(), []
    for n in (5, 6):
        right = start
        for t, s in ((0.9, 0.6), (0.6, 0.3)):
            right = right @ T.kernel(step(n), process, model, t, s)
        found.append(right)
    law = T.law(dd.Sampler(process, model, step(5), grid=grid), start)
    torch.testing.assert_close(law, found[0], atol=1e-14, rtol=0)
    assert float((law - found[1]).abs().max()) > 1e-6
