r"""Processes of rank one: a token survives, or noise independent of the token replaces it.

    q_t(z | x)         = alpha_t 1(z = x) + b_t(z),            b_t(z) = m_t 1(z = anchor) + (1 - alpha_t - m_t) pi(z)
    q_{t|s}(z_t | z_s) = alpha_{t|s} 1(z_t = z_s) + g(z_t),    g = b_t - alpha_{t|s} b_s

The noise has a constant law pi and, in some processes, an anchor (the mask, in ``Hybrid``) whose mass m_t changes with
time. The formulas use the noise odds h_t(z) = b_t(z) / alpha_t, which avoid 0/0 at both ends:

    log w = log(1 + 1 / h(z))      weight of the current token z: D(v) ~ O(v) w^{1(v = z)}
    g(z) / b_t(z) = 1 - h_s(z) / h_t(z)

D is the denoiser's prediction and O the leave-one-out. Rates are nonnegative exactly if no h_t(z) decreases with t.
Only ``transition`` and ``generator`` build S x S arrays.

References: D3PM (Austin et al., 2021, https://arxiv.org/abs/2107.03006); MDLM (Sahoo et al., 2024,
https://arxiv.org/abs/2406.07524); UDLM (Schiff et al., 2025, https://arxiv.org/abs/2412.10193); GIDD (von Ruette et
al., 2025, https://arxiv.org/abs/2503.04482); DiGress (Vignac et al., 2023, https://arxiv.org/abs/2209.14734).
"""

from abc import abstractmethod
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import extent
from discdiff.choices import Noise, Other, PointMixture
from discdiff.kernels import dispatch as kernels
from discdiff.process.base import Process
from discdiff.process.survivals import Survival, refuse_impossible, survival

__all__ = ["Exit", "RankOne"]


class Exit(NamedTuple):
    """Reverse rate of leaving the state of each site, (B, L), and the law of the new state.

    The new state is drawn from the leave-one-out O, is the anchor, or is drawn from the noise law pi. It differs from
    the old state.

    Attributes:
        total: the rate of leaving, per unit of alpha.
        data: the probability that the new state is drawn from O.
        anchored: if the new state is not drawn from O, the probability that it is the anchor, not a draw from pi.
    """

    total: Float[Tensor, "B L"]
    data: Float[Tensor, "B L"]
    anchored: Float[Tensor, "B L"]


