r"""Recipes for rows of logits that are not yet read: their sites, and the operations on each row.

A sampling step changes few sites, so an operator gives a kernel this recipe instead of a new (B, L, V) tensor. The
kernel carries it out in registers, or in chunks that fit a cache:

    raw   = source[row, position]                      gathered, in the model's dtype
    x     = float32(convert(raw)), or float64          a head, or denoiser to leave-one-out; identity by default
    x[hidden] = -inf                                   columns that are never drawn
    x[own] += shift                                    one column of each row
    x     = weight x + sum_k w_k row_k                 a combination with other rows, a product of powers of laws
    x     = x / temperature,  -inf where below floor   tempering and truncation
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Computed", "LinearHead", "Mixed", "Mixture", "Rows", "Source"]

Convert = Callable[[Tensor, Tensor], Tensor]  # (n, K) raw rows and their numbers (n,) -> (n, V)


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of logits, not yet read.

    Attributes:
        source: (B, L, V) logits of any floating dtype and strides, or (B, L, K) inputs of ``convert``.
        row, position: (N,) the place of each row in ``source``.
        width: V.
        convert: maps raw rows (n, K), and their numbers (n,) among the original rows, to (n, V).
        hidden: columns set to -inf.
        own, shift: (N,) a column of each row, and a number added there; skipped if the column is outside 0..V-1.
        temperature: the row is divided by it.
        floor: (N,) logits below it, after all other operations, are set to -inf.
        whole: whether these are all rows of ``source`` in order, so that they need not be gathered.
        weight, terms: the weight of the row in a sum, and (w_k, rows_k), N other rows each with their weights. A column
            is -inf where a row of positive weight is; +inf, an error, where only rows of negative weight are.
    """

    source: Tensor
    row: Tensor
    position: Tensor
    width: int
    convert: Convert | None = None
    hidden: tuple[int, ...] = ()
    own: Tensor | None = None
    shift: Tensor | None = None
    temperature: float = 1.0
    floor: Tensor | None = None
    whole: bool = False
    number: Tensor | None = field(default=None, repr=False)  # (N,) the rows' numbers before any ``subset``
    weight: float = 1.0
    terms: "tuple[tuple[float, Source], ...]" = ()

    @classmethod
    def of(cls, logits: Tensor) -> "Rows":
        """Return all rows of an (N, V) tensor."""
        n, width = logits.shape
        row = torch.arange(n, device=logits.device)
        return cls(logits[:, None], row, torch.zeros_like(row), width, whole=True)

    @classmethod
    def at(
        cls,
        source: Tensor,
        place: tuple[Tensor, Tensor] | None,
        width: int,
        back: int = 0,
        convert: Convert | None = None,
        batch_rows: Tensor | None = None,
    ) -> "Rows":
        """Return the rows of chosen sites, or of all sites in order if ``place`` is None.

        ``place`` is the row and the position of each site, (N,) each. A site's logits lie ``back`` positions before it.
        ``batch_rows`` (B,) gives the source row of each batch row; by default they are in order.
        """
        batch, length = len(source) if batch_rows is None else len(batch_rows), source.shape[1]
        row, position = _sites(batch, length, source.device) if place is None else place
        whole = back == 0 and batch_rows is None and len(row) == batch * length
        row = row if batch_rows is None else batch_rows[row]
        position = position if back == 0 else (position - back).clamp(min=0)
        return cls(source, row, position, width, convert, whole=whole)

    @classmethod
    def computed(cls, rows: "Computed") -> "Rows":
        """Return computed rows as the result of a ``convert``, so that further operations can follow."""
        made, nothing = rows.function, torch.zeros(1, 1, 1, dtype=rows.dtype, device=rows.device)
        row = torch.zeros_like(rows.number)
        return cls(nothing, row, row, rows.width, lambda raw, number: made(number), number=rows.number)

    def settled(self) -> "Rows":
        """Return rows that are read for the first time with all operations in ``convert``; further ones come after."""
        first = self.convert

        def whole(raw: Tensor, number: Tensor) -> Tensor:
            x = (raw if first is None else first(raw, number))[:, : self.width].to(self.dtype)
            return self._adjust(x, number, torch.zeros((), dtype=torch.int64, device=self.device), in_place=False)

        return replace(
            self, convert=whole, hidden=(), own=None, shift=None, temperature=1.0, floor=None, weight=1.0, terms=()
        )

    def plus(self, weight: float, terms: "Sequence[tuple[float, Source]]") -> "Rows":
        """Return ``weight`` times the rows plus the weighted rows of ``terms``; no temperature or floor may be set."""
        before = tuple((weight * w, rows) for w, rows in self.terms)
        terms = tuple((w, rows) for w, rows in (*before, *terms) if w != 0)
        return replace(self, weight=weight * self.weight, terms=terms)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``dense``: float64 for logits in float64, else float32."""
        return torch.float64 if self.source.dtype == torch.float64 else torch.float32

    @property
    def raw(self) -> bool:
        """Whether no shift, sum, temperature or floor is set, so that ``own`` and ``shift`` are free to use."""
        return self.own is None and not self.summed and self.temperature == 1 and self.floor is None

    @property
    def summed(self) -> bool:
        """Whether the rows are weighted or a sum."""
        return self.weight != 1 or bool(self.terms)

    def subset(self, keep: Tensor) -> "Rows":
        """Return the rows that a mask or an index chooses."""
        pick = _pick(keep)
        number = torch.arange(len(self), device=self.device) if self.number is None else self.number
        return replace(
            self,
            row=self.row[keep],
            position=self.position[keep],
            own=pick(self.own),
            shift=pick(self.shift),
            floor=pick(self.floor),
            number=number[keep],
            whole=False,
            terms=tuple((weight, rows.subset(keep)) for weight, rows in self.terms),
        )

    def then(self, convert: Convert) -> "Rows":
        """Return the same rows with one more conversion, after the earlier ones and before all other operations."""
        first, kind = self.convert, self.dtype
        if first is None:
            return replace(self, convert=lambda raw, number: convert(raw.to(kind), number))
        return replace(self, convert=lambda raw, number: convert(first(raw, number).to(kind), number))

    def dense(self, part: slice | Tensor = slice(None), out: Tensor | None = None) -> Tensor:
        """Return the rows ``part`` as a tensor (n, V) of ``dtype``; differentiable, unless written to ``out``."""
        out = out if type(self.row) is Tensor else None  # a tensor subclass cannot be written to a buffer
        raw = self._raw(part, out)
        if self.convert is not None:
            number = torch.arange(len(self), device=self.device) if self.number is None else self.number
            raw = self.convert(raw, number[part])
        x = raw[:, : self.width].to(self.dtype)
        if out is not None:
            x = x if x.data_ptr() == out.data_ptr() else out[: len(x)].copy_(x)
        return self._adjust(x, part, torch.zeros((), dtype=torch.int64, device=self.device), in_place=out is not None)

    def window(self, part: slice | Tensor, first: Tensor, size: int) -> Tensor:
        """Return columns first..first + size - 1 of rows without ``convert``, (n, size); -inf past the last column."""
        column = first[:, None] + torch.arange(size, device=self.device)
        inside = column < self.width
        raw = self.source[self.row[part][:, None], self.position[part][:, None], column.clamp(max=self.width - 1)]
        return self._adjust(raw.to(self.dtype).masked_fill(~inside, -torch.inf), part, first, in_place=False)

    def _raw(self, part: slice | Tensor, out: Tensor | None) -> Tensor:
        source, flat = self.source, _flat(self.source)
        if flat is None:
            return source[self.row[part], self.position[part]]
        if self.whole and isinstance(part, slice):
            return flat[part]
        index = self.row[part] * source.shape[1] + self.position[part]
        if out is not None and out.dtype == source.dtype and out.shape[1] == source.shape[2]:
            return torch.index_select(flat, 0, index, out=out[: len(index)])
        return flat[index]

    def _adjust(self, x: Tensor, part: slice | Tensor, first: Tensor, in_place: bool) -> Tensor:
        """Apply hidden, shift, temperature and floor to x, which holds columns first, first + 1, ... of the rows."""
        for column in self.hidden:
            index, inside = _column(column - first, x)
            x = (x.scatter_ if in_place else x.scatter)(-1, index, x.gather(-1, index).masked_fill(inside, -torch.inf))
        if self.own is not None and self.shift is not None:
            index, inside = _column(self.own[part] - first, x)
            amount = self.shift[part][:, None].where(inside, 0.0).to(x.dtype)
            x = (x.scatter_add_ if in_place else x.scatter_add)(-1, index, amount)
        if self.summed:
            others = [
                (
                    weight,
                    rows.dense(part) if first.ndim == 0 else _window(rows, part, first, x.shape[-1]),
                    isinstance(rows, Rows) and rows.summed,
                )
                for weight, rows in self.terms
            ]
            x = _sum([(self.weight, x, False), *others])
        if self.temperature != 1:
            x = (x.div_ if in_place else x.div)(self.temperature)
        if self.floor is not None:
            low = x < self.floor[part][:, None].to(x.dtype)
            x = (x.masked_fill_ if in_place else x.masked_fill)(low, -torch.inf)
        return x


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of the softmax of a row and a noise law, at each of N sites.

        scale c(v),    c(v) = weight softmax(row)(v) + level pi(v) + spike 1(v = anchor)

    If ``relative``, the mixture is scale c(v) / c(own) instead.

    Attributes:
        rows: rows of logits.
        place: (N,) the number of each site's row; -1 for a site without a row, where the softmax counts as 0.
        weight, level, scale: (N,) float64.
        pi: (C,) float64; C may exceed the width of the rows.
        spike, anchor: (N,) float64, and (N,) a column of each site, or None.
        own: (N,) a column of each site, or None.
        relative: whether to divide by c(own) and to set that column to 0. A site with scale 0 has only zeros.
    """

    rows: Rows
    place: Tensor
    weight: Tensor
    level: Tensor
    scale: Tensor
    pi: Tensor
    spike: Tensor | None = None
    anchor: Tensor | None = None
    own: Tensor | None = None
    relative: bool = False

    @classmethod
    def softmax(cls, rows: Rows, scale: float) -> "Mixture":
        """Return mixtures that are ``scale`` times the softmax of each row."""
        one, number = torch.ones(len(rows), dtype=torch.float64), torch.arange(len(rows))
        return cls(rows, number, one, torch.zeros_like(one), scale * one, one.new_zeros(rows.width))


