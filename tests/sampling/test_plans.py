"""Plans that change operator, guides and model from step to step: laws, restarts, counts, blocks, rescoring."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from blocks import joined, same, walk
from gradients import Network, denoiser, derivatives
from guides import Coin, Noisy, Plain, table
from problems import dirichlet, named
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory import end_law
from discdiff.theory.world import all_states, law_of_data, law_of_prior, state_index

# Enumerations and hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")

V, L = 3, 2
WORLD, OTHER = dirichlet(0.5, 3, V, L), dirichlet(3.0, 7, V, L)
MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())
PROCESSES = [MASKED, UNIFORM]
GRID = [1.0, 0.7, 0.45, 0.2, 0.0]
ALLOWED = torch.tensor([[True, True, False], [False, True, True]])
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


def models_of(process: dd.Process) -> dict[str, dd.Denoiser]:
    return {"large": WORLD.denoiser(process, predicts="loo"), "small": OTHER.denoiser(process, predicts="loo")}


def hand(model: dd.Denoiser, *changes: Change) -> dd.Denoiser:
    """A denoiser whose log O is that of another one, changed by functions of (log O, x, time), without the library."""

    def fn(x: Tensor, t: Tensor) -> Tensor:
        time = t.view(-1, 1) if t.ndim == 1 else t
        rows = model.evaluate(x, time).loo
        for change in changes:
            rows = change(rows.log_softmax(-1), x, time)
        return rows

    return dd.Denoiser(fn, model.process, "loo", time="t", time_dtype=torch.float64, length=model.length)


def allowing(mask: Tensor) -> Change:
    return lambda rows, x, time: rows.masked_fill(~mask, -torch.inf)


def tempered(temperature: float) -> Change:
    return lambda rows, x, time: rows / temperature


def best(k: int) -> Change:
    return lambda rows, x, time: rows.masked_fill(rows < rows.topk(k).values[..., -1:], -torch.inf)


def mixed(other: dd.Denoiser, scale: float) -> Change:
    return lambda rows, x, time: (1 + scale) * rows - scale * other.evaluate(x, time).loo


# Each step, and the same by hand: the operator, the name of its model, and changes of its log O.
Hand = Callable[[dict[str, dd.Denoiser]], tuple[dd.Operator, str, list[Change]]]
FORBIDDEN = torch.tensor([True, True, False])
STEPS: list[tuple[dd.Step, Hand]] = [
    (dd.Step(S.Ancestral(), [dd.Forbid([2])]), lambda m: (S.Ancestral(), "large", [allowing(FORBIDDEN)])),
    (
        dd.Step(S.SplitLeap(), [dd.ClassifierFree("small", 0.5), dd.Truncation(temperature=0.8)], "large"),
        lambda m: (S.SplitLeap(), "large", [mixed(m["small"], 0.5), tempered(0.8)]),
    ),
    (
        dd.Step(
            S.Euler() >> S.Gibbs(),
            [dd.when(dd.between(0.3, 0.6), dd.Allow(ALLOWED)), dd.when(dd.before(0.45), dd.Truncation(top_k=1))],
            "small",
        ),
        lambda m: (S.Euler() >> S.Gibbs(), "small", [allowing(ALLOWED)]),
    ),
    (
        dd.Step(
            dd.mix({S.Ancestral(): 0.25, S.SplitLeap() >> S.Gibbs(): 0.75}),
            [
                dd.when(dd.after(0.2), dd.Truncation(top_k=2), dd.Forbid([1])),
                dd.when(dd.before(0.2), dd.Forbid([0]), dd.ClassifierFree("large", -0.4)),
            ],
            "small",
        ),
        lambda m: (
            dd.mix({S.Ancestral(): 0.25, S.SplitLeap() >> S.Gibbs(): 0.75}),
            "small",
            [best(2), mixed(m["large"], -0.4)],
        ),
    ),
]
PLAN = dd.Plan(GRID, [step for step, _ in STEPS])


def by_hand(process: dd.Process) -> Tensor:
    """The law of ``PLAN``: the prior times the kernel of every step."""
    models, law = models_of(process), law_of_prior(process, L)
    for (t, s), (_, told) in zip(itertools.pairwise(GRID), STEPS, strict=True):
        operator, name, changes = told(models)
        law = law @ T.kernel(operator, process, hand(models[name], *changes), t, s)
    return law_of_data(process, law, L)


def fits(tokens: Tensor, law: Tensor) -> float:
    """The p-value of tokens under a law; 0 for a token that it cannot give."""
    seen = torch.bincount(state_index(tokens, V), minlength=len(law)).double()
    some = law > 1e-12
    if float(seen[~some].sum()):
        return 0.0
    return float(chisquare(seen[some], law[some] * len(tokens) / law[some].sum()).pvalue)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_law_of_a_plan_is_the_product_of_its_steps(process: dd.Process, failure_rate: float) -> None:
    models, exact = models_of(process), by_hand(process)
    sampler = dd.Sampler(process, models, plan=PLAN)
    law = T.law(sampler)
    torch.testing.assert_close(law, exact, rtol=0, atol=1e-12)
    for number, step in enumerate(PLAN.steps):
        for planted in (
            dd.Step(step.operator, (), step.model),
            dd.Step(step.operator, step.guides, "small" if step.model != "small" else "large"),
            dd.Step(S.SplitLeap() >> S.Gibbs(), step.guides, step.model),
        ):
            steps = [*PLAN.steps[:number], planted, *PLAN.steps[number + 1 :]]
            wrong = T.law(dd.Sampler(process, models, plan=dd.Plan(GRID, steps)))
            exact_end = number == 3 and planted.guides == step.guides and planted.model == step.model
            assert exact_end or float((wrong - exact).abs().max()) > 1e-7, f"planted in step {number + 1}"
    out = sampler.sample(20_000, seed=5)
    assert fits(out.tokens, law) > failure_rate
    turned = {"large": models["small"], "small": models["large"]}
    assert fits(out.tokens, T.law(dd.Sampler(process, turned, plan=PLAN))) < failure_rate, "planted: names swapped"


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_plan_comes_back_from_its_text_with_law_and_tokens(process: dd.Process) -> None:
    models, again = models_of(process), dd.Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert (again.grid, again.steps) == (PLAN.grid, PLAN.steps)
    assert again.to_json() == PLAN.to_json()
    one, other = (dd.Sampler(process, models, plan=plan) for plan in (PLAN, again))
    assert torch.equal(T.law(one), T.law(other))
    assert torch.equal(one.sample(64, seed=3).tokens, other.sample(64, seed=3).tokens)
    assert (one.calls, one.nfe) == (other.calls, other.nfe)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_guides_of_your_own_in_some_steps(process: dd.Process, failure_rate: float) -> None:
    """One that draws: the mean of the kernels over its draws, in its step alone."""
    g, h, models = table(V, L, 0), table(V, L, 1), models_of(process)
    plan = dd.Plan(
        [1.0, 0.6, 0.3, 0.0],
        [dd.Step(S.Ancestral(), [Plain(g)]), dd.Step(S.Ancestral(), [Coin(torch.stack([g, h]))], "small"),
         dd.Step(S.Unmask("max_prob") if process.absorbing else S.Euler())],
    )  # fmt: skip
    law = law_of_prior(process, L) @ T.kernel(
        S.Ancestral(), process, hand(models["large"], lambda r, x, t: r + g), 1.0, 0.6
    )
    sides = [
        T.kernel(S.Ancestral(), process, hand(models["small"], lambda r, x, t, e=e: r + e), 0.6, 0.3) for e in (g, h)
    ]
    law = law @ (0.7 * sides[0] + 0.3 * sides[1])
    law = law_of_data(process, law @ T.kernel(plan.steps[2].operator, process, models["large"], 0.3, 0.0), L)
    sampler = dd.Sampler(process, models, plan=plan)
    torch.testing.assert_close(T.law(sampler), law, rtol=0, atol=1e-12)
    assert fits(sampler.sample(20_000, seed=2).tokens, law) > failure_rate


# --- operators that remember ------------------------------------------------------------------------------------------

TIMES = [1.0, 0.85, 0.7, 0.55, 0.4, 0.2, 0.0]
COOL = dd.Truncation(temperature=0.6)


def changes(operator: dd.Operator) -> dict[str, list[dd.Step]]:
    """Six steps that change something after the third."""
    first, late = dd.Step(operator), dd.after(0.55)
    other = S.KLStable(0.3, 2.0) if isinstance(operator, S.Multistep) else S.KLStable(0.6, 1.0)
    return {
        "guides": [first] * 3 + [dd.Step(operator, [COOL])] * 3,
        "scale": [dd.Step(operator, [dd.ClassifierFree("small", w)]) for w in (0.5, 0.5, 0.5, 1.0, 1.0, 1.0)],
        "model": [first] * 3 + [dd.Step(operator, model="small")] * 3,
        "a guide by time": [dd.Step(operator, [dd.when(late, COOL)])] * 6,
        "a guide of an asked model": [dd.Step(operator, [dd.ClassifierFree("late", 0.5)])] * 6,
        "operator": [dd.Step(operator >> S.Gibbs())] * 3 + [first] * 3,
        "operator by time": [dd.Step(dd.when(late, other, operator))] * 6,
    }


def parts_of(steps: list[dd.Step], models: dict[str, dd.Denoiser], process: dd.Process) -> Iterator[dd.Sampler]:
    """Separate samplers, the second from the state where the first ends."""
    for some, times in ((steps[:3], TIMES[:4]), (steps[3:], TIMES[3:])):
        yield dd.Sampler(process, models, plan=dd.Plan(times, some))


@pytest.mark.parametrize("kind", changes(S.Multistep()))
@pytest.mark.parametrize(
    ("operator", "process"),
    [(S.Multistep(), MASKED), (S.Multistep(), UNIFORM), (S.KLStable(0.3, 0.5), MASKED)], ids=named,
)  # fmt: skip
def test_an_operator_that_remembers_starts_anew(
    operator: dd.Operator, process: dd.Process, kind: str, failure_rate: float
) -> None:
    steps = changes(operator)[kind]
    if kind == "operator by time" and not process.absorbing:
        pytest.skip("the other operator is not for this process")
    models = models_of(process)
    models["late"] = models["small"].guided(dd.when(dd.after(0.55), COOL))
    plan = dd.Plan(TIMES, steps)
    whole = dd.Sampler(process, models, plan=plan)
    first, second = parts_of(steps, models, process)
    law = T.law(whole)
    torch.testing.assert_close(law, T.law(second, initial=T.law(first)), rtol=0, atol=1e-12)
    draws = 20_000
    out = whole.sample(draws, seed=4)
    assert fits(out.tokens, law) > failure_rate
    again = dd.Sampler(process, models, plan=dd.Plan.from_json(plan.to_json()))
    assert torch.equal(T.law(again), law)
    assert torch.equal(again.sample(draws, seed=4).tokens, out.tokens)


@pytest.mark.parametrize("kind", ["guides", "a guide by time", "model", "operator"])
def test_an_operator_that_does_not_start_anew_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, models = changes(S.Multistep())[kind], models_of(UNIFORM)
    first, second = parts_of(steps, models, UNIFORM)
    right = T.law(second, initial=T.law(first))
    monkeypatch.setattr(end_law, "anew", lambda *parts: False)
    wrong = T.law(dd.Sampler(UNIFORM, models, plan=dd.Plan(TIMES, steps)))
    assert float((wrong - right).abs().max()) > 1e-5


def test_what_does_not_change_is_remembered() -> None:
    """Guides that are equal by value, and the first model with and without its name, are no change."""
    models = models_of(UNIFORM)
    op = S.Multistep()
    guided = dd.Sampler(UNIFORM, models["large"].guided(dd.Truncation(temperature=0.6)), op, grid=TIMES)
    equal = dd.Plan(TIMES, [dd.Step(op, [dd.Truncation(temperature=0.6)], name) for name in (None, "large") * 3])
    law = T.law(dd.Sampler(UNIFORM, models, plan=equal))
    torch.testing.assert_close(law, T.law(guided), rtol=0, atol=1e-14)
    sampler = dd.Sampler(UNIFORM, models, plan=equal)
    assert len({id(model) for model in sampler.step_models}) == 1
    assert torch.equal(sampler.sample(64, seed=1).tokens, guided.sample(64, seed=1).tokens)
    parts = [dd.Sampler(UNIFORM, models, plan=dd.Plan(TIMES[:4], equal.steps[:3]))]
    parts.append(dd.Sampler(UNIFORM, models, plan=dd.Plan(TIMES[3:], equal.steps[3:])))
    assert float((T.law(parts[1], initial=T.law(parts[0])) - law).abs().max()) > 1e-4, "planted: a start in the middle"


def test_the_law_of_a_mix_with_an_operator_that_remembers(failure_rate: float) -> None:
    sampler = dd.Sampler(UNIFORM, models_of(UNIFORM), dd.mix({S.Multistep(): 0.5, S.Ancestral(): 0.5}), grid=TIMES)
    assert fits(sampler.sample(50_000, seed=0).tokens, T.law(sampler)) > failure_rate


# --- the plan of a sampler --------------------------------------------------------------------------------------------


def test_a_sampler_holds_the_plan_whose_steps_are_alike() -> None:
    models, op = models_of(UNIFORM), S.Ancestral() >> S.Gibbs()
    sampler = dd.Sampler(UNIFORM, models, op, grid=GRID)
    assert sampler.plan == dd.Plan(GRID, [dd.Step(op)] * 4)
    assert sampler.plan != dd.Plan(GRID, [dd.Step(op, model="large")] * 4)
    assert sampler.plan != dd.Plan([1.0, 0.7, 0.5, 0.2, 0.0], [dd.Step(op)] * 4)
    planned = dd.Sampler(UNIFORM, models, plan=sampler.plan)
    assert torch.equal(planned.sample(16, seed=3).tokens, sampler.sample(16, seed=3).tokens)
    assert (repr(planned), planned.grid, planned.operator) == (repr(sampler), sampler.grid, op)
    moved, right = planned.on_grid([1.0, 0.5, 0.0]), dd.Sampler(UNIFORM, models, op, steps=2)
    assert moved.plan == right.plan
    assert torch.equal(moved.sample(8, seed=3).tokens, right.sample(8, seed=3).tokens)
    with pytest.raises(ValueError, match=r"on_grid: takes a sampler whose steps are alike"):
        dd.Sampler(UNIFORM, models, plan=PLAN).on_grid([1.0, 0.0])
    alone = dd.Plan([0.4], [dd.Step(S.Gibbs() ** 2, [COOL], "small")])
    assert dd.Plan.from_json(alone.to_json()) == alone
    assert dd.Plan(iter([0.4]), alone.steps) == dd.Plan(torch.tensor([0.4], dtype=torch.float64), alone.steps) == alone
    initial = torch.zeros(4, L, dtype=torch.int64)
    one = dd.Sampler(UNIFORM, models, plan=alone)
    two = dd.Sampler(UNIFORM, models["small"].guided(COOL), S.Gibbs() ** 2, time=0.4)
    assert torch.equal(one.sample(initial=initial, seed=1).tokens, two.sample(initial=initial, seed=1).tokens)
    assert two.plan == dd.Plan([0.4], [dd.Step(S.Gibbs() ** 2)])


def test_the_repr_of_a_plan_folds_equal_steps() -> None:
    assert (
        repr(dd.Plan([1.0, 0.5, 0.0], [dd.Step(S.Ancestral())] * 2)) == "Plan([1.0, 0.5, 0.0], [Step(Ancestral()) * 2])"
    )
    assert repr(dd.Plan([0.5], [dd.Step(S.Gibbs(), [COOL], "a")])) == (
        "Plan([0.5], [Step(Gibbs(sites=1), guides=[Truncation(temperature=0.6)], model='a')])"
    )
    times = [1 - n / 1000 for n in range(1001)]
    for steps in (
        [dd.Step(S.Ancestral())] * 1000,
        [dd.Step(S.Ancestral())] * 500 + [dd.Step(S.Euler(), [COOL])] * 500,
        [dd.Step(S.Ancestral()), dd.Step(S.Euler())] * 500,
    ):
        plan = dd.Plan(times, steps)
        assert len(repr(plan)) < 400
        assert len(repr(dd.Sampler(UNIFORM, models_of(UNIFORM), plan=plan))) < 1000
        assert plan == dd.Plan.from_json(plan.to_json())
    assert "Step(Ancestral()) * 1000]" in repr(dd.Plan(times, [dd.Step(S.Ancestral())] * 1000))
    assert "... 994 more ..., Step(Euler())" in repr(plan)


class Tabled(dd.Guide):
    """Compares by an array, as a dataclass does, whose truth is undefined."""

    def __init__(self, log_g: Tensor) -> None:
        self.log_g = log_g

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tabled) and bool(self.log_g == other.log_g)

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: dd.operator.GuideAt) -> dd.Prediction:
        return prediction.tilted(lambda row, position: self.log_g[position])


def test_guides_that_cannot_be_compared_are_different() -> None:
    one, other = Tabled(table(V, L, 0)), Tabled(table(V, L, 0))
    plan = dd.Plan([1.0, 0.5, 0.0], [dd.Step(S.Ancestral(), [one]), dd.Step(S.Ancestral(), [other])])
    assert not plan.alike
    assert plan == dd.Plan(plan.grid, [dd.Step(S.Ancestral(), [one]), dd.Step(S.Ancestral(), [other])])
    sampler = dd.Sampler(UNIFORM, models_of(UNIFORM), plan=plan)
    assert torch.equal(
        sampler.sample(8, seed=0).tokens,
        dd.Sampler(UNIFORM, models_of(UNIFORM)["large"].guided(one), S.Ancestral(), steps=2).sample(8, seed=0).tokens,
    )


# --- counts -----------------------------------------------------------------------------------------------------------


def priced(process: dd.Process, **costs: float | None) -> dict[str, dd.Denoiser]:
    oracle = WORLD.denoiser(process, predicts="loo")
    return {
        name: dd.Denoiser(oracle.fn, process, "loo", time="alpha", time_dtype=torch.float64, length=L, cost=cost)
        for name, cost in costs.items()
    }


def test_planned_calls_and_costs_are_the_measured_ones() -> None:
    models = priced(UNIFORM, a=3.0, b=2.0, c=0.5)
    models["b"] = models["b"].guided(dd.when(dd.before(0.5), dd.ClassifierFree("c", 0.3)))  # b asks c, early
    steps = [
        dd.Step(S.Ancestral()),
        dd.Step(S.Ancestral() >> S.Gibbs() ** 2, [dd.ClassifierFree("b", 0.5)]),  # 3 a, 3 b, 3 c
        dd.Step(
            S.Ancestral() >> S.Gibbs(), [dd.ClassifierFree("a", 0.0), dd.ClassifierFree("c", 0.5)], "b"
        ),  # 2 b, 2 c
        dd.Step(S.Ancestral(), [dd.when(dd.before(0.4), dd.ClassifierFree("b", 1.0))]),  # 1 a
    ]
    sampler = dd.Sampler(UNIFORM, models, plan=dd.Plan(GRID, steps))
    out = sampler.sample(64, seed=0)
    assert out.calls == {"a": 5, "b": 5, "c": 5}
    assert sampler.calls == {name: float(count) for name, count in out.calls.items()}
    assert (sampler.nfe, out.nfe, sampler.cost) == (15.0, 15, 5 * 5.5)
    assert {one.name for one in sampler.networks} == {"a", "b", "c"}
    unknown = dd.Sampler(UNIFORM, models | priced(UNIFORM, c=None), plan=dd.Plan(GRID, steps))
    assert (unknown.calls, unknown.cost) == (sampler.calls, None)
    unasked = dd.Sampler(UNIFORM, models | priced(UNIFORM, d=None), plan=dd.Plan(GRID, steps))
    assert unasked.cost == sampler.cost
    systematic = [dd.Step(S.Ancestral() >> S.Gibbs(scan="systematic"))] * 4
    open_ended = dd.Sampler(UNIFORM, models, plan=dd.Plan(GRID, systematic))
    assert (open_ended.calls, open_ended.nfe, open_ended.cost) == (None, None, None)


def test_networks_of_one_name_have_their_own_costs() -> None:
    first, second = priced(UNIFORM, x=3.0, y=0.5).values()
    sampler = dd.Sampler(UNIFORM, first.guided(dd.ClassifierFree(second, 1.0)), S.Ancestral(), steps=4)
    assert (sampler.calls, sampler.cost) == ({"model": 8.0}, 4 * 3.5)


# --- blocks and cascades ----------------------------------------------------------------------------------------------


def network(process: dd.Process, seed: int, **options: object) -> dd.Denoiser:
    """A network on sequences of any length whose output depends on the tokens before and after."""
    weights = torch.randn(4, 4, V, generator=torch.Generator().manual_seed(seed)).double()

    def fn(x: Tensor, t: Tensor) -> Tensor:
        before = torch.nn.functional.pad(x[:, :-1], (1, 0))
        return weights[before, x] + weights[x, before].roll(1, -1)

    return dd.Denoiser(fn, process, "denoiser" if process.absorbing else "loo", **options)  # type: ignore[arg-type]


BLOCK_STEPS = [
    dd.Step(S.Multistep(), [dd.Forbid([2])]),
    dd.Step(S.Multistep(), [dd.ClassifierFree("small", 0.5)]),
    dd.Step(S.Multistep(), [dd.ClassifierFree("small", 0.5)]),
    dd.Step(S.Ancestral() >> S.Gibbs(), [dd.when(dd.after(0.2), COOL)], "small"),
]
BLOCK_PLAN = dd.Plan(GRID, BLOCK_STEPS)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_block_runs_the_plan(process: dd.Process, failure_rate: float) -> None:
    models = {"large": network(process, 1), "small": network(process, 2)}
    sampler = dd.Blockwise(process, models, plan=BLOCK_PLAN, block=2)
    law, laws = T.law(sampler, length=3), []
    for prefix in ([], *all_states(V, 2).tolist()):
        tokens = torch.tensor(prefix, dtype=torch.int64).view(1, -1)
        shown = dd.denoiser.ShownPrefix(torch.zeros(1, dtype=torch.int64), torch.tensor([len(prefix)]), tokens)
        given = {name: model.given(shown) for name, model in models.items()}
        size = 1 if prefix else 2  # a block of one site runs the whole plan, too
        laws.append(T.law(dd.Sampler(process, given, plan=BLOCK_PLAN), length=size))
    torch.testing.assert_close(law, (laws[0][:, None] * torch.stack(laws[1:])).flatten(), rtol=0, atol=1e-12)
    swapped = dd.Blockwise(process, models, plan=dd.Plan(GRID, [*BLOCK_STEPS[:3], dd.Step(S.Ancestral())]), block=2)
    assert float((T.law(swapped, length=3) - law).abs().max()) > 1e-3, "planted: another last step"
    out = sampler.sample(20_000, 3, seed=1)
    assert fits(out.tokens, law) > failure_rate
    assert out.nfe == sampler.nfe(3)


def runs(process: dd.Process) -> dict[str, tuple[dd.Sampler | dd.Blockwise, dict[str, object]]]:
    models = {"large": network(process, 1), "small": network(process, 2)}
    drawing = [*BLOCK_STEPS[:2], dd.Step(S.SplitLeap(), [Noisy(), dd.ClassifierFree("small", 0.5)]), BLOCK_STEPS[3]]
    plan = dd.Plan(GRID, drawing)
    asked = {"batch": 4, "length": 4, "seed": 7}
    return {
        "sampler": (dd.Sampler(process, models, plan=BLOCK_PLAN), asked),
        "drawing": (dd.Sampler(process, models, plan=plan), asked),
        "blocks": (dd.Blockwise(process, models, plan=BLOCK_PLAN, block=2), asked | {"prompt": [[], [1], [0, 2], [1]]}),
        "drawing blocks": (dd.Blockwise(process, models, plan=plan, block={1: 0.5, 2: 0.5}), asked | {"stop": 0}),
    }


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("kind", runs(MASKED))
def test_a_plan_cut_at_every_step_is_the_uncut_one(kind: str, process: dd.Process) -> None:
    sampler, asked = runs(process)[kind]
    whole = sampler.sample(**asked, record=True)  # type: ignore[arg-type]
    assert whole.trajectory is not None
    steps = len(whole.trajectory) - 1
    parts = list(walk(sampler, asked, True, steps))  # type: ignore[arg-type]
    assert len(parts) == steps >= 4
    same(parts[-1], whole)  # type: ignore[arg-type]
    assert torch.equal(joined(parts), whole.trajectory)  # type: ignore[arg-type]
    assert parts[-1].calls == whole.calls  # type: ignore[union-attr]
    assert sum(whole.calls.values()) == whole.nfe
    assert set(whole.calls) == {"large", "small"}
    for cut in range(1, steps):
        part = sampler.sample(**asked, until=cut)  # type: ignore[arg-type]
        rest = sampler.sample(resume=part.state)
        assert torch.equal(rest.tokens, whole.tokens)
        assert rest.calls == whole.calls
        assert sum(part.calls.values()) < whole.nfe
    state = sampler.start(**asked)  # type: ignore[arg-type]
    for _ in range(steps):
        state = sampler.step(state)
    assert torch.equal(state.tokens, whole.tokens)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_cascade_whose_second_stage_has_a_plan(process: dd.Process) -> None:
    table = torch.randn(4, V, V, generator=torch.Generator().manual_seed(0)).double()
    first = dd.Sampler(process, network(process, 1), S.Ancestral(), steps=2)
    models = {
        name: dd.Denoiser(lambda x, t, y, k=k: k * table[x, y], process, "loo")  # type: ignore[arg-type]
        for name, k in (("large", 1.0), ("small", -2.0))
    }
    maker = dd.Cascade(first, dd.Sampler(process, models, plan=BLOCK_PLAN))
    asked = {"batch": 6, "lengths": (L, L), "seed": 7}
    whole = maker.sample(**asked)  # type: ignore[arg-type]
    y = whole.first.tokens
    given = {name: model.with_condition(y) for name, model in models.items()}
    right = dd.Sampler(process, given, plan=BLOCK_PLAN).sample(6, L, seed=whole.second.seed)
    assert torch.equal(whole.second.tokens, right.tokens)
    assert whole.second.calls == right.calls
    parts = list(walk(maker, asked, False, 6))
    same(parts[-1][1], whole.second)  # type: ignore[index]
    other = dd.Cascade(first, dd.Sampler(process, models, S.Ancestral(), grid=GRID))
    with pytest.raises(ValueError, match="is not of Cascade"):
        other.step(maker.start(**asked))  # type: ignore[arg-type]


# --- rescoring and forks ----------------------------------------------------------------------------------------------


def recorded(process: dd.Process) -> tuple[dd.Sampler, dd.Samples, dict[str, Network]]:
    torch.manual_seed(0)
    networks = {name: Network(process.states) for name in ("large", "small", "third")}
    models = {name: denoiser(process, "loo", one) for name, one in networks.items() if name != "third"}
    third = denoiser(process, "loo", networks["third"])
    steps = [
        dd.Step(S.Ancestral(), [Noisy(), dd.Truncation(temperature=0.8)]),
        dd.Step(S.Multistep(), [dd.ClassifierFree("small", 0.5)]),
        dd.Step(S.Multistep(), [dd.ClassifierFree("small", 0.5)]),
        dd.Step(S.SplitLeap() >> S.Gibbs(), [dd.when(dd.after(0.5), dd.ClassifierFree(third, -0.3))], "small"),
        dd.Step(S.Multistep(), [dd.when(dd.after(0.15), COOL)]),
        dd.Step(S.Multistep(), [dd.when(dd.after(0.15), COOL)]),
    ]
    sampler = dd.Sampler(process, models, plan=dd.Plan([1.0, 0.8, 0.65, 0.45, 0.3, 0.15, 0.0], steps))
    return sampler, sampler.sample(4, seed=7, record="choices"), networks


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_plan_is_rescored_with_the_gradient_of_each_network(process: dd.Process) -> None:
    sampler, out, networks = recorded(process)
    assert out.choices is not None
    assert out.log_prob is not None
    torch.testing.assert_close(sampler.log_prob(out).detach(), out.log_prob, rtol=0, atol=1e-10)
    assert [*out.choices.guides] == ["1.0.guide0.coins"]
    assert out.choices.guides["1.0.guide0.coins"].shape == (4, L * V)
    for name, network in networks.items():
        found, right = derivatives(lambda: sampler.log_prob(out).sum(), [*network.parameters()], 1e-5)
        assert abs(float(right)) > 1e-3, f"planted: {name} takes no part"
        assert abs(float(found - right)) <= 1e-6 * (abs(float(right)) + 1e-2), name
    given = sampler.log_prob(out, model={"large": sampler.models["small"], "small": sampler.models["large"]})
    assert bool(((given - out.log_prob).abs() > 1e-3).all()), "planted: other models under the names"
    with pytest.raises(ValueError, match=r"step 2: a guide asks the model 'small'; there are \['model'\]"):
        sampler.log_prob(out, model=denoiser(process, "loo", networks["large"]))
    without = out.choices.without("1.0.guide0.coins")
    with pytest.raises(ValueError, match=r"site 1\.0\.guide0\.coins has no recorded value"):
        sampler.log_prob(replace(out, choices=without))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_plan_is_forked_at_every_step(process: dd.Process) -> None:
    sampler, out, _ = recorded(process)
    assert out.trajectory is not None
    for step in range(6):
        same_seed = sampler.fork(out, step=step, seed=7)
        assert torch.equal(same_seed.tokens, out.tokens)
        assert same_seed.choices == out.choices
        forked = sampler.fork(out, step=step, copies=2, seed=11)
        assert forked.trajectory is not None
        shared = out.trajectory[: step + 1].repeat_interleave(2, 1)
        assert torch.equal(forked.trajectory[: step + 1], shared)
        assert forked.log_prob is not None
        torch.testing.assert_close(sampler.log_prob(forked).detach(), forked.log_prob, rtol=0, atol=1e-10)
        part = sampler.sample(4, seed=7, record="choices", until=step + 1)
        assert part.log_prob is not None
        torch.testing.assert_close(sampler.log_prob(part).detach(), part.log_prob, rtol=0, atol=1e-10)
        if step < 5:
            assert sampler.sample(resume=part.state, record="choices").choices == out.choices
    assert not torch.equal(sampler.fork(out, step=0, copies=4, seed=11).tokens, out.tokens.repeat_interleave(4, 0))


# --- what is refused --------------------------------------------------------------------------------------------------


def cyclic(process: dd.Process) -> dict[str, dd.Denoiser]:
    models = models_of(process)
    return {
        "large": models["large"].guided(dd.ClassifierFree("small", 0.5)),
        "small": models["small"].guided(dd.ClassifierFree("large", 0.5)),
    }


def test_names_are_checked_when_a_sampler_is_made() -> None:
    models, op = models_of(UNIFORM), S.Ancestral()
    two = [1.0, 0.5, 0.0]
    deep = models | {"small": models["small"].guided(dd.ClassifierFree("none", 0.5))}
    longer = models | {"long": dirichlet(3.0, 1, V, 3).denoiser(UNIFORM)}
    for steps, known, text in (
        ([dd.Step(op), dd.Step(op, model="none")], models, r"Sampler: step 2 takes the model 'none'; there are"),
        ([dd.Step(op), dd.Step(op, [dd.ClassifierFree("none")])], models, "a guide asks the model 'none'; there are"),
        (
            [dd.Step(op), dd.Step(op, [dd.when(dd.after(0.9), dd.ClassifierFree("none"))])],
            models,
            "asks the model 'none'",
        ),
        ([dd.Step(op), dd.Step(op, [dd.ClassifierFree("small")])], deep, "asks the model 'none'"),
        ([dd.Step(op)] * 2, cyclic(UNIFORM), "the guides of .* ask, in the end, 'large' itself"),
        ([dd.Step(op), dd.Step(op, [dd.Forbid([3])])], models, "step 2: Forbid: tokens must be ids below 3"),
        ([dd.Step(op), dd.Step(op, model="long")], longer, "is for length 2, and .* for length 3"),
        ([dd.Step(op), dd.Step(op, [dd.ClassifierFree("long")])], longer, "is for length 2, and .* for length 3"),
    ):
        with pytest.raises(ValueError, match=text):
            dd.Sampler(UNIFORM, known, plan=dd.Plan(two, steps))
        with pytest.raises(ValueError, match=text):
            dd.Blockwise(UNIFORM, known, plan=dd.Plan(two, steps), block=1)
    assert (
        dd.Sampler(UNIFORM, models, plan=dd.Plan(two, [dd.Step(op, [dd.ClassifierFree("large", 0.5)])] * 2)).nfe == 4.0
    )
