"""Discrete diffusion by composition: processes, denoisers and operators, checked against exact laws.

Process -> Denoiser -> Prediction -> Operator -> Sampler -> Samples
"""

from importlib import import_module
from typing import TYPE_CHECKING

from discdiff import kernels, losses, samplers
from discdiff.checks import renamed
from discdiff.choices import Coins, PointMixture, Ranking, Subset, Tokens
from discdiff.denoiser import Denoiser, Guide
from discdiff.guidance import (
    APS,
    Allow,
    ClassifierFree,
    Constraint,
    Doob,
    Forbid,
    GaussianNoise,
    LevelNoise,
    MeanField,
    Measurement,
    Reward,
    classifier_free,
    variational_posterior,
)
from discdiff.kernels import dispatch
from discdiff.operator import (
    At,
    Corrector,
    Operator,
    Predictor,
    State,
    after,
    alone,
    before,
    between,
    choose,
    mix,
    when,
)
from discdiff.prediction import Prediction, Truncation, bridge
from discdiff.process import (
    AbsorbingUniform,
    Cosine,
    General,
    Geometric,
    Hybrid,
    Interpolant,
    Linear,
    LogLinear,
    Marginal,
    Masked,
    Ordinal,
    PerSite,
    Polynomial,
    Process,
    RankOne,
    Schedule,
    Sigmoid,
    TimeVarying,
    Uniform,
    grid,
)
from discdiff.sampling import (
    Blockwise,
    Cascade,
    Particles,
    Plan,
    Sampler,
    Samples,
    SplitGibbs,
    Step,
    best_of,
    predictor_corrector,
    program,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from discdiff import learning, plans, plots, theory
    from discdiff.adapters import diagnostics
    from discdiff.adapters.convention import Convention
    from discdiff.adapters.generation import generate
    from discdiff.adapters.int8 import quantize
    from discdiff.adapters.loading import load
    from discdiff.adapters.probing import probe
    from discdiff.learning import Trainer

# kernels/ has no __init__.py of its own: as a folder on the path it would hide a package that transformers imports.
for _name in dispatch.__all__:
    setattr(kernels, _name, getattr(dispatch, _name))

# What is above the sampler is imported when it is used: theory takes scipy, adapters read files.
_LAZY = {
    "Convention": "adapters.convention",
    "Trainer": "learning",
    "generate": "adapters.generation",
    "load": "adapters.loading",
    "probe": "adapters.probing",
    "quantize": "adapters.int8",
}
_LAZY_ROOMS = {room: room for room in ("adapters", "demo", "learning", "plans", "plots", "theory")} | {
    "diagnostics": "adapters.diagnostics"
}
_RENAMED = {
    "Alphabets": "model.guided(dd.Allow(mask))",
    "conditional": "Denoiser.condition(x0, moving)",
    "conditioned": "Denoiser.with_condition(condition)",
    "marginal": "Denoiser.marginal(moving)",
    "cycle_residual": "discdiff.diagnostics.cycle_residual",
    "features": "discdiff.diagnostics.features",
    "loo_sensitivity": "discdiff.diagnostics.loo_sensitivity",
    "sensitivity_curve": "discdiff.diagnostics.sensitivity_curve",
    "quantised": "discdiff.quantize",
    "BlockSamples": "discdiff.sampling.BlockSamples",
    "Loaded": "discdiff.adapters.Loaded",
}

__all__ = [
    "APS", "AbsorbingUniform", "Allow", "At", "Blockwise", "Cascade", "ClassifierFree", "Coins", "Constraint",
    "Convention", "Corrector", "Cosine", "Denoiser", "Doob", "Forbid", "GaussianNoise", "General", "Geometric",
    "Guide", "Hybrid", "Interpolant", "LevelNoise", "Linear", "LogLinear", "Marginal", "Masked", "MeanField",
    "Measurement", "Operator", "Ordinal", "Particles", "PerSite", "Plan", "PointMixture", "Polynomial",
    "Prediction", "Predictor", "Process", "RankOne", "Ranking", "Reward", "Sampler", "Samples", "Schedule",
    "Sigmoid", "SplitGibbs", "State", "Step", "Subset", "TimeVarying", "Tokens", "Trainer", "Truncation", "Uniform",
    "after", "alone", "before", "best_of", "between", "bridge", "choose", "classifier_free", "diagnostics", "generate",
    "grid", "kernels", "learning", "load", "losses", "mix", "plans", "plots", "predictor_corrector", "probe",
    "program", "quantize", "samplers", "theory", "variational_posterior", "when",
]  # fmt: skip


def __dir__() -> list[str]:
    """List the names for tab completion."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Import a public name of the rooms above ``sampling`` when it is first used."""
    if name in _LAZY:
        value = getattr(import_module(f"discdiff.{_LAZY[name]}"), name)
    elif name in _LAZY_ROOMS:
        value = import_module(f"discdiff.{_LAZY_ROOMS[name]}")
    else:
        elsewhere = [f"discdiff.samplers.{one}" for one in samplers.__all__]
        raise renamed("discdiff", name, _RENAMED, [*__all__, *elsewhere])
    globals()[name] = value
    return value
