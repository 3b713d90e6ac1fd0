"""Settings of other authors, read by typed getters: an error names the file, the key and the accepted values."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar, overload

from discdiff.checks import real, shown, whole

__all__ = ["Refused", "Settings"]

D = TypeVar("D")


class Refused(ValueError):
    """What ``load`` refuses: the text names the fault and the file; ``load`` prepends the path and the family."""


class Settings(Mapping[str, object]):
    """Table of settings from JSON or YAML; every value is checked for its type when it is read.

    A missing key, or null, gives the default; without a default it is an error. Of several given keys the first that is
    present is read.

    Args:
        values: the table.
        file: the name of its file, for errors: "config.json".
    """

    def __init__(self, values: Mapping[str, object], file: str) -> None:
        self._values, self.file = dict(values), file

    def __getitem__(self, key: str) -> object:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __or__(self, more: Mapping[str, object]) -> "Settings":
        return Settings(self._values | dict(more), self.file)

    @overload
    def whole(self, *keys: str, least: int | None = None, most: int | None = None) -> int: ...
    @overload
    def whole(self, *keys: str, least: int | None = None, most: int | None = None, default: D) -> int | D: ...
    def whole(self, *keys: str, least: int | None = None, most: int | None = None, default: Any = ...) -> Any:
        """Return a whole number from ``least`` to ``most``.

        Raises:
            Refused: a ValueError, for another value, or if there is none and no default.
        """
        key, value = self._found(keys, default)
        try:
            return value if key is None else whole(value, key, least, most)
        except (TypeError, ValueError) as error:
            raise self.refused(str(error)) from error

    @overload
    def number(self, *keys: str, interval: str = "(-inf, inf)") -> float: ...
    @overload
    def number(self, *keys: str, interval: str = "(-inf, inf)", default: D) -> float | D: ...
    def number(self, *keys: str, interval: str = "(-inf, inf)", default: Any = ...) -> Any:
        """Return a number in an interval such as "[0, 1)".

        Raises:
            Refused: a ValueError, for another value, or if there is none and no default.
        """
        key, value = self._found(keys, default)
        try:
            return value if key is None else real(value, key, interval)
        except (TypeError, ValueError) as error:
            raise self.refused(str(error)) from error

    @overload
    def flag(self, *keys: str) -> bool: ...
    @overload
    def flag(self, *keys: str, default: D) -> bool | D: ...
    def flag(self, *keys: str, default: Any = ...) -> Any:
        """Return True or False.

        Raises:
            Refused: a ValueError, for another value, or if there is none and no default.
        """
        key, value = self._found(keys, default)
        if key is not None and not isinstance(value, bool):
            raise self.refused(f"{key} must be true or false, got {shown(value)}")
        return value

    @overload
    def word(self, *keys: str, accepted: Collection[str] = ()) -> str: ...
    @overload
    def word(self, *keys: str, accepted: Collection[str] = (), default: D) -> str | D: ...
    def word(self, *keys: str, accepted: Collection[str] = (), default: Any = ...) -> Any:
        """Return a string; if ``accepted`` is given, one of these.

        Raises:
            Refused: a ValueError, for another value, or if there is none and no default.
        """
        key, value = self._found(keys, default)
        if key is not None and not isinstance(value, str):
            raise self.refused(f"{key} must be a string, got {shown(value)}")
        if key is not None and accepted and value not in accepted:
            raise self.refused(f"{key} must be one of {', '.join(sorted(accepted))}, got {shown(value)}")
        return value

    def part(self, *keys: str) -> "Settings":
        """Return a table inside; an empty one if there is none.

        Raises:
            Refused: a ValueError, for another value.
        """
        key, value = self._found(keys, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.refused(f"{key} must be a table, got {shown(value)}")
        return Settings(value, f"{self.file}, {key}" if key is not None else self.file)

    def items_of(self, *keys: str) -> list[object]:
        """Return a list inside; an empty one if there is none.

        Raises:
            Refused: a ValueError, for another value.
        """
        key, value = self._found(keys, [])
        if not isinstance(value, list | tuple):
            raise self.refused(f"{key} must be a list, got {shown(value)}")
        return list(value)

    def refused(self, what: str) -> Refused:
        """Make the error for this file."""
        return Refused(f"{self.file}: {what}")

    def _found(self, keys: tuple[str, ...], default: object) -> tuple[str | None, object]:
        for key in keys:
            if self._values.get(key) is not None:
                return key, self._values[key]
        if default is ...:
            raise self.refused(f"{' or '.join(keys)} is missing")
        return None, default
