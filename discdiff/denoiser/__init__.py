"""Denoisers: networks together with the way they are called, contexts, and conditions."""

from discdiff.denoiser.base import Denoiser, check_denoiser
from discdiff.denoiser.call import Call, TimeArgument, clean_states, frozen_time
from discdiff.denoiser.conditions import Along, HeldSites
from discdiff.denoiser.context import AtOnce, Behind, Cached, CachedPrefix, Context, Growing, RowCache, ShownPrefix
from discdiff.denoiser.counter import Answers, Counter, Tally
from discdiff.denoiser.dropout import device_of, warn_of_dropout
from discdiff.denoiser.guide import Change, Guide, WhenGuide, acting_at, check_guide, drawing

__all__ = [
    "Along", "Answers", "AtOnce", "Behind", "Cached", "CachedPrefix", "Call", "Change", "Context", "Counter",
    "Denoiser", "Growing", "Guide", "HeldSites", "RowCache", "ShownPrefix", "Tally", "TimeArgument", "WhenGuide",
    "acting_at", "check_denoiser", "check_guide", "clean_states", "device_of", "drawing", "frozen_time",
    "warn_of_dropout",
]  # fmt: skip
