"""Run the functions of ``reference`` on rows that are not in memory.

A backend's pass may read rows in place. Rows that it cannot read are gathered in chunks that fit a cache, and torch
does what no pass supports. Memory is allocated for one chunk and a few numbers a group.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from discdiff.kernels import reference
from discdiff.kernels.keys import Key
from discdiff.kernels.reference import Race, Reading
from discdiff.kernels.rows import Computed, Rows, Source

__all__ = ["Pass", "log_prob", "race", "read", "threshold"]


@runtime_checkable
class Pass(Protocol):
    """Interface of a backend, which runs functions of ``reference`` on rows in place.

    A method returns None for rows that it cannot read.
    """

    def statistics(self, rows: Rows, tilt: bool = True) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return ``reference.statistics`` of the rows."""

    def largest(self, rows: Rows, group: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return ``reference.two_largest`` of one group of each row."""

    def race(self, rows: Rows, key: Key, positions: Tensor, reading: Reading | None, first_group: int) -> Race | None:
        """Return ``reference.race`` of the rows."""

    def contests(self, lse: Tensor, key: Key, positions: Tensor, first_group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``reference.contest``."""


_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements: 1 MB of float32 stays in a core's cache
_WINDOWS = 256  # winning groups processed together


def read(rows: Source, at: Tensor | None, top: bool, by: Pass | None, tilt: bool = True) -> Reading:
    """Return ``reference.read`` of rows that are not in memory; ``by`` is the backend's pass, None for torch."""
    groups = by.statistics(rows, tilt) if by is not None and isinstance(rows, Rows) and _in_place(rows) else None
    if groups is not None and isinstance(rows, Rows):
        return _finish(rows, groups, at, top, by)
    readings = []
    for part, x in _chunks(rows):
        columns, chunk = None if at is None else at[part], Rows.of(x)
        groups = None if by is None else by.statistics(chunk, tilt)
        if groups is None:
            readings.append(reference.read(x, columns, top, tilt))
        else:
            readings.append(_finish(chunk, groups, columns, top, by))
    if not readings:
        return reference.read(torch.zeros(0, rows.width, dtype=rows.dtype, device=rows.device), at, top, tilt)
    return Reading.join(readings)


def race(rows: Source, key: Key, positions: Tensor, reading: Reading | None, first_group: int, by: Pass | None) -> Race:
    """Return ``reference.race`` of rows that are not in memory.

    A given reading is reused for ``Rows`` without ``convert``. All other rows are read again, chunk by chunk.
    """
    if not isinstance(rows, Rows) or not _in_place(rows):  # read the winning group while its chunk is in memory
        parts = [race(Rows.of(x), key[part], positions[part], None, first_group, by) for part, x in _chunks(rows)]
        keys = [part.key for part in parts] or [torch.zeros(0, dtype=torch.float64, device=rows.device)]
        tokens = [part.token for part in parts] or [torch.zeros(0, dtype=torch.int64, device=rows.device)]
        return Race(torch.cat(keys), torch.cat(tokens))
    done = by.race(rows, key, positions, reading, first_group) if by is not None else None
    if done is not None:
        return done
    reading = read(rows, None, False, by, tilt=False) if reading is None else reading
    size = reference.group_size(rows.width)
    contests = reference.contest if by is None else by.contests
    best, group, share = contests(reading.group_lse, key, positions, first_group)
    column = torch.empty_like(group)
    for part in _parts(len(rows)):
        x = rows.dense(part) if size == rows.width else rows.window(part, group[part] * size, size)
        column[part] = reference.within(x, share[part])
    token = first_group * reference.GROUP_SIZE + group * size + column
    return Race(best, torch.where(best > -torch.inf, token, -1))


def _in_place(rows: Rows) -> bool:
    """Return whether a pass may read the rows where they lie; on a GPU no pass reads sums of rows."""
    return rows.convert is None and not (rows.summed and rows.source.is_cuda)


def threshold(rows: Source, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Return ``reference.threshold`` of rows that are not in memory."""
    found = [reference.threshold(x, top_k, top_p, min_p) for _, x in _chunks(rows)]
    return torch.cat(found) if found else torch.zeros(0, dtype=rows.dtype, device=rows.device)


def log_prob(rows: Source, columns: Tensor) -> Tensor:
    """Return log softmax of the rows at columns (N, ...), -inf at columns that do not exist; differentiable."""
    found = [torch.zeros(0, *columns.shape[1:], dtype=rows.dtype, device=rows.device)]
    for part, x in _chunks(rows, keep=torch.is_grad_enabled()):
        column = columns[part].reshape(len(x), -1)
        known = (column >= 0) & (column < rows.width)
        log_p = x.log_softmax(-1).gather(-1, column.where(known, 0)).masked_fill(~known, -torch.inf)
        found.append(log_p.view(columns[part].shape))
    return torch.cat(found)


def _chunks(rows: Source, keep: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield consecutive rows as slices and tensors; each tensor overwrites the one before unless ``keep``."""
    held = 8 if isinstance(rows, Computed) else 1  # the function has temporaries of its own
    count = max(1, _CHUNK.get(rows.device.type, 1 << 18) // (rows.width * held))
    buffer = None if keep else torch.empty(min(count, len(rows)), rows.width, dtype=rows.dtype, device=rows.device)
    for start in range(0, len(rows), count):
        part = slice(start, start + count)
        yield part, rows.dense(part, buffer).contiguous()  # kept chunks too, as sums depend on the layout


def _finish(
    rows: Rows, groups: tuple[Tensor, Tensor, Tensor | None], at: Tensor | None, top: bool, by: Pass | None
) -> Reading:
    """Make a reading from the statistics of the groups.

    The columns ``at`` are read again. If ``top`` is true, so is the best group of each row.
    """
    value = argmax = runner_up = None
    if at is not None:
        known = (at >= 0) & (at < rows.width)
        value = rows.window(slice(None), at.where(known, 0), 1)[:, 0].masked_fill(~known, -torch.inf)
    peak = groups[0]
    if top:  # the two largest logits are in the best group, or the second is another group's largest
        size = reference.group_size(rows.width)
        best = peak.argmax(-1)
        column, runner_up = (None if by is None else by.largest(rows, best)) or _largest(rows, best, size)
        argmax = best * size + column
        if peak.shape[1] > 1:
            runner_up = torch.maximum(peak.scatter(-1, best[:, None], -torch.inf).amax(-1), runner_up)
    return Reading(*groups, value, argmax, runner_up)


def _largest(rows: Rows, group: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return ``reference.two_largest`` of one group of each row, ``_WINDOWS`` rows at a time."""
    column, second = torch.empty_like(group), torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
    for part in _parts(len(rows)):
        column[part], second[part] = reference.two_largest(rows.window(part, group[part] * size, size))
    return column, second


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _WINDOWS) for start in range(0, count, _WINDOWS))
