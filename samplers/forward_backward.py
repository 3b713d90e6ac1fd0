r"""Forward-backward correctors: add noise and take it away again, at one time.

The forward process and its reverse both keep p_t, so their sum does: rates R + Rbar (Campbell et al., 2022).
``ForwardBackward`` does it exactly: one site is noised from t to u and drawn back by its exact one-site reverse, which
the LOO gives. ``TauForwardBackward`` lets every site follow the summed rates for a length h with the rates frozen, and
has a bias of O(h). ``Cycle`` noises all sites from t to u and runs a predictor back: resampling, whose bias is the
predictor's; frozen sites are clamped in it, which is how an infill is made to agree with its prompt.

References: Campbell et al. (2022); Lugmayr et al. (2022) for resampling.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.distributions import Coins, Tokens
from discdiff.events import Subset
from discdiff.handlers import At, choose
from discdiff.kernels import dispatch as kernels
from discdiff.operator import Corrector, Invariance, Operator, check_operator
from discdiff.process import Process
from discdiff.rank_one import RankOne
from discdiff.samplers.ancestral import Ancestral, reverse_tokens
from discdiff.samplers.conditional import spread
from discdiff.sites import Sites
from discdiff.state import State

__all__ = ["Cycle", "ForwardBackward", "TauForwardBackward"]


@dataclass(frozen=True)
class ForwardBackward(Corrector):
    """Noise ``sites`` sites of each row from the present time t to u, and draw them back; one denoiser call.

    Args:
        u: the time noise is added up to. At times later than u there is nothing to add, and nothing is done.
        sites: how many; 1 keeps p_t exactly, more only approximately.

    Raises:
        ValueError: for a time outside (0, 1], or no sites.
    """

    u: float = 0.6
    sites: int = 1
    reads = "noisy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "u", real(self.u, "ForwardBackward: u", "(0, 1]"))
        object.__setattr__(self, "sites", whole(self.sites, "ForwardBackward: sites", 1))

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.sites == 1 else "approximate"

    def __call__(self, state: State, at: At) -> State:
        if self.u <= state.t:
            return state
        alpha, later = at.alpha(state.t), at.alpha(self.u)
        where = choose("site", Subset(state.free, self.sites), state, at)
        noised = choose("noised", at.process.noised_further(state.tokens, where, alpha, later), state, at)
        # The LOO at a site does not see its own token, so it is the same at t whatever the site holds.
        between = state.at(noised)
        return state.at(reverse_tokens(between, where, at, later, alpha, lambda: at.predict(between)))


@dataclass(frozen=True)
class TauForwardBackward(Corrector):
    """All sites follow R + Rbar, frozen, for a length h of -log alpha; one denoiser call.

    At time 0 nothing is done: what takes noise away again has no finite rate there, so frozen rates would leave noise.

    Args:
        h: the length, in units in which the noise process has rate 1.

    Raises:
        ValueError: for a length that is not positive; in sampling, if the model says nothing of the LOO at a site that
            the noise may have brought to its state.
    """

    h: float = 0.05
    reads = "noisy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", real(self.h, "TauForwardBackward: h", "(0, inf)"))

    @property
    def invariant(self) -> Invariance:
        return "approximate"

    def check(self, process: Process) -> None:
        if not isinstance(process, RankOne):
            raise ValueError(f"{self} needs a process of rank one, got {process}")

    def __call__(self, state: State, at: At) -> State:
        process, z = at.process, state.tokens
        assert isinstance(process, RankOne)  # ``check`` has seen to it
        free = state.free & (process.sitewise(at.alpha(state.t), z) < 1)
        if not bool(free.any()):
            return state
        prediction = at.predict(state)
        backward, x, alpha = prediction.rates_at(free).rows, z[free], prediction.alpha[free].clamp(min=1e-290)

        def rows(n: Tensor) -> Tensor:
            back, own = backward.dense(n) + alpha[n][:, None].log(), process.column(x[n])[:, None]
            return kernels.log_add(back, _forward(process, x[n], alpha[n])).scatter(-1, own, -torch.inf)

        rates = Sites.computed(free, rows, process.columns, watch=prediction.watch, empty=True)
        leaves = -torch.expm1(-self.h * spread(rates.known().log_sum_exp, free).exp())
        where = choose("where", Coins(leaves), state, at)
        column = choose("state", Tokens(rates.narrow(where), process.column(z)), state, at)
        return state.at(torch.where(where, process.place(column, z), z))


def _forward(process: RankOne, x: Int[Tensor, " n"], alpha: Float[Tensor, " n"]) -> Float[Tensor, "#n C"]:
    """The rates of the noise process from states to every column."""
    if process.anchor(x) is None:
        return process.noise(x.device).pi[None]
    columns = torch.arange(process.columns, device=x.device).expand(len(x), -1)
    return process.inflow(process.place(columns, x[:, None].expand_as(columns)), alpha[:, None])[..., 0]


@dataclass(frozen=True)
class Cycle(Corrector):
    """Noise every free site from the present time t to u, and run a predictor back from u to t.

    Args:
        u: the time noise is added up to. At times later than u nothing is done.
        predictor: what runs back.
        steps: in how many equal steps.

    Raises:
        TypeError: if ``predictor`` is not one.
        ValueError: for a time outside (0, 1], or no steps.
    """

    u: float = 0.6
    predictor: Operator = field(default_factory=Ancestral)
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "u", real(self.u, "Cycle: u", "(0, 1]"))
        if not check_operator(self.predictor, "Cycle").moves:
            raise TypeError(f"Cycle: {self.predictor} does not move in time; it takes a predictor")
        object.__setattr__(self, "steps", whole(self.steps, "Cycle: steps", 1))

    @property
    def invariant(self) -> Invariance:
        return "approximate"

    @property
    def nfe(self) -> float | None:
        return None if self.predictor.nfe is None else self.steps * self.predictor.nfe

    @property
    def enumerable(self) -> bool:
        return self.predictor.enumerable

    @property
    def width(self) -> int:
        return 1 + self.steps * self.predictor.width

    def check(self, process: Process) -> None:
        self.predictor.check(process)

    def __call__(self, state: State, at: At) -> State:
        t = state.t
        if self.u <= t:
            return state
        noisy = at.process.noised_further(state.tokens, state.free, at.alpha(t), at.alpha(self.u))
        now = state.at(choose("noised", noisy, state, at), self.u)
        times = [self.u + (t - self.u) * k / self.steps for k in range(self.steps)] + [t]
        for k in range(self.steps):
            place = replace(at, t=times[k], s=times[k + 1]).moved(1 + k * self.predictor.width)
            now = self.predictor(now, place)
        return now
