"""The verbs: one operator a file."""

from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.gibbs import Gibbs

__all__ = ["Ancestral", "Gibbs"]
