"""Data of the examples: handwritten digits from scikit-learn, and an English text stored in ``assets``."""

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["ASSETS", "GREY_LEVELS", "Vocabulary", "digits", "examples", "text", "text_from_topics"]

ASSETS = Path(__file__).parent / "assets"
GREY_LEVELS = 17
SIDE = 8
_TEXT = ASSETS / "topics.txt"


def digits() -> Int[Tensor, "N 64"]:
    """Return the N = 1797 images of scikit-learn's ``load_digits``, (N, 64).

    They have 8 x 8 pixels, row by row, with grey levels 0..16.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'discdiff[demo]'") from error
    return torch.as_tensor(load_digits().data).to(torch.int64)


class Vocabulary:
    """Map between the characters of an alphabet and their ids, which are in code-point order.

    Args:
        characters: the alphabet; repeated characters count once.
    """

    def __init__(self, characters: str) -> None:
        self.characters: str = "".join(sorted(set(characters)))
        self._ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, string: str) -> Int[Tensor, " L"]:
        """Return the ids (L,) of a string.

        Raises:
            ValueError: for a character that is not in the alphabet.
        """
        unknown = sorted(set(string) - set(self.characters))
        if unknown:
            raise ValueError(f"the text has characters {unknown} that are not in the vocabulary: {self.characters!r}")
        return torch.tensor([self._ids[character] for character in string], dtype=torch.int64)

    def decode(self, tokens: Int[Tensor, " L"]) -> str:
        """Return the string that ids (L,) stand for."""
        return "".join(self.characters[i] for i in tokens.tolist())

    def __len__(self) -> int:
        return len(self.characters)


def text() -> tuple[Int[Tensor, " N"], Vocabulary]:
    """Return the example text as one long row of ids (N,), and its vocabulary.

    The text is the Python documentation in ``pydoc_data.topics`` at the time when the file was made by
    ``python -m discdiff.demo.training text-file``. It is stored here because the standard library's text differs
    between Python versions. The vocabulary is the set of its characters.
    """
    content = _TEXT.read_text(encoding="ascii").split("\n", 1)[1]
    vocabulary = Vocabulary(content)
    return vocabulary.encode(content), vocabulary


def examples(
    data: Literal["digits", "text"], count: int, generator: torch.Generator, length: int = 128
) -> Int[Tensor, "B L"]:
    """Draw ``count`` random images of digits, or random windows of ``length`` characters of the text, (B, L).

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"examples: count must be at least 1, got {count}")
    if data == "digits":
        images = digits()
        return images[torch.randint(len(images), (count,), generator=generator)]
    tokens, _ = text()
    start = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[start + torch.arange(length)]


def text_from_topics() -> str:
    """Return this Python's ``pydoc_data.topics`` as ASCII prose; the first line holds the SHA-256 of the original."""
    from pydoc_data.topics import topics

    source = "\n".join(topics[name] for name in sorted(topics))
    ascii_only = (
        unicodedata.normalize("NFKD", source.translate(str.maketrans("‘’“”–—…", "''\"\"--.")))
        .encode("ascii", "ignore")
        .decode()
    )
    no_rules = re.sub(r"([*=\-+~^#\"])\1{3,}", " ", ascii_only)
    prose = re.sub(r"\s+", " ", no_rules).strip()
    digest = hashlib.sha256(source.encode()).hexdigest()
    return f"source: pydoc_data.topics, sha256 {digest}\n{prose}"
