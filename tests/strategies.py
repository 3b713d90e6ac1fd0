"""Hypothesis strategies: random laws, schedules, processes and times."""

import torch
from hypothesis import strategies as st

import discdiff as dd
from discdiff import theory as T

schedules = st.one_of(
    st.just(dd.Linear()),
    st.just(dd.Cosine()),
    st.floats(1e-4, 0.2).map(dd.LogLinear),
    st.floats(0.5, 3.0).map(dd.Polynomial),
    st.floats(1.0, 12.0).map(dd.Sigmoid),
    st.tuples(st.floats(1e-3, 0.5), st.floats(2.0, 20.0)).map(lambda ends: dd.Geometric(*ends)),
)


@st.composite
def worlds(draw: st.DrawFn, vocab_size: int = 2, length: int = 2) -> T.Enumeration:
    """A random law; entries may be exactly 0."""
    size = vocab_size**length
    weights = draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0]), min_size=size, max_size=size).filter(any))
    p0 = torch.tensor(weights, dtype=torch.float64)
    return T.Enumeration(p0 / p0.sum(), vocab_size=vocab_size, length=length)


@st.composite
def laws(draw: st.DrawFn, size: int) -> torch.Tensor:
    """A random noise law without zeros."""
    weights = draw(st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=size, max_size=size))
    law = torch.tensor(weights, dtype=torch.float64)
    return law / law.sum()


@st.composite
def generators(draw: st.DrawFn, size: int) -> torch.Tensor:
    """A random generator, reversible or not."""
    rates = draw(st.lists(st.sampled_from([0.1, 0.4, 1.0, 2.0]), min_size=size * size, max_size=size * size))
    q = torch.tensor(rates, dtype=torch.float64).view(size, size)
    return q - torch.diag(q.sum(-1))


@st.composite
def processes(draw: st.DrawFn, vocab_size: int = 2, schedule: dd.Schedule | None = None) -> dd.Process:
    """A process of any rank-one family on a random clock."""
    clock = draw(schedules) if schedule is None else schedule
    family = draw(st.sampled_from(["masked", "uniform", "marginal", "hybrid"]))
    if family == "marginal":
        return dd.Marginal(draw(laws(vocab_size)), clock)
    if family == "hybrid":
        return dd.Hybrid(vocab_size, clock, draw(st.sampled_from([0.05, 0.3, 0.9])))
    return {"masked": dd.Masked, "uniform": dd.Uniform}[family](vocab_size, clock)


@st.composite
def any_process(draw: st.DrawFn, vocab_size: int = 2, schedule: dd.Schedule | None = None) -> dd.Process:
    """A process of any family; states are tokens, a mask, or pairs of tokens."""
    family = draw(st.sampled_from(["rank one", "rank one", "ordinal", "general", "absorbing", "interpolant"]))
    clock = draw(schedules) if schedule is None else schedule
    if family == "ordinal":
        return dd.Ordinal(vocab_size, clock, draw(laws(vocab_size)))
    if family == "general":
        return dd.General(draw(generators(vocab_size)), clock)
    if family == "absorbing":
        return dd.AbsorbingUniform(vocab_size, clock)
    if family == "interpolant":
        return dd.Interpolant(vocab_size, clock, draw(laws(vocab_size)), draw(st.sampled_from([0.0, 0.4])))
    return draw(processes(vocab_size, clock))


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float]:
    """(t, s) with 0 <= s < t <= 1, the ends included. Below 0.02 the cosine's 1 - alpha itself has no 12 digits."""
    t = draw(st.sampled_from([1.0, 0.9, 0.5, 0.2, 0.02]))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.99]))
    return t, t * share


@st.composite
def inner_intervals(draw: st.DrawFn) -> tuple[float, float]:
    """(t, s) with 0.02 < s < t < 1, where nothing is degenerate."""
    t = draw(st.sampled_from([0.95, 0.7, 0.4, 0.15]))
    return t, t * draw(st.sampled_from([0.2, 0.5, 0.9]))
