r"""Compute exact predictions for a mixture of K product laws in O(K L V).

Such a mixture has long-range correlations.

p0(x) = sum_k w_k prod_i theta_k,i(x_i)
O_i ~ sum_k [w_k prod_{j != i} <theta_k,j, e_j>] theta_k,i

O_i is the leave-one-out prediction of site i, e_j the evidence of site j, and <., .> sums over tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import array
from discdiff.theory.oracles import Oracle, check_rows, pick, uniforms
from discdiff.theory.tilt import Tilt, fitted
from discdiff.theory.weighted import WeightedChain

__all__ = ["ProductMixture"]


class ProductMixture(Oracle):
    """Data law that is a mixture of K product laws.

    Args:
        weights: (K,) mixture weights.
        theta: (K, L, V) laws of each site in each component.

    Raises:
        ValueError: if weights or rows are not laws, or shapes disagree.
    """

    def __init__(self, weights: Float[Tensor, " K"], theta: Float[Tensor, "K L V"]) -> None:
        weights, theta = array(weights, "weights", torch.float64), array(theta, "theta", torch.float64)
        if theta.ndim != 3 or weights.shape != theta.shape[:1]:
            raise ValueError(
                f"a mixture needs weights (K,) and laws (K, L, V), got {tuple(weights.shape)} and {tuple(theta.shape)}"
            )
        check_rows(weights=weights, theta=theta)
        self.weights: Tensor = weights / weights.sum()
        self.theta: Tensor = theta / theta.sum(-1, keepdim=True)
        self.length: int = theta.shape[1]
        self.alphabet: int = theta.shape[2]

    def _fits(self, evidence: Tensor) -> Float[Tensor, "B K L"]:
        """Compute log <theta_k,i, e_i> for every component k and site i, (B, K, L)."""
        return torch.einsum("kln,bln->bkl", self.theta, evidence).log()

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        fits = self._fits(evidence)
        # The product of the other sites' factors: factors may be 0, so zeros are counted instead of divided by.
        zero = fits == -torch.inf
        finite = fits.masked_fill(zero, 0.0)
        others = finite.sum(-1, keepdim=True) - finite + self.weights.log()[:, None]
        others = others.masked_fill(zero.sum(-1, keepdim=True) > zero.long(), -torch.inf)
        top = others.amax(1, keepdim=True)
        share = torch.exp(others - top.masked_fill(top == -torch.inf, 0.0))
        return torch.einsum("bkl,kln->bln", share, self.theta)

    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return torch.logsumexp(self._fits(evidence).sum(-1) + self.weights.log(), -1)

    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        log_weight = self._fits(evidence).sum(-1) + self.weights.log()
        u = uniforms(1 + self.length, len(evidence), seed, evidence.device)
        component = pick(log_weight.softmax(-1), u[0])
        rows = self.theta[component] * evidence
        return pick(rows.flatten(0, 1), u[1:].T.flatten()).view(evidence.shape[:2])

    def tilted(self, log_w: Tilt | Tensor) -> "ProductMixture | WeightedChain":
        """Return the law p0 W / Z: a mixture, or under pairs or an automaton a ``WeightedChain``.

        The hidden states of that chain are pairs (component, token), so a step costs (K V)^2.

        Args:
            log_w: a ``Tilt``, or the natural logs (L, V) of a product over sites.

        Raises:
            TypeError, ValueError: for another kind, shape, NaN or +inf, or if Z = 0.
        """
        weighed = self._weighed(log_w)
        if isinstance(log_w, Tilt) and (log_w.pairs is not None or log_w.automaton is not None):
            return weighed
        fits = weighed.emission.logsumexp(-1)  # (L, K): log <theta_k,i, w_i>
        rows = (weighed.emission - fits[..., None].masked_fill(fits[..., None] == -torch.inf, 0.0)).exp()
        theta = torch.where(fits[..., None] > -torch.inf, rows, 1 / self.alphabet).transpose(0, 1)
        return ProductMixture((weighed.first + fits.sum(0)).softmax(0), theta)

    def _plain(self) -> WeightedChain:
        return WeightedChain(
            self.weights.log(),
            torch.eye(len(self.weights)).to(self.weights).log()[None],
            self.theta.log().transpose(0, 1),
            self.length,
        )

    def _weighed(self, log_w: Tilt | Tensor) -> WeightedChain:
        return self._plain().tilted(fitted(log_w, self.alphabet, self.length, "ProductMixture"))
