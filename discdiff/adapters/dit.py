r"""The diffusion transformer that MDLM, Duo, UDLM, SEDD, RADD, BD3LM and GIDD share; its weights have their names.

    h <- h + g_1 W_o attention(R W_qkv m_1(norm(h)))        m(h) = (1 + scale) h + shift
    h <- h + g_2 mlp(m_2(norm(h)))

The scales and shifts of m_1 and m_2 and the gates g_1 and g_2 are affine in an embedding of the time. Without a time
scales and shifts are 0 and gates are 1. R rotates queries and keys by position. Attention is torch's own:
bidirectional, or causal between blocks.

References: DiT (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748), as in SEDD (Lou et al., 2024,
https://arxiv.org/abs/2310.16834) and MDLM (Sahoo et al., 2024, https://arxiv.org/abs/2406.07524); blocks as in BD3LM
(Arriola et al., 2025, https://arxiv.org/abs/2503.09573).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DiffusionTransformer", "Ratios"]

_FREQUENCIES = 128
_ROPE = 10_000.0


class DiffusionTransformer(nn.Module):
    """Transformer whose layers are modulated by the time.

    Args:
        rows: the number of input ids and of output columns.
        width: the width of a token's vector.
        heads: the number of attention heads.
        depth: the number of layers.
        time_width: the width of the embedded time; None for a network without a time input.
        block: the block size; a site attends to its own block and the blocks before it. None for no blocks.
        norm_shift: whether norms have a shift in addition to their scale, as in RADD.
        classes: the number of class labels, as in UDLM; the empty label counts as one. Each row may get one label.
            None for a network without labels.

    Raises:
        ValueError: if ``width / heads`` is not an even whole number, or there are classes but no time.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        heads: int,
        depth: int,
        time_width: int | None,
        block: int | None = None,
        norm_shift: bool = False,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads or width // heads % 2:
            raise ValueError(f"DiffusionTransformer: {heads} heads of even width do not fit into a width of {width}")
        self.width: int = width
        self.heads: int = heads
        self.block: int | None = block
        self.vocab_embed: _Embedding = _Embedding(rows, width)
        if time_width is not None:
            self.sigma_map: _Clock = _Clock(time_width)
        if classes is not None:
            if time_width is None:
                raise ValueError("DiffusionTransformer: classes are told along with the time, and it has no time_width")
            self.cond_map: _Labels = _Labels(classes, time_width)
        self.blocks: nn.ModuleList = nn.ModuleList(_Block(width, heads, time_width, norm_shift) for _ in range(depth))
        self.output_layer: _Last = _Last(width, rows, time_width, norm_shift)

    def forward(
        self, x: Int[Tensor, "B L"], time: Float[Tensor, " B"] | None = None, label: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B L C"]:
        """Return the logits (B, L, C) of tokens (B, L) at times (B,).

        Without ``time`` a network with a time input gets time 0, as in its authors' code.

        Raises:
            ValueError: for a label given to a network without classes.
        """
        position = torch.arange(x.shape[1], device=x.device)
        seen = None if self.block is None else position // self.block <= (position // self.block)[:, None]
        told = self._told(x, time, label)
        return self.output_layer(self._hidden(x, told, position, seen), told)

    def _told(self, x: Tensor, time: Tensor | None, label: Tensor | None = None) -> Float[Tensor, "B D"] | None:
        """Return the sum of the embedded time and label; None for a network without a time input."""
        if label is not None and not hasattr(self, "cond_map"):
            raise ValueError("DiffusionTransformer: it was told a label, and has no classes")
        if not hasattr(self, "sigma_map"):
            return None
        time = torch.zeros(len(x), device=x.device) if time is None else time
        told = functional.silu(self.sigma_map(time))
        return told if label is None else told + functional.silu(self.cond_map(label))

    def _hidden(
        self,
        x: Int[Tensor, "B N"],
        told: Tensor | None,
        position: Int[Tensor, "*#batch N"],
        seen: Bool[Tensor, "*heads N M"] | None,
        kept: list[list[Tensor]] | None = None,
    ) -> Float[Tensor, "B N W"]:
        """Run all layers on tokens x and return their vectors.

        ``kept`` holds a pair of keys and values of earlier tokens for each layer; those of x are appended to it.
        """
        h = self.vocab_embed(x)
        half = torch.arange(0, self.width // self.heads, 2, device=x.device) * (self.heads / self.width)
        angle = position[..., None, :, None] * (_ROPE**-half)
        turn = torch.cat([angle.cos()] * 2, -1).to(h.dtype), torch.cat([angle.sin()] * 2, -1).to(h.dtype)
        for n, block in enumerate(self.blocks):
            h = block(h, told, turn, seen, None if kept is None else kept[n])
        return h


class Ratios(nn.Module):
    r"""SEDD's network with log ratios as output, 0 at each site's own token.

    If ``scaled`` is True, as for an absorbing graph, the network's output y(v) for token v lacks two known terms. They
    are subtracted here:

        log r(v) = y(v) - log(e^sigma - 1) - log V        V + 1 the number of output columns
    """

    def __init__(self, network: DiffusionTransformer, scaled: bool) -> None:
        super().__init__()
        self.network: DiffusionTransformer = network
        self.scaled: bool = scaled

    def forward(self, x: Int[Tensor, "B L"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B L C"]:
        """Return the log ratios (B, L, C) of tokens (B, L) at sigma (B,), 0 at each site's own token."""
        out = self.network(x, sigma)
        if self.scaled:
            out = out - (sigma.expm1().log().to(out.dtype)[:, None, None] + math.log(out.shape[-1] - 1))
        return out.scatter(-1, x[..., None], 0.0)


class _Embedding(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding: nn.Parameter = nn.Parameter(torch.zeros(rows, width))

    def forward(self, x: Int[Tensor, "B L"]) -> Tensor:
        return self.embedding[x]


class _Clock(nn.Module):
    """Embedding of the time: cosines and sines with periods from 2 pi to nearly 2e4 pi, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp: nn.Sequential = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        rate = (-math.log(1e4) / _FREQUENCIES * torch.arange(_FREQUENCIES, device=time.device)).exp()
        angle = time[:, None] * rate
        features = torch.cat([angle.cos(), angle.sin()], -1)  # in float32 for weights of any dtype
        return self.mlp(features.to(next(self.parameters()).dtype))


class _Labels(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table: nn.Embedding = nn.Embedding(classes, width)

    def forward(self, label: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        return self.embedding_table(label)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, time_width: int | None, norm_shift: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=norm_shift) for _ in range(2))
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        hidden = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.adaLN_modulation = None if time_width is None else nn.Linear(time_width, 6 * width)

    def forward(
        self,
        h: Tensor,
        told: Tensor | None,
        turn: tuple[Tensor, Tensor],
        seen: Tensor | None,
        kept: list[Tensor] | None,
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation(self.adaLN_modulation, told, 6)
        wide = self.attn_qkv(self.norm1(h) * (1 + scale_1) + shift_1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in wide.chunk(3, -1))
        q, k = _turned(q, *turn), _turned(k, *turn)
        if kept is not None:
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
            kept[:] = k, v
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = h + gate_1 * self.attn_out(attended.transpose(1, 2).flatten(2))
        return h + gate_2 * self.mlp(self.norm2(h) * (1 + scale_2) + shift_2)


class _Last(nn.Module):
    def __init__(self, width: int, rows: int, time_width: int | None, norm_shift: bool) -> None:
        super().__init__()
        self.norm_final: nn.LayerNorm = nn.LayerNorm(width, bias=norm_shift)
        self.linear: nn.Linear = nn.Linear(width, rows)
        self.adaLN_modulation: nn.Linear | None = None if time_width is None else nn.Linear(time_width, 2 * width)

    def forward(self, h: Tensor, told: Tensor | None) -> Tensor:
        shift, scale = _modulation(self.adaLN_modulation, told, 2)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


def _modulation(layer: nn.Linear | None, told: Tensor | None, parts: int) -> list[Tensor] | list[float]:
    """Return shifts, scales and gates; without a time they are 0, 0 and 1."""
    if layer is None or told is None:
        return [0.0, 0.0, 1.0] * (parts // 3) if parts > 2 else [0.0, 0.0]
    return list(layer(told)[:, None].chunk(parts, -1))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
