r"""Compute the exact error of revealing sites in groups, in a fixed order, from the entropies of the data law.

Sites of a group G_k are drawn independently of each other given all groups before it, with exact predictions. Then

    KL(p0 || law) = sum_k E[TC(G_k | G_1 ... G_{k-1})] = sum_i H(x_i | x at groups before that of i) - H(x)

with TC the total correlation and H the entropy. Of an ``Enumeration`` the entropies are sums over all sequences. Of a
``MarkovChain`` H(x_i | ...) needs only the nearest known site on either side, so it takes tables of V^3 numbers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import shown, wholes
from discdiff.theory.chain import MarkovChain
from discdiff.theory.divergence import entropy
from discdiff.theory.world import Enumeration

__all__ = ["total_correlation"]


def total_correlation(world: Enumeration | MarkovChain, groups: Sequence[Sequence[int]]) -> float:
    """Compute the sum of the expected total correlations of groups of sites, each given all groups before it, in nats.

    It equals KL(p0 || law) of ``samplers.Reveal`` or ``samplers.Unmask`` in this order, from t = 1 to 0:

        T.total_correlation(chain, S.Reveal("spread", calls=8).groups(chain.length))

    Args:
        world: the data law.
        groups: the sites of each call, in the order of the calls; every site of 0..L-1 is in exactly one group.

    Raises:
        TypeError: for another data law.
        ValueError: unless the groups hold every site once.
    """
    if not isinstance(world, Enumeration | MarkovChain):
        raise TypeError(f"total_correlation: takes an Enumeration or a MarkovChain, got {shown(world)}")
    listed = [list(wholes(group, "total_correlation: groups", 0, world.length - 1)) for group in groups]
    if sorted(site for group in listed for site in group) != [*range(world.length)]:
        raise ValueError(f"total_correlation: the groups must hold each of 0..{world.length - 1} once, got {listed}")
    total, known = 0.0, set[int]()
    law = _Chain(world) if isinstance(world, MarkovChain) else _Listed(world)
    for group in listed:
        total += sum(law.given(site, known) for site in group)
        known |= set(group)
    return max(0.0, total - law.whole)  # rounding may leave -1e-12


class _Listed:
    """Entropies of a listed law."""

    def __init__(self, world: Enumeration) -> None:
        self.joint = world.p0.double().view([world.alphabet] * world.length)
        self.whole = entropy(world.p0)

    def given(self, site: int, known: set[int]) -> float:
        """Return H(x_site | x at known sites)."""
        return self._of(known | {site}) - self._of(known)

    def _of(self, kept: set[int]) -> float:
        out = [axis for axis in range(self.joint.ndim) if axis not in kept]
        return entropy((self.joint.sum(out) if out else self.joint).flatten())


class _Chain:
    """Laws of a Markov chain at one site, two sites or three, and the entropies that follow."""

    def __init__(self, chain: MarkovChain) -> None:
        steps = chain.transition.double()
        self.steps = steps if steps.ndim == 3 else steps.expand(chain.length - 1, *steps.shape)
        self.laws = [chain.initial.double()]
        for step in self.steps:
            self.laws.append(self.laws[-1] @ step)
        self._between: dict[tuple[int, int], Tensor] = {}
        rows = (_entropies(step) for step in self.steps)
        self.whole = entropy(self.laws[0]) + sum(
            float(law @ row) for law, row in zip(self.laws[:-1], rows, strict=True)
        )

    def between(self, first: int, last: int) -> Float[Tensor, "V V"]:
        """Return p(x_last | x_first) for first <= last."""
        if (first, last) not in self._between:
            matrix = torch.eye(len(self.laws[0]), dtype=torch.float64)
            for step in self.steps[first:last]:
                matrix = matrix @ step
            self._between[first, last] = matrix
        return self._between[first, last]

    def given(self, site: int, known: set[int]) -> float:
        """Return H(x_site | x at known sites), which depends on the nearest known site on either side alone."""
        left, right = (
            max((j for j in known if j < site), default=None),
            min((j for j in known if j > site), default=None),
        )
        before = self.laws[site][None] if left is None else self.laws[left][:, None] * self.between(left, site)
        joint = before[..., None] if right is None else before[..., None] * self.between(site, right)
        return entropy(joint.flatten()) - entropy(joint.sum(1).flatten())


def _entropies(rows: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    return -torch.special.xlogy(rows, rows).sum(-1)
