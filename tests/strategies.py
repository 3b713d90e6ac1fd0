"""Hypothesis strategies: random laws, schedules, processes and times."""

import torch
from hypothesis import strategies as st

import discdiff as dd
from discdiff import theory as T

schedules = st.one_of(
    st.just(dd.Linear()),
    st.just(dd.Cosine()),
    st.floats(1e-4, 0.2).map(dd.LogLinear),
)


@st.composite
def worlds(draw: st.DrawFn, vocab_size: int = 2, length: int = 2) -> T.Enumeration:
    """A random law; entries may be exactly 0."""
    size = vocab_size**length
    weights = draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0]), min_size=size, max_size=size).filter(any))
    p0 = torch.tensor(weights, dtype=torch.float64)
    return T.Enumeration(p0 / p0.sum(), vocab_size=vocab_size, length=length)


@st.composite
def processes(draw: st.DrawFn, vocab_size: int = 2) -> dd.Process:
    """A process of either family on a random clock."""
    family = draw(st.sampled_from([dd.Masked, dd.Uniform]))
    return family(vocab_size, draw(schedules))


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float]:
    """(t, s) with 0 <= s < t <= 1, the ends included. Below 0.02 the cosine's 1 - alpha itself has no 12 digits."""
    t = draw(st.sampled_from([1.0, 0.9, 0.5, 0.2, 0.02]))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.99]))
    return t, t * share
