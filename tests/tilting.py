"""What tests of tilted laws share: small structured laws, tilts of each kind, and distances of logs."""

import math
from collections.abc import Callable

import numpy as np
import torch
from problems import chain
from torch import Tensor

import discdiff as dd
from discdiff import theory as T

V, L = 3, 4
NEVER = -math.inf
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())


def logs(*shape: int, seed: int = 5, scale: float = 1.0) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape) * scale)


def laws(*shape: int, seed: int = 0) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.7), size=shape[:-1]))


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference of two arrays of logs, relative to their values; -inf equals -inf alone."""
    assert torch.equal(a == NEVER, b == NEVER)
    finite = b > NEVER
    return float(((a - b)[finite] / b[finite].abs().clamp(min=1)).abs().max()) if bool(finite.any()) else 0.0


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def doob_clean(law: T.Oracle, process: dd.Process, log_g: Callable[..., Tensor], z: Tensor, t: float) -> Tensor:
    """O' ~ O E[W | z, x0_i = v]."""
    return (law.denoiser(process, "loo")(z, t).loo + log_g(z, t)).softmax(-1)


# Of its last states one is refused and one is preferred.
COUNT = T.Automaton(torch.tensor([[0, 1, 0], [1, 2, 1], [2, 2, 0]]), torch.tensor([NEVER, 0.0, 0.7]).double(), start=1)


def markov(length: int = L) -> T.MarkovChain:
    return chain(V, length)


def hmm(length: int = L) -> T.HMM:
    return T.HMM(laws(1, 2)[0], laws(2, 2, seed=1), laws(2, V, seed=2), length)


def constrained(length: int = L) -> T.ConstrainedChain:
    return T.ConstrainedChain(chain(V, length), torch.tensor([[0, 1, 0], [1, 0, 1]]), accepting={0})


def mixture(length: int = L) -> T.ProductMixture:
    theta = laws(3, length, V, seed=6)
    theta[0, 1] = torch.tensor([1.0, 0, 0])
    return T.ProductMixture(laws(1, 3, seed=5)[0], theta)


def tree(length: int = L) -> T.Tree:
    parents = [-1, 0, 0, 1] if length == L else [-1, *(i // 3 for i in range(length - 1))]
    return T.Tree(parents, laws(1, V, seed=3)[0], laws(length, V, V, seed=4))


def product(length: int = L) -> T.Tilt:
    sites = logs(length, V, seed=1)
    sites[2, 1] = NEVER
    return T.Tilt(sites)


def neighbouring(length: int = L) -> T.Tilt:
    table = logs(length - 1, V, V, seed=2)
    table[1, 0, 2] = NEVER
    return T.Tilt(pairs=table)


def both(length: int = L) -> T.Tilt:
    return T.Tilt(product(length).sites, neighbouring(length).pairs)


def accepted(length: int = L) -> T.Tilt:
    return T.Tilt(automaton=COUNT)


def everything(length: int = L) -> T.Tilt:
    return T.Tilt(product(length).sites, neighbouring(length).pairs, COUNT)
