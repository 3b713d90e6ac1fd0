r"""Draw a clean block and re-noise the sites with the largest scores under the network's autoregressive law.

    x    ~ D(. | z)                                        at every free site; on a masked process, at the masks
    p_i  = p(. | prefix, x_{<i})                           the same network's autoregressive law
    k    = max(1, round((1 - alpha_s) n)) sites of the n free ones are re-noised: those with the largest score

    "nll"  -log p_i(x_i)         "gap"  max_v log p_i(v) - log p_i(x_i)        "entropy"  H(p_i)
    "kl"  KL(p_i || D_i(z))      "reverse_kl"  KL(D_i(z) || p_i)               "tv"  TV(p_i, D_i(z))

These scores depend on the drawn tokens, so the end law is biased: with more steps samples concentrate on the mode.
Report the samples' entropy beside any quality measure. Two scores depend on no token and need no autoregressive law:

    "random"   re-noises k uniformly chosen sites. On a masked process the end law converges to p0, fast. On a uniform
               process at least one site is re-noised even if alpha_s implies none; the denoiser at alpha_s does not
               remove the excess, so the law drifts
    "forward"  re-noises every site with probability 1 - alpha_s, as the forward process does. The end law converges to
               p0 on every process

References: BlockGen (2026, https://arxiv.org/abs/2606.02241); random re-noising is that of ReMDM (Wang et al., 2025,
https://arxiv.org/abs/2503.00307).
"""

from dataclasses import dataclass, replace
from typing import Literal, SupportsIndex, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.choices import Coins, Ranking, spread
from discdiff.operator import At, Operator, Predictor, State, choose, when
from discdiff.prediction import Prediction
from discdiff.samplers._choosing import best, compare, kl_rows, total_variation
from discdiff.samplers.ancestral import Ancestral, reverse_step

__all__ = ["ARPC", "Guided"]

Score = Literal["nll", "gap", "entropy", "kl", "reverse_kl", "tv", "random", "forward"]
_BLIND = ("random", "forward")


