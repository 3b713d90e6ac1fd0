"""Let Pyro's handlers see the choices of a run, one run at a time."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from pyro.contrib.autoname import scope

from discdiff.checks import decided

__all__ = ["alone", "listening", "under", "while_listening"]

P = ParamSpec("P")
R = TypeVar("R")
_ONE, _listener = threading.RLock(), threading.local()


def alone() -> contextlib.AbstractContextManager[object]:
    """Hold the lock of listening runs and enumerations, so that other threads wait before they start one.

    Pyro's handlers must be installed before the run. If several threads listen, each must install its handlers within
    this block:

        with dd.alone():
            trace = poutine.trace(lambda: sampler.sample(4, listen=True)).get_trace()
    """
    return _ONE


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let Pyro's handlers see the choices in this block; first wait until no other thread is in such a block.

    Raises:
        RuntimeError: if the thread is inside such a block already.
    """
    if getattr(_listener, "busy", False):
        raise RuntimeError(
            "a run with listen=True, or an enumeration, was started inside another one of the same thread; "
            "Pyro's handlers are shared, so only one listens at a time: run the inner one deaf, or after it"
        )
    with _ONE:
        _listener.busy = True
        try:
            yield
        finally:
            _listener.busy = False


def while_listening(
    held: Callable[[], contextlib.AbstractContextManager[object]],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator for sampling functions; a call with ``listen=True`` then runs inside ``held()``.

    ``held`` is ``listening`` or ``alone``. A call without ``listen=True`` runs under ``torch.no_grad()`` instead.
    """

    def decorate(sample: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(sample)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with held() if decided(kwargs.get("listen", False), "sample: listen") else torch.no_grad():
                return sample(*args, **kwargs)

        return inside

    return decorate


@contextlib.contextmanager
def under(name: str, listen: bool) -> Iterator[None]:
    """Prefix the names of Pyro sites with "name/" if ``listen``, so that names from several runs in one call differ."""
    with scope(prefix=name) if listen else contextlib.nullcontext():
        yield
