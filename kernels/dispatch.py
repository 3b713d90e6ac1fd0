"""Entry points of all kernels, which check arguments and choose a backend by device.

Kernels of logits take an (N, V) tensor, or a recipe for rows not yet read: ``Rows`` or ``Computed``.
"""

import functools
import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor

from discdiff.checks import real, shown, whole
from discdiff.kernels import chunked, library, native, reference
from discdiff.kernels.gradients import graft, log, log_add, log_softmax, log_sum_exp
from discdiff.kernels.keys import Key, stream
from discdiff.kernels.philox_words import BLOCKS, TAGS, philox
from discdiff.kernels.reference import GROUP_SIZE, Race, Reading
from discdiff.kernels.rows import Computed, LinearHead, Mixed, Mixture, Rows, Source
from discdiff.kernels.step_inputs import Step

__all__ = [
    "GROUP_SIZE", "TAGS", "Computed", "Key", "LinearHead", "Mixed", "Mixture", "Race", "Reading", "Rows", "Source",
    "Step", "best", "coins", "draw", "drawn", "flips", "fuses", "graft", "log", "log_add", "log_prob", "log_softmax",
    "log_sum_exp", "philox", "race", "read", "row_pass", "step", "steps", "steps_whole", "stream", "threshold",
    "total_variation", "uniforms", "winner",
]  # fmt: skip

Backend = Literal["auto", "torch", "native", "triton"]
_MAX_COLUMNS = GROUP_SIZE * 4 * BLOCKS


