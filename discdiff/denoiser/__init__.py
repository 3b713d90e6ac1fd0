"""Denoisers: networks together with the way they are called, contexts, and conditions."""

from discdiff.denoiser.alphabets import Alphabets
from discdiff.denoiser.base import Denoiser, check_denoiser
from discdiff.denoiser.call import Call, TimeArgument, clean_states, frozen_time
from discdiff.denoiser.conditions import Along, HeldSites
from discdiff.denoiser.context import AtOnce, Behind, Cached, CachedPrefix, Context, Growing, RowCache, ShownPrefix
from discdiff.denoiser.counter import Counter
from discdiff.denoiser.dropout import device_of, warn_of_dropout

__all__ = [
    "Along", "Alphabets", "AtOnce", "Behind", "Cached", "CachedPrefix", "Call", "Context", "Counter", "Denoiser",
    "Growing", "HeldSites", "RowCache", "ShownPrefix", "TimeArgument", "check_denoiser", "clean_states", "device_of",
    "frozen_time", "warn_of_dropout",
]  # fmt: skip
