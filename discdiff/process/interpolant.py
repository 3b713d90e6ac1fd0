r"""Processes between two data laws. The state of a site is a pair (z, u): its token and the source token u.

    q_t((z, u) | x, u) = alpha_t 1(z = x) + m_t 1(z = u) + (1 - alpha_t - m_t) / V

At alpha = 1 the token z is data, at alpha = 0 it is the source token. The pairs (x, u) may be independent or drawn from
any coupling. Given u this process has rank one, with u in place of the mask, so all methods for a mask apply. A site
with z = u is hidden. Without uniform noise a site with z != u is clean. A number p_uniform > 0, the
stochasticity, gives uniform noise as well, at every time but the first and the last.

With an independent source u ~ pi and no stochasticity this process is the absorbing reformulation of the uniform
process: given x alone, z has exactly the law of ``Marginal(pi)``, and every site with z != u is clean.

A pair is stored as the single integer z V + u.
References: Stochastic Interpolants (Albergo et al., 2023, https://arxiv.org/abs/2303.08797), Discrete Flow Matching
(Gat et al., 2024, https://arxiv.org/abs/2407.15595), Uniform Diffusion Models Revisited (2026,
https://arxiv.org/abs/2605.22765).
"""

from collections.abc import Callable
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import affordable, check_law, extent
from discdiff.choices import Choice, Key, SiteWise
from discdiff.kernels.dispatch import coins
from discdiff.process.base import Process
from discdiff.process.hybrid import Blend
from discdiff.process.rank_one import RankOne
from discdiff.process.schedule import Schedule, site_time
from discdiff.process.survivals import Survival, survival

__all__ = ["AbsorbingUniform", "Interpolant"]


