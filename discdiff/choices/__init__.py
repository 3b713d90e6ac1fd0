"""Distributions over tokens, coins and sites: what can be chosen at random, and its law."""

from discdiff.choices.ancestors import SCHEMES, Ancestors, Scheme
from discdiff.choices.choice import Choice, Key, Repeated
from discdiff.choices.covering import uncovered
from discdiff.choices.distributions import Branch, Coins, Noise, Other, PointMixture, SiteWise, Tokens
from discdiff.choices.draws import Draws
from discdiff.choices.faults import AT_ONCE, BAD_LOGITS, Watch
from discdiff.choices.recorded import INTEGERS, Choices, narrowest, step_of
from discdiff.choices.sites import Sites, spread
from discdiff.choices.where import Ranking, Subset, Waiting

__all__ = [
    "AT_ONCE", "BAD_LOGITS", "INTEGERS", "SCHEMES", "Ancestors", "Branch", "Choice", "Choices", "Coins", "Draws", "Key",
    "Noise", "Other", "PointMixture", "Ranking", "Repeated", "Scheme", "SiteWise", "Sites", "Subset", "Tokens",
    "Waiting", "Watch", "narrowest", "spread", "step_of", "uncovered",
]  # fmt: skip
