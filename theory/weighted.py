r"""Compute exact predictions for a chain of any weights in the domain of logs, in O(L H^2).

    p0(x) ~ sum_h exp[first(h_1) + sum_i steps_i(h_i, h_{i+1}) + sum_i emission_i(h_i, x_i) + final(h_L)]

The tables are natural logs of weights, which need not be normalised. Messages are logs too, and each is shifted by its
largest entry. So no weight underflows, however unlikely it is at the sites before or behind.

A chain that is tilted by a product over sites, a chain over neighbours or an automaton is such a chain: sites add to
``emission``, neighbours to ``steps``. The automaton's state joins the hidden state, since the token moves it.
"""

from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import affordable, whole
from discdiff.theory.log_sums import LogSums
from discdiff.theory.oracles import Oracle, pick, uniforms
from discdiff.theory.tilt import Automaton, Tilt, fitted, log_weights

__all__ = ["WeightedChain"]


class WeightedChain(Oracle, LogSums):
    """Data law of a chain of weights, which may differ from site to site; exact for thousands of sites.

    Shapes: H hidden states, n tokens, K = L-1 steps. S and T are 1 if all steps, or all sites, have the same table.

    Args:
        first: (H,) log weights of the first hidden state.
        steps: (S, H, H) log weights of a hidden state (row) and the next one (column), with S = 1 or L-1.
        emission: (T, H, n) log weights of a token given its hidden state, with T = 1 or L.
        length: L.
        final: (H,) log weights of the last hidden state; 0 by default.

    Raises:
        TypeError, ValueError: for shapes that disagree, NaN or +inf, or if no sequence has a positive weight.
    """

    def __init__(
        self,
        first: Float[Tensor, " H"],
        steps: Float[Tensor, "S H H"],
        emission: Float[Tensor, "T H n"],
        length: int,
        final: Float[Tensor, " H"] | None = None,
    ) -> None:
        length = whole(length, "WeightedChain: length", 1)
        first, steps, emission = (
            log_weights(x, f"WeightedChain: {name}", "")
            for name, x in (("first", first), ("steps", steps), ("emission", emission))
        )
        size = len(first) if first.ndim == 1 else 0
        right = size > 0 and steps.ndim == emission.ndim == 3 and steps.shape[1:] == (size, size)
        if (
            not right
            or emission.shape[1] != size
            or len(steps) not in (1, length - 1)
            or len(emission) not in (1, length)
        ):
            raise ValueError(
                "WeightedChain: a chain of L sites needs (H,), (1 or L-1, H, H) and (1 or L, H, n), got "
                f"{tuple(first.shape)}, {tuple(steps.shape)}, {tuple(emission.shape)} and L = {length}"
            )
        accepted = f"({size},), one log for a hidden state"
        given = torch.zeros_like(first) if final is None else final
        self.first: Tensor = first
        self.steps: Tensor = steps
        self.emission: Tensor = emission
        self.final: Tensor = log_weights(given, "WeightedChain: final", accepted, (size,))
        self.alphabet: int = emission.shape[2]
        self.length: int = length
        self.log_norm: Tensor = self.log_total(first.new_zeros(1, length, self.alphabet))[0]
        if not bool(self.log_norm > -torch.inf):
            raise ValueError("no sequence of this length has positive probability and a positive weight (Z = 0)")

    # --- sums ---------------------------------------------------------------------------------------------------------

    def log_total(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        seen = self._seen(log_e)
        predicted, scales = _messages(self.first, self._each_step(), seen)
        return (predicted[:, -1] + seen[:, -1] + self.final).logsumexp(-1) + scales.double().sum(-1)

    def log_leave_one_out(self, log_e: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        seen = self._seen(log_e)
        predicted, before = _messages(self.first, self._each_step(), seen)
        backward, behind = self._backward(seen)
        scale = (before.cumsum(-1) + behind.flip(-1).cumsum(-1).flip(-1))[..., None]
        hidden = predicted + backward
        each = ((hidden + self.emission[..., v]).logsumexp(-1) for v in range(self.alphabet))
        return torch.stack(list(each), -1) + scale

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        log_o = self.log_leave_one_out(evidence.log())
        return torch.exp(log_o - _top(log_o))

    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return self.log_total(evidence.log()).double() - self.log_norm.double()

    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        log_e = evidence.log()
        seen = self._seen(log_e)
        filtered = _messages(self.first, self._each_step(), seen)[0] + seen
        u, v = uniforms(2 * self.length, len(evidence), seed, evidence.device).chunk(2)
        hidden = [_picked(filtered[:, -1] + self.final, u[-1])]
        for i, step in reversed(list(enumerate(self._each_step()))):
            hidden.append(_picked(filtered[:, i] + step.T[hidden[-1]], u[i]))
        path = torch.stack(hidden[::-1], 1)
        rows = self.emission.expand(self.length, -1, -1)[torch.arange(self.length, device=path.device), path]
        return _picked((rows + log_e).flatten(0, 1), v.T.flatten()).view(path.shape)

    def _seen(self, log_e: Tensor) -> Float[Tensor, "B L H"]:
        """Compute the log evidence of every hidden state."""
        each = (self.emission[..., v] + log_e[..., v, None] for v in range(self.alphabet))
        return reduce(torch.logaddexp, each)  # one token at a time: temporaries stay below (B, L, H, n)

    def _each_step(self) -> Float[Tensor, "K H H"]:
        return self.steps.expand(self.length - 1, -1, -1) if len(self.steps) == 1 else self.steps

    def _backward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the message from all sites behind each site, and its scales."""
        found, scales = _messages(self.final, self._each_step().flip(0).mT, seen.flip(1))
        return found.flip(1), scales.flip(1)

    def laws(self) -> tuple[Float[Tensor, " H"], Float[Tensor, "K H H"]]:
        """Compute the laws of the hidden chain: (H,) of the first state and (K, H, H) of each step, K = L-1.

        The row of a state of probability 0 is uniform.

        Raises:
            ValueError: if they exceed this machine's memory.
        """
        size, length = len(self.first), self.length
        affordable(length * size**2, f"{length} transition matrices of {size} x {size}")
        seen = self._seen(self.first.new_zeros(1, length, self.alphabet))
        onward = (self._backward(seen)[0] + seen)[0]
        rows = self._each_step() + onward[1:, None]
        possible = rows.amax(-1, keepdim=True) > -torch.inf
        return (self.first + onward[0]).softmax(-1), torch.where(possible, rows, 0.0).softmax(-1)

    # --- tilts --------------------------------------------------------------------------------------------------------

    def tilted(self, log_w: Tilt | Tensor) -> "WeightedChain":
        """Return the law p0 W / Z.

        Args:
            log_w: a ``Tilt``, or the natural logs (L, V) of a product over sites.

        Raises:
            TypeError, ValueError: for another kind, shape, NaN or +inf, or if Z = 0.
        """
        return self._weighed(log_w)

    def _plain(self) -> "WeightedChain":
        return self

    def _weighed(self, log_w: Tilt | Tensor) -> "WeightedChain":
        tilt = fitted(log_w, self.alphabet, self.length, type(self).__name__)
        first, steps, emission, final = (x.double() for x in (self.first, self.steps, self.emission, self.final))
        if tilt.pairs is not None or tilt.automaton is not None:
            first, steps, emission, final, tokens = _shown(first, steps, emission, final)
            if tilt.pairs is not None and self.length > 1:
                steps = steps + tilt.pairs.to(steps)[:, tokens[:, None], tokens]
            if tilt.automaton is not None:
                first, steps, emission, final = _read(tilt.automaton, tokens, first, steps, emission, final)
        if tilt.sites is not None:
            emission = emission + tilt.sites.to(emission)[:, None]
        return WeightedChain(first, steps, emission, self.length, final)


def _top(logs: Tensor) -> Tensor:
    """Return the largest entry along the last axis, which is kept; 0 if all are -inf."""
    top = logs.amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def _picked(logs: Tensor, u: Tensor) -> Tensor:
    return pick(torch.exp(logs - _top(logs)), u)


def _messages(first: Tensor, steps: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log messages m_{i+1} = log sum_h exp(m_i(h) + seen_i(h) + steps_i(h, .)) - s_{i+1} from m_1; s_1 = 0.

    Return the messages (B, L, H) and the shifts s (B, L). The scale of m_i is the sum of s_1..s_i.
    """
    found, shifts = [first.expand(len(seen), -1)], [seen.new_zeros(len(seen), 1)]
    for i, step in enumerate(steps):
        now = found[-1] + seen[:, i]
        shifts.append(_top(now))
        found.append(((now - shifts[-1])[..., None] + step).logsumexp(1))
    return torch.stack(found, 1), torch.cat(shifts, 1)


Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def _shown(
    first: Tensor, steps: Tensor, emission: Tensor, final: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tables of a chain in which each hidden state emits one token, and these tokens (H,).

    If this is not so already, the hidden states become pairs (hidden state, token).
    """
    size, tokens = emission.shape[1:]
    emits = (emission > -torch.inf).any(0)
    if bool((emits.sum(-1) <= 1).all()):
        return first, steps, emission, final, emits.long().argmax(-1)
    affordable(len(steps) * (size * tokens) ** 2, f"a chain of {size} hidden states x {tokens} tokens")
    hidden, token = (x.flatten() for x in torch.meshgrid(torch.arange(size), torch.arange(tokens), indexing="ij"))
    hidden, token = hidden.to(first.device), token.to(first.device)
    own = token[:, None] == torch.arange(tokens, device=token.device)
    emission = emission[:, hidden].masked_fill(~own, -torch.inf)
    return first[hidden], steps[:, hidden[:, None], hidden], emission, final[hidden], token


def _read(
    automaton: Automaton, tokens: Tensor, first: Tensor, steps: Tensor, emission: Tensor, final: Tensor
) -> Tables:
    """Return tables of the chain on pairs (automaton state after the token, hidden state)."""
    moves = automaton.moves.to(tokens.device)
    states, size = len(moves), len(tokens)
    goes = moves[:, tokens]  # (Q, H): the state after the token of a hidden state
    # pairs that some move leads to, and no others: they are often few
    reached = torch.zeros(states, size, dtype=torch.bool, device=tokens.device)
    reached[goes, torch.arange(size, device=tokens.device)] = True
    state, hidden = reached.nonzero(as_tuple=True)
    affordable(len(steps) * len(state) ** 2, f"a chain of {len(state)} pairs (automaton state, hidden state)")
    begins = goes[automaton.start][hidden] == state
    follows = goes[state][:, hidden] == state
    return (
        first[hidden].masked_fill(~begins, -torch.inf),
        steps[:, hidden[:, None], hidden].masked_fill(~follows, -torch.inf),
        emission[:, hidden],
        final[hidden] + automaton.log_accept.to(final)[state],
    )
