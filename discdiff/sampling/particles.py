r"""Weighted particles: sequential Monte Carlo (SMC) around any sampler.

Rows g P to g P + P - 1 are the P particles of group g. With weights w of a group's particles,

    E[ mean_p w_p f(x_p) ]  =  sum_x law_ref(x) psi_0(x) f(x)

for every number of particles, every proposal and all potentials that are positive where psi_0 is. law_ref is the law of
the reference sampler and psi_0 the reward. The guided sampler proposes; ``weighing`` has the formula of the weights. A
group is resampled if its effective sample size 1 / sum_p w_p^2, with normalised weights, is below ess P.

References: Del Moral, Doucet and Jasra (2006, https://doi.org/10.1111/j.1467-9868.2006.00553.x); twisted proposals for
diffusion, Wu et al. (2023, https://arxiv.org/abs/2306.17775); Feynman-Kac steering, Singhal et al. (2025,
https://arxiv.org/abs/2501.06848).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import decided, real, seeded, shown, whole
from discdiff.choices import SCHEMES, Ancestors, Key, Scheme
from discdiff.denoiser import Denoiser, drawing
from discdiff.operator import State, stream
from discdiff.process import Process
from discdiff.sampling.beginning import shaped
from discdiff.sampling.loop import OnStep
from discdiff.sampling.plan import Plan
from discdiff.sampling.planned import named_models
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples
from discdiff.sampling.weighing import Potential, Weighed, Weighing, not_weighable

__all__ = ["ParticleSamples", "Particles"]


@dataclass(frozen=True, eq=False, repr=False)
class ParticleSamples(Samples):
    """The result of ``Particles``: ``Samples`` with weights.

    Shapes: B = G P particles, in G groups of P.

    Attributes:
        log_weight: (B,) float64 natural log of each particle's weight.
        per_group: P.
    """

    log_weight: Float[Tensor, " B"] = None  # type: ignore[assignment]  # behind fields with defaults
    per_group: int = 1

    @property
    def log_evidence(self) -> Float[Tensor, " G"]:
        """The natural log of the mean weight of each group, (G,)."""
        return self._groups.logsumexp(-1) - math.log(self.per_group)

    @property
    def evidence(self) -> Float[Tensor, " G"]:
        """The mean weight of each group, (G,): an unbiased estimate of Z = sum_x law_ref(x) psi_0(x)."""
        return self.log_evidence.exp()

    @property
    def ess(self) -> Float[Tensor, " G"]:
        """The effective sample size of each group, (G,), between 1 and P."""
        return 1 / (self._groups.softmax(-1) ** 2).sum(-1)

    def expect(self, function: Callable[[Tensor], Tensor]) -> Float[Tensor, " G"]:
        """Return the weighted mean of a function in each group, (G,); its bias is of order 1 / P.

        With ``resample="one"`` and ess > 1 the bias stays: each step is then normalised alone. There only means over
        groups that are weighted by ``evidence`` tend to those of the target.

        Args:
            function: maps tokens (B, L) to (B,) numbers.

        Raises:
            ValueError: if ``function`` gives another shape.
        """
        found = function(self.tokens)
        if not isinstance(found, Tensor) or found.shape != self.log_weight.shape:
            raise ValueError(
                f"expect: the function must give {tuple(self.log_weight.shape)} numbers, got {shown(found)}"
            )
        weights = self._groups.softmax(-1)
        values = found.double().view(weights.shape)
        return torch.where(weights > 0, weights * values, 0.0).sum(-1)

    def draw(self, seed: SupportsIndex | None = None, *, first_row: SupportsIndex = 0) -> Int[Tensor, "G L"]:
        """Return one particle of each group, (G, L), drawn with the probabilities of its weights.

        Its law tends to law_ref psi_0 / Z as P grows; the bias is of order 1 / P, except with ``resample="one"`` (see
        ``expect``). The first particle of each group has no such law: resampling keeps particles in order.

        Args:
            seed: the 64-bit key of the randomness; drawn from torch's global generator if None.
            first_row: the ``first_row`` of the run, so that draws do not depend on a split by groups.

        Raises:
            TypeError, ValueError: for a seed or first row that is no whole number in range.
        """
        weights = self._groups
        groups, size = weights.shape
        first = whole(first_row, "draw: first_row", 0)
        ids = first + size * torch.arange(groups, device=weights.device)
        key = Key(stream(seeded(seed, "draw: seed"), 4, 1), ids, name="draw")
        chosen = Ancestors(weights, "multinomial")._draw(key)[:, 0]
        return self.tokens.view(groups, size, -1)[torch.arange(groups, device=weights.device), chosen]

    @property
    def _groups(self) -> Float[Tensor, "G P"]:
        return self.log_weight.view(-1, self.per_group)


class Particles:
    """Weighted particles around a ``Sampler``, in groups that do not depend on each other.

    Args:
        sampler: the proposal: a ``Sampler``, perhaps with guides.
        potential: potential(x, t) -> (N,) natural logs of psi_t of states x (N, L); at t = 0 x are tokens, and psi_0 is
            the reward. -inf ends a particle. None for psi = 1, so that the weights only correct the guides.
        per_group: P.
        reference: the denoiser, or several by name, whose sampler law_ref is; by default the sampler's own, without
            guides. Its guides must not draw.
        ess: the share of P below which the effective sample size leads to resampling: 0 for never, above 1 for always.
        resample: "systematic", "stratified", "residual", "multinomial", or "one": with ess > 1, all particles of a
            group then are candidates for its next state, of which one is drawn by its weight in each step. This is
            candidate resampling (SVDD, Li et al., 2024, https://arxiv.org/abs/2408.08252) with its weights kept.

    Attributes:
        reference: the sampler of law_ref.

    Raises:
        TypeError: if ``sampler`` is anything else, such as a ``Blockwise``; for a potential that cannot be called; for
            a reference whose guides draw.
        ValueError: for a reference of another process, or guides around an operator that is not ``weighable``.
    """

    def __init__(
        self,
        sampler: Sampler,
        potential: Potential | None,
        per_group: SupportsIndex = 8,
        *,
        reference: Denoiser | Mapping[str, Denoiser] | None = None,
        ess: float = 0.5,
        resample: Scheme = "systematic",
    ) -> None:
        if not isinstance(sampler, Sampler) or isinstance(sampler, Weighing):
            raise TypeError(f"Particles: takes a Sampler, got {shown(sampler)}")
        if potential is not None and not callable(potential):
            raise TypeError(f"Particles: potential is called as potential(x, t), or None; got {shown(potential)}")
        if resample not in SCHEMES:
            raise ValueError(f"Particles: resample must be one of {', '.join(map(repr, SCHEMES))}, got {resample!r}")
        self.sampler: Sampler = sampler
        self.potential: Potential | None = potential
        self.per_group: int = whole(per_group, "Particles: per_group", 1)
        self.ess: float = real(ess, "Particles: ess", "[0, inf)")
        self.resample = resample
        self.reference: Sampler = _reference(sampler, reference)
        self._inner = Weighing(sampler, self.reference, potential, self.per_group, self.ess, resample)
        wrong = None if self._inner.plain else not_weighable(sampler)
        if wrong is not None:
            raise ValueError(
                f"Particles: {wrong} decides something by the guided prediction without a random choice, or with one "
                "of probability 1, so that a run under the reference could not make the same choices. Accepted are "
                "operators such as Ancestral, SplitLeap, Gibbs and Unmask('random'), or a sampler without guides"
            )

    @property
    def process(self) -> Process:
        """The forward process."""
        return self.sampler.process

    def start(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
    ) -> Weighed:
        """Return the first state with its weights, for ``step``; arguments as in ``sample``.

        Raises:
            TypeError, ValueError: as ``sample``.
        """
        self._check_groups(batch, first_row, initial)
        state = self._inner.start(
            batch, length, seed=seed, first_row=first_row, prompt=prompt, frozen=frozen, initial=initial, device=device
        )
        run = state.run
        return replace(self._inner.weighed(replace(state, run=None), run), run=run)

    def step(self, state: State) -> State:
        """Return the state after one more step, which may resample; the given state is unchanged.

        Raises:
            ValueError: as ``Sampler.step``, or for a group without a positive weight.
        """
        return self._inner.step(state)

    def sample(
        self,
        batch: SupportsIndex | None = None,
        length: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        first_row: SupportsIndex = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        record: bool = False,
        progress: bool = False,
        device: torch.device | str | None = None,
        until: SupportsIndex | None = None,
        resume: State | None = None,
        on_step: OnStep | None = None,
    ) -> ParticleSamples:
        """Draw weighted samples.

        The particles of a group depend on (seed, their ids) and the arguments alone. Arguments are those of
        ``Sampler.sample``, and these differ:

        Args:
            batch: B, a multiple of ``per_group``; ``first_row`` is one too.
            length, seed, first_row, prompt, frozen, initial, progress, device, until, resume: as in ``Sampler.sample``.
            record: whether to keep the trajectory: the states after each step and its resampling.
            on_step: as in ``Sampler.sample``; ``info`` also has "ess", the effective sample size of each row's group
                before resampling.

        Raises:
            TypeError, ValueError: as ``Sampler.sample``; for a batch or ``first_row`` that is no multiple of
                ``per_group``; for a group without a positive weight; for a guide that rules out a value that the
                reference allows, at any step.
        """
        if resume is None:
            self._check_groups(batch, first_row, initial)
        elif not isinstance(resume, Weighed):
            raise ValueError(f"sample: resume takes the state of weighted samples, got {shown(resume)}")
        out = self._inner.sample(
            batch, length, seed=seed, first_row=first_row, prompt=prompt, frozen=frozen, initial=initial,
            record=decided(record, "sample: record"), progress=progress, device=device, until=until, resume=resume,
            on_step=on_step,
        )  # fmt: skip
        state = out.state
        assert isinstance(state, Weighed)
        held = {name: value for name, value in vars(out).items() if name in Samples.__dataclass_fields__}
        found = ParticleSamples(**held | {"log_prob": None}, log_weight=state.log_weight, per_group=self.per_group)
        vars(found)["_state"] = state
        return found

    def _check_groups(
        self,
        batch: SupportsIndex | None,
        first_row: SupportsIndex,
        initial: Tensor | Sequence[Sequence[int]] | None,
    ) -> None:
        _, batch, _ = shaped(initial, batch, None)
        for name, value, least in (("batch", batch, 1), ("first_row", first_row, 0)):
            if value is not None and whole(value, f"sample: {name}", least) % self.per_group:
                raise ValueError(f"sample: {name} must be a multiple of per_group = {self.per_group}, got {value}")

    def __repr__(self) -> str:
        return f"Particles({self.sampler}, per_group={self.per_group}, ess={self.ess:g}, resample={self.resample!r})"


def _reference(sampler: Sampler, given: Denoiser | Mapping[str, Denoiser] | None) -> Sampler:
    """Return the sampler with the same plan and the models of the reference, without the guides of steps."""
    if given is None:
        models = {name: model._with(guides=()) for name, model in sampler.models.items()}
    else:
        models = named_models(sampler.process, given, "Particles: reference")
    one = not isinstance(given, Mapping | None)
    steps = [replace(step, guides=(), model=None if one else step.model) for step in sampler.plan.steps]
    found = Sampler(sampler.process, models, plan=Plan(sampler.plan.grid, steps))
    guide = next((guide for model in found.step_models if (guide := drawing(model.guides, models)) is not None), None)
    if guide is not None:
        raise TypeError(f"Particles: the guides of the reference must not draw, and {guide} does")
    return found
