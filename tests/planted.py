"""Planted faults: processes and operators that are wrong in one way each, and the check that must say so by name.

Each is wrong in one place only, often in a corner: near alpha = 1, at another vocabulary, at time 0, in rows with large
ids. ``PROCESSES`` and ``OPERATORS`` pair it with the name of the check that has to fail.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.choices import Branch, Choice, PointMixture
from discdiff.operator import At
from discdiff.process import Exit

__all__ = ["OPERATORS", "PROCESSES", "Cyclic", "NotMonotone", "NotNormalised", "Reset"]

LINEAR = dd.Linear()


# --- two processes of a user's, which are right -----------------------------------------------------------------------


class Reset(dd.RankOne):
    """A user's process in five lines: noise is always token 0."""

    @property
    def pi(self) -> Tensor:
        return torch.eye(self.vocab_size, dtype=torch.float64)[0]


class Cyclic(dd.Process):
    """A user's process from the three things a process must say; everything else is derived."""

    @property
    def states(self) -> int:
        return self.vocab_size

    def generator(self, alpha: float) -> Tensor:
        step = torch.eye(self.states, dtype=torch.float64).roll(1, 1)
        return step - torch.eye(self.states, dtype=torch.float64)

    def transition(self, alpha_t: float, alpha_s: float) -> Tensor:
        if alpha_t == alpha_s:
            return torch.eye(self.states, dtype=torch.float64)
        if alpha_t == 0:
            return torch.full((self.states, self.states), 1 / self.states, dtype=torch.float64)
        sigma = torch.log(torch.tensor(alpha_s / alpha_t, dtype=torch.float64))
        return torch.linalg.matrix_power(torch.matrix_exp(self.generator(1.0) * sigma / 1024), 1024)

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        law = torch.full((self.states,), 1 / self.states, dtype=torch.float64)
        return PointMixture(law, [], [], shape=(batch, length), device=device)


# --- clocks -----------------------------------------------------------------------------------------------------------


class StartsLow(dd.Linear):
    def _alpha(self, t: Tensor) -> Tensor:
        return 0.999 * (1 - t)


class NotMonotone(dd.Schedule):
    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) * (1 + 0.9 * torch.sin(6 * t) ** 2) / (1 + 0.9 * t)

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            v = t.clone().requires_grad_()
            return torch.autograd.grad(self._alpha(v).sum(), v)[0]

    def _time(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


class WrongDerivative(dd.Linear):
    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.01)


class WrongInverse(dd.Linear):
    def _time(self, alpha: Tensor) -> Tensor:
        return torch.where(alpha > 0.97, 1 - 0.999 * alpha, 1 - alpha)


class StuckClock(dd.Uniform):
    def with_schedule(self, schedule: dd.Schedule) -> dd.Process:
        return self


# --- kernels and rates ------------------------------------------------------------------------------------------------


class NotNormalised(Cyclic):
    def transition(self, alpha_t: float, alpha_s: float) -> Tensor:
        return super().transition(alpha_t, alpha_s) * (1 if alpha_t == alpha_s else 1.001)


class Restless(dd.Uniform):
    """Moves in no time, at alpha = .5."""

    def transition(self, alpha_t: float, alpha_s: float) -> Tensor:
        return super().transition(0.99 * alpha_t if alpha_t == alpha_s == 0.5 else alpha_t, alpha_s)


class NotMarkov(dd.Uniform):
    def transition(self, alpha_t: float, alpha_s: float) -> Tensor:
        return super().transition(alpha_t, alpha_s if alpha_s == 1 or alpha_t == alpha_s else 0.5 * (1 + alpha_s))


class LeakyGenerator(dd.Uniform):
    def generator(self, alpha: float) -> Tensor:
        return super().generator(alpha) + (1e-3 if alpha < 0.02 else 0)


class FastGenerator(dd.Uniform):
    def generator(self, alpha: float) -> Tensor:
        return super().generator(alpha) * (1.01 if alpha > 0.985 else 1)


class RateOfAlpha(dd.Uniform):
    def rate(self, t: float) -> Tensor:
        return self.generator(1 - t)  # per unit of alpha


# --- laws -------------------------------------------------------------------------------------------------------------


