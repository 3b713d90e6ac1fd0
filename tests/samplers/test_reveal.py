"""Any order on any process: Reveal against the posterior by hand, its exact law, its error, and what it refuses."""

import itertools
import math

import pytest
import torch
from problems import chain, dirichlet, families, joint, states, strong, weak
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.samplers._choosing import Select

SELECT: list[Select] = ["random", "max_prob", "entropy", "margin", "left_to_right", "spread"]
UNIFORM = dd.Uniform(3, dd.Linear())
FEW = [dd.Masked(3, dd.Linear()), UNIFORM, families()[2], families()[3], families()[4]]


def law(process: dd.Process, operator: dd.Operator, grid: tuple[float, ...] = (1.0, 0.0)) -> Tensor:
    return T.law(dd.Sampler(process, strong().denoiser(process), operator, grid=grid))


def by_hand(world: T.Enumeration, process: dd.Process, t: float, groups: list[list[int]]) -> Tensor:
    """p(x0 | z) drawn in groups, (S**L, n**L), from sums over the joint law of data and noise alone."""
    seen = joint(world, process, [t] * 3)  # (n**L, S**L)
    x, out = states(3, 3), torch.ones(process.states**3, 27, dtype=torch.float64)
    for number, group in enumerate(groups):
        known = [site for one in groups[:number] for site in one]
        for to, site in itertools.product(range(27), group):
            agree = (x[:, known] == x[to, known]).all(-1)
            both = agree & (x[:, site] == x[to, site])
            out[:, to] *= torch.nan_to_num(seen[both].sum(0) / seen[agree].sum(0))
    return out


def small(process: dd.Process) -> tuple[T.Enumeration, dd.Denoiser]:
    """Two letters, three sites."""
    world = dirichlet(0.5, 3, 2)
    return world, world.denoiser(process)


TWO = [dd.Masked(2, dd.Linear()), dd.Uniform(2, dd.Linear()), dd.Hybrid(2, dd.Linear(), p_uniform=0.4),
       dd.Marginal(torch.tensor([0.3, 0.7], dtype=torch.float64), dd.Cosine())]  # fmt: skip


@pytest.mark.parametrize(("select", "block"), [*((one, None) for one in SELECT), ("random", 2), ("margin", 2)])
@pytest.mark.parametrize("process", TWO, ids=repr)
def test_one_site_a_call_is_exact_in_any_order(process: dd.Process, select: Select, block: int | None) -> None:
    """From 1 to 0 the law is p0, and a step in between carries p_t to p_s, whatever the order looks at."""
    world, model = small(process)
    p_t, p_s = (world.marginal(process, t) for t in (0.7, 0.3))
    for noise in (0.0, 0.5) if select == "entropy" else (0.0,):
        step = S.Reveal(select, calls=3, block=block, noise=noise)
        assert T.tv(T.law(dd.Sampler(process, model, step, steps=1)), world.p0) < 1e-12
        assert T.tv(p_t @ T.kernel(step, process, model, 0.7, 0.3), p_s) < 1e-12
    few = S.Reveal(select, calls=2, block=block)
    assert T.tv(T.law(dd.Sampler(process, model, few, steps=1)), world.p0) > 1e-3, "planted: a call too few"
    assert T.tv(p_t @ T.kernel(few, process, model, 0.7, 0.3), p_s) > 1e-4


def test_a_walk_to_neighbours_too() -> None:
    process = families()[4]
    assert T.tv(law(process, S.Reveal("margin", calls=3)), strong().p0) < 1e-12


@pytest.mark.parametrize("process", FEW[1:], ids=repr)
@pytest.mark.parametrize("select", ["left_to_right", "spread"])
def test_the_kernel_is_the_posterior_in_groups(process: dd.Process, select: Select) -> None:
    step = S.Reveal(select, calls=2)
    assert step.groups(3) == [[0], [1, 2] if select == "left_to_right" else [2, 1]]
    alive = strong().reachable(process, 0.6)
    found = T.kernel(step, process, strong().denoiser(process), 0.6, 0.0)
    data = (states(process.states, 3) < 3).all(-1)
    wanted = by_hand(strong(), process, 0.6, step.groups(3))
    assert float((found[:, data] - wanted)[alive].abs().max()) < 1e-12
    other = by_hand(strong(), process, 0.6, [[1], [0, 2]])
    assert float((found[:, data] - other)[alive].abs().max()) > 0.02, "planted: another order"


