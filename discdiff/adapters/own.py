"""Load networks that were trained with this package, from files that ``save_trained`` wrote.

The metadata of such a file hold a card: a description of the network, its process and its prediction.
"""

from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from discdiff.adapters.convention import Convention
from discdiff.adapters.documents import is_there, json_text
from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family, fit
from discdiff.adapters.settings import Refused
from discdiff.demo.models import PROCESSES, Card, network_of, process_of
from discdiff.denoiser import Denoiser
from discdiff.prediction import Predicts

__all__ = ["OWN", "load_trained", "load_written"]

_LARGEST = 1 << 24
_MODEL = "model.safetensors"  # in a folder of ``discdiff train``


def _build(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    if asked.mask_id is not None or asked.block is not None:
        raise Refused("the card of this file says its mask; neither that nor a block size is to be given")
    weights = {name: part.float() for name, part in files.weights.items()}
    card = _card(files.metadata["card"], len(weights))
    with torch.device("meta"):
        network = network_of(card)
    fit(network, weights, files)
    process = process_of(card) if asked.schedule is None else process_of(card).with_schedule(asked.schedule)
    said = Convention(
        "discdiff", process, card.predicts, card.vocab_size, time=card.time, scalar_time=False, ids="", clock="",
        mask_source="the card" if process.mask_id is not None else "none needed",
    )  # fmt: skip
    return network, said


def _has_card(files: Files) -> bool:
    return (files.path.is_file() or is_there(files.path / _MODEL)) and "card" in files.metadata


OWN = Family("discdiff", "trained by discdiff train, or by discdiff.demo.training", _has_card, _build)


def _card(text: str, layers: int) -> Card:
    """Read a card from the JSON of a file's metadata.

    Args:
        text: the JSON text.
        layers: the number of weights in the file, which is the largest accepted depth.

    Raises:
        ValueError: if the text is not a card, or sizes are out of range.
    """
    said = json_text(text, "the card")
    strange = said.keys() - {one.name for one in fields(Card)}
    if strange:
        raise said.refused(f"{sorted(strange)[0]} is not known")
    card = Card(
        shape=said.word("shape", accepted=("image", "sequence", "blocks")),  # type: ignore[arg-type]
        process=said.word("process", accepted=PROCESSES),  # type: ignore[arg-type]
        vocab_size=said.whole("vocab_size", least=2, most=_LARGEST),
        length=said.whole("length", least=1, most=_LARGEST),
        width=said.whole("width", least=1, most=_LARGEST),
        depth=said.whole("depth", least=1, most=layers),
        predicts=said.word("predicts", accepted=get_args(Predicts)),  # type: ignore[arg-type]
        time=said.word("time", accepted=("t", "sigma", "alpha"), default=None),  # type: ignore[arg-type]
    )
    try:
        with torch.device("meta"):
            network_of(card)
    except (ValueError, RuntimeError) as error:  # for instance a width that layers cannot divide
        raise Refused(f"the card says no network: {error}") from error
    return card


def load_trained(path: Path) -> Denoiser:
    """Read a file that ``save_trained`` wrote; return its denoiser, in float32 and evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as ``load_written``.
    """
    return load_written(path)[0]


def load_written(path: Path) -> tuple[Denoiser, Card, str | None]:
    """Read a file that ``save_trained`` wrote; return its denoiser, its card and the character of each id.

    The denoiser is in float32 and evaluation mode. The characters are None if the ids do not stand for text.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not in safetensors format, its metadata hold no description of a network (a card), or
            its weights do not fit that network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file of weights: {error}") from error
    if "card" not in metadata:
        raise ValueError(f"{path} has no card in its metadata; it was not written by save_trained")
    try:
        card = _card(metadata["card"], len(weights))
        with torch.device("meta"):
            network = network_of(card)
        network.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its card and its weights are not of a network of save_trained: {error}") from error
    characters = metadata.get("characters")
    if characters is not None and len(characters) != card.vocab_size:
        raise ValueError(f"{path} has {len(characters)} characters, and its network {card.vocab_size} tokens")
    return Denoiser(network.eval(), process_of(card), card.predicts, time=card.time), card, characters
