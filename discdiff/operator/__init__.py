"""The program of one step: states, the run that carries random choices out, and the algebra of operators."""

from discdiff.operator.algebra import (
    Corrector,
    Invariance,
    Mix,
    Operator,
    Predictor,
    Repeat,
    Staged,
    Then,
    When,
    check_operator,
    mix,
)
from discdiff.operator.carried import Asked, Calls, loaded, of_run, unloaded, watched
from discdiff.operator.choosing import choose
from discdiff.operator.conditions import Between, after, before, between, when
from discdiff.operator.guiding import GuideAt, guided_alone
from discdiff.operator.pyro_sites import alone, listening, under, while_listening
from discdiff.operator.rest import Reads, applied, check_reads, rests
from discdiff.operator.run import SLOTS, At, Given, Run, stream
from discdiff.operator.state import State

__all__ = [
    "SLOTS", "Asked", "At", "Between", "Calls", "Corrector", "Given", "GuideAt", "Invariance", "Mix", "Operator",
    "Predictor", "Reads", "Repeat", "Run", "Staged", "State", "Then", "When", "after", "alone", "applied", "before",
    "between", "check_operator", "check_reads", "choose", "guided_alone", "listening", "loaded", "mix", "of_run",
    "rests", "stream", "under", "unloaded", "watched", "when", "while_listening",
]  # fmt: skip
