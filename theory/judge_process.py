r"""Check any process against its own transition matrix: a conformance suite for users' processes.

``check_process(process)`` computes the process's kernels, laws, conversions and rates and compares them with what its
transition matrix implies. It does so at survival probabilities of 0, 1e-12 to 1 - 1e-7, and 1, for
one site and for several sites with different times. If possible the process is also built with another vocabulary and
clock. Each check has a name, the largest error and the place where it occurred. An exception inside the process fails
its check and is reported; nothing is raised unless ``strict``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from discdiff.process import Process, require_process
from discdiff.theory import answers, forward
from discdiff.theory.catalogue import kind
from discdiff.theory.report import Check, Errors, NotChecked, Report, run_check

__all__ = ["check_process"]

_MOST_STATES = 9  # limit for another vocabulary, unless the example has more

_Property = tuple[str, float, Callable[..., Errors], str]  # name, tolerance, errors, hint

PROPERTIES: tuple[_Property, ...] = (
    ("schedule: alpha(0) = 1", 1e-12, forward.starts_at_one, "_alpha"),
    ("schedule: alpha falls within [0, 1]", 0.0, forward.falls, "_alpha"),
    ("schedule: alpha_derivative is the derivative", 1e-5, forward.derivative, "_alpha_derivative"),
    ("schedule: time inverts alpha", 1e-6, forward.inverse, "_time"),
    ("schedule: the same process on another clock", 0.0, forward.other_clock, "with_schedule, and _identity for =="),
    ("kernel: rows are laws", 1e-12, forward.rows_are_laws, "transition"),
    ("kernel: nothing happens in no time", 1e-12, forward.identity, "transition where both survivals are equal"),
    ("kernel: Chapman-Kolmogorov", 1e-12, forward.chapman_kolmogorov, "transition between two times"),
    ("generator: rates are rates", 1e-12, forward.generator_rows, "generator"),
    ("generator: Kolmogorov's forward equation", 1e-6, forward.kolmogorov, "generator, per unit of -log alpha"),
    ("rate: Kolmogorov's equation in time", 1e-5, forward.rate, "rate, per unit of time"),
    ("prior: where the kernel ends", 1e-12, forward.prior, "prior"),
    ("marginal: a row of the kernel", 1e-12, forward.marginal, "noised"),
    ("bridge: a law", 1e-12, forward.bridge_is_law, "posterior"),
    ("bridge: Bayes' rule", 1e-10, forward.bridge_is_bayes, "posterior"),
    ("bridge: keeps the marginal", 1e-12, forward.bridge_keeps, "posterior"),
    ("bridge: impossible ends are refused", 0.0, forward.bridge_refuses, "refuse_impossible in posterior"),
    ("bridge: at chosen sites", 1e-12, answers.posterior_where, "where of posterior"),
    ("sites: several, each at its own time", 1e-10, forward.products, "sitewise in noised and posterior"),
    ("rows: each at its own survival", 0.0, answers.row_by_row, "what is computed once for all rows"),
    ("propagate: laws forwards, functions backwards", 1e-12, answers.propagates, "propagate"),
    ("evidence: a column of the kernel", 1e-12, answers.evidence, "evidence, log_weight"),
    ("conversion: c = O Q_t", 1e-12, answers.conditional, "conditional"),
    ("conversion: O from c", 1e-8, answers.conditional_to_loo, "conditional_to_loo"),
    ("conversion: denoiser from leave-one-out", 1e-12, answers.loo_to_denoiser, "loo_to_denoiser, log_weight"),
    ("conversion: leave-one-out from denoiser", 1e-8, answers.denoiser_to_loo, "denoiser_to_loo"),
    ("conversion: the plug-in is the reverse marginal", 1e-10, answers.plug_in, "plug_in"),
    ("states: which settle the token", 0.0, answers.settled, "settled"),
    ("states: which are surely clean", 0.0, answers.revealed, "revealed, absorbing"),
    ("states: columns and places", 0.0, answers.columns, "column, place"),
    ("noise: kept and drawn anew is the marginal", 1e-12, answers.renoise, "kept, renoise"),
    ("noise: further is the kernel", 1e-12, answers.noised_further, "noised_further"),
    ("inflow: a column of the generator", 1e-12, answers.inflow, "inflow"),
    ("sampling: draws follow log_prob (-log10 p)", 6.0, forward.sampling, "_draw of the laws"),
)
OF_RANK_ONE: tuple[_Property, ...] = (
    ("conversion: one weight is all the evidence", 1e-12, answers.own_weight, "own_weight"),
    ("exit: the rates of the reverse process", 1e-10, answers.exits, "exit, elsewhere"),
    ("redraw: candidates and their acceptance", 1e-10, answers.candidates, "candidate, acceptance"),
)
OF_ABSORBING: tuple[_Property, ...] = (("states: what hides a token", 1e-12, answers.hides, "hide"),)
OF_PAIRS: tuple[_Property, ...] = (
    ("pairs: given data and source", 1e-12, answers.pairs_of_source, "noised_pair, join, split"),
)


@torch.no_grad()
def check_process(process: Process, *, strict: bool = False) -> Report:
    """Check a process against its own transition matrix, also with another vocabulary and clock.

    Args:
        process: the process to check; it should have at most a few dozen states, because matrices are dense.
        strict: raise if a check fails.

    Returns:
        The report; ``print`` it, or read ``ok``, ``failed`` and ``unchecked``.

    Raises:
        AssertionError: with ``strict``, listing the failed checks.
        TypeError, ValueError: if ``process`` is not a Process, or has a clock for every site.
    """
    require_process(process, "check_process")
    if process.schedule.sites is not None:
        raise ValueError(
            f"check_process: {process} has a clock for every site; check it on the shared one, schedule.base"
        )
    family, why = _family(process)
    checks = [
        run_check(name, allowed, partial(_over, family, errors), hint=hint)
        for name, allowed, errors, hint in _properties(process)
    ]
    if why:
        checks.append(Check("another vocabulary and clock", float("nan"), 0.0, why, checked=False))
    report = Report(repr(process), tuple(checks))
    if strict and not report.ok:
        raise AssertionError(str(report))
    return report


def _properties(process: Process) -> tuple[_Property, ...]:
    """List the properties of all processes, and those of this kind of process."""
    return (
        *PROPERTIES,
        *(OF_RANK_ONE if process.rank_one else ()),
        *(OF_ABSORBING if process.absorbing else ()),
        *(OF_PAIRS if process.pairs else ()),
    )


def _family(process: Process) -> tuple[list[Process], str]:
    """Return the process and, if possible, one of its kind with another vocabulary and clock.

    The text is the reason why there is no other process, or empty if there is one.
    """
    like = kind(process)
    for setting in like.settings[1:]:
        other = like.at(setting)
        if other is not None and other != process and other.states <= max(_MOST_STATES, process.states):
            return [process, other], ""
    return [process], "its constructor takes more than vocab_size and schedule"


def _over(family: Sequence[Process], errors: Callable[..., Errors]) -> Errors:
    """Yield the errors of all processes; NotChecked from a process other than the first is ignored."""
    yield from errors(family[0])
    for other in family[1:]:
        try:
            for error, where in errors(other):
                yield error, f"{where}, {other}"
        except NotChecked:
            continue
