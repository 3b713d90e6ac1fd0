"""Text, JSON and YAML files of other authors: regular UTF-8 files of bounded size, with a table at the top level."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from discdiff.adapters.settings import Refused, Settings
from discdiff.checks import shown

__all__ = ["CONFIGURATION", "TOKENIZER", "is_there", "json_table", "json_text", "size", "text", "yaml_table"]

CONFIGURATION, TOKENIZER = 2**24, 3 * 2**24  # most bytes; the largest tokenizers in use have 34 MB
_YAML = 2**18  # most bytes; the parser reads some 100 kB a second
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a fifo",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def is_there(file: Path) -> bool:
    """Whether there is a regular file of that name; links to one are accepted.

    Raises:
        Refused: if there is something else, or a broken link.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if file.is_symlink():
            raise Refused(f"{file.name} is a link to a file that is not there") from error
        return False
    except OSError as error:  # a loop of links, a name too long, a folder without permission
        raise Refused(f"{file.name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "no regular file")
        raise Refused(f"{file.name} is {kind}, not a file")
    return True


def size(file: Path) -> int:
    """Return the size in bytes of a readable regular file.

    Raises:
        Refused: if there is none, or it cannot be read.
    """
    if not is_there(file):
        raise Refused(f"{file.name} is not there")
    if not os.access(file, os.R_OK):
        raise Refused(f"{file.name} cannot be read: permission denied")
    return file.stat().st_size


def text(file: Path, most: int) -> str | None:
    """Return the text of a file, or None if there is none.

    Args:
        file: a regular file.
        most: the largest size in bytes.

    Raises:
        Refused: if it is larger, cannot be read, or is not UTF-8. A byte-order mark at its start is skipped.
    """
    if not is_there(file):
        return None
    try:
        with file.open("rb") as opened:
            held = opened.read(most + 1)
    except OSError as error:
        raise Refused(f"{file.name} cannot be read: {error.strerror}") from error
    if len(held) > most:
        raise Refused(f"{file.name} must be at most {most} bytes, got more")
    try:
        return held.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{file.name} is not text in UTF-8: {error.reason} at byte {error.start}") from error


def json_table(file: Path, most: int = CONFIGURATION) -> Settings:
    """Read a table from a JSON file of at most ``most`` bytes; return an empty table if there is no file.

    Raises:
        Refused: if it is larger, is not JSON, is nested too deeply, repeats a key, holds numbers that are not finite or
            too long, or has no table at its top level.
    """
    said = text(file, most)
    return Settings({}, file.name) if said is None else json_text(said, file.name)


def json_text(said: str, name: str) -> Settings:
    """Read a table of JSON from elsewhere, such as a header; refuses the same as ``json_table``.

    Raises:
        Refused: a ValueError, if it is no JSON, is nested too deeply, or as ``json_table``.
    """
    try:
        found = json.loads(said, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise Refused(f"{name} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, ours below, or a whole number with more digits than Python reads
        raise Refused(f"{name} is not JSON: {str(error).split(';')[0]}") from error
    return _table(found, name)


def yaml_table(file: Path) -> Settings:
    """Read a file of YAML; an empty table if there is none.

    Raises:
        ImportError: without PyYAML.
        Refused: as in ``json_table``; also for merge keys ("<<"), as a few lines of them can expand without end.
    """
    said = text(file, _YAML)
    if said is None:
        return Settings({}, file.name)
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"load: reading {file} needs PyYAML: pip install 'discdiff[hf]'") from error

    class Reader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: Any) -> None:  # noqa: ANN401
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise ValueError("merge keys are not read")

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise ValueError(f"a key is there twice at line {node.start_mark.line + 1}")
            return found

    try:
        found = yaml.load(said, Reader)
    except RecursionError as error:
        raise Refused(f"{file.name} is nested too deeply") from error
    except Exception as error:  # errors of the parser, and of the dates and numbers it constructs
        raise Refused(f"{file.name} is not YAML: {' '.join(str(error).split())}") from error
    return _table({} if found is None else found, file.name)


def _table(found: object, name: str) -> Settings:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise Refused(f"{name} must hold a table of names at its top, got a {type(found).__name__}")
    return Settings(found, name)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} is there twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number
