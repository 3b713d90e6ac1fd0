"""Discrete diffusion by composition: processes, denoisers and operators, checked against exact laws.

Process -> Denoiser -> Prediction -> Operator -> Sampler -> Samples
"""

from discdiff import bridge, grid, losses, samplers, theory
from discdiff.adapters.generation import generate
from discdiff.adapters.loading import load
from discdiff.blockwise import BlockSamples, Blockwise
from discdiff.budget import predictor_corrector
from discdiff.cascade import Cascade
from discdiff.conditions import Alphabets, conditional, conditioned, marginal
from discdiff.convention import Convention, Loaded
from discdiff.denoiser import Denoiser
from discdiff.diagnose import cycle_residual, loo_sensitivity, sensitivity_curve
from discdiff.general import General, Ordinal, TimeVarying
from discdiff.handlers import At, alone, choose
from discdiff.hybrid import Hybrid
from discdiff.interpolant import AbsorbingUniform, Interpolant
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Corrector, Operator, Predictor, mix, when
from discdiff.prediction import Prediction
from discdiff.probe import probe
from discdiff.process import Process
from discdiff.program import program
from discdiff.quantise import features, quantised
from discdiff.rank_one import Marginal, Masked, RankOne, Uniform
from discdiff.sampler import Sampler
from discdiff.samples import Samples
from discdiff.schedule import Cosine, Geometric, Linear, LogLinear, PerSite, Polynomial, Schedule, Sigmoid
from discdiff.state import State
from discdiff.truncation import Truncation

__version__ = "0.1.0"

__all__ = [
    "AbsorbingUniform",
    "Alphabets",
    "At",
    "BlockSamples",
    "Blockwise",
    "Cascade",
    "Convention",
    "Corrector",
    "Cosine",
    "Denoiser",
    "General",
    "Geometric",
    "Hybrid",
    "Interpolant",
    "Linear",
    "Loaded",
    "LogLinear",
    "Marginal",
    "Masked",
    "Operator",
    "Ordinal",
    "PerSite",
    "Polynomial",
    "Prediction",
    "Predictor",
    "Process",
    "RankOne",
    "Sampler",
    "Samples",
    "Schedule",
    "Sigmoid",
    "State",
    "TimeVarying",
    "Truncation",
    "Uniform",
    "alone",
    "bridge",
    "choose",
    "conditional",
    "conditioned",
    "cycle_residual",
    "features",
    "generate",
    "grid",
    "kernels",
    "load",
    "loo_sensitivity",
    "losses",
    "marginal",
    "mix",
    "predictor_corrector",
    "probe",
    "program",
    "quantised",
    "samplers",
    "sensitivity_curve",
    "theory",
    "when",
]


def __dir__() -> list[str]:
    """List the names for tab completion."""
    return sorted(__all__)
