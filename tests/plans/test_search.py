"""Searches: what they find, that they can be stopped anywhere, and what they refuse."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import dirichlet

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

P = dd.plans
WORLD = dirichlet(0.5, 3, 3, 2)
UNIFORM = dd.Uniform(3, dd.Linear())
MODEL = WORLD.denoiser(UNIFORM)
STEPS = [S.Ancestral(), S.MaximalCoupling()]
KL, BOUND = P.KL(WORLD), P.KLUB(WORLD)
Method = P.Method


def search(method: Method, seed: int = 0, calls: int = 4, **options: object) -> "P.Found":
    options = {"operators": STEPS, "objective": KL, "times": 12, **options}
    return P.search(UNIFORM, MODEL, calls=calls, method=method, seed=seed, **options)  # type: ignore[arg-type]


# --- what they find --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_surrogate_is_ahead_of_random_plans() -> None:
    """200 evaluations, 10 seeds; the excess over the best of all 3126 plans."""
    grid = [1 - n / 12 for n in range(12)] + [0.0]
    space = P.Space(UNIFORM, MODEL, STEPS, grid, 4)
    every = [KL.score(dd.Sampler(UNIFORM, MODEL, plan=space.plan(gene))) for gene in space.every()]
    least = min(every)
    assert len(every) == 3126
    excess = {
        name: [search(method, seed).objective - least for seed in range(10)]
        for name, method in (("random", P.Random(200)), ("surrogate", P.Surrogate(200)))
    }
    assert min(min(each) for each in excess.values()) > -1e-12
    assert statistics.mean(excess["surrogate"]) < statistics.mean(excess["random"]) / 3
    assert sum(a < b for a, b in zip(excess["surrogate"], excess["random"], strict=True)) >= 8
    assert statistics.mean(excess["random"]) > 1e-4


def networks() -> dict[str, dd.Denoiser]:
    """A large network, which is exact, and a small one that knows the sites alone; their costs are 4 and 1."""
    sites = WORLD.p0.view(3, 3)
    product = torch.outer(sites.sum(1), sites.sum(0)).flatten()
    blurred = T.Enumeration(0.6 * WORLD.p0 + 0.4 * product, vocab_size=3, length=2)
    made = {"large": WORLD.denoiser(UNIFORM), "small": blurred.denoiser(UNIFORM)}
    costs = {"large": 4.0, "small": 1.0}
    return {
        name: dd.Denoiser(one.fn, UNIFORM, one.predicts, time="alpha", length=2, time_dtype=torch.float64,
                          cost=costs[name]) for name, one in made.items()
    }  # fmt: skip


@pytest.mark.slow
def test_evolution_finds_the_best_plan_of_two_networks() -> None:
    """4 steps, each with one of two networks and temperatures, within a cost: 10 of 10 seeds."""
    models = networks()
    steps = [dd.Step(S.Ancestral(), model="large"), dd.Step(S.Ancestral(), model="small"),
             dd.Step(S.Ancestral(), [dd.Truncation(temperature=0.9)], "small")]  # fmt: skip
    grid = [1 - n / 6 for n in range(6)] + [0.0]
    space = P.Space(UNIFORM, models, steps, grid, 4, 11.0)
    scores = sorted(KL.score(dd.Sampler(UNIFORM, models, plan=space.plan(gene))) for gene in space.every())
    assert len(scores) > 500
    for seed in range(10):
        found = P.search(UNIFORM, models, calls=4, cost=11.0, operators=steps, objective=KL, times=6, seed=seed,
                         method=P.Evolution(evaluations=400))  # fmt: skip
        assert found.objective == pytest.approx(scores[0], abs=1e-12)
        assert len(found.trials) < len(scores)
        cost = dd.Sampler(UNIFORM, models, plan=found).cost
        assert cost is not None and cost <= 11
        assert {step.model for step in found.steps} == {"large", "small"}, "a plan of one network is worse"
    assert scores[5] > scores[0] + 1e-6, "planted: another plan"
    front = found.front
    assert [one.cost for one in front] == sorted(one.cost for one in front if one.cost is not None)
    assert [one.objective for one in front] == sorted((one.objective for one in front), reverse=True)
    assert len(front) >= 4 and front[-1].objective == found.objective
    for one in found.trials:
        assert any(two.objective <= one.objective and (two.cost or 0) <= (one.cost or 0) for two in front)


@pytest.mark.slow
def test_golden_sections_move_the_times_of_a_uniform_grid() -> None:
    found = search(P.GoldenSection())
    uniform = min(KL.score(dd.Sampler(UNIFORM, MODEL, step, steps=4)) for step in STEPS)
    assert found.objective < uniform * 0.97
    assert len(found.grid) == 5 and found.grid[0] == 1 and found.grid[-1] == 0
    times = [one.plan.grid for one in found.trials]
    assert found.objective == min(one.objective for one in found.trials)
    assert len(set(times)) > 40


@pytest.mark.parametrize("method", [P.Random(30), P.Surrogate(30, 15, 3, 50), P.Evolution(30, 8, 3), P.Dynamic(),
                                    P.GoldenSection(1, 3)], ids=repr)  # fmt: skip
def test_more_calls_do_no_harm_and_the_limit_holds(method: Method) -> None:
    objective = BOUND
    steps = [S.Ancestral(), S.SplitLeap()]
    found = [search(method, calls=calls, operators=steps, objective=objective, times=4) for calls in (2, 6)]
    assert found[1].objective < found[0].objective
    for one, calls in zip(found, (2, 6), strict=True):
        assert all(trial.calls <= calls for trial in one.trials)
        sampler = dd.Sampler(UNIFORM, MODEL, plan=one)
        assert one.objective == pytest.approx(objective.score(sampler), abs=1e-12)
        assert sampler.sample(2, seed=0).tokens.shape == (2, 2)


# --- stopped and gone on with -----------------------------------------------------------------------------------------

EACH = [P.Random(25), P.Surrogate(25, 10, 3, 40), P.Evolution(25, 8, 3), P.GoldenSection(1, 3), P.Dynamic()]


class Stopping(P.KLUB):
    """The bound, whose computation is killed at a given number of values."""

    left = 10**9

    def term(self, *arguments: object) -> float:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return BOUND.term(*arguments)  # type: ignore[arg-type]  # whose matrices are kept


@pytest.mark.parametrize("method", EACH, ids=repr)
def test_a_search_killed_at_ten_places_goes_on_to_the_same_plan(method: Method, tmp_path: Path) -> None:
    options = {"operators": [S.Ancestral(), S.Euler()], "times": 5, "calls": 3}
    whole = search(method, 3, objective=Stopping(WORLD), file=tmp_path / "whole", **options)  # type: ignore[arg-type]
    lines = (tmp_path / "whole").read_text().splitlines()
    for place in range(10):
        file, objective = tmp_path / f"{place}", Stopping(WORLD)
        objective.left = 1 + 5 * place
        try:
            search(method, 3, objective=objective, file=file, **options)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            assert len(file.read_text().splitlines()) < len(lines)
        if place % 2:  # killed while a line was written
            file.write_text(file.read_text()[:-3])
        again = search(method, 3, objective=Stopping(WORLD), file=file, **options)  # type: ignore[arg-type]
        assert again == whole and again.objective == whole.objective
        assert file.read_text().splitlines() == lines
    spent = Stopping(WORLD)
    spent.left = 0
    assert search(method, 3, objective=spent, file=tmp_path / "whole", **options) == whole  # type: ignore[arg-type]


class Shifted(P.KL):
    """The KL less a number, so that all values are below 0; the order of plans is that of the KL."""

    def score(self, sampler: dd.Sampler) -> float:
        return super().score(sampler) - 10


def test_the_surrogate_learns_from_values_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that the predictor ranks best are better on average than plans of the same proposals in their order."""

    def proposed() -> float:
        values = [trial.objective for trial in search(P.Surrogate(40, 20, 2, 400), objective=Shifted(WORLD)).trials]
        assert max(values) < 0
        return sum(values[20:]) / len(values[20:]) + 10

    found = proposed()
    monkeypatch.setattr(P.Surrogate, "_predicted", lambda self, scored, offered, space: np.zeros(len(offered)))
    blind = proposed()
    assert found < 0.7 * blind, "planted: a predictor that has left out all values"