@pytest.mark.parametrize("process", FEW, ids=repr)
def test_one_group_is_an_ancestral_step(process: dd.Process) -> None:
    model = strong().denoiser(process)
    for t, s in ((1.0, 0.5), (0.6, 0.2), (0.3, 0.0)):
        alive = strong().reachable(process, t)
        kernels = [T.kernel(one, process, model, t, s)[alive] for one in (S.Reveal(calls=1), S.Ancestral())]
        assert float((kernels[0] - kernels[1]).abs().max()) < 1e-12


@pytest.mark.parametrize("select", SELECT)
def test_on_masks_it_is_unmasking(select: Select) -> None:
    process = dd.Masked(3, dd.Linear())
    assert T.tv(law(process, S.Reveal(select, calls=2)), law(process, S.Unmask(select), (1.0, 0.67, 0.0))) < 1e-12


@pytest.mark.parametrize("world", [weak(), strong()], ids=["weak", "strong"])
@pytest.mark.parametrize("select", ["left_to_right", "spread"])
def test_the_error_of_an_order_is_its_total_correlation(world: T.Enumeration, select: Select) -> None:
    """KL(p0 || law) on every process, from the data law alone."""
    for calls, growth in ((1, 1.0), (2, 1.0), (2, 0.5)):
        step = S.Reveal(select, calls=calls, growth=growth)
        error = T.total_correlation(world, step.groups(3))
        for process in FEW:
            found = T.kl(world.p0, T.law(dd.Sampler(process, world.denoiser(process), step, steps=1)))
            assert found == pytest.approx(error, abs=1e-12)
        assert error > 1e-3
    assert T.total_correlation(world, S.Reveal(select, calls=3).groups(3)) < 1e-12


@pytest.mark.usefixtures("as_user")
def test_the_error_on_a_chain_is_that_of_its_listed_law() -> None:
    small = chain(3, 5)
    x = states(3, 5)
    listed = T.Enumeration(small.log_prob(x).exp(), vocab_size=3, length=5)
    for groups in ([[0, 1, 2, 3, 4]], [[2], [0, 4], [1, 3]], [[4, 0], [3, 1, 2]], [[1], [2], [0], [4], [3]]):
        assert T.total_correlation(small, groups) == pytest.approx(T.total_correlation(listed, groups), abs=1e-12)
    for wrong in ([[0, 1, 2, 3]], [[0, 1], [1, 2, 3, 4]]):
        with pytest.raises(ValueError, match=r"must hold each of 0\.\.4 once"):
            T.total_correlation(small, wrong)
    with pytest.raises(TypeError, match="takes an Enumeration or a MarkovChain"):
        T.total_correlation(T.HMM(torch.ones(1), torch.ones(1, 1), torch.ones(1, 2) / 2, 4), [[0]])  # type: ignore[arg-type]


def test_groups_hold_every_site_and_grow() -> None:
    for length, calls, growth in itertools.product((1, 5, 256), (1, 4, 8, 300), (0.5, 1.0, 2.0)):
        groups = S.Reveal("spread", calls=calls, growth=growth).groups(length)
        assert sorted(itertools.chain(*groups)) == [*range(length)]
        assert len(groups) <= calls
    assert [len(one) for one in S.Reveal("spread", calls=8, growth=2.0).groups(255)] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [len(one) for one in S.Reveal("spread", calls=8, growth=2.0).groups(256)] == [2, 2, 4, 8, 16, 32, 64, 128]
    for step in (S.Reveal(), S.Reveal("entropy"), S.Reveal("spread", noise=0.1)):
        with pytest.raises(ValueError, match="takes an order by position"):
            step.groups(4)


