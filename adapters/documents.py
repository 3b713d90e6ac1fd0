"""Text, JSON and YAML that somebody else wrote: regular files of bounded size in UTF-8, with a table at the top."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from discdiff.adapters.settings import Refused, Settings
from discdiff.checks import shown

__all__ = ["CONFIGURATION", "TOKENIZER", "is_there", "json_table", "size", "text", "yaml_table"]

CONFIGURATION, TOKENIZER = 2**24, 3 * 2**24  # bytes; the largest tokenizers that are in use have 34 MB
_YAML = 2**18  # bytes; its parser reads some 100 kB a second
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a fifo",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def is_there(file: Path) -> bool:
    """Whether there is a regular file of that name, which a link may lead to.

    Raises:
        Refused: if there is something else, or a link that leads nowhere.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if file.is_symlink():
            raise Refused(f"{file.name} is a link to a file that is not there") from error
        return False
    except OSError as error:  # a loop of links, a name too long, a folder that may not be entered
        raise Refused(f"{file.name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "no regular file")
        raise Refused(f"{file.name} is {kind}, not a file")
    return True


def size(file: Path) -> int:
    """The bytes of a regular file that may be read.

    Raises:
        Refused: if there is none, or it may not be read.
    """
    if not is_there(file):
        raise Refused(f"{file.name} is not there")
    if not os.access(file, os.R_OK):
        raise Refused(f"{file.name} cannot be read: permission denied")
    return file.stat().st_size


def text(file: Path, most: int) -> str | None:
    """What a file says, None where there is none.

    Args:
        file: a regular one.
        most: bytes.

    Raises:
        Refused: if it is larger, cannot be read, or is not UTF-8; a mark of the byte order at its start is passed over.
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
    """A file of JSON, an empty table where there is none.

    Raises:
        Refused: if it is no JSON, is nested too deeply, names a key twice, holds numbers that are not finite or too
            long, or has no table at its top.
    """
    said = text(file, most)
    if said is None:
        return Settings({}, file.name)
    try:
        found = json.loads(said, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise Refused(f"{file.name} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, ours below, and a whole number of more digits than Python reads
        raise Refused(f"{file.name} is not JSON: {str(error).split(';')[0]}") from error
    return _table(found, file)


def yaml_table(file: Path) -> Settings:
    """A file of YAML, an empty table where there is none.

    Raises:
        ImportError: without PyYAML.
        Refused: as of ``json_table``; merge keys ("<<") are refused too, since a few lines of them never end.
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
    except Exception as error:  # the parser's own, and those of the dates and numbers that it makes
        raise Refused(f"{file.name} is not YAML: {' '.join(str(error).split())}") from error
    return _table({} if found is None else found, file)


def _table(found: object, file: Path) -> Settings:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise Refused(f"{file.name} must hold a table of names at its top, got a {type(found).__name__}")
    return Settings(found, file.name)


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
