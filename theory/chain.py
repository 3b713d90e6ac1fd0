r"""A Markov chain as data law: exact predictions by forward-backward messages, O(L V^2), for L in the thousands.

    pred_1 = pi0,   f_i ~ pred_i e_i,   pred_{i+1} = f_i A
    b_L = 1,        b_i = A (e_{i+1} b_{i+1})
    O_i ~ pred_i b_i

Messages are normalised at every site, so nothing underflows; O needs no division by the evidence, which may be 0.
Reference: Rabiner (1989).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.process import Process
from discdiff.theory.oracle import Oracle

__all__ = ["MarkovChain"]


class MarkovChain(Oracle):
    """p0(x) = initial(x_1) prod_i transition(x_i, x_{i+1}).

    Args:
        initial: (V,) law of the first token.
        transition: (V, V), row = token, column = the next.
        length: L.

    Raises:
        ValueError: if they are not laws, or shapes disagree.
    """

    def __init__(self, initial: Float[Tensor, " V"], transition: Float[Tensor, "V V"], length: int) -> None:
        initial = torch.as_tensor(initial, dtype=torch.float64)
        transition = torch.as_tensor(transition, dtype=torch.float64)
        if initial.ndim != 1 or transition.shape != (len(initial), len(initial)):
            raise ValueError(f"a chain needs (V,) and (V, V), got {tuple(initial.shape)} and {tuple(transition.shape)}")
        for name, rows in (("initial", initial[None]), ("transition", transition)):
            if not bool((rows >= 0).all()) or not bool(((rows.sum(-1) - 1).abs() < 1e-6).all()):
                raise ValueError(f"{name} must hold probabilities that sum to 1 in each row")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.initial = initial / initial.sum()
        self.transition = transition / transition.sum(-1, keepdim=True)
        self.alphabet, self.length = len(initial), length

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        predicted, _ = self._forward(evidence)
        backward = torch.ones_like(predicted)
        transposed = self.transition.T.contiguous()
        for i in reversed(range(self.length - 1)):
            backward[:, i] = _scaled((evidence[:, i + 1] * backward[:, i + 1]) @ transposed)[0]
        return predicted * backward

    def _forward(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """pred_i for every site, zero once the evidence contradicts the chain, and log sum_x p0(x) prod e_i(x_i)."""
        predicted = evidence.new_empty(evidence.shape)
        predicted[:, 0] = self.initial
        log_total = evidence.new_zeros(len(evidence))
        for i in range(self.length):
            filtered, scale = _scaled(predicted[:, i] * evidence[:, i])
            log_total += scale.log()
            if i + 1 < self.length:
                predicted[:, i + 1] = filtered @ self.transition
        return predicted, log_total

    def log_marginal(self, process: Process, z: Int[Tensor, "B L"], t: float) -> Float[Tensor, " B"]:
        """log p_t(z) of noisy sequences, natural log."""
        process.check_states(z, "z")
        q = process.kernel(t)[process.data_tokens]  # (n, S)
        return self._forward(q.T[z])[1]

    def log_prob(self, x: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """log p0(x) of clean sequences, natural log.

        Raises:
            ValueError: for another length, or ids outside the alphabet.
        """
        if x.ndim != 2 or x.shape[1] != self.length or bool(((x < 0) | (x >= self.alphabet)).any()):
            raise ValueError(f"x must be (B, {self.length}) tokens in 0..{self.alphabet - 1}, got {tuple(x.shape)}")
        return self.initial.log()[x[:, 0]] + self.transition.log()[x[:, :-1], x[:, 1:]].sum(-1)

    def sample(self, batch: int, seed: int) -> Int[Tensor, "B L"]:
        """Exact draws of clean sequences."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(self.length, batch, 1, generator=generator, dtype=torch.float64)
        first, following = self.initial.cumsum(0), self.transition.cumsum(-1)
        tokens = [torch.searchsorted(first[:-1], u[0, :, 0], right=True)]
        for i in range(1, self.length):
            tokens.append((following[tokens[-1], :-1] <= u[i]).sum(-1))
        return torch.stack(tokens, 1)


def _scaled(message: Float[Tensor, "B V"]) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"]]:
    """A message with sum 1 and the sum it had; a zero message stays zero."""
    total = message.sum(-1)
    return message / total.masked_fill(total == 0, 1)[:, None], total
