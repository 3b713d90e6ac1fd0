r"""ByteNet: a network of dilated convolutions along a sequence, with EvoDiff's names for its weights.

    h <- h + W_2 a(norm(conv_d(a(norm(W_1 a(norm(h)))))))        a an activation, d = 1, 2, 4, ..., 1, 2, 4, ...

References: ByteNet (Kalchbrenner et al., 2016, https://arxiv.org/abs/1610.10099), as in EvoDiff (Alamdari et al.,
2023, https://doi.org/10.1101/2023.09.11.556673).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from discdiff.adapters.settings import Refused, Settings
from discdiff.adapters.shapes import Shapes, axes, depth, matrix

__all__ = ["ByteNet", "bytenet"]


class ByteNet(nn.Module):
    """Residual network of dilated convolutions along the sequence.

    Args:
        rows: the number of input ids and of output columns.
        narrow: the width of an embedded token.
        width: the width between layers.
        inner: the width within a layer.
        depth: the number of layers.
        kernel: the width of a convolution, odd.
        period: the largest dilation, rounded down to a power of two. The layer after one
            with this dilation has dilation 1 again.
        activation: "gelu" or "relu".
        timed: whether the network takes a diffusion step k.

    Raises:
        ValueError: if ``kernel`` is even, ``narrow`` is odd, or ``activation`` is neither "gelu" nor "relu".
    """

    def __init__(
        self,
        rows: int,
        narrow: int,
        width: int,
        inner: int,
        depth: int,
        kernel: int = 5,
        period: int = 128,
        activation: str = "gelu",
        timed: bool = False,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or narrow % 2 or activation not in ("gelu", "relu"):
            raise ValueError(
                f"ByteNet: the kernel must be odd ({kernel}), the embedding even ({narrow}), and the activation gelu "
                f"or relu ({activation})"
            )
        act = nn.GELU if activation == "gelu" else nn.ReLU
        dilations = [2 ** (n % period.bit_length()) for n in range(depth)]
        self.timed = timed
        self.embedder: _Body = _Body(
            nn.Embedding(rows, narrow), [_Layer(width, inner, kernel, d, act) for d in dilations]
        )
        self.last_norm: nn.LayerNorm = nn.LayerNorm(width)
        self.decoder: _Pointwise = _Pointwise(width, rows)

    def forward(
        self,
        x: Int[Tensor, "B L"],
        step: Int[Tensor, " B"] | None = None,
        input_mask: Float[Tensor, "B L 1"] | None = None,
    ) -> Float[Tensor, "B L C"]:
        """Return the logits (B, L, C).

        Args:
            x: (B, L) tokens.
            step: (B,) the diffusion step k of each row; required if the network was made with ``timed=True``.
            input_mask: (B, L, 1) with 1 at tokens of the sequence and 0 at padding.

        Raises:
            ValueError: if the network takes a step and ``step`` is None.
        """
        if self.timed and step is None:
            raise ValueError("ByteNet: this one is told the step, one whole number a row")
        h = self.embedder(x, step if self.timed else None, input_mask)
        return self.decoder(self.last_norm(h))


class _Body(nn.Module):
    def __init__(self, embedder: nn.Embedding, layers: "list[_Layer]") -> None:
        super().__init__()
        self.embedder: nn.Embedding = embedder
        self.layers: nn.ModuleList = nn.ModuleList(layers)
        self.up_embedder: _Pointwise = _Pointwise(embedder.embedding_dim, layers[0].width)

    def forward(self, x: Tensor, step: Tensor | None, mask: Tensor | None) -> Float[Tensor, "B L D"]:
        h = self.embedder(x)
        h = h if step is None else h + _waves(step, h.shape[-1]).to(h.dtype)[:, None]
        h = self.up_embedder(h)
        for layer in self.layers:
            h = layer(h, mask)
        return h


class _Pointwise(nn.Module):
    """A linear layer, stored as a convolution of width 1."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv: nn.Conv1d = nn.Conv1d(width, out, 1)

    def forward(self, h: Float[Tensor, "B L D"]) -> Float[Tensor, "B L C"]:
        return self.conv(h.mT).mT


class _Layer(nn.Module):
    def __init__(self, width: int, inner: int, kernel: int, dilation: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.width = width
        before = nn.LayerNorm(width), act(), _Pointwise(width, inner), nn.LayerNorm(inner), act()
        self.sequence1 = nn.Sequential(*before)
        self.conv = nn.Conv1d(inner, inner, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)
        self.sequence2 = nn.Sequential(nn.LayerNorm(inner), act(), _Pointwise(inner, width))

    def forward(self, h: Float[Tensor, "B L D"], mask: Float[Tensor, "B L 1"] | None) -> Float[Tensor, "B L D"]:
        inside = self.sequence1(h)
        inside = inside if mask is None else inside * mask
        return h + self.sequence2(self.conv(inside.mT).mT)


def _waves(step: Int[Tensor, " B"], width: int) -> Float[Tensor, "B D"]:
    """Return sin(k w_0), cos(k w_0), sin(k w_1), ... for steps k, with w_j = 10^(-8 j / D)."""
    angle = step[:, None] * torch.exp(torch.arange(0, width, 2, device=step.device) * (-math.log(1e4) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def bytenet(shapes: Shapes, config: Settings, timed: bool) -> ByteNet:
    """Make a ``ByteNet`` whose weights have the given shapes.

    Args:
        shapes: the shapes by the weights' names, without the files' prefix "module.".
        config: the authors' configuration, possibly empty. It gives ``r``, the largest dilation, and ``activation``,
            which the shapes do not show. Both published configurations have r = 128 and gelu.
        timed: whether the network takes a step.

    Raises:
        Refused: if the weights or the configuration are those of another network.
    """
    rows, narrow = matrix(shapes, "embedder.embedder.weight")
    inner, width, _ = axes(shapes, "embedder.layers.0.sequence1.2.conv.weight", 3)
    kernel = axes(shapes, "embedder.layers.0.conv.weight", 3)[-1]
    layers = depth(shapes, "embedder.layers.")
    if config.flag("causal", default=False):
        raise config.refused("causal must be false: this network sees both sides")
    told = config.whole("n_layers", default=layers)
    if told != layers:
        raise config.refused(f"n_layers says {told}, and the weights have {layers}")
    usual = "relu" if "n_layers" in config else "gelu"
    activation = config.word("activation", accepted=("gelu", "relu"), default=usual)
    period = config.whole("r", least=1, most=1 << 16, default=128)
    try:
        return ByteNet(rows, narrow, width, inner, layers, kernel, period, activation, timed)
    except ValueError as error:
        raise Refused(str(error)) from error
