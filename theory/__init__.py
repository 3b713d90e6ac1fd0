"""The judge: exact laws on small vocabularies, and oracles that are perfect denoisers without training.

Nothing here knows an operator's formula. It is handed the operator and enumerates the operator's own program.
"""

from discdiff.theory.chain import MarkovChain
from discdiff.theory.divergence import entropy, kl, tv
from discdiff.theory.enumeration import Enumeration
from discdiff.theory.oracle import Oracle
from discdiff.theory.order import order
from discdiff.theory.program import kernel, law

__all__ = ["Enumeration", "MarkovChain", "Oracle", "entropy", "kernel", "kl", "law", "order", "tv"]
