r"""Base class of samplers that simulate the reverse CTMC event by event.

Every row runs on its own clock l = -log(1 - alpha). In this clock a mask is revealed at rate 1, and rates stay finite
as alpha goes to 1. The time to the next event of a row is exponential; a row is done when its next event lies beyond s.
The process must be rank-one with one noise law.

Two kinds of steps are ancestral, because a rate or the clock is infinite there: the step from pure noise on a process
that does not hide tokens, and the step to time 0 on a process that is not masked. To keep their error small, start the
grid below 1 and end it with a short step.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Ranking, Waiting
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import Exit, Process
from discdiff.samplers._leap import own_probability
from discdiff.samplers.ancestral import Ancestral

__all__ = ["Jumps", "leaves", "look", "pick_site"]


class Jumps(Predictor):
    """Simulate the reverse process event by event; a subclass defines the rates of events and their effect.

    Shapes: tokens and rates (B, L), alpha of each row (B, 1).
    """

    enumerable = False

    @property
    def nfe(self) -> float | None:
        return None  # depends on the number of events

    @abstractmethod
    def rates(self, state: State, alpha: Float[Tensor, "B 1"], at: At) -> tuple[Float[Tensor, "B L"], State]:
        """Return the rates of events (B, L), which hold until the next event, and the state.

        Rates are per unit of l = -log(1 - alpha). The state contains the prediction if one was made.
        """

    @abstractmethod
    def event(
        self, state: State, rates: Float[Tensor, "B L"], alpha: Float[Tensor, "B 1"], at: At
    ) -> Int[Tensor, "B L"]:
        """Return the tokens (B, L) after an event at alpha (B, 1); ``rates`` (B, L) come from the method ``rates``."""

    def check(self, process: Process) -> None:
        if not process.one_noise_law or process.schedule.sites is not None:
            raise ValueError(f"{self} needs a rank-one process with one noise law and one clock, got {process}")

    def __call__(self, state: State, at: At) -> State:
        with torch.no_grad():
            a_t, a_s = at.alpha(state.t), at.alpha(at.s)
        assert isinstance(a_t, float) and isinstance(a_s, float)  # ensured by ``check``
        if not at.process.masks and (a_s == 1 or (a_t == 0 and not at.process.absorbing)):
            return Ancestral()(state, at)
        tokens, turn = state.tokens, 1
        noise = 1 - at.process.sitewise(at.alpha(state.t), tokens[:, :1])  # 1 - alpha
        rows = torch.arange(len(tokens), device=tokens.device)
        events = torch.zeros_like(rows)
        while len(rows):
            some, here = replace(state, tokens=tokens, seen=None).select(rows), at.again(turn)
            rates, some = self.rates(some, 1 - noise[rows], here)
            rates = rates.where(some.free, 0.0)
            wait = choose("wait", Waiting(rows), some, here)
            rate = rates.sum(-1)
            later = torch.where(rate > 0, torch.exp(-wait / rate.where(rate > 0, 1.0)), 0.0)
            noise = noise.index_copy(0, rows, noise[rows] * later[:, None])
            left = (noise[rows, 0] > 1 - a_s).nonzero()[:, 0]
            if len(left):
                some, rows = some.select(left), rows[left]
                events[rows] += 1
                tokens = tokens.index_copy(0, rows, self.event(some, rates[left], 1 - noise[rows], here))
            else:
                rows = left
            turn += 1
        at.report(state, events=lambda: events)
        return state.at(tokens, at.s)


def leaves(state: State, alpha: Float[Tensor, "B 1"], at: At) -> Bool[Tensor, "B L"]:
    """Return which free sites (B, L) can leave their state at alpha (B, 1); on a masked process these are the masks."""
    return state.free & (at.process.inflow(state.tokens, alpha)[..., 0] > 0)


def look(state: State, where: Bool[Tensor, "B L"], alpha: Float[Tensor, "B 1"], at: At) -> tuple[State, Exit]:
    """Call the denoiser on each row at its alpha (B, 1); return the state with this prediction, and exit rates (B, L).

    Exit rates are per unit of alpha. At the sites ``where`` they are computed from the prediction. At the other sites
    the prediction is not read, and the probability of the site's own token counts as 0.
    """
    state = replace(state, seen=at.predict(state, at.process.schedule.time(alpha.clamp(0.0, 1.0))))
    own = own_probability(state, where & leaves(state, alpha, at), at)
    return state, at.rank_one.exit(state.tokens, alpha, own)


def pick_site(state: State, rates: Float[Tensor, "B L"], at: At) -> Bool[Tensor, "B L"]:
    """Draw one site of each row with probability proportional to its rate (B, L), and return it as a mask (B, L).

    A row of zero rates gets no site. The random choice is "site".
    """
    return choose("site", Ranking(kernels.log(rates), torch.ones_like(state.rows)), state, at) >= 0
