"""Small worlds with rewards, and guides by their exact h, for the tests of Doob's transform and of rewards."""

import numpy as np
import torch
from torch import Tensor

import discdiff as dd
from discdiff import theory as T
from discdiff.theory.world import all_states

__all__ = ["FIVE", "LINEAR", "MASKED", "RATES", "UNIFORM", "V", "apart", "doob", "log_w", "reached", "world"]

LINEAR, V = dd.Linear(), 3
RATES = torch.tensor([[-0.9, 0.2, 0.7], [0.5, -1.0, 0.5], [0.1, 0.9, -1.0]], dtype=torch.float64)
MASKED, UNIFORM = dd.Masked(V, LINEAR), dd.Uniform(V, LINEAR)
FIVE = [
    MASKED,
    UNIFORM,
    dd.Marginal(torch.tensor([0.5, 0.3, 0.2]), LINEAR),
    dd.Hybrid(V, LINEAR, p_uniform=0.4),
    dd.Ordinal(V, LINEAR),
]


def world(length: int = 2) -> T.Enumeration:
    p0 = 0.05 / V**length + 0.95 * np.random.default_rng(1).dirichlet(np.full(V**length, 0.5))
    return T.Enumeration(torch.as_tensor(p0), vocab_size=V, length=length)


def log_w(length: int = 2, seed: int = 5) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=V**length))


def doob(form: str, process: dd.Process, weights: Tensor, of: T.Enumeration | None = None) -> dd.Doob:
    """The guide by the exact functions of a world."""
    law = world(2 if len(weights) == 9 else 3) if of is None else of
    if form == "clean":
        return dd.Doob(clean=law.log_clean(process, weights))
    return dd.Doob(law.log_h(process, weights), form=form)  # type: ignore[arg-type]


def reached(law: T.Enumeration, process: dd.Process, t: float) -> Tensor:
    return all_states(process.states, law.length)[law.reachable(process, t)]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
