r"""Whether an operator is what it says it is: every declaration against the exact law of its own program.

``check_operator(op)`` runs an operator of anyone's on small worlds with everything known, for every process that it
accepts, by enumeration of its program where that has an end and by chi-square where it has not.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from discdiff.denoiser import Counter
from discdiff.handlers import At, Run
from discdiff.hybrid import Hybrid
from discdiff.interpolant import AbsorbingUniform
from discdiff.operator import Operator, Then
from discdiff.operator import check_operator as _check_composition
from discdiff.process import Process
from discdiff.rank_one import Marginal, Masked, Uniform
from discdiff.sampler import Sampler
from discdiff.schedule import Linear
from discdiff.state import State
from discdiff.theory.conformance import Report, run_check
from discdiff.theory.divergence import tv
from discdiff.theory.enumeration import Enumeration, all_states, state_index
from discdiff.theory.order import order
from discdiff.theory.program import TooManyPaths, kernel

__all__ = ["check_operator"]

SITES = TOKENS = 3
# every interval is a step of equal ones from 1 to 0: others' schedulers know no more
WINDOW = (0.9, 0.1)
REFINEMENTS = ([8, 16, 32], [32, 64, 128], [96, 192, 384])
TIMES = ((0.6, 0.4), (0.4, 0.2))
DRAWS = 20_000
PATHS = 2**20  # a program with more of them is not enumerated
Errors = Iterator[tuple[float, str]]


class _Case:
    """An operator on a process, beside a world of which all is known."""

    def __init__(self, operator: Operator, process: Process) -> None:
        self.operator, self.process, self.known = operator, process, dict[tuple[float, float], Tensor]()
        p0 = 0.05 / TOKENS**SITES + 0.95 * np.random.default_rng(3).dirichlet(np.full(TOKENS**SITES, 0.5))
        self.world = Enumeration(torch.as_tensor(p0), vocab_size=TOKENS, length=SITES)  # strongly coupled
        # a masked process has no leave-one-out at clean sites but the oracle's own
        self.model = self.world.denoiser(process, predicts="loo")

    def matrix(self, t: float, s: float) -> Tensor:
        if (t, s) not in self.known:
            end = s if self.operator.moves else None
            self.known[t, s] = kernel(self.operator, self.process, self.model, t, end, most=PATHS)
        return self.known[t, s]

    def is_enumerable(self) -> bool:
        """Whether its matrices are within reach."""
        try:
            for t, s in TIMES:
                self.matrix(t, s)
        except TooManyPaths:
            return False
        except Exception:  # its own, which a check will report
            return True
        return True

    def run(
        self, tokens: Tensor, t: float, s: float, first_row: int = 0, frozen: Tensor | None = None
    ) -> tuple[Tensor, Counter]:
        """One application to given states, as a sampler would make it."""
        counter = Counter(self.model, first_row, torch.zeros(len(tokens), dtype=torch.int64))
        rows = torch.arange(first_row, first_row + len(tokens))
        state = State(tokens, t, rows, None if frozen is None else frozen.expand(len(tokens), -1))
        at = At(self.process, Run(1, counter), t, s if self.operator.moves else t, step=1)
        return self.operator(state, at).tokens, counter

    def starts(self, t: float, count: int = DRAWS) -> Tensor:
        """States drawn from p_t."""
        p = self.world.marginal(self.process, t)
        drawn = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(2))
        return all_states(self.process.states, SITES)[drawn]


def check_operator(operator: Operator, *, processes: Sequence[Process] | None = None, strict: bool = False) -> Report:
    """Check an operator's declarations against the exact law of its program, on 3 sites of 3 tokens.

    Args:
        operator: yours.
        processes: where; by default those of Masked, Uniform, Marginal and Hybrid that it accepts, or AbsorbingUniform.
        strict: raise if a check fails.

    Returns:
        The report; ``print`` it, or look at ``ok`` and ``failed``.

    Raises:
        AssertionError: with ``strict``, listing what failed.
        TypeError, ValueError: for what is no operator, or is accepted by no process.
    """
    _check_composition(operator, "check_operator")
    accepted, refused = _accepted(operator, processes or _usual())
    if not accepted and not processes:  # matrices of 729 states, for those that are for nothing else
        accepted, more = _accepted(operator, [AbsorbingUniform(TOKENS, Linear())])
        refused += more
    if not accepted:
        raise ValueError(f"check_operator: {operator} accepts none of the processes: {'; '.join(refused)}")
    cases = [_Case(operator, process) for process in accepted]
    checks = tuple(
        run_check(f"{case.process}: {name}", allowed, partial(errors, case))
        for number, case in enumerate(cases)
        for name, allowed, errors in _properties(operator, operator.enumerable and case.is_enumerable())
        if errors is not _order or number < 2  # many matrices
    )
    report = Report(repr(operator), checks)
    if strict and not report.ok:
        raise AssertionError(str(report))
    return report


def _usual() -> list[Process]:
    schedule = Linear()
    law = torch.tensor([0.5, 0.3, 0.2])
    return [
        Masked(TOKENS, schedule),
        Uniform(TOKENS, schedule),
        Marginal(law, schedule),
        Hybrid(TOKENS, schedule, p_uniform=0.3),
    ]


def _accepted(operator: Operator, offered: Sequence[Process]) -> tuple[list[Process], list[str]]:
    """Those that an operator accepts, and what it says of the others."""
    accepted, refused = [], []
    for process in offered:
        try:
            operator.check(process)
            accepted.append(process)
        except (TypeError, ValueError) as error:
            refused.append(f"{process}: {error}")
    return accepted, refused


def _properties(operator: Operator, enumerable: bool) -> Iterator[tuple[str, float, Callable[[_Case], Errors]]]:
    yield "the same key gives the same tokens, in any batch", 0.0, _keyed
    yield "frozen sites are left alone", 0.0, _frozen
    if operator.nfe is not None:
        yield f"takes {operator.nfe:g} calls a step", 0.02, _calls
    if enumerable:
        yield "rows of the kernel are laws", 1e-12, _laws
        yield "draws follow the kernel (-log10 p)", 6.0, _draws
    if not operator.moves:
        yield "it moves (the share of p_t that stays)", 0.99, _moves
        if operator.invariant == "exact" and enumerable:
            yield "keeps p_t", 1e-12, _keeps
        elif operator.invariant == "exact":
            yield "keeps p_t (-log10 p)", 6.0, _ends_right
        elif operator.invariant == "approximate" and enumerable:
            yield "keeps p_t nearly", 0.1, _keeps
    elif operator.order == float("inf"):  # exact whatever the step
        yield "ends in p_s (-log10 p)", 6.0, _ends_right
    elif operator.order and enumerable:  # order 0 promises nothing
        least = isinstance(operator, Then)  # of a composition it is a lower bound
        yield f"order {'at least ' * least}{operator.order:g} (distance of the slope)", 0.1, _order


def _keyed(case: _Case) -> Errors:
    for t, s in TIMES:
        x = case.starts(t, 64)
        whole = case.run(x, t, s)[0]
        yield float((case.run(x, t, s)[0] != whole).sum()), f"tokens that differ in a second run, t = {t}"
        yield float((case.run(x[40:], t, s, first_row=40)[0] != whole[40:]).sum()), f"in a smaller batch, t = {t}"


def _frozen(case: _Case) -> Errors:
    frozen = torch.tensor([False, True, False])
    for t, s in TIMES:
        x = case.starts(t, 512)
        x[:, 1] = case.process.data_tokens[0]
        yield float((case.run(x, t, s, frozen=frozen)[0][:, 1] != x[:, 1]).sum()), f"frozen tokens changed, t = {t}"


def _calls(case: _Case) -> Errors:
    """A row makes no more calls than declared on average (fewer where one is not needed).

    The batch makes no fewer, but at times at which there is nothing to do.
    """
    declared, most = case.operator.nfe or 0.0, 0
    for t, s in TIMES:
        _, counter = case.run(case.starts(t, 4096), t, s)
        a_row, most = counter.nfe_rows.double(), max(most, counter.nfe)
        chance = 4 * float(a_row.std()) / 64
        yield max(float(a_row.mean()) - chance - declared, 0.0), f"{float(a_row.mean()):.3f} calls a row, t = {t}"
    yield max(declared - most, 0.0), f"{most} calls of the batch at most"


def _laws(case: _Case) -> Errors:
    for t, s in TIMES:
        k = case.matrix(t, s)
        yield float((k.sum(-1) - 1).abs().max()), f"sum of a row, t = {t}"
        yield float((-k).clamp(min=0).max()), f"negative entry, t = {t}"


def _draws(case: _Case) -> Errors:
    for t, s in TIMES:
        x = case.starts(t)
        expected = case.matrix(t, s)[state_index(x, case.process.states)].sum(0)
        yield _improbable(case.run(x, t, s)[0], expected, case.process.states), f"t = {t}"


def _ends_right(case: _Case) -> Errors:
    for t, s in TIMES:
        end = case.world.marginal(case.process, s if case.operator.moves else t)
        yield _improbable(case.run(case.starts(t), t, s)[0], end * DRAWS, case.process.states), f"t = {t}"


def _improbable(tokens: Tensor, expected: Tensor, states: int) -> float:
    """-log10 of the p-value of a chi-square test, cells of fewer than 5 expected draws put together."""
    seen = torch.bincount(state_index(tokens, states), minlength=len(expected)).double()
    if float(seen[expected <= 1e-9 * DRAWS].sum()) > 0:
        return float("inf")
    rare = expected < 5
    both = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (seen, expected)]
    keep = both[1] > 0
    from scipy.stats import chisquare  # imported where it is used: scipy takes half a second

    p = chisquare(both[0][keep].numpy(), both[1][keep].numpy(), sum_check=False).pvalue
    return float(-np.log10(max(p, 1e-300)))


def _moves(case: _Case) -> Errors:
    """At some time; at others there may be nothing to do."""
    starts = [(case.starts(t), t) for t, _ in TIMES]
    stayed = [float((case.run(x, t, t)[0] == x).all(-1).double().mean()) for x, t in starts]
    yield min(stayed), f"t = {TIMES[stayed.index(min(stayed))][0]}"


def _keeps(case: _Case) -> Errors:
    for t, s in TIMES:  # a corrector looks at t alone
        p = case.world.marginal(case.process, t)
        yield tv(p @ case.matrix(t, s), p), f"TV of p_t K from p_t, t = {t}"


def _order(case: _Case) -> Errors:
    """How far the slope falls short where it is asymptotic: the coarsest refinement that shows it will do.

    An order is the least over processes and data. Where nothing is clipped, rules that clip do better than they
    declare, and elsewhere their first-order error may take a thousand steps to outgrow the second-order one.
    """
    declared, found = case.operator.order or 0.0, []
    for steps in REFINEMENTS:
        slope = order(steps, lambda n: Sampler(case.process, case.model, case.operator, steps=n), window=WINDOW)
        distance = declared - slope
        found.append((max(distance, 0.0), f"slope {slope:.2f} at {steps}"))
        if distance <= 0.1 or distance > 0.5:  # shown, or too far to be brought by a finer grid
            break
    yield min(found)
