"""Find the networks behind a denoiser's function: their device, and whether they are in training mode with dropout."""

import functools
import inspect
import itertools
import warnings
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["device_of", "warn_of_dropout"]

_DEPTH = 4  # attributes to follow: function or guide, wrapper, method, object that holds the network
_MANY = 64  # longer lists are taken for data and not searched


def warn_of_dropout(fn: object, stacklevel: int) -> None:
    """Warn once if ``fn`` is, holds or refers to a network in training mode with dropout.

    Args:
        fn: a denoiser's function.
        stacklevel: as in ``warnings.warn``, counted from the caller.
    """
    name = next(itertools.chain.from_iterable(_dropping(network) for network in _networks(fn, _DEPTH)), None)
    if name is not None:
        warnings.warn(
            f"the denoiser's network is in training mode and {name} drops units at random, which no seed here fixes; "
            "call network.eval() before sampling",
            stacklevel=stacklevel + 1,
        )


def device_of(fn: object) -> torch.device:
    """Return the device of the first network that ``fn`` is, holds or refers to, or the CPU if it has none."""
    for network in _networks(fn, _DEPTH):
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            return tensor.device
    return torch.device("cpu")


def _networks(holder: object, depth: int) -> Iterator[nn.Module]:
    """Yield the networks found in an object: itself, its attributes, or the variables that a function uses."""
    if isinstance(holder, nn.Module):
        yield holder
    elif depth > 0:
        for inner in _held(holder):
            yield from _networks(inner, depth - 1)


def _held(holder: object) -> Iterator[object]:
    if inspect.ismethod(holder):
        yield holder.__self__
    elif inspect.isfunction(holder):
        named = inspect.getclosurevars(holder)
        yield from named.nonlocals.values()
        yield from (value for value in named.globals.values() if isinstance(value, nn.Module))
        yield from vars(holder).values()  # the function wrapped by functools.wraps
    elif isinstance(holder, functools.partial):
        yield from (holder.func, *holder.args, *holder.keywords.values())
    elif isinstance(holder, tuple | list | dict):
        yield from itertools.islice(holder.values() if isinstance(holder, dict) else holder, _MANY)
    elif hasattr(holder, "__dict__") and not inspect.ismodule(holder) and not isinstance(holder, type):
        yield from vars(holder).values()


def _dropping(network: nn.Module) -> Iterator[str]:
    """Yield name and kind of the modules of a network whose dropout is active."""
    for name, module in network.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
        own = getattr(module, "dropout", 0.0)  # attention and recurrent layers store the rate
        rate = own if isinstance(own, float) and not rate else rate
        if module.training and rate > 0:
            yield f"{type(module).__name__} {name!r}" if name else type(module).__name__
