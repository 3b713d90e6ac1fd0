r"""Base class of oracles: data laws with known posteriors, hence exact denoisers.

Let e_i(v) = q_t(z_i | v) be the evidence of site i for token v. All predictions follow from one sum over clean
sequences x, which leaves out the evidence of site i:

    O_i(v) ~ sum_{x: x_i = v} p0(x) prod_{j != i} e_j(x_j),      D_i(v) ~ O_i(v) e_i(v)
    c_i = O_i Q_t,      r_i(v) = c_i(v) / c_i(z_i)

O is the leave-one-out prediction, D the denoiser, c the conditional, r the ratio, and ~ is "up to a constant in v".
Factors of e_i that are constant in v cancel, so alpha = 0 is the limit alpha -> 0+. If no clean sequence agrees with
the noisy one, the prediction is uniform.

A *tilt* W(x) >= 0 of clean sequences gives the law p0 W / Z with Z = E[W]. Its leave-one-out prediction O' follows from
that of p0 in two ways (Doob's transform):

    h(z) = E[W(x0) | z_t = z],      c'_i(v) ~ c_i(v) h(z with z_i = v)
    g_i(v) = E[W(x0) | z without site i, x0_i = v],      O'_i(v) ~ O_i(v) g_i(v)
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, affordable, placed, shown, whole
from discdiff.denoiser import Denoiser
from discdiff.prediction import Predicts, check_predicts
from discdiff.process import Process, Time, require_process, site_time
from discdiff.theory.log_sums import LogSums, over
from discdiff.theory.tilt import Tilt

__all__ = ["Oracle", "check_rows", "pick", "scaled", "uniforms"]

Law = TypeVar("Law", bound="Oracle")
LogH = Callable[[Int[Tensor, "N L"], Time], Float[Tensor, " N"]]
LogClean = Callable[[Int[Tensor, "N L"], Time], Float[Tensor, "N L V"]]


class Oracle(ABC):
    """Law of clean sequences over an alphabet 0..n-1, with exact leave-one-out predictions.

    The evidence gives a weight for every token at every site. A subclass sums over sequences with these weights, and
    draws from the weighted law. Its tables are tensor attributes; ``to`` moves them.

    Shapes: evidence and O (B, L, n), sequences (B, L), log-probabilities (B,).

    Attributes:
        alphabet: n, the number of data tokens.
        length: L.
    """

    alphabet: int
    length: int

    @abstractmethod
    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        """Compute the leave-one-out O from the evidence, up to a factor for each site.

        O is 0 at a site if no data sequence agrees with the evidence at the other sites.
        """

    @abstractmethod
    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        """Compute log sum_x p0(x) prod_i e_i(x_i) from the evidence e, natural log; -inf if the sum is 0."""

    @abstractmethod
    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        """Draw exactly from the law proportional to p0(x) prod_i e_i(x_i), with evidence e."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alphabet} tokens, {self.length} sites)"

    # --- methods that follow from the three ---------------------------------------------------------------------------

    def denoiser(self, process: Process, predicts: Predicts | None = None) -> Denoiser:
        """Return the exact denoiser for a process, in the dtype of the oracle's tables.

        Each site may have its own time.

        Args:
            process: its data alphabet must have ``alphabet`` tokens.
            predicts: which prediction it returns, "loo", "denoiser" or "ratio". The default is "denoiser" on an
                absorbing process, because there the denoiser of a revealed token does not determine its leave-one-out
                prediction. On other processes it is "loo".

        Raises:
            TypeError, ValueError: if ``process`` is not a Process, or has another number of data tokens.
        """
        self._check(process)
        if predicts is None:
            predicts = "denoiser" if process.absorbing else "loo"
        check_predicts(predicts)
        tokens = process.data_tokens

        def exact(x: Int[Tensor, "B L"], alpha: Tensor | None) -> Float[Tensor, "B L W"]:
            assert alpha is not None  # Denoiser passes it, because time="alpha"
            if x.shape[1] != self.length:
                raise ValueError(f"this law is over sequences of length {self.length}, got length {x.shape[1]}")
            site_alpha = (alpha if alpha.ndim == 2 else alpha[:, None]).expand(x.shape)
            evidence = process.evidence(x, site_alpha).to(self._like())
            loo = self.given(process, x).leave_one_out(evidence)
            weights = _normalised(loo * evidence if predicts == "denoiser" else loo)
            columns = tokens.to(x.device).expand(*x.shape, -1)
            log_p = weights.new_full((*x.shape, process.vocab_size), -torch.inf).scatter(-1, columns, weights.log())
            if predicts != "ratio":
                return log_p
            rows = process.conditional(log_p.flatten(0, 1).double(), x.flatten(), site_alpha.flatten())
            log_c = rows.unflatten(0, tuple(x.shape))
            own = log_c.gather(-1, process.column(x)[..., None])
            return torch.where(own > -torch.inf, log_c - own, 0.0).to(weights)

        return Denoiser(
            exact, process, predicts, time="alpha", length=self.length, time_dtype=torch.float64, oracle=self
        )

    def given(self, process: Process, x: Int[Tensor, "B L"]) -> "Oracle":
        """Return the law of the clean sequences from which rows of states came.

        By default it is the oracle itself, whatever the states. A ``Coupling`` returns the law given the source tokens
        in each row.
        """
        return self

    def log_marginal(self, process: Process, z: Int[Tensor, "B L"], t: float) -> Float[Tensor, " B"]:
        """Compute log p_t(z) of noisy sequences, natural log.

        Raises:
            TypeError, ValueError: for a process with another number of data tokens, or states or a time out of range.
        """
        self._check_noisy(process, z)
        return self.log_evidence(process.marginals(t).to(self._like()).T[z])

    def posterior(self, process: Process, z: Int[Tensor, "B L"], t: Time, seed: int) -> Int[Tensor, "B L"]:
        """Draw x0 exactly from p(x0 | z_t = z), jointly over the sites, one draw for each noisy sequence.

        Raises:
            TypeError, ValueError: for states, a time or a seed out of range.
        """
        self._check_noisy(process, z)
        seed, alpha = whole(seed, "posterior: seed", 0, LAST_SEED), process.schedule.alpha(site_time(t, *z.shape))
        evidence = process.evidence(z, alpha.expand(z.shape)).to(self._like())
        return process.data_tokens.to(z.device)[self.given(process, z).draw(evidence, seed)]

    def log_prob(self, x: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Compute log p0(x) of clean sequences, natural log.

        Raises:
            ValueError: for sequences of another length, or ids outside the alphabet.
        """
        self._check_clean(x)
        return self.log_evidence(torch.nn.functional.one_hot(x, self.alphabet).to(self._like()))

    def sample(self, batch: int, seed: int) -> Int[Tensor, "B L"]:
        """Draw clean sequences exactly from p0.

        Raises:
            TypeError, ValueError: for a batch or seed out of range, or more rows than memory holds.
        """
        like, batch, seed = self._like(), whole(batch, "sample: batch", 1), whole(seed, "sample: seed", 0, LAST_SEED)
        affordable(
            batch * self.length * self.alphabet, f"sample: {batch} rows of {self.length} x {self.alphabet} weights"
        )
        return self.draw(torch.ones(batch, self.length, self.alphabet, dtype=like.dtype, device=like.device), seed)

    def to(self: Law, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Law:
        """Return the same law with its tables on another device or in another floating dtype.

        Raises:
            TypeError, ValueError: for a dtype that is not floating, or a device that this machine does not have.
        """
        device = None if device is None else placed(device, "to: device")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"to: dtype must be a floating torch dtype, got {dtype!r}")
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.to(device, dtype if value.is_floating_point() else None))
            elif isinstance(value, Oracle):
                setattr(other, name, value.to(device, dtype))
        return other

    # --- tilts --------------------------------------------------------------------------------------------------------

    def tilted(self, log_w: Tilt | Tensor) -> "Oracle":
        """Return the law p0 W / Z; a subclass says which tilts W it accepts.

        Raises:
            TypeError: for an oracle without exact tilts.
        """
        raise TypeError(f"{self} has no exact tilts; an Enumeration, a chain, a mixture or a Tree has")

    def log_h(self, process: Process, log_w: Tilt | Tensor) -> LogH:
        r"""Return the function log h_t(x) = log E[W(x0) | z_t = x], natural log, exact.

        It takes noisy states x, (N, L), and a time: a float, (N,) or (N, L). It returns (N,) float64. The scale of W is
        kept: log h is log W at time 0, and log Z where x tells nothing of the data. It is -inf where E[W | x] = 0, and
        also where no data can become x (see ``Enumeration.reachable``). So c(v) h(z with z_i = v) is 0 at neighbours
        that c excludes. As in all of this module, alpha = 0 is the limit alpha -> 0+.

        Args:
            process: its data alphabet must have ``alphabet`` tokens.
            log_w: the tilt, as in ``tilted``.

        Raises:
            TypeError, ValueError: for a tilt that ``tilted`` refuses, or a process with another number of data tokens.
                The function raises them for states or times out of range.
        """
        self._check(process)
        plain, weighed = self._plain(), self._weighed(log_w)

        def log_h(x: Int[Tensor, "N L"], t: Time) -> Float[Tensor, " N"]:
            log_e = self._log_evidence_of(process, x, t)
            return over(weighed.log_total(log_e), plain.log_total(log_e))

        return log_h

    def log_clean(self, process: Process, log_w: Tilt | Tensor) -> LogClean:
        r"""Return the function log g_i(v) = log E[W(x0) | z_t = x at the other sites, x0_i = v], natural log, exact.

        It takes noisy states x, (N, L), and a time as ``log_h`` does, and returns (N, L, V) float64. The values of all
        sites come from one pass, where ``log_h`` needs all neighbours. It is -inf for tokens that are no data, where
        E = 0, and where no data agrees with the condition.

        Args:
            process: its data alphabet must have ``alphabet`` tokens.
            log_w: the tilt, as in ``tilted``.

        Raises:
            TypeError, ValueError: as in ``log_h``.
        """
        self._check(process)
        plain, weighed = self._plain(), self._weighed(log_w)

        def log_clean(x: Int[Tensor, "N L"], t: Time) -> Float[Tensor, "N L V"]:
            log_e = self._log_evidence_of(process, x, t)
            log_g = over(weighed.log_leave_one_out(log_e), plain.log_leave_one_out(log_e))
            columns = process.data_tokens.to(x.device).expand(*x.shape, -1)
            return log_g.new_full((*x.shape, process.vocab_size), -torch.inf).scatter(-1, columns, log_g)

        return log_clean

    def _plain(self) -> LogSums:
        """Return the weights p0, up to a factor."""
        raise TypeError(f"{self} has no exact tilts; an Enumeration, a chain, a mixture or a Tree has")

    def _weighed(self, log_w: Tilt | Tensor) -> LogSums:
        """Return the weights p0 W, up to the same factor as ``_plain``."""
        raise TypeError(f"{self} has no exact tilts; an Enumeration, a chain, a mixture or a Tree has")

    def _log_evidence_of(self, process: Process, x: Tensor, t: Time) -> Float[Tensor, "N L n"]:
        self._check_noisy(process, x, "x")
        alpha = process.schedule.alpha(site_time(t, *x.shape)).to(x.device)
        return process.evidence(x, alpha.expand(x.shape)).double().log()

    def _like(self) -> Tensor:
        """Return one of the tables, for its dtype and device."""
        return next(v for v in vars(self).values() if isinstance(v, Tensor) and v.is_floating_point())

    def _check_clean(self, x: Tensor) -> None:
        good = isinstance(x, Tensor) and x.dtype == torch.int64 and x.ndim == 2 and x.shape[1] == self.length
        if not good or bool(((x < 0) | (x >= self.alphabet)).any()):
            got = f"{x.dtype} of {tuple(x.shape)}" if isinstance(x, Tensor) else shown(x)
            raise ValueError(f"x must be (B, {self.length}) int64 tokens in 0..{self.alphabet - 1}, got {got}")

    def _check_noisy(self, process: Process, z: Tensor, name: str = "z") -> None:
        self._check(process)
        process.check_states(z, name)
        if z.shape[1] != self.length:
            raise ValueError(f"{name}: this law is over sequences of length {self.length}, got length {z.shape[1]}")

    def _check(self, process: Process) -> None:
        require_process(process, "oracle")
        if len(process.data_tokens) != self.alphabet:
            raise ValueError(f"{process} has {len(process.data_tokens)} data tokens, the law has {self.alphabet}")


def check_rows(**laws: Tensor) -> None:
    """Raise ValueError with a tensor's name unless its entries are probabilities that sum to 1 along the last axis."""
    for name, rows in laws.items():
        if not bool((rows >= 0).all()) or not bool(((rows.sum(-1) - 1).abs() < 1e-6).all()):
            least, sums = float(rows.min()), rows.sum(-1)
            raise ValueError(
                f"{name} must hold probabilities that sum to 1 in each row; its least entry is {least:.6g}, and its "
                f"rows sum to {float(sums.min()):.6g} to {float(sums.max()):.6g}"
            )


def _normalised(weights: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 1 / weights.shape[-1])


def scaled(message: Float[Tensor, "B n"]) -> tuple[Float[Tensor, "B n"], Float[Tensor, " B"]]:
    """Return the message (B, n) divided by its sum (B,), and the sum; a zero message stays zero."""
    total = message.sum(-1)
    return message / total.masked_fill(total == 0, 1)[:, None], total


def uniforms(length: int, batch: int, seed: int, device: torch.device) -> Float[Tensor, "L B"]:
    """Draw uniform numbers (L, B) in [0, 1) from a seed, the same on every device."""
    return torch.rand(length, batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def pick(weights: Float[Tensor, "B n"], u: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Choose an index in each row of (B, n) with probability proportional to its weights, by uniform numbers (B,).

    The weights of a row must not all be zero.
    """
    running = weights.double().cumsum(-1)
    index = (running <= u[:, None] * running[:, -1:]).sum(-1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding must not pick a weight of 0 after it
    return torch.minimum(index, last)
