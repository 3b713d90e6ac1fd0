r"""Load MD4's text networks from the arrays of its JAX training code.

    h <- h + g_1 W_o attention(R W_q m_1(norm(h)), ...)        m(h) = (1 + scale) h + shift
    h <- h + g_2 W_2 (a(W_1 m_2(norm(h))) * W_3 m_2(norm(h)))

R rotates by position, and a is the activation of the gate. The scales and shifts of m_1 and m_2 and the gates g_1 and
g_2 are affine in a(embedded time). A network without a time has scaled root-mean-square norms instead. The time t is
that of the schedule with which the network was trained, for instance alpha = 1 - t. The authors keep t between 1e-4 and
1 - 1e-4.

An array is named by its path in the tree of parameters; "/" or "." separates the parts of the path. In the authors'
environment, save the arrays by

    flat = flax.traverse_util.flatten_dict({"ema_params": state.ema_params}, sep="/")
    numpy.savez("md4.npz", **flat)

The arrays do not show every setting. To give the others, put a config.json (``config.to_json_best_effort()``) into the
same folder. The defaults are ``mlp_type`` glu and ``noise_schedule`` linear. The default width of a head is that of the
embedded time. Without a time it is that of the outer embeddings, and without those 64.

Reference: Simplified and Generalized Masked Diffusion for Discrete Data (Shi et al., 2024,
https://arxiv.org/abs/2406.04329).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from discdiff.adapters.convention import Convention
from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family, fit
from discdiff.adapters.settings import Refused, Settings
from discdiff.adapters.shapes import depth, matrix
from discdiff.checks import shown
from discdiff.process import FromFunction, Linear, Masked, Polynomial, Schedule

__all__ = ["MD4", "GatedTransformer", "LateCosine", "torch_names"]

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "swiglu": functional.silu,
    "geglu": lambda h: functional.gelu(h, approximate="tanh"),
}
_ROPE, _EPS, _HEAD = 10_000.0, 1e-5, 64
_NAMES = (
    (r"CondEmbedding_0/dense0", "time.0"),
    (r"CondEmbedding_0/Dense_0", "time.2"),
    (r"Embed_0", "outside"),
    (r"Transformer_0/Embed_0", "inside"),
    (r"Transformer_0/TransformerBlock_(\d+)/attention/(w[qkvo])", r"blocks.\1.\2"),
    (r"Transformer_0/TransformerBlock_(\d+)/feed_forward/(w[123])", r"blocks.\1.\2"),
    (r"Transformer_0/TransformerBlock_(\d+)/Dense_0", r"blocks.\1.adaLN_modulation"),
    (r"Transformer_0/TransformerBlock_(\d+)/RMSNorm_0", r"blocks.\1.before"),
    (r"Transformer_0/TransformerBlock_(\d+)/RMSNorm_1", r"blocks.\1.middle"),
    (r"Transformer_0/RMSNorm_0", "norm"),
)
_PARTS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class GatedTransformer(nn.Module):
    """Transformer with gated layers, modulated by the time.

    Args:
        states: the number of input ids; the last is the mask.
        width: the width of a token's vector.
        head: the width of one attention head.
        hidden: the width of the gated layers.
        depth: the number of layers.
        time_width: the width of the embedded time; None for a network without a time input.
        outside: the width of the embeddings, which a layer maps to ``width``; None for embeddings of ``width``.
        gate: "glu", "swiglu" or "geglu".

    Raises:
        ValueError: for another gate, or if ``head`` is odd or does not divide ``width``.
    """

    def __init__(
        self,
        states: int,
        width: int,
        head: int,
        hidden: int,
        depth: int,
        time_width: int | None,
        outside: int | None,
        gate: str = "glu",
    ) -> None:
        super().__init__()
        if gate not in _GATES or width % head or head % 2:
            raise ValueError(
                f"GatedTransformer: the gate must be one of {', '.join(_GATES)}, and heads of even width fit into the "
                f"width; got {gate!r}, {head} and {width}"
            )
        self.head_width: int = head
        self.time_width: int | None = time_width
        self.gate_name: str = gate
        self.gate: Callable[[Tensor], Tensor] = _GATES[gate]
        if time_width is not None:
            wide = nn.Linear(time_width, 4 * time_width)
            self.time: nn.Sequential = nn.Sequential(wide, nn.SiLU(), nn.Linear(4 * time_width, time_width))
        if outside is not None:
            self.outside: nn.Embedding = nn.Embedding(states, outside)
        self.inside: nn.Embedding | nn.Linear = (
            nn.Embedding(states, width) if outside is None else nn.Linear(outside, width)
        )
        self.blocks: nn.ModuleList = nn.ModuleList(_Block(width, hidden, time_width) for _ in range(depth))
        self.norm: nn.RMSNorm | None = None if time_width is not None else nn.RMSNorm(width, eps=_EPS)
        self.adaLN_modulation: nn.Linear | None = None if time_width is None else nn.Linear(time_width, 2 * width)
        self.head: nn.Linear = nn.Linear(width, states - 1, bias=False)

    def forward(self, x: Int[Tensor, "B L"], time: Float[Tensor, " B"] | None = None) -> Float[Tensor, "B L V"]:
        """Return the logits (B, L, V) of all ids but the mask, for tokens (B, L) at times (B,).

        Raises:
            ValueError: if the network takes a time and none is given.
        """
        told = None
        if self.time_width is not None:
            if time is None:
                raise ValueError("GatedTransformer: this one is told the time")
            waves = _waves(1000 * time, self.time_width)
            told = self.gate(self.time(waves.to(self.head.weight.dtype)))
        h = self.inside(self.outside(x) if hasattr(self, "outside") else x)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * _ROPE ** (
            -torch.arange(0, self.head_width, 2, device=x.device) / self.head_width
        )
        turn = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
        for block in self.blocks:
            h = block(h, told, turn, self.gate)
        if self.adaLN_modulation is None or told is None:
            assert self.norm is not None
            return self.head(self.norm(h))
        shift, scale = self.adaLN_modulation(told)[:, None].chunk(2, -1)
        return self.head(_normed(h) * (1 + scale) + shift)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, time_width: int | None) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)
        if time_width is None:
            self.before, self.middle = (nn.RMSNorm(width, eps=_EPS) for _ in range(2))
        else:
            self.adaLN_modulation = nn.Linear(time_width, 6 * width)

    def forward(
        self, h: Tensor, told: Tensor | None, turn: tuple[Tensor, Tensor], gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if told is None:
            h = h + self._attended(self.before(h), turn)
            return h + self._gated(self.middle(h), gate)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(told)[:, None].chunk(6, -1)
        h = h + gate_1 * self._attended(_normed(h) * (1 + scale_1) + shift_1, turn)
        return h + gate_2 * self._gated(_normed(h) * (1 + scale_2) + shift_2, gate)

    def _attended(self, h: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        width = 2 * turn[0].shape[-1]
        q, k, v = (layer(h).unflatten(-1, (-1, width)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        attended = functional.scaled_dot_product_attention(_turned(q, *turn), _turned(k, *turn), v)
        return self.wo(attended.transpose(1, 2).flatten(2))

    def _gated(self, h: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        return self.w2(gate(self.w1(h)) * self.w3(h))


def _normed(h: Tensor) -> Tensor:
    return functional.layer_norm(h, h.shape[-1:], eps=_EPS)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of neighbours: (x_0, x_1), (x_2, x_3), ..."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _waves(time: Float[Tensor, " B"], width: int) -> Float[Tensor, "B D"]:
    """Return the sines, then the cosines, of the time multiplied by frequencies from 1 down to 1e-4."""
    half = width // 2
    angle = time.float()[:, None] * torch.exp(torch.arange(half, device=time.device) * (-math.log(1e4) / (half - 1)))
    return functional.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, width % 2))


# --- files ----------------------------------------------------------------------------------------------------------


def torch_names(arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return MD4's arrays by the names of this module's network, and whether they are moving averages.

    The moving averages of the weights are taken if there are any, else the weights.

    Raises:
        ValueError: for an array that MD4's text networks do not have, or a kernel that is not a matrix.
    """
    paths = {name.replace(".", "/").removesuffix("/value"): part for name, part in arrays.items()}
    average, raw = (
        {n: p for n, p in paths.items() if re.match(rf"(.*/)?{key}/", n)} for key in ("ema_params", "params")
    )
    inner = {name.rpartition("classifier/")[2]: part for name, part in (average or raw or paths).items()}
    outside, told = ("Embed_0/embedding" in inner), any(name.startswith("CondEmbedding_0") for name in inner)
    ends = [*["inside"] * outside, *["adaLN_modulation"] * told, "head"]  # layers of one kind are numbered in order
    rules = (*_NAMES, *((f"Transformer_0/Dense_{n}", name) for n, name in enumerate(ends)))
    found, unknown = dict[str, Tensor](), []
    for name, part in inner.items():
        module, _, kind = name.rpartition("/")
        here = next((re.sub(rule, new, module) for rule, new in rules if re.fullmatch(rule, module)), None)
        if here is None or kind not in _PARTS:
            unknown.append(name)
        else:
            if kind == "kernel" and part.ndim != 2:
                raise Refused(f"{name} must be a matrix, got shape {tuple(part.shape)}")
            found[f"{here}.{_PARTS[kind]}"] = part.T.contiguous() if kind == "kernel" else part
    if unknown:
        raise Refused(
            f"{len(unknown)} arrays are not of MD4's text network, such as {', '.join(sorted(unknown)[:3])}; its "
            "image networks, classes and learned schedules are not read"
        )
    return found, bool(average)


