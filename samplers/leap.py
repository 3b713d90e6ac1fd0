r"""Steps with frozen rates: each site leaves its state by itself, or stays.

The reverse rates at time t, per unit of alpha and frozen for the step, are

    R(z -> v) = Q(v, z) c(v) / (alpha c(z)),      c = O Q_t

and a step of length d = alpha_s - alpha_t lets a site with total rate R jump with a probability P(d R), to v with
probability R(z -> v) / R. The clock is alpha, so that laws depend on time through it alone; on the linear schedule it
is time itself. On processes of rank one a bound on R that needs no logits chooses the candidates, the prediction at a
candidate's own token says whether it jumps, and only a jump to data reads its row.
"""

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.distributions import Coins, Tokens
from discdiff.handlers import At, choose
from discdiff.operator import Predictor
from discdiff.prediction import Prediction
from discdiff.process import Survival
from discdiff.rank_one import Exit, Masked, RankOne
from discdiff.samplers.ancestral import Ancestral
from discdiff.state import State

__all__ = ["Leap", "jump", "own_probability"]


class Leap(Predictor):
    """A step with frozen rates; subclasses say with which probability a site jumps. The step to time 0 is ancestral."""

    @abstractmethod
    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """P(r), the probability that a site jumps, from r = rate times length of the step."""

    def bound(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """A bound on ``probability`` for this rate and all below it."""
        return self.probability(rate)

    def exit(self, process: RankOne, x: Int[Tensor, "B L"], alpha: Survival, own: Float[Tensor, "B L"]) -> Exit:
        """The rates, given O(z) at each site's own token; the reverse process's by default."""
        return process.exit(x, alpha, own)

    def most(self, process: RankOne, x: Int[Tensor, "B L"], alpha: Survival) -> Exit:
        """Rates that bound ``exit`` for every O(z); on a masked process, where z tells all, those of ``exit``."""
        return process.exit(x, alpha, 0.0)

    def __call__(self, state: State, at: At) -> State:
        if at.s == 0:
            return Ancestral()(state, at)
        alpha_t, prediction = at.alpha(state.t), at.predict(state)
        length = at.process.sitewise(at.alpha(at.s), state.tokens) - at.process.sitewise(alpha_t, state.tokens)
        if isinstance(at.process, RankOne):
            most = self.most(at.process, state.tokens, alpha_t)
            known = isinstance(at.process, Masked)  # a mask is no token: its rate needs no prediction
            bound = (self.probability if known else self.bound)(_times(length, most.total)).where(state.free, 0.0)
            where = choose("where", Coins(bound), state, at)
            exit = most
            if not known:
                exit = self.exit(at.process, state.tokens, alpha_t, own_probability(prediction, where))
                accept = self.probability(_times(length, exit.total)) / bound.where(where, 1.0)
                accept = torch.where(where, accept, 0.0).clamp(max=1.0)
                where = choose("accept", Coins(accept), state, at)
            return jump(state.at(state.tokens, at.s), where, exit, prediction, at)
        sites = prediction.rates_at(state.free)
        total = torch.zeros_like(length).masked_scatter(state.free, sites.known().log_sum_exp.exp())
        where = choose("where", Coins(self.probability(_times(length, total))), state, at)
        return state.at(choose("state", Tokens(sites.narrow(where), state.tokens), state, at), at.s)


def _times(length: Float[Tensor, "B L"], rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """The rate times the length of the step; an infinite one stays so, and has no derivative."""
    endless = rate == torch.inf
    return torch.where(endless, torch.inf, length * rate.where(~endless, 1.0))


def own_probability(prediction: Prediction, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """O(z) at the chosen sites, 0 at others and at masks; float64.

    1 where z rules all other tokens out, so that a denoiser does not determine O(z) and D(z) = 1 whatever it is.
    """
    process, x = prediction.process, prediction.x
    token = where & (process.column(x) < process.vocab_size)
    if process.mask_id is not None:
        token = token & (x != process.mask_id)
    sure = torch.zeros_like(token)
    if prediction.predicts == "denoiser":
        sure = token & process.settled(x, prediction.alpha)
    if not bool(token.any()):
        return torch.zeros_like(prediction.alpha)
    return torch.where(token, prediction.log_own(token & ~sure).exp(), 0.0)


def jump(state: State, where: Bool[Tensor, "B L"], exit: Exit, prediction: Prediction, at: At) -> State:
    """Move the chosen sites to other states, as ``exit`` says; three sites: "data", "token", "noise"."""
    process, x = at.process, state.tokens
    assert isinstance(process, RankOne)
    data = choose("data", Coins(torch.where(where, exit.data, 0.0)), state, at)
    tokens = choose("token", Tokens(prediction.others_at(data), process.column(x)), state, at)
    noise = choose("noise", process.elsewhere(x, where & ~data, exit.anchored), state, at)
    return state.at(torch.where(data, process.place(tokens, x), noise))
