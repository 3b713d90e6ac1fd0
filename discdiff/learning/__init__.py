"""Training: a loop with exact checkpoints, and losses for networks that need fewer calls or learn from rewards."""

from discdiff.learning.consistency import Consistency, bridge_paths
from discdiff.learning.reflowing import Pairs, Reflow, reflow
from discdiff.learning.trainer import Trainer

__all__ = ["Consistency", "Pairs", "Reflow", "Trainer", "bridge_paths", "reflow"]
