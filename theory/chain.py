r"""Compute exact predictions for chains by forward-backward messages.

The cost is O(L H^2) for L sites and H hidden states, so L may be in the thousands. Let A be the transition matrix and B
the emission matrix. From the evidence e_i(v) of site i for token v follows e_i(h) = sum_v B(h, v) e_i(v), the evidence
for the hidden state h. The messages f and b and the leave-one-out predictions O are

    pred_1 = initial,   f_i ~ pred_i e_i,   pred_{i+1} = f_i A
    b_L = final,        b_i = A (e_{i+1} b_{i+1})
    O_i(v) ~ sum_h pred_i(h) b_i(h) B(h, v)

In a Markov chain the states are the tokens, and B is the identity. A chain constrained by a finite automaton is a chain
on pairs (automaton state, token); its ``final`` weights are 1 for accepting states and 0 for others. Messages are
normalised at every site, so they do not underflow. O is computed without division by the evidence, which may be 0.
Draws use forward filtering and backward sampling.

Reference: Rabiner (1989, https://doi.org/10.1109/5.18626).
"""

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import affordable, array, shown, token_ids, whole, wholes
from discdiff.theory.oracles import Oracle, check_rows, pick, uniforms
from discdiff.theory.scan import messages, path
from discdiff.theory.tilt import Tilt, fitted
from discdiff.theory.weighted import WeightedChain

__all__ = ["HMM", "ConstrainedChain", "MarkovChain"]