class Interpolant(RankOne):
    """Process between data and a source, whose V^2 states are pairs (token, source token).

    Predictions have V columns.

    Args:
        vocab_size: V, the number of tokens of both data and source.
        schedule: the noise schedule; data at alpha = 1, source at alpha = 0.
        source: (V,) the law of an independent source token. It is None if the source is a law of whole sequences or is
            coupled to the data; then train with ``noised_pair(x0, x1, t)`` and sample with ``initial=join(x1, x1)``.
        p_uniform: the stochasticity, as in ``Hybrid``: the largest probability of a uniform token at any time, or a
            function of alpha that gives the share of uniform tokens in the noise.

    Raises:
        ValueError: if ``source`` is not a law over V tokens, or ``p_uniform`` needs a negative rate.
    """

    def __init__(
        self,
        vocab_size: SupportsIndex,
        schedule: Schedule | Callable[[Tensor], Tensor],
        source: Float[Tensor, " V"] | None = None,
        p_uniform: float | Callable[[Tensor], Tensor] = 0.0,
    ) -> None:
        super().__init__(vocab_size, schedule)
        vocab_size = self.vocab_size
        self._source = None if source is None else check_law(source, "Interpolant: source")
        if self._source is not None and len(self._source) != vocab_size:
            raise ValueError(f"Interpolant: source must have shape ({vocab_size},), got {tuple(self._source.shape)}")
        self._blend = Blend(p_uniform, "Interpolant")
        self.absorbing: bool = self._blend.p_uniform == 0

    # --- pairs --------------------------------------------------------------------------------------------------------

    @property
    def pairs(self) -> "Interpolant":
        return self

    @property
    def states(self) -> int:
        return self.vocab_size**2

    @property
    def columns(self) -> int:
        return self.vocab_size

    def column(self, x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        return x.div(self.vocab_size, rounding_mode="floor")

    def place(self, column: Int[Tensor, "..."], x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        return column * self.vocab_size + x % self.vocab_size

    def hide(self, x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        if not self.absorbing:
            return super().hide(x)
        return self.anchor(x)

    def join(self, z: Int[Tensor, "*N"], u: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Return the states that hold the pairs (z, u)."""
        return z * self.vocab_size + u

    def split(self, x: Int[Tensor, "*N"]) -> tuple[Int[Tensor, "*N"], Int[Tensor, "*N"]]:
        """Return the tokens z and the source tokens u that the states x hold."""
        return self.column(x), x % self.vocab_size

    # --- the noise ----------------------------------------------------------------------------------------------------

    @property
    def pi(self) -> Float[Tensor, " C"]:
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)

    def anchor(self, x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        return self.place(x % self.vocab_size, x)

    def anchored(self, alpha: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return self._blend.anchored(alpha)

    def anchored_inflow(self, alpha: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return self._blend.inflow(alpha)

    @property
    def source(self) -> Float[Tensor, " V"]:
        """The law of an independent source token.

        Raises:
            ValueError: if the process was made without a source law.
        """
        if self._source is None:
            raise ValueError(
                f"{self} has no source law of its own; give the source tokens: noised_pair(x0, x1, t) to train, "
                "initial=process.join(x1, x1) to sample"
            )
        return self._source

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> "SourcePairs":  # type: ignore[override]
        zero = torch.zeros(extent(batch, length), dtype=torch.float64, device=device)
        return SourcePairs(self.source, zero.long(), zero, zero + 1)

    def noised(self, x0: Int[Tensor, "B L"], alpha: Survival) -> "SourcePairs":  # type: ignore[override]
        """Return q_t((z, u) | x0) with a source token u drawn from ``source`` at every site."""
        a = self.sitewise(alpha, x0)
        return SourcePairs(self.source, x0, a, self.anchored(a))

    def noised_pair(self, x0: Int[Tensor, "B L"], x1: Int[Tensor, "B L"], t: float | Tensor) -> Choice:
        """Return q_t((z, u) | x0, u = x1) for data x0 and source tokens x1, (B, L) each, from any coupling.

        Raises:
            ValueError: if an id is outside the vocabulary, or the shapes differ.
        """
        self.check_data(x0, "x0")
        self.check_data(x1, "x1")
        if x0.shape != x1.shape:
            raise ValueError(f"noised_pair: x0 and x1 differ in shape, {tuple(x0.shape)} and {tuple(x1.shape)}")
        self.schedule.check_length(x0.shape[1])
        alpha = self.schedule.alpha(site_time(t, *x0.shape)).to(x0.device)
        return super().noised(self.join(x0, x1), alpha)

    # --- dense --------------------------------------------------------------------------------------------------------

    def transition(self, alpha_t: float, alpha_s: float) -> Float[Tensor, "S S"]:
        """Return the transition matrix over pairs (z, u); the source token u never changes."""
        a_t, a_s = torch.tensor(alpha_t, dtype=torch.float64), torch.tensor(alpha_s, dtype=torch.float64)
        a_ts, mass_t, mass_s = survival(a_t, a_s), self.anchored(a_t), self.anchored(a_s)
        to_source = (mass_t - a_ts * mass_s).clamp(min=0)
        uniform = ((1 - a_t - mass_t) - a_ts * (1 - a_s - mass_s)).clamp(min=0)
        return a_ts * torch.eye(self.states, dtype=torch.float64) + self._jumps(to_source, uniform)

    def generator(self, alpha: float) -> Float[Tensor, "S S"]:
        share = self.anchored_inflow(torch.tensor(alpha, dtype=torch.float64))
        return self._jumps(share, 1 - share) - torch.eye(self.states, dtype=torch.float64)

    def _jumps(self, to_source: Tensor, uniform: Tensor) -> Float[Tensor, "S S"]:
        z, u = self.split(torch.arange(self.states))
        return (u[:, None] == u) * (to_source * (z == u) + uniform / self.vocab_size)

    def marginals(self, t: float) -> Float[Tensor, "n S"]:
        clean = self.source.repeat(self.vocab_size).view(self.vocab_size, -1)  # row x0, column u
        return torch.block_diag(*clean[:, None]) @ self.kernel(t)

    # --- identity -----------------------------------------------------------------------------------------------------

    def with_schedule(self, schedule: Schedule) -> "Interpolant":
        return Interpolant(self.vocab_size, schedule, self._source, self._blend.p_uniform)

    def _identity(self) -> tuple[object, ...]:
        source = None if self._source is None else tuple(self._source.tolist())
        return self.vocab_size, self.schedule, source, self._blend.p_uniform

    def __repr__(self) -> str:
        source = "" if self._source is None else ", source"
        return f"Interpolant({self.vocab_size}, {self.schedule}{source}, p_uniform={self._blend.p_uniform})"


class AbsorbingUniform(Interpolant):
    """Absorbing reformulation of ``Uniform`` (AUDM): each state is a pair of a token z and a uniform source token u.

    At every t, (x0, z_t) has the law of the uniform process. The law of the path differs, because u never changes.
    Reference: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).

    Args:
        vocab_size: V, the number of tokens.
        schedule: the noise schedule.

    Raises:
        ValueError: if V numbers of 8 bytes exceed this machine's memory.
    """

    def __init__(self, vocab_size: SupportsIndex, schedule: Schedule | Callable[[Tensor], Tensor]) -> None:
        Process.__init__(self, vocab_size, schedule)  # checks the size first
        affordable(self.vocab_size, f"AbsorbingUniform: a source law of {self.vocab_size} tokens")
        source = torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)
        super().__init__(self.vocab_size, schedule, source)

    def with_schedule(self, schedule: Schedule) -> "AbsorbingUniform":
        return AbsorbingUniform(self.vocab_size, schedule)

    def __repr__(self) -> str:
        return f"AbsorbingUniform({self.vocab_size}, {self.schedule})"


class SourcePairs(SiteWise):
    """Law of pairs (z, u) with u ~ source; z is x0 with probability alpha, u with ``mass``, else a uniform token."""

    def __init__(
        self,
        source: Float[Tensor, " V"],
        x0: Int[Tensor, "B L"],
        alpha: Float[Tensor, "B L"],
        mass: Float[Tensor, "B L"],
    ) -> None:
        super().__init__(x0.shape[0], (x0.shape[1],), x0.device)
        self.source: Tensor = source.to(x0.device)
        self.x0: Tensor = x0
        self.alpha: Tensor = alpha
        self.mass: Tensor = mass
        self._last = int(source.nonzero()[-1])

    @property
    def _rest(self) -> Tensor:
        rest = 1 - self.alpha - self.mass
        return torch.where(rest > 1e-15, rest, 0.0)  # a smaller rest is rounding

    def _draw(self, key: Key) -> Int[Tensor, "B L"]:
        size = len(self.source)
        coin, v = coins(key, self.event_shape[0])
        u = torch.searchsorted(self.source.cumsum(0)[: self._last], v, right=True)
        # Beyond both thresholds the rescaled coin is uniform again; it picks the uniform token.
        left = (coin - self.alpha - self.mass) / self._rest.clamp(min=1e-15)
        token = (left * size).long().clamp(0, size - 1)
        token = torch.where((coin < self.alpha + self.mass) | (self._rest == 0), u, token)
        return torch.where(coin < self.alpha, self.x0, token) * size + u

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        size = len(self.source)
        z, u = value.div(size, rounding_mode="floor"), value % size
        known = (value >= 0) & (value < size**2)
        p = self.alpha * (z == self.x0) + self.mass * (z == u) + self._rest / size
        return (p * self.source[u] * known).log().sum(-1)

    def table(self) -> tuple[Tensor, Tensor]:
        size = len(self.source)
        states = torch.arange(size**2, device=self.device).expand(*self.x0.shape, -1)
        z, u = states.div(size, rounding_mode="floor"), states % size
        p = self.alpha[..., None] * (z == self.x0[..., None]) + self.mass[..., None] * (z == u)
        return ((p + self._rest[..., None] / size) * self.source[u]).log(), states
