"""Planned denoiser calls against calls made; predictor-corrector schedules that keep to a budget."""

import itertools
from dataclasses import dataclass
from typing import Literal

import pytest
from problems import chain, strong

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

PROCESSES = [dd.Uniform(4, dd.Linear()), dd.Masked(4, dd.Linear()), dd.AbsorbingUniform(4, dd.Linear())]


def defaults(process: dd.Process) -> list[dd.Operator]:
    """Every sampler that has a meaning on a process and declares its calls, as a step."""
    made = [getattr(S, name)() for name in S.__all__]
    steps = [operator if operator.moves else S.Ancestral() >> operator for operator in made]
    found = []
    for operator in steps:
        try:
            operator.check(process)
        except ValueError:
            continue
        found += [operator] if operator.nfe is not None else []
    return found


def calls(operator: dd.Operator, process: dd.Process, steps: int = 4) -> tuple[float, int]:
    """(planned, made) calls of a sampler."""
    sampler = dd.Sampler(process, chain(4, 12).denoiser(process, predicts="loo"), operator, steps=steps)
    assert sampler.nfe is not None
    return sampler.nfe, sampler.sample(12, seed=0).nfe


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_no_sampler_makes_more_calls_than_planned(process: dd.Process) -> None:
    """Fewer, where a step has nothing to look at (again): the last one, or once no site is hidden."""
    for operator in defaults(process):
        planned, made = calls(operator, process)
        assert made <= planned, operator


EQUAL = [
    (S.Ancestral(), 4),
    (S.Ancestral() >> S.Gibbs(2) ** 2, 12),
    (S.Gibbs() >> S.Ancestral() >> S.LocallyBalanced(), 16),
    (dd.when(lambda t: t < 0.5, S.Ancestral() >> S.Gibbs(), S.Ancestral()), 5),  # t = 1, .75, .5, .25
    (dd.when(lambda t: t < 0.6, dd.when(lambda t: t < 0.3, S.SplitLeap(), S.Euler()), S.Ancestral() >> S.Gibbs()), 7),
    (S.Ancestral() >> dd.when(lambda t: t > 0.6, S.Gibbs(), S.Gibbs() ** 3), 12),
]


@pytest.mark.parametrize("process", PROCESSES[::2], ids=repr)
@pytest.mark.parametrize(("operator", "expected"), EQUAL, ids=lambda x: repr(x) if isinstance(x, dd.Operator) else x)
def test_calls_of_any_subset_of_steps_are_planned(operator: dd.Operator, expected: int, process: dd.Process) -> None:
    assert calls(operator, process) == (expected, expected)


def test_a_mixture_plans_the_expected_calls() -> None:
    operator = S.Ancestral() >> dd.mix({S.Gibbs(): 0.75, S.Gibbs() ** 2: 0.25})
    process = PROCESSES[0]
    sampler = dd.Sampler(process, chain(4, 12).denoiser(process, predicts="loo"), operator, steps=4)
    assert sampler.nfe == 4 * 2.25
    rows = sampler.sample(1000, seed=0).nfe_rows.double()
    assert abs(float(rows.mean()) - 9.0) < 5 * float(rows.std()) / 1000**0.5
    assert dd.Sampler(process, sampler.model, S.Adaptive(), steps=4).nfe is None


def test_calls_that_were_not_declared_are_seen() -> None:
    """The planted fault: a corrector that looks twice and declares one call."""

    @dataclass(frozen=True)
    class Greedy(dd.Corrector):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            at.predict(state)
            return (S.Gibbs() >> S.Gibbs())(state, at)

    planned, made = calls(S.Ancestral() >> Greedy(), PROCESSES[0])
    assert made > planned


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nfe", "repeats"), list(itertools.product([1, 2, 3, 4, 7, 8, 31, 64], [1, 2, 3])))
def test_the_schedule_of_the_paper(nfe: int, repeats: int) -> None:
    """n_corr = floor((NFE - 1) / (1 + c)) first steps are corrected, of n_steps = NFE - c n_corr; never the last."""
    process = PROCESSES[0]
    sampler = dd.predictor_corrector(
        process, chain(4, 6).denoiser(process), S.Ancestral(), S.Gibbs(), nfe=nfe, repeats=repeats
    )
    corrected = (nfe - 1) // (1 + repeats)
    assert len(sampler.grid) - 1 == nfe - repeats * corrected
    where = [dd.Sampler(process, sampler.model, sampler.operator, grid=[t, s]).nfe for _, t, s in sampler.intervals()]
    assert where == [1 + repeats] * corrected + [1] * (len(where) - corrected)
    assert where[-1] == 1
    assert sampler.nfe == sampler.sample(50, seed=0).nfe == nfe  # where no row moved, an answer would be used twice


