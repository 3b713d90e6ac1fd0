r"""Processes with any generator: q_{t|s} = exp(sigma Q) with sigma = log(alpha_s / alpha_t).

At alpha = 0 the kernel is the stationary law of Q, which is also the prior. The exponential is computed in one of three
ways. If Q is sparse or sigma lambda <= 1, it is computed by uniformization, which only multiplies:

    rows exp(sigma Q) = sum_k Poisson(k; sigma lambda) rows (I + Q / lambda)^k,      lambda = max_x |Q(x, x)|

Otherwise a reversible Q is diagonalised; it is symmetrised first, so the eigenvectors are orthogonal. Any other Q takes
one dense exponential for each distinct sigma.

If Q depends on time and does not commute with itself, the kernel is an ordered product of exponentials. The exponential
of the integral of Q would be a different kernel.

References: Campbell et al., 2022, https://arxiv.org/abs/2205.14987; D3PM (Austin et al., 2021,
https://arxiv.org/abs/2107.03006) for the discretised Gaussian.
"""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import affordable, array, extent, real, shown, whole
from discdiff.choices import PointMixture
from discdiff.kernels import dispatch as kernels
from discdiff.process.base import Process
from discdiff.process.schedule import Schedule
from discdiff.process.survivals import Survival

__all__ = ["General", "Ordinal", "TimeVarying", "check_generator", "stationary"]


def check_generator(generator: object, name: str) -> Float[Tensor, "S S"]:
    """Check a generator and return it as a float64 tensor (S, S), dense or sparse.

    Raises:
        ValueError: if it is not square, a rate is negative or not finite, or a row does not sum to 0; the error names
            the entry.
    """
    q = array(generator, name).double()
    if q.ndim != 2 or q.shape[0] != q.shape[1] or not len(q):
        raise ValueError(f"{name}: a generator is a square matrix of rates, got shape {tuple(q.shape)}")
    entries = q.to_sparse_coo().coalesce()
    row, column = entries.indices()
    wrong = ~((entries.values() >= 0) | (row == column)) | ~torch.isfinite(entries.values())
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: rates must be finite and not negative, got {float(entries.values()[k]):g} "
            f"from state {int(row[k])} to {int(column[k])}"
        )
    sums = torch.zeros(len(q), dtype=torch.float64).index_add(0, row, entries.values())
    scale = torch.zeros(len(q), dtype=torch.float64).index_add(0, row, entries.values().abs())
    if bool((sums.abs() > 1e-9 * (1 + scale)).any()):
        k = int((sums.abs() - 1e-9 * scale).argmax())
        raise ValueError(f"{name}: rows of a generator sum to 0, but row {k} sums to {float(sums[k]):g}")
    return q


def stationary(q: Float[Tensor, "S S"], name: str) -> Float[Tensor, " S"]:
    """Return the stationary law (S,) of a generator (S, S).

    Raises:
        ValueError: if there are several stationary laws, or if the iteration for a sparse generator does not converge
            in 200,000 multiplications.
    """
    if not q.is_sparse:
        _, values, rows = torch.linalg.svd(q.T)
        if len(q) > 1 and float(values[-2]) <= 1e-10 * float(values[0]):
            raise ValueError(f"{name}: this generator has more than one stationary law, so noise has no limit")
        law = rows[-1].abs()
        law = torch.where(law > 1e-14 * law.max(), law, 0.0)
        return law / law.sum()
    step = q.T.coalesce() / (1.1 * float(_exit(q)))
    law = torch.full((len(q), 1), 1 / len(q), dtype=torch.float64)
    for _ in range(200_000):
        change = torch.sparse.mm(step, law)
        law = law + change
        if float(change.abs().sum()) < 1e-15:
            return law[:, 0] / law.sum()
    raise ValueError(f"{name}: the stationary law of this sparse generator was not found; it mixes too slowly")


def _exit(q: Tensor) -> Tensor:
    """Return the largest rate of leaving a state."""
    entries = q.to_sparse_coo().coalesce()
    row, column = entries.indices()
    return torch.cat([entries.values()[row == column].neg(), torch.full((1,), 1e-300, dtype=torch.float64)]).max()


