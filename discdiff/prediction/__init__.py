"""What a denoiser predicts about x0, with its meaning, and the bridges that use it."""

from discdiff.prediction import bridge
from discdiff.prediction.base import Prediction, Predicts, check_predicts
from discdiff.prediction.bridge import (
    Between,
    Bridge,
    Exact,
    MaximalCoupling,
    ReMDM,
    mixture,
)
from discdiff.prediction.change import LogWeight, RowChange, Tilt
from discdiff.prediction.output import Output, unshifted
from discdiff.prediction.truncation import Truncation
from discdiff.prediction.view import View

__all__ = [
    "Between", "Bridge", "Exact", "LogWeight", "MaximalCoupling", "Output", "Prediction", "Predicts", "ReMDM",
    "RowChange", "Tilt", "Truncation", "View", "bridge", "check_predicts", "mixture", "unshifted",
]  # fmt: skip
