r"""Take ancestral steps whose length is chosen from an estimate of their error.

A step has an error because sites move independently of each other. Let r_i be the rate at which site i is redrawn per
unit of alpha, and r its mean over the sites that can be redrawn. Let c be the change that one move makes to the other
sites' predictions, in total variation summed over them. A step of length d then has an error of about

    e = 1/2 (sum_i r_i) r c d^2

The step takes the largest d with e <= tolerance (sum_i r_i) d / L, so d = 2 tolerance / (L r c) for L free sites. On a
masked process sum_i r_i = L per unit of alpha on average, so ``tolerance`` is the estimated error per unit of alpha.

c is the mean over the row's moves so far of sum_i TV(O_i before, O_i after), with O the leave-one-out prediction. The
mean starts with one pseudo-move of value 1. O after a move comes from the next step's denoiser call. The length of a
step depends only on earlier steps, and is at most four times the length of the last one. No step is rejected, because
rejection would favour outcomes that change little. Every row has its own steps.

Reference: step selection in tau-leaping (Cao, Gillespie and Petzold, 2006, https://doi.org/10.1063/1.2159468).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import real
from discdiff.choices import spread
from discdiff.operator import At, Predictor, State
from discdiff.prediction import Prediction
from discdiff.process import Process, RankOne
from discdiff.samplers._choosing import total_variation
from discdiff.samplers._leap import own_probability
from discdiff.samplers.ancestral import reverse_tokens

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive(Predictor):
    """Take as many ancestral steps from t to s as the tolerance needs; one denoiser call a step.

    The grid may have a single interval: ``grid=[1, 0]``.

    Args:
        tolerance: the error allowed in total variation per unit of alpha (on the linear schedule, of time).
        first: the length of the first step, in alpha, in (0, 1].

    Raises:
        ValueError: for an argument out of range; in sampling, for a process that is not rank-one, or one with a clock
            for each site.
    """

    tolerance: float = 0.1
    first: float = 1 / 64
    weighable = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", real(self.tolerance, "Adaptive: tolerance", "(0, inf)"))
        object.__setattr__(self, "first", real(self.first, "Adaptive: first", "(0, 1]"))

    @property
    def nfe(self) -> float | None:
        return None  # depends on the tolerance

    def check(self, process: Process) -> None:
        if process.rank_one is None or process.schedule.sites is not None:
            raise ValueError(f"{self} needs a process of rank one with one clock, got {process}")

    def __call__(self, state: State, at: At) -> State:
        process, tokens, turn = at.rank_one, state.tokens, 1
        begin, end = (process.sitewise(at.alpha(u), tokens[:, :1]) for u in (state.t, at.s))
        rows = torch.arange(len(tokens), device=tokens.device)
        alpha = begin
        length = torch.full_like(alpha, self.first)
        changes, moves = torch.ones_like(alpha), torch.ones_like(alpha)
        seen, taken = None, torch.zeros_like(rows)
        while len(rows):
            some = replace(state, tokens=tokens, past=None, seen=None).select(rows)
            a, then = alpha[rows], alpha[rows] + length[rows]
            then = torch.where(then < end[rows], then, end[rows])
            said = at.again(turn).predict(some, process.schedule.time(a)) if seen is None else seen
            after = reverse_tokens(replace(some, seen=said), some.free, a, then, at.again(turn))
            tokens, alpha = tokens.index_copy(0, rows, after), alpha.index_copy(0, rows, then)
            step, turn = then - a, turn + 1
            taken[rows] += 1
            ready = process.candidate(after, then, (then + step).clamp(max=1.0)).where(some.free, 0.0)
            left = ((then < end[rows])[:, 0] & (ready.sum(-1) > 0)).nonzero()[:, 0]
            rows = rows[left]
            if len(rows):
                now, ready = some.at(after).select(left), ready[left]
                seen = at.again(turn).predict(now, process.schedule.time(then[left]))
                known = (ready > 0) & _open(process, some.tokens[left], a[left])
                changes[rows] += _change(said.select(left), seen, known)
                moves[rows] += (now.tokens != some.tokens[left]).sum(-1, keepdim=True)
                own = own_probability(replace(now, seen=seen), ready > 0, at)
                accept = torch.where(own > 0, process.acceptance(own.log(), now.tokens, then[left]), 1.0)
                rate, count = ready * accept / step[left], (ready > 0).sum(-1, keepdim=True)
                sites = now.free.sum(-1, keepdim=True)
                wanted = 2 * self.tolerance * count * moves[rows] / (sites * rate.sum(-1, keepdim=True) * changes[rows])
                wanted = torch.where(count > 1, wanted, torch.inf).clamp(max=1.0)  # no error if a single site can move
                length = length.index_copy(0, rows, torch.minimum(wanted, 4 * length[rows]))
        at.report(state, step_size=lambda: (end - begin)[:, 0] / taken)
        return state.at(tokens, at.s)


def _open(process: RankOne, x: Int[Tensor, "B L"], alpha: Float[Tensor, "B 1"]) -> Bool[Tensor, "B L"]:
    """Return which sites (B, L) can move from x at alpha (B, 1); at these the leave-one-out prediction is defined."""
    return process.candidate(x, alpha, torch.ones_like(alpha)) > 0


def _change(before: Prediction, after: Prediction, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B 1"]:
    """Return sum_i TV(O_i, O'_i), (B, 1), over the chosen sites of each row: O before the moves, O' after them."""
    tv = total_variation(before[where].loo, after[where].loo)
    return spread(tv, where, 0.0).sum(-1, True)
