"""The networks behind a denoiser's function: where they lie, and whether they drop units at random."""

import functools
import inspect
import itertools
import warnings
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["device_of", "warn_of_dropout"]

_DEPTH = 4  # among a model's function and guides, a wrapper around a method of an object that holds the network
_MANY = 64  # a longer list is data, and holds no networks


def warn_of_dropout(fn: object, stacklevel: int) -> None:
    """Warn once if a network that ``fn`` is, holds or refers to is in training mode and has dropout.

    Args:
        fn: a denoiser's function.
        stacklevel: as of ``warnings.warn``, counted from the caller.
    """
    name = next(itertools.chain.from_iterable(_dropping(network) for network in _networks(fn, _DEPTH)), None)
    if name is not None:
        warnings.warn(
            f"the denoiser's network is in training mode and {name} drops units at random, which no seed here fixes; "
            "call network.eval() before sampling",
            stacklevel=stacklevel + 1,
        )


def device_of(fn: object) -> torch.device:
    """The device of the first parameter or buffer of a network that ``fn`` is, holds or refers to; else the CPU."""
    for network in _networks(fn, _DEPTH):
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            return tensor.device
    return torch.device("cpu")


def _networks(holder: object, depth: int) -> Iterator[nn.Module]:
    """The networks that a function is, is bound to, keeps as an attribute, or names in its text."""
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
        yield from vars(holder).values()  # what functools.wraps wrapped
    elif isinstance(holder, functools.partial):
        yield from (holder.func, *holder.args, *holder.keywords.values())
    elif isinstance(holder, tuple | list | dict):
        yield from itertools.islice(holder.values() if isinstance(holder, dict) else holder, _MANY)
    elif hasattr(holder, "__dict__") and not inspect.ismodule(holder) and not isinstance(holder, type):
        yield from vars(holder).values()


def _dropping(network: nn.Module) -> Iterator[str]:
    """The modules of a network that drop units now, by name and kind."""
    for name, module in network.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
        own = getattr(module, "dropout", 0.0)  # attention and recurrent layers keep the rate itself
        rate = own if isinstance(own, float) and not rate else rate
        if module.training and rate > 0:
            yield f"{type(module).__name__} {name!r}" if name else type(module).__name__