class Crashes(Cyclic):
    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        raise RuntimeError("not written yet")


class PriorOfOneSite(dd.Uniform):
    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        law = torch.eye(self.vocab_size).double()[0]
        return super().prior(batch, length, device) if length == 1 else PointMixture(law, [], [], (batch, length))


class WrongNoise(dd.Uniform):
    def noised(self, x0: Tensor, alpha: object) -> Choice:
        return super().noised(x0, self.sitewise(alpha, x0) * 0.9)


class WrongLateNoise(dd.Uniform):
    """Only for alpha below 1e-6."""

    def noised(self, x0: Tensor, alpha: object) -> Choice:
        a = self.sitewise(alpha, x0)
        return super().noised(x0, torch.where((a > 0) & (a < 1e-6), 0.01, a))


class Unlawful(dd.Uniform):
    def posterior(self, *args: object) -> Choice:
        law = super().posterior(*args)
        right = law.log_prob
        law.log_prob = lambda value: right(value) + 0.01
        return law


class WrongBridge(Reset):
    def bridge(self, x_t: Tensor, x0: Tensor, t: object, s: object) -> Choice:
        return self.noised(x0, self.schedule.alpha(0.7 * s))  # forgets x_t, at another time


class SlightlyWrongBridge(dd.Uniform):
    def posterior(self, x_t: Tensor, x0: Tensor, alpha_t: object, alpha_s: Tensor, where: object = None) -> object:
        return super().posterior(x_t, x0, alpha_t, alpha_s * 0.999, where)


class WrongLastBridge(dd.Uniform):
    """Only for alpha above .985."""

    def posterior(self, x_t: Tensor, x0: Tensor, alpha_t: object, alpha_s: object, where: object = None) -> object:
        a_s = self.sitewise(alpha_s, x_t)
        a_t = torch.minimum(self.sitewise(alpha_t, x_t), a_s)
        return super().posterior(x_t, x0, a_t, torch.where(a_s > 0.985, torch.maximum(a_t, a_s * 0.99), a_s), where)


class Permissive(dd.Masked):
    def posterior(self, x_t: Tensor, x0: Tensor, alpha_t: object, alpha_s: object, where: object = None) -> object:
        return super().posterior(x_t, torch.where(x_t == self.mask_id, x0, x_t), alpha_t, alpha_s, where)


class EverySite(dd.Uniform):
    def posterior(self, x_t: Tensor, x0: Tensor, alpha_t: object, alpha_s: object, where: object = None) -> object:
        return super().posterior(x_t, x0, alpha_t, alpha_s)


class OneTime(dd.Uniform):
    """All sites of a row are noised at the time of the first."""

    def noised(self, x0: Tensor, alpha: object) -> Choice:
        return super().noised(x0, self.sitewise(alpha, x0)[:, :1])


class OneTimeBridge(dd.Uniform):
    def posterior(self, x_t: Tensor, x0: Tensor, alpha_t: object, alpha_s: object, where: object = None) -> object:
        a_t, a_s = (self.sitewise(alpha, x_t)[:, :1].expand(x_t.shape) for alpha in (alpha_t, alpha_s))
        return super().posterior(x_t, x0, a_t, a_s, where)


class BiasedDraws(dd.Uniform):
    def noised(self, x0: Tensor, alpha: object) -> Choice:
        law = super().noised(x0, alpha)
        law._draw = lambda key: dd.Uniform.noised(self, x0, self.sitewise(alpha, x0) * 0.8)._draw(key)
        return law


class TiedDraws(dd.Uniform):
    """Each site has its law, and the prior's second is the first."""

    def prior(self, batch: int, length: int, device: torch.device | str = "cpu") -> Choice:
        law = super().prior(batch, length, device)
        draw = law._draw
        law._draw = lambda key: draw(key)[:, :1].expand(batch, length).clone()
        return law


# --- what it tells operators ------------------------------------------------------------------------------------------


class WrongWeight(dd.Uniform):
    def log_weight(self, x: Tensor, alpha: object) -> Tensor:
        return super().log_weight(x, alpha) + 0.01


class WrongWeightElsewhere(dd.Uniform):
    """Right for three tokens."""

    def log_weight(self, x: Tensor, alpha: object) -> Tensor:
        return super().log_weight(x, alpha) + (0.01 if self.vocab_size != 3 else 0)