def _build(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    weights, ema = torch_names(files.weights)
    shape = {name: tuple(part.shape) for name, part in weights.items()}
    config = files.config
    vocab_size, width = matrix(shape, "head.weight")
    hidden, _ = matrix(shape, "blocks.0.w1.weight")
    clock = matrix(shape, "time.2.weight", least=4)[0] if "time.2.weight" in shape else None
    outside = matrix(shape, "outside.weight")[1] if "outside.weight" in shape else None
    head = config.whole("feature_dim", least=2, most=width, default=clock or outside or _HEAD)
    _check_other(config, width // head if width % head == 0 else None, clock)
    own = _clock(config)
    if asked.mask_id not in (None, vocab_size):
        raise Refused(f"MD4's mask is the id after the last, {vocab_size}; got mask_id={asked.mask_id}")
    if asked.block is not None:
        raise Refused("MD4 is not in blocks, so block= is not to be given; sample it with Blockwise")
    if clock is not None and asked.schedule is not None:
        raise Refused("this network is told t of its own clock; use load(...).with_schedule(schedule)")
    gate = config.word("mlp_type", accepted=_GATES, default="glu")
    try:
        with torch.device("meta"):
            layers = depth(shape, "blocks.")
            network = GatedTransformer(vocab_size + 1, width, head, hidden, layers, clock, outside, gate)
    except ValueError as error:
        raise error if isinstance(error, Refused) else Refused(str(error)) from error
    fit(network, weights, files)
    return network, Convention(
        "MD4",
        Masked(vocab_size, asked.schedule or own),
        "denoiser",
        vocab_size,
        "the family's rule: the id after the last",
        time=None if clock is None else "t",
        ids="",
        clock="",
        weights="ema" if ema else "raw",
    )


def _check_other(config: Settings, heads: int | None, clock: int | None) -> None:
    """Raise ``Refused`` if the configuration is that of a different network."""
    told = config.whole("num_heads", default=heads)
    if told != heads:
        raise config.refused(f"num_heads says {told}, and feature_dim and the weights make {heads}")
    if config.whole("n_kv_heads", default=told) != told:
        raise config.refused("n_kv_heads must be num_heads")
    features = config.word("time_features", accepted=("t", "none"), default=None)
    if features is not None and (features == "none") != (clock is None):
        raise config.refused(
            f"time_features says {features!r}, and the weights {'know no time' if clock is None else 'do'}"
        )
    config.word("noise_schedule_type", accepted=("scalar",), default=None)


@dataclass(frozen=True)
class LateCosine:
    """MD4's cosine schedule, alpha(t) = 1 - cos(pi (1 - t) / 2)."""

    def __call__(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))


def _clock(config: Settings) -> Schedule:
    name = config.word("noise_schedule", default="linear")
    if name == "linear":
        return Linear()
    if name == "cosine":
        return FromFunction(LateCosine())
    power = re.fullmatch(r"poly([0-9]{1,3}(?:\.[0-9]{1,6})?)", name)
    if power is not None and float(power[1]) > 0:
        return Polynomial(float(power[1]))
    raise config.refused(f"the noise schedule {shown(name)} is not known; accepted: linear, cosine, poly2 and the like")


def _recognises(files: Files) -> bool:
    said = files.path.suffix == ".npz" or files.config.get("model_type") == "md4"
    return said and any("TransformerBlock_0" in name for name in files.shapes)


MD4 = Family("MD4", "MD4, masked diffusion, from its arrays (Shi et al., 2024)", _recognises, _build)
