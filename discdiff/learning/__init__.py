"""Training: a loop with exact checkpoints, and losses for networks that need fewer calls or learn from rewards."""

from discdiff.learning.consistency import Consistency, bridge_paths
from discdiff.learning.likelihoods import one_step_log_prob, path_kl
from discdiff.learning.objectives import StagedLoss
from discdiff.learning.policy import PolicyGradient
from discdiff.learning.reflowing import Pairs, Reflow, reflow
from discdiff.learning.trainer import Trainer

__all__ = [
    "Consistency", "Pairs", "PolicyGradient", "Reflow", "StagedLoss", "Trainer", "bridge_paths", "one_step_log_prob",
    "path_kl", "reflow",
]  # fmt: skip
