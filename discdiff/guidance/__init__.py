"""Guides: changes of a model's predictions that compose with every operator."""

from discdiff.guidance.allowed import Allow, Forbid
from discdiff.guidance.aps import APS
from discdiff.guidance.cfg import ClassifierFree, classifier_free
from discdiff.guidance.constraint import Constraint
from discdiff.guidance.doob import Doob
from discdiff.guidance.mean_field import MeanField
from discdiff.guidance.measurement import GaussianNoise, LevelNoise, Measurement
from discdiff.guidance.reward import Reward
from discdiff.guidance.variational import MeanFieldPosterior, variational_posterior

__all__ = [
    "APS", "Allow", "ClassifierFree", "Constraint", "Doob", "Forbid", "GaussianNoise", "LevelNoise", "MeanField",
    "MeanFieldPosterior", "Measurement", "Reward", "classifier_free", "variational_posterior",
]  # fmt: skip
