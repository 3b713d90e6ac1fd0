"""Errors of single steps from data against the enumerated bound, and first states that are scored and used again."""

import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from problems import dirichlet, states

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

P = dd.plans
WORLD = dirichlet(0.5, 3, 3, 2)
TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)
KINDS: tuple[Literal["loo", "denoiser"], ...] = ("loo", "denoiser")
PROCESSES = [dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())]


def rows(count: int) -> torch.Tensor:
    """Data tokens (N, 2) of the world."""
    drawn = torch.multinomial(WORLD.p0, count, replacement=True, generator=torch.Generator().manual_seed(5))
    return states(3, 2)[drawn]


def terms(process: dd.Process) -> torch.Tensor:
    """The enumerated terms of all intervals, (n, n)."""
    bound, sampler = P.KLUB(WORLD), dd.Sampler(process, WORLD.denoiser(process), S.Ancestral(), steps=1)
    found = torch.zeros(len(TIMES), len(TIMES), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(TIMES)), 2):
        found[i, j] = bound.term(sampler, dd.Step(S.Ancestral()), TIMES[i], TIMES[j])
    return found


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_error_of_an_interval_is_that_of_the_bound(process: dd.Process) -> None:
    """Within 3 standard errors (10 intervals, each process); an exact network's part of a fine step is no error."""
    found = P.measure(process, WORLD.denoiser(process), rows(4000), TIMES, seed=2)
    exact, far, planted = terms(process), [], []
    for i, j in itertools.combinations(range(len(TIMES)), 2):
        wanted = float(exact[i, j] - exact.diagonal(1)[i:j].sum())
        if j == i + 1:
            assert abs(float(found.error[i, j])) < 1e-12
            continue
        error = float(found.standard_error[i, j])
        far.append(abs(float(found.error[i, j]) - wanted) / error)
        planted.append(abs(float(found.bound[i, j]) - wanted) / error)
    assert max(far) < 3
    assert min(planted) > 3, "planted: the part of the bound in place of the error"


def test_the_grid_has_the_least_sum_of_errors() -> None:
    found = P.measure(PROCESSES[1], WORLD.denoiser(PROCESSES[1]), rows(200), TIMES)
    for steps in (1, 2, 3, 4):
        inner = itertools.combinations(range(1, len(TIMES) - 1), steps - 1)
        paths = [(0, *middle, len(TIMES) - 1) for middle in inner]
        sums = [sum(float(found.error[a, b]) for a, b in itertools.pairwise(path)) for path in paths]
        best = min(zip(sums, paths, strict=True))[1]
        assert found.grid(steps) == tuple(TIMES[index] for index in best)
    with pytest.raises(ValueError, match="steps"):
        found.grid(5)


def test_the_bound_from_data_orders_plans_as_the_enumerated_one() -> None:
    """Differences between plans, in nats, to the noise of the data."""
    process = PROCESSES[1]
    model, data = WORLD.denoiser(process), rows(4000)
    exact, estimated = P.KLUB(WORLD), P.KLUB(data=data, seed=3)
    estimated.prepare(TIMES)
    values = []
    for grid in ([1.0, 0.0], [1.0, 0.75, 0.0], [1.0, 0.25, 0.0], [1.0, 0.5, 0.25, 0.0], list(TIMES)):
        sampler = dd.Sampler(process, model, S.Ancestral(), grid=grid)
        values.append((exact.score(sampler), estimated.score(sampler)))
    apart = [(one - values[-1][0], other - values[-1][1]) for one, other in values]
    assert all(abs(one - other) < 0.02 for one, other in apart)
    assert apart[0][0] > 0.1, "one step is far from four"


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("of", ["loo", "denoiser"])
def test_the_bound_from_data_finds_the_parameterisation(process: dd.Process, of: Literal["loo", "denoiser"]) -> None:
    """A network whose O, or whose D, was sharpened to the power 1.25: tempering the same law at 1.25 is chosen."""
    model = WORLD.denoiser(process)
    warm = [dd.Step(S.Ancestral(), (dd.Truncation(temperature=1.25, of=each),)) for each in KINDS]
    choices, data = [dd.Step(S.Ancestral()), *warm], P.KLUB(data=rows(1500))
    sharp = model.guided(dd.Truncation(temperature=0.8, of=of))
    kinds = []
    for asked in (sharp, model):
        found = P.search(process, asked, calls=2, times=2, operators=choices, method=P.Dynamic(), objective=data)
        kinds.append([guide.of for step in found.steps for guide in step.guides])
    assert len(kinds[0]) == 2  # at t = 1 nothing is known, so that D is O; a masked D at hidden sites is O as well
    assert process.masks or kinds[0][-1] == of
    assert kinds[1] == [], "planted: an exact network needs no temperature"


