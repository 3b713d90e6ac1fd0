r"""A conformance suite that anyone can run on a process of their own: every answer it gives against the dense truth.

``check_process(process)`` asks a process for its kernels, laws, conversions and rates and compares them with what its
own transition matrix implies, on a grid of times with both ends. Each check has a name, the largest error seen and the
place where it was seen. An exception inside the process fails its check and is shown; nothing is raised unless asked.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from discdiff.distributions import Choice
from discdiff.interpolant import Interpolant
from discdiff.process import Process

__all__ = ["Check", "Report", "check_process", "run_check"]

_TIMES = (1.0, 0.9, 0.5, 0.1, 0.02)
_SHARES = (0.0, 0.3, 0.99)


@dataclass(frozen=True)
class Check:
    """One property: its largest error (or p-value, for ``sampling``), what is allowed, and where it was seen."""

    name: str
    error: float
    allowed: float
    where: str

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not

    def __str__(self) -> str:
        mark = "ok  " if self.ok else "FAIL"
        return (
            f"{mark} {self.name}: {self.error:.2g} (allowed {self.allowed:.2g}){'' if self.ok else ', ' + self.where}"
        )


@dataclass(frozen=True)
class Report:
    """What was checked of a subject, in order."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the properties that do not hold."""
        return tuple(check.name for check in self.checks if not check.ok)

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {check}" for check in self.checks)])


Errors = Iterator[tuple[float, str]]


@torch.no_grad()
def check_process(process: Process, *, strict: bool = False) -> Report:
    """Check a process against its own transition matrix.

    Args:
        process: yours; S at most a few dozen, because everything is dense.
        strict: raise if a check fails.

    Returns:
        The report; ``print`` it, or look at ``ok`` and ``failed``.

    Raises:
        AssertionError: with ``strict``, listing what failed.
        TypeError, ValueError: for what is no process, or has a clock for every site.
    """
    if not isinstance(process, Process):
        raise TypeError(f"check_process takes a Process, got {process!r}")
    if process.schedule.sites is not None:
        raise ValueError(
            f"check_process: {process} has a clock for every site; check it on the shared one, schedule.base"
        )
    properties: list[tuple[str, float, Callable[[Process], Errors]]] = [
        ("schedule: alpha(0) = 1", 1e-12, _starts_at_one),
        ("schedule: alpha falls within [0, 1]", 0.0, _falls),
        ("schedule: alpha_derivative is the derivative", 1e-5, _derivative),
        ("schedule: time inverts alpha", 1e-6, _inverse),
        ("kernel: rows are laws", 1e-12, _rows_are_laws),
        ("kernel: nothing happens in no time", 1e-12, _identity),
        ("kernel: Chapman-Kolmogorov", 1e-12, _chapman_kolmogorov),
        ("generator: rates are rates", 1e-12, _generator_rows),
        ("generator: Kolmogorov's forward equation", 1e-6, _kolmogorov),
        ("prior: where the kernel ends", 1e-12, _prior),
        ("marginal: a row of the kernel", 1e-12, _marginal),
        ("bridge: a law", 1e-12, _bridge_is_law),
        ("bridge: Bayes' rule", 1e-10, _bridge_is_bayes),
        ("bridge: keeps the marginal", 1e-12, _bridge_keeps),
        ("evidence: a column of the kernel", 1e-12, _evidence),
        ("conversion: c = O Q_t", 1e-12, _conditional),
        ("conversion: O from c", 1e-8, _unmix),
        ("conversion: denoiser from leave-one-out", 1e-12, _observe),
        ("conversion: leave-one-out from denoiser", 1e-8, _forget),
        ("conversion: the plug-in is the reverse marginal", 1e-10, _plug_in),
        ("inflow: a column of the generator", 1e-12, _inflow),
        ("sampling: draws follow log_prob (-log10 p)", 6.0, _sampling),
    ]
    checks = tuple(run_check(name, allowed, partial(errors, process)) for name, allowed, errors in properties)
    report = Report(repr(process), checks)
    if strict and not report.ok:
        raise AssertionError(str(report))
    return report


