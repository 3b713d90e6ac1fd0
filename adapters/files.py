"""What lies on disk: configurations, tokenizer and weights, read without running anybody's code."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from discdiff.adapters.inert import load_inert

__all__ = ["Files"]

_HUB = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_TRAINED = ("model.pt", "checkpoints-meta/checkpoint.pth")  # as the trainers of GIDD and SEDD leave them
_HYDRA = ("config.yaml", ".hydra/config.yaml", "../.hydra/config.yaml")
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
_TOKENIZER |= {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
_TORCH = {".ckpt", ".pt", ".pth", ".bin", ".tar"}
_KNOWN = {*_TORCH, ".safetensors", ".npz"}


@contextmanager
def _tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, opened."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"load: {file} is not a safetensors file: {error}") from error


class Files:
    """A checkpoint: a folder as the hub has them, or one file.

    Args:
        path: a folder with config.json and weights, or a .safetensors, .ckpt, .pt, .pth, .bin, .tar or .npz file.

    Raises:
        FileNotFoundError: if there is nothing there, or no weights in it.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"load: there is no file or folder {path}")
        if path.is_file() and path.suffix not in _KNOWN:
            raise ValueError(f"load: {path} is no file of weights; accepted: {', '.join(sorted(_KNOWN))}, or a folder")
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.config = self._json("config.json") if path.is_dir() else {}
        self.generation = self._json("generation_config.json") if path.is_dir() else {}

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"load: {file} is not JSON: {error}") from error

    @cached_property
    def run(self) -> dict[str, Any]:
        """The YAML configuration that a training run leaves, beside its weights or a folder higher."""
        for name in _HYDRA:
            file = self.folder / name
            if file.is_file():
                try:
                    import yaml
                except ImportError as error:
                    raise ImportError(f"load: reading {file} needs PyYAML: pip install 'discdiff[hf]'") from error
                said = yaml.safe_load(file.read_text(encoding="utf-8"))
                return said if isinstance(said, dict) else {}
        return {}

    # --- weights ------------------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> list[Path]:
        """The files that hold weights."""
        if self.path.is_file():
            return [self.path]
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            shards = self._json(index).get("weight_map", {})
            if shards:
                return [self.folder / name for name in sorted(set(shards.values()))]
        one = [self.folder / name for name in (*_HUB, *_TRAINED) if (self.folder / name).is_file()]
        if not one:
            one = sorted(file for file in self.folder.iterdir() if file.suffix in _KNOWN)
        if not one:
            raise FileNotFoundError(f"load: {self.folder} holds no weights ({', '.join(sorted(_KNOWN))})")
        return one[:1]

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file."""
        if self.parts[0].suffix != ".safetensors":
            return {}
        with _tensors(self.parts[0]) as file:
            return file.metadata() or {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name; of safetensors files only the headers are read."""
        found: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            if part.suffix == ".safetensors":
                with _tensors(part) as file:
                    found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            else:
                found |= {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        return found

    @cached_property
    def saved(self) -> dict[str, Any]:
        """All that a file of torch's holds: of a Lightning checkpoint the weights, hyperparameters and averages."""
        found: dict[str, Any] = {}
        for part in self.parts:
            if part.suffix in _TORCH:
                loaded = load_inert(part)
                if not isinstance(loaded, Mapping):
                    raise ValueError(f"load: {part} holds a {type(loaded).__name__}, not weights by name")
                found |= loaded
        return found

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name on disk."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            if part.suffix == ".safetensors":
                with _tensors(part) as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            elif part.suffix == ".npz":
                try:
                    with np.load(part, allow_pickle=False) as arrays:
                        found |= {name: torch.from_numpy(arrays[name]) for name in arrays.files}
                except (ValueError, BadZipFile) as error:  # numpy takes what it does not know for a pickle
                    raise ValueError(f"load: {part} is not an archive of arrays (numpy.savez)") from error
        if self.saved:
            inner = [self.saved[key] for key in ("state_dict", "model_state_dict", "model") if key in self.saved]
            tensors = inner[0] if inner else self.saved
            found |= {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        if not found:
            raise ValueError(f"load: {self.path} holds no tensors by name")
        return found

    # --- tokenizer ----------------------------------------------------------------------------------------------------

    @cached_property
    def words(self) -> tuple[str, list[str]]:
        """The file of the word list and its lines: vocab.txt, or the one beside the folder where that must be meant.

        Some authors leave it one level up, for several folders of weights. It counts where the folder holds nothing of
        a tokenizer and it has just as many lines as config.json says that there are tokens.
        """
        own, beside = self.folder / "vocab.txt", self.folder.resolve().parent / "vocab.txt"
        if own.is_file():
            return own.name, own.read_text(encoding="utf-8").splitlines()
        alone = self.path.is_dir() and not any((self.folder / name).exists() for name in _TOKENIZER)
        if alone and beside.is_file():
            lines = beside.read_text(encoding="utf-8").splitlines()
            if len(lines) == self.config.get("vocab_size"):
                return "../vocab.txt", lines
        return "", []

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Ids of the tokens that the tokenizer's files name."""
        found: dict[str, int] = {line: n for n, line in enumerate(self.words[1])}
        found |= self._json("vocab.json")
        whole = self._json("tokenizer.json")
        known = whole.get("model", {}).get("vocab", {})
        found |= known if isinstance(known, dict) else {entry[0]: n for n, entry in enumerate(known)}
        found |= {entry["content"]: entry["id"] for entry in whole.get("added_tokens", [])}
        found |= self._json("added_tokens.json")
        added = self._json("tokenizer_config.json").get("added_tokens_decoder", {})
        return found | {entry["content"]: int(number) for number, entry in added.items()}

    @property
    def tokenizer_size(self) -> int | None:
        """One more than the largest id, or None without a tokenizer."""
        return max(self.tokens.values()) + 1 if self.tokens else None

    def special(self, *names: str) -> tuple[int, ...]:
        """Ids of special tokens, such as "bos_token", that the tokenizer has."""
        found = (self._special_token(name) for name in names)
        return tuple(sorted({self.tokens[token] for token in found if token in self.tokens}))

    def _special_token(self, name: str) -> str:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self._json(file).get(name)
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
        return ""

    # --- the mask -----------------------------------------------------------------------------------------------------

    def mask_id(self, rule: int | None, given: int | None) -> tuple[int, str]:
        """The mask's id and where it was found: config.json, generation_config.json and the tokenizer must agree.

        Args:
            rule: what the family does where none of them says it.
            given: what the user says, which settles it.

        Raises:
            ValueError: if they disagree, or none says anything.
        """
        if given is not None:
            return given, "given"
        found: dict[str, int | None] = {
            "config.json": self.config.get("mask_token_id"),
            "generation_config.json": self.generation.get("mask_token_id"),
            "the tokenizer": next(iter(self.special("mask_token")), None),
        }
        said = {source: number for source, number in found.items() if number is not None}
        if len(set(said.values())) > 1:
            parts = ", ".join(f"{number} by {source}" for source, number in said.items())
            raise ValueError(
                f"load: {self.path} does not agree with itself on the mask id: {parts}; pass the right one, for "
                f"instance load(..., mask_id={next(iter(said.values()))})"
            )
        if said:
            return next(iter(said.values())), " and ".join(said)
        if rule is None:
            raise ValueError(f"load: nothing in {self.path} says the mask id; pass load(..., mask_id=...)")
        return rule, "the family's rule"
