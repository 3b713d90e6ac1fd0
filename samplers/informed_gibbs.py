r"""Redraw sites chosen by a confidence score of the prediction (informed Gibbs moves).

    w(i | z) ~ exp(score_i(z) / temperature),    z_i ~ c_i(. | z) = alpha O_i + (1 - alpha) pi

    "current_prob"  -log c_i(z_i)        "max_prob"  -max_v log c_i(v)
    "margin"  max_{v != z_i} log c_i(v) - log c_i(z_i)

O is the leave-one-out prediction. Sites are chosen without replacement (Gumbel top-k). The choice depends on the
tokens, so the published move does not preserve p_t for any number of sites. With ``exact`` the one-site move to z' is
accepted with probability min(1, w(i | z') / w(i | z)). c_i does not depend on z_i, so this is the whole Metropolis
ratio, and p_t is preserved.

References: Zhao et al. (2024, https://arxiv.org/abs/2407.21243); Uniform Diffusion Models Revisited (2026,
https://arxiv.org/abs/2605.22765). The Metropolis step is introduced here.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.checks import decided, real, whole
from discdiff.choices import Coins, Ranking, spread
from discdiff.operator import At, Corrector, Invariance, State, choose
from discdiff.samplers._conditional import balanced
from discdiff.samplers._redraw import redraw

__all__ = ["InformedGibbs"]

Rule = Literal["margin", "max_prob", "current_prob"]


@dataclass(frozen=True)
class InformedGibbs(Corrector):
    """Redraw the sites chosen by a score from their conditionals; one denoiser call, two if ``exact``.

    Args:
        select: the score of a site with state z and conditional c: "margin" max_{v != z} log c(v) - log c(z),
            "max_prob" -max_v log c(v), or "current_prob" -log c(z).
        exact: add a Metropolis acceptance step, which preserves p_t; only for one site.
        sites: how many sites of a row are redrawn in parallel.
        temperature: the temperature of the selection; as it grows the choice becomes uniform.

    Raises:
        ValueError: for an unknown score, ``exact`` with several sites, or a temperature that is not positive; in
            sampling, if the model does not determine the leave-one-out prediction at a site that holds a token (as with
            a denoiser of a masked process).
    """

    select: Rule = "margin"
    exact: bool = False
    sites: int = 1
    temperature: float = 1.0
    reads = "shown"

    def __post_init__(self) -> None:
        if self.select not in get_args(Rule):
            known = ", ".join(map(repr, get_args(Rule)))
            raise ValueError(f"InformedGibbs: select must be one of {known}, got {self.select!r}")
        decided(self.exact, "InformedGibbs: exact")
        object.__setattr__(self, "sites", whole(self.sites, "InformedGibbs: sites", 1))
        if self.exact and self.sites > 1:
            raise ValueError(f"InformedGibbs: sites must be at least 1, and 1 if exact, got {self.sites}")
        object.__setattr__(self, "temperature", real(self.temperature, "InformedGibbs: temperature", "(0, inf)"))

    @property
    def weighable(self) -> bool:
        return not self.exact  # the acceptance may be 1 under one prediction alone

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.exact else "none"

    @property
    def nfe(self) -> float | None:
        return 2.0 if self.exact else 1.0

    def __call__(self, state: State, at: At) -> State:
        alpha, state = at.alpha(state.t), replace(state, seen=at.predict(state))
        weight = self._weight(state, at)
        count = torch.full_like(state.rows, self.sites)
        where = choose("site", Ranking(weight, count), state, at) >= 0
        after = state.at(redraw(state, where, alpha, at))
        if not self.exact:
            return after
        there = self._weight(replace(after, seen=at.predict(after, name="after")), at)
        gain = torch.where(where, there - weight, 0.0).sum(-1, keepdim=True)
        accept = choose("accept", Coins(gain.clamp(max=0.0).exp()), state, at)
        at.report(state, accepted=lambda: accept[:, 0])
        return state.at(torch.where(accept, after.tokens, state.tokens))

    def _weight(self, state: State, at: At) -> Float[Tensor, "B L"]:
        """Return the log weight (B, L) of choosing each site, normalised over a row's free sites; -inf elsewhere."""
        free, view = state.free, at.predict(state)[state.free]
        if self.select == "margin":
            score = balanced(view).known().peak.amax(-1)
        elif self.select == "max_prob":
            score = -view.conditional.known().max_prob.log()
        else:
            score = -view.conditional.known(at=at.process.column(view.x)).log_prob
        log_w = spread((score / self.temperature).clamp(-1e300, 1e300), free)
        log_w = log_w.masked_fill(~free.any(-1, keepdim=True), 0.0)  # a row of -inf alone would have a NaN gradient
        return torch.where(free, log_w.log_softmax(-1), -torch.inf)  # correct even if all are -1e300