class General(Process):
    """Process with any constant generator Q; the schedule sets its speed: Q_t = beta(t) Q.

    Every one of the S states is a token, except the mask.

    Args:
        generator: (S, S) rates, row = old state, column = new state; rows sum to 0. Dense, or sparse COO for a large S.
        schedule: the noise schedule. q_{t|s} = exp(sigma Q) with sigma = log(alpha_s / alpha_t).
        mask_id: the state of the mask, which data never hold, or None.

    Raises:
        ValueError: if ``generator`` has a negative rate or a row that does not sum to 0, or several stationary laws.
    """

    def __init__(
        self,
        generator: Float[Tensor, "S S"],
        schedule: Schedule | Callable[[Tensor], Tensor],
        mask_id: SupportsIndex | None = None,
    ) -> None:
        name = type(self).__name__
        self._q = check_generator(generator, name)
        super().__init__(len(self._q), schedule)
        self.mask_id: int | None = None if mask_id is None else whole(mask_id, f"{name}: mask_id", 0, len(self._q) - 1)
        self.pi: Tensor = stationary(self._q, name)
        self._basis = None if self._q.is_sparse else _eigenbasis(self._q, self.pi)
        entries = self._q.to_sparse_coo().coalesce()
        self._digest = hashlib.sha256(
            entries.indices().numpy().tobytes() + entries.values().numpy().tobytes()
        ).hexdigest()

    @property
    def states(self) -> int:
        return len(self._q)

    def generator(self, alpha: float) -> Float[Tensor, "S S"]:
        return self._q.to_dense()

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> PointMixture:
        return PointMixture(self.pi, [], [], shape=extent(batch, length), device=device)

    def transition(self, alpha_t: float, alpha_s: float) -> Float[Tensor, "S S"]:
        a_t, a_s = (torch.full((self.states,), a, dtype=torch.float64) for a in (alpha_t, alpha_s))
        return self.propagate(torch.eye(self.states, dtype=torch.float64), a_t, a_s)

    def propagate(
        self,
        rows: Float[Tensor, "N S"],
        alpha_t: Float[Tensor, " N"],
        alpha_s: Float[Tensor, " N"],
        backward: bool = False,
    ) -> Float[Tensor, "N S"]:
        """Return rows @ exp(sigma Q), or with ``backward`` rows @ exp(sigma Q)^T; sigma = log(alpha_s / alpha_t)."""
        sigma = torch.where(alpha_s > 0, kernels.log(alpha_s) - kernels.log(alpha_t), 0.0)[:, None]
        pi = self.pi.to(rows)
        limit = (rows @ pi)[:, None].expand_as(rows) if backward else rows.sum(-1, keepdim=True) * pi
        finite = torch.where(sigma == torch.inf, 0.0, sigma)
        moved = self._exponential(rows, finite.detach(), backward)
        if finite.requires_grad:  # d exp(sigma Q) = exp(sigma Q) Q dsigma
            q = self._q.to(rows.device)
            moved = moved + (finite - finite.detach()) * ((q if backward else q.T) @ moved.T).T
        return torch.where(sigma == torch.inf, limit, torch.where(sigma == 0, rows, moved))

    def conditional_to_loo(
        self, c: Float[Tensor, "N C"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]
    ) -> Float[Tensor, "N V"]:
        o = super().conditional_to_loo(c, x, alpha.detach())
        if torch.is_grad_enabled() and alpha.requires_grad and len(c):  # one matrix for each row
            tokens = self.data_tokens.to(c.device)
            at = alpha.repeat_interleave(len(tokens))
            moved = self.propagate(self._one_hot(tokens).repeat(len(c), 1), at, torch.ones_like(at))
            solved = torch.linalg.lstsq(moved.unflatten(0, (len(c), -1)).mT.to(c), c[..., None]).solution[..., 0]
            o = kernels.graft(o, torch.zeros_like(o).index_copy(-1, tokens, solved.clamp(min=0)))
        return o

    def inflow(self, x: Int[Tensor, "B L"], alpha: Survival) -> Float[Tensor, "B L S"]:
        """Return the rates Q(v, x_i) from all states v to each site's state, (B, L, S); ignore the entry v = x_i."""
        return self._q.to_dense().to(x.device)[:, x].movedim(0, -1)

    def _exponential(self, rows: Tensor, sigma: Tensor, backward: bool) -> Tensor:
        near = sigma * _exit(self._q) <= 1
        if self._q.is_sparse:
            return _uniformization(self._q.to(rows.device), rows, sigma, backward)
        if bool(near.any()):  # at short times dense methods lose small entries; uniformization adds positive terms
            close = _uniformization(self._q.to(rows.device), rows, torch.where(near, sigma, 0.0), backward)
            return close if bool(near.all()) else torch.where(near, close, self._far(rows, sigma, backward))
        return self._far(rows, sigma, backward)

    def _far(self, rows: Tensor, sigma: Tensor, backward: bool) -> Tensor:
        if self._basis is not None:
            values, into, out = (x.to(rows.device) for x in self._basis)
            if backward:
                into, out = out.T, into.T
            return ((rows @ into) * torch.exp(values * sigma)) @ out

        def apply(rows: Tensor, sigma: float) -> Tensor:
            matrix = self._matrix(sigma).to(rows)
            return rows @ (matrix.T if backward else matrix)

        return self._by_alpha(rows, sigma[:, 0], apply)

    def _matrix(self, sigma: float) -> Tensor:
        return _exponentiated(self, sigma)

    def with_schedule(self, schedule: Schedule) -> "General":
        return General(self._q, schedule, self.mask_id)

    def _identity(self) -> tuple[object, ...]:
        return self._digest, self.mask_id, self.schedule

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.states} states, {self.schedule})"


