r"""Forward processes: a continuous-time Markov chain on one site, applied to every site independently.

All laws follow from the transition matrix q_{t|s} on S states. O is the leave-one-out prediction, D the denoiser:

    q_t(z | x)       = q_{t|0}(z | x)
    q(x_s | x_t, x0) = q_{t|s}(x_t | x_s) q_s(x_s | x0) / q_t(x_t | x0)
    D(v)             ~ O(v) q_t(z | v)                        denoiser from leave-one-out
    c(v)             = sum_u O(u) q_t(v | u)                  one-site conditional p_t(z_i = v | rest)

A process defines ``states``, ``transition``, ``generator`` and ``prior``. ``Process`` derives the rest with S x S
arrays; ``RankOne`` has closed forms without such arrays. The laws depend on time only through alpha.
References: Campbell et al., 2022, https://arxiv.org/abs/2205.14987; the conversions hold for any site kernel
(Uniform Diffusion Models Revisited, 2026, https://arxiv.org/abs/2605.22765).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import Renamed, affordable, check_ids, check_tokens, real, unmade, whole
from discdiff.choices import Choice, Sites, Tokens
from discdiff.kernels import dispatch as kernels
from discdiff.process.schedule import Schedule, Time, as_schedule, site_time
from discdiff.process.survivals import Survival, refuse_impossible

if TYPE_CHECKING:
    from discdiff.process.interpolant import Interpolant
    from discdiff.process.rank_one import RankOne

__all__ = ["LARGEST", "Process", "require_process"]

LARGEST = 1 << 32  # the largest number of columns that a draw can distinguish


class Process(Renamed, ABC):
    """Forward process on one site; a wrong size or schedule raises TypeError or ValueError.

    A site has S states. A concrete score has C columns. Data hold n different tokens; ``data_tokens`` (n,) lists
    them. Shapes: tokens (B, L), laws at all sites (B, L, n) or (B, L, C), matrices (S, S) or (n, S). At N chosen sites:
    states (N,), survival probabilities (N,), and rows (N, V), (N, C) or (N, S). A time is a float, (B,) or (B, L).

    Args:
        vocab_size: V, the number of columns of a prediction.
        schedule: the noise schedule, or any decreasing function of time.

    Attributes:
        mask_id: the state of a hidden token, which never occurs in data, or None.
        absorbing: whether noise only hides tokens. Then every site that is not hidden holds its clean token.
    """

    _now: ClassVar = {"observe": "loo_to_denoiser", "forget": "denoiser_to_loo", "unmix": "conditional_to_loo"}
    mask_id: int | None = None
    absorbing: bool = False

    def __init__(self, vocab_size: SupportsIndex, schedule: Schedule | Callable[[Tensor], Tensor]) -> None:
        name = type(self).__name__
        self.vocab_size: int = whole(vocab_size, f"{name}: vocab_size", 1, LARGEST)
        try:
            self.schedule: Schedule = as_schedule(schedule)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None

    # --- what a process must define -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def states(self) -> int:
        """S, the number of states that a noisy site can have."""

    @abstractmethod
    def transition(self, alpha_t: float, alpha_s: float) -> Float[Tensor, "S S"]:
        """Return q_{t|s} as a float64 matrix, row x_s, column x_t, for alpha_t <= alpha_s; alpha_s = 1 is time 0."""

    @abstractmethod
    def generator(self, alpha: float) -> Float[Tensor, "S S"]:
        """Return jump rates per unit of sigma = -log alpha, row = old state, column = new state; rows sum to 0."""

    @abstractmethod
    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        """Return the law at alpha = 0, batch shape (B,), event shape (L,); raises ValueError for a bad size."""

    # --- what it offers beyond that -----------------------------------------------------------------------------------

    @property
    def rank_one(self) -> "RankOne | None":
        """The process itself if it has the closed forms of rank one, else None."""
        return None

    @property
    def pairs(self) -> "Interpolant | None":
        """The process itself if its states are pairs of a token and a source token, else None."""
        return None

    @property
    def one_noise_law(self) -> bool:
        """Whether the process has rank one and the law of its noise does not change with time."""
        return False

    @property
    def masks(self) -> bool:
        """Whether noise is always the mask, so that a masked site's concrete score is alpha O(v) / (1 - alpha)."""
        return self.absorbing and self.mask_id is not None

    # --- laws ---------------------------------------------------------------------------------------------------------

    def marginal(self, x0: Int[Tensor, "B L"], t: Time) -> Choice:
        """Return q_t(x_t | x0), batch shape (B,), event shape (L,).

        Raises:
            ValueError: if an id is not a data token, or a time is outside [0, 1] or has a wrong shape.
        """
        self.check_data(x0, "x0")
        self.schedule.check_length(x0.shape[1])
        return self.noised(x0, self.schedule.alpha(site_time(t, *x0.shape)).to(x0.device))

    def bridge(self, x_t: Int[Tensor, "B L"], x0: Int[Tensor, "B L"], t: Time, s: Time) -> Choice:
        """Return the posterior q(x_s | x_t, x0) for s <= t, by Bayes' rule.

        Raises ValueError if s > t, or if x_t cannot come from x0 at time t; the error names the site.
        """
        return self.posterior(x_t, x0, *self.pinned(x_t, x0, t, s))

    def pinned(self, x_t: Tensor, x0: Tensor, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """Check the arguments of ``bridge`` and return alpha_t and alpha_s; each broadcasts with (B, L).

        Raises ValueError if states, data or times are invalid, or s > t.
        """
        self.check_states(x_t, "x_t")
        self.check_data(x0, "x0")
        self.schedule.check_length(x0.shape[1])
        if x_t.shape != x0.shape:
            raise ValueError(f"bridge: x_t and x0 differ in shape, {tuple(x_t.shape)} and {tuple(x0.shape)}")
        time_t, time_s = site_time(t, *x0.shape), site_time(s, *x0.shape)
        if bool((time_s > time_t).any()):
            raise ValueError(f"bridge: s must not exceed t, got t = {t}, s = {s}")
        return self.schedule.alpha(time_t).to(x0.device), self.schedule.alpha(time_s).to(x0.device)

    def kernel(self, t: float, s: float = 0.0) -> Float[Tensor, "S S"]:
        """Return the float64 matrix q_{t|s} (S, S), for small V only; rows are x_s, columns x_t.

        s = 0 gives q_t(x_t | x0). Raises ValueError if s > t, or if every position has its own schedule.
        """
        t, s = real(t, "kernel: t", "[0, 1]"), real(s, "kernel: s", "[0, 1]")
        if s > t:
            raise ValueError(f"kernel: s must not exceed t, got t = {t}, s = {s}")
        affordable(self.states**2, f"kernel: a matrix of {self.states} x {self.states}")
        return self.transition(self._shared_alpha(t), self._shared_alpha(s))

    def marginals(self, t: float) -> Float[Tensor, "n S"]:
        """Return the matrix q_t(x_t | v), (n, S), with one row for each data token v; for small V only."""
        return self.kernel(t)[self.data_tokens]

    def rate(self, t: float) -> Float[Tensor, "S S"]:
        """Return the matrix of jump rates per unit of time, beta(t) Q with beta = -alpha'/alpha, for small V only.

        Its rows sum to 0. Raises ValueError if alpha(t) = 0, where the rate is infinite.
        """
        t = real(t, "rate: t", "[0, 1]")
        alpha = self._shared_alpha(t)
        if alpha == 0:
            raise ValueError(f"rate: infinite at t = {t}, where alpha is 0; ask for an earlier time")
        return self.generator(alpha) * (-float(self.schedule.alpha_derivative(t)) / alpha)

    def _shared_alpha(self, t: float) -> float:
        if self.schedule.sites is not None:
            raise ValueError(f"kernel: {self.schedule} has a clock for every site, so there is no kernel for all")
        return float(self.schedule.alpha(float(t)))

    # --- states and tokens --------------------------------------------------------------------------------------------

    @property
    def data_tokens(self) -> Int[Tensor, " n"]:
        """The tokens that data may hold, in increasing order: all but the mask."""
        return torch.tensor([v for v in range(self.vocab_size) if v != self.mask_id])

    @property
    def columns(self) -> int:
        """C, the width of a concrete score: S, or fewer if each state has a frozen part, such as a source token."""
        return self.states

    def column(self, x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Map states to columns in rows of width C; the column of a clean state is its token."""
        return x

    def place(self, column: Int[Tensor, "..."], x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Map columns to states; the frozen part of each state, if there is one, is taken from x."""
        return column

    def hide(self, x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Replace each state by the one that hides its token; raises ValueError unless the process is absorbing."""
        raise ValueError(f"{self} has no state that hides a token")

    # --- laws in terms of alpha, for operators, predictions and losses ------------------------------------------------

    def noised(self, x0: Int[Tensor, "B L"], alpha: Survival) -> Choice:
        """Return q_t(x_t | x0) for a survival probability alpha: a float, or a tensor that broadcasts with (B, L)."""
        a = self.sitewise(alpha, x0)
        return Tokens(self._noising(torch.ones_like(x0, dtype=torch.bool), x0, a), x0)

    def posterior(
        self,
        x_t: Int[Tensor, "B L"],
        x0: Int[Tensor, "B L"],
        alpha_t: Survival,
        alpha_s: Survival,
        where: Bool[Tensor, "B L"] | None = None,
    ) -> Choice:
        """Return q(x_s | x_t, x0) at the sites of ``where`` (all by default); the other sites keep x_t.

        Raises ValueError if x_t cannot come from x0; the error names the site.
        """
        a_t, a_s = self.sitewise(alpha_t, x_t), self.sitewise(alpha_s, x_t)
        rows = self._forward(x0.flatten(), a_s.flatten())
        rows = rows * self.propagate(self._one_hot(x_t.flatten()), a_t.flatten(), a_s.flatten(), backward=True)
        rows = rows.unflatten(0, tuple(x_t.shape))
        where = torch.ones_like(x_t, dtype=torch.bool) if where is None else where
        refuse_impossible(where & (rows.sum(-1) == 0), x_t, x0)
        chosen = rows[where]
        return Tokens(Sites.computed(where, lambda n: kernels.log(chosen[n]), self.states), x_t)

    def kept(self, alpha: Survival) -> Survival:
        """Return how probably a redrawn site takes a clean token before ``renoise``: alpha at rank one, else 1."""
        return 1.0

    def renoise(
        self, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], noise: Bool[Tensor, "B L"], alpha: Survival
    ) -> Choice:
        """Return the law of the states after noise is added to redrawn sites ``where`` (B, L).

        At rank one, sites ``noise`` (B, L) get noise; else sites ``where`` get a draw of q_t(. | x). Others keep x.
        """
        a = self.sitewise(alpha, x)
        return Tokens(self._noising(where, self.column(x), a), x)

    def noised_further(
        self, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], alpha_t: Survival, alpha_u: Survival
    ) -> Choice:
        """Return q_{u|t}(x_u | x) for a later time u at the sites of ``where``; the other sites keep x."""
        start, a_t, a_u = x[where], self.sitewise(alpha_t, x)[where], self.sitewise(alpha_u, x)[where]

        def rows(n: Tensor) -> Tensor:
            return kernels.log(self.propagate(self._one_hot(start[n]), a_u[n], a_t[n]).clamp(min=0))

        return Tokens(Sites.computed(where, rows, self.states), x)

    def _noising(self, where: Tensor, x0: Tensor, alpha: Tensor) -> Sites:
        """Return the rows of q_t(. | x0) at chosen sites."""
        start, survival = x0[where], alpha[where]
        return Sites.computed(where, lambda n: kernels.log(self._forward(start[n], survival[n])), self.states)

    def inflow(self, x: Int[Tensor, "B L"], alpha: Survival) -> Float[Tensor, "B L #C"]:
        """Return rates Q(v, x_i) from states v != x_i per unit of -log alpha; raises ValueError if alpha is learned."""
        a = self.sitewise(alpha, x)
        rows = self._by_alpha(x.flatten(), a.flatten(), lambda x, a: self.generator(a).to(x.device)[:, x].T)
        return rows.double().view(*x.shape, self.states)  # an explicit size: there may be no sites

    def evidence(self, x_t: Int[Tensor, "B L"], alpha: Survival) -> Float[Tensor, "B L n"]:
        """Return q_t(x_t | v) for every data token v, divided by its maximum at each site; for small V only."""
        a = self.sitewise(alpha, x_t)
        rows = self._likelihood(x_t.flatten(), a.flatten())
        rows = rows / rows.amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        return rows.view(*x_t.shape, rows.shape[-1])

    # --- conversions at N sites: rows (N, V), states (N,), survivals (N,) ---------------------------------------------

    def loo_to_denoiser(self, log_o: Float[Tensor, "N V"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Tensor:
        """Convert log O (leave-one-out) to log D (denoiser) up to a constant: add log q_t(x | v) to column v."""
        return log_o + self._log_evidence(x, alpha).to(log_o.dtype)

    def denoiser_to_loo(self, log_d: Float[Tensor, "N V"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Tensor:
        """Convert log D (denoiser) to log O (leave-one-out): subtract log q_t(x | v); invalid where ``settled``."""
        return log_d - self._log_evidence(x, alpha).to(log_d.dtype)

    def own_weight(self, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Float[Tensor, " N"] | None:
        """Return log w, where D(v) ~ O(v) w^{1(v = x)}; None if q_t(x | v) is not the same for all tokens v != x."""
        return None

    def settled(self, x: Int[Tensor, "*N"], alpha: Float[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        """Return where q_t(x | v) = 0 for some data token v; there the denoiser determines no leave-one-out."""
        return (self._likelihood(x.flatten(), alpha.flatten()) == 0).any(-1).view(x.shape)

    def revealed(self, x: Int[Tensor, "*N"], alpha: Float[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        """Return at which sites the state is certainly the clean token."""
        return alpha == 1

    def conditional(self, log_o: Float[Tensor, "N V"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Tensor:
        """Return log c (N, C) from a normalised log O: c(v) = p_t(z_i = v | rest) = sum_u O(u) q_t(v | u)."""
        data = self.data_tokens.to(x.device)
        start = log_o.new_zeros(len(x), self.states, dtype=torch.float64)
        start = start.index_copy(-1, data, log_o[:, data].double().exp())
        return kernels.log(self.propagate(start, alpha, torch.ones_like(alpha)).clamp(min=0))

    def plug_in(
        self, log_o: Float[Tensor, "N V"], x: Int[Tensor, " N"],
        alpha_t: Float[Tensor, " N"], alpha_s: Float[Tensor, " N"],
    ) -> Float[Tensor, "N C"]:  # fmt: skip
        """Return log [q_{t|s}(x | x_s) c_s(x_s) / c_t(x)], (N, C), q(x_s | x) with O for x0; log c: ``conditional``."""
        earlier = self.propagate(self._one_hot(x), alpha_t, alpha_s, backward=True).clamp(min=0)
        return (self.conditional(log_o, x, alpha_s) + kernels.log(earlier)).log_softmax(-1)

    def conditional_to_loo(
        self, c: Float[Tensor, "N C"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]
    ) -> Float[Tensor, "N V"]:
        """Fit c = sum_u O(u) q_t(. | u), clip O at 0 (error ~ 1/alpha); raises ValueError if alpha is learned."""

        def solve(c: Tensor, alpha: float) -> Tensor:
            matrix = self.transition(alpha, 1.0).to(c)[self.data_tokens.to(c.device)]
            return torch.linalg.lstsq(matrix.T, c.T).solution.T

        o = self._by_alpha(c, alpha, solve).clamp(min=0)
        return o.new_zeros(len(c), self.vocab_size).index_copy(-1, self.data_tokens.to(c.device), o)

    def propagate(
        self, rows: Float[Tensor, "N S"], alpha_t: Float[Tensor, " N"], alpha_s: Float[Tensor, " N"],
        backward: bool = False,
    ) -> Float[Tensor, "N S"]:  # fmt: skip
        """Return rows @ q_{t|s}, or with ``backward`` rows @ q_{t|s}^T; raises ValueError if alpha is learned."""

        def apply(rows: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
            matrix = self.transition(alpha_t, alpha_s).to(rows)
            return rows @ (matrix.T if backward else matrix)

        return self._by_alpha(rows, torch.stack([alpha_t, alpha_s], -1), apply)

    def _by_alpha(self, rows: Tensor, alpha: Tensor, apply: Callable[..., Tensor]) -> Tensor:
        """Return apply(rows, *alpha), with one call and one matrix for each distinct survival probability."""
        if torch.is_grad_enabled() and alpha.requires_grad:
            raise ValueError(f"{self}: a learned clock needs a process of rank one, General or Ordinal")
        distinct, index = alpha.detach().unique(dim=0, return_inverse=True)
        if len(distinct) == 1:
            return apply(rows, *distinct.flatten().tolist())
        order = index.argsort(stable=True)
        parts = torch.split(rows[order], index.bincount(minlength=len(distinct)).tolist())
        done = [apply(part, *torch.atleast_1d(a).tolist()) for part, a in zip(parts, distinct, strict=True)]
        return torch.cat(done)[order.argsort()] if done else rows

    def _one_hot(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(x, self.states).double()

    def _forward(self, x0: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Float[Tensor, "N S"]:
        return self.propagate(self._one_hot(x0), alpha, torch.ones_like(alpha))

    def _likelihood(self, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Float[Tensor, "N n"]:
        """Return q_t(x | v) for every data token v."""
        columns = self.propagate(self._one_hot(x), alpha, torch.ones_like(alpha), backward=True)
        return columns[:, self.data_tokens.to(x.device)]

    def _log_evidence(self, x: Tensor, alpha: Tensor) -> Tensor:
        data = kernels.log(self._likelihood(x, alpha))
        return data.new_zeros(len(x), self.vocab_size).index_copy(-1, self.data_tokens.to(x.device), data)

    @staticmethod
    def sitewise(alpha: Survival, x: Tensor) -> Tensor:
        """Return a survival probability as a float64 tensor of the shape of x."""
        if isinstance(alpha, Tensor):
            return alpha.to(x.device, torch.float64).expand(x.shape)
        return torch.full(x.shape, alpha, dtype=torch.float64, device=x.device)  # no copy from host to device

    # --- identity -----------------------------------------------------------------------------------------------------

    def with_schedule(self, schedule: Schedule) -> "Process":
        """Return the same process with another schedule."""
        return type(self)(self.vocab_size, schedule)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return self.vocab_size, self.mask_id, self.schedule

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab_size}, {self.schedule})"

    # --- checks -------------------------------------------------------------------------------------------------------

    def check_states(self, x: Tensor, name: str) -> None:
        """Raise ValueError unless ``x`` is an int64 (B, L) tensor of states."""
        check_tokens(x, name)
        check_ids(x, name, f"0..{self.states - 1}", (x < 0) | (x >= self.states))

    def check_data(self, x: Tensor, name: str) -> None:
        """Raise ValueError unless ``x`` is an int64 (B, L) tensor of data tokens."""
        check_tokens(x, name)
        wrong, accepted = (x < 0) | (x >= self.vocab_size), f"0..{self.vocab_size - 1}"
        if self.mask_id is not None:
            wrong, accepted = wrong | (x == self.mask_id), accepted + f" without the mask {self.mask_id}"
        check_ids(x, name, accepted, wrong)


def require_process(process: object, where: str) -> None:
    """Raise TypeError unless ``process`` is a Process."""
    if not isinstance(process, Process):
        raise TypeError(f"{where}: process must be a Process such as Masked(V, Linear()), got {unmade(process)}")