class OneSurvival(dd.Uniform):
    def conditional(self, log_o: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        return super().conditional(log_o, x, alpha[:1].expand(alpha.shape))


class NoRows(dd.Uniform):
    def conditional(self, log_o: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        return super().conditional(log_o, x, alpha).view(len(x), -1, 1)[..., 0]


class OneWay(Cyclic):
    def propagate(self, rows: Tensor, alpha_t: Tensor, alpha_s: Tensor, backward: bool = False) -> Tensor:
        return super().propagate(rows, alpha_t, alpha_s)


class WrongConditional(dd.Uniform):
    def conditional(self, log_o: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        return super().conditional(log_o, x, torch.where(alpha > 0.9985, 1.0, alpha))


class WrongUnmix(dd.Uniform):
    def conditional_to_loo(self, c: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        return super().conditional_to_loo(c, x, torch.where(alpha > 0.985, alpha * 1.001, alpha))


class ForgetsNothing(dd.Uniform):
    def denoiser_to_loo(self, log_d: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        right = super().denoiser_to_loo(log_d, x, alpha)
        return torch.where((alpha > 0.985)[:, None], log_d, right)


class WrongOwnWeight(dd.Uniform):
    def own_weight(self, x: Tensor, alpha: Tensor) -> Tensor:
        return super().own_weight(x, alpha) * 0.99


class WrongPlugIn(dd.Uniform):
    def plug_in(self, log_o: Tensor, x: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        return super().plug_in(log_o, x, alpha_t, torch.where(alpha_s > 0.985, 1.0, alpha_s))


class NeverSettled(dd.Masked):
    def settled(self, x: Tensor, alpha: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=torch.bool)


class TooClean(dd.Uniform):
    def revealed(self, x: Tensor, alpha: Tensor) -> Tensor:
        return alpha > 0.9985


class NeverClean(dd.Masked):
    def revealed(self, x: Tensor, alpha: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=torch.bool)


class LosesItsSource(dd.AbsorbingUniform):
    def place(self, column: Tensor, x: Tensor) -> Tensor:
        return column * self.vocab_size + 0 * x


class HidesBadly(dd.Masked):
    def hide(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class FreshSource(dd.AbsorbingUniform):
    def noised_pair(self, x0: Tensor, x1: Tensor, t: object) -> Choice:
        return self.marginal(x0, t)


class WrongRenoise(dd.Uniform):
    def renoise(self, x: Tensor, where: Tensor, noise: Tensor, alpha: object) -> Choice:
        return super().renoise(x, where, noise & (x > 0), alpha)


class KeepsTooMuch(dd.Uniform):
    def kept(self, alpha: object) -> object:
        return alpha**0.5


class WrongFurther(dd.Uniform):
    def noised_further(self, x: Tensor, where: Tensor, alpha_t: object, alpha_u: object) -> Choice:
        return super().noised_further(x, where, 1.0, alpha_u)  # as if from clean tokens


class FurtherEverywhere(dd.Uniform):
    def noised_further(self, x: Tensor, where: Tensor, alpha_t: object, alpha_u: object) -> Choice:
        return super().noised_further(x, torch.ones_like(where), alpha_t, alpha_u)


class WrongInflow(dd.Uniform):
    def inflow(self, x: Tensor, alpha: object) -> Tensor:
        a = self.sitewise(alpha, x)[..., None]
        return super().inflow(x, alpha) * torch.where(a > 0.9985, 1.01, 1.0)


class WrongExit(dd.Uniform):
    def exit(self, x: Tensor, alpha: object, own: object) -> Exit:
        right = super().exit(x, alpha, own)
        return right._replace(total=right.total * 1.001)


class ExitToData(dd.Uniform):
    def exit(self, x: Tensor, alpha: object, own: object) -> Exit:
        right = super().exit(x, alpha, own)
        return right._replace(data=right.data.sqrt())


class ExitWithoutAnchor(dd.Hybrid):
    def exit(self, x: Tensor, alpha: object, own: object) -> Exit:
        right = super().exit(x, alpha, own)
        return right._replace(anchored=right.anchored * 0.5)


class WrongCandidate(dd.Uniform):
    def candidate(self, x_t: Tensor, alpha_t: object, alpha_s: object) -> Tensor:
        return super().candidate(x_t, alpha_t, alpha_s) * 0.999


class WrongAcceptance(dd.Uniform):
    def acceptance(self, log_own: Tensor, x_t: Tensor, alpha_t: object) -> Tensor:
        return super().acceptance(log_own + 0.001, x_t, alpha_t)


PROCESSES: list[tuple[dd.Process, str]] = [
    (dd.Uniform(3, StartsLow()), "schedule: alpha(0) = 1"),
    (dd.Uniform(3, NotMonotone()), "schedule: alpha falls within [0, 1]"),
    (dd.Uniform(3, WrongDerivative()), "schedule: alpha_derivative is the derivative"),
    (dd.Uniform(3, WrongInverse()), "schedule: time inverts alpha"),
    (StuckClock(3, LINEAR), "schedule: the same process on another clock"),
    (NotNormalised(3, LINEAR), "kernel: rows are laws"),
    (Restless(3, LINEAR), "kernel: nothing happens in no time"),
    (NotMarkov(3, LINEAR), "kernel: Chapman-Kolmogorov"),
    (LeakyGenerator(3, LINEAR), "generator: rates are rates"),
    (FastGenerator(3, LINEAR), "generator: Kolmogorov's forward equation"),
    (RateOfAlpha(3, dd.Cosine()), "rate: Kolmogorov's equation in time"),
    (Crashes(3, LINEAR), "prior: where the kernel ends"),
    (PriorOfOneSite(3, LINEAR), "prior: where the kernel ends"),
    (WrongNoise(3, LINEAR), "marginal: a row of the kernel"),
    (WrongLateNoise(3, LINEAR), "marginal: a row of the kernel"),
    (Unlawful(3, LINEAR), "bridge: a law"),
    (WrongBridge(3, LINEAR), "bridge: Bayes' rule"),
    (WrongBridge(3, LINEAR), "bridge: keeps the marginal"),
    (SlightlyWrongBridge(3, LINEAR), "bridge: Bayes' rule"),
    (SlightlyWrongBridge(3, LINEAR), "bridge: keeps the marginal"),
    (WrongLastBridge(3, LINEAR), "bridge: Bayes' rule"),
    (Permissive(3, LINEAR), "bridge: impossible ends are refused"),
    (EverySite(3, LINEAR), "bridge: at chosen sites"),
    (OneTime(3, LINEAR), "sites: several, each at its own time"),
    (OneTimeBridge(3, LINEAR), "sites: several, each at its own time"),
    (OneSurvival(3, LINEAR), "rows: each at its own survival"),
    (NoRows(3, LINEAR), "rows: each at its own survival"),
    (OneWay(3, LINEAR), "propagate: laws forwards, functions backwards"),
    (WrongWeight(3, LINEAR), "evidence: a column of the kernel"),
    (WrongConditional(3, LINEAR), "conversion: c = O Q_t"),
    (WrongUnmix(3, LINEAR), "conversion: O from c"),
    (WrongWeight(3, LINEAR), "conversion: denoiser from leave-one-out"),
    (WrongWeightElsewhere(3, LINEAR), "conversion: denoiser from leave-one-out"),
    (ForgetsNothing(3, LINEAR), "conversion: leave-one-out from denoiser"),
    (WrongOwnWeight(3, LINEAR), "conversion: one weight is all the evidence"),
    (WrongPlugIn(3, LINEAR), "conversion: the plug-in is the reverse marginal"),
    (NeverSettled(3, LINEAR), "states: which settle the token"),
    (TooClean(3, LINEAR), "states: which are surely clean"),
    (NeverClean(3, LINEAR), "states: which are surely clean"),
    (LosesItsSource(3, LINEAR), "states: columns and places"),
    (HidesBadly(3, LINEAR), "states: what hides a token"),
    (FreshSource(3, LINEAR), "pairs: given data and source"),
    (WrongRenoise(3, LINEAR), "noise: kept and drawn anew is the marginal"),
    (KeepsTooMuch(3, LINEAR), "noise: kept and drawn anew is the marginal"),
    (WrongFurther(3, LINEAR), "noise: further is the kernel"),
    (FurtherEverywhere(3, LINEAR), "noise: further is the kernel"),
    (WrongInflow(3, LINEAR), "inflow: a column of the generator"),
    (WrongExit(3, LINEAR), "exit: the rates of the reverse process"),
    (ExitToData(3, LINEAR), "exit: the rates of the reverse process"),
    (ExitWithoutAnchor(3, LINEAR), "exit: the rates of the reverse process"),
    (WrongCandidate(3, LINEAR), "redraw: candidates and their acceptance"),
    (WrongAcceptance(3, LINEAR), "redraw: candidates and their acceptance"),
    (BiasedDraws(3, LINEAR), "sampling: draws follow log_prob (-log10 p)"),
    (TiedDraws(3, LINEAR), "sampling: draws follow log_prob (-log10 p)"),
]


# --- operators --------------------------------------------------------------------------------------------------------


class Careless(S.Gibbs):
    """Redraws frozen sites as well."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        thawed = dd.State(state.tokens, state.t, state.rows)
        return state.at(super().__call__(thawed, at).tokens)


class CarelessWhereAllIsFrozen(S.Gibbs):
    def __call__(self, state: dd.State, at: At) -> dd.State:
        if state.frozen is None:
            return super().__call__(state, at)
        thawed = dd.State(state.tokens, state.t, state.rows, state.frozen & ~state.frozen.all(-1, keepdim=True))
        return state.at(super().__call__(thawed, at).tokens)


class Hidden(S.Gibbs):
    """Draws outside of ``choose``."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        return moved.at(torch.where(torch.rand(len(state.rows), 1) < 0.5, moved.tokens, state.tokens))


class Majority(S.Gibbs):
    """Rows depend on the batch that they are in."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        return moved.at(torch.where(state.tokens.double().mean() < 1, moved.tokens, state.tokens))


class ShortIds(S.Gibbs):
    """Ids of rows are cut to 16 bits."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        said = at.predict(state)
        short = dd.State(state.tokens, state.t, state.rows % 2**16, state.frozen, seen=said)
        return state.at(super().__call__(short, at).tokens)


class RoundedIds(S.Gibbs):
    """Ids of rows are held in float32, where those from 2^24 on are not all told apart."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        said = at.predict(state)
        rounded = dd.State(
            state.tokens, state.t, state.rows.float().long().clamp(max=2**32 - 1), state.frozen, seen=said
        )
        return state.at(super().__call__(rounded, at).tokens)


class Idle(dd.Corrector):
    """Keeps p_t by doing nothing."""

    invariant = "exact"

    def __call__(self, state: dd.State, at: At) -> dd.State:
        return state


class Improper(S.Gibbs):
    """Half of a choice's weight is missing."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        dd.choose("coin", Branch(torch.tensor([0.25, 0.25]).double(), len(state.rows)), state, at)
        return super().__call__(state, at)


class Shifted(S.Ancestral):
    """Its draws are not those of its kernel: rows know their number."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        even = (state.rows % 2 == 0)[:, None] & (state.tokens >= 0)
        return moved.at(torch.where(even & (len(state.rows) > 1000), moved.tokens, state.tokens * 0), at.s)


class LargeIds(S.Gibbs):
    """Another operator in rows with large ids."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        return moved.at(torch.where((state.rows < 2**24)[:, None], moved.tokens, state.tokens))


class Sloppy(S.TauForwardBackward):
    invariant = "exact"


class Blunt(dd.Corrector):
    """Fresh noise, which is far from p_t."""

    invariant = "approximate"
    nfe = 0.0

    def __call__(self, state: dd.State, at: At) -> dd.State:
        fresh = at.process.prior(*state.tokens.shape)
        return state.at(torch.where(state.free, dd.choose("fresh", fresh, state, at), state.tokens))


WHERE = {
    "time 0": lambda state, at: state.t == 0,
    "small t": lambda state, at: state.t < 0.15,
    "large t": lambda state, at: state.t > 0.65,
    "V other than 3": lambda state, at: at.process.vocab_size != 3,
    "L other than 3": lambda state, at: state.tokens.shape[1] != 3,
    "a schedule that is not linear": lambda state, at: abs(at.alpha(state.t) - 1 + state.t) > 1e-6,
}


@dataclass(frozen=True)
class WrongWhere(dd.Corrector):
    """Exact but in one corner, where two sites are redrawn at once."""

    where: str
    invariant = "exact"

    def __call__(self, state: dd.State, at: At) -> dd.State:
        return S.Gibbs(sites=2 if WHERE[self.where](state, at) else 1)(state, at)


class Unlisted(S.Gibbs):
    """Two sites at once, said to be exact; it cannot be enumerated."""

    invariant = "exact"
    enumerable = False


class Second(S.Ancestral):
    order = 2.0


class Third(S.Ancestral):
    order = 3.0


class SecondHand(S.Gillespie):
    order = 2.0


class Exact(S.Gillespie):
    order = float("inf")


class Cheap(S.Gibbs):
    nfe = 0.5


class Dear(S.Ancestral):
    nfe = 2.0


class Lazy(S.Ancestral):
    """Half of the rows are not moved."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        branch = dd.choose("branch", Branch(torch.tensor([0.5, 0.5]).double(), len(state.rows)), state, at)
        return moved.at(torch.where((branch == 0)[:, None], moved.tokens, state.tokens))


@dataclass(frozen=True)
class LazyBetween(dd.Predictor):
    """The ancestral step, but at some times it moves half of the rows."""

    low: float
    high: float
    order = 1.0

    def __call__(self, state: dd.State, at: At) -> dd.State:
        return (Lazy() if self.low < state.t < self.high else S.Ancestral())(state, at)


class GreedyAtLast(S.Ancestral):
    def __call__(self, state: dd.State, at: At) -> dd.State:
        return S.Greedy()(state, at) if at.s == 0 else super().__call__(state, at)


class NeverDone(S.Ancestral):
    """Some masks are left at time 0."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        return moved.at(torch.where(state.tokens[:, :1] == at.process.mask_id, state.tokens, moved.tokens), at.s)


# the operator, the kind of process, the check that must fail
class Hasty(S.Greedy):
    """Decides by the prediction, without a choice, and claims that its runs can be weighed under another one."""

    weighable = True


OPERATORS: list[tuple[dd.Operator, str, str]] = [
    (Hidden(), "uniform", "the same key gives the same tokens, in any batch"),
    (Majority(), "uniform", "the same key gives the same tokens, in any batch"),
    (ShortIds(), "uniform", "rows far apart draw apart"),
    (RoundedIds(), "uniform", "draws follow the kernel (-log10 p)"),
    (LargeIds(), "uniform", "draws follow the kernel (-log10 p)"),
    (Shifted(), "uniform", "draws follow the kernel (-log10 p)"),
    (Careless(), "uniform", "frozen sites are left alone"),
    (CarelessWhereAllIsFrozen(), "uniform", "frozen sites are left alone"),
    (Cheap(), "uniform", "takes 0.5 calls a step"),
    (Dear(), "masked", "takes 2 calls a step"),
    (Hasty(), "uniform", "its runs can be weighed under another prediction"),
    (Improper(), "uniform", "rows of the kernel are laws"),
    (Idle(), "uniform", "it moves (the share of p_t that stays)"),
    (Sloppy(h=0.05), "uniform", "keeps p_t"),
    *((WrongWhere(where), "uniform", "keeps p_t") for where in WHERE),
    (Blunt(), "uniform", "keeps p_t nearly"),
    (Unlisted(sites=2), "uniform", "keeps p_t (-log10 p)"),
    (NeverDone(), "masked", "the step to 0 ends on data"),
    (Exact(), "uniform", "ends in p_s (-log10 p)"),
    (Second(), "uniform", "order 2 (distance of the slope)"),
    (Lazy(), "masked", "order 1 (distance of the slope)"),
    (Third() >> S.Gibbs(), "masked", "order 3 (distance of the slope)"),
    (LazyBetween(0.95, 1.0), "masked", "order 1 of a step, early and late (distance of the slope)"),
    (LazyBetween(0.0, 0.05), "masked", "order 1 of a step, early and late (distance of the slope)"),
    (GreedyAtLast(), "masked", "the step to 0 is exact for one site (distance of the slope)"),
    (SecondHand(), "uniform", "order 2 by draws (distance of the slope)"),
]
