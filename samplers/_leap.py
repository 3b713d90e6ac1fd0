r"""Take steps with frozen rates, in which each site jumps independently of the others or stays.

The reverse rates at time t, per unit of alpha and frozen for the step, are

    R(z -> v) = Q(v, z) c(v) / (alpha c(z)),      c = O Q_t

Q is the forward generator per unit of -log alpha, O the leave-one-out prediction (LOO) and Q_t the forward transition.
In a step of length d = alpha_s - alpha_t a site with total rate R jumps with probability P(d R). It jumps to v with
probability R(z -> v) / R. The clock is alpha, so the laws depend on time through alpha alone; on the linear schedule
1 - alpha is time.

On rank-one processes sites are proposed with a bound on R that needs no logits. A proposed site is accepted with a
probability that depends on the LOO at its own token alone. So logits are read only at proposed sites, and on a masked
process only at sites that jump to data.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Coins, Tokens, spread
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import Exit, RankOne, Survival
from discdiff.samplers.ancestral import Ancestral

__all__ = ["Leap", "jump", "own_probability"]


class Leap(Predictor):
    """Step with frozen rates; a subclass defines the probability of a jump.

    The step to time 0 is ancestral.

    Shapes: tokens, rates and probabilities (B, L).
    """

    @abstractmethod
    def probability(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """Return P(r), the probability that a site jumps; ``rate`` is r, its total rate times the step's length."""

    def bound(self, rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """Return an upper bound on ``probability`` for this rate and all smaller rates."""
        return self.probability(rate)

    def exit(self, process: RankOne, x: Int[Tensor, "B L"], alpha: Survival, own: Float[Tensor, "B L"]) -> Exit:
        """Return exit rates, given the leave-one-out probability ``own`` = O(z) of each site's own token z.

        The default gives the exit rates of the reverse process.
        """
        return process.exit(x, alpha, own)

    def most(self, process: RankOne, x: Int[Tensor, "B L"], alpha: Survival) -> Exit:
        """Return upper bounds on the rates of ``exit``, which hold for every leave-one-out probability O(z).

        On a masked process z determines the rates, and the bound is exact.
        """
        return process.exit(x, alpha, 0.0)

    def __call__(self, state: State, at: At) -> State:
        if at.s == 0:
            return Ancestral()(state, at)
        process, alpha_t = at.process, at.alpha(state.t)
        state = replace(state, seen=at.predict(state))
        length = process.sitewise(at.alpha(at.s), state.tokens) - process.sitewise(alpha_t, state.tokens)
        if (rank := process.rank_one) is not None:
            most = self.most(rank, state.tokens, alpha_t)
            known = rank.masks  # the rate at a mask or a token needs no prediction
            bound = (self.probability if known else self.bound)(_times(length, most.total)).where(state.free, 0.0)
            where = choose("where", Coins(bound), state, at)
            exit = most
            if not known:
                exit = self.exit(rank, state.tokens, alpha_t, own_probability(state, where, at))
                accept = self.probability(_times(length, exit.total)) / bound.where(where, 1.0)
                accept = torch.where(where, accept, 0.0).clamp(max=1.0)
                where = choose("accept", Coins(accept), state, at)
            at.report(state, jumped=lambda: where.sum(-1))
            return state.at(jump(state, where, exit, at), at.s)
        sites = at.predict(state)[state.free].rates
        total = spread(sites.known().log_sum_exp.exp(), state.free, 0.0)
        where = choose("where", Coins(self.probability(_times(length, total))), state, at)
        at.report(state, jumped=lambda: where.sum(-1))
        return state.at(choose("state", Tokens(sites.narrow(where), state.tokens), state, at), at.s)


def _times(length: Float[Tensor, "B L"], rate: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Multiply the rate by the length of the step; an infinite rate stays infinite and gets no gradient."""
    endless = rate == torch.inf
    return torch.where(endless, torch.inf, length * rate.where(~endless, 1.0))


def own_probability(state: State, where: Bool[Tensor, "B L"], at: At) -> Float[Tensor, "B L"]:
    """Return the leave-one-out probability O(z) of each chosen site's own token, (B, L) float64; 0 elsewhere.

    The result is also 0 at masks. Suppose that the model predicts the denoiser D and that the token z excludes every
    other clean token. Then D(z) is 1 whatever O is, so D does not determine O. The result at such a site is 1.
    """
    said, process, x = at.predict(state), at.process, state.tokens
    token = where & (process.column(x) < process.vocab_size)
    if process.mask_id is not None:
        token = token & (x != process.mask_id)
    if not bool(token.any()):
        return torch.zeros_like(said.alpha)
    read = token & ~process.settled(x, said.alpha) if said.predicts == "denoiser" else token
    return torch.where(token, spread(said[read].own, read, 0.0).exp(), 0.0)


def jump(state: State, where: Bool[Tensor, "B L"], exit: Exit, at: At) -> Int[Tensor, "B L"]:
    """Move the chosen sites to other states and return all tokens (B, L); ``exit`` gives the probability of data.

    Random choices: "data", "token", "noise".
    """
    process, x = at.rank_one, state.tokens
    data = choose("data", Coins(torch.where(where, exit.data, 0.0)), state, at)
    tokens = choose("token", Tokens(at.predict(state)[data].others, process.column(x)), state, at)
    noise = choose("noise", process.elsewhere(x, where & ~data, exit.anchored), state, at)
    return torch.where(data, process.place(tokens, x), noise)
