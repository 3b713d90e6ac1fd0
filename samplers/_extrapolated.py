r"""Step with rates that combine two predictions, for the methods of higher order.

    R = ( a R_1 + b R_0 )_+,      a + b = 1

R_1 are the reverse rates at one state and time, R_0 those at an earlier state and time. If a method extrapolates, b is
negative. Negative rates are clipped to 0; a method loses its order where that happens. A rate is that of setting
site i to v, from any state. So R_0 is also defined at a site that has moved after the earlier time.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from discdiff.choices import Coins, Tokens, spread
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, State, choose
from discdiff.prediction import Prediction
from discdiff.process import Moment

__all__ = ["combined_leap", "share"]


def combined_leap(
    state: State,
    late: Prediction,
    early: Prediction,
    a: Float[Tensor, "B L"],
    length: Float[Tensor, "B L"],
    at: At,
) -> State:
    """Let each site jump from ``state``, at most once, with frozen rates (a R_late + (1 - a) R_early)_+.

    A site with total rate R jumps with probability 1 - exp(-length R).

    Args:
        state: the state at the start.
        late, early: the predictions that give R_late and R_early.
        a: the weight of R_late, (B, L).
        length: the length of the step in alpha, (B, L).
        at: the process, run and address of the operator.
    """
    process, x = at.process, state.tokens
    b, free = 1 - a, state.free
    if (rank := process.rank_one) is not None:
        most = sum(
            weight.clamp(min=0) * rank.exit(said.x, said.alpha, 0.0).total for weight, said in ((a, late), (b, early))
        )
        bound = -torch.expm1(-length * most).where(free, 0.0)
        where = choose("where", Coins(bound), state, at)
    else:
        bound, where = torch.ones_like(length), free
    view = late[where]
    one, other, own = view.rates.rows, early[where].rates.rows, process.column(x[view.place])
    weight, back = a[view.place], b[view.place]

    def rates(n: Tensor) -> Tensor:
        total = weight[n][:, None] * one.dense(n).exp() + back[n][:, None] * other.dense(n).exp()
        return kernels.log(total.scatter(-1, own[n][:, None], 0.0).clamp(min=0))

    both = view.mixed_rates(weight), early[where].mixed_rates(back)
    mixed = None if both[0] is None or both[1] is None else kernels.Mixed((both[0], both[1]), without=own)
    sites = view.computed(rates, empty=True, mixed=mixed)
    total = spread(sites.known().log_sum_exp.exp(), where, 0.0)
    accept = torch.where(where, -torch.expm1(-length * total) / bound.where(where, 1.0), 0.0).clamp(max=1.0)  # rounding
    where = choose("accept", Coins(accept), state, at)
    at.report(state, jumped=lambda: where.sum(-1))
    token = choose("state", Tokens(sites.narrow(where), process.column(x)), state, at)
    return state.at(torch.where(where, process.place(token, x), x), at.s)


def share(state: State, part: float, at: At) -> tuple[float, Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Return the time that divides a step at the fraction ``part``, and the lengths of the two parts.

    The step goes from the state's time to ``at.s``. The fraction is measured in alpha, or in time if every position
    has a clock of its own. Both lengths are in alpha, (B, L).
    """
    process, schedule = at.process, at.process.schedule
    start, end = at.alpha(state.t), at.alpha(at.s)
    if schedule.sites is None:
        then = start + part * (end - start)
        time = Moment.of(schedule.time(then)) if isinstance(then, Tensor) else float(schedule.time(then))
    else:
        time = state.t + part * (at.s - state.t)
    begin, middle, finish = (process.sitewise(alpha, state.tokens) for alpha in (start, at.alpha(time), end))
    return time, middle - begin, finish - middle