class Stopping(P.KLUB):
    """The bound from data, whose computation is killed after a number of terms."""

    left = 10**9

    def term(self, *arguments: Any) -> float:  # noqa: ANN401
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().term(*arguments)


class Forgetful(Stopping):
    """Planted: the reference is the step that this run measured first."""

    def prepare(self, times: tuple[float, ...], first: dd.Step | None = None) -> None:
        super().prepare(times)


def resumed(kind: type[Stopping], method: "P.Method", folder: Path) -> list[bool]:
    """Whether a search that was killed at each of ten places ends at the same plan and value."""
    process, data = PROCESSES[1], rows(40)
    model = WORLD.denoiser(process).guided(dd.Truncation(temperature=0.8))
    steps = [dd.Step(S.Ancestral(), (dd.Truncation(temperature=warm),)) for warm in (1.0, 1.25, 1.5)]
    options: dict[str, Any] = {"calls": 3, "times": 4, "operators": steps, "method": method}
    whole, same = P.search(process, model, objective=kind(data=data), **options), []
    for place in range(10):
        stopped, file = kind(data=data), folder / f"{kind.__name__} {place}"
        stopped.left = 1 + 3 * place
        with pytest.raises(KeyboardInterrupt):
            P.search(process, model, objective=stopped, file=file, **options)
        again = P.search(process, model, objective=kind(data=data), file=file, **options)
        same.append(again == whole and again.objective == whole.objective)
    return same


@pytest.mark.parametrize("method", [P.Dynamic(), P.Surrogate(14, 8, 2, 60)], ids=repr)
def test_a_search_from_data_killed_at_ten_places_goes_on_to_the_same_plan(method: "P.Method", tmp_path: Path) -> None:
    assert all(resumed(Stopping, method, tmp_path))
    if isinstance(method, P.Dynamic):
        assert not all(resumed(Forgetful, method, tmp_path)), "planted: the reference of a resumed run is another"


def test_reused_noise_has_its_enumerated_law() -> None:
    """Kept draws gain score and lose the law where the first state tells of the data; elsewhere they change nothing."""
    process, log_p = PROCESSES[1], WORLD.p0.log()
    model = WORLD.denoiser(process)
    for start, gains in ((1.0, False), (0.6, True)):
        sampler = dd.Sampler(process, model, S.Ancestral(), grid=[start, start / 2, 0.0])
        laws = torch.stack([T.law(sampler, initial=row) for row in torch.eye(9, dtype=torch.float64)])
        tokens = states(3, 2)
        kept = P.ScoredNoise(tokens, laws @ log_p).keep(2)
        even = torch.full((9,), 1 / 9, dtype=torch.float64)
        reused, fresh = (T.law(sampler, initial=law) for law in (kept.law(process), even))
        torch.testing.assert_close(reused, kept.law(process) @ laws, atol=1e-14, rtol=0)
        gain, distance = float((reused - fresh) @ log_p), T.tv(reused, fresh)
        if gains:
            assert gain > 0.05
            assert distance > 0.05
        else:
            assert abs(gain) < 1e-12
            assert distance < 1e-12
    drawn = kept.draw(4000, seed=1)
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in kept.tokens.tolist()}
    parts = [kept.draw(size, seed=1, first_row=first) for first, size in ((0, 1), (1, 1500), (1501, 2499))]
    assert torch.equal(torch.cat(parts), drawn)  # a row depends on the seed and its number alone
    assert not torch.equal(kept.draw(4000, seed=2), drawn)


def test_first_states_are_scored_by_their_runs() -> None:
    process = PROCESSES[1]
    sampler = dd.Sampler(process, WORLD.denoiser(process), S.Ancestral(), steps=3)
    found = P.score_noise(sampler, lambda x: (x == 0).double().sum(-1), count=8, repeats=3, seed=4)
    runs = sampler.sample(initial=found.tokens.repeat_interleave(3, 0), seed=5).tokens
    assert torch.equal(found.scores, (runs == 0).double().sum(-1).view(8, 3).mean(1))
    best = found.keep(3).scores
    assert torch.equal(best, found.scores.sort(descending=True).values[:3])
    with pytest.raises(ValueError, match="keep: count"):
        found.keep(9)
    with pytest.raises(ValueError, match="a single state, so there is nothing to choose"):
        P.score_noise(dd.Sampler(PROCESSES[0], WORLD.denoiser(PROCESSES[0]), S.Ancestral(), steps=2), score=len)
    with pytest.raises(ValueError, match="score must give"):
        P.score_noise(sampler, lambda x: x.double(), count=2, repeats=1)