def test_a_file_of_another_search_is_refused(tmp_path: Path) -> None:
    search(P.Random(3), file=tmp_path / "one")
    other = P.KL(dirichlet(0.5, 4, 3, 2))
    for changed in ({"seed": 1}, {"calls": 3}, {"times": 11}, {"operators": STEPS[:1]}, {"objective": other}):
        with pytest.raises(ValueError, match="is of another search"):
            search(P.Random(3), file=tmp_path / "one", **changed)  # type: ignore[arg-type]


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    class Wrong(P.Objective):
        def score(self, sampler: dd.Sampler) -> float:
            return math.nan

    with pytest.raises(ValueError, match="gave NaN"):
        search(P.Random(3), objective=Wrong())
    file = tmp_path / "one"
    search(P.Random(3), file=file)
    head, *lines = file.read_text().splitlines(keepends=True)
    for wrong in ('["a", NaN]', '["a", "b"]', '["a", 1.0, 2.0]', '{"a": 1.0}', "3"):
        file.write_text(head + wrong + "\n" + "".join(lines))
        with pytest.raises(ValueError, match="holds a text and a number, got"):
            search(P.Random(3), file=file)


@pytest.mark.parametrize("method", EACH[:3], ids=repr)
def test_the_seed_decides(method: Method) -> None:
    one, two, other = (search(method, seed) for seed in (0, 0, 1))
    assert one == two and one.trials == two.trials
    assert [trial.plan for trial in one.trials] != [trial.plan for trial in other.trials]


