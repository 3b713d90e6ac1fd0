"""Identities that tie the objects together, as properties over random laws, processes and times.

Numbers are those of docs/identities.md, which is written from the errors measured here. Every negative control is on
the fixed, correlated laws of the zoo: a product law would hide most faults.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ledger import caught, within
from pinned import add_flux, direct_rates, minimal_rates, posterior_rates
from problems import families, irreversible, joint, states, strong
from problems import pairs as pair_processes
from scipy import linalg
from strategies import any_process, generators, inner_intervals, intervals, laws, schedules, worlds

import discdiff as dd
from discdiff import theory as T
from discdiff.choices import Choice
from discdiff.prediction import Between, Exact, MaximalCoupling, ReMDM, mixture
from discdiff.theory.world import all_states, state_index

TIMES = st.sampled_from([0.95, 0.6, 0.3, 0.1])


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def alpha(process: dd.Process, t: float) -> float:
    return float(process.schedule.alpha(t))


# 1 ------------------------------------------------------------------------------------------------------------------


@given(any_process(vocab_size=3), intervals())
def test_1_chapman_kolmogorov(process: dd.Process, interval: tuple[float, float]) -> None:
    t, s = interval
    within(1, far(process.kernel(s) @ process.kernel(t, s), process.kernel(t)), 1e-12)
    r = s / 2
    within(1, far(process.kernel(s, r) @ process.kernel(t, s), process.kernel(t, r)), 1e-12)


def test_1_also_where_generators_do_not_commute_and_the_integral_is_another_kernel() -> None:
    process = families()[-1]
    assert isinstance(process, dd.TimeVarying)
    within(1, far(process.kernel(0.4) @ process.kernel(0.9, 0.4), process.kernel(0.9)), 1e-12)
    edges = torch.linspace(0, 0.8, 5, dtype=torch.float64)
    spent = -process.schedule.alpha(edges).log().diff()
    integral = sum(dt * process.generator(alpha(process, (k + 0.5) / 5)) for k, dt in enumerate(spent))
    caught(1, far(torch.as_tensor(linalg.expm(integral.numpy())), process.kernel(0.8)))


# 2, 3 ---------------------------------------------------------------------------------------------------------------


@given(generators(3), schedules, intervals())
def test_2_any_generator_is_exponentiated(q: torch.Tensor, clock: dd.Schedule, interval: tuple[float, float]) -> None:
    t, s = interval
    dense, sparse = dd.General(q, clock), dd.General(q.to_sparse(), clock)
    a_t, a_s = alpha(dense, t), alpha(dense, s)
    if a_t > 0:
        exact = torch.as_tensor(linalg.expm((q * math.log(a_s / a_t)).numpy()))
        within(2, far(dense.kernel(t, s), exact), 1e-12)
        within(2, far(sparse.kernel(t, s), exact), 1e-12)
    else:  # the stationary law, left eigenvector of 0
        within(2, far(dense.kernel(t, s) @ q, torch.zeros(())), 1e-12)


@given(st.integers(2, 9), intervals())
def test_2_the_reflecting_walk_has_cosines(size: int, interval: tuple[float, float]) -> None:
    t, s = interval
    process = dd.Ordinal(size, dd.LogLinear(1e-3))
    k, v = torch.arange(size).double(), torch.arange(size).double()
    basis = torch.cos(math.pi * k[:, None] * (v + 0.5) / size)
    basis = basis / basis.norm(dim=-1, keepdim=True)
    rates = 2 - 2 * torch.cos(math.pi * k / size)
    sigma = math.log(alpha(process, s) / alpha(process, t))
    exact = basis.T @ (torch.exp(-rates / rates[1] * sigma)[:, None] * basis)
    within(2, far(process.kernel(t, s), exact), 1e-12)
    slowest = process.kernel(t, s) @ basis[1]
    within(2, far(slowest, alpha(process, t) / alpha(process, s) * basis[1]), 1e-12)  # decays exactly as alpha


@given(st.sampled_from([dd.Masked, dd.Uniform]), schedules, TIMES)
def test_2_rank_one_is_its_generators_exponential(family: type, clock: dd.Schedule, t: float) -> None:
    process = family(3, clock)
    a = alpha(process, t)
    within(
        2, far(process.kernel(t), torch.as_tensor(linalg.expm((process.generator(a) * -math.log(a)).numpy()))), 1e-12
    )


@given(st.floats(0.01, 0.97), schedules, inner_intervals())
def test_3_a_hybrid_has_a_generator(p: float, clock: dd.Schedule, interval: tuple[float, float]) -> None:
    t, s = interval
    process = dd.Hybrid(3, clock, p)
    rates = process.generator(alpha(process, t))
    within(3, far(rates.sum(-1), torch.zeros(())), 1e-12)
    within(3, max(0.0, -float((rates - torch.diag(rates.diagonal())).min())), 1e-12)
    within(3, max(0.0, -float(process.kernel(t, s).min())), 1e-12)
    within(3, far(process.kernel(s) @ process.kernel(t, s), process.kernel(t)), 1e-12)


def test_3_blends_without_a_generator_are_refused() -> None:
    with pytest.raises(ValueError, match=r"odds of uniform tokens would fall with time near alpha = 0\.\d+"):
        dd.Hybrid(3, dd.Linear(), lambda a: a**2)  # uniform noise that would have to turn back into tokens
    with pytest.raises(ValueError, match=r"odds of the mask would fall"):
        dd.Hybrid(3, dd.Linear(), lambda a: 1 - a**2)
    assert T.check_process(dd.Hybrid(3, dd.Linear(), lambda a: 0.3 + 0.2 * a)).ok


# 4 ------------------------------------------------------------------------------------------------------------------


@given(any_process(vocab_size=3), inner_intervals())
def test_4_kolmogorovs_equations(process: dd.Process, interval: tuple[float, float]) -> None:
    a_t, a_s = (alpha(process, time) for time in interval)
    if a_s > 0.995 or a_t < 1e-3 or a_s - a_t < 1e-3:
        return  # no room for a difference quotient

    def slope(of: str) -> torch.Tensor:
        """dq/dsigma at one end, by Richardson's differences."""
        h = min(1e-3, -math.log(a_s) / 3, math.log(a_s / a_t) / 3)

        def difference(h: float) -> torch.Tensor:
            moved = [(a_t * math.exp(-d), a_s) if of == "end" else (a_t, a_s * math.exp(-d)) for d in (h, -h)]
            later, earlier = (process.transition(*ends) for ends in moved)
            return (later - earlier) / (2 * h)

        return (4 * difference(h / 2) - difference(h)) / 3

    kernel = process.transition(a_t, a_s)
    within(4, far(slope("end"), kernel @ process.generator(a_t)), 1e-7)
    within(4, far(slope("start"), -process.generator(a_s) @ kernel), 1e-7)


