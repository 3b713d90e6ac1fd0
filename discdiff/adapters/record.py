"""Processes, schedules and conventions as JSON and back: each kind has a name, and its arguments have types.

Names in a file are looked up only in the table of this module, so a file cannot choose code to run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from discdiff.adapters.convention import Convention
from discdiff.adapters.diffusion_transformers import HybridClock
from discdiff.adapters.evodiff import Tabulated
from discdiff.adapters.md4 import LateCosine
from discdiff.adapters.settings import Settings
from discdiff.checks import shown
from discdiff.process import (
    LARGEST,
    AbsorbingUniform,
    Cosine,
    FromFunction,
    General,
    Geometric,
    Hybrid,
    Interpolant,
    Linear,
    LogLinear,
    Marginal,
    Masked,
    Ordinal,
    PerSite,
    Polynomial,
    Process,
    Schedule,
    Sigmoid,
    Uniform,
)

__all__ = ["clock_of", "convention_of", "described", "dtype_of", "recorded", "table"]

_NUMBERS = 1 << 22  # most numbers of a generator or another table: more does not belong in JSON
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_OF_A_RUN = {"files"}  # fields of a convention that tell where it was read, not what it is


@dataclass(frozen=True)
class _Argument:
    """An argument of a kind: the attribute that holds it, and how to write and read it."""

    write: Callable[[Any, str], object]
    read: Callable[[Settings, str, int], object]
    kept: str = ""  # the attribute, if its name differs


@dataclass(frozen=True)
class _Kind:
    cls: type
    arguments: Mapping[str, _Argument]


def described(value: object, where: str) -> dict[str, object]:
    """Describe a process, a schedule or a schedule's function as a table of JSON.

    Raises:
        ValueError: if it, or a part of it, cannot be written; names it.
    """
    name = next((name for name, kind in _KINDS.items() if type(value) is kind.cls), None)
    if name is None:
        raise ValueError(f"{where} cannot be written: {shown(value)}; known kinds: {', '.join(_KINDS)}")
    said: dict[str, object] = {"kind": name}
    for key, argument in _KINDS[name].arguments.items():
        held = reduce(getattr, (argument.kept or key).split("."), value)
        said[key] = argument.write(held, f"{where}, {key} of {name},")
    return said


def _made(settings: Settings, of: tuple[type, ...], most: int) -> Any:  # noqa: ANN401
    """Make an object from a table of ``described``, if it is of one of these types; sizes are at most ``most``.

    Raises:
        Refused: for an unknown kind, or arguments that it does not have.
    """
    accepted = [name for name, kind in _KINDS.items() if issubclass(kind.cls, of)]
    kind = _KINDS[settings.word("kind", accepted=accepted)]
    known(settings, {"kind", *kind.arguments})
    arguments = {key: argument.read(settings, key, most) for key, argument in kind.arguments.items()}
    try:
        return kind.cls(**arguments)
    except (TypeError, ValueError) as error:
        raise settings.refused(str(error)) from error


def known(settings: Settings, keys: set[str]) -> None:
    """Raise ``Refused`` for an unknown key: it could change the meaning of the others."""
    strange = sorted(settings.keys() - keys)
    if strange:
        raise settings.refused(
            f"{', '.join(map(shown, strange[:3]))} is not known; a newer discdiff may have written it"
        )


# --- kinds of arguments -----------------------------------------------------------------------------------------------


def _same(value: object, where: str) -> object:
    return value


def _number(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{where} cannot be written: {value} is no finite number")
    return value


def _numbers(value: Tensor | tuple[float, ...] | None, where: str) -> object:
    if value is None:
        return None
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{where} cannot be written: it is to be learned")
    table = torch.as_tensor(value, dtype=torch.float64)
    if table.numel() > _NUMBERS:
        raise ValueError(f"{where} cannot be written: of {table.numel()} numbers at most {_NUMBERS} are")
    return (table.to_dense() if table.is_sparse else table).tolist()


def _read_numbers(settings: Settings, key: str, most: int) -> Tensor | None:
    if settings.get(key) is None:
        return None
    return table(settings, key)


def table(settings: Settings, key: str) -> Tensor:
    """Return a vector or a matrix of finite numbers, float64.

    Raises:
        Refused: for anything else.
    """
    rows = settings.items_of(key)
    nested = [row for row in rows if isinstance(row, list)]
    flat = [value for row in nested for value in row] if nested else rows
    right = all(isinstance(v, int | float) and not isinstance(v, bool) for v in flat) and len(nested) in (0, len(rows))
    if not right or len({len(row) for row in nested}) > 1 or not flat:
        raise settings.refused(f"{key} must be a list of numbers, or of such lists of equal length, got {shown(rows)}")
    try:
        found = torch.tensor(rows, dtype=torch.float64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise settings.refused(f"{key} must hold numbers of ordinary size, got {shown(rows)}") from error
    if not bool(torch.isfinite(found).all()):
        raise settings.refused(f"{key} must hold finite numbers, got {shown(rows)}")
    return found


def _generator(value: Tensor, where: str) -> object:
    if not value.is_sparse:
        return _numbers(value, where)
    entries = value.coalesce()
    row, column = entries.indices().tolist()
    return {"states": len(value), "row": row, "column": column, "rate": _numbers(entries.values(), where)}


def _read_generator(settings: Settings, key: str, most: int) -> Tensor:
    if not isinstance(settings.get(key), Mapping):
        return table(settings, key)
    part = settings.part(key)
    known(part, {"states", "row", "column", "rate"})
    size, rate = part.whole("states", least=1, most=most), table(part, "rate")
    places = [table(part, name) for name in ("row", "column")]
    if any(place.shape != rate.shape or rate.ndim != 1 or not bool((place % 1 == 0).all()) for place in places):
        raise part.refused("row, column and rate must be lists of equal length, of whole numbers the first two")
    where = torch.stack(places).long()
    if bool(((where < 0) | (where >= size)).any()):
        raise part.refused(f"row and column must lie in 0..{size - 1}")
    return torch.sparse_coo_tensor(where, rate, (size, size), check_invariants=True).coalesce()


def _size(settings: Settings, key: str, most: int) -> int:
    return settings.whole(key, least=1, most=most)


def _place(settings: Settings, key: str, most: int) -> int | None:
    return settings.whole(key, least=0, most=most, default=None)


def _share(value: object, where: str) -> object:
    if callable(value):
        raise ValueError(f"{where} cannot be written: it is a function, {shown(value)}")
    return value


def _inner(*of: type) -> _Argument:
    return _Argument(described, lambda settings, key, most: _made(settings.part(key), of, most))


def _tuple(settings: Settings, key: str, most: int) -> tuple[float, ...]:
    return tuple(table(settings, key).flatten().tolist())


_NUMBER = _Argument(_number, lambda settings, key, most: settings.number(key))
_SIZE, _MASK, _CLOCK = _Argument(_same, _size), _Argument(_same, _place), _inner(Schedule)
_PAIR = {"vocab_size": _SIZE, "schedule": _CLOCK}
_P = _Argument(_share, lambda settings, key, most: settings.number(key), "_blend.p_uniform")


def _law(kept: str) -> _Argument:
    return _Argument(_numbers, _read_numbers, kept)


_RATES = _Argument(_generator, _read_generator, "_q")
_KINDS: dict[str, _Kind] = {
    "Linear": _Kind(Linear, {}),
    "LogLinear": _Kind(LogLinear, {"eps": _NUMBER}),
    "Cosine": _Kind(Cosine, {}),
    "Polynomial": _Kind(Polynomial, {"k": _NUMBER}),
    "Geometric": _Kind(Geometric, {"smin": _NUMBER, "smax": _NUMBER}),
    "Sigmoid": _Kind(Sigmoid, {"k": _NUMBER}),
    "PerSite": _Kind(PerSite, {"base": _CLOCK, "log_power": _law("log_power")}),
    "Tabulated": _Kind(Tabulated, {"sigmas": _Argument(_numbers, _tuple)}),
    "FromFunction": _Kind(FromFunction, {"function": _inner(HybridClock, LateCosine)}),
    "HybridClock": _Kind(HybridClock, {"p_uniform": _NUMBER}),
    "LateCosine": _Kind(LateCosine, {}),
    "Uniform": _Kind(Uniform, _PAIR),
    "Marginal": _Kind(Marginal, {"pi": _law("_pi"), "schedule": _CLOCK}),
    "Masked": _Kind(Masked, _PAIR | {"mask_id": _MASK}),
    "Hybrid": _Kind(Hybrid, _PAIR | {"p_uniform": _P}),
    "General": _Kind(
        General, {"generator": _Argument(_generator, _read_generator, "_q"), "schedule": _CLOCK, "mask_id": _MASK}
    ),
    "Ordinal": _Kind(Ordinal, _PAIR | {"pi": _law("_law")}),
    "Interpolant": _Kind(Interpolant, _PAIR | {"source": _law("_source"), "p_uniform": _P}),
    "AbsorbingUniform": _Kind(AbsorbingUniform, _PAIR),
}


# --- conventions ------------------------------------------------------------------------------------------------------


def recorded(convention: Convention) -> dict[str, object]:
    """Return a convention as a table that JSON can hold; ``convention_of`` reads it.

    Raises:
        ValueError: if its process, or a number that is not finite, cannot be written.
    """
    said: dict[str, object] = {}
    for one in fields(Convention):
        value = getattr(convention, one.name)
        if one.name in _OF_A_RUN:
            continue
        if one.name == "process":
            value = described(value, "save: the process")
        elif isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        said[one.name] = _number(value, f"save: {one.name}") if isinstance(value, float) else value
    return said


def convention_of(settings: Settings, most: int) -> dict[str, Any]:
    """Return the arguments of the convention that ``recorded`` wrote.

    Args:
        settings: the table.
        most: the largest size or id accepted.

    Raises:
        Refused: for a field that is unknown, missing or of another type.
    """
    hints = get_type_hints(Convention)
    names = [one.name for one in fields(Convention) if one.name not in _OF_A_RUN]
    known(settings, set(names))
    return {name: _field(settings, name, hints[name], most) for name in names if name in settings or _needed(name)}


def clock_of(settings: Settings, most: int) -> Schedule:
    """Read a schedule from a table that ``described`` wrote; ``most`` is the largest size accepted.

    Raises:
        Refused: a ValueError, if the table describes no schedule.
    """
    found: Schedule = _made(settings, (Schedule,), most)
    return found


def dtype_of(settings: Settings, key: str) -> torch.dtype | None:
    """Return a floating dtype by its name, or None."""
    name = settings.word(key, accepted=_DTYPES, default=None)
    return None if name is None else _DTYPES[name]


def _needed(name: str) -> bool:
    return name in {"family", "process", "predicts", "columns"}


def _field(settings: Settings, name: str, hint: Any, most: int) -> object:  # noqa: ANN401
    """Read a field by the type that ``Convention`` declares."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if type(None) in kinds and settings.get(name) is None:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is Process:
        return _made(settings.part(name), (Process,), most)
    if kind is torch.dtype:
        return dtype_of(settings, name)
    if get_origin(kind) is Literal:
        return settings.word(name, accepted=get_args(kind))
    if get_origin(kind) is tuple:
        return _several(settings, name, get_args(kind), most)
    if kind is int:
        return settings.whole(name, least=1, most=LARGEST)
    if kind is float:
        return settings.number(name)
    return settings.flag(name) if kind is bool else settings.word(name)


def _several(settings: Settings, name: str, kinds: tuple[Any, ...], most: int) -> tuple[object, ...]:
    """Read a list of words or of ids, of the length that the type declares, if it does."""
    values = settings.items_of(name)
    if kinds[-1] is not ... and len(values) != len(kinds):
        raise settings.refused(f"{name} must hold {len(kinds)} values, got {shown(values)}")
    each = Settings({str(n): value for n, value in enumerate(values)}, f"{settings.file}, {name}")
    if kinds[0] is str:
        return tuple(each.word(key) for key in each)
    return tuple(each.whole(key, least=0, most=most) for key in each)
