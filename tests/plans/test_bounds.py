"""The additive bound: at least the KL, equal to its definition, and minimised by dynamic programming."""

import itertools
import random

import pytest
import torch
from problems import dirichlet, states, strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

P = dd.plans
WORLD = dirichlet(0.5, 3, 3, 2)
PROCESSES = [dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear()), dd.Hybrid(3, dd.Cosine(), p_uniform=0.4)]
STEPS: list[dd.Operator] = [S.Ancestral(), S.SplitLeap(), S.Reveal(calls=2), S.Ancestral() >> S.Gibbs(), S.Euler()]
TIMES = [1.0, 0.8, 0.55, 0.3, 0.1, 0.0]


def space(process: dd.Process, calls: int = 5, steps: list[dd.Operator] | None = None) -> "P.Space":
    return P.Space(process, WORLD.denoiser(process), STEPS if steps is None else steps, TIMES, calls)


@pytest.mark.parametrize("process", PROCESSES[:2], ids=repr)
def test_the_bound_is_at_least_the_kl_of_random_plans(process: dd.Process) -> None:
    """100 plans for each process, with correctors and steps of order 2 among them."""
    rng, held, bound, exact = random.Random(1), space(process), P.KLUB(WORLD), P.KL(WORLD)
    model = held.models
    gaps, short = [], 0
    for number in range(100):
        sampler = dd.Sampler(process, model, plan=held.plan(held.draw(rng)))
        upper, found = bound.score(sampler), exact.score(sampler)
        gaps.append(upper - found)
        if number < 1:
            assert found == pytest.approx(T.kl(WORLD.p0, T.law(sampler)), abs=1e-10)
        steps = zip(sampler.plan.intervals(), sampler.plan.steps, strict=True)
        terms = [bound.term(sampler, step, t, s) for (_, t, s), step in steps]
        short += upper - max(terms) < found - 1e-9
    assert min(gaps) > -1e-12
    assert short > 20, "planted: without its largest term it is no bound"


def test_a_term_is_its_definition() -> None:
    """E_{p_t} KL(true reverse || step), from the joint law of (x0, z_s, z_t) summed by hand."""
    process, t, s = PROCESSES[1], 0.7, 0.3
    model = WORLD.denoiser(process)
    x, one, two = states(3, 2), process.kernel(s), process.kernel(t, s)
    joint = torch.zeros(9, 9, dtype=torch.float64)
    for a, b, c in itertools.product(range(9), repeat=3):
        q = WORLD.p0[a] * one[x[a, 0], x[b, 0]] * one[x[a, 1], x[b, 1]]
        joint[c, b] += q * two[x[b, 0], x[c, 0]] * two[x[b, 1], x[c, 1]]
    for operator in STEPS[:4]:
        matrix = T.kernel(operator, process, model, t, s)
        wanted = float((joint * (joint / joint.sum(1, keepdim=True) / matrix).log()).sum())
        found = P.KLUB(WORLD).term(dd.Sampler(process, model, operator, steps=1), dd.Step(operator), t, s)
        assert found == pytest.approx(wanted, abs=1e-12)
        wrong = float((joint * (joint / joint.sum(0, keepdim=True) / matrix).log()).sum())
        assert abs(found - wrong) > 1e-2, "planted: the forward step in place of the reverse one"


@pytest.mark.parametrize("process", PROCESSES[:2], ids=repr)
@pytest.mark.parametrize("calls", [2, 3])
def test_dynamic_programming_finds_the_best_of_all_plans(process: dd.Process, calls: int) -> None:
    steps = [S.Ancestral(), S.Euler(), S.Reveal(calls=2)]
    times = [1.0, 0.7, 0.4, 0.2, 0.0]
    held, bound = P.Space(process, WORLD.denoiser(process), steps, times, calls), P.KLUB(WORLD)
    found = P.search(
        process, held.models, calls=calls, operators=steps, objective=bound, method=P.Dynamic(), times=times
    )
    scores = {}
    for gene in held.every():
        scores[gene] = bound.score(dd.Sampler(process, held.models, plan=held.plan(gene)))
    assert len(scores) > 10
    assert found.objective == pytest.approx(min(scores.values()), abs=1e-12)
    assert sorted(scores.values())[1] > found.objective + 1e-9, "planted: another plan"