# 5, 6 ---------------------------------------------------------------------------------------------------------------


@given(worlds(), any_process(), TIMES)
def test_5_reverse_rates_undo_the_forward_ones(world: T.Enumeration, process: dd.Process, t: float) -> None:
    p, forward = world.marginal(process, t), T.reversal.joint_generator(process, 2, alpha(process, t))
    model = world.denoiser(process, predicts="loo")
    reverse = T.model_generator(model, t)  # from predictions alone
    reached = p > 0
    scale = float(reverse.abs().max())
    within(5, far((p @ reverse)[reached], -(p @ forward)[reached]) / scale, 1e-12)
    flux = p[:, None] * reverse
    off = ~torch.eye(len(p), dtype=torch.bool) & reached[:, None]
    within(5, far(flux[off], (p[:, None] * forward).T[off]) / scale, 1e-12)
    within(5, far(reverse[reached], T.reverse_generator(world, process, t)[reached]) / scale, 1e-12)


@given(worlds(), any_process(), TIMES)
def test_6_reverse_rates_are_means_of_pinned_ones(world: T.Enumeration, process: dd.Process, t: float) -> None:
    if isinstance(process, dd.Interpolant):
        return  # pinned by (x0, u): test_9_pairs
    a, p = alpha(process, t), world.marginal(process, t)
    z = states(process.states, 2)
    d = world.denoiser(process)(z, t).denoiser.exp()
    pinned = [posterior_rates(process, v, a) for v in process.data_tokens.tolist()]
    exact = T.reverse_generator(world, process, t) / a  # per unit of alpha
    for i, v in itertools.product(range(2), range(process.states)):
        other = z.clone()
        other[:, i] = v
        moved = (z[:, i] != v) & (p > 0)
        mean = sum(d[:, i, x] * r[z[:, i], v] for x, r in zip(process.data_tokens.tolist(), pinned, strict=True))
        rows = torch.arange(len(z))[moved]
        rates = exact[rows, state_index(other, process.states)[moved]]
        if len(rows):
            within(6, float(((mean[moved] - rates) / (1 + rates)).abs().max()), 1e-12)


# 7, 8 ---------------------------------------------------------------------------------------------------------------


