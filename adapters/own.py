"""Networks trained with this package: files of ``save_trained``, with a card in their metadata."""

import torch
from torch import nn

from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family, fit
from discdiff.adapters.settings import Refused
from discdiff.convention import Convention
from discdiff.models import Card, network_of, process_of

__all__ = ["OWN"]


def _build(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    if asked.mask_id is not None or asked.block is not None:
        raise Refused("the card of this file says its mask; neither that nor a block size is to be given")
    weights = {name: part.float() for name, part in files.weights.items()}
    card = Card.read(files.metadata["card"], layers=len(weights))
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
    return files.path.is_file() and "card" in files.metadata


OWN = Family("discdiff", "trained here, by discdiff.train", _has_card, _build)