def test_an_order_with_a_fixed_number_of_masks_has_no_finite_term() -> None:
    process = PROCESSES[0]
    model = WORLD.denoiser(process)
    sampler = dd.Sampler(process, model, S.Unmask(), steps=2)
    assert P.KLUB(WORLD).score(sampler) == torch.inf
    assert P.KLUB(WORLD).score(dd.Sampler(process, model, S.Reveal(calls=2), steps=2)) < 1
    found = P.search(
        process, model, operators=[S.Unmask()], calls=2, objective=P.KLUB(WORLD), method=P.Dynamic(), times=2
    )
    assert len(found.steps) == 1, "all at once is the only plan with a finite bound"
    with pytest.raises(TypeError, match=r"Multistep.* uses the step before it"):
        P.KLUB(WORLD).score(dd.Sampler(process, model, S.Multistep(), steps=2))


def test_a_prior_that_misses_the_end_of_the_noise_is_part_of_the_bound() -> None:
    process = dd.Uniform(3, dd.Geometric(0.01, 2.0))
    model, bound = WORLD.denoiser(process), P.KLUB(WORLD)
    sampler = dd.Sampler(process, model, S.Ancestral(), steps=64)
    assert bound.offset(process) > 5e-4
    assert bound.score(sampler) >= P.KL(WORLD).score(sampler)
    assert bound.offset(PROCESSES[1]) < 1e-12


def test_matrices_are_kept_for_one_process_and_its_models() -> None:
    """An objective that serves two models does not mix them up; a name makes no other model."""
    process, bound, exact = PROCESSES[1], P.KLUB(WORLD), P.KL(WORLD)
    right, wrong = WORLD.denoiser(process), dirichlet(3.0, 7, 3, 2).denoiser(process)
    values = [[one.score(dd.Sampler(process, model, S.Ancestral(), steps=2)) for one in (bound, exact)]
              for model in (right, wrong, right)]  # fmt: skip
    assert values[0] == values[2]
    assert values[1][1] > values[0][1] + 0.01
    named = [exact.score(dd.Sampler(process, {"a": m}, S.Ancestral(), steps=2)) for m in (right, wrong)]
    assert named == [values[0][1], values[1][1]]


def kl_of_order(world: T.Enumeration, operator: dd.Operator) -> float:
    process = PROCESSES[1]
    return T.kl(world.p0, T.law(dd.Sampler(process, world.denoiser(process), operator, steps=1)))


def test_orders_by_position_are_scored_by_their_total_correlation() -> None:
    process, world = dd.Uniform(3, dd.Linear()), strong()
    objective = P.TotalCorrelation(world)
    for step in (S.Reveal("spread", calls=2), S.Reveal("left_to_right", calls=2)):
        found = objective.score(dd.Sampler(process, world.denoiser(process), step, steps=1))
        assert found == pytest.approx(kl_of_order(world, step), abs=1e-12)
        assert found > 1e-3
    for step, steps in ((S.Reveal(calls=2), 1), (S.Reveal("spread"), 2), (S.Ancestral(), 1)):
        assert objective.score(dd.Sampler(process, world.denoiser(process), step, steps=steps)) == torch.inf


@pytest.mark.usefixtures("as_user")
def test_bad_worlds_are_refused() -> None:
    for make in (P.KL, P.KLUB, P.TotalCorrelation):
        with pytest.raises(TypeError, match="takes a"):
            make(WORLD.p0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"KLUB: takes a theory.Enumeration, or data="):
        P.KLUB()
    assert isinstance(WORLD.p0, Tensor)