@given(worlds(), any_process(), TIMES)
def test_7_ratio_and_posterior_from_the_loo(world: T.Enumeration, process: dd.Process, t: float) -> None:
    p, z = world.marginal(process, t), states(process.states, 2)
    reached = p > 0
    loo, denoiser = (world.denoiser(process, predicts=what)(z[reached], t) for what in ("loo", "denoiser"))
    within(7, far(loo.denoiser.exp(), denoiser.denoiser.exp()), 1e-10)
    settled = process.settled(loo.x, loo.alpha)
    back = denoiser[~settled].loo.dense().log_softmax(-1).exp()
    # where one token is excluded by the others the two differ by rounding only
    within(7, far(back, loo.loo.exp()[~settled]) if len(back) else 0.0, 1e-10)
    for i, v in itertools.product(range(2), range(process.columns)):
        other = z[reached].clone()
        other[:, i] = process.place(torch.full_like(other[:, i], v), other[:, i])
        exact = p[state_index(other, process.states)] / p[reached]
        within(7, float(((loo.ratio[:, i, v].exp() - exact) / (1 + exact)).abs().max()), 1e-10)


@given(worlds(), any_process(), inner_intervals())
def test_8_mixture_of_the_denoiser_is_plug_in_of_the_loo(
    world: T.Enumeration, process: dd.Process, interval: tuple[float, float]
) -> None:
    t, s = interval
    reached = world.marginal(process, t) > 0
    z = states(process.states, 2)[reached]
    prediction = world.denoiser(process, predicts="loo")(z, t)
    mixed = mixture(Exact(), prediction, alpha(process, s)).exp()
    everywhere = torch.ones_like(z, dtype=torch.bool)
    plugged = prediction[everywhere].reverse(alpha(process, s)).dense().exp().view(mixed.shape)
    within(8, far(mixed, plugged), 1e-10)
    # and both are p(z_s^i | z_t), by Bayes from forward kernels
    p_s = world.marginal(process, s)
    forward = torch.kron(process.kernel(t, s), process.kernel(t, s))
    pair = (p_s[:, None] * forward).T[reached].view(-1, process.states, process.states)
    for i in range(2):
        exact = pair.sum(2 - i)
        exact = exact / exact.sum(-1, keepdim=True)
        columns = process.place(torch.arange(process.columns).expand(len(z), -1), z[:, i : i + 1])
        within(8, far(plugged[:, i], exact.gather(-1, columns)), 1e-10)


@pytest.mark.parametrize("process", families()[1:3], ids=repr)
def test_8_a_denoiser_plugged_in_is_another_law(process: dd.Process) -> None:
    z, t, a_s = states(3, 3), 0.6, alpha(process, 0.3)
    right = strong().denoiser(process, predicts="loo")(z, t)
    wrong = dd.Prediction(right.denoiser, "loo", z, right.alpha, process)
    everywhere = torch.ones_like(z, dtype=torch.bool)
    caught(8, far(right[everywhere].reverse(a_s).dense().exp(), wrong[everywhere].reverse(a_s).dense().exp()), 0.05)


def test_8_on_a_masked_process_they_coincide() -> None:
    process, z = dd.Masked(3, dd.Linear()), states(4, 3)
    right = strong().denoiser(process, predicts="loo")(z, 0.6)
    wrong = dd.Prediction(right.denoiser, "loo", z, right.alpha, process)
    hidden = z == 3
    within(8, far(right[hidden].reverse(0.7).dense().exp(), wrong[hidden].reverse(0.7).dense().exp()), 1e-12)


# 9, 10, 11 ----------------------------------------------------------------------------------------------------------


def rows_of(law: Choice, process: dd.Process) -> torch.Tensor:
    """(N, S) from a law over N sequences of one site."""
    return torch.stack([law.log_prob(torch.full((law.batch_shape[0], 1), z)).exp() for z in range(process.states)], -1)


@given(any_process(vocab_size=3), inner_intervals())
def test_9_bridges_are_laws_keep_marginals_and_compose(process: dd.Process, interval: tuple[float, float]) -> None:
    t, s = interval
    r = s / 2
    for rank, v in enumerate(process.data_tokens.tolist()):
        q_t, q_s = process.marginals(t)[rank], process.marginals(s)[rank]
        to, via = ((q > 0).nonzero() for q in (q_t, q_s))
        first = rows_of(process.bridge(to, torch.full_like(to, v), t, s), process)
        within(9, far(first.sum(-1), torch.ones(())), 1e-12)
        within(9, far(q_t[to[:, 0]] @ first, q_s), 1e-12)
        second = torch.zeros(process.states, process.states).double()
        second[via[:, 0]] = rows_of(process.bridge(via, torch.full_like(via, v), s, r), process)
        whole = rows_of(process.bridge(to, torch.full_like(to, v), t, r), process)
        within(9, far(first @ second, whole), 1e-12)


