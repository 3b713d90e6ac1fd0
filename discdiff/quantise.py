r"""Denoisers with 8-bit weights and unquantised time modules; and the activations of a denoiser by noise level.

    W ~ s_i round(W_ij / s_i),  s_i = max_j |W_ij| / 127

Only weights are rounded, with one scale a row; products use the dtype of the input, so nothing depends on the batch.
(torch.ao's eager quantisation is deprecated in torch 2.13, and its successor is a separate package tied to torch's
version.) Modules that see only the time are few and affect every output, so they are not quantised. Their outputs are
cached, because a sampler calls them with the times of its grid again and again.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from discdiff.checks import listing, real
from discdiff.checks import whole as whole_number
from discdiff.convention import Called
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.diagnose import noised

__all__ = ["Int8Linear", "Remembered", "features", "quantised", "time_module"]

_TIME = ("time", "sigma_map", "adaLN_modulation")
_REMEMBERED = 4096


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored as int8 (out, in) with a float scale for every row."""

    def __init__(self, layer: nn.Linear, levels: int = 127) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0])
        self.bias = layer.bias

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N C"]:
        """Apply the layer to the last axis, (*N, D) to (*N, C)."""
        assert isinstance(self.weight, Tensor)
        assert isinstance(self.scale, Tensor)
        out = functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias


class Remembered(nn.Module):
    """A module of one small tensor, such as a time, with a cache of its outputs by input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.known: dict[tuple[object, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output; small inputs and outputs are remembered while no gradient is recorded."""
        if torch.is_grad_enabled() or x.numel() > _REMEMBERED:
            return self.module(x)
        key = (tuple(x.shape), x.dtype, x.device, *x.flatten().tolist())
        if key not in self.known:
            if len(self.known) >= _REMEMBERED:
                self.known.clear()
            self.known[key] = self.module(x)
        return self.known[key]


def time_module(name: str) -> bool:
    """Whether a module sees only the time, judged by the usual names of such modules."""
    return any(part in _TIME for part in name.split("."))


def quantised(model: Denoiser, whole: Callable[[str], bool] = time_module, levels: int = 127) -> Denoiser:
    """Return the same denoiser with int8 weights; the given one is not changed.

    Args:
        model: a denoiser whose function is an ``nn.Module``.
        whole: tells by name which linear layers are not quantised.
        levels: the number of levels on either side of 0, at most 127.

    Raises:
        TypeError: if the function is not a module.
        ValueError: if there is no layer to quantise, or levels are out of range.
    """
    levels = whole_number(levels, "quantised: levels", 1, 127)
    check_denoiser(model, "quantised")
    if not isinstance(model.fn, nn.Module):
        raise TypeError(f"quantised: the denoiser's function must be an nn.Module, got {type(model.fn).__name__}")
    network = copy.deepcopy(model.fn)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {name: layer for name, layer in layers.items() if name and not whole(name)}
    if not chosen:
        raise ValueError(f"quantised: none of the {len(layers)} linear layers may be quantised")
    for name, layer in chosen.items():
        network.set_submodule(name, Int8Linear(layer, levels))
    clocks = [name for name, _ in network.named_modules() if name.split(".")[-1] in _TIME[:2]]
    for name in clocks:
        clock = network.get_submodule(name)
        if any(True for _ in clock.parameters()):
            network.set_submodule(name, Remembered(clock))
    return model.calling(network)


@torch.no_grad()
def features(
    model: Denoiser, x0: Int[Tensor, "B L"], alphas: Sequence[float], modules: Sequence[str], seed: int = 0
) -> dict[str, Tensor]:
    """Return the outputs of chosen modules of a denoiser on data at several noise levels.

    Args:
        model: a denoiser whose function is an ``nn.Module``.
        x0: (B, L) data.
        alphas: survival probabilities in (0, 1].
        modules: names of modules, as in ``named_modules``; each must return a tensor, or a tuple that begins with one.
        seed: the seed of the noise.

    Returns:
        For each module its output, (A, ...) with a level for each alpha.

    Raises:
        TypeError: if the function is not a module, or a module returns no tensor.
        ValueError: for unknown names, or survival probabilities out of range.
    """
    check_denoiser(model, "features")
    if not isinstance(model.fn, nn.Module):
        raise TypeError(f"features: the denoiser's function must be an nn.Module, got {type(model.fn).__name__}")
    known = dict((model.fn.network if isinstance(model.fn, Called) else model.fn).named_modules())
    missing = [name for name in modules if name not in known]
    if missing:
        raise ValueError(f"features: there is no module {missing[0]!r}; some there are: {', '.join(list(known)[1:9])}")
    alphas = [real(alpha, "features: alphas", "(0, 1]") for alpha in listing(alphas, "features: alphas")]
    if not alphas:
        raise ValueError("features: alphas must lie in (0, 1], got none")
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def listener(name: str) -> Callable[[nn.Module, object, object], None]:
        def listen(module: nn.Module, arguments: object, out: object) -> None:
            out = out[0] if isinstance(out, tuple) else out  # layers of transformers return hidden states first
            if not isinstance(out, Tensor):
                raise TypeError(f"features: {name} gives a {type(out).__name__}, not a tensor")
            found[name].append(out.detach())

        return listen

    hooks = [known[name].register_forward_hook(listener(name)) for name in modules]
    try:
        for alpha in alphas:
            t = float(model.process.schedule.time(torch.tensor(alpha, dtype=torch.float64)))
            x = noised(model.process, x0, t, seed)
            before = {name: len(parts) for name, parts in found.items()}
            model(x, t)
            for name, parts in found.items():
                if len(parts) != before[name] + 1:
                    raise ValueError(f"features: {name} runs {len(parts) - before[name]} times a call, not once")
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}
