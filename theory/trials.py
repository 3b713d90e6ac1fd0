r"""Test an operator's draws and matrices on small data laws that are known.

Each function takes the cases of one kind of process and yields errors with the place where they occurred.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from discdiff.denoiser import Denoiser, Tally
from discdiff.operator import Operator, Run
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.sampling import Particles, Sampler
from discdiff.theory.catalogue import Setting, world
from discdiff.theory.divergence import tv
from discdiff.theory.exact import TooManyPaths, kernel
from discdiff.theory.fit import improbable
from discdiff.theory.report import Errors, NotChecked
from discdiff.theory.world import Enumeration, all_states, state_index

__all__ = [
    "Case", "alone", "calls", "draws", "ends_right", "enumerable", "frozen", "keeps", "keeps_by_draws", "keyed", "laws",
    "moves", "nearly", "weighed",
]  # fmt: skip

# each interval is a step of an equal grid from 1 to 0: schedulers of other libraries support only those
EVERYWHERE = ((1.0, 0.95), (0.95, 0.9), (0.6, 0.4), (0.1, 0.05), (0.05, 0.0), (1.0, 0.0))
ELSEWHERE = ((0.95, 0.9), (0.4, 0.2), (0.05, 0.0))
DRAWS = 20_000  # in the middle of time; 4,000 elsewhere
PATHS = 2**16  # limit: a program with more paths is not enumerated
ROWS = 2**32  # row ids are smaller


class Case:
    """Operator on a process, with a small data law (``world``) whose noisy laws are computed exactly.

    ``home`` marks the first case of a kind, which is tested at more times and with more draws.
    """

    def __init__(self, operator: Operator, process: Process, setting: Setting, seed: int, home: bool = False) -> None:
        self.operator: Operator = operator
        self.process: Process = process
        self.setting: Setting = setting
        self.home: bool = home
        self.seed: int = seed
        self.world: Enumeration = world(setting)
        # on a masked process only predicts="loo" gives a leave-one-out at clean sites
        self.model: Denoiser = self.world.denoiser(process, predicts="loo")
        self.known: dict[tuple[float, float], Tensor] = dict[tuple[float, float], Tensor]()
        self._enumerable: bool | None = None

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """List the intervals (t, s) to test.

        For a corrector each (t, s) is replaced by (t, t), and in the ``home`` case (0, 0) is added.
        """
        some = EVERYWHERE if self.home else ELSEWHERE
        if self.operator.moves:
            return some
        return tuple((t, t) for t in dict.fromkeys([*(t for t, _ in some), *([0.0] if self.home else [])]))

    def __str__(self) -> str:
        return f"V = {self.setting.vocab_size}, L = {self.setting.length}, {self.process.schedule}"

    def place(self, t: float, s: float) -> str:
        """Return the name of an interval, for a report."""
        return f"{self}, t = {t:g}" + (f", s = {s:g}" if self.operator.moves else "")

    def over(self) -> Iterator[tuple[float, float, str]]:
        """Yield every interval and its name, except times at 0 or 1 that a corrector refuses."""
        for t, s in self.intervals:
            if not self.refuses(t, s):
                yield t, s, self.place(t, s)

    def refuses(self, t: float, s: float) -> str:
        """Return the message with which a corrector refuses time 0 or 1, and "" in all other cases."""
        if self.operator.moves or 0 < t < 1:
            return ""
        try:
            self.run(self.starts(t, 16), t, s)
        except ValueError as error:
            return str(error)
        except Exception:  # an error of the operator, reported by a check
            return ""
        return ""

    def matrix(self, t: float, s: float) -> Tensor:
        """Return the exact matrix of a step, which is computed once and kept."""
        if (t, s) not in self.known:
            end = s if self.operator.moves else None
            self.known[t, s] = kernel(self.operator, self.process, self.model, t, end, most=PATHS)
        return self.known[t, s]

    @property
    def is_enumerable(self) -> bool:
        """Return whether the operator's matrices can be enumerated in all intervals."""
        if self._enumerable is None:
            self._enumerable = self.operator.enumerable
            try:
                for t, s, _ in self.over() if self._enumerable else ():
                    self.matrix(t, s)
            except TooManyPaths:
                self._enumerable = False
            except Exception:  # an error of the operator, reported by a check
                pass
        return self._enumerable

    def run(
        self, tokens: Tensor, t: float, s: float, first_row: int = 0, fixed: Tensor | None = None
    ) -> tuple[Tensor, Tally]:
        """Apply the operator once to given states, as a sampler does; return tokens and counts of denoiser calls."""
        run = Run.start(self.model, len(tokens), self.seed, first_row=first_row)
        return self.operator(*run.begin(tokens, t, s, 1, fixed)).tokens, run.tally

    def starts(self, t: float, count: int) -> Tensor:
        """Draw ``count`` states from the exact law p_t."""
        p = self.world.marginal(self.process, t)
        drawn = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(self.seed + 2))
        return all_states(self.process.states, self.setting.length)[drawn]

    def ends(self, x: Tensor, t: float, s: float) -> Tensor:
        """Apply a step to given states, half of them in rows with the largest ids."""
        half = len(x) // 2
        return torch.cat([self.run(x[:half], t, s)[0], self.run(x[half:], t, s, first_row=ROWS - len(x) + half)[0]])

    def draws_at(self, t: float) -> int:
        """Return the number of draws of a statistical check at time t."""
        return DRAWS if self.home and 0.1 < t < 0.9 else DRAWS // 5