@given(laws(3), schedules, inner_intervals(), st.floats(0, 1))
def test_10_families_of_bridges_keep_the_marginal(
    pi: torch.Tensor, clock: dd.Schedule, interval: tuple[float, float], share: float
) -> None:
    t, s = interval
    masked = dd.Masked(3, clock)
    a_t, a_s = alpha(masked, t), alpha(masked, s)
    most = min(1.0, (1 - a_s) / a_t)
    cases = [(masked, ReMDM(share * most)), (masked, ReMDM(most)), (masked, Between(share))]
    for process in (dd.Uniform(3, clock), dd.Marginal(pi, clock), dd.AbsorbingUniform(3, clock)):
        cases += [(process, MaximalCoupling()), (process, Between(share)), (process, Exact())]
    for process, bridge in cases:
        for rank, v in enumerate(process.data_tokens.tolist()):
            q_t, q_s = process.marginals(t)[rank], process.marginals(s)[rank]
            to = (q_t > 0).nonzero()
            rows = rows_of(bridge(process, to, torch.full_like(to, v), t, s), process)
            within(10, far(rows.sum(-1), torch.ones(())), 1e-12)
            within(10, max(0.0, -float(rows.min())), 1e-12)
            within(10, far(q_t[to[:, 0]] @ rows, q_s), 1e-12)


@given(laws(3), inner_intervals(), st.floats(0, 3))
def test_10_the_gauge_freedom_of_the_rates(pi: torch.Tensor, interval: tuple[float, float], eta: float) -> None:
    a = 1 - interval[0]
    for process in (dd.Uniform(3, dd.Linear()), dd.Marginal(pi, dd.Linear()), dd.Masked(3, dd.Linear())):
        q = process.transition(a, 1.0)[0]
        slope = -(q @ process.generator(a)) / a  # dq / dalpha
        flux = (q[:, None] * q).fill_diagonal_(0)
        one = torch.eye(process.states)[0].double()
        within(10, far(slope, (one - q) / (1 - a)), 1e-12)
        for rates in (posterior_rates, minimal_rates, direct_rates):
            drift = rates(process, 0, a)
            within(10, far(q @ drift, slope), 1e-12)
            within(10, far(q @ add_flux(drift, q, flux, eta), slope), 1e-12)


def test_10_faults_are_caught() -> None:
    process = dd.Masked(3, dd.Linear())
    to = torch.tensor([[0], [3]])
    with pytest.raises(ValueError, match=r"sigma = 0.9 exceeds \(1 - alpha_s\) / alpha_t = 0.4"):
        ReMDM(0.9)(process, to, torch.zeros_like(to), 0.5, 0.2)
    with pytest.raises(ValueError, match="one noise law"):
        MaximalCoupling()(dd.Hybrid(3, dd.Linear()), to, torch.zeros_like(to), 0.5, 0.2)
    with pytest.raises(ValueError, match="symmetric"):
        add_flux(torch.zeros(2, 2).double(), torch.ones(2).double() / 2, torch.tensor([[0.0, 1], [0, 0]]).double(), 1.0)
    # maximal coupling keeps the marginal, but it is not the forward process's path: it does not compose
    uniform, x_t = dd.Uniform(3, dd.Linear()), torch.arange(3)[:, None]
    x0 = torch.zeros_like(x_t)
    exact, other = (rows_of(b(uniform, x_t, x0, 0.8, 0.4), uniform) for b in (Exact(), MaximalCoupling()))
    caught(10, far(exact, other))


@given(worlds(), any_process(), inner_intervals())
def test_11_joint_posterior_then_bridge_is_the_joint_reverse_kernel(
    world: T.Enumeration, process: dd.Process, interval: tuple[float, float]
) -> None:
    t, s = interval
    q = joint(world, process, [t] * 2)
    p_t = q.sum(0)
    reached = (p_t > 0).nonzero()[:, 0]
    posterior = (q / p_t)[:, reached].T  # p(x0 | z_t)
    z, x = all_states(process.states, 2)[reached], process.data_tokens[all_states(world.alphabet, 2)]
    total = torch.zeros(len(reached), process.states**2).double()
    for k, x0 in enumerate(x):
        where = posterior[:, k] > 0
        if bool(where.any()):
            sites = [
                rows_of(process.bridge(z[where, i : i + 1], x0[i].expand(int(where.sum()), 1), t, s), process)
                for i in range(2)
            ]
            both = torch.einsum("na,nb->nab", *sites).flatten(1)
            total[where] += posterior[where, k, None] * both
    p_s = world.marginal(process, s)
    forward = torch.kron(process.kernel(t, s), process.kernel(t, s))
    exact = (p_s[:, None] * forward).T[reached] / p_t[reached, None]
    within(11, far(total, exact), 1e-12)