# --- a judge, and what is refused -------------------------------------------------------------------------------------


def test_a_judge_with_a_floor_on_the_entropy() -> None:
    """Without the floor the judge prefers cold plans; a plan below the floor is excluded."""
    chain = T.MarkovChain(torch.ones(3) / 3, torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]), 24)
    model = chain.denoiser(UNIFORM)
    steps = [dd.Step(S.Ancestral()), dd.Step(S.Ancestral(), [dd.Truncation(temperature=0.2)])]

    def found(floor: float) -> "P.Found":
        judge = P.Judge(chain.log_prob, length=24, floor=floor, samples=32)
        return P.search(UNIFORM, model, calls=4, operators=steps, objective=judge, method=P.Random(12), times=4)

    free, held = found(0.0), found(0.9)
    tokens = [dd.Sampler(UNIFORM, model, plan=one).sample(32, 24, seed=0).tokens for one in (free, held)]
    assert P.Judge.entropy(tokens[0]) < 0.9 <= P.Judge.entropy(tokens[1])
    assert free.objective < held.objective == pytest.approx(float(-chain.log_prob(tokens[1]).mean()))
    with pytest.raises(ValueError, match=r"none of the .* plans that were tried has a finite objective"):
        found(2.0)


@pytest.mark.usefixtures("as_user")
def test_what_is_refused_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"operators": []}, "at least one operator"),
        ({"operators": [S.AnyOrder()]}, "needs a process with a true mask"),
        ({"operators": [S.Adaptive()]}, "does not declare its number of calls"),
        ({"calls": 0}, "calls must be at least"),
        ({"operators": [S.Reveal(calls=9)]}, "not one step is within 4 calls"),
        ({"operators": [S.Gibbs()]}, "predictor"),
        ({"objective": 3}, "objective must be"),
        ({"method": 3}, "method must be"),
        ({"cost": 3.0}, "needs its cost"),
        ({"method": P.Dynamic()}, "an objective that is a sum over steps, KLUB"),
        ({"times": [0.5, 0.0]}, "from 1 to 0"),
    ]
    for changed, said in cases:
        options = {"method": P.Random(3), **changed}
        with pytest.raises((TypeError, ValueError), match=said):
            search(**options)  # type: ignore[arg-type]
    for make in (P.Random, P.Evolution, P.Surrogate):
        with pytest.raises(ValueError, match="evaluations"):
            make(0)
    search(P.Random(3), progress=True)
    assert "searching" in capsys.readouterr().err


def test_a_found_plan_is_a_plan() -> None:
    found = search(P.Random(5))
    assert dd.Plan.from_json(found.to_json()) == found
    assert isinstance(found, dd.Plan) and "Plan([1.0" in repr(found)
