"""Two small networks, enough for the examples, and how they are kept on disk."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from discdiff.denoiser import Denoiser, TimeArgument
from discdiff.prediction import Predicts
from discdiff.process import Masked, Process, Uniform
from discdiff.schedule import Cosine, Linear

__all__ = ["Card", "Convolution", "Transformer", "load_trained", "save_trained"]

_PROCESSES: dict[str, type[Process]] = {"masked": Masked, "uniform": Uniform}


@dataclass(frozen=True)
class Card:
    """What must be known to use a set of weights; kept in the file's metadata."""

    network: Literal["transformer", "convolution"]
    process: Literal["masked", "uniform"]
    vocab_size: int
    length: int  # longest sequence
    width: int
    depth: int
    predicts: Predicts
    time: TimeArgument


class _Network(nn.Module):
    """What both networks share: the embedding of states, positions and survivals, and the way out to logits.

    Args:
        states: S, the size of its input alphabet.
        card: sizes; the output has ``card.vocab_size`` columns.
    """

    def __init__(self, states: int, card: Card) -> None:
        super().__init__()
        self.token = nn.Embedding(states, card.width)
        self.position = nn.Parameter(torch.randn(card.length, card.width) * 0.02)
        self.time = None
        if card.time is not None:
            features = nn.Linear(2 * _FREQUENCIES, card.width)
            self.time = nn.Sequential(features, nn.SiLU(), nn.Linear(card.width, card.width))
        self.body = self.build_body(card)
        self.norm = nn.LayerNorm(card.width)
        self.head = nn.Linear(card.width, card.vocab_size)

    def build_body(self, card: Card) -> nn.Module:
        """The layers between, a map (B, L, D) -> (B, L, D)."""
        raise NotImplementedError

    def forward(self, x: Int[Tensor, "B L"], alpha: Float[Tensor, "B *L"] | None) -> Float[Tensor, "B L V"]:
        length, longest = x.shape[1], len(self.position)
        if length > longest:
            raise ValueError(f"this model was trained on sequences of at most {longest} tokens, got {length}")
        h = self.token(x) + self.position[:length]
        if self.time is not None:
            if alpha is None:
                raise ValueError("this model needs a time argument")
            embedded = self.time(_features(alpha))
            h = h + (embedded[:, None] if alpha.ndim == 1 else embedded)
        return self.head(self.norm(self.body(h)))


class Transformer(_Network):
    """A bidirectional transformer; heads are 32 or so wide."""

    def build_body(self, card: Card) -> nn.Module:
        return nn.Sequential(*(_AttentionBlock(card.width, max(1, card.width // 32)) for _ in range(card.depth)))


class Convolution(_Network):
    """A residual network of 3 x 3 convolutions, for sequences that are square images row by row."""

    def build_body(self, card: Card) -> nn.Module:
        side = math.isqrt(card.length)
        if side * side != card.length:
            raise ValueError(f"a convolution reads square images, and {card.length} is not a square")
        return nn.Sequential(*(_ConvolutionBlock(card.width, side) for _ in range(card.depth)))


_FREQUENCIES = 16


def _features(alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape K"]:
    """Sines and cosines of the survival, from half a period over [0, 1] up to a few hundred."""
    angle = alpha[..., None] * (math.pi * 1.5 ** torch.arange(_FREQUENCIES, device=alpha.device))
    return torch.cat([angle.sin(), angle.cos()], -1)


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        q, k, v = self.qkv(self.norm_1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        h = h + self.out(mixed.transpose(1, 2).flatten(-2))
        return h + self.mlp(self.norm_2(h))


class _ConvolutionBlock(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, h: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        image = h.transpose(1, 2).unflatten(2, (self.side, self.side))
        return h + self.layers(image).flatten(2).transpose(1, 2)


_NETWORKS: dict[str, type[_Network]] = {"transformer": Transformer, "convolution": Convolution}


def build(card: Card) -> tuple[nn.Module, Denoiser]:
    """A network with fresh weights and the denoiser around it."""
    # The clocks differ for no reason of principle: the cosine spends more steps where little is known.
    process = _PROCESSES[card.process](card.vocab_size, Cosine() if card.process == "masked" else Linear())
    network = _NETWORKS[card.network](process.states, card)
    return network, Denoiser(network, process, card.predicts, time=card.time)


def save_trained(path: Path, network: nn.Module, card: Card) -> None:
    """Write weights as float16 safetensors with the card as metadata."""
    weights = {name: tensor.detach().half().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, path, metadata={"card": json.dumps(asdict(card))})


def load_trained(path: Path) -> Denoiser:
    """Read a file of ``save_trained``: a denoiser in float32, in evaluation mode.

    Raises:
        ValueError: if the file has no card.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "card" not in metadata:
            raise ValueError(f"{path} has no card in its metadata; it was not written by save_trained")
        card = Card(**json.loads(metadata["card"]))
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    network, model = build(card)
    network.load_state_dict(weights)
    network.eval()
    return model