class RankOne(Process):
    """Process whose noise is independent of the replaced token; a subclass defines ``pi`` and, if any, ``anchor``."""

    @property
    @abstractmethod
    def pi(self) -> Float[Tensor, " C"]:
        """The constant part of the noise law over the C columns, (C,) float64, without the anchor's changing mass.

        The shape is (S,), one number for each state, unless each state has a frozen part, such as a source token.
        """

    @property
    def rank_one(self) -> "RankOne":
        return self

    @property
    def one_noise_law(self) -> bool:
        return self.absorbing or self.anchor(torch.zeros(1, 1, dtype=torch.int64)) is None

    @property
    def states(self) -> int:
        return len(self.noise("cpu").pi)

    def noise(self, device: torch.device | str) -> Noise:
        """Return pi with its running sums on ``device``; the sums are computed once for each device."""
        known: dict[torch.device, Noise] = self.__dict__.setdefault("_noise", {})
        device = torch.device(device)
        if device not in known:
            known[device] = Noise.of(self.pi, device)
        return known[device]

    def anchor(self, x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"] | None:
        """Return each site's anchor, the state whose share of the noise changes with time, or None if there is none."""
        return None

    def anchored(self, alpha: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return m, the probability that noise has moved a token to the anchor, for each alpha."""
        return torch.zeros_like(alpha)

    def anchored_inflow(self, alpha: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return m - alpha dm/dalpha, the share of jumps that go to the anchor; m is ``anchored(alpha)``."""
        return torch.zeros_like(alpha)

    # --- the noise ----------------------------------------------------------------------------------------------------

    def odds(self, x: Int[Tensor, "*N"], alpha: Survival) -> Float[Tensor, "*N"]:
        """Return the noise odds h(x) = b(x) / alpha of each site's state, where b(x) is the mass of noise.

        At alpha = 0 this is the limit alpha -> 0+: 0 for a state that noise never takes, infinite for all others.
        """
        share, anchor = self.noise(x.device).pi[self.column(x)], self.anchor(x)
        if anchor is None:
            return _odds(share, alpha)
        a = torch.as_tensor(alpha, dtype=torch.float64)
        mass = self.anchored(a)
        own = _odds(share, a, mass)
        # at alpha = 0 the anchor holds all the mass and the rest is 0/0; its limit is infinite where pi > 0
        own = own.where(own == own, torch.inf)
        return own + torch.where(x == anchor, mass / a, 0.0)

    def log_weight(self, x: Int[Tensor, "*N"], alpha: Survival) -> Float[Tensor, "*N"]:
        """Return log w, w = q(z | x = z) / q(z | x != z), for each site's current token z.

        The result is 0 at a mask, which is no token. It is infinite where z determines the clean token x: at alpha = 1,
        or if noise never produces z.
        """
        weight = torch.log1p(1 / self.odds(x, alpha))
        return weight if self.mask_id is None else weight.masked_fill(x == self.mask_id, 0.0)

    def _mixture(self, x: Tensor, points: list[Tensor], weights: list[Tensor], mass: Tensor) -> PointMixture:
        """Return the mixture of the points, the anchor of x with ``mass``, and pi with the remaining weight."""
        anchor = self.anchor(x)
        points, weights = list(points), [weight.expand(x.shape) for weight in weights]
        if anchor is not None:
            points, weights = [*points, anchor], [*weights, mass.expand(x.shape)]
        shape = (x.shape[0], x.shape[1])
        return PointMixture(
            self.noise(x.device), points, weights, shape, x.device, partial(self.place, x=x), self.column
        )

    def noised(self, x0: Int[Tensor, "B L"], alpha: Survival) -> PointMixture:
        a = self.sitewise(alpha, x0)
        return self._mixture(x0, [x0], [a], self.anchored(a))

    def posterior(
        self,
        x_t: Int[Tensor, "B L"],
        x0: Int[Tensor, "B L"],
        alpha_t: Survival,
        alpha_s: Survival,
        where: Bool[Tensor, "B L"] | None = None,
    ) -> PointMixture:
        r"""Return q(x_s | x_t, x0) at the sites of ``where`` (all by default), a mixture of x_t, x0 and noise:

        [alpha_{t|s} 1(x_s = x_t) + g(x_t)] [alpha_s 1(x_s = x0) + b_s(x_s)] / q_t(x_t | x0).

        b_t is the mass of noise at time t, and g = b_t - alpha_{t|s} b_s. The other sites keep x_t.
        """
        a_t, a_s = self.sitewise(alpha_t, x_t), self.sitewise(alpha_s, x_t)
        clean = self.place(x0, x_t)
        same = (x_t == clean).double()
        # divided by alpha_t: q_t = same + h_t; x_t is kept with weight same + h_s and redrawn with h_t - h_s
        total = same + self.odds(x_t, a_t)
        where = torch.ones_like(x_t, dtype=torch.bool) if where is None else where
        refuse_impossible(where & (total == 0), x_t, x0)
        stay = same / total.where(total > 0, 1.0)
        redraw = self.candidate(x_t, a_t, a_s) * (1 - stay)  # (h_t - h_s) / total, also at h_t = inf
        redraw = torch.where(where, redraw, 0.0)
        keep = 1 - redraw
        return self._mixture(x_t, [x_t, clean], [keep, redraw * a_s], redraw * self.anchored(a_s))

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> PointMixture:
        start = torch.zeros(extent(batch, length), dtype=torch.int64, device=device)
        return self._mixture(start, [], [], self.anchored(torch.zeros((), dtype=torch.float64, device=device)))

    def kept(self, alpha: Survival) -> Survival:
        return alpha

    def renoise(
        self, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], noise: Bool[Tensor, "B L"], alpha: Survival
    ) -> PointMixture:
        a = self.sitewise(alpha, x)
        share = torch.where(noise, self.anchored(a) / (1 - a), 0.0)
        return self._mixture(x, [x], [(~noise).double()], share)

    def noised_further(
        self, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], alpha_t: Survival, alpha_u: Survival
    ) -> PointMixture:
        a_t, a_u = self.sitewise(alpha_t, x), self.sitewise(alpha_u, x)
        keep = torch.where(a_t > 0, a_u / a_t.where(a_t > 0, 1.0), 1.0)
        mass = (self.anchored(a_u) - keep * self.anchored(a_t)).clamp(min=0)
        return self._mixture(x, [x], [torch.where(where, keep, 1.0)], torch.where(where, mass, 0.0))

    # --- inputs of a reverse step, one number a site ------------------------------------------------------------------

    def candidate(self, x_t: Int[Tensor, "B L"], alpha_t: Survival, alpha_s: Survival) -> Float[Tensor, "B L"]:
        r"""Bound the probability that a reverse step t -> s redraws a site, for every prediction O (leave-one-out).

        With noise masses b, odds h = b / alpha and g = b_t - alpha_{t|s} b_s, a reverse step keeps z = z_t or redraws
        z_s from alpha_s O + b_s. A redraw has the probability g(z) / (alpha_t O(z) + b_t(z)). It is at most
        g(z) / b_t(z) = 1 - h_s(z) / h_t(z), with equality if O(z) = 0, and it is 0 if b_t(z) = 0. So candidates are
        drawn before any logit is read, and ``acceptance`` decides which of them are redrawn.
        """
        pi, one_time = self.noise(x_t.device).pi, isinstance(alpha_t, float) and isinstance(alpha_s, float)
        few = one_time and len(pi) < x_t.numel() and self.anchor(x_t) is None  # then one bound for each state
        h_t, h_s = (_odds(pi, alpha) if few else self.odds(x_t, alpha) for alpha in (alpha_t, alpha_s))
        still = (h_t == 0) | (h_s == torch.inf)
        bound = torch.where(still, 0.0, (1 - h_s / h_t.where(~still, 1.0)).clamp(0.0, 1.0))
        return bound[self.column(x_t)] if few else bound

    def acceptance(
        self, log_own: Float[Tensor, "B L"], x_t: Int[Tensor, "B L"], alpha_t: Survival
    ) -> Float[Tensor, "B L"]:
        """Return the probability 1 / (1 + O(z) / h(z)) that a candidate is redrawn; ``log_own`` is log O(z)."""
        odds = self.odds(x_t, alpha_t)
        noisy = odds > 0
        return torch.where(noisy, 1 / (1 + log_own.double().exp() / odds.where(noisy, 1.0)), 0.0)

    def exit(self, x: Int[Tensor, "B L"], alpha: Survival, own: float | Float[Tensor, "B L"]) -> "Exit":
        r"""Return each site's rate of leaving its state z backward in time and the law of its new state.

        Of the prediction O only ``own`` = O(z) is needed:

            R(z -> v) = inflow(z) c(v) / (alpha c(z)),  c = alpha O + b      per unit of alpha

        The new state has the law c restricted to v != z. With ``own`` = 0 the total rate is an upper bound for every
        prediction O.
        """
        a = self.sitewise(alpha, x)
        mass, share = self.anchored(a), self.noise(x.device).pi[self.column(x)]
        left = (1 - a - mass).clamp(min=0)
        anchor = self.anchor(x)
        at_anchor = torch.zeros_like(a) if anchor is None else (x == anchor).to(a)
        still = left * share + mass * at_anchor  # b(z)
        anchored = mass * (1 - at_anchor)
        noise = left * (1 - share) + anchored
        data = a * (1 - own)
        inflow = self.inflow(x, alpha)[..., 0]
        # at alpha = 0 only a mask leaves at a finite rate: no noise remains besides it
        noisy, endless = noise > 0, (noise > 0) & (a == 0)
        gone = torch.where(noisy, noise / a.where(~endless, 1.0), 0.0) + (1 - own)
        leaves = (inflow > 0) & (gone > 0)
        total = torch.where(leaves, inflow * gone / (a * own + still).where(leaves, 1.0), 0.0)
        return Exit(
            torch.where(leaves & endless, torch.inf, total),
            torch.where(noisy, data / (data + noise).where(noisy, 1.0), 1.0),
            torch.where(noisy, anchored / noise.where(noisy, 1.0), 0.0),
        )

    def elsewhere(self, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], anchored: Float[Tensor, "B L"]) -> Other:
        """Return the law of new states != x at sites ``where``: the anchor with probability ``anchored``, else pi."""
        return Other(self.noise(x.device), x, where, anchored, self.anchor(x), partial(self.place, x=x), self.column)

    # --- conversions --------------------------------------------------------------------------------------------------

    def evidence(self, x_t: Int[Tensor, "B L"], alpha: Survival) -> Float[Tensor, "B L n"]:
        same = self.column(x_t)[..., None] == self.data_tokens.to(x_t.device)
        return torch.where(same, 1.0, torch.exp(-self.log_weight(x_t, alpha))[..., None])

    def loo_to_denoiser(self, log_o: Float[Tensor, "N V"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Tensor:
        return self._shift(log_o, x, self.log_weight(x, alpha))

    def denoiser_to_loo(self, log_d: Float[Tensor, "N V"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Tensor:
        return self._shift(log_d, x, -self.log_weight(x, alpha))

    def own_weight(self, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return self.log_weight(x, alpha)

    def settled(self, x: Int[Tensor, "*N"], alpha: Float[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        return self.log_weight(x, alpha) == torch.inf

    def revealed(self, x: Int[Tensor, "*N"], alpha: Float[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        return self.settled(x, alpha)

    def _shift(self, rows: Tensor, x: Tensor, amount: Tensor) -> Tensor:
        """Add ``amount`` to each row's own column; skip masks, which have none."""
        column = self.column(x)
        inside = column < rows.shape[-1]
        shift = amount.where(inside, 0.0).to(rows.dtype)[:, None]
        return rows.scatter_add(-1, column.where(inside, 0)[:, None], shift)

    def noise_parts(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return level, spike and anchor of the noise: b(v) = level pi(v) + spike 1(v = anchor).

        Each is (N,) for N states x and their alpha. The anchor is a column, or None if the noise law is constant.
        """
        spike, anchor = self.anchored(alpha), self.anchor(x)
        return (1 - alpha - spike).clamp(min=0), spike, None if anchor is None else self.column(anchor)

    def _noise_rows(self, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Float[Tensor, "N C"]:
        level, spike, anchor = self.noise_parts(x, alpha)
        rows = level[:, None] * self.noise(x.device).pi
        return rows if anchor is None else rows.scatter_add(-1, anchor[:, None], spike[:, None])

    def conditional(self, log_o: Float[Tensor, "N V"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> Tensor:
        """Return log c = log(alpha O + b), the log of p_t(z_i | other sites), (N, C), from a normalised log O."""
        data = kernels.log(alpha[:, None]) + log_o
        if self.columns > self.vocab_size:
            data = torch.nn.functional.pad(data, (0, self.columns - self.vocab_size), value=-torch.inf)
        return kernels.log_add(data, self._noise_rows(x, alpha))

    def plug_in(
        self,
        log_o: Float[Tensor, "N V"],
        x: Int[Tensor, " N"],
        alpha_t: Float[Tensor, " N"],
        alpha_s: Float[Tensor, " N"],
    ) -> Float[Tensor, "N C"]:
        h_t, h_s = self.odds(x, alpha_t), self.odds(x, alpha_s)
        # over alpha_t: (1(v = x) / alpha_s + h_t - h_s) c_s(v); where h_t is infinite x is uninformative, so c_s
        gain = torch.where((h_t == torch.inf) & (h_s < torch.inf), 1.0, h_t - h_s)[:, None].expand(-1, self.columns)
        same = torch.where(h_t < torch.inf, 1 / alpha_s, 0.0)[:, None]
        earlier = gain.scatter_add(-1, self.column(x)[:, None], same)
        own = torch.nn.functional.one_hot(self.column(x), self.columns).to(gain)
        still = (h_s == torch.inf)[:, None]
        weight = torch.where(still, own, earlier.clamp(min=0))
        return kernels.log_softmax(self.conditional(log_o, x, alpha_s) + kernels.log(weight))

    def conditional_to_loo(
        self, c: Float[Tensor, "N C"], x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]
    ) -> Float[Tensor, "N V"]:
        return ((c - self._noise_rows(x, alpha)) / alpha[:, None]).clamp(min=0)[:, : self.vocab_size]

    def inflow(self, x: Int[Tensor, "B L"], alpha: Survival) -> Float[Tensor, "B L 1"]:
        """Return the rate into each site's state, (B, L, 1), which is the same from every other state."""
        rate, anchor = self.noise(x.device).pi[self.column(x)][..., None], self.anchor(x)
        if anchor is None:
            return rate
        mass = self.anchored_inflow(self.sitewise(alpha, x))[..., None]
        return (1 - mass) * rate + torch.where((x == anchor)[..., None], mass, 0.0)

    # --- dense matrices -----------------------------------------------------------------------------------------------

    def transition(self, alpha_t: float, alpha_s: float) -> Float[Tensor, "S S"]:
        a_t, a_s = torch.tensor([alpha_t], dtype=torch.float64), torch.tensor([alpha_s], dtype=torch.float64)
        states = torch.zeros(1, dtype=torch.int64)
        a_ts = survival(a_t, a_s)
        gain = self._noise_rows(states, a_t) - a_ts * self._noise_rows(states, a_s)
        return a_ts * torch.eye(self.states, dtype=torch.float64) + gain.clamp(min=0)

    def generator(self, alpha: float) -> Float[Tensor, "S S"]:
        share = float(self.anchored_inflow(torch.tensor(alpha, dtype=torch.float64)))
        rate = (1 - share) * self.pi
        anchor = self.anchor(torch.zeros(1, dtype=torch.int64))
        if anchor is not None:
            rate[anchor] += share
        return rate - torch.eye(self.states, dtype=torch.float64)


def _odds(share: Float[Tensor, "*N"], alpha: Survival, mass: float | Tensor = 0.0) -> Float[Tensor, "*N"]:
    """Return pi (1 - alpha - m) / alpha, the noise odds without the anchor's part; 0 where pi (``share``) is 0."""
    if not isinstance(alpha, Tensor) and not isinstance(mass, Tensor) and alpha > 0:  # finite, and no tensor to make
        return share * (max(1 - alpha - mass, 0.0) / alpha)
    a = torch.as_tensor(alpha, dtype=torch.float64)
    return torch.where(share > 0, share * ((1 - a - mass).clamp(min=0) / a), 0.0)
