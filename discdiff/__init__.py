"""Discrete diffusion by composition: processes, denoisers and operators that are checked against exact answers.

Process -> Denoiser -> Prediction -> Operator -> Sampler -> Samples
"""

from discdiff import samplers, theory
from discdiff.denoiser import Denoiser
from discdiff.handlers import At, choose
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Corrector, Operator, Predictor, mix, when
from discdiff.prediction import Prediction
from discdiff.process import Masked, Process, Uniform
from discdiff.sampler import Sampler, Samples
from discdiff.schedule import Cosine, Linear, LogLinear, Schedule
from discdiff.state import State

__version__ = "0.1.0"

__all__ = [
    "At",
    "Corrector",
    "Cosine",
    "Denoiser",
    "Linear",
    "LogLinear",
    "Masked",
    "Operator",
    "Prediction",
    "Predictor",
    "Process",
    "Sampler",
    "Samples",
    "Schedule",
    "State",
    "Uniform",
    "choose",
    "kernels",
    "mix",
    "samplers",
    "theory",
    "when",
]
