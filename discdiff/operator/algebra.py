r"""Operators: Markov kernels written as programs, and their composition.

An operator maps a ``State`` to a ``State`` and makes its random choices through ``choose``. A *predictor* moves from
t to s; a *corrector* stays at its time. The exact kernel of a composition follows from the kernels of its parts
(K[x, y] is the probability of y after x, so rows are laws):

    kernel(A >> B)              = kernel(A) @ kernel(B)         A first, then B
    kernel(C ** n)              = kernel(C)^n
    kernel(mix({A: p, B: q}))   = p kernel(A) + q kernel(B)     one keyed coin for each row
    kernel(when(f, A, B))       = kernel(A) if f(t) else kernel(B)

In ``A >> B`` operators left of the predictor run at t and those right of it at s. A step has exactly one predictor on
every path; composing two predictors raises TypeError.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from discdiff.checks import real, shown, unmade, whole
from discdiff.choices import Branch
from discdiff.operator.choosing import choose
from discdiff.operator.rest import Reads, applied
from discdiff.operator.run import At
from discdiff.operator.state import State
from discdiff.process import Process

__all__ = [
    "Corrector", "Invariance", "Mix", "Operator", "Predictor", "Repeat", "Staged", "Then", "When", "check_operator",
    "mix", "same_kind",
]  # fmt: skip

Invariance = Literal["exact", "approximate", "none"]
_WORST: tuple[Invariance, ...] = ("none", "approximate", "exact")


class Operator(ABC):
    """Markov kernel on states, as a program; derive from ``Predictor`` or ``Corrector``, not from this class.

    Attributes (claims, which the test suite checks against the exact law of the operator):
        order: a predictor's order k, the least over processes and data. With exact predictions and N equal steps inside
            (0, 1), the total variation error of the law at the end falls as N^-k.
        invariant: whether a corrector with exact predictions keeps p_t: "exact", "approximate" or "none".
        nfe: the expected number of denoiser calls of a step.
        enumerable: False if its choices have no finite tree; then ``theory.kernel`` raises an error that names it.
        width: the number of slots that it takes in a step; above 1 only to reuse a name, as names differ in a slot.
        reads: the sites whose leave-one-out it needs at the time of its state: "shown", sites that hold tokens;
            "hidden", sites that it first hides on an absorbing process; "noisy", sites with noise; None, no site.
        site_times: whether the denoiser must take a time for every site, unless the process is masked.
        remembers: whether it uses the state before this step. Then the states are not a Markov chain.
        weighable: whether choices possible under one prediction are possible under every other that allows the same
            tokens, which ``Particles`` needs. False if it decides by a prediction without a random choice.
    """

    site_times = False

    @abstractmethod
    def __call__(self, state: State, at: At) -> State: ...

    @property
    @abstractmethod
    def moves(self) -> bool:
        """True for a predictor, False for a corrector."""

    @property
    def order(self) -> float | None:
        return None

    @property
    def invariant(self) -> Invariance | None:
        return None

    @property
    def nfe(self) -> float | None:
        return 1.0

    @property
    def enumerable(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return 1

    @property
    def reads(self) -> Reads | None:
        return None

    @property
    def remembers(self) -> bool:
        return any(part.remembers for part in self.parts)

    @property
    def weighable(self) -> bool:
        return all(part.weighable for part in self.parts)

    @property
    def parts(self) -> "tuple[Operator, ...]":
        """The operators it is composed of; none for a primitive."""
        values = (value if isinstance(value, tuple) else (value,) for value in vars(self).values())
        return tuple(part for value in values for part in value if isinstance(part, Operator))

    def check(self, process: Process) -> None:
        """Raise ValueError if this operator, or a part of it, is not defined on the process."""
        for part in self.parts:
            part.check(process)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={shown(value)}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({fields})"

    def __rshift__(self, other: "Operator") -> "Operator":
        """Run this operator, then the other."""
        return Then(self, check_operator(other, ">>"))

    def __pow__(self, n: int) -> "Operator":
        """Run this corrector n times."""
        return Repeat(self, n)


class Predictor(Operator):
    """Kernel from time t to s: its program returns a state at time ``at.s``."""

    @property
    def moves(self) -> bool:
        return True


class Staged(Predictor):
    """Predictor that runs two parts in turn; in the second, ``state.past`` is the state before the first part.

    The exact kernel is a product of two kernels on pairs of states. So no tree of choices spans both parts.
    """

    @property
    @abstractmethod
    def stages(self) -> tuple[Predictor, Predictor]:
        """The two parts; each is run from t to s."""

    @property
    def nfe(self) -> float | None:
        return 2.0

    @property
    def width(self) -> int:
        return sum(stage.width for stage in self.stages)

    def __call__(self, state: State, at: At) -> State:
        first, second = self.stages
        middle = first(state, at)
        seen = None if middle.past is None else middle.past.seen
        return replace(second(middle.after(state, seen), at.moved(first.width)), past=None)


class Corrector(Operator):
    """Kernel that leaves the time of its state unchanged."""

    @property
    def moves(self) -> bool:
        return False


@dataclass(frozen=True)
class Then(Operator):
    """Composition ``left >> right`` that runs ``left`` first; raises TypeError if both are predictors."""

    left: Operator
    right: Operator

    def __post_init__(self) -> None:
        if self.left.moves and self.right.moves:
            raise TypeError(f"a step has one predictor, and {self.left} >> {self.right} has two; drop one")

    def __call__(self, state: State, at: At) -> State:
        return applied(self.right, applied(self.left, state, at), at.moved(self.left.width))

    @property
    def moves(self) -> bool:
        return self.left.moves or self.right.moves

    @property
    def order(self) -> float | None:
        """The predictor's order, a lower bound for the composition's, if the corrector keeps p_t exactly; else None."""
        if not self.moves:
            return None
        predictor, corrector = (self.left, self.right) if self.left.moves else (self.right, self.left)
        return predictor.order if corrector.invariant == "exact" else None

    @property
    def invariant(self) -> Invariance | None:
        return None if self.moves else _worst(self.left, self.right)

    @property
    def nfe(self) -> float | None:
        return _sum_nfe((1.0, self.left), (1.0, self.right))

    @property
    def enumerable(self) -> bool:
        return self.left.enumerable and self.right.enumerable

    @property
    def width(self) -> int:
        return self.left.width + self.right.width

    def __repr__(self) -> str:
        return f"{self.left} >> {self.right}"


@dataclass(frozen=True)
class Repeat(Operator):
    """Composition ``operator ** times``; raises TypeError for a predictor, ValueError for a negative ``times``."""

    operator: Operator
    times: int

    def __post_init__(self) -> None:
        times = whole(self.times, "** n: n")
        if check_operator(self.operator, "**").moves:
            raise TypeError(f"only a corrector can be repeated; {self.operator} moves t -> s: take more steps")
        object.__setattr__(self, "times", whole(times, "** n: n", 0))

    def __call__(self, state: State, at: At) -> State:
        for n in range(self.times):
            state = applied(self.operator, state, at.moved(n * self.operator.width))
        return state

    @property
    def moves(self) -> bool:
        return False

    @property
    def invariant(self) -> Invariance | None:
        return self.operator.invariant if self.times else "exact"

    @property
    def nfe(self) -> float | None:
        return _sum_nfe((float(self.times), self.operator))

    @property
    def enumerable(self) -> bool:
        return self.operator.enumerable

    @property
    def width(self) -> int:
        return self.operator.width * self.times

    def __repr__(self) -> str:
        inner = f"({self.operator})" if isinstance(self.operator, Then | Repeat) else repr(self.operator)
        return f"{inner} ** {self.times}"


@dataclass(frozen=True)
class Mix(Operator):
    """A random choice among operators, made for each row separately, so that rows stay independent."""

    operators: tuple[Operator, ...]
    weights: tuple[float, ...]

    def __call__(self, state: State, at: At) -> State:
        branch = choose("branch", Branch(torch.tensor(self.weights, dtype=torch.float64), len(state.rows)), state, at)
        tokens, time, slot = state.tokens.clone(), state.t, 1
        for k, operator in enumerate(self.operators):
            which = (branch == k).nonzero()[:, 0]
            if len(which):
                after = applied(operator, state.select(which), at.moved(slot))
                tokens[which], time = after.tokens, after.t
            slot += operator.width
        return state.at(tokens, time)

    @property
    def moves(self) -> bool:
        return self.operators[0].moves

    @property
    def order(self) -> float | None:
        return _least_order(*self.operators)

    @property
    def invariant(self) -> Invariance | None:
        return None if self.moves else _worst(*self.operators)

    @property
    def nfe(self) -> float | None:
        return _sum_nfe(*zip(self.weights, self.operators, strict=True))

    @property
    def enumerable(self) -> bool:
        return all(operator.enumerable for operator in self.operators)

    @property
    def remembers(self) -> bool:
        """False, as the rows of a batch come from different operators, so that none gets a state before this step."""
        return False

    @property
    def width(self) -> int:
        return 1 + sum(operator.width for operator in self.operators)

    def __repr__(self) -> str:
        inside = ", ".join(f"{op}: {w:g}" for op, w in zip(self.operators, self.weights, strict=True))
        return f"mix({{{inside}}})"


@dataclass(frozen=True)
class When(Operator):
    """Operator that runs ``yes`` in steps whose start time meets the condition, else ``no``."""

    condition: Callable[[float], bool]
    yes: Operator
    no: Operator

    def __call__(self, state: State, at: At) -> State:
        return applied(self.at(at.t), state, at)

    def at(self, t: float) -> Operator:
        """Return the operator of a step that starts at t."""
        return self.yes if self.condition(t) else self.no

    @property
    def moves(self) -> bool:
        return self.yes.moves

    @property
    def order(self) -> float | None:
        return _least_order(self.yes, self.no)

    @property
    def invariant(self) -> Invariance | None:
        return None if self.moves else _worst(self.yes, self.no)

    @property
    def nfe(self) -> float | None:
        """The nfe of both branches if it is the same; else None, as the grid decides how often each branch runs."""
        yes, no = self.yes.nfe, self.no.nfe
        return yes if yes == no else None

    @property
    def enumerable(self) -> bool:
        return self.yes.enumerable and self.no.enumerable

    @property
    def width(self) -> int:
        return max(self.yes.width, self.no.width)

    def __repr__(self) -> str:
        return f"when({getattr(self.condition, '__name__', self.condition)}, {self.yes}, {self.no})"


def mix(weighted: Mapping[Operator, float]) -> Operator:
    """Return an operator that runs one of several, chosen for each row with the given probabilities.

    Args:
        weighted: operator -> probability; they sum to 1.

    Raises:
        TypeError: if predictors are mixed with correctors.
        ValueError: if ``weighted`` is empty, or the weights are not probabilities that sum to 1.
    """
    if not isinstance(weighted, Mapping):
        raise TypeError(f"mix takes {{operator: probability}}, got {shown(weighted)}")
    same_kind("mix", *weighted)
    operators, weights = tuple(weighted), tuple(real(w, "mix: a weight", "[0, 1]") for w in weighted.values())
    if not operators or not math.isclose(sum(weights), 1, abs_tol=1e-9):
        raise ValueError(f"mix: the weights must be probabilities that sum to 1, got {list(weights)}")
    return Mix(operators, weights)


def check_operator(candidate: object, where: str) -> Operator:
    """Return the candidate if it is an operator; otherwise raise a TypeError that names it."""
    if not isinstance(candidate, Operator):
        accepted = "operators, one of discdiff.samplers or a composition"
        raise TypeError(f"{where} takes {accepted}, got {unmade(candidate)}")
    return candidate


def same_kind(where: str, *operators: Operator) -> None:
    """Raise TypeError unless the operators are all predictors or all correctors."""
    kinds = {check_operator(operator, where).moves for operator in operators}
    if len(kinds) > 1:
        got = ", ".join(map(repr, operators))
        raise TypeError(f"{where}: the branches must all be predictors or all correctors, got {got}")


def _worst(*operators: Operator) -> Invariance | None:
    known = [claim for operator in operators if (claim := operator.invariant) is not None]
    return min(known, key=_WORST.index) if len(known) == len(operators) else None


def _least_order(*operators: Operator) -> float | None:
    known = [order for operator in operators if (order := operator.order) is not None]  # asked once: they nest
    return min(known) if len(known) == len(operators) else None


def _sum_nfe(*weighted: tuple[float, Operator]) -> float | None:
    known = [(weight, operator.nfe) for weight, operator in weighted]
    return None if any(nfe is None for _, nfe in known) else sum(weight * (nfe or 0.0) for weight, nfe in known)
