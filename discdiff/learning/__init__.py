"""Training: a loop over batches with averaged weights, and checkpoints from which a killed run goes on exactly."""

from discdiff.learning.trainer import Trainer

__all__ = ["Trainer"]