class HMM(Oracle):
    """Data law p0(x) ~ sum_h initial(h_1) prod_i A(h_i, h_{i+1}) final(h_L) prod_i B(h_i, x_i).

    Args:
        initial: (H,) law of the first hidden state.
        transition: (H, H) A, row = hidden state, column = the next one; or (K, H, H) with one for each step, K = L-1.
        emission: (H, V) B, the law of a token given its hidden state.
        length: L.
        final: (H,) weights of the last hidden state; 1 by default.

    Raises:
        ValueError: if rows are not laws, shapes disagree, or no sequence has positive probability.
    """

    def __init__(
        self,
        initial: Float[Tensor, " H"],
        transition: Float[Tensor, "*K H H"],
        emission: Float[Tensor, "H V"],
        length: int,
        final: Float[Tensor, " H"] | None = None,
    ) -> None:
        initial, transition, emission = (
            array(x, name, torch.float64)
            for name, x in (("initial", initial), ("transition", transition), ("emission", emission))
        )
        length = whole(length, f"{type(self).__name__}: length", 1)
        if (
            initial.ndim != 1
            or emission.ndim != 2
            or transition.shape not in (square := (len(initial), len(initial)), (length - 1, *square))
            or emission.shape[:1] != initial.shape
        ):
            raise ValueError(
                "a chain needs initial (H,), transition (H, H) or (L-1, H, H), and emission (H, V), "
                f"got {tuple(initial.shape)}, {tuple(transition.shape)} and {tuple(emission.shape)}"
            )
        check_rows(initial=initial, transition=transition, emission=emission)
        affordable(length * emission.shape[1], f"a chain of length {length}")
        self.initial: Tensor = initial / initial.sum()
        self.transition: Tensor = transition / transition.sum(-1, keepdim=True)
        self.emission: Tensor = emission / emission.sum(-1, keepdim=True)
        self.final: Tensor = torch.ones_like(initial) if final is None else array(final, "final", torch.float64)
        if self.final.shape != initial.shape or not bool(((self.final >= 0) & (self.final < torch.inf)).all()):
            raise ValueError(f"final must hold {len(initial)} weights that are not negative, got {shown(final)}")
        self.alphabet: int = emission.shape[1]
        self.length: int = length
        self.log_total: Tensor = torch.zeros((), dtype=torch.float64)
        self.log_total = self.log_evidence(torch.ones(1, length, self.alphabet, dtype=torch.float64))[0]
        if not bool(torch.isfinite(self.log_total)):
            raise ValueError(f"no sequence of length {length} has positive probability; look at transition and final")

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        seen = self._seen(evidence)
        predicted, _ = messages(seen, self.initial, self.transition)
        return (predicted * self._backward(seen)) @ self.emission

    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        filtered, totals = self._filtered(self._seen(evidence))
        return totals.double().log().sum(-1) + (filtered[:, -1] @ self.final).double().log() - self.log_total

    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        filtered, _ = self._filtered(self._seen(evidence))
        u, v = uniforms(2 * self.length, len(evidence), seed, evidence.device).chunk(2)
        last = pick(filtered[:, -1] * self.final, u[-1])
        hidden = path(filtered[:, :-1], self._into(), last, u[:-1])
        return pick((self.emission[hidden] * evidence).flatten(0, 1), v.T.flatten()).view(evidence.shape[:2])

    def _seen(self, evidence: Tensor) -> Float[Tensor, "B L H"]:
        return evidence @ self.emission.T

    def _filtered(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the forward message f_i and its normalising factor for every site i.

        Once the evidence contradicts the chain, f_i is 0 at this site and at all later ones.
        """
        predicted, totals = messages(seen, self.initial, self.transition)
        return predicted * seen / totals[..., None], totals

    def _backward(self, seen: Tensor) -> Tensor:
        """Compute the backward message b_i for every site i, up to a factor, by the recursion from the last site."""
        return messages(seen.flip(1), self.final, self._into(flipped=True))[0].flip(1)

    def _into(self, flipped: bool = False) -> Tensor:
        """Return the transition matrices transposed: row = the next state. ``flipped``, the last step comes first."""
        into = self.transition.mT.contiguous()
        return into.flip(0) if flipped and into.ndim == 3 else into

    def tilted(self, log_w: Tilt | Tensor) -> Oracle:
        """Return the law p0 W / Z, as a ``WeightedChain``; a ``MarkovChain`` under sites and pairs stays one.

        Args:
            log_w: a ``Tilt``, or the natural logs (L, V) of a product over sites.

        Raises:
            TypeError, ValueError: for another kind, shape, NaN or +inf, or if Z = 0.
        """
        return self._weighed(log_w)

    def _plain(self) -> WeightedChain:
        log_a = self.transition.log()
        steps = log_a if log_a.ndim == 3 else log_a[None]
        return WeightedChain(self.initial.log(), steps, self.emission.log()[None], self.length, self.final.log())

    def _weighed(self, log_w: Tilt | Tensor) -> WeightedChain:
        return self._plain().tilted(fitted(log_w, self.alphabet, self.length, type(self).__name__))

    def log_prob_moments(self) -> tuple[float, float]:
        """Compute the exact mean and variance of log p0(x) under p0, in nats and nats squared, by dynamic programming.

        Raises:
            ValueError: if several hidden paths can give one sequence, since log p0 is then not a sum along a path.
        """
        if not bool(((self.emission == 0) | (self.emission == 1)).all()) or not self._unifilar():
            raise ValueError(
                f"{type(self).__name__}: log p0 is not a sum along the sequence; compare two samples instead"
            )
        log_a, log_first = (torch.where(x > 0, x.log(), 0.0).double() for x in (self.transition, self.initial))
        a, ones = self.transition.double(), torch.ones(1, self.length, self.alphabet)
        backward = self._backward(self._seen(ones.to(self.transition)))[0].double()
        mass = self.initial.double() * backward[0]
        mass = mass / mass.sum()
        moments = torch.stack([mass, mass * log_first, mass * log_first**2])
        for i in range(1, self.length):
            log_step = log_a if log_a.ndim == 2 else log_a[i - 1]
            step = (a if a.ndim == 2 else a[i - 1]) * backward[i]  # conditioned on acceptance
            step = step / step.sum(-1, keepdim=True).clamp(min=1e-300)
            m0, m1, m2 = moments
            first = m1 @ step + m0 @ (step * log_step)
            second = m2 @ step + 2 * (m1 @ (step * log_step)) + m0 @ (step * log_step**2)
            moments = torch.stack([m0 @ step, first, second])
        _, mean, square = moments.sum(-1).tolist()
        return mean - float(self.log_total), square - mean**2

    def _unifilar(self) -> bool:
        """Return whether a hidden state and the next token determine the next hidden state."""
        successors = (self.transition > 0).double() @ self.emission
        return bool((successors <= 1).all()) and bool(((self.initial > 0).double() @ self.emission <= 1).all())


class MarkovChain(HMM):
    """Data law p0(x) = initial(x_1) prod_i transition(x_i, x_{i+1}).

    Args:
        initial: (V,) law of the first token.
        transition: (V, V), row = token, column = the next one; or (K, V, V) with one for each step, K = L-1.
        length: L.

    Raises:
        ValueError: if rows are not laws, or shapes disagree.
    """

    def __init__(self, initial: Float[Tensor, " V"], transition: Float[Tensor, "*K V V"], length: int) -> None:
        initial = array(initial, "initial", torch.float64)
        if initial.ndim != 1:
            raise ValueError(f"initial must be a law (V,), got shape {tuple(initial.shape)}")
        super().__init__(initial, transition, torch.eye(len(initial), dtype=torch.float64), length)

    def log_prob(self, x: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        self._check_clean(x)
        before, after = x[:, :-1], x[:, 1:]
        step = torch.arange(self.length - 1, device=x.device)
        log_a = self.transition.log()
        steps = log_a[before, after] if log_a.ndim == 2 else log_a[step, before, after]
        return self.initial.log()[x[:, 0]] + steps.sum(-1)

    def tilted(self, log_w: Tilt | Tensor) -> "MarkovChain | WeightedChain":
        """Return the law p0 W / Z: a chain with one matrix for each step, or with an automaton a ``WeightedChain``.

        Args:
            log_w: a ``Tilt``, or the natural logs (L, V) of a product over sites.

        Raises:
            TypeError, ValueError: for another kind, shape, NaN or +inf, or if Z = 0.
        """
        weighed = self._weighed(log_w)
        if isinstance(log_w, Tilt) and log_w.automaton is not None:
            return weighed
        return MarkovChain(*weighed.laws(), self.length)


class ConstrainedChain(HMM):
    """Data law of a Markov chain conditioned on acceptance by a deterministic finite automaton.

    Args:
        chain: the unconstrained chain.
        moves: (Q, V) the automaton's next state for each state and token.
        accepting: the states in which a sequence may end.
        start: the state before the first token.

    Raises:
        TypeError, ValueError: if ``chain`` is not a MarkovChain, for states out of range, or if no sequence of this
            length is accepted.
    """

    def __init__(
        self, chain: MarkovChain, moves: Int[Tensor, "Q V"], accepting: Collection[int], start: int = 0
    ) -> None:
        if not isinstance(chain, MarkovChain):
            raise TypeError(f"ConstrainedChain: chain must be a MarkovChain, got {shown(chain)}")
        moves, accepting = token_ids(moves, "moves", "states"), wholes(accepting, "accepting")
        if moves.ndim != 2 or not len(moves):
            raise ValueError(f"moves must be (Q, {chain.alphabet}) states, got shape {tuple(moves.shape)}")
        size, tokens = moves.shape
        start = whole(start, "start")
        if tokens != chain.alphabet or not bool(((moves >= 0) & (moves < size)).all()) or not 0 <= start < size:
            raise ValueError(
                f"moves must be (Q, {chain.alphabet}) states in 0..Q-1, and start one; got {moves.tolist()}"
            )
        if not set(accepting) <= set(range(size)):
            raise ValueError(f"accepting states must lie in 0..{size - 1}, got {sorted(accepting)}")
        goes = torch.nn.functional.one_hot(moves.long(), size).double()  # (q, v, q')
        initial = goes[start].T * chain.initial  # (q', v)
        transition = torch.einsum("...vw,qwr->...qvrw", chain.transition, goes)  # from (q, v) to (r, w)
        accepted = torch.tensor([q in set(accepting) for q in range(size)], dtype=torch.float64)
        emission = torch.eye(tokens, dtype=torch.float64).repeat(size, 1)
        final = accepted.repeat_interleave(tokens)
        hidden = size * tokens
        super().__init__(
            initial.flatten(), transition.reshape(*transition.shape[:-4], hidden, hidden), emission, chain.length, final
        )