def enumerable(cases: Sequence[Case]) -> Iterator[Case]:
    """Yield the cases whose matrices can be enumerated.

    Raises:
        NotChecked: if there are none.
    """
    found = False
    for case in cases:
        if case.is_enumerable:
            found = True
            yield case
    if not found:
        raise NotChecked("its program has no end, or more paths than can be enumerated")


# --- keys and frozen sites ------------------------------------------------------------------------------------------


def keyed(cases: Sequence[Case]) -> Errors:
    """Check that a row's tokens do not depend on the rest of the batch, for rows with small and large ids."""
    for case in cases:
        for t, s, where in case.over():
            x = case.starts(t, 64)
            for first in (0, ROWS - 64) if case.home else (ROWS - 64,):
                whole = case.run(x, t, s, first)[0]
                parts = [case.run(part, t, s, first + begin)[0] for begin, part in ((0, x[:23]), (23, x[23:]))]
                differ = float((torch.cat(parts) != whole).sum())
                yield differ, f"tokens that differ in two smaller batches, rows from {first}, {where}"


def alone(cases: Sequence[Case]) -> Errors:
    """Check that rows with distant ids draw differently, as they would not if ids were truncated or rounded."""
    for case in cases[:1]:
        for t, s, where in case.over():
            x = case.starts(t, 1).expand(128, -1).contiguous()
            here = case.run(x, t, s)[0]
            if int((here != here.mode(0).values).any(-1).sum()) < 32:
                continue  # too little randomness here to compare
            for bit in (7, 16, 24, 31):
                there = case.run(x, t, s, first_row=1 << bit)[0]
                yield float(torch.equal(here, there)), f"rows from 0 and from 2^{bit} draw the same, {where}"


def frozen(cases: Sequence[Case]) -> Errors:
    """Check that frozen sites keep their tokens; the number of frozen sites in a row is random."""
    for case in cases:
        for t, s, where in case.over():
            x = case.starts(t, 256)
            generator = torch.Generator().manual_seed(case.seed + 3)
            fixed = torch.rand(x.shape, generator=generator) < torch.rand(len(x), 1, generator=generator)
            data = case.process.data_tokens
            given = data[torch.randint(len(data), x.shape, generator=generator)]
            x = torch.where(fixed, case.process.place(given, x), x)
            after = case.run(x, t, s, fixed=fixed)[0]
            yield float((after != x)[fixed].sum()), f"frozen tokens changed, {where}"


def calls(cases: Sequence[Case]) -> Errors:
    """Check that a row needs on average at most the declared number of denoiser calls.

    In at least one interval the denoiser must be called at least that often for the whole batch.
    """
    for case in cases:
        declared, most = case.operator.nfe or 0.0, 0
        for t, s, where in case.over():
            _, counter = case.run(case.starts(t, 1024), t, s)
            a_row, most = counter.nfe_rows.double(), max(most, counter.nfe)
            chance = 4 * float(a_row.std()) / 32
            yield max(float(a_row.mean()) - chance - declared, 0.0), f"{float(a_row.mean()):.3f} calls a row, {where}"
        yield max(declared - most, 0.0), f"{most} calls of the batch at most, {case}"


def weighed(cases: Sequence[Case]) -> Errors:
    """Check that the choices of a run under a tilted prediction are possible under the exact one."""
    for case in cases:
        size = case.process.vocab_size
        log_g = torch.linspace(-1.5, 1.5, size, dtype=torch.float64)
        model = case.model.guided(partial(_tilted, log_g=log_g))
        for t, s, where in case.over():
            times: dict[str, Any] = {"grid": (t, s)} if case.operator.moves else {"time": t}
            steered = Particles(Sampler(case.process, model, case.operator, **times), None, 1)
            lost = ""
            try:
                steered.sample(initial=case.starts(t, 512), seed=case.seed)
            except ValueError as error:
                lost = str(error)
            yield float("No weight makes up" in lost), f"{lost or 'runs are weighed'}, {where}"


