r"""Describe weights of whole sequences that keep chains exact at thousands of sites.

    log W(x) = sum_i sites_i(x_i) + sum_i pairs_i(x_i, x_{i+1}) + log_accept(q_L),    q_i = moves(q_{i-1}, x_i)

The three terms are a product over sites, a chain over neighbours and a deterministic finite automaton, with states q_i
and q_0 = start. A chain that is tilted by such a W is again a chain, over pairs (automaton state, hidden state).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import array, shown, token_ids, whole

__all__ = ["Automaton", "Tilt", "check_sites_only", "fitted", "log_weights"]


def log_weights(value: object, name: str, accepted: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return natural logs of weights as float64; each is finite or -inf.

    Args:
        value: the given array.
        name: the name of the argument.
        accepted: the accepted shapes, as a text.
        shape: the only accepted shape; by default any.

    Raises:
        TypeError: if it is not an array of numbers.
        ValueError: for another shape, NaN or +inf.
    """
    logs = array(value, name, torch.float64)
    if shape is not None and logs.shape != shape:
        raise ValueError(f"{name} must be {accepted}, got shape {tuple(logs.shape)}")
    wrong = logs.isnan() | (logs == torch.inf)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} must hold natural logs, finite or -inf; at index {place} it holds {logs[wrong][0]:g}")
    return logs


class Automaton:
    """Deterministic finite automaton that reads a sequence, with a weight for the state in which it ends.

    Shapes: Q states, V tokens.

    Args:
        moves: (Q, V) the next state for each state and token.
        log_accept: (Q,) natural log of the weight of each last state: 0 for accepting states and -inf for others give
            a constraint.
        start: the state before the first token.

    Raises:
        TypeError, ValueError: for another shape, a state out of range, NaN or +inf.
    """

    def __init__(self, moves: Int[Tensor, "Q V"], log_accept: Float[Tensor, " Q"], start: int = 0) -> None:
        self.moves: Tensor = token_ids(moves, "Automaton: moves", "states").long()
        if self.moves.ndim != 2 or not self.moves.numel():
            raise ValueError(f"Automaton: moves must be (Q, V) states, got shape {tuple(self.moves.shape)}")
        size = len(self.moves)
        if not bool(((self.moves >= 0) & (self.moves < size)).all()):
            raise ValueError(f"Automaton: moves must hold states in 0..{size - 1}, got {shown(self.moves.tolist())}")
        self.log_accept: Tensor = log_weights(
            log_accept, "Automaton: log_accept", f"({size},), one log for a state", (size,)
        )
        self.start: int = whole(start, "Automaton: start", 0, size - 1)

    def __call__(self, x: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Compute the log weight (B,) of sequences (B, L)."""
        moves, state = self.moves.to(x.device), torch.full_like(x[:, 0], self.start)
        for tokens in x.unbind(1):
            state = moves[state, tokens]
        return self.log_accept.to(x.device)[state]

    def __repr__(self) -> str:
        return f"Automaton({len(self.moves)} states, {self.moves.shape[1]} tokens)"


class Tilt:
    """Weight W of whole sequences, a product of the given terms.

    Tokens are numbered 0..V-1 in the order of a process's ``data_tokens``. Logs are natural; -inf forbids.

    Args:
        sites: (L, V) log weight of each token at each site.
        pairs: (M, V, V) log weight of tokens at a site (row) and at the next one (column), M = L-1.
        automaton: an ``Automaton`` that reads the sequence from its first site to its last.

    Raises:
        TypeError, ValueError: without any term, for shapes that disagree, NaN or +inf, or for another type of
            automaton.
    """

    def __init__(
        self,
        sites: Float[Tensor, "L V"] | None = None,
        pairs: Float[Tensor, "M V V"] | None = None,
        automaton: Automaton | None = None,
    ) -> None:
        if sites is None and pairs is None and automaton is None:
            raise ValueError("Tilt: give at least one of sites, pairs and automaton")
        if automaton is not None and not isinstance(automaton, Automaton):
            raise TypeError(f"Tilt: automaton must be an Automaton, got {shown(automaton)}")
        self.sites: Tensor | None = None if sites is None else log_weights(sites, "Tilt: sites", "(L, V)")
        self.pairs: Tensor | None = None if pairs is None else log_weights(pairs, "Tilt: pairs", "(L-1, V, V)")
        self.automaton = automaton
        sizes = []
        if self.sites is not None:
            if self.sites.ndim != 2:
                raise ValueError(f"Tilt: sites must be (L, V), got shape {tuple(self.sites.shape)}")
            sizes.append(tuple(self.sites.shape))
        if self.pairs is not None:
            if self.pairs.ndim != 3 or self.pairs.shape[1] != self.pairs.shape[2]:
                raise ValueError(f"Tilt: pairs must be (L-1, V, V), got shape {tuple(self.pairs.shape)}")
            sizes.append((len(self.pairs) + 1, self.pairs.shape[1]))
        if len(set(sizes)) == 2:
            raise ValueError(f"Tilt: sites and pairs disagree in (L, V): {sizes[0]} and {sizes[1]}")
        # an automaton alone is for every length
        self.length: int | None = sizes[0][0] if sizes else None
        tokens = {size for _, size in sizes} | ({automaton.moves.shape[1]} if automaton is not None else set())
        if len(tokens) > 1:
            raise ValueError(f"Tilt: the terms disagree in the number of tokens: {sorted(tokens)}")
        self.alphabet: int = tokens.pop()

    def __call__(self, x: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Compute log W (B,) of sequences (B, L) over 0..V-1.

        Raises:
            ValueError: for sequences of another length.
        """
        if self.length is not None and x.shape[1] != self.length:
            raise ValueError(f"Tilt: x must have length {self.length}, got shape {tuple(x.shape)}")
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if self.sites is not None:
            total = total + self.sites.to(x.device)[torch.arange(x.shape[1]), x].sum(-1)
        if self.pairs is not None:
            total = total + self.pairs.to(x.device)[torch.arange(x.shape[1] - 1), x[:, :-1], x[:, 1:]].sum(-1)
        return total if self.automaton is None else total + self.automaton(x)

    def __repr__(self) -> str:
        given = [name for name in ("sites", "pairs", "automaton") if getattr(self, name) is not None]
        length = "any length" if self.length is None else f"{self.length} sites"
        return f"Tilt({' and '.join(given)}: {self.alphabet} tokens, {length})"


def fitted(log_w: object, alphabet: int, length: int, where: str) -> Tilt:
    """Return a tilt of sequences of this length; an array (L, V) is one of sites.

    Raises:
        TypeError: if it is neither a Tilt nor an array of numbers.
        ValueError: for other shapes, NaN or +inf.
    """
    accepted = f"({length}, {alphabet}) = (L, V), or a Tilt"
    tilt = (
        log_w if isinstance(log_w, Tilt) else Tilt(log_weights(log_w, f"{where}: log_w", accepted, (length, alphabet)))
    )
    if tilt.alphabet != alphabet or tilt.length not in (None, length):
        raise ValueError(f"{where}: log_w must be for {alphabet} tokens and {length} sites, got {tilt}")
    return tilt


def check_sites_only(tilt: Tilt, where: str) -> Float[Tensor, "L V"]:
    """Return the sites' logs (L, V) of a tilt that has no other term.

    Raises:
        ValueError: if it has pairs or an automaton.
    """
    if tilt.sites is None or tilt.pairs is not None or tilt.automaton is not None:
        raise ValueError(f"{where}: log_w must be a product over sites, (L, V) or a Tilt of sites alone; got {tilt}")
    return tilt.sites
