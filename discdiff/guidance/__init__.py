"""Guides: changes of a model's predictions that compose with every operator."""

from discdiff.guidance.allowed import Allow, Forbid
from discdiff.guidance.cfg import ClassifierFree, classifier_free

__all__ = ["Allow", "ClassifierFree", "Forbid", "classifier_free"]
