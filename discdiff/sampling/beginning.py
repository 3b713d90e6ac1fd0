"""The beginning of a run: checks of its arguments, the first state, and given tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from discdiff.checks import affordable, array, placed, seeded, token_ids, whole
from discdiff.choices import Choices
from discdiff.denoiser import Denoiser, warn_of_dropout
from discdiff.operator import Run, State, choose
from discdiff.sampling.trajectory import Keeps

if TYPE_CHECKING:
    from discdiff.sampling.sampler import Sampler

__all__ = ["begin", "check_initial", "check_rows", "fixed", "shaped"]


def begin(
    sampler: "Sampler",
    batch: SupportsIndex | None,
    length: SupportsIndex | None,
    seed: SupportsIndex | None,
    first_row: SupportsIndex,
    prompt: Tensor | Sequence[int] | None,
    frozen: Tensor | Sequence[bool] | None,
    initial: Tensor | Sequence[Sequence[int]] | None,
    device: torch.device | str | None,
    record: Keeps = False,
    listen: bool = False,
) -> tuple[State, Run]:
    """Check the arguments of ``Sampler.sample``; return the first state and its run.

    Raises:
        TypeError, ValueError: as ``Sampler.sample``.
    """
    model = sampler.model
    initial, batch, length = shaped(initial, batch, length)
    batch, first_row = check_rows("sample", batch, first_row)
    length, seed = _length(model, length), seeded(seed, "sample: seed")
    device = placed(model.device if device is None else device, "sample: device")
    affordable(batch * length, f"sample: a batch of {batch} rows of length {length}")
    warn_of_dropout([(one.fn, *one.guides) for one in sampler.networks], stacklevel=4)
    run = Run.start(model, batch, seed, first_row=first_row, device=device, record=bool(record), listen=listen)
    run.models = sampler.models
    state, at = run.begin(torch.zeros(batch, length, dtype=torch.int64, device=device), sampler.grid[0])
    if record == "choices":
        run.choices = Choices(state.tokens, None, first_row, drawn=initial is None)
    if initial is not None:
        check_initial(model, initial, batch, length)
        state = state.at(initial.to(device, torch.int64))
    elif sampler.grid[0] == 1:
        state = state.at(choose("prior", model.process.prior(batch, length, device), state, at))
    else:
        raise ValueError(
            f"sample: the grid starts at t = {sampler.grid[0]}, where the law is not the prior; give initial="
        )
    held = fixed(sampler, batch, length, prompt, frozen, initial)
    if held is not None:
        sampler.warn_of_infill()
        given, where = (x.to(device) for x in held)
        given = model.process.place(given, state.tokens)
        state = replace(state, tokens=torch.where(where, given, state.tokens), frozen=where)
    if run.choices is not None:
        run.choices = replace(run.choices, start=state.tokens, frozen=state.frozen)
    return state, run


def shaped(
    initial: Tensor | Sequence[Sequence[int]] | None, batch: SupportsIndex | None, length: SupportsIndex | None
) -> tuple[Tensor | None, SupportsIndex | None, SupportsIndex | None]:
    """Return the initial states as a tensor, the batch size and the length, by default those of the initial states.

    Raises:
        TypeError, ValueError: if ``initial`` is not two-dimensional or holds no whole numbers.
    """
    if initial is None:
        return None, batch, length
    initial = token_ids(initial, "sample: initial", "states")
    if initial.ndim != 2:
        raise ValueError(f"sample: initial must be (B, L) states, got shape {tuple(initial.shape)}")
    own = initial.shape
    return initial, own[0] if batch is None else batch, own[1] if length is None else length


def _length(model: Denoiser, length: SupportsIndex | None) -> int:
    own = model.length
    if length is None and own is None:
        raise ValueError("sample: give length=, this model has none of its own")
    chosen = whole(own if length is None else length, "sample: length", 1)
    if own is not None and chosen != own:
        raise ValueError(f"sample: length = {chosen}, but the model is for length {own}")
    model.process.schedule.check_length(chosen)
    return chosen


def check_initial(model: Denoiser, initial: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless the initial states have the shape (batch, length) and are states of the process."""
    if tuple(initial.shape) != (batch, length):
        raise ValueError(f"sample: initial must have shape ({batch}, {length}), got {tuple(initial.shape)}")
    model.check_states(initial.to(torch.int64), "initial")


def fixed(
    sampler: "Sampler",
    batch: int,
    length: int,
    prompt: Tensor | Sequence[int] | None,
    frozen: Tensor | Sequence[bool] | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return the given tokens (B, L) and the mask (B, L) of their sites, or None if no site is given.

    Raises:
        TypeError, ValueError: as ``Sampler.sample``.
    """
    model = sampler.model
    if prompt is None and frozen is None:
        return None
    if prompt is None and initial is None:
        raise ValueError("sample: frozen= says which sites are given; prompt= or initial= must say what they hold")
    if prompt is None and initial is not None:
        given = model.process.column(initial)
    else:
        given = token_ids(prompt, "sample: prompt", "token ids")
    width = given.shape[-1] if given.ndim else 0
    if width == 0 and given.ndim and frozen is None:
        return None  # an empty prompt
    if given.ndim not in (1, 2) or width > length or (given.ndim == 2 and len(given) != batch):
        raise ValueError(f"sample: prompt must be (P,) or ({batch}, P) with P <= {length}, got {tuple(given.shape)}")
    if frozen is None:
        where = (torch.arange(length) < width).expand(batch, length)
        given = torch.nn.functional.pad(given, (0, length - width))
    else:
        where = array(frozen, "sample: frozen")
        if where.dtype != torch.bool or where.shape not in ((length,), (batch, length)):
            raise ValueError(
                f"sample: frozen must be a bool mask ({length},) or ({batch}, {length}), "
                f"got {where.dtype} {tuple(where.shape)}"
            )
        if width != length:
            raise ValueError(f"sample: with frozen=, prompt must cover all {length} sites, got {width}")
        where = where.expand(batch, length)
    given = given.to(torch.int64).expand(batch, length).to(where.device)
    if not bool(where.any()):
        return None
    model.check_data(given, "prompt", where)  # the other sites may hold anything
    return given, where


def check_rows(where: str, batch: object, first_row: object) -> tuple[int, int]:
    """Return the batch size and the id of the first row, both checked.

    Raises:
        TypeError, ValueError: if they are not whole numbers, or a row id is not in [0, 2**32).
    """
    size, first = whole(batch, f"{where}: batch", 1), whole(first_row, f"{where}: first_row")
    if not 0 <= first <= 2**32 - size:
        raise ValueError(f"{where}: row ids must lie in [0, 2**32), got first_row = {first} with batch = {size}")
    return size, first