@dataclass(frozen=True, eq=False)
class Mixed:
    """Rows log g(c) at N sites, with c the positive part of the sum of one or two mixtures.

    Attributes:
        of: the mixtures.
        rate: the function g: "plain" c, "barker" c / (1 + c), "sqrt" sqrt(c), "min" min(c, 1), "max" max(c, 1). Each
            g is 0 at c = 0.
        without: (N,) a column that is left out of each row, or None.
    """

    of: tuple[Mixture, ...]
    rate: str = "plain"
    without: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Computed:
    """Rows that a function computes when they are read, such as a reverse step on a process with a dense generator.

    Attributes:
        function: maps the numbers (n,) of rows to those rows (n, width).
        width: the number of columns.
        number: (N,) the numbers of these rows.
        dtype: float64 or float32.
        mixed: the rows of all numbers as mixtures, which a kernel can read without storing the rows; None if the rows
            are no mixtures.
    """

    function: Callable[[Tensor], Tensor]
    width: int
    number: Tensor
    dtype: torch.dtype = torch.float64
    mixed: Mixed | None = None

    @classmethod
    def difference(cls, one: Rows, other: Rows) -> "Computed":
        """Return rows log max(softmax(one) - softmax(other), 0)."""
        mixed = Mixed((Mixture.softmax(one, 1.0), Mixture.softmax(other, -1.0)))

        def function(n: Tensor) -> Tensor:
            p, q = (rows.dense(n).double().softmax(-1) for rows in (one, other))
            return (p - q).clamp(min=0).log()

        return cls(function, one.width, mixed.of[0].place, mixed=mixed)

    def __len__(self) -> int:
        return len(self.number)

    @property
    def device(self) -> torch.device:
        """The device of the numbers of the rows."""
        return self.number.device

    def subset(self, keep: Tensor) -> "Computed":
        """Return the rows that a mask or an index chooses."""
        return replace(self, number=self.number[keep])

    def dense(self, part: slice | Tensor = slice(None), out: Tensor | None = None) -> Tensor:
        """Return the rows ``part`` as a tensor (n, V) of ``dtype``, written to ``out`` if it is given."""
        x = self.function(self.number[part]).to(self.dtype)
        return x if out is None or type(x) is not Tensor else out[: len(x)].copy_(x)


