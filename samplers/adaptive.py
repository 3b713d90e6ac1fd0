r"""Adaptive steps: ancestral steps whose length follows an estimate of the error they make.

A step errs because sites move without seeing each other. With r_i the rate at which site i is redrawn per unit of
alpha, r its mean over the sites that can be, and c the change that one move makes to the predictions of the others, in
total variation summed over them, a step of length d errs by about

    e = 1/2 (sum_i r_i) r c d^2

and the step is as long as e <= tolerance (sum_i r_i) d / L. On average sum_i r_i = L per unit of alpha on a masked
process, so this is the error per unit of alpha, spent where sites move: d = 2 tolerance / (L r c). What a move changes
is seen by looking again after it: c is the mean over the row's moves so far, of sum_i TV(O_i before, O_i after), with
one move's weight on 1 to begin with. So the step's length depends on the past alone; a step is never taken back, which
would favour outcomes that change little. Every row has steps of its own.

Reference: step selection in tau-leaping (Cao, Gillespie and Petzold, 2006).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import real
from discdiff.handlers import At
from discdiff.operator import Predictor
from discdiff.prediction import Prediction
from discdiff.process import Process
from discdiff.rank_one import RankOne
from discdiff.samplers.ancestral import given, reverse_tokens
from discdiff.samplers.choosing import compare
from discdiff.samplers.leap import own_probability
from discdiff.state import State

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive(Predictor):
    """As many ancestral steps from t to s as the tolerance asks for, such as on grid=[1, 0]; a call for each.

    Args:
        tolerance: the wanted error in total variation per unit of alpha, which is time on the linear schedule.
        first: the length of the first step, in alpha.

    Raises:
        ValueError: if they are not positive.
    """

    tolerance: float = 0.1
    first: float = 1 / 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", real(self.tolerance, "Adaptive: tolerance", "(0, inf)"))
        object.__setattr__(self, "first", real(self.first, "Adaptive: first", "(0, 1]"))

    @property
    def nfe(self) -> float | None:
        return None  # as the tolerance asks

    def check(self, process: Process) -> None:
        if not isinstance(process, RankOne) or process.schedule.sites is not None:
            raise ValueError(f"{self} needs a process of rank one with one clock, got {process}")

    def __call__(self, state: State, at: At) -> State:
        process, tokens, turn = at.process, state.tokens, 1
        assert isinstance(process, RankOne)
        begin, end = (process.sitewise(at.alpha(u), tokens[:, :1]) for u in (state.t, at.s))
        rows = torch.arange(len(tokens), device=tokens.device)
        alpha = begin
        length = torch.full_like(alpha, self.first)
        changes, moves = torch.ones_like(alpha), torch.ones_like(alpha)
        seen = None
        while len(rows):
            some = replace(state, tokens=tokens, past=None, seen=None).select(rows)
            a, then = alpha[rows], alpha[rows] + length[rows]
            then = torch.where(then < end[rows], then, end[rows])
            said = at.predict(some, process.schedule.time(a)) if seen is None else seen
            after = reverse_tokens(some, some.free, at.again(turn), a, then, partial(given, said))
            tokens, alpha = tokens.index_copy(0, rows, after), alpha.index_copy(0, rows, then)
            step, turn = then - a, turn + 1
            ready = process.candidate(after, then, (then + step).clamp(max=1.0)).where(some.free, 0.0)
            left = ((then < end[rows])[:, 0] & (ready.sum(-1) > 0)).nonzero()[:, 0]
            rows = rows[left]
            if len(rows):
                now, ready = some.at(after).select(left), ready[left]
                seen = at.predict(now, process.schedule.time(then[left]))
                known = (ready > 0) & _open(process, some.tokens[left], a[left])
                changes[rows] += _change(said.select(left), seen, known)
                moves[rows] += (now.tokens != some.tokens[left]).sum(-1, keepdim=True)
                own = own_probability(seen, ready > 0)
                accept = torch.where(own > 0, process.acceptance(own.log(), now.tokens, then[left]), 1.0)
                rate, count = ready * accept / step[left], (ready > 0).sum(-1, keepdim=True)
                sites = now.free.sum(-1, keepdim=True)
                wanted = 2 * self.tolerance * count * moves[rows] / (sites * rate.sum(-1, keepdim=True) * changes[rows])
                wanted = torch.where(count > 1, wanted, torch.inf).clamp(max=1.0)  # a single site makes no error
                length = length.index_copy(0, rows, torch.minimum(wanted, 4 * length[rows]))
        return state.at(tokens, at.s)


def _open(process: RankOne, x: Int[Tensor, "B L"], alpha: Float[Tensor, "B 1"]) -> Bool[Tensor, "B L"]:
    """The sites that could have moved, so that their prediction is known."""
    return process.candidate(x, alpha, torch.ones_like(alpha)) > 0


def _change(before: Prediction, after: Prediction, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B 1"]:
    """sum_i TV(O_i, O'_i) over the chosen sites."""
    tv = compare(before.loo_at(where), after.loo_at(where), lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2)
    return torch.zeros(where.shape, dtype=torch.float64, device=where.device).masked_scatter(where, tv).sum(-1, True)
