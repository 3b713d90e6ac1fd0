"""Read text, JSON and YAML files of other authors; they must be regular UTF-8 files of bounded size."""

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
    """Return whether a path is a regular file or a link to one; False if nothing is there.

    Raises:
        Refused: if the path is anything else, such as a folder or a broken link.
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
        Refused: if the file does not exist or cannot be read.
    """
    if not is_there(file):
        raise Refused(f"{file.name} is not there")
    if not os.access(file, os.R_OK):
        raise Refused(f"{file.name} cannot be read: permission denied")
    return file.stat().st_size


def text(file: Path, most: int) -> str | None:
    """Return the text of a file, without a byte-order mark at its start; None if the file does not exist.

    Args:
        file: a regular file.
        most: the largest accepted size in bytes.

    Raises:
        Refused: if the file is larger, cannot be read, or is not UTF-8.
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
    """Read a table from a JSON file; return an empty table if the file does not exist.

    Raises:
        Refused: if the file is not JSON, is larger than ``most`` bytes, is nested too deeply, repeats a key, has no
            table at its top level, or has a number that is not finite or has too many digits.
    """
    said = text(file, most)
    return Settings({}, file.name) if said is None else json_text(said, file.name)


def json_text(said: str, name: str) -> Settings:
    """Read a table from JSON text, for instance from a header; ``name`` names the source in errors.

    Raises:
        Refused: a ValueError, if ``json_table`` would refuse the text as the contents of a file.
    """
    try:
        found = json.loads(said, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise Refused(f"{name} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, ours below, or a whole number with more digits than Python reads
        raise Refused(f"{name} is not JSON: {str(error).split(';')[0]}") from error
    return _table(found, name)


def yaml_table(file: Path) -> Settings:
    """Read a table from a YAML file; return an empty table if the file does not exist.

    Raises:
        ImportError: if PyYAML is not installed.
        Refused: if the file is not YAML, is too large or nested too deeply, repeats a key, or has no table at its top
            level. Merge keys ("<<") are refused too, as a few lines of them can expand without end.
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
