"""Predictors and correctors: one operator in each file."""

from discdiff.checks import renamed
from discdiff.samplers.adaptive import Adaptive
from discdiff.samplers.ancestral import Ancestral
from discdiff.samplers.anchored_remask import AnchoredRemask
from discdiff.samplers.any_order import AnyOrder
from discdiff.samplers.arpc import ARPC
from discdiff.samplers.dfm import DFM
from discdiff.samplers.entropy_bounded import EntropyBounded
from discdiff.samplers.entropy_redraw import EntropyRedraw
from discdiff.samplers.euler import Euler
from discdiff.samplers.first_hitting import FirstHitting
from discdiff.samplers.forward_backward import ForwardBackward, TauForwardBackward
from discdiff.samplers.gibbs import Gibbs
from discdiff.samplers.gillespie import Gillespie
from discdiff.samplers.greedy import Greedy
from discdiff.samplers.informed_gibbs import InformedGibbs
from discdiff.samplers.kl_stable import KLStable
from discdiff.samplers.locally_balanced import LocallyBalanced, TauLocallyBalanced
from discdiff.samplers.maximal_coupling import MaximalCoupling
from discdiff.samplers.multistep import Multistep
from discdiff.samplers.p2 import P2
from discdiff.samplers.remdm import Remask, ReMDM
from discdiff.samplers.renoising import Renoising
from discdiff.samplers.repaint import RePaint
from discdiff.samplers.reveal import Reveal
from discdiff.samplers.split_leap import SplitLeap
from discdiff.samplers.tau_leaping import TauLeaping
from discdiff.samplers.theta import ThetaRK2, ThetaTrapezoidal
from discdiff.samplers.thinning import Thinning
from discdiff.samplers.threshold import Threshold
from discdiff.samplers.uniformization import Uniformization
from discdiff.samplers.unmask import Unmask

__all__ = [
    "ARPC", "DFM", "P2", "Adaptive", "Ancestral", "AnchoredRemask", "AnyOrder", "EntropyBounded", "EntropyRedraw",
    "Euler", "FirstHitting", "ForwardBackward", "Gibbs", "Gillespie", "Greedy", "InformedGibbs", "KLStable",
    "LocallyBalanced", "MaximalCoupling", "Multistep", "ReMDM", "RePaint", "Remask", "Renoising", "Reveal", "SplitLeap",
    "TauForwardBackward", "TauLeaping", "TauLocallyBalanced", "ThetaRK2", "ThetaTrapezoidal", "Thinning", "Threshold",
    "Uniformization", "Unmask",
]  # fmt: skip


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Raise AttributeError; if the name was changed, the message gives the new name."""
    now = {"Cycle": "RePaint", "Coloured": "EntropyRedraw", "ancestral_gibbs": "Ancestral() >> Gibbs() ** n"}
    raise renamed("discdiff.samplers", name, now, __all__)
