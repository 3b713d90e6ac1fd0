"""Checks of arguments: whole numbers, real numbers, arrays, devices, and sizes that fit in memory.

Every public number goes through ``whole`` or ``real``. Scalars of numpy and torch count as numbers; bools, strings and
NaN do not. A fraction is not a whole number. An error names the argument, the accepted values and the given value.
"""

import difflib
import math
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "LAST_SEED", "Renamed", "affordable", "array", "check_ids", "check_law", "check_tokens", "decided",
    "extent", "listing", "meant", "number", "placed", "real", "renamed", "seeded", "several", "shown",
    "token_ids", "unmade", "whole", "wholes",
]  # fmt: skip

LAST_SEED = 2**64 - 1
_NAMES = reprlib.Repr()
_NAMES.maxother = _NAMES.maxstring = 80


def shown(value: object) -> str:
    """Return a short repr for an error message."""
    return _NAMES.repr(value)


def whole(value: object, name: str, least: int | None = None, most: int | None = None) -> int:
    """Return the value as an int if it is a whole number from ``least`` to ``most``; errors call it ``name``.

    Raises:
        TypeError: if it is a bool, a float (2.0 too), a string or an array.
        ValueError: if it is out of range.
    """
    number = _index(value)
    if number is None:
        hint = f"; write {value:.0f}" if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else ""
        raise TypeError(f"{name} must be a whole number, got {shown(value)}{hint}")
    if (least is not None and number < least) or (most is not None and number > most):
        low, high = f"be at least {least}", f"be at most {most}"
        accepted = low if most is None else high if least is None else f"lie in {least}..{most}"
        raise ValueError(f"{name} must {accepted}, got {shown(number)}")
    return number


def wholes(values: object, name: str, least: int | None = None, most: int | None = None) -> tuple[int, ...]:
    """Return whole numbers from a sequence or a tensor of them.

    Raises:
        TypeError: if ``values`` cannot be iterated, or one of them is not a whole number.
        ValueError: if a number is out of range.
    """
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"{name} must be a sequence of whole numbers, got {shown(values)}")
    return tuple(whole(value, name, least, most) for value in values)


def listing(values: object, name: str) -> list[Any]:
    """Return a sequence, or an array with one axis, as a list.

    Raises:
        TypeError: for a string, a value that cannot be iterated, or an array with another number of axes.
    """
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"{name} must be a sequence, got {shown(values)}")
    return list(values)


def several(values: object, name: str, least: int | None = None, most: int | None = None) -> tuple[int, ...]:
    """Return a tuple of whole numbers from one whole number or a sequence of whole numbers.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is out of range.
    """
    if isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0:
        return wholes(values, name, least, most)
    return (whole(values, name, least, most),)


def real(value: object, name: str, interval: str = "(-inf, inf)", beside: str = "") -> float:
    """Return the value as a float if it lies in an interval such as "[0, 1)" or "(0, inf)".

    Args:
        value: the given value.
        name: the name of the argument.
        interval: the accepted interval.
        beside: text about other accepted values, which the error adds after the interval.

    Raises:
        TypeError: if the value is a bool, a string or an array.
        ValueError: if the number lies outside the interval; NaN always does.
    """
    found = number(value, name, f"a number in {interval}{beside}")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = found >= low if interval[0] == "[" else found > low
    below = found <= high if interval[-1] == "]" else found < high
    if not (above and below):
        raise ValueError(f"{name} must lie in {interval}{beside}, got {found:g}")
    return found


def number(value: object, name: str, accepted: str) -> float:
    """Return the value as a float if it is a single number; errors call it ``name`` and quote ``accepted``.

    Raises:
        TypeError: if the value is a bool, a string or an array, or a tensor that requires gradients.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be {accepted}, got one to be learned; learn it in a Schedule of your own")
    found = _float(value)
    if found is None:
        raise TypeError(f"{name} must be {accepted}, got {shown(value)}")
    return found


def decided(value: object, name: str) -> bool:
    """Return the value if it is True or False.

    Raises:
        TypeError: for anything else, including 1 and "no".
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def seeded(seed: object, name: str) -> int:
    """Return the seed, or draw one from torch's global generator if it is None.

    Raises:
        TypeError, ValueError: unless the seed is None or a whole number from 0 to 2^64 - 1.
    """
    return int(torch.randint(2**62, ())) if seed is None else whole(seed, name, 0, LAST_SEED)


def array(value: object, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return the value as a tensor; nested sequences and numpy arrays are accepted.

    Raises:
        TypeError: if it is not an array of numbers.
    """
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {shown(value)}") from error


def token_ids(value: object, name: str, accepted: str) -> Tensor:
    """Return the value as a tensor of whole numbers of any shape; errors quote ``accepted``.

    Raises:
        TypeError: if it is not an array of numbers.
        ValueError: if the numbers are floats, complex or bools.
    """
    ids = array(value, name)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if ids.numel() == 0:  # an empty list gives an empty float tensor
            return ids.to(torch.int64)
        raise ValueError(f"{name} must hold {accepted}, got {ids.dtype}")
    return ids


def placed(device: object, name: str) -> torch.device:
    """Return ``device`` as a ``torch.device`` if this machine has it.

    Raises:
        TypeError: if it is neither a string nor a ``torch.device``.
        ValueError: if the name is invalid, or this machine does not have the device.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"{name} must be a device such as 'cpu' or 'cuda', got {shown(device)}")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).split("\n")[0]
        raise ValueError(f"{name} must be a device of this machine, such as 'cpu', got {device!r}: {said}") from error
    return found