@dataclass(frozen=True)
class ARPC(Predictor):
    """Draw clean tokens, then re-noise the sites with the largest scores.

    A step makes two denoiser calls, or one with the score "random" or "forward". The second call has two queries a
    token. For a network without a method ``score`` it gets one copy of the block for each site of the block.

    Args:
        score: the score that chooses the sites: "nll", "gap", "entropy", "kl", "reverse_kl", "tv", "random" or
            "forward". Scores are defined at the top of samplers/arpc.py.
        temperature: 0 takes the largest scores. Above 0 sites are drawn without replacement, with weights
            exp(score / temperature) (Plackett-Luce).

    Raises:
        ValueError: for an unknown score or a negative temperature; in sampling, if the network does not give its
            autoregressive law (``Denoiser.autoregressive``).
    """

    score: Score = "nll"
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"ARPC: score must be one of {', '.join(map(repr, get_args(Score)))}, got {self.score!r}")
        object.__setattr__(self, "temperature", real(self.temperature, "ARPC: temperature", "[0, inf)"))

    @property
    def weighable(self) -> bool:
        return self.temperature > 0 or self.score in _BLIND

    def scheduled(self, steps: SupportsIndex, *, warmup: SupportsIndex = 0, period: SupportsIndex = 1) -> Operator:
        """Return the published schedule, in which some steps use this operator and the others are ancestral.

        From step ``warmup`` on, every ``period``-th step uses this operator. Steps are counted from 0. The last
        step is always ancestral. A block takes at most
        steps + floor((steps - 2 - warmup) / period) + 1 denoiser calls, or ``steps`` if warmup > steps - 2.

        Raises:
            ValueError: for ``steps`` or ``period`` below 1, or ``warmup`` below 0; in sampling, if a step of the grid
                does not start at one of the times 1 - i / steps, for i = 0, 1, ...
        """
        steps, warmup = whole(steps, "ARPC: steps", 1), whole(warmup, "ARPC: warmup", 0)
        return when(Guided(steps, warmup, whole(period, "ARPC: period", 1)), self, Ancestral())

    @property
    def nfe(self) -> float | None:
        return 1.0 if self.score in _BLIND else 2.0

    def __call__(self, state: State, at: At) -> State:
        state = replace(state, seen=at.predict(state))
        clean = reverse_step(state, state.free, at, to=0.0)
        alpha = at.process.sitewise(at.alpha(at.s), state.tokens)
        process = at.process
        if self.score == "forward":
            turned = torch.ones_like(alpha) - process.kept(alpha)
            where = choose("site", Coins(turned.where(state.free, 0.0)), state, at)
            noise = process.renoise(clean.tokens, state.free, where, alpha)
        else:
            where = self._chosen(clean, at.predict(state), alpha, at)
            most = at.alpha(1.0) if process.rank_one is None else alpha  # in general: q at alpha(1)
            noise = process.renoise(clean.tokens, where, where, most)
        again = choose("noise again", noise, state, at)
        return clean.at(again, at.s)

    def _chosen(self, clean: State, said: Prediction, alpha: Float[Tensor, "B L"], at: At) -> Bool[Tensor, "B L"]:
        """Return a mask (B, L) of the k sites of each row to re-noise, see samplers/arpc.py; none at alpha_s = 1."""
        count = ((1 - alpha).mean(-1) * clean.free.sum(-1)).round().clamp(min=1).long()
        count = torch.where((alpha < 1).all(-1), count, 0)
        score = torch.zeros_like(alpha)
        if self.score != "random" and bool(count.any()):
            score = self._scores(clean, said, at)
        score = score.masked_fill(~clean.free, -torch.inf)
        if self.temperature == 0 and self.score != "random":
            return best(score, count)
        log_w = score if self.score == "random" else score / self.temperature
        return choose("site", Ranking(log_w.log_softmax(-1), count), clean, at) >= 0

    def _scores(self, clean: State, said: Prediction, at: At) -> Float[Tensor, "B L"]:
        free = clean.free
        law, own = at.autoregressive(clean)[free].loo, at.process.column(clean.tokens)[free]
        if self.score == "tv":
            rows = total_variation(law, said[free].denoiser)
        elif self.score in ("kl", "reverse_kl"):
            rows = compare(law, said[free].denoiser, _DIVERGENCES[self.score])
        elif self.score == "entropy":
            rows = law.known(entropy=True).entropy
        else:
            reading = law.known(at=own)
            assert reading.value is not None
            # from logits, whose normaliser cancels: exactly 0 at the likeliest token, whatever the order of summation
            gap = reading.peak.amax(-1).double() - reading.value.double()
            rows = gap if self.score == "gap" else -reading.log_prob
        return spread(rows.double().clamp(-1e300, 1e300), free, 0.0)


_DIVERGENCES = {
    "kl": kl_rows,
    "reverse_kl": lambda log_p, log_q: kl_rows(log_q, log_p),
}


@dataclass(frozen=True)
class Guided:
    """Condition for ``when``: it holds in step i of ``steps`` if i >= warmup and (i - warmup) % period = 0.

    The steps are equal and counted from 0. In the last step the condition never holds.

    Raises:
        ValueError: when called with a time at which none of the equal steps begins.
    """

    steps: int
    warmup: int
    period: int

    def __call__(self, t: float) -> bool:
        i = round((1 - t) * self.steps)
        if abs((1 - t) * self.steps - i) > 1e-6:
            raise ValueError(f"{self} is for {self.steps} equal steps of t from 1 to 0; none begins at t = {t:g}")
        return self.warmup <= i < self.steps - 1 and (i - self.warmup) % self.period == 0

    def __repr__(self) -> str:
        return f"guided(steps={self.steps}, warmup={self.warmup}, period={self.period})"