@torch.no_grad()
def draw(
    logits: Tensor | Source,
    *,
    seed: int,
    rows: Tensor,  # (N,) int64
    positions: Tensor,  # (N,) int64
    step: int = 0,
    tag: int = 0,
    reading: Reading | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Draw one column of each row with probability softmax(logits), with keyed randomness.

    The token depends on (seed, row id, position, step, tag) and on the row of logits, not on N, on the order of the
    rows or on other rows. The algorithm is the specification in ``kernels/reference.py``.

    Args:
        logits: (N, V) unnormalised natural-log weights in any floating dtype and strides, or a recipe for them; -inf
            excludes a column.
        seed: 64-bit key.
        rows: (N,) id of the sequence each row belongs to, in [0, 2**32).
        positions: (N,) position in the sequence, in [0, 2**32).
        step: step number, below 2**32.
        tag: the number of the draw within the step, below 1024.
        reading: the result of ``read`` on the same rows, so that they are not read again.
        backend: "torch", "native" (C compiled for this CPU), "triton" (on a GPU, or in the interpreter), or "auto":
            Triton for CUDA tensors, native for CPU ones, torch where those are missing.

    Returns:
        (N,) int64 columns; -1 for a row without mass or with a NaN or +inf (the caller raises the error).

    Raises:
        ValueError: for wrong shapes, dtypes or ranges.
    """
    if torch.compiler.is_compiling() and isinstance(logits, Tensor) and reading is None and backend == "auto":
        return library.draw(logits, rows, positions, seed - (seed >> 63 << 64), step, tag)
    source, key = _addressed(logits, rows, positions, seed=seed, step=step, tag=tag)
    return drawn(source, key, positions, reading, backend)


def drawn(
    source: Source, key: Key, positions: Tensor, reading: Reading | None = None, backend: Backend = "auto"
) -> Tensor:
    """Draw as ``draw`` does, without range checks of ``key``; raises ValueError unless the key has N ids."""
    _check_ids(key.ids, len(source), "draw: rows")
    if _backend(source, backend) == "native" and isinstance(source, Rows):
        column = native.draw(source, key, positions, reading)
        if column is not None:
            return column
    if _backend(source, backend) == "native" and isinstance(source, Computed):
        column = native.mixture_draw(source, key, positions)
        if column is not None:
            wrong = (column == -2).nonzero()[:, 0]
            if len(wrong):
                column[wrong] = _race(source.subset(wrong), key[wrong], positions[wrong], None, 0, backend).token
            return column
    return _race(source, key, positions, reading, 0, backend).token


@torch.no_grad()
def race(
    logits: Tensor | Source,
    *,
    seed: int,
    rows: Tensor,
    positions: Tensor,
    step: int = 0,
    tag: int = 0,
    first_column: int = 0,
    reading: Reading | None = None,
    backend: Backend = "auto",
) -> Race:
    """Run ``draw`` on one shard of the vocabulary's columns; ``winner`` of all shards equals ``draw`` of the whole.

    Args:
        logits, seed, rows, positions, step, tag, reading, backend: as in ``draw``.
        first_column: the shard's first column in the vocabulary, a multiple of 1024.

    Returns:
        The winning key and token of each row; tokens are numbered in the whole vocabulary.

    Raises:
        ValueError: for wrong shapes, dtypes or ranges.
    """
    source, key = _addressed(logits, rows, positions, seed=seed, step=step, tag=tag)
    first_column = whole(first_column, "race: first_column", 0, _MAX_COLUMNS - source.width)
    if first_column % GROUP_SIZE:
        raise ValueError(f"race: first_column must be a multiple of {GROUP_SIZE}, got {first_column}")
    return _race(source, key, positions, reading, first_column // GROUP_SIZE, backend)


def _addressed(logits: Tensor | Source, rows: Tensor, positions: Tensor, **words: int) -> tuple[Source, Key]:
    """Return the rows of logits and the key of their draws, after checks."""
    source = _source(logits, "draw")
    for name, ids in (("rows", rows), ("positions", positions)):
        _check_ids(ids, len(source), f"draw: {name}")
        if ids.device.type == "cpu" and len(ids):
            least, most = (int(end) for end in ids.aminmax())
            if not 0 <= least <= most < 1 << 32:
                raise ValueError(f"draw: {name} must hold ids in [0, 2**32), got {least} to {most}")
    return source, _key(rows, **words)


def _race(source: Source, key: Key, positions: Tensor, reading: Reading | None, first: int, backend: Backend) -> Race:
    chosen = _backend(source, backend)
    head = source.convert if isinstance(source, Rows) and not source.summed else None
    if chosen == "triton" and isinstance(source, Rows) and isinstance(head, LinearHead) and reading is None:
        from discdiff.kernels import triton_head

        return triton_head.race(source, head, key, positions, first)
    return chunked.race(source, key, positions, reading, first, _pass(chosen))


def winner(*races: Race) -> Tensor:
    """Return the winning tokens (N,) of all shards, -1 for a bad row; raises ValueError if no race is given."""
    if not races:
        raise ValueError("winner: takes the races of one shard at least, got none")
    keys, tokens = torch.stack([r.key for r in races]), torch.stack([r.token for r in races])
    best, shard = keys.max(0)  # ties go to the first shard, so to the lowest column
    return torch.where(best > -torch.inf, tokens.gather(0, shard[None])[0], -1)


def read(
    logits: Tensor | Source,
    *,
    at: Tensor | None = None,
    top: bool = False,
    entropy: bool = True,
    backend: Backend = "auto",
) -> Reading:
    """Read each row once and return its log-sum-exp, entropy, largest probability, and sums that later draws reuse.

    If gradients are enabled, the result is differentiable in the logits; its values do not change.

    Args:
        logits: (N, V), or a recipe for them.
        at: (N,) a column of each row whose log-probability to return.
        top: whether to find the most probable column and the margin to the second.
        entropy: whether to compute entropies, which takes a third more work.
        backend: as in ``draw``.

    Raises:
        ValueError: for wrong shapes or dtypes.
    """
    source = _source(logits, "read")
    if at is not None:
        _check_ids(at, len(source), "read: at")
    with torch.no_grad():
        chosen = _backend(source, backend)
        sums = chosen == "native" and not (top or entropy)
        mixed = _read_mixed(source, at) if sums and isinstance(source, Computed) else None
        told = mixed or chunked.read(source, at, top, _pass(chosen), entropy)
    # one row shows whether rows have derivatives; if so, all are read again at once in torch
    if torch.is_grad_enabled() and len(source) and source.dense(slice(0, 1)).requires_grad:
        path = reference.read(source.dense(), at, top, entropy)
        return told.along(path.joined if mixed else path)
    return told


def _read_mixed(rows: Computed, at: Tensor | None) -> Reading | None:
    """Return the reading of mixtures, with one group a row, without computing the rows; None if the kernel cannot."""
    first = None if rows.mixed is None else rows.mixed.of[0]
    own = None if first is None or first.own is None or first.relative else first.own[rows.number]
    if at is not None and (own is None or not torch.equal(own, at)):  # the kernel knows the value at that column alone
        return None
    found = native.mixture_sums(rows)
    if found is None:
        return None
    chance, largest, total = found
    peak, mass, value = largest.log()[:, None], (total / largest)[:, None], None if at is None else chance.log()
    wrong = (total.isnan() if at is None else total.isnan() | chance.isnan()).nonzero()[:, 0]
    if len(wrong):  # computed in logarithms, which underflow does not spoil
        right = chunked.read(rows.subset(wrong), None if at is None else at[wrong], False, native, False).joined
        peak[wrong], mass[wrong] = right.peak, right.mass
        if value is not None and right.value is not None:
            value[wrong] = right.value
    return Reading(peak, mass, None, value)


@torch.no_grad()
def best(logits: Tensor | Source, *, backend: Backend = "auto") -> Tensor:
    """Return the most probable column (N,) of each row; ties go to the lowest column.

    The column is -1 for a row without mass or with a NaN or +inf.

    Raises:
        ValueError: for wrong shapes or dtypes.
    """
    source = _source(logits, "best")
    if isinstance(source, Rows) and _backend(source, backend) == "native":
        column = native.best(source)
        if column is not None:
            return column
    told = read(source, top=True, entropy=False, backend=backend)
    assert told.argmax is not None
    return torch.where(told.log_sum_exp.isfinite(), told.argmax, -1)


def log_prob(logits: Tensor | Source, columns: Tensor) -> Tensor:
    """Return log softmax(logits) at columns (N, ...), -inf outside 0..V-1; raises ValueError for wrong shapes."""
    source = _source(logits, "log_prob")
    if not isinstance(columns, Tensor) or columns.dtype != torch.int64 or columns.shape[:1] != (len(source),):
        raise ValueError(f"log_prob: columns must be an int64 tensor ({len(source)}, ...), got {shown(columns)}")
    return chunked.log_prob(source, columns)


def total_variation(one: Source, other: Source) -> Tensor | None:
    """Return the total variation (N,) of two softmaxes, None if no kernel can; raises ValueError for a bad backend."""
    with torch.no_grad():
        if not (isinstance(one, Rows) and isinstance(other, Rows) and _backend(one, "auto") == "native"):
            return None
        found = native.mixture_sums(Computed.difference(one, other), strict=False)
        return None if found is None or bool(found[2].isnan().any()) else found[2]


@torch.no_grad()
def threshold(
    logits: Tensor | Source, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Return the least logit (N,) that top-k, then nucleus, then min-p truncation keeps; ties with it are kept.

    Raises:
        ValueError: for wrong shapes, dtypes or ranges.
    """
    top_k = None if top_k is None else whole(top_k, "threshold: top_k", 1)
    top_p, min_p = (
        None if value is None else real(value, f"threshold: {name}", "[0, 1]")
        for name, value in (("top_p", top_p), ("min_p", min_p))
    )
    return chunked.threshold(_source(logits, "threshold"), top_k, top_p, min_p)


def uniforms(
    *,
    seed: int,
    rows: Tensor,  # (...) int64
    positions: Tensor,  # (...) int64, broadcast with rows
    step: int = 0,
    tag: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return two float64 uniforms in (0, 1) per (row, position); raises ValueError for a bad seed, step or tag."""
    key = _key(rows, seed=seed, step=step, tag=tag)
    if rows.device.type == "cpu" and rows.ndim == 2 and rows.shape[1] == positions.ndim == 1 and native.available():
        return native.uniforms(key[:, 0], positions)
    return reference.uniforms(key, positions)


def coins(key: Key, length: int) -> tuple[Tensor, Tensor]:
    """Return the two ``uniforms`` (B, L) of the B rows of a key at positions 0 to L - 1, with L = ``length``."""
    positions = torch.arange(length, device=key.ids.device)
    if key.ids.device.type == "cpu" and native.available():
        return native.uniforms(key, positions)
    return reference.uniforms(key[:, None], positions)


def flips(probs: Tensor, key: Key) -> tuple[Tensor, Tensor | None]:
    """Flip coins that are True with probabilities (B, L): u < probs, with u the first uniform of ``coins``.

    Returns:
        (B, L) bool, and a mask (B, L) of the probabilities outside [0, 1], or None if native code finds none.
    """
    if probs.device.type == "cpu" and probs.dtype == torch.float64 and native.available():
        heads, wrong = native.flips(probs.detach(), key)
        return heads, _outside(probs) if wrong else None
    return coins(key, probs.shape[1])[0] < probs, _outside(probs)


def _outside(probs: Tensor) -> Tensor:
    return ~((probs >= 0) & (probs <= 1 + 1e-9))


def fuses(device: torch.device) -> bool:
    """Return whether ``step`` is available on a device."""
    return (device.type == "cuda" and _has_triton()) or (device.type == "cpu" and native.available())


def steps_whole(device: torch.device) -> bool:
    """Return whether ``step`` also chooses the sites, so that the host need not wait for this choice."""
    return device.type == "cuda"


def steps(rows: Rows, whole: bool) -> bool:
    """Return whether ``step`` can read these rows; ``whole`` means that it must also choose the sites (on a GPU)."""
    return not rows.summed and rows.convert is None if whole else native.available() and native.readable(rows)


@torch.no_grad()
def step(rows: Rows, what: Step) -> tuple[Tensor, Tensor]:
    """Make the choices "where", "accept", "data", "token" and "noise" of a reverse step at N sites in fused kernels.

    On a GPU (``triton_step``) it makes all of them without a synchronisation. On a CPU (keyed.c) it makes those after
    "where", so that a step in which no site changes needs no denoiser call.

    Args:
        rows: N rows of logits of the leave-one-out prediction O.
        what: the other inputs.

    Returns:
        (N,) states after the step, and (N,) a mask of the sites whose row was read and had no mass, a NaN or +inf.

    Raises:
        ValueError: for rows with ``convert``, or if there is not one row for each site.
    """
    if rows.convert is not None or len(rows) != len(what.tokens):
        raise ValueError(f"step: needs {len(what.tokens)} rows of logits without a head, got {rows}")
    if what.where is not None:
        return native.step(rows, what)
    from discdiff.kernels import triton_step

    return triton_step.step(rows, what)


def row_pass() -> str:
    """Return the backend that reads rows on this machine's CPU: "native" (compiled C code) or "torch"."""
    return "native" if native.available() else "torch"


def _pass(backend: str) -> chunked.Pass | None:
    """Return the module of a backend that reads rows in place; None for torch."""
    if backend == "triton":
        from discdiff.kernels import triton_rows  # imported here: only CUDA builds of torch include triton

        return triton_rows
    return native if backend == "native" else None


def _backend(source: Source, backend: Backend) -> str:
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; accepted: {', '.join(map(repr, get_args(Backend)))}")
    if backend != "auto":
        return backend
    if source.device.type == "cuda" and _has_triton():
        return "triton"
    return "native" if source.device.type == "cpu" and native.available() else "torch"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _source(logits: Tensor | Source, where: str) -> Source:
    source: Source
    if isinstance(logits, Rows | Computed):
        source = logits
    elif isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point():
        source = Rows.of(logits)
    else:
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{where}: logits must be a floating (N, V) tensor or Rows, got {got}")
    if not 1 <= source.width <= _MAX_COLUMNS:
        raise ValueError(f"{where}: V must lie in 1..{_MAX_COLUMNS}, got {source.width}")
    return source


def _check_ids(ids: Tensor, count: int, name: str) -> None:
    if not isinstance(ids, Tensor) or ids.shape != (count,) or ids.dtype != torch.int64:
        got = f"{ids.dtype} of {tuple(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
        raise ValueError(f"{name} must be an int64 tensor of shape ({count},), got {got}")


def _key(rows: Tensor, **words: int) -> Key:
    """Return the key with row ids ``rows`` and words seed, step and tag, after checks of the words' ranges."""
    ends = {"seed": 1 << 64, "step": 1 << 32, "tag": TAGS}
    seed, step, tag = (whole(words[name], f"random key: {name}", 0, end - 1) for name, end in ends.items())
    return Key(seed, rows, step, name=tag)
