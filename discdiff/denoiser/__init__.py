"""Denoisers: networks together with the way they are called, contexts, and conditions."""

from discdiff.denoiser.base import (
    Counter,
    Denoiser,
    TimeArgument,
    check_denoiser,
    frozen_time,
)
from discdiff.denoiser.conditions import (
    Alphabets,
    Among,
    conditional,
    conditioned,
    marginal,
)
from discdiff.denoiser.context import (
    Along,
    AtOnce,
    Behind,
    Cached,
    Context,
    Growing,
    Kept,
    RowCache,
    Shown,
    clean_states,
)
from discdiff.denoiser.dropout import (
    device_of,
    warn_of_dropout,
)

__all__ = [
    "Along",
    "Alphabets",
    "Among",
    "AtOnce",
    "Behind",
    "Cached",
    "Context",
    "Counter",
    "Denoiser",
    "Growing",
    "Kept",
    "RowCache",
    "Shown",
    "TimeArgument",
    "check_denoiser",
    "clean_states",
    "conditional",
    "conditioned",
    "device_of",
    "frozen_time",
    "marginal",
    "warn_of_dropout",
]
