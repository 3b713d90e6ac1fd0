r"""Reveal clean tokens in any order on any process: a network that takes a time for every site is told what is known.

A step from t to s draws x0 from p(x0 | z_t) in groups of sites G_1, G_2, ..., one denoiser call for each group:

    x0_i ~ D_i(. | x0 at G_1 ... G_{k-1} at time 0, z_t at all other sites at time t),   i in G_k, independently
    z_s ~ q(z_s | z_t, x0)                                          the bridge, site by site; z_0 = x0

At t = 1 with alpha = 0 the sites at time t say nothing, so D is the law of a site given the revealed ones. Then the
step from 1 to 0 is unmasking on every process: uniform, marginal and hybrid noise included. Sites of one group are
drawn independently of each other, which is the only error. If the order is fixed, it is their total correlation:

    KL(p0 || law) = sum_k E[TC(G_k | G_1 ... G_{k-1})]            for the step from 1 to 0

``theory.total_correlation`` computes it. One group is an ancestral step; as many groups as sites make the step exact.

References: order-agnostic models (Hoogeboom et al., 2022, https://arxiv.org/abs/2110.02037); a time for every site, as
in Diffusion Forcing (Chen et al., 2024, https://arxiv.org/abs/2407.01392).
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.operator import At, Predictor, State, choose
from discdiff.samplers._choosing import POSITIONAL, Select, by_position, confidence, draw_clean
from discdiff.samplers.unmask import Unmask, taken

__all__ = ["Reveal"]


@dataclass(frozen=True)
class Reveal(Predictor):
    """Draw the clean tokens of a step in groups of sites, one denoiser call each, then take the bridge to s.

    ``grid=[1, 0]`` makes ``calls`` calls in all. The denoiser must take a time for every site, unless the process is
    masked. Sites whose state is certainly clean are left alone. If there are fewer other sites than ``calls``, there
    are fewer calls.

    Args:
        select, noise, block: the order of the sites, as in ``Unmask``.
        calls: the number of groups.
        growth: the size of a group divided by the size of the group before it; its end is rounded up to a whole site.
            On a Markov chain of 2**n sites ``Reveal("spread", calls=n, growth=2)`` is exact but for the dependence of
            the two sites of its first call: every other site lies between two that are known.

    Raises:
        ValueError: as in ``Unmask``, for calls below 1 or a growth that is not positive; in ``Sampler`` and
            ``theory.kernel``, for a denoiser with one time a row.
    """

    select: Select = "random"
    calls: int = 8
    noise: float = 0.0
    block: int | None = None
    growth: float = 1.0
    site_times = True

    def __post_init__(self) -> None:
        checked = Unmask(self.select, self.noise, self.block)
        object.__setattr__(self, "noise", checked.noise)
        object.__setattr__(self, "block", checked.block)
        object.__setattr__(self, "calls", whole(self.calls, "Reveal: calls", 1))
        object.__setattr__(self, "growth", real(self.growth, "Reveal: growth", "(0, inf)"))

    @property
    def weighable(self) -> bool:
        return self._order.weighable

    @property
    def nfe(self) -> float | None:
        return float(self.calls)

    @property
    def positional(self) -> bool:
        """Whether the order depends on positions alone."""
        return self.select in POSITIONAL and not self.noise

    def groups(self, length: int) -> list[list[int]]:
        """Return the sites that each call reveals, for an order by position ("left_to_right" or "spread") of L sites.

        Raises:
            ValueError: for an order that depends on chance or on the predictions.
        """
        length = whole(length, "Reveal.groups: length", 1)
        if not self.positional:
            raise ValueError(
                f"groups: takes an order by position, 'left_to_right' or 'spread', without noise; got {self}"
            )
        score, block = by_position(self.select, length).tolist(), self.block or length
        sites = sorted(range(length), key=lambda site: (site // block, -score[site]))
        ends = [int(self._until(torch.tensor(length), turn)) for turn in range(self.calls + 1)]
        return [sites[begin:end] for begin, end in itertools.pairwise(ends) if end > begin]

    def __call__(self, state: State, at: At) -> State:
        known = at.process.revealed(state.tokens, at.process.sitewise(at.alpha(state.t), state.tokens))
        left = state.free & ~known
        number, some = left.sum(-1), state
        for turn in range(1, self.calls + 1):
            count = self._until(number, turn) - self._until(number, turn - 1)
            if not bool((count > 0).any()):
                continue
            here = at.again(turn)
            some = replace(some, seen=here.predict(some))
            by = None if self.select == "random" else confidence(some, left, self.select, here)
            chosen = taken(some, left, self._order, count, by, here)
            left, some = left & ~chosen, some.at(draw_clean(some, chosen, here))
            some = replace(some, frozen=chosen if some.frozen is None else some.frozen | chosen)
        if at.s == 0:
            return state.at(some.tokens, at.s)
        bridge = at.process.bridge(state.tokens, at.process.column(some.tokens), state.t, at.s)
        after = choose("bridge", bridge, state, at)
        return state.at(torch.where(state.free, after, state.tokens), at.s)

    def _until(self, number: Int[Tensor, "*B"], turn: int) -> Int[Tensor, "*B"]:
        """Return how many of ``number`` sites are revealed after a call; the calls count from 1."""
        if self.growth == 1:
            return number * turn // self.calls
        share = math.expm1(turn * math.log(self.growth)) / math.expm1(self.calls * math.log(self.growth))
        return (number * share - 1e-9).ceil().to(number)

    @property
    def _order(self) -> Unmask:
        return Unmask(self.select, self.noise, self.block)