def run_check(name: str, allowed: float, errors: Callable[[], Errors]) -> Check:
    """The worst of some errors and where it was; an exception on the way is a finding, not a crash."""
    worst, where = 0.0, ""
    try:
        for error, place in errors():
            if not error <= worst:  # NaN is worst
                worst, where = error, place
            if worst != worst:
                break
    except Exception as error:
        return Check(name, float("nan"), allowed, f"{type(error).__name__}: {error}")
    return Check(name, worst, allowed, where)


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _pairs(process: Process) -> Iterator[tuple[float, float, str]]:
    for t in _TIMES:
        for share in _SHARES:
            yield t, t * share, f"t = {t}, s = {t * share:g}"


def _grid(process: Process) -> Tensor:
    return torch.linspace(0, 1, 201, dtype=torch.float64)


def _starts_at_one(process: Process) -> Errors:
    yield abs(process.schedule.alpha(0.0) - 1), "t = 0"


def _falls(process: Process) -> Errors:
    t = _grid(process)
    alpha = process.schedule.alpha(t)
    for k in range(len(t) - 1):
        rise = float(alpha[k + 1] - alpha[k])
        # A flat stretch is allowed: nothing happens in it.
        place = f"alpha({t[k]:.3g}) = {alpha[k]:.6g}, alpha({t[k + 1]:.3g}) = {alpha[k + 1]:.6g}"
        yield max(rise, 0.0) if rise == rise else rise, place
    yield max(float(-alpha.min()), float(alpha.max()) - 1, 0.0), "the range of alpha"


def _derivative(process: Process) -> Errors:
    t, h = _grid(process)[2:-2], 1e-5
    alpha = process.schedule.alpha
    measured = (alpha(t + h) - alpha(t - h)) / (2 * h)
    error = (process.schedule.alpha_derivative(t) - measured).abs() / (1 + measured.abs())
    yield float(error.max()), f"t = {float(t[int(error.argmax())]):.3g}"


def _inverse(process: Process) -> Errors:
    for t in _TIMES:
        alpha = process.schedule.alpha(t)
        yield abs(process.schedule.alpha(process.schedule.time(alpha)) - alpha), f"t = {t}"


def _rows_are_laws(process: Process) -> Errors:
    for t, s, where in _pairs(process):
        kernel = process.kernel(t, s)
        yield _far(kernel.sum(-1), torch.ones(())), f"a row does not sum to 1 at {where}"
        yield max(float(-kernel.min()), 0.0), f"a negative entry at {where}"


def _identity(process: Process) -> Errors:
    for t in (*_TIMES, 0.0):
        yield _far(process.kernel(t, t), torch.eye(process.states).double()), f"s = t = {t}"


def _chapman_kolmogorov(process: Process) -> Errors:
    for t, s, where in _pairs(process):
        yield _far(process.kernel(s) @ process.kernel(t, s), process.kernel(t)), where


def _generator_rows(process: Process) -> Errors:
    for t in _TIMES[1:]:
        rates = process.generator(process.schedule.alpha(t))
        yield _far(rates.sum(-1), torch.zeros(())), f"a row does not sum to 0 at t = {t}"
        off = rates - torch.diag(rates.diagonal())
        yield max(float(-off.min()), 0.0), f"a negative rate at t = {t}"


def _kolmogorov(process: Process) -> Errors:
    for t in _TIMES[1:]:
        alpha, h = process.schedule.alpha(t), 1e-5
        ends = (process.transition(alpha * math.exp(-h), 1.0), process.transition(min(1.0, alpha * math.exp(h)), 1.0))
        slope = (ends[0] - ends[1]) / (h + min(h, -math.log(alpha)))
        yield _far(slope, process.transition(alpha, 1.0) @ process.generator(alpha)), f"t = {t}"


