"""Read settings of other authors by typed getters; errors name the file, the key and the accepted values."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar, overload

from discdiff.checks import real, shown, whole

__all__ = ["Refused", "Settings"]

D = TypeVar("D")


class Refused(ValueError):
    """Error for files that ``load`` does not accept.

    The text names the file and the fault; ``load`` puts the path and the family before this text.
    """


class Settings(Mapping[str, object]):
    """Table of settings from JSON or YAML whose getters check the type of a value.

    A getter with several keys reads the first that is present. A key whose value is null counts as missing. If all are
    missing, the getter returns its default, or raises ``Refused`` if it has none.

    Args:
        values: the table.
        file: the name of the file for errors, such as "config.json".
    """

    def __init__(self, values: Mapping[str, object], file: str) -> None:
        self._values = dict(values)
        self.file: str = file

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
        """Return the whole number at the first key that is present; it must be from ``least`` to ``most``.

        Raises:
            Refused: a ValueError, if the value is anything else, or is missing and no default is given.
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
        """Return the number at the first key that is present; it must lie in an interval such as "[0, 1)".

        Raises:
            Refused: a ValueError, if the value is anything else, or is missing and no default is given.
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
        """Return the value, True or False, at the first key that is present.

        Raises:
            Refused: a ValueError, if the value is anything else, or is missing and no default is given.
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
        """Return the string at the first key that is present.

        If ``accepted`` is not empty, the string must be in it.

        Raises:
            Refused: a ValueError, if the value is anything else, or is missing and no default is given.
        """
        key, value = self._found(keys, default)
        if key is not None and not isinstance(value, str):
            raise self.refused(f"{key} must be a string, got {shown(value)}")
        if key is not None and accepted and value not in accepted:
            raise self.refused(f"{key} must be one of {', '.join(sorted(accepted))}, got {shown(value)}")
        return value

    def part(self, *keys: str) -> "Settings":
        """Return the inner table at the first key that is present, else an empty table.

        Raises:
            Refused: a ValueError, if the value is not a table with strings as keys.
        """
        key, value = self._found(keys, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.refused(f"{key} must be a table, got {shown(value)}")
        return Settings(value, f"{self.file}, {key}" if key is not None else self.file)

    def items_of(self, *keys: str) -> list[object]:
        """Return the list at the first key that is present, else an empty list.

        Raises:
            Refused: a ValueError, if the value is not a list.
        """
        key, value = self._found(keys, [])
        if not isinstance(value, list | tuple):
            raise self.refused(f"{key} must be a list, got {shown(value)}")
        return list(value)

    def refused(self, what: str) -> Refused:
        """Make an error whose text begins with the name of the settings' file; the caller raises it."""
        return Refused(f"{self.file}: {what}")

    def _found(self, keys: tuple[str, ...], default: object) -> tuple[str | None, object]:
        for key in keys:
            if self._values.get(key) is not None:
                return key, self._values[key]
        if default is ...:
            raise self.refused(f"{' or '.join(keys)} is missing")
        return None, default