@lru_cache(maxsize=256)
def _exponentiated(process: General, sigma: float) -> Tensor:
    return _expm(process.generator(1.0) * sigma)


def _expm(matrix: Float[Tensor, "*N S S"]) -> Float[Tensor, "*N S S"]:
    """Compute the exponential with scipy: torch's is off by 1e-11 at norms near 0.02 (torch 2.13, float64)."""
    from scipy import linalg  # imported on use: it takes half a second

    return torch.as_tensor(linalg.expm(matrix.cpu().numpy())).clamp(min=0)


def _eigenbasis(q: Tensor, pi: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return eigenvalues and both bases of Q from D^{1/2} Q D^{-1/2}, D = diag(pi); None if Q is not reversible."""
    flux = pi[:, None] * q
    if bool((pi < 1e-6 * pi.max()).any()) or not torch.allclose(
        flux, flux.T, rtol=0, atol=1e-14 * float(flux.abs().max())
    ):
        return None
    root = pi.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * q / root)
    return values.clamp(max=0), vectors / root[:, None], vectors.T * root


def _uniformization(q: Tensor, rows: Tensor, sigma: Tensor, backward: bool) -> Tensor:
    rate = float(_exit(q))
    step = q if backward else q.T
    step = step.coalesce() if q.is_sparse else step
    mean = sigma * rate
    most = float(mean.max()) if mean.numel() else 0.0
    terms = int(most + 12 * math.sqrt(most) + 40)  # the Poisson tail beyond is under 1e-20
    total, power = torch.zeros_like(rows), rows
    for k in range(terms + 1):
        weight = torch.exp(torch.xlogy(torch.tensor(float(k)).to(mean), mean) - mean - math.lgamma(k + 1))
        total = total + weight * power
        power = power + (step @ power.T).T / rate
    return total.clamp(min=0)


class Ordinal(General):
    r"""Process on ordered tokens that jumps from v to v + 1 or v - 1 and is reversible, with stationary law pi:

        Q(v, v +- 1) ~ min(1, pi(v +- 1) / pi(v))

    Q is scaled so that its slowest mode decays exactly as alpha_{t|s}. If pi is uniform, the process is the
    reflecting walk, with eigenvectors cos(180 deg k (v + 1/2) / V). ``Ordinal.gaussian`` is the discretised Gaussian
    (D3PM, Austin et al., 2021; Campbell et al., 2022).

    Args:
        vocab_size: V, at least 2.
        schedule: the noise schedule.
        pi: (V,) the noise law up to a factor, everywhere positive; uniform by default.

    Raises:
        ValueError: if an entry of ``pi`` is not positive and finite, or its size is not V.
    """

    def __init__(
        self,
        vocab_size: SupportsIndex,
        schedule: Schedule | Callable[[Tensor], Tensor],
        pi: Float[Tensor, " V"] | None = None,
    ) -> None:
        vocab_size = whole(vocab_size, "Ordinal: vocab_size", 2)
        affordable(vocab_size**2, f"Ordinal: a generator of {vocab_size} tokens")
        law = torch.full((vocab_size,), 1 / vocab_size) if pi is None else array(pi, "Ordinal: pi")
        law = law.double()
        if law.shape != (vocab_size,) or not bool(((law > 0) & (law < torch.inf)).all()):
            raise ValueError(f"Ordinal: pi must hold {vocab_size} positive probabilities, got {shown(pi)}")
        up = torch.minimum(torch.ones(()), law[1:] / law[:-1])
        down = torch.minimum(torch.ones(()), law[:-1] / law[1:])
        q = torch.diag(up, 1) + torch.diag(down, -1)
        q = q - torch.diag(q.sum(-1))
        root = (law / law.sum()).sqrt()
        gap = -torch.linalg.eigvalsh(root[:, None] * q / root)[-2]
        super().__init__(q / gap, schedule)
        self._law = None if pi is None else law

    @classmethod
    def gaussian(
        cls, vocab_size: SupportsIndex, schedule: Schedule | Callable[[Tensor], Tensor], std: float
    ) -> "Ordinal":
        """Make the process whose noise law is a Gaussian around the middle token, cut to the tokens 0..V-1.

        ``std`` is its standard deviation in tokens.

        Raises:
            TypeError, ValueError: if the vocabulary is below 2 or too large for memory, or ``std`` is not positive.
        """
        vocab_size = whole(vocab_size, "Ordinal.gaussian: vocab_size", 2)
        std = real(std, "Ordinal.gaussian: std", "(0, inf)")
        affordable(vocab_size**2, f"Ordinal.gaussian: a generator of {vocab_size} tokens")
        v = torch.arange(vocab_size, dtype=torch.float64) - (vocab_size - 1) / 2
        return cls(vocab_size, schedule, torch.softmax(-(v**2) / (2 * std**2), 0))

    def with_schedule(self, schedule: Schedule) -> "Ordinal":
        return Ordinal(self.vocab_size, schedule, self._law)

    def __repr__(self) -> str:
        return f"Ordinal({self.vocab_size}, {self.schedule}{'' if self._law is None else ', pi'})"


class TimeVarying(Process):
    r"""Process whose generator changes with time and need not commute with itself: Q_t = beta(t) Q(t).

    [0, 1] is divided into ``pieces`` equal parts; on each, Q is constant, with its value at the midpoint. q_{t|s} is
    the ordered product of exponentials, exact for constant parts. The total noise must be finite, so alpha(1) > 0.

    Args:
        generator: t -> (S, S) rates.
        schedule: the noise schedule, with alpha(1) > 0, such as ``LogLinear``.
        pieces: the number of parts of [0, 1].

    Raises:
        TypeError: if ``generator`` is not a function, or ``pieces`` is not a whole number.
        ValueError: if a matrix at a midpoint is not a generator, if ``pieces`` is below 1, or if the schedule has
            alpha(1) = 0, is learned or differs among positions.
    """

    def __init__(
        self,
        generator: Callable[[float], Float[Tensor, "S S"]],
        schedule: Schedule | Callable[[Tensor], Tensor],
        pieces: SupportsIndex = 64,
    ) -> None:
        pieces = whole(pieces, "TimeVarying: pieces", 1, 1 << 20)
        if not callable(generator):
            raise TypeError(f"TimeVarying: generator must be a function of time, t -> (S, S), got {shown(generator)}")
        middles = [(k + 0.5) / pieces for k in range(pieces)]
        self._function = generator
        self._q = torch.stack([check_generator(generator(t), f"TimeVarying at t = {t:g}") for t in middles])
        super().__init__(self._q.shape[-1], schedule)
        edges = torch.linspace(0, 1, pieces + 1, dtype=torch.float64)
        if self.schedule.sites is not None:
            raise ValueError(f"TimeVarying: needs one clock for all positions, got {self.schedule}")
        alpha = self.schedule.alpha(edges)
        if alpha.requires_grad:
            raise ValueError("TimeVarying: its pieces are parts of time, so its clock cannot be learned")
        if not float(alpha[-1]) > 0:
            raise ValueError(
                "TimeVarying: an ordered product needs finite total noise; use a schedule with alpha(1) > 0"
            )
        self._edges = -alpha.log()  # in units of sigma
        self._products: dict[tuple[float, float], Tensor] = {}

    @property
    def states(self) -> int:
        return self._q.shape[-1]

    def generator(self, alpha: float) -> Float[Tensor, "S S"]:
        piece = int(torch.searchsorted(self._edges, torch.tensor(-math.log(alpha)).double()).clamp(1, len(self._q)))
        return self._q[piece - 1]

    def transition(self, alpha_t: float, alpha_s: float) -> Float[Tensor, "S S"]:
        """Return q_{t|s}, (S, S), the product over pieces of constant rates; raises ValueError at alpha_t = 0."""
        if alpha_t <= 0:
            raise ValueError("TimeVarying: alpha = 0 is never reached")
        if (alpha_t, alpha_s) not in self._products:
            low, high = -math.log(alpha_s), -math.log(alpha_t)
            spent = (self._edges[1:].clamp(low, high) - self._edges[:-1].clamp(low, high)).clamp(min=0)
            product = torch.eye(self.states, dtype=torch.float64)
            for factor in _expm(self._q[spent > 0] * spent[spent > 0][:, None, None]):
                product = product @ factor
            if len(self._products) > 256:
                self._products.clear()
            self._products[alpha_t, alpha_s] = product.clamp(min=0)
        return self._products[alpha_t, alpha_s]

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> PointMixture:
        """Return the mean over data tokens v of q_1(. | v); these laws hardly differ if alpha(1) is small."""
        law = self.kernel(1.0)[self.data_tokens].mean(0)
        return PointMixture(law / law.sum(), [], [], shape=extent(batch, length), device=device)

    def with_schedule(self, schedule: Schedule) -> "TimeVarying":
        return TimeVarying(self._function, schedule, len(self._q))

    def _identity(self) -> tuple[object, ...]:
        return self._function, len(self._q), self.schedule

    def __repr__(self) -> str:
        return f"TimeVarying({self.states} states, {self.schedule}, pieces={len(self._q)})"