@pytest.mark.parametrize("process", FEW[:4], ids=repr)
def test_draws_follow_the_law_of_the_order(process: dd.Process) -> None:
    """Prompts stay, rows are keyed by id, and one call is made for a group."""
    world = chain(3, 12)
    sampler = dd.Sampler(process, world.denoiser(process), S.Reveal("spread", calls=4), steps=1)
    out = sampler.sample(8, seed=0, prompt=[1, 2], record="choices")
    assert out.nfe == 4 == sampler.nfe
    assert bool((out.tokens[:, :2] == torch.tensor([1, 2])).all()) and bool((out.tokens < 3).all())
    part = sampler.sample(3, seed=0, first_row=5, prompt=[1, 2])
    assert torch.equal(out.tokens[5:], part.tokens)
    assert out.log_prob is not None
    torch.testing.assert_close(sampler.log_prob(out), out.log_prob, atol=1e-6, rtol=0)


def test_a_network_with_one_time_a_row_is_refused() -> None:
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    for process, options in ((UNIFORM, {"scalar_time": True}), (UNIFORM, {"time": None}),
                             (dd.AbsorbingUniform(3, dd.Linear()), {"time": None})):  # fmt: skip
        model = dd.Denoiser(lambda x, t: logits[x % 3], process, "loo", **options)  # type: ignore[arg-type]
        for step in (S.Reveal(), S.Reveal("spread") >> S.Gibbs()):
            with pytest.raises(ValueError, match=r"Reveal.* asks with revealed sites at time 0 .* one time a row, or"):
                dd.Sampler(process, model, step, steps=1)
        with pytest.raises(ValueError, match="asks with revealed sites at time 0"):
            T.kernel(S.Reveal(), process, model, 1.0, 0.0, length=2)
    masked = dd.Denoiser(lambda x, t: logits[x % 3], dd.Masked(3, dd.Linear()), "loo", time=None)
    assert dd.Sampler(masked.process, masked, S.Reveal(calls=2), steps=1).sample(2, 4, seed=0).nfe == 2


@pytest.mark.usefixtures("as_user")
def test_what_it_says_of_itself_and_refuses() -> None:
    step = S.Reveal("spread", calls=16)
    assert (step.order, step.invariant, step.nfe, step.moves, step.site_times) == (None, None, 16.0, True, True)
    assert not S.Ancestral().site_times
    assert step.weighable and not S.Reveal("entropy").weighable and S.Reveal("entropy", noise=1.0).weighable
    for arguments, said in (({"calls": 0}, "calls"), ({"growth": 0.0}, "growth"), ({"select": "no"}, "select")):
        with pytest.raises(ValueError, match=said):
            S.Reveal(**arguments)  # type: ignore[arg-type]
    text = dd.Plan([1, 0], [dd.Step(step)]).to_json()
    assert dd.Plan.from_json(text).steps[0].operator == step


def excess(world: T.MarkovChain, x: Tensor) -> tuple[float, float]:
    """E[-log p0(x)] - H(p0) of draws x, in nats, and its standard error."""
    log_p = -world.log_prob(x)
    mean, _ = world.log_prob_moments()
    return float(log_p.mean()) + mean, float(log_p.std()) / math.sqrt(len(x))


def test_a_long_uniform_chain_in_eight_calls() -> None:
    """V = 8, L = 256: nothing is left of the order's error, where ancestral steps leave many nats."""
    world, process = chain(8, 256), dd.Uniform(8, dd.Linear())
    model = world.denoiser(process)
    reveal = S.Reveal("spread", calls=8)
    assert T.total_correlation(world, reveal.groups(256)) < 0.05
    found, error = excess(world, dd.Sampler(process, model, reveal, steps=1).sample(64, seed=0).tokens)
    assert abs(found) < 4 * error + 0.05
    left, error = excess(world, dd.Sampler(process, model, S.Ancestral(), steps=8).sample(64, seed=0).tokens)
    assert left > 20 + 4 * error
