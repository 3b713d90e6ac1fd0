r"""Build each kind of process for any vocabulary and clock, and small data laws (worlds) to test operators on.

An operator's declaration is for a kind of process, not for one instance: what holds for 3 sites of 3 tokens on a linear
clock may be wrong elsewhere. ``kind("uniform")``, or ``kind(process)`` with an example, returns a ``Kind`` that builds
such a process for V tokens and a schedule. The noise law or generator of an example is repeated or cut to fit
another V.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from discdiff.checks import meant
from discdiff.process import (
    AbsorbingUniform,
    Cosine,
    General,
    Geometric,
    Hybrid,
    Interpolant,
    Linear,
    LogLinear,
    Marginal,
    Masked,
    Ordinal,
    Polynomial,
    Process,
    Schedule,
    TimeVarying,
    Uniform,
)
from discdiff.theory.world import Enumeration

__all__ = ["COARSE", "KINDS", "SETTINGS", "USUAL", "Kind", "Setting", "kind", "kinds", "world"]

Build = Callable[[int, Schedule], Process]


@dataclass(frozen=True)
class Setting:
    """Size and clock of a small data law, and whether some sequences have probability 0 (``zeros``)."""

    length: int
    vocab_size: int
    schedule: Schedule
    zeros: bool = False


# most is tested in the first
SETTINGS = (
    Setting(3, 3, Linear()),
    Setting(4, 2, Polynomial(2.0), zeros=True),
    Setting(2, 4, Cosine()),
)
COARSE = Setting(3, 2, Linear())  # where an order is measured, which takes a matrix for each step
# for processes whose states are pairs of tokens: V^2 states a site
_PAIRS = (COARSE, Setting(2, 3, Polynomial(2.0), zeros=True), Setting(2, 2, Cosine()))


@dataclass(frozen=True)
class Kind:
    """Kind of process: its name, and ``build``, which makes a process from a vocabulary size and a clock.

    ``pairs`` says whether states are pairs of tokens.
    """

    name: str
    build: Build
    example: Process | None = None
    pairs: bool = False

    @property
    def settings(self) -> tuple[Setting, ...]:
        """List the settings to test.

        They are the usual settings. If this kind has an example whose vocabulary size and clock are not among them, a
        setting with these is added.
        """
        settings = _PAIRS if self.pairs else SETTINGS
        given = self.example
        if given is None or any((s.vocab_size, s.schedule) == (given.vocab_size, given.schedule) for s in settings):
            return settings
        return (*settings, Setting(3 if given.states <= 4 else 2, len(given.data_tokens), given.schedule))

    def at(self, setting: Setting) -> Process | None:
        """Return the process for a setting, or None if this kind has no process of that size.

        If this kind has an example with the size and clock of the setting, the example is returned.
        """
        given = self.example
        if given is not None and (len(given.data_tokens), given.schedule) == (setting.vocab_size, setting.schedule):
            return given
        try:
            return self.build(setting.vocab_size, setting.schedule)
        except ValueError:
            return None


def world(setting: Setting) -> Enumeration:
    """Return a data law with strongly dependent sites.

    It is .05 times the uniform law plus .95 times a law drawn from Dirichlet(1/2). If ``setting.zeros`` is
    true, the least likely third of the sequences get probability 0.
    """
    size = setting.vocab_size**setting.length
    p0 = 0.05 / size + 0.95 * np.random.default_rng(3).dirichlet(np.full(size, 0.5))
    if setting.zeros:
        p0[np.argsort(p0)[: size // 3]] = 0
    return Enumeration(torch.as_tensor(p0 / p0.sum()), vocab_size=setting.vocab_size, length=setting.length)


def _resized_law(law: Tensor, size: int) -> Tensor:
    """Repeat or cut a law to another size, and normalise it."""
    repeated = law.repeat(-(-size // len(law)))[:size]
    return repeated / repeated.sum()


def _resized_rates(rates: Tensor, size: int) -> Tensor:
    """Repeat or cut a generator to another size; copies of one state jump to each other at the mean rate."""
    off = rates.to_dense().clone().fill_diagonal_(0.0)
    n = len(off)
    mean = float(off.sum()) / (n * (n - 1)) if n > 1 else 1.0
    off.fill_diagonal_(mean)
    index = torch.arange(size) % n
    larger = off[index[:, None], index].fill_diagonal_(0.0)
    return larger - torch.diag(larger.sum(-1))


def _finite(schedule: Schedule) -> Schedule:
    """Replace a clock with alpha(1) = 0 by one with alpha(1) > 0."""
    if float(schedule.alpha(1.0)) > 0:
        return schedule
    return LogLinear(0.02) if schedule == Linear() else Geometric(0.1, 4.0)


def _turning(t: float) -> Tensor:
    """Return a generator on three states at time t; generators at different times do not commute."""
    one = torch.tensor([[0.0, 0.9, 0.2], [0.3, 0.0, 0.7], [0.6, 0.4, 0.0]], dtype=torch.float64)
    rates = (1 - t) * one + t * one.flip(0, 1)
    return rates - torch.diag(rates.sum(-1))


_LAW = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
_ZERO = torch.tensor([0.0, 0.6, 0.4], dtype=torch.float64)  # noise never takes token 0

KINDS: dict[str, Kind] = {
    found.name: found
    for found in (
        Kind("masked", Masked),
        Kind("uniform", Uniform),
        Kind("marginal", lambda v, clock: Marginal(_resized_law(_LAW, v), clock)),
        Kind("hybrid", lambda v, clock: Hybrid(v, clock, p_uniform=0.3)),
        Kind("ordinal", Ordinal),
        Kind("general", lambda v, clock: General(_resized_rates(_turning(0.3), v), clock)),
        Kind("time_varying", lambda v, clock: TimeVarying(_turned(v), _finite(clock), pieces=5)),
        Kind("masked_inside", lambda v, clock: Masked(v + 1, clock, mask_id=0)),  # a mask id below V, as in ESM
        Kind("marginal_zero", lambda v, clock: Marginal(_resized_law(_ZERO, v), clock)),
        Kind("absorbing_uniform", AbsorbingUniform, pairs=True),
        Kind("interpolant", lambda v, clock: Interpolant(v, clock, _resized_law(_LAW, v), p_uniform=0.3), pairs=True),
    )
}
# the default kinds for an operator
USUAL = ("masked", "uniform", "marginal", "hybrid", "general")


def _turned(vocab_size: int) -> Callable[[float], Tensor]:
    return lambda t: _resized_rates(_turning(t), vocab_size)


def kind(of: str | Process, where: str = "kind") -> Kind:
    """Return the ``Kind`` for a name, or for a process as an example.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything but a name or a process.
    """
    if isinstance(of, str):
        if of not in KINDS:
            raise ValueError(
                f"{where}: there is no kind of process {of!r}{meant(of, KINDS)}; accepted: {', '.join(KINDS)}"
            )
        return KINDS[of]
    if not isinstance(of, Process):
        hint = "; it is a class: give an example or a name" if isinstance(of, type) else ""
        raise TypeError(f"{where} takes names of kinds ({', '.join(KINDS)}) or processes, got {of!r}{hint}")
    return Kind(type(of).__name__, _like(of), of, of.pairs is not None)


def kinds(of: Sequence[str | Process], where: str) -> list[Kind]:
    """Return the ``Kind`` for each name or example; if examples share a class, their reprs are the names.

    Raises:
        TypeError: for a single kind instead of a list.
    """
    if isinstance(of, str) or not isinstance(of, Iterable):
        raise TypeError(f"{where}: processes= is a list of kinds, got {of!r}")
    found = [kind(one, where) for one in of]
    names = [one.name for one in found]
    return [
        Kind(repr(one.example), one.build, one.example, one.pairs)
        if one.example is not None and names.count(one.name) > 1
        else one
        for one in found
    ]


def _like(given: Process) -> Build:
    """Return a function that builds a process like an example for another size and clock."""

    def build(vocab_size: int, schedule: Schedule) -> Process:
        match given:
            case _ if vocab_size == len(given.data_tokens):
                return given.with_schedule(_finite(schedule) if isinstance(given, TimeVarying) else schedule)
            case Masked(mask_id=mask) if type(given) is Masked and mask < given.vocab_size:
                return Masked(vocab_size + 1, schedule, mask_id=min(mask, vocab_size))
            case Marginal(pi=pi) if type(given) is Marginal:
                return Marginal(_resized_law(pi, vocab_size), schedule)
            case Hybrid() if type(given) is Hybrid:
                return Hybrid(vocab_size, schedule, given._blend.p_uniform)
            case Ordinal(pi=pi) if type(given) is Ordinal:
                return Ordinal(vocab_size, schedule, _resized_law(pi, vocab_size))
            case General() if type(given) is General and given.mask_id is None:
                return General(_resized_rates(given.generator(1.0), vocab_size), schedule)
            case TimeVarying() if type(given) is TimeVarying:
                function, pieces = given._function, len(given._q)
                return TimeVarying(lambda t: _resized_rates(function(t), vocab_size), _finite(schedule), pieces)
            case Interpolant() if type(given) is Interpolant:
                return Interpolant(vocab_size, schedule, _resized_law(given.source, vocab_size), given._blend.p_uniform)
        try:  # from size and clock, if they determine the example
            if type(given)(given.vocab_size, given.schedule) == given:
                return type(given)(vocab_size, schedule)
        except TypeError:
            pass
        raise ValueError(f"{given} cannot be built for {vocab_size} tokens")

    return build
