r"""Compute exact predictions for a tree, in which each token depends on its parent, in O(L V^2).

Messages go up to the root and down again, and give the leave-one-out predictions O:

    up_i(p)   = sum_v A_i(p, v) e_i(v) prod_{c child of i} up_c(v)                 from i's subtree to its parent
    down_i(v) = sum_p A_i(p, v) down_p(p) e_p(p) prod_{c sibling of i} up_c(p)     from all other sites to i
    O_i(v)    ~ down_i(v) prod_{c child of i} up_c(v)

A_i is the transition matrix from the parent of i, and e_i the evidence of site i. Messages are normalised. Products
over siblings are computed without division, since a factor may be 0.

Reference: Pearl (1988, https://doi.org/10.1016/C2009-0-27609-4).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import array, wholes
from discdiff.theory.log_sums import LogSums
from discdiff.theory.oracles import Oracle, check_rows, pick, scaled, uniforms
from discdiff.theory.tilt import Tilt, check_sites_only, fitted

__all__ = ["Tree"]


class Tree(Oracle):
    """Data law p0(x) = root(x_0) prod_{i > 0} A_i(x_parent(i), x_i).

    Args:
        parents: the parent of each site: -1 for site 0, the root, and a number below i for any other site i.
        root: (V,) the law of the root.
        transition: (V, V) A for every edge, or (L, V, V) with A_i for each site i; A_0 is not used.

    Raises:
        ValueError: if ``parents`` is not such a tree, rows are not laws, or shapes disagree.
    """

    def __init__(self, parents: Sequence[int], root: Float[Tensor, " V"], transition: Float[Tensor, "*L V V"]) -> None:
        root, transition = array(root, "root", torch.float64), array(transition, "transition", torch.float64)
        parents = wholes(parents, "parents must be -1 for site 0 and an earlier site for every other: a parent")
        if root.ndim != 1:
            raise ValueError(f"root must be a law (V,), got shape {tuple(root.shape)}")
        if not parents or parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(parents) if i):
            raise ValueError(f"parents must be -1 for site 0 and an earlier site for every other, got {list(parents)}")
        size = len(root)
        if transition.shape not in ((size, size), (len(parents), size, size)):
            raise ValueError(
                f"transition must be ({size}, {size}) or ({len(parents)}, {size}, {size}), "
                f"got {tuple(transition.shape)}"
            )
        check_rows(root=root, transition=transition)
        self.parents: tuple[int, ...] = tuple(parents)
        self.alphabet: int = size
        self.length: int = len(parents)
        self.root: Tensor = root / root.sum()
        self.transition: Tensor = (transition / transition.sum(-1, keepdim=True)).expand(len(parents), size, size)
        self.children: list[list[int]] = [[c for c, p in enumerate(parents) if p == i] for i in range(len(parents))]

    def _up(self, evidence: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute each site's message to its parent, the product of its children's messages, and the log evidence."""
        up: list[Tensor] = [evidence[:, 0]] * self.length
        below: list[Tensor] = [evidence[:, 0]] * self.length
        log_total = evidence.new_zeros(len(evidence), dtype=torch.float64)
        for i in reversed(range(self.length)):
            below[i] = torch.ones_like(evidence[:, i])
            for c in self.children[i]:
                below[i], scale = scaled(below[i] * up[c])
                log_total += scale.double().log()
            message = evidence[:, i] * below[i]
            message = message * self.root if i == 0 else message @ self.transition[i].T
            up[i], scale = scaled(message)
            log_total += scale.double().log()
        return up, below, log_total

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        up, below, _ = self._up(evidence)
        down: list[Tensor] = [self.root.expand(len(evidence), -1)] * self.length
        for i, children in enumerate(self.children):
            own = down[i] * evidence[:, i]
            before = [torch.ones_like(own)]
            for c in children:
                before.append(scaled(before[-1] * up[c])[0])
            after = torch.ones_like(own)
            for c, left in zip(reversed(children), reversed(before[:-1]), strict=True):
                down[c] = scaled((own * left * after) @ self.transition[c])[0]
                after = scaled(after * up[c])[0]
        return torch.stack(down, 1) * torch.stack(below, 1)

    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return self._up(evidence)[2]

    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        _, below, _ = self._up(evidence)
        u = uniforms(self.length, len(evidence), seed, evidence.device)
        tokens: list[Tensor] = []
        for i, parent in enumerate(self.parents):
            prior = self.root.expand(len(evidence), -1) if i == 0 else self.transition[i][tokens[parent]]
            tokens.append(pick(prior * evidence[:, i] * below[i], u[i]))
        return torch.stack(tokens, 1)

    def tilted(self, log_w: Tilt | Tensor) -> "Tree":
        """Return the law p0 W / Z of a product W over sites, a tree with the same parents.

        Args:
            log_w: the natural logs (L, V), or a ``Tilt`` of sites alone. Neighbouring sites are no edges of a tree, so
                pairs and automata are refused.

        Raises:
            TypeError, ValueError: for another kind, shape, NaN or +inf, or if Z = 0.
        """
        weighed = self._weighed(log_w)
        return Tree(self.parents, *weighed.laws())

    def _plain(self) -> "_Weights":
        return self._weighed(torch.zeros(self.length, self.alphabet))

    def _weighed(self, log_w: Tilt | Tensor) -> "_Weights":
        root, transition = self.root.double().log(), self.transition.double().log()
        sites = check_sites_only(fitted(log_w, self.alphabet, self.length, "Tree"), "Tree").to(root)
        return _Weights(self.parents, self.children, root, transition, sites)

    def log_prob_moments(self) -> tuple[float, float]:
        """Compute the exact mean and variance of log p0(x) under p0, in nats and nats squared, in O(L V^2)."""
        mean = torch.zeros(self.length, self.alphabet, dtype=torch.float64)  # of a subtree, given its parent
        variance = torch.zeros_like(mean)
        for i in reversed(range(self.length)):
            a = self.root[None].double() if i == 0 else self.transition[i].double()
            term = torch.where(a > 0, a.log(), 0.0) + mean[i]
            first = (a * term).sum(-1)
            spread = (a * (variance[i] + (term - first[:, None]) ** 2)).sum(-1)
            if i == 0:
                return float(first), float(spread)
            mean[self.parents[i]] += first
            variance[self.parents[i]] += spread
        raise AssertionError("a tree has a root")


