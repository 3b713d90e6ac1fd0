r"""Oracles: data laws whose posteriors are known, hence perfect denoisers.

With e_i(v) = q_t(z_i | v) the evidence of site i, everything follows from one sum over clean sequences that leaves
site i's evidence out,

    O_i(v) ~ sum_{x: x_i = v} p0(x) prod_{j != i} e_j(x_j),      D_i(v) ~ O_i(v) e_i(v)
    c_i = O_i Q_t,      r_i(v) = c_i(v) / c_i(z_i)

(~ is "up to a constant in v"). Constants of e_i in v cancel, which is how alpha = 0 is the limit alpha -> 0+.

Oracles are total: where no data agrees with what is conditioned on, the row is uniform.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.denoiser import Denoiser
from discdiff.prediction import Predicts
from discdiff.process import Process

__all__ = ["Oracle"]


class Oracle(ABC):
    """A law of clean sequences over an alphabet 0..n-1, with exact leave-one-out posteriors.

    Attributes:
        alphabet: n, the number of data tokens.
        length: L.
    """

    alphabet: int
    length: int

    @abstractmethod
    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        """O up to a factor for each site, from the evidence; zero rows where no data agrees with the other sites."""

    def denoiser(self, process: Process, predicts: Predicts = "denoiser") -> Denoiser:
        """The exact denoiser of a process, float64, with site-wise times.

        Args:
            process: its data alphabet must have ``alphabet`` tokens.
            predicts: which of the three equivalent predictions it returns.

        Raises:
            ValueError: if the alphabets differ.
        """
        tokens = process.data_tokens
        if len(tokens) != self.alphabet:
            raise ValueError(f"{process} has {len(tokens)} data tokens, the law has {self.alphabet}")

        def exact(x: Int[Tensor, "B L"], alpha: Tensor | None) -> Float[Tensor, "B L W"]:
            assert alpha is not None  # Denoiser passes it, because time="alpha"
            if x.shape[1] != self.length:
                raise ValueError(f"this law is over sequences of length {self.length}, got length {x.shape[1]}")
            site_alpha = (alpha if alpha.ndim == 2 else alpha[:, None]).expand(x.shape)
            evidence = process.evidence(x, site_alpha)
            loo = self.leave_one_out(evidence)
            if predicts == "ratio":
                return self._log_ratio(_normalised(loo), x, site_alpha, process)
            log_p = _normalised(loo if predicts == "loo" else loo * evidence).log()
            columns = tokens.to(x.device).expand(*x.shape, -1)
            return log_p.new_full((*x.shape, process.vocab_size), -torch.inf).scatter(-1, columns, log_p)

        return Denoiser(
            exact, process, predicts, time="alpha", length=self.length, time_dtype=torch.float64, oracle=self
        )

    def _log_ratio(self, loo: Tensor, x: Tensor, alpha: Tensor, process: Process) -> Tensor:
        c = loo.new_zeros(*x.shape, process.states)
        c[..., process.data_tokens.to(x.device)] = alpha[..., None] * loo
        log_c = (c + (1 - alpha)[..., None] * process.pi.to(x.device)).log()
        own = log_c.gather(-1, x[..., None])
        return torch.where(own > -torch.inf, log_c - own, 0.0)


def _normalised(weights: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 1 / weights.shape[-1])
