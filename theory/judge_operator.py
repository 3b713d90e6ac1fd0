r"""Check an operator's declarations against the exact law of its own program.

``check_operator(op)`` runs any operator on small known data laws, for every kind of process that it accepts. Its
program is enumerated if it is finite; otherwise draws are tested by chi-square. Each kind is built for several
vocabularies, lengths and clocks, and tested in the first step, early, in the middle, late and in the step to 0, because
a declaration may hold in one case and fail in another. What cannot be checked is reported as unchecked, not as passed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from discdiff.operator import Operator
from discdiff.operator import check_operator as _check_composition
from discdiff.process import Process
from discdiff.theory import convergence, trials
from discdiff.theory.catalogue import COARSE, KINDS, USUAL, Kind, kinds
from discdiff.theory.report import Check, Errors, Report, run_check
from discdiff.theory.trials import Case

__all__ = ["check_operator"]


class _Property(NamedTuple):
    name: str
    allowed: float
    errors: Callable[[Sequence[Case]], Errors]
    hint: str


def check_operator(
    operator: Operator,
    *,
    processes: Sequence[Process | str] | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Report:
    """Check an operator's declarations against the exact law of its program, on small data laws.

    Args:
        operator: the operator to check.
        processes: kinds of processes, by name ("uniform") or example (``Uniform(3, Linear())``); each is built for
            every vocabulary and clock. By default the kinds in ``USUAL`` that the operator accepts; if it accepts none
            of these, the kinds whose states are pairs.
        seed: the seed of the draws.
        strict: raise if a check fails.

    Returns:
        The report, grouped by kinds; ``print`` it, or read ``ok``, ``failed`` and ``unchecked``.

    Raises:
        AssertionError: with ``strict``, listing the failed checks.
        TypeError, ValueError: if ``operator`` is not an operator or accepts none of the processes, or for an unknown
            kind.
    """
    _check_composition(operator, "check_operator")
    offered = kinds(USUAL if processes is None else processes, "check_operator")
    accepted, refused = _accepted(operator, offered, seed)
    if not accepted and processes is None:
        accepted, more = _accepted(operator, [one for one in KINDS.values() if one.pairs], seed)
        refused += more
    if not accepted:
        raise ValueError(f"check_operator: {operator} accepts none of the processes: {'; '.join(refused)}")
    checks: list[Check] = []
    for one, cases in accepted:
        checks += [
            run_check(name, allowed, partial(errors, cases), one.name, hint)
            for name, allowed, errors, hint in _properties(operator, cases, _coarse(operator, one, cases))
        ]
        checks += _left_out(operator, one, cases)
    report = Report(repr(operator), tuple(checks))
    if strict and not report.ok:
        raise AssertionError(str(report))
    return report


def _accepted(
    operator: Operator, offered: Sequence[Kind], seed: int
) -> tuple[list[tuple[Kind, list[Case]]], list[str]]:
    """List the kinds that an operator accepts, with their cases, and the error messages for the other kinds."""
    accepted, refused = [], []
    for one in offered:
        cases: list[Case] = []
        why = f"{one.name} has no setting"
        for setting in one.settings:
            process = one.at(setting)
            if process is None:
                continue
            try:
                operator.check(process)
            except (TypeError, ValueError) as error:
                why = f"{process}: {error}"
                continue
            cases.append(Case(operator, process, setting, seed, home=not cases))
        if cases:
            accepted.append((one, cases))
        else:
            refused.append(why)
    return accepted, refused


def _coarse(operator: Operator, one: Kind, cases: Sequence[Case]) -> Case:
    """Choose the case in which an order is measured."""
    process = one.at(COARSE)
    try:
        if process is not None:
            operator.check(process)
            return Case(operator, process, COARSE, cases[0].seed)
    except ValueError:
        pass
    return cases[0]


def _left_out(operator: Operator, one: Kind, cases: Sequence[Case]) -> Iterator[Check]:
    """Yield an unchecked result for each setting or time that the operator refuses or the kind cannot have."""

    def unchecked(name: str, why: str) -> Check:
        return Check(name, float("nan"), 0.0, why, one.name, checked=False)

    tried = [case.setting for case in cases]
    for setting in one.settings:
        if setting not in tried:
            place = f"V = {setting.vocab_size}, L = {setting.length}, {setting.schedule}"
            process = one.at(setting)
            yield unchecked(place, "there is no process of this kind and size" if process is None else "it is refused")
    for case in cases:
        for t, s in case.intervals:
            if why := case.refuses(t, s):
                yield unchecked(case.place(t, s), why)


def _properties(operator: Operator, cases: Sequence[Case], coarse: Case) -> Iterator[_Property]:
    yield _Property(
        "the same key gives the same tokens, in any batch",
        0.0,
        trials.keyed,
        "draws that do not go through choose, and what is computed from the whole batch",
    )
    yield _Property(
        "rows far apart draw apart",
        0.0,
        trials.alone,
        "state.rows, which must reach choose as they are, up to 2^32 - 1",
    )
    yield _Property(
        "frozen sites are left alone", 0.0, trials.frozen, "state.free, outside of which nothing may change"
    )
    if operator.nfe is not None:
        name = f"takes {operator.nfe:g} calls a step"
        yield _Property(name, 0.02, trials.calls, "nfe, and how often at.predict is called for a row")
    if operator.weighable:
        name, hint = "its runs can be weighed under another prediction", "weighable, and decisions without a choice"
        yield _Property(name, 0.0, trials.weighed, hint)
    if operator.enumerable:
        hint = "the program's probabilities: every choice a law, nothing random outside of choose"
        yield _Property("rows of the kernel are laws", 1e-12, trials.laws, hint)
        hint = "what depends on rows, counts or hidden state beside the choices"
        yield _Property("draws follow the kernel (-log10 p)", 6.0, trials.draws, hint)
    yield from _of_predictor(operator, cases, coarse) if operator.moves else _of_corrector(operator, cases)


def _of_corrector(operator: Operator, cases: Sequence[Case]) -> Iterator[_Property]:
    yield _Property("it moves (the share of p_t that stays)", 0.99, trials.moves, "whether anything is redrawn at all")
    hint = "which sites are chosen by what they hold, several at once, and the denoiser in the leave-one-out's place"
    if operator.invariant == "exact":
        if operator.enumerable:
            yield _Property("keeps p_t", 1e-12, trials.keeps, hint)
        if not all(case.is_enumerable for case in cases):
            yield _Property("keeps p_t (-log10 p)", 6.0, trials.keeps_by_draws, hint)
    elif operator.invariant == "approximate":
        yield _Property("keeps p_t nearly", 1.0, trials.nearly, hint)


def _of_predictor(operator: Operator, cases: Sequence[Case], coarse: Case) -> Iterator[_Property]:
    hint = "the step to s = 0, which must reveal every site"
    yield _Property("the step to 0 ends on data", 0.0, convergence.on_data, hint)
    if not operator.order:
        return  # orders None and 0 declare nothing to check
    if operator.order == float("inf"):
        hint = "the rates, and the events after a jump"
        yield _Property("ends in p_s (-log10 p)", 6.0, trials.ends_right, hint)
        return
    name, hint = f"order {operator.order:g}", "rates that are clipped, looked at too early, or of another time"
    if any(case.is_enumerable for case in cases):
        yield _Property(f"{name} (distance of the slope)", 0.1, partial(convergence.end_order, where=coarse), hint)
        yield _Property(f"{name} of a step, early and late (distance of the slope)", 0.3, convergence.step_order, hint)
        hint = "the step to s = 0, which must draw a site from its exact law given the others"
        yield _Property("the step to 0 is exact for one site (distance of the slope)", 0.3, convergence.last_step, hint)
    else:
        yield _Property(f"{name} by draws (distance of the slope)", 0.3, convergence.measured_order, hint)
