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
    when,
)
from discdiff.operator.carried import Asked, Calls, loaded, of_run, unloaded, watched
from discdiff.operator.rest import Reads, applied, check_reads, rests
from discdiff.operator.run import SLOTS, At, Given, Run, alone, choose, listening, stream, under, while_listening
from discdiff.operator.state import State

__all__ = [
    "SLOTS", "Asked", "At", "Calls", "Corrector", "Given", "Invariance", "Mix", "Operator", "Predictor", "Reads",
    "Repeat", "Run", "Staged", "State", "Then", "When", "alone", "applied", "check_operator", "check_reads", "choose",
    "listening", "loaded", "mix", "of_run", "rests", "stream", "under", "unloaded", "watched", "when",
    "while_listening",
]  # fmt: skip