# 17 -----------------------------------------------------------------------------------------------------------------

PARTITIONS = [[[0], [1], [2]], [[0, 1], [2]], [[2], [0, 1]], [[0, 1, 2]], [[1], [0, 2]]]


def over(cube: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The marginal of the kept sites, spread over the cube again."""
    for i in range(3):
        if i not in kept:
            cube = cube.sum(i, keepdim=True)
    return cube.expand(3, 3, 3)


def parallel_unmasking(world: T.Enumeration, blocks: list[list[int]]) -> tuple[torch.Tensor, list[float], list[float]]:
    """The law of revealing the blocks in turn, sites independently; and each block's E[TC] and entropy bound."""
    process = dd.Masked(3, dd.Linear())
    model, x = world.denoiser(process), states(3, 3)
    log_law, tc, bound = torch.zeros(len(x)).double(), [], []
    shown: list[int] = []
    cube = world.p0.view(3, 3, 3)
    for block in blocks:
        state = torch.full_like(x, 3)
        state[:, shown] = x[:, shown]
        d = model(state, 0.5).denoiser  # log D, from the library
        log_each = d[:, block].gather(-1, x[:, block, None])[..., 0]
        log_law += log_each.sum(-1)
        known, both = (over(cube, shown), over(cube, shown + block))
        log_joint = (both / known).log().flatten()
        tc.append(float((world.p0 * (log_joint - log_each.sum(-1))).sum()))
        entropies = torch.where(d > -torch.inf, -d.exp() * d, 0.0).sum(-1)[:, block]
        bound.append(float((world.p0 * (entropies.sum(-1) - entropies.amax(-1))).sum()))
        shown = shown + block
    return log_law.exp(), tc, bound


@given(st.lists(st.sampled_from([0.01, 0.3, 1.0, 4.0]), min_size=27, max_size=27), st.sampled_from(PARTITIONS))
def test_17_what_parallel_unmasking_loses_is_total_correlation(weights: list[float], blocks: list[list[int]]) -> None:
    p0 = torch.tensor(weights).double()
    world = T.Enumeration(p0 / p0.sum(), vocab_size=3, length=3)
    law, tc, bound = parallel_unmasking(world, blocks)
    within(17, abs(T.kl(world.p0, law) - sum(tc)), 1e-12)
    within(17, max(0.0, *(c - b for c, b in zip(tc, bound, strict=True))), 1e-12)


def test_17_blocks_lose_something_and_single_sites_nothing() -> None:
    one, together = (parallel_unmasking(strong(), PARTITIONS[k]) for k in (0, 3))
    within(17, abs(T.kl(strong().p0, one[0])), 1e-12)
    caught(17, T.kl(strong().p0, together[0]))


# the pairs: given u everything above holds, and z alone is the uniform process ----------------------------------------


@given(schedules, TIMES)
def test_9_the_absorbing_reformulation_has_the_uniform_law_but_not_its_path(clock: dd.Schedule, t: float) -> None:
    pairs, uniform = dd.AbsorbingUniform(3, clock), dd.Uniform(3, clock)
    z = pairs.column(torch.arange(9))
    alone = torch.zeros(3, 3).double().index_add(1, z, pairs.marginals(t))
    within(9, far(alone, uniform.marginals(t)), 1e-12)


def test_9_frozen_noise_is_another_path() -> None:
    pairs, uniform = dd.AbsorbingUniform(3, dd.Linear()), dd.Uniform(3, dd.Linear())
    path = torch.zeros(3, 3, 3).double()  # x0, z_s, z_t
    z = pairs.column(torch.arange(9))
    two = pairs.marginals(0.4)[:, :, None] * pairs.kernel(0.8, 0.4)
    for a, b in itertools.product(range(9), repeat=2):
        path[:, z[a], z[b]] += two[:, a, b]
    other = uniform.marginals(0.4)[:, :, None] * uniform.kernel(0.8, 0.4)
    caught(9, float((path - other).abs().sum(-1).sum(-1).max() / 2))


ZOO = [*families(3), *pair_processes(2), dd.General(irreversible(4).to_sparse(), dd.Linear())]


@pytest.mark.parametrize("process", [*ZOO[:2], *(pytest.param(p, marks=pytest.mark.slow) for p in ZOO[2:])], ids=repr)
def test_the_families_of_the_zoo_conform(process: dd.Process) -> None:
    report = T.check_process(process)
    assert report.ok, str(report)