def _rows(law: Choice, states: int) -> Tensor:
    """Each row's law over states, for sequences of one site, from ``log_prob``."""
    return torch.stack([law.log_prob(torch.full((law.batch_shape[0], 1), z)).exp() for z in range(states)], -1)


def _prior(process: Process) -> Errors:
    if process.schedule.alpha(1.0) == 0:
        yield _far(_rows(process.prior(1, 1), process.states), process.marginals(1.0)), "alpha = 0"


def _marginal(process: Process) -> Errors:
    x0 = process.data_tokens[:, None]
    for t in (*_TIMES, 0.0):
        yield _far(_rows(process.marginal(x0, t), process.states), process.marginals(t)), f"t = {t}"


def _ends(process: Process, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every (x0, x_t) that can be, as (N, 1) each, and its q_t."""
    q = process.marginals(t)
    x0, x_t = (q > 0).nonzero(as_tuple=True)
    return process.data_tokens[x0][:, None], x_t[:, None], q[x0, x_t]


def _bridge_rows(process: Process, t: float, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, x_t, q = _ends(process, t)
    return x0, x_t, q, _rows(process.bridge(x_t, x0, t, s), process.states)


def _bridge_is_law(process: Process) -> Errors:
    for t, s, where in _pairs(process):
        rows = _bridge_rows(process, t, s)[3]
        yield _far(rows.sum(-1), torch.ones(())), where


def _bridge_is_bayes(process: Process) -> Errors:
    for t, s, where in _pairs(process):
        x0, x_t, q, rows = _bridge_rows(process, t, s)
        rank = torch.searchsorted(process.data_tokens, x0[:, 0])
        expected = process.marginals(s)[rank] * process.kernel(t, s)[:, x_t[:, 0]].T / q[:, None]
        yield _far(rows, expected), where


def _bridge_keeps(process: Process) -> Errors:
    for t, s, where in _pairs(process):
        x0, _, q, rows = _bridge_rows(process, t, s)
        for rank, v in enumerate(process.data_tokens.tolist()):
            of = x0[:, 0] == v
            yield _far(q[of] @ rows[of], process.marginals(s)[rank]), f"x0 = {v}, {where}"


def _evidence(process: Process) -> Errors:
    x = torch.arange(process.states)[:, None]
    for t in _TIMES[1:]:
        q = process.marginals(t).T
        reached = q.sum(-1) > 0
        said = process.evidence(x, process.schedule.alpha(t))[:, 0]
        yield _far(said[reached], (q / q.amax(-1, keepdim=True))[reached]), f"t = {t}"


def _beliefs(process: Process, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random LOO at every state that can be reached: log O (N, V), O over data tokens, x (N,), alpha (N,)."""
    x = (process.marginals(t).sum(0) > 0).nonzero()[:, 0]
    data = process.data_tokens
    weights = torch.rand(len(x), len(data), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    o = weights / weights.sum(-1, keepdim=True)
    log_o = torch.full((len(x), process.vocab_size), -torch.inf, dtype=torch.float64)
    log_o[:, data] = o.log()
    return log_o, o, x, torch.full((len(x),), process.schedule.alpha(t), dtype=torch.float64)


def _conditional(process: Process) -> Errors:
    for t in _TIMES[1:]:
        log_o, o, x, alpha = _beliefs(process, t)
        said = process.conditional(log_o, x, alpha).exp()
        yield _far(said, _moves(process, x, o @ _given(process, x, t))), f"t = {t}"


def _given(process: Process, x: Tensor, t: float) -> Tensor:
    """q_t(. | v) for each row's x, conditional on what of x is frozen: (N, n, S)."""
    q = process.marginals(t).expand(len(x), -1, -1)
    if not isinstance(process, Interpolant):
        return q
    same = process.split(torch.arange(process.states))[1] == process.split(x)[1][:, None]
    q = q * same[:, None]
    return q / q.sum(-1, keepdim=True)


def _moves(process: Process, x: Tensor, c: Tensor) -> Tensor:
    """(N, n, S) or (N, S) against each row's belief, at the columns its site can move among."""
    c = c.diagonal(dim1=0, dim2=1).T if c.ndim == 3 else c
    columns = torch.arange(process.columns).expand(len(x), -1)
    return c.gather(-1, process.place(columns, x[:, None]))


def _unmix(process: Process) -> Errors:
    for t in _TIMES[1:-1]:
        log_o, _, x, alpha = _beliefs(process, t)
        c = process.conditional(log_o, x, alpha).exp()
        yield _far(process.unmix(c, x, alpha), log_o.exp()), f"t = {t}"


def _observe(process: Process) -> Errors:
    for t in _TIMES[1:]:
        log_o, o, x, alpha = _beliefs(process, t)
        open_ = ~process.revealed(x, alpha)
        said = process.observe(log_o, x, alpha)[open_].softmax(-1)[:, process.data_tokens]
        d = o * process.marginals(t)[:, x].T
        yield _far(said, (d / d.sum(-1, keepdim=True))[open_]) if bool(open_.any()) else 0.0, f"t = {t}"


def _forget(process: Process) -> Errors:
    for t in _TIMES[1:]:
        log_o, _, x, alpha = _beliefs(process, t)
        open_ = ~process.settled(x, alpha)
        if bool(open_.any()):
            log_d = process.observe(log_o, x, alpha)[open_].log_softmax(-1)
            said = process.forget(log_d, x[open_], alpha[open_]).softmax(-1)
            yield _far(said, log_o[open_].exp()), f"t = {t}"


def _plug_in(process: Process) -> Errors:
    for t, s, where in _pairs(process):
        log_o, o, x, _ = _beliefs(process, t)
        alpha_t, alpha_s = (torch.full((len(x),), process.schedule.alpha(a), dtype=torch.float64) for a in (t, s))
        if float(alpha_t[0]) == 0:
            continue  # the limit alpha -> 0+ is the oracles' affair
        said = process.plug_in(log_o, x, alpha_t, alpha_s).exp()
        c = _moves(process, x, o @ _given(process, x, s))
        exact = c * _moves(process, x, process.kernel(t, s)[:, x].T)
        possible = exact.sum(-1) > 0
        exact = exact / exact.sum(-1, keepdim=True)
        yield _far(said[possible], exact[possible]), where


def _inflow(process: Process) -> Errors:
    x = torch.arange(process.states)
    for t in _TIMES[1:]:
        alpha = process.schedule.alpha(t)
        said = process.inflow(x[:, None], alpha)[:, 0].expand(-1, process.columns)
        exact = _moves(process, x, process.generator(alpha).T)
        other = torch.arange(process.columns) != process.column(x)[:, None]
        yield _far(said * other, exact * other), f"t = {t}"


def _sampling(process: Process) -> Errors:
    """-log10 of the p-value of scipy's chi-square, for the marginal of one token and one bridge."""
    from scipy import stats  # imported where it is used: scipy takes half a second

    draws = 20_000
    x0 = process.data_tokens[:1].expand(draws, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        laws = [("marginal", process.marginal(x0, 0.5))]
        reached = (process.marginals(0.8)[0] > 0).nonzero()[-1:]
        laws.append(("bridge", process.bridge(reached.expand(draws, 1), x0, 0.8, 0.4)))
        for name, law in laws:
            states = torch.arange(process.states)
            p = torch.stack([law.log_prob(z.expand(draws, 1))[0].exp() for z in states])
            count = torch.bincount(law.sample()[:, 0], minlength=process.states).double()
            if bool((count[p == 0] > 0).any()):
                yield float("inf"), f"{name}: a draw of probability 0"
            if int((p > 0).sum()) > 1:
                pvalue = stats.chisquare(count[p > 0], draws * p[p > 0] / p.sum()).pvalue
                yield float(-torch.tensor(pvalue).clamp(min=1e-300).log10()), name
