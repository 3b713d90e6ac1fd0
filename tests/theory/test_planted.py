"""The table of planted faults: each is caught by the check that is for it, and no check is without one."""

import re

import pytest
from planted import OPERATORS, PROCESSES
from problems import named

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory import judge_process as conformance
from discdiff.theory.report import run_check

pytestmark = pytest.mark.usefixtures("as_user")  # many matrices

_ALL = (*conformance.PROPERTIES, *conformance.OF_RANK_ONE, *conformance.OF_ABSORBING, *conformance.OF_PAIRS)
TABLE = {row[0]: row for row in _ALL}


@pytest.mark.parametrize(("process", "claim"), PROCESSES, ids=lambda x: x if type(x) is str else type(x).__name__)
def test_a_wrong_process_is_caught_by_name(process: dd.Process, claim: str) -> None:
    """By the one check, as ``check_process`` runs it."""
    _, allowed, errors, hint = TABLE[claim]
    family, _ = conformance._family(process)
    check = run_check(claim, allowed, lambda: conformance._over(family, errors), hint=hint)
    assert check.failed
    assert hint in str(check)
    assert check.error > 0 or type(process).__name__ in ("Crashes", "NoRows")  # wrong, and no accident on the way


@pytest.mark.parametrize(("operator", "kind", "claim"), OPERATORS, ids=lambda x: x if type(x) is str else named(x)[:40])
def test_a_wrong_operator_is_caught_by_name(operator: dd.Operator, kind: str, claim: str) -> None:
    report = T.check_operator(operator, processes=[kind])
    assert f"{kind}: {claim}" in report.failed, str(report)
    (check,) = (check for check in report.checks if check.name == claim)
    assert check.error > check.allowed  # wrong, and no accident on the way
    assert check.hint in str(report)
    assert list(report.groups) == [kind]
    where = getattr(operator, "where", "")
    places = {
        "V other than 3": ("V = 2", "V = 4"),
        "L other than 3": ("L = 4", "L = 2"),
        "a schedule that is not linear": ("Polynomial", "Cosine"),
        "time 0": ("t = 0",),
    }
    assert any(place in check.where for place in places.get(where, ("",))), "the report says where"


def test_every_check_has_a_planted_fault() -> None:
    assert set(TABLE) == {claim for _, claim in PROCESSES}

    def kind_of(name: str) -> str:
        return re.sub(r"(takes|order) [\d.]+", r"\1", name)

    declared = (
        S.Gibbs(), S.Gibbs(sites=2), S.LocallyBalanced(), S.Ancestral(), S.Thinning(), S.Gillespie(),
        S.Ancestral() >> S.Gibbs(),
    )  # fmt: skip
    names = {check.name for one in declared for check in T.check_operator(one, processes=["marginal"]).checks}
    assert set(map(kind_of, names)) <= {kind_of(claim) for *_, claim in OPERATORS}