def test_operators_of_several_calls_keep_to_the_budget() -> None:
    process, world = dd.Uniform(3, dd.Linear()), strong()
    model = world.denoiser(process, predicts="loo")
    for nfe in (2, 5, 8, 29):
        sampler = dd.predictor_corrector(process, model, S.SplitLeap(), S.LocallyBalanced(), nfe=nfe, repeats=2)
        assert sampler.nfe is not None
        assert nfe - 2 < sampler.nfe <= nfe
        assert sampler.sample(4, seed=0).nfe <= nfe
    assert "when(before(0.3333333333333333), Ancestral() >> Gibbs(sites=1) ** 2, Ancestral())" in repr(
        dd.predictor_corrector(process, model, S.Ancestral(), S.Gibbs(), nfe=7, repeats=2)
    )


def test_an_exact_corrector_is_worth_its_calls_at_the_end() -> None:
    """Two thirds of a budget spent on Gibbs moves: far better in the last steps, worse than none in the first."""
    process, world = dd.Uniform(3, dd.Linear()), strong()
    model = world.denoiser(process, predicts="loo")

    def kl(corrected: Literal["first", "last"]) -> float:
        sampler = dd.predictor_corrector(
            process, model, S.Ancestral(), S.Gibbs(), nfe=32, repeats=2, corrected=corrected
        )
        assert sampler.nfe == 32
        return T.kl(world.p0, T.law(sampler))

    plain = T.kl(world.p0, T.law(dd.Sampler(process, model, S.Ancestral(), steps=32)))
    assert kl("last") < plain / 10
    assert kl("first") > plain  # the last step is longer, and nothing mends it


@pytest.mark.parametrize(
    ("predictor", "corrector", "nfe", "repeats", "error", "says"),
    [
        (S.Ancestral(), S.Gibbs(), 0, 1, ValueError, "nfe must be at least 1, one step of"),
        (S.SplitLeap(), S.Gibbs(), 1, 1, ValueError, "nfe must be at least 2"),
        (S.Adaptive(), S.Gibbs(), 8, 1, ValueError, "must declare their calls"),
        (S.Ancestral(), S.Gibbs(scan="systematic"), 8, 1, ValueError, "must declare their calls"),
        (S.Ancestral(), S.Euler(), 8, 1, TypeError, "only a corrector can be repeated"),
        (S.Gibbs(), S.Gibbs(), 8, 1, TypeError, "a step needs a predictor"),
        (S.Ancestral(), S.Gibbs(), 8, -1, ValueError, "must be at least 0"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    predictor: dd.Operator, corrector: dd.Operator, nfe: int, repeats: int, error: type[Exception], says: str
) -> None:
    process = PROCESSES[0]
    with pytest.raises(error, match=says):
        dd.predictor_corrector(process, chain(4, 6).denoiser(process), predictor, corrector, nfe=nfe, repeats=repeats)


def test_calls_of_guides_count_in_a_budget() -> None:
    process = dd.Uniform(3, dd.Linear())
    other = strong().denoiser(process)
    for guide in (dd.ClassifierFree(other, 1.0), dd.when(dd.before(0.5), dd.ClassifierFree(other, 1.0))):
        model = strong().denoiser(process).guided(guide)
        sampler = dd.predictor_corrector(process, model, S.Ancestral(), S.Gibbs(), nfe=16)
        assert sampler.nfe is not None
        assert 8 < sampler.nfe <= 16
        assert sampler.sample(64, seed=0).nfe <= 16
    plain = dd.predictor_corrector(process, other, S.Ancestral(), S.Gibbs(), nfe=16)
    twice = dd.Sampler(process, dd.classifier_free(other, other), plain.operator, grid=plain.grid)
    assert twice.nfe == 32, "planted: a plan that forgets the guide"
