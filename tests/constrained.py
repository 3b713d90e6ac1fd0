"""Constraints of three sites, with the sequences that they accept, and what takes a joint law of tokens."""

import torch
from operators import STEPS, accepted
from problems import strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states, state_index

__all__ = [
    "ABSORBING", "ALIKE", "ALLOWED", "MASKED", "PARITY", "REFUSED", "RIGHT", "SAME", "WORLD", "L", "V", "X", "by_hand",
    "network", "parity", "product", "restricted", "takes",
]  # fmt: skip

V, L = 3, 3
MASKED, ABSORBING = dd.Masked(3, dd.Linear()), dd.AbsorbingUniform(3, dd.Linear())
X = all_states(V, L)
WORLD = strong()
# What draws all tokens of a step by ``prediction.tokens``; P2 and AnchoredRemask read the model at revealed sites too.
TAKES = (
    S.Ancestral, S.AnyOrder, S.EntropyBounded, S.FirstHitting, S.KLStable, S.P2, S.SplitLeap, S.Threshold, S.Unmask,
    S.AnchoredRemask, S.Reveal,
)  # fmt: skip
TAKES_BEHIND = (S.RePaint, S.ForwardBackward, S.Gibbs, S.Remask)


def parity() -> dd.Constraint:
    """The number of ones is even, and no two follows a zero."""
    moves = torch.full((5, V), 4)
    for state in range(4):
        odd, zero = state // 2, state % 2
        moves[state] = torch.tensor([odd * 2 + 1, (1 - odd) * 2, 4 if zero else odd * 2])
    return dd.Constraint(moves, 0, [True, True, False, False, False])


def by_hand(x: Tensor) -> Tensor:
    """Which sequences ``parity`` accepts."""
    return ((x == 1).sum(-1) % 2 == 0) & ~((x[:, :-1] == 0) & (x[:, 1:] == 2)).any(-1)


PARITY, RIGHT = parity(), by_hand(X)


def product() -> T.Enumeration:
    sites = torch.rand(L, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    p0 = (sites[0][:, None, None] * sites[1][:, None] * sites[2]).flatten()
    return T.Enumeration(p0 / p0.sum(), vocab_size=V, length=L)


def restricted(p0: Tensor) -> Tensor:
    return p0 * RIGHT / (p0 * RIGHT).sum()


def network(predicts: dd.prediction.Predicts = "loo") -> dd.Denoiser:
    """No posterior of any law, with a prediction at revealed sites too."""
    logits = torch.randn(4**L, L, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5
    return dd.Denoiser(lambda x, t: logits[state_index(x, 4)], MASKED, predicts, length=L, time_dtype=torch.float64)


def takes(operator: dd.Operator) -> bool:
    """Whether an operator draws tokens together, by its kind; behind ``Ancestral`` the corrector decides."""
    last = operator.right if isinstance(operator, dd.operator.Then) else operator
    if isinstance(last, S.ARPC):
        return last.score in ("random", "forward")
    if isinstance(last, S.ReMDM):
        return not last.confident
    return isinstance(last, (*TAKES, *TAKES_BEHIND))


OPERATORS = [one for one in STEPS if accepted(one, MASKED)]
ALLOWED = [one for one in OPERATORS if takes(one)]
REFUSED = [one for one in OPERATORS if not takes(one)]


def ends_alike() -> dd.Constraint:
    """The first and the last token are equal."""
    moves = torch.full((10, V), 0)
    moves[0] = torch.tensor([1, 4, 7])
    for first in range(V):
        for last in range(V):
            moves[1 + 3 * first + last] = 1 + 3 * first + torch.arange(3)
        moves[1 + 3 * first] = 1 + 3 * first + torch.tensor([(v - first) % 3 for v in range(V)])
        for last in range(1, V):
            moves[1 + 3 * first + last] = moves[1 + 3 * first]
    return dd.Constraint(moves, 0, torch.tensor([False, *([True, False, False] * 3)]))


ALIKE = ends_alike()
SAME = X[:, 0] == X[:, -1]
