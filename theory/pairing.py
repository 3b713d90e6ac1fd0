"""Compute the joint law of a sampler's first state and its sample: the coupling that reflow trains on."""

import torch

from discdiff.checks import shown, whole
from discdiff.sampling import Sampler
from discdiff.theory.end_law import law
from discdiff.theory.exact import kernel
from discdiff.theory.world import Coupling, all_states, check_size, law_of_data, law_of_prior, state_index

__all__ = ["coupling"]


@torch.no_grad()
def coupling(sampler: Sampler, *, length: int | None = None) -> Coupling:
    """Compute the joint law of the samples x0 and the source x1 of a sampler, as ``dd.learning.reflow`` draws them.

    The source is the first state, or its source tokens on an ``Interpolant`` with a source law. The law of x1 is that
    of the prior, and the law of x0 is ``law(sampler)``.

    Args:
        sampler: the sampler; its grid goes from 1 to 0, and its states are the V data tokens or pairs of them.
        length: L, needed if the model has none of its own.

    Raises:
        TypeError: if ``sampler`` is no Sampler.
        ValueError: for another grid, states that are neither tokens nor pairs, a missing length, or too many states;
            and as ``law``.
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"coupling: sampler must be a Sampler, got {shown(sampler)}")
    process, known = sampler.process, sampler.model.length
    size = whole(known if length is None else length, "coupling: length", 1)
    if sampler.grid[0] != 1 or sampler.grid[-1] != 0:
        raise ValueError(f"coupling: takes a grid from 1 to 0, got one from {sampler.grid[0]} to {sampler.grid[-1]}")
    if process.columns != process.vocab_size or len(process.data_tokens) != process.vocab_size:
        raise ValueError(f"coupling: takes a process whose source has tokens, such as Uniform, got {process}")
    check_size(process.states, size, "coupling", axes=2)
    first = law_of_prior(process, size)
    states = all_states(process.states, size)
    source = state_index(states if process.pairs is None else process.pairs.split(states)[1], process.vocab_size)
    met = first.nonzero()[:, 0]
    begun = torch.zeros(len(met), len(first), dtype=torch.float64)
    begun[torch.arange(len(met)), met] = 1.0
    if len(sampler.models) > 1 or any(operator.remembers for *_, operator, _ in sampler.parts()):
        data = torch.stack([law(sampler, row, length=length) for row in begun])
    else:
        for _, t, s, operator, model in sampler.parts():
            begun = begun @ kernel(operator, process, model, t, s, length=length)
        data = torch.stack([law_of_data(process, row, size) for row in begun])
    joint = torch.zeros(process.vocab_size**size, process.vocab_size**size, dtype=torch.float64)
    joint.index_add_(1, source[met], (first[met, None] * data).T)
    return Coupling(joint, vocab_size=process.vocab_size, length=size)