def _tilted(said: Prediction, log_g: Tensor) -> Prediction:
    """Tilt all sites by one log g (V,)."""
    return said.tilted(lambda row, position: log_g.expand(len(row), -1))


# --- matrices and draws ---------------------------------------------------------------------------------------------


def laws(cases: Sequence[Case]) -> Errors:
    """Check that the rows of the exact matrix are laws: they sum to 1 and no entry is negative."""
    for case in enumerable(cases):
        for t, s, where in case.over():
            k = case.matrix(t, s)
            yield float((k.sum(-1) - 1).abs().max()), f"sum of a row, {where}"
            yield float((-k).clamp(min=0).max()), f"negative entry, {where}"


def draws(cases: Sequence[Case]) -> Errors:
    """Test draws from at most 16 initial states against the exact matrix by chi-square; yield -log10 p.

    The initial states are few, because over all of p_t an exact corrector and the identity give the same law.
    """
    for case in enumerable(cases):
        size = case.process.states
        for t, s, where in case.over():
            x = case.starts(t, 16).repeat(case.draws_at(t) // 16, 1)
            begins, number = state_index(x, size).unique(return_inverse=True)
            expected = case.matrix(t, s)[begins] * number.bincount()[:, None]
            seen = torch.zeros_like(expected)
            ends = state_index(case.ends(x, t, s), size)
            seen.index_put_((number, ends), torch.ones_like(ends, dtype=seen.dtype), accumulate=True)
            yield improbable(seen.flatten(), expected.flatten()), where


def ends_right(cases: Sequence[Case]) -> Errors:
    """Test by chi-square the law after a step from the exact p_t; yield -log10 p.

    A predictor must end in p_s, a corrector in p_t. Predictors are tested inside (0, 1), to which their order refers,
    since rates may be infinite at the ends.
    """
    for case in cases:
        for t, s, where in case.over():
            if case.operator.moves and (t == 1 or s == 0):
                continue
            x = case.starts(t, case.draws_at(t))
            law = case.world.marginal(case.process, s)
            ends = state_index(case.ends(x, t, s), case.process.states)
            yield improbable(torch.bincount(ends, minlength=len(law)).double(), law * len(x)), where


# --- correctors -----------------------------------------------------------------------------------------------------


def moves(cases: Sequence[Case]) -> Errors:
    """Yield the share of states that a corrector leaves unchanged, at the time at which the share is smallest.

    A corrector must change states at one time at least.
    """
    for case in cases:
        stayed = {}
        for t, s, where in case.over():
            x = case.starts(t, 1024)
            stayed[where] = float((case.run(x, t, s)[0] == x).all(-1).double().mean())
        where = min(stayed, key=stayed.__getitem__)
        yield stayed[where], where


def keeps(cases: Sequence[Case]) -> Errors:
    """Yield TV(p_t K, p_t), which is 0 if a corrector's matrix K preserves p_t."""
    for case in enumerable(cases):
        for t, s, where in case.over():
            p = case.world.marginal(case.process, t)
            yield tv(p @ case.matrix(t, s), p), f"TV of p_t K from p_t, {where}"


def nearly(cases: Sequence[Case]) -> Errors:
    """Yield TV(p_t K, p_t) / max(.1, TV(q, p_t)) for a corrector's matrix K.

    q is the product of the sites' marginals of p_t. Only cases of at least three sites are used: in a sequence of two
    sites a corrector of two sites redraws everything.
    """
    for case in enumerable([case for case in cases if case.setting.length > 2]):
        sites = all_states(case.process.states, case.setting.length)
        for t, s, where in case.over():
            p, apart = case.world.marginal(case.process, t), torch.ones(len(sites), dtype=torch.float64)
            for site in sites.T:
                apart = apart * torch.zeros(case.process.states).double().index_add(0, site, p)[site]
            lost = tv(p @ case.matrix(t, s), p)
            yield lost / max(tv(apart, p), 0.1), f"TV of p_t K from p_t: {lost:.2g}, {where}"


def keeps_by_draws(cases: Sequence[Case]) -> Errors:
    """Test by chi-square that a corrector preserves p_t, in cases that cannot be enumerated; yield -log10 p."""
    yield from ends_right([case for case in cases if not case.is_enumerable])
