"""Forward processes q_t(x_t | x_0): schedules, time grids, and the laws of noise."""

from discdiff.process import grid
from discdiff.process.base import LARGEST, Process, require_process
from discdiff.process.constant import Marginal, Masked, Uniform
from discdiff.process.general import General, Ordinal, TimeVarying, check_generator, stationary
from discdiff.process.grid import LONGEST, by_alpha, by_cosine, by_log_noise, by_time, listed
from discdiff.process.hybrid import Blend, Hybrid
from discdiff.process.interpolant import AbsorbingUniform, Interpolant
from discdiff.process.noising import noise, noised
from discdiff.process.rank_one import Exit, RankOne
from discdiff.process.schedule import (
    Cosine,
    FromFunction,
    Geometric,
    Linear,
    LogLinear,
    Moment,
    PerSite,
    Polynomial,
    Schedule,
    Sigmoid,
    Time,
    as_schedule,
    learned,
    site_time,
)
from discdiff.process.survivals import Survival, refuse_impossible, survival

__all__ = [
    "LARGEST", "LONGEST", "AbsorbingUniform", "Blend", "Cosine", "Exit", "FromFunction", "General", "Geometric",
    "Hybrid", "Interpolant", "Linear", "LogLinear", "Marginal", "Masked", "Moment", "Ordinal", "PerSite", "Polynomial",
    "Process", "RankOne", "Schedule", "Sigmoid", "Survival", "Time", "TimeVarying", "Uniform", "as_schedule",
    "by_alpha", "by_cosine", "by_log_noise", "by_time", "check_generator", "grid", "learned", "listed", "noise",
    "noised", "refuse_impossible", "require_process", "site_time", "stationary", "survival",
]  # fmt: skip
