"""Training data of ``discdiff train``: a text, whose characters are the tokens, or an array of token ids."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.demo.data import Vocabulary

__all__ = ["TrainingData", "read"]

_LARGEST = 256  # characters of a vocabulary
_OTHER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TrainingData:
    """Token ids of a file.

    Attributes:
        tokens: (N,) ids of one long row, or (N, L) ids of rows.
        vocab_size: V; the ids are 0..V-1.
        characters: the character of each id, for a text; None for an array.
        digest: the SHA-256 of the file.
    """

    tokens: Int[Tensor, "N *L"]
    vocab_size: int
    characters: str | None
    digest: str

    @property
    def unit(self) -> str:
        """The word for one token."""
        return "token" if self.characters is None else "character"

    def parts(self, share: float, length: int) -> tuple[Int[Tensor, "N *L"], Int[Tensor, "M *L"]]:
        """Return the data to train on, (N,) or (N, L), and the data held out, (M,) or (M, L).

        A long row is cut near its end; of rows, every 20th is held out for a share of 0.05.

        Raises:
            ValueError: if one part would be shorter than a window, or hold no row.
        """
        size = len(self.tokens)
        if self.tokens.ndim == 1:
            cut = size - max(int(size * share), length)
            if cut < length:
                raise ValueError(
                    f"--data: the file has {size:,} {self.unit}s, and training on windows of {length} needs at least "
                    f"{2 * length}: take a longer file or a smaller --length"
                )
            return self.tokens[:cut], self.tokens[cut:]
        if size < 2:
            raise ValueError("--data: the array has 1 row, and at least 2 are needed: one is held out")
        held = torch.zeros(size, dtype=torch.bool)
        held[torch.linspace(0, size - 1, max(1, int(size * share))).long()] = True
        return self.tokens[~held], self.tokens[held]


def read(path: Path) -> TrainingData:
    """Read a file whose name ends in .npy as an array of ids, any other file as UTF-8 text.

    At most 256 characters become tokens of their own, the most frequent ones; all others become one further token.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no text in UTF-8, or no array (N,) or (N, L) of whole numbers from 0.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"--data: {path} {what}; give a text file, or an array of token ids in a .npy file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _array(path, digest) if path.suffix == ".npy" else _text(path, digest)


def _text(path: Path, digest: str) -> TrainingData:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--data: {path} is no text in UTF-8 (byte {error.start}); save it as UTF-8, or give an array as .npy"
        ) from error
    counts = Counter(content)
    if len(counts) < 2:
        raise ValueError(f"--data: {path} has {len(content):,} characters, {len(counts)} different; 2 are needed")
    if len(counts) > _LARGEST:
        frequent = {character for character, _ in counts.most_common(_LARGEST)}
        content = "".join(character if character in frequent else _OTHER for character in content)
    vocabulary = Vocabulary(content)
    return TrainingData(vocabulary.encode(content), len(vocabulary), vocabulary.characters, digest)


def _array(path: Path, digest: str) -> TrainingData:
    accepted = "accepted: an array of whole numbers from 0, of shape (N, L), or (N,) for one long row"
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"--data: {path} is no .npy file of numbers ({error}); {accepted}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise ValueError(f"--data: {path} holds {getattr(array, 'dtype', type(array).__name__)}; {accepted}")
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"--data: {path} has shape {array.shape}; {accepted}")
    if int(array.min()) < 0 or int(array.max()) >= 1 << 24:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"--data: {path} holds {wrong}; {accepted}, below 2^24")
    if int(array.max()) < 1:
        raise ValueError(f"--data: {path} holds only the number 0; at least two different tokens are needed")
    tokens = torch.from_numpy(array.astype(np.int64))
    return TrainingData(tokens, int(tokens.max()) + 1, None, digest)
