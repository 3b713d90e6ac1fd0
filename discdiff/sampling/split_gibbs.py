r"""Split Gibbs sampling of a posterior: a likelihood acts on a copy z of the data, which is tied to the data x.

    pi_eta(x, z)  ~  p0(x) exp(-D(x, z) / eta) r(z),        r = exp(log_likelihood),    D the Hamming distance

Two moves keep this law. As eta falls to 0, the law of x tends to the posterior p0 r / Z; the error is O(e^{-1/eta}).

    z | x  ~  r(z) exp(-D(x, z) / eta)       Metropolis moves of one site; no network call
    x | z  ~  p0(x) exp(-D(x, z) / eta)      a run of the sampler; no reward

On a uniform process of V tokens exp(-D / eta) is the noise kernel q_t(z | x), up to a constant, at the time t with

    e^{-1/eta} = (1 - alpha_t) / (1 + (V - 1) alpha_t),      alpha_t = (1 - e^{-1/eta}) / (1 + (V - 1) e^{-1/eta}).

So x | z is the reverse process from z at this time, exact up to the steps of the sampler. Elsewhere, as behind masks,
x | z is drawn by weighted particles whose proposal is tilted to z; this is exact as their number grows.

Reference: SGDD (Chu et al., 2025, https://arxiv.org/abs/2503.01161). The particles are introduced here.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import listing, real, shown, whole
from discdiff.choices import Coins, Noise, Other, Subset
from discdiff.denoiser import Guide
from discdiff.operator import At, Corrector, GuideAt, Invariance, Run, State, choose, stream
from discdiff.prediction import Prediction
from discdiff.process import Process, Uniform
from discdiff.sampling.particles import Particles
from discdiff.sampling.plan import Plan
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples
from discdiff.sampling.weighing import Weighing

__all__ = ["SplitGibbs", "SplitMoves", "SplitSamples"]


@dataclass(frozen=True, eq=False, repr=False)
class SplitMoves(Corrector):
    r"""Move z by Metropolis steps that keep r(z) exp(-D(x, z) / eta), with D the Hamming distance to a given x.

    A step proposes another data token at one site; site and token are uniform, so the proposal is symmetric, and

        P(accept z') = min(1, r(z') / r(z) exp((D(x, z) - D(x, z')) / eta)).

    From z with r(z) = 0 the distance alone decides, until a z of positive likelihood is found. At a site where z
    differs from x there are V - 1 values, each of weight e^{-1/eta}; a weight for all of them together would be too
    large by V - 1. States are clean tokens, and no network is called.

    Args:
        x: (N, L) tokens of the rows with ids from ``first_row`` on, or (1, L) for all rows.
        log_likelihood: maps tokens (B, L) to natural logs (B,); -inf is allowed.
        eta: the width of the coupling.
        proposals: the number of steps.
        first_row: the id of the first row of x.
    """

    x: Int[Tensor, "N L"]
    log_likelihood: Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]]
    eta: float
    proposals: int = 1
    first_row: int = 0

    @property
    def invariant(self) -> Invariance:
        return "none"  # p_t is not its target

    @property
    def nfe(self) -> float | None:
        return 0.0

    def __call__(self, state: State, at: At) -> State:
        x, z = _of_rows(self.x, state.rows, self.first_row), state.tokens
        data = at.process.data_tokens
        uniform = torch.zeros(at.process.vocab_size, dtype=torch.float64).index_fill(0, data, 1 / len(data))
        noise, none = Noise.of(uniform, z.device), torch.zeros(z.shape, dtype=torch.float64, device=z.device)
        log_r = at.run.rewards(self.log_likelihood, z, "SplitGibbs: log_likelihood", state.rows)
        accepted = torch.zeros_like(log_r)
        for turn in range(1, self.proposals + 1):
            here = at.again(turn)
            where = choose("site", Subset(state.free, 1), state, here)
            proposed = choose("token", Other(noise, z, where, none, None), state, here)
            other = at.run.rewards(self.log_likelihood, proposed, "SplitGibbs: log_likelihood", state.rows)
            farther = (proposed != x).sum(-1) - (z != x).sum(-1)
            gain = self._log_ratio(log_r, other, farther)
            accept = choose("accept", Coins(gain.clamp(max=0.0).exp()[:, None]), state, here)
            z, log_r = torch.where(accept, proposed, z), torch.where(accept[:, 0], other, log_r)
            accepted = accepted + accept[:, 0]
        share = accepted / self.proposals
        at.report(state, accepted=lambda: share)
        return state.at(z)

    def _log_ratio(
        self, log_r: Float[Tensor, " B"], other: Float[Tensor, " B"], farther: Int[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """Return the log of the target's ratio (B,) for a move that adds ``farther`` (B,) to the distance."""
        outside = log_r == -torch.inf
        ratio = torch.where(outside, torch.where(other == -torch.inf, 0.0, torch.inf), other - log_r)
        return ratio - farther.double() / self.eta


@dataclass(frozen=True, eq=False)
class _Near(Guide):
    """Tilts each site towards a given token: O'(v) ~ O(v) exp(-1(v != z_i) / eta)."""

    z: Int[Tensor, "N L"]
    first_row: int
    eta: float

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        z, size = _of_rows(self.z, state.rows, self.first_row), prediction.process.vocab_size

        def log_g(row: Tensor, position: Tensor) -> Tensor:
            own = z[row, position][:, None]
            away = torch.full((len(row), size), -1 / self.eta, dtype=torch.float64, device=z.device)
            return away.scatter(-1, own, 0.0)

        return prediction.tilted(log_g)


@dataclass(frozen=True, eq=False)
class _Pull:
    """The potential of the particles: -D(x, z) / eta at t = 0, and at noisy states what is already decided of it."""

    z: Int[Tensor, "N L"]
    process: Process
    eta: float

    def __call__(self, x: Tensor, t: float) -> Tensor:
        far = (x != self.z).double()
        if self.process.absorbing:
            far = far * (self.process.hide(x) != x)
        else:
            far = far * torch.as_tensor(self.process.schedule.alpha(t)).to(x.device)
        return -far.sum(-1) / self.eta


@dataclass(frozen=True, eq=False, repr=False)
class SplitSamples(Samples):
    """The result of ``SplitGibbs``: ``Samples`` whose counts are those of all runs.

    ``nfe_rows`` (B,) counts the calls for all particles of a row, and ``rewards`` the likelihoods of all moves.

    Attributes:
        accepted: (B,) float64 share of the accepted moves of z; near 0 the moves do not mix.
    """

    accepted: Float[Tensor, " B"] = None  # type: ignore[assignment]  # behind fields with defaults


class SplitGibbs:
    r"""Sample a posterior p0(x) r(x) / Z by turns of z | x and x | z, while the coupling eta falls.

    It begins with x from the sampler and z = x. For each eta it moves z, then draws x. The last x is returned. With one
    value of eta, repeated, the chain tends to pi_eta; its x differs from the posterior by O(e^{-1/eta}). A small eta
    ties x to z, so that the chain mixes slowly: a falling schedule such as 1, .7, .5, .35, .25 visits both. Then the
    law of x is known only in the limit of many turns.

    Args:
        sampler: a ``Sampler`` from t = 1 to 0; p0 is its law, with its models' guides. On a ``Uniform`` process a turn
            makes the steps of its grid below the time of eta, the first one from this time on. On others it runs
            ``per_group`` particles over the whole grid.
        log_likelihood: maps tokens (B, L) to log r, (B,); a ``Measurement``, for instance.
        etas: the positive values of eta, in the order of the turns; they must not rise.
        proposals: the proposals for z in each turn; each takes one reward, and one more is taken before the first.
        per_group: P, the particles for x | z where the process is not ``Uniform``.

    Raises:
        TypeError: if ``sampler`` is no ``Sampler``, a likelihood cannot be called, or ``etas`` are no numbers.
        ValueError: for a grid that is not from 1 to 0, for etas that rise, or that no time of a ``Uniform`` process
            belongs to; for states that are pairs or data of one token; on other processes, for guides of single steps,
            and as ``Particles``.
    """

    def __init__(
        self,
        sampler: Sampler,
        log_likelihood: Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]],
        etas: Sequence[float],
        *,
        proposals: SupportsIndex = 16,
        per_group: SupportsIndex = 8,
    ) -> None:
        if not isinstance(sampler, Sampler) or isinstance(sampler, Weighing):
            raise TypeError(f"SplitGibbs: takes a Sampler, got {shown(sampler)}")
        if not callable(log_likelihood):
            raise TypeError(f"SplitGibbs: log_likelihood is called with tokens (B, L), got {shown(log_likelihood)}")
        if (sampler.grid[0], sampler.grid[-1]) != (1.0, 0.0):
            raise ValueError(f"SplitGibbs: the sampler's grid must go from 1 to 0, got {sampler}")
        process = sampler.process
        if process.pairs is not None or len(process.data_tokens) < 2:
            raise ValueError(f"SplitGibbs: takes states that are tokens, and at least two tokens; got {process}")
        self.sampler: Sampler = sampler
        self.log_likelihood: Callable[[Tensor], Tensor] = log_likelihood
        self.etas: tuple[float, ...] = tuple(
            real(eta, "SplitGibbs: eta", "(0, inf)") for eta in listing(etas, "SplitGibbs: etas")
        )
        if not self.etas or any(later > eta for eta, later in itertools.pairwise(self.etas)):
            raise ValueError(f"SplitGibbs: etas must be one or more numbers that do not rise, got {shown(etas)}")
        self.proposals: int = whole(proposals, "SplitGibbs: proposals", 1)
        self.per_group: int = whole(per_group, "SplitGibbs: per_group", 1)
        if isinstance(process, Uniform) and process.schedule.sites is None:
            self._reverse: tuple[Sampler, ...] | None = tuple(map(self._reversed_from, self.etas))
        else:
            self._reverse = None
            if any(step.guides for step in sampler.plan.steps):
                raise ValueError("SplitGibbs: guides of single steps are part of no model; give them to the models")
            self._particles(torch.zeros(1, 1, dtype=torch.int64), self.etas[0], 0)  # for its errors

    @property
    def process(self) -> Process:
        """The forward process."""
        return self.sampler.process

    @torch.no_grad()
    def sample(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        device: torch.device | str | None = None,
    ) -> SplitSamples:
        """Draw samples; the tokens of row b are a function of (seed, first_row + b) and the arguments.

        Args:
            batch, length, seed, first_row, prompt, frozen, device: as in ``Sampler.sample``. Given sites of x and z
                hold the same tokens and never change, so that the target is the posterior given them.

        Raises:
            TypeError, ValueError: as ``Sampler.sample``, and for a likelihood of another shape, NaN or +inf.
        """
        first = whole(first_row, "sample: first_row", 0)
        begun = self.sampler.sample(
            batch, length, seed=seed, first_row=first, prompt=prompt, frozen=frozen, device=device
        )
        out, z, fixed = begun, begun.tokens, begun.state.frozen
        accepted = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for turn, eta in enumerate(self.etas, start=1):
            own = stream(out.seed, 5, 2 * turn), stream(out.seed, 5, 2 * turn + 1)
            run = Run.start(self.sampler.model, len(z), own[0], first_row=first, device=z.device)
            state, at = run.begin(z, 0.0, frozen=fixed)
            z = self._moves(out.tokens, eta, first)(state, at).tokens
            accepted = accepted + run.info["accepted"] / len(self.etas)
            more = self._draw(turn - 1, z, fixed, own[1], first)
            out = _sum(out, more, run.tally.rewards)
        held = {name: value for name, value in vars(out).items() if name in Samples.__dataclass_fields__}
        return SplitSamples(**held, accepted=accepted)

    def _moves(self, x: Int[Tensor, "N L"], eta: float, first: int) -> SplitMoves:
        """Return the moves of z given x."""
        return SplitMoves(x, self.log_likelihood, eta, self.proposals, first)

    def _draw(
        self, turn: int, z: Int[Tensor, "B L"], frozen: Bool[Tensor, "B L"] | None, seed: int, first: int
    ) -> Samples:
        """Draw x given z, and return it with what it cost; ``rewards`` are those of guides."""
        if self._reverse is not None:
            return self._reverse[turn].sample(initial=z, frozen=frozen, seed=seed, first_row=first, device=z.device)
        size = self.per_group
        spread, fixed = (None if one is None else one.repeat_interleave(size, 0) for one in (z, frozen))
        assert spread is not None
        out = self._particles(spread, self.etas[turn], first * size).sample(
            *spread.shape, seed=seed, first_row=first * size, prompt=None if fixed is None else spread, frozen=fixed,
            device=z.device,
        )  # fmt: skip
        potentials = len(spread) * len(self.sampler.grid)  # of distances, not of the likelihood
        return Samples(
            out.draw(seed, first_row=first * size), out.nfe, out.nfe_rows.view(-1, size).sum(-1), seed,
            queries=out.queries, calls=out.calls, rewards=out.rewards - potentials,
        )  # fmt: skip

    def _reversed_from(self, eta: float) -> Sampler:
        """Return the sampler of x given z on a uniform process, from the time that belongs to eta to 0."""
        process, grid, steps = self.process, self.sampler.grid, self.sampler.plan.steps
        other = math.exp(-1 / eta)
        alpha = -math.expm1(-1 / eta) / (1 + (process.vocab_size - 1) * other)
        least = float(process.schedule.alpha(1.0))
        time = process.schedule.time(alpha) if least <= alpha < 1 else 0.0
        if not 0 < time < 1:
            raise ValueError(
                f"SplitGibbs: eta = {eta:g} belongs to alpha = {alpha:g}, which {process.schedule} has at no time "
                f"between 0 and 1; e^(-1/eta) must be larger than 1e-16, and alpha larger than alpha(1) = {least:g}"
            )
        after = next(number for number, s in enumerate(grid) if s < time)
        return Sampler(process, self.sampler.models, plan=Plan([time, *grid[after:]], steps[after - 1 :]))

    def _particles(self, z: Int[Tensor, "N L"], eta: float, first: int) -> Particles:
        """Return the particles of x given z, with the sampler's own law as reference."""
        inner = self.sampler
        names = {next(iter(inner.models)) if step.model is None else step.model for step in inner.plan.steps}
        near = _Near(z, first, eta)
        models = {name: model.guided(near) if name in names else model for name, model in inner.models.items()}
        sampler = Sampler(inner.process, models, plan=inner.plan)
        return Particles(sampler, _Pull(z, inner.process, eta), self.per_group, reference=inner.models)

    def __repr__(self) -> str:
        few = f"{self.etas[0]:g}" if len(self.etas) == 1 else f"{self.etas[0]:g} to {self.etas[-1]:g}"
        particles = "" if self._reverse else f", per_group={self.per_group}"
        return f"SplitGibbs({self.sampler}, {len(self.etas)} etas {few}, proposals={self.proposals}{particles})"


def _of_rows(x: Int[Tensor, "N L"], rows: Int[Tensor, " R"], first: int) -> Int[Tensor, "#R L"]:
    """Return the tokens of the rows with ids ``rows`` (R,); (1, L) if x (N, L) is one row for all."""
    return x.expand(len(rows), -1) if len(x) == 1 else x[rows - first]


def _sum(out: Samples, more: Samples, rewards: int) -> Samples:
    """Return the tokens of ``more`` with the costs of both, and further rewards."""
    calls = {name: out.calls.get(name, 0) + more.calls.get(name, 0) for name in {**out.calls, **more.calls}}
    return replace(
        out, tokens=more.tokens, nfe=out.nfe + more.nfe, nfe_rows=out.nfe_rows + more.nfe_rows, calls=calls,
        queries=out.queries + more.queries, rewards=out.rewards + more.rewards + rewards,
    )  # fmt: skip
