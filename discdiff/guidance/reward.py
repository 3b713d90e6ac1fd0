r"""Guide by the weights of whole sequences that are drawn from the model's own prediction: Doob's transform by draws.

W is the weight of a clean sequence, and x^1, ..., x^M are M draws of x0 given the noisy z. D is the denoiser, O the
leave-one-out prediction. Each estimator gives a tilt g, and O' ~ O g:

    swap              g_i(v) = mean_m W(x^m with x_i = v)
    control_variate   g_i(v) = 1 + 1/M sum_m (W(x^m) - W_{-m}) / mean W  1(x^m_i = v) / D_i(v),   at least 0
    self_normalised   g_i(v) = sum_m w_m 1(x^m_i = v) / D_i(v),   w = W(x) / sum W(x)
    standardised      as self_normalised, with w = softmax((r - mean r) / (temperature std r)),   r = log W

W_{-m} is the mean weight of the other draws. They differ in four ways:

* Cost: "swap" takes M V rewards for each site that is read, the others M rewards for each row.
* Neutral element: equal weights change nothing under "swap" and "control_variate". The other two put the draws in place
  of D.
* Limit: with more draws "control_variate" and "self_normalised" tend to the tilted D of the law of the draws, with a
  bias of order 1/M. "swap" has less error, but keeps a bias: the other sites of x^m were drawn without the knowledge
  that x_i = v. The bias is 0 where a site is independent of the others given z.
* Target: "standardised" does not tend to p0 W / Z, as its weights do not depend on the scale of log W. It is the
  published choice, kept for comparison.

The draws are those of a product of D_i unless ``rollout`` is above 1. A product is no law of whole sequences given z,
and its bias does not vanish with more draws.

Reference: DOIT (2026, https://arxiv.org/abs/2602.16198), with "standardised" at temperature .6 and 8 draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real, shown, whole
from discdiff.choices import Draws, Sites
from discdiff.denoiser import Denoiser, Guide, check_denoiser, frozen_time
from discdiff.guidance.noisy import refuse_autoregressive
from discdiff.guidance.reading import Kept, changed
from discdiff.kernels import dispatch as kernels
from discdiff.operator import GuideAt, State, choose
from discdiff.prediction import Prediction

__all__ = ["Reward"]

Estimator = Literal["swap", "control_variate", "self_normalised", "standardised"]


@dataclass(frozen=True)
class Reward(Guide):
    r"""Guide that draws M clean sequences for each prediction and tilts it by their weights W.

    The draws are one random choice, keyed by the row, so ``theory.kernel`` enumerates them. They ignore truncations and
    joint laws of earlier guides. Weights are computed when a site is first read, and count in ``Samples.rewards``. In
    ``Blockwise`` the weight is that of the clean prefix and the block. A row with a shorter prefix than others has -1
    at its end.

    A row whose M weights are all 0 stays unchanged; with "swap", so does a site where every token has weight 0. At a
    revealed site, where D is a point mass, "swap" tilts O by g all the same. The other estimators leave it unchanged,
    because its draws are all equal. Gradients do not flow through the weights.

    Args:
        log_weight: maps whole sequences of clean tokens (N, L) to (N,), natural log of W; -inf where W is 0.
        samples: M.
        estimator: "swap", "control_variate", "self_normalised" or "standardised"; the formulas are at the top of
            guidance/reward.py. With one draw "control_variate" changes nothing.
        rollout: k. At 1 the sites of a draw are independent, from D. Above 1 each draw is the end of k ancestral steps
            of ``model`` from z, in equal steps of time; this takes k - 1 more calls, of M rows for each row.
        model: the denoiser without this guide, or its name in the mapping that a ``Sampler`` is given; with
            ``rollout`` above 1 alone.
        temperature: the weight is W^{1 / temperature}. With "standardised" it divides the standardised rewards instead.
            As it falls along a plan, the samples tend to the sequences of largest W, if there are enough draws: with
            few, "swap" tends to the best token of each site given the other sites of a draw.
        at_once: the most sequences in one call of ``log_weight``.

    Raises:
        TypeError: if ``log_weight`` is no function, or ``model`` no denoiser.
        ValueError: for an unknown estimator or a number out of range; if ``model`` is missing or not used; in sampling,
            for a weight that is NaN or +inf, and if the operator asks for an autoregressive prediction.
    """

    log_weight: Callable[[Tensor], Tensor]
    samples: int = 4
    estimator: Estimator = "swap"
    rollout: int = 1
    model: Denoiser | str | None = None
    temperature: float = 1.0
    at_once: int = 4096
    random = True

    def __post_init__(self) -> None:
        if not callable(self.log_weight) or isinstance(self.log_weight, type):
            raise TypeError(f"Reward: log_weight must map sequences (N, L) to (N,), got {shown(self.log_weight)}")
        if self.estimator not in get_args(Estimator):
            known = ", ".join(map(repr, get_args(Estimator)))
            raise ValueError(f"Reward: estimator must be one of {known}, got {self.estimator!r}")
        numbers = {name: whole(getattr(self, name), f"Reward: {name}", 1) for name in ("samples", "rollout", "at_once")}
        if (self.model is None) == (numbers["rollout"] > 1):
            raise ValueError(
                f"Reward: rollout={numbers['rollout']} with model={shown(self.model)}; steps after the first one call "
                "the model without this guide, so rollout > 1 takes model=, and rollout=1 takes none"
            )
        if self.model is not None and not isinstance(self.model, str):
            check_denoiser(self.model, "Reward")
        vars(self).update(
            numbers, temperature=real(self.temperature, "Reward: temperature", "(0, inf)"),
            models=() if self.model is None else (self.model,), nfe=numbers["rollout"] - 1.0,
        )  # fmt: skip

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        refuse_autoregressive(at)
        if self.estimator == "control_variate" and self.samples == 1:
            return prediction
        said = prediction.untruncated
        drawn, law = self._draws(said, state, at)
        sequences, x = at.sequence(drawn), said.x
        if self.estimator == "swap":
            swapped = Kept(partial(self._swapped, sequences, said, at), x)
            return changed(prediction, lambda log_o, row, position: log_o + swapped(row, position))
        r = self._rewards(sequences.flatten(0, 1), at.rows.repeat_interleave(self.samples), at).view(drawn.shape[:2])
        shares, log_d = self._shares(r), law.site_log_prob(drawn)
        per_d = torch.where(log_d > -torch.inf, (-log_d).exp(), 0.0)
        known = (r > -torch.inf).any(-1, keepdim=True) & ~said.process.revealed(x, said.alpha)
        start = 1.0 if self.estimator == "control_variate" else 0.0

        def change(log_o: Tensor, row: Tensor, position: Tensor) -> Tensor:
            g = torch.full_like(log_o, start)
            g = g.scatter_add(1, drawn[row, :, position], shares[row] * per_d[row, :, position])
            return log_o + torch.where(known[row, position][:, None], kernels.log(g.clamp(min=0)), 0.0)

        return changed(prediction, change)

    # --- draws --------------------------------------------------------------------------------------------------------

    def _draws(self, said: Prediction, state: State, at: GuideAt) -> tuple[Int[Tensor, "B M L"], Draws]:
        """Return the draws, tokens (B, M, L), and the law of a draw from D."""
        law = Draws(*_laws(said), self.samples)
        if self.rollout == 1:
            return choose("x0", law, state, at), law
        assert self.model is not None and at.times is not None
        process, owner = said.process, torch.arange(len(said.x), device=said.x.device).repeat_interleave(self.samples)
        time = at.times.detach().double().amax(-1, keepdim=True).expand(len(said.x), 1)
        one, rows, times = said, state, time
        for step in range(1, self.rollout):
            left = 1 - step / self.rollout
            alpha = process.schedule.survival(frozen_time(left * times, rows.frozen, said.x.device))
            # at time 0, where no time is left, a hidden site waits for the last draw
            moving = ~process.revealed(one.x, one.alpha) & (alpha > one.alpha)
            reverse = Draws(one[moving].reverse(alpha), process.column(one.x), self.samples, apart=step > 1)
            columns = choose(f"rollout {step}", reverse, state, at).flatten(0, 1)
            rows, times = state.select(owner), time[owner]
            rows = rows.at(process.place(columns, said.x[owner]))
            one = at.ask(self.model, rows, left * times, name=f"rollout {step}").untruncated
        return choose("x0", Draws(*_laws(one), self.samples, apart=True), state, at), law

    # --- weights ------------------------------------------------------------------------------------------------------

    def _rewards(self, x: Int[Tensor, "N W"], rows: Int[Tensor, " N"], at: GuideAt) -> Float[Tensor, " N"]:
        """Return the logs of the weights of sequences (N, W), drawn for the rows with ids (N,)."""
        parts = zip(x.split(self.at_once), rows.split(self.at_once), strict=True)
        log_w = torch.cat([at.reward(self.log_weight, some, ids) for some, ids in parts])
        return log_w if self.estimator == "standardised" else log_w / self.temperature

    def _swapped(
        self, sequences: Int[Tensor, "B M W"], said: Prediction, at: GuideAt, row: Tensor, position: Tensor
    ) -> Float[Tensor, "n V"]:
        """Return log sum_m W(x^m with x_i = v) at n sites."""
        tokens = said.process.data_tokens.to(row.device)
        place, each = at.offset[row] + position, self.samples * len(tokens)
        log_w = [torch.zeros(0, dtype=torch.float64, device=row.device)]
        for part in torch.arange(len(row) * each, device=row.device).split(self.at_once) if len(row) else ():
            site, token = part // each, tokens[part % len(tokens)]
            x = sequences[row[site], part // len(tokens) % self.samples].scatter(1, place[site, None], token[:, None])
            log_w.append(self._rewards(x, at.rows[row[site]], at))
        r = torch.cat(log_w).view(len(row), self.samples, len(tokens))
        top = r.amax((1, 2), keepdim=True)  # without it a large constant would cost digits
        log_g = kernels.log_sum_exp((r - top.where(top > -torch.inf, 0.0)).transpose(1, 2))
        nothing = log_g.new_full((len(row), said.process.vocab_size), -torch.inf)
        return nothing.index_copy(1, tokens, log_g)

    def _shares(self, r: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """Return what each draw adds to D^h at its tokens, from the logs of the weights, (B, M) each."""
        possible = r > -torch.inf
        if self.estimator == "standardised":
            count = possible.sum(-1, keepdim=True)
            apart = r - torch.where(possible, r, 0.0).sum(-1, keepdim=True) / count
            apart = torch.where(possible, apart, 0.0)
            spread = (apart.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
            differ = spread > 1e-12 * torch.where(possible, r.abs(), 0.0).amax(-1, keepdim=True)  # beyond rounding
            r = torch.where(differ, apart / (self.temperature * spread), 0.0).masked_fill(~possible, -torch.inf)
        w = r.softmax(-1)
        return w if self.estimator != "control_variate" else w - (1 - w) / (self.samples - 1)


def _laws(said: Prediction) -> tuple[Sites, Int[Tensor, "B L"]]:
    """Return D at the sites that are not revealed, and the tokens (B, L) of the others."""
    return said[~said.process.revealed(said.x, said.alpha)].denoiser, said.process.column(said.x)
