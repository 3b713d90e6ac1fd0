"""The zoo: fixed small laws with everything known, and brute-force answers written from the definitions.

Nothing here uses the library's formulas beyond ``process.kernel``, which test_process checks by itself.
"""

import itertools
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import discdiff as dd
from discdiff import theory as T
from discdiff.demo.transformer import Transformer

V = L = 3


def dirichlet(concentration: float, seed: int, vocab_size: int = V, length: int = L) -> T.Enumeration:
    """A random law on V^L. Fixed by its seed."""
    p0 = np.random.default_rng(seed).dirichlet(np.full(vocab_size**length, concentration))
    return T.Enumeration(torch.as_tensor(p0), vocab_size=vocab_size, length=length)


def weak() -> T.Enumeration:
    """Dirichlet(3), seed 7: full support, mildly correlated."""
    return dirichlet(3.0, 7)


def two_sites(seed: int) -> T.Enumeration:
    """0.05 uniform + 0.95 Dirichlet(1/2) on two sites of three tokens."""
    p0 = 0.05 / 9 + 0.95 * np.random.default_rng(seed).dirichlet(np.full(9, 0.5))
    return T.Enumeration(torch.as_tensor(p0), vocab_size=3, length=2)


def strong() -> T.Enumeration:
    """0.05 uniform + 0.95 Dirichlet(1/2): strongly correlated; a product law would hide most faults."""
    world = dirichlet(0.5, 3)
    return T.Enumeration(0.05 / len(world.p0) + 0.95 * world.p0, vocab_size=V, length=L)


def chain(vocab_size: int, length: int, seed: int = 5) -> T.MarkovChain:
    """A random Markov chain."""
    rng = np.random.default_rng(seed)
    initial = torch.as_tensor(rng.dirichlet(np.ones(vocab_size)))
    transition = torch.as_tensor(rng.dirichlet(np.full(vocab_size, 0.7), size=vocab_size))
    return T.MarkovChain(initial, transition, length=length)


def slots(length: int, coupling: float, field: float, ring: float) -> T.Enumeration:
    """Binary sites: the first two must agree (coupling), the others are all but settled (field); all in a ring.

    log p0 = coupling x_1 x_2 + field sum_{i > 2} x_i + ring sum_i x_i x_{i+1} + const, with x = 2 token - 1.
    """
    x = states(2, length).double() * 2 - 1
    energy = coupling * x[:, 0] * x[:, 1] + field * x[:, 2:].sum(-1) + ring * (x * x.roll(1, 1)).sum(-1)
    return T.Enumeration(energy.softmax(0), vocab_size=2, length=length)


def product_of_marginals(world: T.Enumeration, process: dd.Process, t: float) -> Tensor:
    """The law at t that one step from t = 1 leaves: every site by itself."""
    p, law = world.marginal(process, t).view((process.states,) * world.length), torch.ones(1, dtype=torch.float64)
    for site in range(world.length):
        law = torch.kron(law, p.sum([other for other in range(world.length) if other != site]))
    return law


def processes(vocab_size: int = V) -> list[dd.Process]:
    """The two families that everything is tried on."""
    return [dd.Masked(vocab_size, dd.Linear()), dd.Uniform(vocab_size, dd.Linear())]


def irreversible(vocab_size: int = V) -> Tensor:
    """A random generator that is not reversible."""
    rates = torch.as_tensor(np.random.default_rng(11).uniform(0.1, 1.0, (vocab_size, vocab_size)))
    return rates - torch.diag(rates.sum(-1))


def turning(vocab_size: int = V) -> Callable[[float], Tensor]:
    """A generator that does not commute with itself at other times."""
    one, other = irreversible(vocab_size), irreversible(vocab_size).flip(0, 1)
    return lambda t: (1 - t) * one + t * other


def rank_one(vocab_size: int = V) -> list[dd.Process]:
    """The families whose noise does not look at the token it replaces."""
    return families(vocab_size)[:4]


def families(vocab_size: int = V) -> list[dd.Process]:
    """One of each family whose states are tokens, and perhaps a mask."""
    pi = torch.arange(1.0, vocab_size + 1).double()
    return [
        *processes(vocab_size),
        dd.Marginal(pi / pi.sum(), dd.Cosine()),
        dd.Hybrid(vocab_size, dd.Linear(), p_uniform=0.4),
        dd.Ordinal(vocab_size, dd.Linear()),
        dd.Ordinal.gaussian(vocab_size, dd.Linear(), std=0.8),
        dd.General(irreversible(vocab_size), dd.Linear()),
        dd.TimeVarying(turning(vocab_size), dd.LogLinear(1e-3), pieces=5),
    ]


def pairs(vocab_size: int = 2) -> list[dd.Process]:
    """One of each family whose states are pairs of a token and its source token."""
    pi = torch.arange(1.0, vocab_size + 1).double()
    return [
        dd.AbsorbingUniform(vocab_size, dd.Linear()),
        dd.Interpolant(vocab_size, dd.Linear(), pi / pi.sum(), p_uniform=0.3),
    ]


def states(size: int, length: int) -> Tensor:
    """(size**length, length), first site slowest."""
    return torch.tensor(list(itertools.product(range(size), repeat=length)))


def joint(world: T.Enumeration, process: dd.Process, times: list[float]) -> Tensor:
    """p(x0, z) as (n**L, S**L), by the definition: p0(x) prod_i q_{t_i}(z_i | x_i)."""
    q = torch.ones(1, 1, dtype=torch.float64)
    for t in times:
        q = torch.kron(q, process.marginals(t))
    return world.p0[:, None] * q


def gibbs_matrix(world: T.Enumeration, process: dd.Process, t: float) -> Tensor:
    """Random-scan Gibbs from p_t alone: sum_l 1/L p_t(z'_l | z_{-l}). Rows of unreachable states are zero."""
    p_t = joint(world, process, [t] * world.length).sum(0)
    size, z = process.states, states(process.states, world.length)
    matrix = torch.zeros(len(p_t), len(p_t), dtype=torch.float64)
    for row, site in itertools.product(range(len(z)), range(world.length)):
        stride = size ** (world.length - 1 - site)
        targets = row + (torch.arange(size) - z[row, site]) * stride
        if p_t[row] > 0:
            matrix[row, targets] += p_t[targets] / p_t[targets].sum() / world.length
    return matrix


def mislabelled(world: T.Enumeration, process: dd.Process) -> dd.Denoiser:
    """The planted fault of the field: the denoiser's output, said to be the leave-one-out."""
    right = world.denoiser(process, predicts="denoiser")
    return dd.Denoiser(
        right.fn, process, predicts="loo", time="alpha", length=world.length, time_dtype=torch.float64, oracle=world
    )


def block_network(process: dd.Process, width: int = 32) -> dd.Denoiser:
    """The reference transformer with random weights, large enough that everything matters."""
    torch.manual_seed(0)
    made = Transformer(process.vocab_size, process.states, width, 2, sees_alpha=True)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return dd.Denoiser(made.eval().requires_grad_(False), process, "denoiser", time="alpha")


def named(case: object) -> str:
    """A repr without addresses, which differ from process to process."""
    return re.sub(r" at 0x\w+", "", repr(case))
