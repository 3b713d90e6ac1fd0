"""Compute exact laws on small vocabularies, and give exact denoisers without training (oracles).

No formula of an operator is repeated here: its exact law comes from an enumeration of its own program.
"""

from discdiff.theory import fit
from discdiff.theory.chain import HMM, ConstrainedChain, MarkovChain
from discdiff.theory.consistency import path_residual
from discdiff.theory.divergence import entropy, kl, tv
from discdiff.theory.end_law import law
from discdiff.theory.exact import kernel
from discdiff.theory.group_orders import total_correlation
from discdiff.theory.judge_operator import check_operator
from discdiff.theory.judge_process import check_process
from discdiff.theory.likelihood import bound
from discdiff.theory.mixture import ProductMixture
from discdiff.theory.oracles import Oracle
from discdiff.theory.pairing import coupling
from discdiff.theory.particle_runs import evidence
from discdiff.theory.report import Check, Report
from discdiff.theory.reversal import model_generator, reverse_generator, reverse_law
from discdiff.theory.slope import order
from discdiff.theory.tilt import Automaton, Tilt
from discdiff.theory.tree import Tree
from discdiff.theory.weighted import WeightedChain
from discdiff.theory.world import Coupling, Enumeration

__all__ = [
    "HMM", "Automaton", "Check", "ConstrainedChain", "Coupling", "Enumeration", "MarkovChain", "Oracle",
    "ProductMixture", "Report", "Tilt", "Tree", "WeightedChain", "bound", "check_operator", "check_process",
    "coupling", "entropy", "evidence", "fit", "kernel", "kl", "law", "model_generator", "order", "path_residual",
    "reverse_generator", "reverse_law", "total_correlation", "tv",
]  # fmt: skip


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted(__all__)