def affordable(numbers: int, what: str) -> None:
    """Raise ValueError if ``numbers`` numbers of 8 bytes exceed this machine's memory; call it before allocating."""
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**40
    if numbers * 8 > has:
        raise ValueError(
            f"{what}: this takes {numbers:.3g} numbers of 8 bytes, more than this machine's memory, "
            f"{has / 2**30:.0f} GiB; ask for less"
        )


def extent(batch: object, length: object) -> tuple[int, int]:
    """Check the batch size B and the length L of a prior, and return (B, L) as ints.

    Raises:
        TypeError, ValueError: if B or L is not a whole number >= 0, or B times L numbers exceed this machine's memory.
    """
    size = whole(batch, "prior: batch", 0), whole(length, "prior: length", 0)
    affordable(size[0] * size[1], f"prior: {size[0]} rows of length {size[1]}")
    return size


def check_tokens(x: object, name: str) -> None:
    """Raise ValueError unless ``x`` is an int64 (B, L) tensor."""
    if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype != torch.int64:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be an int64 (B, L) tensor, got {got}")


def check_ids(x: Tensor, name: str, accepted: str, wrong: Tensor) -> None:
    """Raise ValueError if ``wrong`` (B, L) is True anywhere; the error gives the first wrong id in x and its place."""
    if bool(wrong.any()):
        row, site = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: row {row}, position {site} holds {int(x[row, site])}; accepted ids: {accepted}")


def _index(value: object) -> int | None:
    """Return the value as an int, or None if it is not a whole number."""
    kind = getattr(value, "dtype", None)
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or (kind is not None and "bool" in str(kind)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        return None


def _float(value: object) -> float | None:
    """Return the value as a float, or None if it is not a real number."""
    kind = getattr(value, "dtype", None)
    if isinstance(value, bool | str | bytes) or getattr(value, "ndim", 0) != 0 or "bool" in str(kind):
        return None
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def check_law(law: object, name: str) -> Float[Tensor, " N"]:
    """Return a vector of N probabilities as float64 (N,), scaled so that they sum to 1 up to rounding.

    Raises:
        ValueError: if it is not a vector, an entry is negative or NaN, or the sum differs from 1 by more than 1e-6.
    """
    tensor = array(law, name, torch.float64)
    if tensor.ndim != 1 or not bool((tensor >= 0).all()) or not math.isclose(float(tensor.sum()), 1, abs_tol=1e-6):
        raise ValueError(f"{name} must hold probabilities that sum to 1, got {shown(law)}")
    scaled = abs(float(tensor.sum()) - 1) <= len(tensor) * torch.finfo(torch.float64).eps  # so a second call keeps it
    return tensor.clone() if scaled else tensor / tensor.sum()


def unmade(value: object) -> str:
    """Return a short repr for an error message, and what to do if the value is a class or a name."""
    if isinstance(value, type):
        return f"{shown(value)}; it is a class: add ()"
    return f"{shown(value)}; a name is not enough: give the object" if isinstance(value, str) else shown(value)


def meant(name: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name that is most like a misspelt one, or "" if none is like it.

    Letters' case does not count. Of a known name with dots, such as "discdiff.samplers.Gibbs", the last part counts.
    """
    said = str(name)[:64].lower()
    lowered = {one.rpartition(".")[2].lower(): one for one in reversed([*known])}  # of two alike the first one stays
    like = difflib.get_close_matches(said, list(lowered), 1, 0.7) if said[:1] != "_" else []
    return f" (did you mean {lowered[like[0]]!r}?)" if like else ""


def renamed(owner: str, name: str, now: Mapping[str, str], known: Iterable[str] = ()) -> AttributeError:
    """Return the error for a name that ``owner`` lacks.

    If ``now`` maps the name to a new one, the error gives both. Else it suggests the name of ``known`` most like it.
    """
    if name in now:
        return AttributeError(f"{owner}.{name} is now {now[name]}")
    return AttributeError(f"{owner} has no attribute {name!r}{meant(name, known)}")


class Renamed:
    """Base of classes with renamed attributes: reading an old name raises an error that gives the new name.

    Attributes:
        _now: maps each old name to the new one.

    Raises:
        AttributeError: for a name that the object does not have.
    """

    _now: ClassVar[dict[str, str]] = {}

    if not TYPE_CHECKING:  # a type checker would take every name for known

        def __getattr__(self, name: str) -> object:
            if name in self._now:
                raise renamed(type(self).__name__, name, self._now)
            return object.__getattribute__(self, name)  # the plain error, or that of a property
