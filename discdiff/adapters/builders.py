"""Describe this package's networks by name and arguments, and build them from such descriptions.

A file names one of the classes listed here and gives its arguments; it cannot name any other code. Types and sizes of
the arguments are checked.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

from torch import nn

from discdiff.adapters.block_dit import BlockTransformer, CausalBlockTransformer
from discdiff.adapters.byte_net import ByteNet
from discdiff.adapters.dit import DiffusionTransformer, Ratios
from discdiff.adapters.evodiff import Squared
from discdiff.adapters.md4 import GatedTransformer
from discdiff.adapters.record import known
from discdiff.adapters.settings import Settings
from discdiff.demo.models import Card, Convolution
from discdiff.demo.transformer import Transformer

__all__ = ["built", "described_network"]

_WIDEST = 1 << 24  # most of any size argument, as even the meta device counts the bytes


@dataclass(frozen=True)
class _Builder:
    """How to describe and build the networks of a class.

    Attributes:
        cls: the class.
        arguments: returns the arguments that a network was made from.
        inner: the class of the network that it wraps; None if it wraps none.
        card: whether its constructor takes a ``Card``, made from the arguments.
    """

    cls: type[nn.Module]
    arguments: Callable[[Any], dict[str, object]]
    inner: type[nn.Module] | None = None
    card: bool = False


def described_network(network: nn.Module) -> dict[str, object] | None:
    """Return a network of this package as a table that JSON can hold; return None for any other network."""
    name = next((name for name, one in _BUILDERS.items() if type(network) is one.cls), None)
    if name is None:
        return None
    builder, said = _BUILDERS[name], dict[str, object]()
    for key, value in builder.arguments(network).items():
        said[key] = described_network(value) if isinstance(value, nn.Module) else value
        if builder.inner is not None and isinstance(value, nn.Module) and not isinstance(value, builder.inner):
            return None
    return {"builder": name, "arguments": said}


def built(settings: Settings, layers: int, of: type[nn.Module] = nn.Module) -> nn.Module:
    """Build a network from a table of ``described_network``, with initial weights on torch's default device.

    Args:
        settings: the table.
        layers: the largest accepted depth. For settings from a file of weights this is the number of tensors in the
            file, as each layer has at least one tensor.
        of: the network's class must be a subclass of this one.

    Raises:
        Refused: for an unknown class, or arguments that the class does not accept.
    """
    builder = _BUILDERS[settings.word("builder", accepted=[n for n, b in _BUILDERS.items() if issubclass(b.cls, of)])]
    known(settings, {"builder", "arguments"})
    given = settings.part("arguments")
    hints = get_type_hints(Card if builder.card else builder.cls.__init__)
    hints.pop("return", None)
    known(given, set(hints))
    arguments = {name: _argument(given, name, hint, layers, builder.inner) for name, hint in hints.items()}
    try:
        return Convolution(Card(**arguments)) if builder.card else builder.cls(**arguments)
    except ValueError as error:
        raise given.refused(str(error)) from error


def _argument(settings: Settings, name: str, hint: Any, layers: int, inner: type[nn.Module] | None) -> Any:  # noqa: ANN401
    """Read an argument with the getter for the type that the class declares."""
    if isinstance(hint, type) and issubclass(hint, nn.Module):
        return built(settings.part(name), layers, inner or hint)
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if type(None) in kinds and settings.get(name) is None:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        return settings.flag(name)
    if kind is int:
        return settings.whole(name, least=0 if name == "blank" else 1, most=layers if name == "depth" else _WIDEST)
    return settings.word(name, accepted=[word for part in kinds for word in get_args(part)])


def _diffusion(network: DiffusionTransformer) -> dict[str, object]:
    rows, width = network.vocab_embed.embedding.shape
    told: Any = getattr(network, "sigma_map", None)
    clock = None if told is None else told.mlp[2].out_features
    return {"rows": rows, "width": width, "heads": network.heads, "depth": len(network.blocks), "time_width": clock}


def _whole(network: DiffusionTransformer) -> dict[str, object]:
    classes = network.cond_map.embedding_table.num_embeddings if hasattr(network, "cond_map") else None
    shifted = network.output_layer.norm_final.bias is not None
    return _diffusion(network) | {"block": network.block, "norm_shift": shifted, "classes": classes}


def _gated(network: GatedTransformer) -> dict[str, object]:
    first: Any = network.blocks[0]
    outside = network.outside.embedding_dim if hasattr(network, "outside") else None
    return {
        "states": network.head.out_features + 1, "width": network.head.in_features, "head": network.head_width,
        "hidden": first.w1.out_features, "depth": len(network.blocks), "time_width": network.time_width,
        "outside": outside, "gate": network.gate_name,
    }  # fmt: skip


def _convolved(network: ByteNet) -> dict[str, object]:
    layers: Any = network.embedder.layers
    first = layers[0]
    return {
        "rows": network.decoder.conv.out_channels, "narrow": network.embedder.embedder.embedding_dim,
        "width": first.width, "inner": first.conv.out_channels, "depth": len(layers),
        "kernel": first.conv.kernel_size[0], "period": max(layer.conv.dilation[0] for layer in layers),
        "activation": "gelu" if isinstance(first.sequence1[1], nn.GELU) else "relu", "timed": network.timed,
    }  # fmt: skip


def _blockwise(network: Transformer) -> dict[str, object]:
    return {
        "vocab_size": network.head.out_features, "states": network.token.num_embeddings,
        "width": network.token.embedding_dim, "depth": len(network.layers), "sees_alpha": network.time is not None,
    }  # fmt: skip


_BUILDERS: dict[str, _Builder] = {
    "DiffusionTransformer": _Builder(DiffusionTransformer, _whole),
    "BlockTransformer": _Builder(BlockTransformer, lambda network: _diffusion(network) | {"clean": network.clean}),
    "CausalBlockTransformer": _Builder(
        CausalBlockTransformer, lambda network: _diffusion(network) | {"blank": network.blank}
    ),
    "Ratios": _Builder(
        Ratios, lambda network: {"network": network.network, "scaled": network.scaled}, DiffusionTransformer
    ),
    "Squared": _Builder(Squared, lambda network: {"network": network.network}, ByteNet),
    "GatedTransformer": _Builder(GatedTransformer, _gated),
    "ByteNet": _Builder(ByteNet, _convolved),
    "Transformer": _Builder(Transformer, _blockwise),
    "Convolution": _Builder(Convolution, lambda network: asdict(network.card), card=True),
}
