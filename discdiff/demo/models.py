"""Build the small networks of the examples, and save their weights."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from discdiff.demo.transformer import FREQUENCIES, Transformer, survival_features
from discdiff.denoiser import Denoiser, TimeArgument
from discdiff.prediction import Predicts
from discdiff.process import AbsorbingUniform, Cosine, Linear, Masked, Process, Uniform

__all__ = ["PROCESSES", "Card", "Convolution", "build", "network_of", "process_of", "save_trained"]

# The cosine schedule reveals few tokens a step at first. On a uniform process an early wrong token can be corrected.
PROCESSES: dict[str, Callable[[int], Process]] = {
    "masked": lambda size: Masked(size, Cosine()),
    "uniform": lambda size: Uniform(size, Linear()),
    "absorbing": lambda size: AbsorbingUniform(size, Linear()),
}


@dataclass(frozen=True)
class Card:
    """Description of a network, its process and its prediction; stored with the weights, as metadata of their file."""

    shape: Literal["image", "sequence", "blocks"]  # blocks: a transformer
    process: Literal["masked", "uniform", "absorbing"]
    vocab_size: int
    length: int  # the longest sequence
    width: int
    depth: int
    predicts: Predicts
    time: TimeArgument


class Convolution(nn.Module):
    """Residual convolutional network over states: width 3 and dilated on a sequence, 3 x 3 on an image.

    It suits small data sets and CPUs, because it need not learn that neighbouring tokens matter most.

    On an ``AbsorbingUniform`` process each state is a pair of tokens (z, u). The network embeds both tokens and
    whether they are equal.

    Args:
        card: sizes; the output has ``card.vocab_size`` columns.

    Raises:
        ValueError: for an image that is not square. A call raises it for a sequence of the wrong length, or if alpha is
            needed and missing.
    """

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card: Card = card
        self.vocab_size: int = card.vocab_size
        self.side: int | None = math.isqrt(card.length) if card.shape == "image" else None
        if self.side is not None and self.side**2 != card.length:
            raise ValueError(f"an image must be square, and {card.length} is not a square")
        self.token: nn.Embedding = nn.Embedding(card.vocab_size + (card.process == "masked"), card.width)
        self.source: nn.Embedding | None = (
            nn.Embedding(card.vocab_size, card.width) if card.process == "absorbing" else None
        )
        self.hidden: nn.Parameter | None = (
            nn.Parameter(torch.zeros(card.width)) if card.process == "absorbing" else None
        )
        self.position: nn.Parameter = nn.Parameter(torch.randn(card.length, card.width) * 0.02)
        self.time: nn.Sequential | None = None
        if card.time is not None:
            features = nn.Linear(2 * FREQUENCIES, card.width)
            self.time = nn.Sequential(features, nn.SiLU(), nn.Linear(card.width, card.width))
        self.blocks: nn.ModuleList = nn.ModuleList(
            _Block(card.width, self.side is not None, 2 ** (n % 5)) for n in range(card.depth)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(card.width)
        self.head: nn.Linear = nn.Linear(card.width, card.vocab_size)

    def forward(self, x: Int[Tensor, "B L"], alpha: Float[Tensor, "B *L"] | None = None) -> Float[Tensor, "B L V"]:
        """Return the logits (B, L, V) of states (B, L) at alpha (B,) or (B, L).

        Raises:
            ValueError: for a sequence of the wrong length, or if alpha is needed and missing.
        """
        length, longest = x.shape[1], len(self.position)
        if length > longest or (self.side is not None and length != longest):
            limit = "at most" if self.side is None else "exactly"
            raise ValueError(f"this model was trained on sequences of {limit} {longest} tokens, got {length}")
        h = self._embedded(x) + self.position[:length]
        if self.time is not None:
            if alpha is None:
                raise ValueError("this model needs a time argument")
            embedded = self.time(survival_features(alpha))
            h = h + (embedded[:, None] if alpha.ndim == 1 else embedded)
        h = h.transpose(1, 2)
        if self.side is not None:
            h = h.unflatten(2, (self.side, self.side))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h.flatten(2).transpose(1, 2)))

    def _embedded(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        if self.source is None or self.hidden is None:
            return self.token(x)
        z, u = x.div(self.vocab_size, rounding_mode="floor"), x % self.vocab_size
        return self.token(z) + self.source(u) + (z == u)[..., None] * self.hidden


class _Block(nn.Module):
    def __init__(self, width: int, image: bool, dilation: int) -> None:
        super().__init__()
        first: nn.Module
        second: nn.Module
        if image:
            first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        else:
            first = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
            second = nn.Conv1d(width, width, 3, padding=1)
        self.layers = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), first, nn.GroupNorm(8, width), nn.SiLU(), second)

    def forward(self, h: Float[Tensor, "B D *space"]) -> Float[Tensor, "B D *space"]:
        return h + self.layers(h)


def process_of(card: Card) -> Process:
    """Return the process that a card names."""
    return PROCESSES[card.process](card.vocab_size)


def network_of(card: Card) -> nn.Module:
    """Make the network of a card with fresh weights."""
    if card.shape != "blocks":
        return Convolution(card)
    states = {"masked": card.vocab_size + 1, "uniform": card.vocab_size, "absorbing": card.vocab_size**2}[card.process]
    return Transformer(card.vocab_size, states, card.width, card.depth, sees_alpha=card.time is not None)


def build(card: Card) -> tuple[nn.Module, Denoiser]:
    """Make the network of a card with fresh weights, and its denoiser."""
    network = network_of(card)
    return network, Denoiser(network, process_of(card), card.predicts, time=card.time)


def save_trained(
    path: Path,
    network: nn.Module,
    card: Card,
    dtype: torch.dtype = torch.float16,
    characters: str | None = None,
) -> None:
    """Write weights as safetensors, with the card as metadata, and with the character of each id if ids stand for text.

    The file is written completely or not at all.
    """
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"card": json.dumps(asdict(card))} | ({} if characters is None else {"characters": characters})
    beside = path.with_name(f".{path.name}.new")
    save_file(weights, beside, metadata)
    beside.replace(path)