Source = Rows | Computed


@dataclass(frozen=True, eq=False)
class LinearHead:
    """The last layer of a denoiser, logits = hidden weight^T + bias, as a ``convert`` that a kernel can fuse.

    Attributes:
        weight: (V, D), for V tokens and hidden states of size D.
        bias: (V,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor, number: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # the cached tensors must be usable in later runs with gradients
def _sites(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and position of all sites in order, without a synchronisation."""
    row = torch.arange(batch, device=device).repeat_interleave(length, output_size=batch * length)
    return row, torch.arange(length, device=device).repeat(batch)


def _column(column: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one column of each row of x as an index, and whether it exists; both (n, 1)."""
    column = column.expand(len(x))[:, None]
    inside = (column >= 0) & (column < x.shape[-1])
    return column.where(inside, 0), inside


def _window(rows: "Source", part: slice | Tensor, first: Tensor, size: int) -> Tensor:
    """Return columns first..first + size - 1 of rows (n, size), -inf past the last one."""
    if isinstance(rows, Rows) and rows.convert is None:
        return rows.window(part, first, size)
    column = first[:, None] + torch.arange(size, device=rows.device)
    inside = column < rows.width
    return rows.dense(part).gather(-1, column.clamp(max=rows.width - 1)).masked_fill(~inside, -torch.inf)


def _sum(parts: list[tuple[float, Tensor, bool]]) -> Tensor:
    """Add rows (weight, row, whether it is a sum): -inf where a row of positive weight is.

    +inf where only rows of negative weight are -inf; NaN where a row is, or has +inf and is no sum.
    """
    total, out = torch.zeros_like(parts[0][1]), torch.zeros_like(parts[0][1], dtype=torch.bool)
    known = ~out
    for weight, rows, summed in parts:
        if weight != 0:
            out |= rows == (-torch.inf if weight > 0 else torch.inf)
            total = total + weight * rows.to(total)
            known &= ~rows.isnan() if summed else rows < torch.inf
    return total.masked_fill(out, -torch.inf).masked_fill(~known, torch.nan)


def _pick(keep: Tensor) -> Callable[[Tensor | None], Tensor | None]:
    return lambda x: None if x is None else x[keep]


def _flat(source: Tensor) -> Tensor | None:
    """Return a (B L, V) view, or None if there is none."""
    batch, length, _ = source.shape
    if length == 1:
        return source[:, 0]
    if batch == 1:
        return source[0]
    return source.flatten(0, 1) if source.stride(0) == length * source.stride(1) else None
