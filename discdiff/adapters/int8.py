r"""Quantize the weights of denoisers to 8 bits, except those of modules that get only the time.

    W_ij ~ s_i round(W_ij / s_i),  s_i = max_j |W_ij| / 127

Only weights are rounded, with one scale s_i for each row i. Products use the dtype of the input, so the output for a
sequence does not depend on the rest of its batch. (torch.ao's eager quantization is deprecated in torch 2.13, and its
successor is a separate package tied to torch's version.) Modules that get only the time are few and affect every
output, so they are not quantized. Their outputs are cached, because a sampler calls them with the times of its grid
again and again.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from discdiff.checks import whole as whole_number
from discdiff.denoiser import Denoiser, check_denoiser

__all__ = ["Int8Linear", "Remembered", "quantize", "time_module"]

_TIME = ("time", "sigma_map", "adaLN_modulation")
_REMEMBERED = 4096


class Int8Linear(nn.Module):
    """Linear layer whose weight is stored as int8, (out, in), with a floating-point scale for every row."""

    def __init__(self, layer: nn.Linear, levels: int = 127) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0])
        self.bias: nn.Parameter = layer.bias

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N C"]:
        """Apply the layer to the last axis, (*N, D) to (*N, C)."""
        assert isinstance(self.weight, Tensor)
        assert isinstance(self.scale, Tensor)
        out = functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias


class Remembered(nn.Module):
    """Wrapper of a module with one tensor as input, such as a time; it caches outputs by input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.known: dict[tuple[object, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output; cache it if x has at most 4096 numbers and no gradient is recorded."""
        if torch.is_grad_enabled() or x.numel() > _REMEMBERED:
            return self.module(x)
        key = (tuple(x.shape), x.dtype, x.device, *x.flatten().tolist())
        if key not in self.known:
            if len(self.known) >= _REMEMBERED:
                self.known.clear()
            self.known[key] = self.module(x)
        return self.known[key]


def time_module(name: str) -> bool:
    """Return whether a module gets only the time, judged by the usual names of such modules."""
    return any(part in _TIME for part in name.split("."))


def quantize(model: Denoiser, whole: Callable[[str], bool] = time_module, levels: int = 127) -> Denoiser:
    """Return a copy of a denoiser with int8 weights; the given denoiser is not changed.

    Args:
        model: a denoiser whose function is an ``nn.Module``.
        whole: takes the name of a linear layer; returns True if the layer is not to be quantized.
        levels: the number of integers on either side of 0 to which weights are rounded, from 1 to 127.

    Raises:
        TypeError: if the denoiser's function is not a module.
        ValueError: if there is no layer to quantize, or ``levels`` is not from 1 to 127.
    """
    levels = whole_number(levels, "quantize: levels", 1, 127)
    check_denoiser(model, "quantize")
    if not isinstance(model.fn, nn.Module):
        raise TypeError(f"quantize: the denoiser's function must be an nn.Module, got {type(model.fn).__name__}")
    network = copy.deepcopy(model.fn)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {name: layer for name, layer in layers.items() if name and not whole(name)}
    if not chosen:
        raise ValueError(f"quantize: none of the {len(layers)} linear layers may be quantized")
    for name, layer in chosen.items():
        network.set_submodule(name, Int8Linear(layer, levels))
    clocks = [name for name, _ in network.named_modules() if name.split(".")[-1] in _TIME[:2]]
    for name in clocks:
        clock = network.get_submodule(name)
        if any(True for _ in clock.parameters()):
            network.set_submodule(name, Remembered(clock))
    return model.calling(network)