class _Weights(LogSums):
    """Weights of sequences on a tree, all in logs: tables root (V,), A (L, V, V) and sites (L, V)."""

    def __init__(
        self, parents: Sequence[int], children: list[list[int]], root: Tensor, transition: Tensor, sites: Tensor
    ) -> None:
        self.parents, self.children = parents, children
        self.root, self.transition, self.sites = root, transition, sites
        if not bool(self.log_total(torch.zeros_like(sites)[None]) > -torch.inf):
            raise ValueError("no sequence of this length has positive probability and a positive weight (Z = 0)")

    def log_total(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return self._up(log_e)[2]

    def log_leave_one_out(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        up, below, _ = self._up(log_e)
        weights = log_e + self.sites
        down = [self.root.expand(len(log_e), -1)] * len(self.parents)
        for i, children in enumerate(self.children):
            own = down[i] + weights[:, i]
            before = [torch.zeros_like(own)]
            for c in children:
                before.append(before[-1] + up[c])
            after = torch.zeros_like(own)
            for c, left in zip(reversed(children), reversed(before[:-1]), strict=True):
                down[c] = ((own + left + after)[..., None] + self.transition[c]).logsumexp(1)
                after = after + up[c]
        return torch.stack(down, 1) + torch.stack(below, 1) + self.sites

    def laws(self) -> tuple[Tensor, Tensor]:
        """Compute the laws of the root (V,) and of each site given its parent (L, V, V).

        Rows of weight 0 are uniform.
        """
        below = self._up(torch.zeros_like(self.sites)[None])[1]
        weights = torch.stack(below, 1)[0] + self.sites
        rows = self.transition + weights[:, None]
        possible = rows.amax(-1, keepdim=True) > -torch.inf
        laws = torch.where(possible, rows, 0.0).softmax(-1)
        return (self.root + weights[0]).softmax(-1), laws

    def _up(self, log_e: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute each site's message to its parent, the sum of its children's messages, and the log total."""
        weights = log_e + self.sites
        up, below = ([weights[:, 0]] * len(self.parents) for _ in range(2))
        for i in reversed(range(len(self.parents))):
            below[i] = torch.zeros_like(weights[:, i])
            for c in self.children[i]:
                below[i] = below[i] + up[c]
            message = weights[:, i] + below[i]
            if i:
                up[i] = (message[:, None] + self.transition[i]).logsumexp(-1)
        return up, below, (weights[:, 0] + below[0] + self.root).logsumexp(-1)
