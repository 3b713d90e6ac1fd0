"""Read token ids and special tokens from a tokenizer's files."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from discdiff.adapters.documents import TOKENIZER, is_there, json_table, text
from discdiff.adapters.settings import Refused, Settings
from discdiff.checks import shown, whole

__all__ = ["Tokenizer", "word_list"]

_MOST = 2**31  # the largest id
_FILES = {"vocab.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_FILES |= {"added_tokens.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}


def word_list(file: Path) -> dict[str, int]:
    """Return ids by token from a file with one token a line; empty if the file does not exist."""
    lines = (text(file, TOKENIZER) or "").replace("\r\n", "\n").removesuffix("\n")
    return {line: n for n, line in enumerate(lines.split("\n"))} if lines else {}


class Tokenizer:
    """A tokenizer's files: vocab.txt, vocab.json, tokenizer.json and the files of added tokens.

    A missing value or null is ignored. A value of a wrong type raises an error that names the file and the key.

    Args:
        folders: the folders of the files; if several folders have a file of the same name, that of the first is used.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders: tuple[Path, ...] = folders
        self._read = dict[str, Settings]()

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Ids by token, from all files together.

        Raises:
            Refused: if an id is not a whole number, or a token is not a string.
        """
        found = word_list(self._place("vocab.txt"))
        found |= _ids(self._table("vocab.json"))
        whole_one = self._table("tokenizer.json")
        found |= _vocabulary(whole_one.part("model"))
        for entry in whole_one.items_of("added_tokens"):
            added = _settings(entry, f"{whole_one.file}, added_tokens")
            found[added.word("content")] = added.whole("id", least=0, most=_MOST)
        found |= _ids(self._table("added_tokens.json"))
        decoder = self._table("tokenizer_config.json").part("added_tokens_decoder")
        for number, entry in decoder.items():
            if not number.isascii() or not number.isdecimal() or len(number) > 9:
                raise decoder.refused(f"an id must be a whole number, got {shown(number)}")
            found[_settings(entry, f"{decoder.file}, {number}").word("content")] = int(number)
        return found

    @property
    def is_there(self) -> bool:
        """Whether there is any tokenizer file."""
        return any(is_there(folder / name) for folder in self.folders for name in _FILES)

    @property
    def size(self) -> int | None:
        """One more than the largest id; None without a vocabulary."""
        return max(self.tokens.values()) + 1 if self.tokens else None

    def special(self, name: str) -> str | None:
        """Return the text of a special token such as "mask_token"; None if the files do not declare it.

        Raises:
            Refused: if the declaration is neither a string nor a table with the key "content".
        """
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            said = self._table(file)
            token = said.get(name)
            if isinstance(token, Mapping):
                return said.part(name).word("content")
            if token is not None:
                return said.word(name)
        return None

    def _table(self, name: str) -> Settings:
        if name not in self._read:
            self._read[name] = json_table(self._place(name), TOKENIZER)
        return self._read[name]

    def _place(self, name: str) -> Path:
        return next((folder / name for folder in self.folders if is_there(folder / name)), self.folders[0] / name)


def _vocabulary(model: Settings) -> dict[str, int]:
    """Return ids by token from the "model" of tokenizer.json: a table, or a list of tokens with scores (unigrams)."""
    known = model.get("vocab")
    if not isinstance(known, list):
        return _ids(model.part("vocab"))
    found = {}
    for n, entry in enumerate(known):
        if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
            raise model.refused(f"vocab must hold tokens with their scores, got {shown(entry)}")
        found[entry[0]] = n
    return found


def _ids(table: Settings) -> dict[str, int]:
    for token, number in table.items():
        if type(number) is not int or not 0 <= number < _MOST:
            try:
                whole(number, f"the id of {shown(token)}", 0, _MOST)
            except (TypeError, ValueError) as error:
                raise table.refused(str(error)) from error
    return dict(table.items())  # type: ignore[arg-type]


def _settings(entry: object, file: str) -> Settings:
    if not isinstance(entry, Mapping):
        raise Refused(f"{file}: a token must be a table, got {shown(entry)}")
    return Settings(entry, file)
