"""Compute the exact law of a sampler's output: the initial law times the matrix of every step.

For an operator that uses its previous step, the law is that of a Markov chain of pairs (state before, state). For a
blockwise sampler, the law of each block given every prefix is multiplied by the law of the prefix.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import shown
from discdiff.checks import whole as whole_number
from discdiff.denoiser import Denoiser, ShownPrefix, clean_states
from discdiff.sampling import Blockwise, Sampler, anew
from discdiff.theory.exact import Beginnings, after, checked, draws, run_paths
from discdiff.theory.world import all_states, check_size, law_of_data, law_of_prior

__all__ = ["law"]


@torch.no_grad()
def law(
    sampler: Sampler | Blockwise,
    initial: Float[Tensor, " N"] | None = None,
    *,
    length: int | None = None,
    prompt: Int[Tensor, " L"] | Sequence[int] | None = None,
    frozen: Bool[Tensor, " L"] | Sequence[bool] | None = None,
) -> Float[Tensor, " M"]:
    """Compute the exact law of a sampler's output: the initial law times the kernel of every step.

    Args:
        sampler: the sampler; a ``Blockwise`` one takes ``length`` alone.
        initial: (N,) law of the N = S**L states at the first time of the grid. The default is the prior, if the grid
            starts at 1.
        length: L, needed if the model has none of its own.
        prompt, frozen: (L,) tokens, and a mask of the sites that hold them and never change; give both or neither.

    Returns:
        (M,) probabilities, which sum to 1. For a grid that ends at 0 they are those of the M = n**L sequences of n data
        tokens, else those of the M = S**L noisy states.

    Raises:
        TypeError, ValueError: for a grid that starts below 1 without ``initial``, if masks have positive probability at
            time 0, and where ``kernel`` raises them.
    """
    if isinstance(sampler, Blockwise):
        if not (initial is prompt is frozen is None):
            raise TypeError("law: of a Blockwise takes length= alone; initial=, prompt= and frozen= are for a Sampler")
        return _blockwise(sampler, length)
    if not isinstance(sampler, Sampler):
        raise TypeError(f"law: sampler must be a Sampler or a Blockwise, got {shown(sampler)}")
    process, model = sampler.process, sampler.model
    size = model.length if length is None else whole_number(length, "law: length", 1)
    if size is None:
        raise ValueError("law: length= must say how many sites; this model has no length of its own")
    check_size(process.states, size, "law", axes=2)
    if (prompt is None) != (frozen is None) or any(x is not None and len(x) != size for x in (prompt, frozen)):
        raise ValueError(f"law: prompt= and frozen= go together, both of length {size}")
    if initial is None:
        if sampler.grid[0] != 1:
            raise ValueError(f"law: the grid starts at t = {sampler.grid[0]}; give initial=, the law there")
        initial = law_of_prior(process, size, prompt, frozen)
    current = torch.as_tensor(initial, dtype=torch.float64)
    if current.shape != (process.states**size,):
        raise ValueError(
            f"law: initial must have shape ({process.states**size},) = (S**L,), got {tuple(current.shape)}"
        )
    current = _through(sampler, current, size, frozen)
    if sampler.grid[-1] > 0:
        return current
    return _on_data(sampler, current, size)


def _on_data(sampler: Sampler, law: Tensor, size: int) -> Tensor:
    """Restrict the law of states at time 0 to data; raise ValueError if masks have positive probability."""
    on_data = law_of_data(sampler.process, law, size)
    left = float(law.sum() - on_data.sum())
    if abs(left) > 1e-9:
        what = sampler.plan.steps[-1].operator
        raise ValueError(f"law: mass {left:.3g} is not on data at time 0; {what} leaves masks")
    return on_data


def _blockwise(sampler: Blockwise, length: int | None) -> Tensor:
    """Compute the law of data, (n**L,), block by block.

    The probability of each prefix is multiplied by the law of the next block given this prefix.
    """
    model, process = sampler.inner.model, sampler.inner.process
    size = model.length if length is None else whole_number(length, "law: length", 1)
    if size is None:
        raise ValueError("law: length= must say how many sites; this model has no length of its own")
    check_size(len(process.data_tokens), size, "law")
    for sites in {b - a for sizes in sampler.sizes for a, b in itertools.pairwise(sampler.edges(size, sizes))}:
        check_size(process.states, sites, f"law of a block of {sites} sites", axes=2)
    tokens, total = process.data_tokens, []
    future = process.prior(1, sampler.window or size).sample() if sampler.future else None
    for sizes, weight in zip(sampler.sizes, sampler.weights, strict=True):
        so_far, edges = torch.tensor([weight], dtype=torch.float64), sampler.edges(size, sizes)
        room = size if sampler.window is None else sampler.window - max(b - a for a, b in itertools.pairwise(edges))
        for begin, end in itertools.pairwise(edges):
            inner, onwards = sampler.sampler(end - begin), []
            for number, prefix in enumerate(tokens[all_states(len(tokens), begin)] if begin else tokens[None, :0]):
                if so_far[number] == 0:  # there may be no next block, as under a constraint
                    onwards.append(so_far.new_zeros(len(tokens) ** (end - begin)))
                    continue
                clean = clean_states(process, prefix[None, max(0, begin - room) :])
                shown = ShownPrefix(torch.zeros(1, dtype=torch.int64), torch.tensor([clean.shape[1]]), clean, future)
                law = law_of_prior(process, end - begin)
                within = functools.partial(Denoiser.given, context=shown)
                law = _through(inner, law, end - begin, None, (prefix, size), within)
                onwards.append(_on_data(inner, law, end - begin))
            so_far = (so_far[:, None] * torch.stack(onwards)).flatten()
        total.append(so_far)
    return torch.stack(total).sum(0)


def _through(
    sampler: Sampler,
    law: Tensor,
    size: int,
    frozen: Tensor | Sequence[bool] | None,
    before: tuple[Tensor, int] | None = None,
    within: Callable[[Denoiser], Denoiser] | None = None,
) -> Tensor:
    """Compute the law after all steps from the law before them.

    Successive steps of an operator that uses its previous step form a Markov chain of pairs (state before, state).

    Raises:
        ValueError: if some probability is lost, because a choice that the sampler may meet has no possible value.
    """
    pairs: Tensor | None = None
    mass = float(law.sum())
    past_time, last = 0.0, None
    for part in sampler.parts():
        _, t, s, operator, model = part
        given = model if within is None else within(model)
        setting = checked(operator, sampler.process, given, t, s if operator.moves else None, size, frozen)
        setting.models, setting.before, setting.within = sampler.models, before, within
        if pairs is not None and last is not None and anew(last, part, sampler.models):
            law, pairs = pairs.sum(0), None
        if not operator.remembers:
            law = after(law, operator, setting, t)
            continue
        if draws(given, sampler.models):
            raise TypeError(
                f"law: {operator} uses its previous step, which a guide that draws makes impossible to list"
            )
        setting.whole = True
        states = torch.diag(law) if pairs is None else pairs
        past, now = states.nonzero(as_tuple=True)
        known = None if pairs is None else (past, past_time)  # in the first step there is no past
        pairs, _ = run_paths(operator, setting, t, Beginnings(now, now, states[past, now], known))
        past_time, last = t, part
    law = law if pairs is None else pairs.sum(0)
    if (lost := mass - float(law.sum())) > 1e-5:  # less may be the rounding of float32
        raise ValueError(
            f"law: with probability {lost:.3g} the run ends in an error, because a choice has no possible value, as "
            "where no sequence that a constraint accepts is left"
        )
    return law
