"""Read checkpoint files (configurations, tokenizer, weights) without running code from them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from discdiff.adapters import archives
from discdiff.adapters.archives import KNOWN, TORCH
from discdiff.adapters.averages import Which, weights_of
from discdiff.adapters.documents import is_there, json_table, yaml_table
from discdiff.adapters.hub import Hub, folder_or_file
from discdiff.adapters.low_rank import is_adapter, merged
from discdiff.adapters.quantized import check_settings, check_tensors
from discdiff.adapters.settings import Refused, Settings
from discdiff.adapters.tokenizer import Tokenizer, word_list
from discdiff.adapters.weights import ADAPTERS, beside, inside, named_parts, newest_folder, parts, weights_in

__all__ = ["Files"]

_HYDRA = ("config.yaml", ".hydra/config.yaml", "../.hydra/config.yaml")
_HUB = Hub()
_NESTED = ("text_config", "dllm_config")  # tables of config.json that may hold the mask's id too


class Files:
    """A checkpoint: a folder as on the hub, or one file.

    The folder of an adapter (PEFT) stands for its base model with the adapter merged into it.

    Args:
        path: a folder with config.json and weights, or a .safetensors, .ckpt, .pt, .pth, .bin, .tar or .npz file.
        file: the name of a file of weights in the folder ``path``, or of a folder in it. None for the usual files.
        which: "raw" or "ema"; None for averaged weights if there are any.
        hub: fetches the base of an adapter if the base is not on this machine. None if this checkpoint is such a base;
            then it must not be an adapter itself.

    Attributes:
        path: the given path.
        config, generation: contents of config.json and generation_config.json; empty for a single file. ``config``
            omits a table ``text_config`` or ``dllm_config`` that holds only the mask's id; ``mask_id`` still reads it.

    Raises:
        FileNotFoundError: if the path does not exist or has no weights.
        Refused: for another kind of folder or file, or a damaged one. Properties and methods that read files later may
            raise it too.
    """

    folder: Path

    def __init__(self, path: Path, file: str | None = None, which: Which | None = None, hub: Hub | None = _HUB) -> None:
        if not folder_or_file(path):
            raise FileNotFoundError(f"load: there is no file or folder {path}")
        whole = path.is_dir()
        if not whole and path.suffix not in KNOWN:
            raise Refused(f"this is no file of weights; accepted: {', '.join(sorted(KNOWN))}, or a folder")
        if not whole and file is not None:
            raise Refused(f"file= chooses among the files of a folder, got {file!r} and a file")
        self.path: Path = path
        self._file = file
        self._which = which
        self._hub = hub
        self.folder = path if whole else path.parent
        if whole and file is None:
            self.folder = newest_folder(path)
        elif file is not None:
            chosen = path / inside(file, "file=")
            self.folder, self._file = (chosen, None) if chosen.is_dir() else (chosen.parent, chosen.name)
        self._folders = (self.folder, path) if whole else (self.folder,)
        self.base: Files | None = self._base() if self._is_adapter() else None
        self.config: Settings
        self.generation: Settings
        self._of_masks: list[Settings]
        if self.base is not None:
            self.config, self.generation, self._of_masks = self.base.config, self.base.generation, self.base._of_masks
            return
        said, self.generation = self._said("config.json", whole), self._said("generation_config.json", whole)
        check_settings(said)
        inner = {name: said.part(name) for name in _NESTED}
        alone = {name for name, table in inner.items() if set(table) == {"mask_token_id"}}
        self.config = Settings({key: value for key, value in said.items() if key not in alone}, said.file)
        self._of_masks = [said, *inner.values(), self.generation]

    def _said(self, name: str, whole: bool) -> Settings:
        found = (folder / name for folder in self._folders if whole and is_there(folder / name))
        return json_table(next(found, self.folder / name)) if whole else Settings({}, name)

    @cached_property
    def run(self) -> Settings:
        """The YAML configuration of a training run from the weights' folder or the folder above; empty if absent."""
        places = (folder / name for folder in self._folders for name in _HYDRA)
        found = next(filter(is_there, places), None)
        return Settings({}, "config.yaml") if found is None else yaml_table(found)

    # --- weights ------------------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> list[Path]:
        """The files that hold the weights."""
        if self.path.is_file():
            return beside(self.path)
        if self._file is not None:
            return named_parts(self.folder, self._file)
        own = [self.folder / name for name in ADAPTERS if self.base is not None and is_there(self.folder / name)]
        return own[:1] or parts(self.folder)

    @property
    def chosen(self) -> str:
        """The names of the files that hold the weights, for printing and errors."""
        top = self.path if self.path.is_dir() else self.folder
        names = [part.relative_to(top).as_posix() for part in self.parts]
        own = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return own if self.base is None else f"{own}, merged into {self.base.path}/{self.base.chosen}"

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of the first weight file if it is a safetensors file; else empty."""
        return archives.metadata(self.parts[0])

    @cached_property
    def saved(self) -> Mapping[str, Any]:
        """All contents of torch files, such as a Lightning checkpoint's hyperparameters; empty for other files."""
        return self._held if self.parts[0].suffix in TORCH else {}

    @cached_property
    def _held(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in self.parts:
            more = archives.opened(part)
            twice = next((name for name in more if name in found), None)
            if twice is not None:
                raise Refused(f"{part.name} holds {twice}, which another of its files holds too")
            found |= more
        return found

    @cached_property
    def _own(self) -> tuple[dict[str, Tensor], bool]:
        """Find the weights in the files without copying them; also return whether they are averages."""
        found, averaged = weights_of(self._held, self._which if self.base is None else None, self.chosen)
        check_tensors(found, self.chosen)
        if self.base is None and is_adapter(found):
            raise Refused(f"{self.chosen} is an adapter (LoRA), and adapter_config.json and its name do not say so")
        return found, averaged

    @property
    def averaged(self) -> bool:
        """Whether the weights are averages over training."""
        return self._own[1] if self.base is None else self.base.averaged

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name; only the headers of the files are read."""
        if self.base is not None:
            return self.base.shapes
        return {name: tuple(tensor.shape) for name, tensor in self._own[0].items()}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights, or of their averages if ``which`` says so; names lack the prefixes of wrappers."""
        own = archives.owned(self._own[0], self.parts)
        if self.base is None:
            return own
        tied = self.base.config.flag("tie_word_embeddings", default=True)
        return merged(self.base.weights, own, json_table(self.folder / "adapter_config.json"), tied)

    # --- adapters -----------------------------------------------------------------------------------------------------

    def _is_adapter(self) -> bool:
        """Return whether the checkpoint is an adapter of PEFT.

        Raises:
            Refused: if the folder holds both an adapter and whole weights, and ``file`` names neither.
        """
        if self.path.is_file() or self._file is not None:
            return Path(self._file or self.path).name in ADAPTERS
        own = [name for name in ADAPTERS if is_there(self.folder / name)]
        whole = weights_in(self.folder) if own else []
        if whole:
            raise Refused(
                f"the folder holds an adapter, {own[0]}, and whole weights, {whole[0]}; pass file= one of them"
            )
        return bool(own)

    def _base(self) -> "Files":
        """Open an adapter's base, which its configuration names.

        The name is a path relative to the adapter's folder or to the working folder, or a hub repository.
        """
        if not is_there(self.folder / "adapter_config.json"):
            raise Refused("this is an adapter, and adapter_config.json is not beside it")
        said = json_table(self.folder / "adapter_config.json")
        name = said.word("base_model_name_or_path")
        if not name:
            raise said.refused("base_model_name_or_path must name the base, got ''")
        if self._hub is None:
            raise said.refused("this adapter's base is an adapter itself; merge one of them by PEFT and save that")
        try:
            near = self.folder / name
            hub = replace(self._hub, revision=said.word("revision", default=None), file=None)
            return Files(near if folder_or_file(near) else hub.found(name), None, self._which, None)
        except FileNotFoundError as error:
            raise said.refused(
                f"base_model_name_or_path names {name!r}: {str(error).removeprefix('load: ')}"
            ) from error

    # --- tokenizer ----------------------------------------------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(*self._folders, *(self.base._folders if self.base is not None else ()))

    @property
    def tokens(self) -> dict[str, int]:
        """Ids by token from the tokenizer's files, or else from ../vocab.txt, as in ``beside``."""
        return self._tokenizer.tokens or self.beside

    @cached_property
    def beside(self) -> dict[str, int]:
        """Ids by token from ../vocab.txt; some authors keep it above several folders of weights.

        Empty if the folder has tokenizer files of its own, or if the number of lines is not ``vocab_size`` in
        config.json.
        """
        file, size = self.folder.resolve().parent / "vocab.txt", self.config.whole("vocab_size", default=None)
        if size is None or self.path.is_file() or self._tokenizer.is_there:
            return {}
        try:
            found = word_list(file)
        except Refused:  # a file outside the folder may be of any kind
            return {}
        return found if len(found) == size else {}

    @property
    def tokenizer_size(self) -> int | None:
        """One more than the tokenizer's largest id; None without a tokenizer."""
        return self._tokenizer.size or len(self.beside) or None

    def special(self, *names: str) -> tuple[int, ...]:
        """Return the sorted ids of special tokens, such as "bos_token"; omit those that the tokenizer lacks."""
        found = (self._tokenizer.special(name) for name in names)
        return tuple(sorted({self.tokens[token] for token in found if token in self.tokens}))

    # --- the mask -----------------------------------------------------------------------------------------------------

    def mask_id(self, rule: int | None, given: int | None) -> tuple[int, str]:
        """Return the mask's id and where it was found.

        config.json, generation_config.json and the tokenizer must agree if several of them have an id.

        Args:
            rule: the family's id, used if no file has one; None if the family has none.
            given: the user's id, which overrides all others; None to use the files.

        Raises:
            Refused: if the files disagree, one has an invalid id, or there is no id at all.
        """
        if given is not None:
            return given, "given"
        found = [(table.file, table.whole("mask_token_id", least=0, default=None)) for table in self._of_masks]
        found.append(("the tokenizer", next(iter(self.special("mask_token")), None)))
        said = {source: number for source, number in found if number is not None}
        if len(set(said.values())) > 1:
            told = ", ".join(f"{number} by {source}" for source, number in said.items())
            raise Refused(
                f"its files do not agree on the mask id: {told}; pass the right one, for "
                f"instance load(..., mask_id={next(iter(said.values()))})"
            )
        if said:
            return next(iter(said.values())), " and ".join(said)
        if rule is None:
            named = self._tokenizer.special("mask_token")
            lost = "" if named is None else f" (the tokenizer names {named!r}, which none of its files gives an id)"
            raise Refused(f"nothing in its files says the mask id{lost}; pass load(..., mask_id=...)")
        return rule, "the family's rule"
