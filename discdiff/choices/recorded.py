"""Recorded choices: the values of all choices of a run, from which it is made again, weighed anew or forked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

__all__ = ["INTEGERS", "Choices", "narrowest", "step_of"]

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
_SITE = re.compile(r"\d+\.\d+\.[^/]+")


@dataclass(frozen=True, eq=False, repr=False)
class Choices(Mapping[str, Tensor]):
    """The values of a run's choices by the name of the site; two are equal if all that they hold is equal.

    Sites have the names that they have in Pyro: "step.slot.name", or "step.slot.name@turn" in a loop. The draw from the
    prior is "0.0.prior". A value is (R, *event) for the R rows that made the choice. Values are stored in the smallest
    dtype that holds them, and read as int64, bool or float64.

    Attributes:
        start: (B, L) the first state, with a prompt in its place.
        frozen: (B, L) the sites that never change, or None.
        first_row: the id of the first row; row b of the batch has the id first_row + b.
        drawn: whether the first state was drawn from the prior; False if it was given.
        times: the time at which the run began, and the end time of each step made.
    """

    start: Int[Tensor, "B L"]
    frozen: Bool[Tensor, "B L"] | None = None
    first_row: int = 0
    drawn: bool = True
    times: tuple[float, ...] = ()
    _values: dict[str, Tensor] = field(default_factory=dict)
    _rows: dict[str, Tensor] = field(default_factory=dict)  # only of sites that not all rows made
    _guided: set[str] = field(default_factory=set)  # the sites of guides

    @property
    def steps(self) -> int:
        """The number of steps made."""
        return max(0, len(self.times) - 1)

    def __getitem__(self, site: str) -> Shaped[Tensor, "R *event"]:
        value = self._values[site]
        return value.long() if value.dtype in INTEGERS else value

    def __iter__(self) -> Iterator[str]:
        return iter(site for site in self._values if site not in self._guided)

    def __len__(self) -> int:
        return len(self._values) - len(self._guided)

    @property
    def guides(self) -> dict[str, Tensor]:
        """The values of the choices of guides, by site; they are no part of a run's log-probability."""
        return {site: self[site] for site in self._values if site in self._guided}

    @property
    def sites(self) -> list[str]:
        """The names of all sites, those of guides too."""
        return list(self._values)

    def rows(self, site: str) -> Int[Tensor, " R"]:
        """Return the indices (R,) in the batch of the rows that made a choice, in the order of its values.

        Raises:
            KeyError: if there is no such site.
        """
        value = self._values[site]
        found = self._rows.get(site)
        return torch.arange(len(value), device=value.device) if found is None else found.long()

    def keep(self, site: str, value: Shaped[Tensor, "R *event"], ids: Int[Tensor, " R"], guided: bool = False) -> None:
        """Keep the value of a choice, of a guide if ``guided``, made by the rows with these ids (R,).

        Raises:
            ValueError: if there is not one value for each id, an id is not of these rows, or the name is not a site's.
        """
        index, batch = ids - self.first_row, len(self.start)
        if not _SITE.fullmatch(site) or len(value) != len(index):
            raise ValueError(
                f"site {site!r}: takes a name 'step.slot.name' and a value a row, got {tuple(value.shape)}"
            )
        if bool(((index < 0) | (index >= batch)).any()):
            raise ValueError(f"site {site}: rows must have ids in [{self.first_row}, {self.first_row + batch})")
        self._values[site] = _packed(value)
        self._rows.pop(site, None)
        if guided:
            self._guided.add(site)
        if len(index) != batch or not torch.equal(index, torch.arange(batch, device=index.device)):
            self._rows[site] = _packed(index)

    def copy(self) -> "Choices":
        """Return a copy, to which choices can be added."""
        return replace(self, _values=dict(self._values), _rows=dict(self._rows), _guided=set(self._guided))

    def without(self, site: str) -> "Choices":
        """Return a copy without a site; raises KeyError if there is no such site."""
        other = self.copy()
        del other._values[site]
        other._rows.pop(site, None)
        other._guided.discard(site)
        return other

    def until(self, times: Sequence[float]) -> "Choices":
        """Return a copy of the first steps, those that begin and end at ``times``."""
        values = {site: value for site, value in self._values.items() if step_of(site) < max(1, len(times))}
        rows = {site: index for site, index in self._rows.items() if site in values}
        return replace(self, times=tuple(times), _values=values, _rows=rows, _guided=self._guided & values.keys())

    def repeated(self, copies: int) -> "Choices":
        """Return the choices of ``copies`` equal rows in place of each; row b becomes rows b copies + 0, 1, ...

        The ids of the copies are id copies + 0, 1, ..., so that they do not depend on a split of the batch.
        """

        def each(value: Tensor) -> Tensor:
            return value.repeat_interleave(copies, 0)

        def places(site: str) -> Tensor:
            index = self.rows(site)[:, None] * copies
            return _packed((index + torch.arange(copies, device=index.device)).flatten())

        return replace(
            self,
            start=each(self.start),
            frozen=None if self.frozen is None else each(self.frozen),
            first_row=self.first_row * copies,
            _values={site: each(value) for site, value in self._values.items()},
            _rows={site: places(site) for site in self._rows},
        )

    def to(self, device: torch.device | str) -> "Choices":
        """Return the choices on a device."""
        return replace(
            self,
            start=self.start.to(device),
            frozen=None if self.frozen is None else self.frozen.to(device),
            _values={site: value.to(device) for site, value in self._values.items()},
            _rows={site: index.to(device) for site, index in self._rows.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for a file; ``of`` reads them."""
        given = {"start": _packed(self.start)} | ({} if self.frozen is None else {"frozen": self.frozen})
        values = {f"value/{site}": value for site, value in self._values.items()}
        return given | values | {f"rows/{site}": index for site, index in self._rows.items()}

    def numbers(self) -> dict[str, object]:
        """Return all that is no tensor by name, for a file; ``of`` reads it."""
        numbers = {"first_row": self.first_row, "drawn": self.drawn, "times": list(self.times)}
        return numbers | {"guided": sorted(self._guided)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], numbers: object) -> "Choices":
        """Return the choices with these ``tensors`` and ``numbers``.

        Raises:
            ValueError: if something is missing, unknown, or has a wrong type or shape; the error names it.
        """
        start, frozen = tensors.get("start"), tensors.get("frozen")
        if start is None or start.ndim != 2 or start.dtype not in INTEGERS:
            raise ValueError("choices: start must be the first states, whole numbers (B, L)")
        if frozen is not None and (frozen.dtype != torch.bool or frozen.shape != start.shape):
            raise ValueError(f"choices: frozen must be a bool mask {tuple(start.shape)}")
        match numbers:
            case {"first_row": int(first), "drawn": bool(drawn), "times": [*times], "guided": [*guided], **rest} if (
                first >= 0 and not rest
            ):
                known = all(type(time) in (int, float) for time in times) and all(
                    isinstance(site, str) and f"value/{site}" in tensors for site in guided
                )
            case _:
                known = False
        if not known:
            raise ValueError(
                "choices: takes a whole number first_row, drawn True or False, a list of times, and the sites of guides"
            )
        found = cls(start.long(), frozen, first, drawn, tuple(float(time) for time in times))
        for name, value in tensors.items():
            kind, _, site = name.partition("/")
            if kind == "value":
                index = tensors.get(f"rows/{site}")
                index = torch.arange(len(start)) if index is None else index
                if index.ndim != 1 or index.dtype not in INTEGERS or value.ndim < 1:
                    raise ValueError(f"choices: {name} must have one value for each of its rows")
                found.keep(site, value, index.long() + first, site in guided)
            elif name not in ("start", "frozen") and not (kind == "rows" and f"value/{site}" in tensors):
                raise ValueError(f"choices: {name!r} is not known")
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Choices):
            return NotImplemented
        ours, theirs = self.tensors(), other.tensors()
        return (
            self.numbers() == other.numbers()
            and ours.keys() == theirs.keys()
            and all(one.dtype == theirs[name].dtype for name, one in ours.items())
            and all(torch.equal(one.cpu(), theirs[name].cpu()) for name, one in ours.items())
        )

    __hash__ = None  # type: ignore[assignment]  # equal by content that may be edited

    def __repr__(self) -> str:
        return f"Choices({len(self)} sites, {len(self.start)} rows, {self.steps} steps)"


def narrowest(low: int, high: int) -> torch.dtype:
    """Return the smallest dtype that holds whole numbers from ``low`` to ``high``."""
    return next(dtype for dtype in INTEGERS if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)


def step_of(site: str) -> int:
    """Return the number of the step in which a site's choice is made."""
    return int(site.partition(".")[0])


def _packed(value: Tensor) -> Tensor:
    """Return a copy in the smallest dtype, so that later edits of the value do not change it."""
    value = value.detach()
    if value.dtype not in INTEGERS:
        return value.clone()
    low, high = (int(end) for end in value.aminmax()) if value.numel() else (0, 0)
    return value.to(narrowest(low, high), copy=True)
