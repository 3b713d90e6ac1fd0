r"""Steps of weighted particles: propose, weigh by what the reference would have done, resample.

    log w  +=  log K(choices) - log M(choices)  +  log psi_s(z_s) - log psi_t(z_t)

M is the law of the step's choices under the guided model, K that under the reference. K is found by a second pass of
the same operator over the same choices, with the predictions of the reference; the network's answers are used again.
Random choices of guides are part of M and of K alike, so they cancel.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.choices import Ancestors, Choice, Scheme, Tokens, uncovered
from discdiff.denoiser import Answers, Denoiser
from discdiff.operator import At, Operator, Run, State, choose, of_run
from discdiff.process import Process
from discdiff.sampling.planned import acting, anew
from discdiff.sampling.sampler import Sampler

__all__ = ["Potential", "Weighed", "Weighing", "not_weighable"]

Potential = Callable[[Tensor, float], Tensor]  # (N, L) states or tokens and their time -> (N,) log psi


@dataclass(frozen=True)
class Weighed(State):
    """State of weighted particles.

    Attributes:
        log_weight: (B,) float64 natural log of each particle's weight.
        log_potential: (B,) float64 log psi of each particle's state.
        reference: the same rows, with what the reference remembers.
    """

    log_weight: Float[Tensor, " B"] = None  # type: ignore[assignment]  # behind fields with defaults
    log_potential: Float[Tensor, " B"] = None  # type: ignore[assignment]
    reference: State = None  # type: ignore[assignment]

    def select(self, which: Int[Tensor, " R"]) -> "Weighed":
        found = super().select(which)
        assert isinstance(found, Weighed)
        return replace(
            found,
            log_weight=self.log_weight[which],
            log_potential=self.log_potential[which],
            reference=self.reference.select(which),
        )

    def plain(self) -> State:
        """Return the state without weights, as the operators get it."""
        return State(self.tokens, self.t, self.rows, self.frozen, self.past, self.seen, self.step, self.run)


class Weighing(Sampler):
    """Sampler whose rows are particles in groups of ``per_group``; ``Particles`` checks the arguments.

    Attributes:
        reference: the sampler that the weights refer to.
        potential: log psi, or None for psi = 1.
        alive: whether a group without a positive weight is an error.
    """

    def __init__(
        self, sampler: Sampler, reference: Sampler, potential: Potential | None, per_group: int, ess: float,
        resample: Scheme,
    ) -> None:  # fmt: skip
        super().__init__(sampler.process, sampler.models, plan=sampler.plan)
        self.step_models: tuple[Denoiser, ...] = sampler.step_models
        self.reference: Sampler = reference
        self.potential: Potential | None = potential
        self.per_group: int = per_group
        self.ess: float = ess
        self.resample = resample
        self.alive: bool = True
        self.plain: bool = all(map(same_model, self.step_models, reference.step_models))
        self._known = [*reference.parts()]

    def through(self, state: State, run: Run) -> Iterator[State]:
        return super().through(state if isinstance(state, Weighed) else self.weighed(state, run), run)

    def weighed(self, state: State, run: Run) -> Weighed:
        """Return the first state with its weights psi."""
        log_psi = self._log_psi(state, run)
        held = {name: value for name, value in vars(state).items() if name in State.__dataclass_fields__}
        return Weighed(**held, log_weight=log_psi.clone(), log_potential=log_psi, reference=replace(state, run=None))

    def _log_psi(self, state: State, run: Run) -> Float[Tensor, " B"]:
        if self.potential is None:
            return torch.zeros(len(state.rows), dtype=torch.float64, device=state.tokens.device)
        time, potential = state.t, self.potential
        tokens = self.process.column(state.tokens) if time == 0 else state.tokens
        return run.rewards(lambda x: potential(x, time), tokens, f"Particles: the potential at t = {time:g}")

    def _advance(self, operator: Operator, state: State, at: At) -> State:
        assert isinstance(state, Weighed)
        run, log_weight = at.run, state.log_weight
        if self.plain:
            after = operator(state.plain(), at)
            reference = after
        else:
            answers, laws = Answers(), run.laws
            counters = [run.model, *run.asked.values()]
            for counter in counters:
                counter.answers = answers
            run.laws = {}
            after = operator(state.plain(), at)
            log_ratio, reference = self._weigh(operator, state, after, at, answers, run.laws)
            log_weight = log_weight + log_ratio
            run.laws = laws
            for counter in (run.model, *run.asked.values()):
                counter.answers = None
        after = replace(after, run=None)
        log_psi = self._log_psi(after, run)
        dead = (log_weight == -torch.inf) | (log_psi == -torch.inf)
        log_weight = torch.where(dead, -torch.inf, log_weight + log_psi - state.log_potential)
        held = {name: value for name, value in vars(after).items() if name in State.__dataclass_fields__}
        found = Weighed(**held, log_weight=log_weight, log_potential=log_psi, reference=reference)
        return self._resampled(found, at.moved(operator.width))

    def _weigh(
        self, operator: Operator, state: Weighed, after: State, at: At, answers: Answers,
        laws: dict[str, tuple[Choice, Tensor, Tensor]],
    ) -> tuple[Float[Tensor, " B"], State]:  # fmt: skip
        """Return log K - log M of a step's choices (B,), and the state after it as the reference remembers it."""
        run, number = at.run, at.step
        _, _, _, _, model = part = self._known[number - 1]
        before = replace(state.reference, step=state.step)
        if number > 1 and anew(self._known[number - 2], part, self.reference.models):
            before = replace(before, past=None, seen=None)
        total = torch.zeros_like(state.log_weight)
        given = _Again(laws, total, run.model.first_row, operator)
        counter = replace(run.model, answers=answers, again=True, denoiser=model, _last=None)
        again = replace(
            run, model=counter, models=self.reference.models, given=given, laws=None, log_prob=None, choices=None,
            info={}, asked={}, _used=model,
        )  # fmt: skip
        reference = operator(before, replace(at, run=again))
        wrong = (reference.tokens != after.tokens).any(-1)
        if bool(wrong.any()):
            given.refuse(wrong.nonzero()[:, 0] + run.model.first_row, f"step {number}", "ends in other tokens")
        given.check_kept(self.process, state, after)
        return given.finish(), replace(reference, run=None)

    def _resampled(self, state: Weighed, at: At) -> Weighed:
        size, run = self.per_group, at.run
        weights = state.log_weight.view(-1, size)
        living = weights.amax(-1) > -torch.inf
        if self.alive and not bool(living.all()):
            group = int((~living).nonzero()[0])
            rows = state.rows.view(-1, size)[group].tolist()
            raise ValueError(
                f"Particles: group {rows[0] // size}, rows {rows[0]} to {rows[-1]}, has no particle of positive weight "
                f"after step {at.step}, at t = {state.t:g}; take more particles, or guide the proposal"
            )
        ess = 1 / (weights.softmax(-1) ** 2).sum(-1)
        at.report(state, ess=lambda: ess.repeat_interleave(size))
        due = ((ess < self.ess * size * (1 - 1e-9)) & living).nonzero()[:, 0]
        if not len(due):
            return state
        leaders = State(state.tokens[::size][due], state.t, state.rows[::size][due])
        ancestors = choose("ancestors", Ancestors(weights[due], self.resample), leaders, at)
        index = torch.arange(len(state.rows), device=state.rows.device).view(-1, size).clone()
        index[due] = index[due].gather(1, ancestors)
        mean = weights.logsumexp(-1, keepdim=True) - math.log(size)
        weights = weights.index_copy(0, due, mean[due].expand(-1, size))
        found, kept = of_run(state.select(index.flatten()), run), state.reference.select(index.flatten())
        assert isinstance(found, Weighed)
        return replace(found, log_weight=weights.flatten(), reference=of_run(kept, run))


class _Again:
    """Gives the choices of a step to the reference, and sums log K - log M.

    Attributes:
        joint: the choices that a joint law restricts: ids of rows, chosen sites and tokens.
    """

    def __init__(
        self, laws: Mapping[str, tuple[Choice, Tensor, Tensor]], total: Tensor, first: int, operator: Operator
    ) -> None:
        self.left, self.total, self.first, self.operator = {**laws}, total, first, operator
        self.joint: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, site: str, law: Choice, ids: Int[Tensor, " R"], scored: bool) -> Tensor:
        if site not in self.left:
            self.refuse(ids, site, "makes a choice that the proposal does not make")
        proposal, value, rows = self.left.pop(site)
        if not torch.equal(rows, ids):
            self.refuse(ids, site, "makes a choice for other rows")
        if value.shape != law.shape() or value.dtype != law.kind:
            self.refuse(ids, site, "makes a choice of another shape")
        wrong = uncovered(law, proposal)
        if bool(wrong.any()):
            self.refuse(ids[wrong], site, "allows a value that the proposal rules out")
        if isinstance(law, Tokens) and not isinstance(proposal, Tokens):
            self.joint.append((ids, law.sites.where, value))
        log_ratio = law.log_prob(value).double() - proposal.log_prob(value).double()
        self.total = self.total.index_add(0, ids - self.first, log_ratio)
        return value

    def refuse(self, ids: Tensor, site: str, what: str) -> None:
        """Raise ValueError: weights cannot make up for what the proposal does."""
        raise ValueError(
            f"Particles: for row {int(ids[0])} at site {site} the reference {what}. No weight makes up for that. "
            f"Either a guide cuts tokens off, as Truncation(top_k=...) and Forbid do, which the reference must do too "
            f"(reference=); or {self.operator} makes no choice, or one of probability 1, where the reference has one"
        )

    def check_kept(self, process: Process, before: State, after: State) -> None:
        """Raise ValueError if a step changes tokens that it revealed, where a joint law restricts what is revealed.

        The reference could then reach an accepted sequence by way of a rejected one, for which no weight makes up.
        """
        tokens = process.column(after.tokens)
        wrong = [(where & (tokens[ids - self.first] != value)).any() for ids, where, value in self.joint]
        if self.joint:
            wrong.append(((process.hide(before.tokens) != before.tokens) & (before.tokens != after.tokens)).any())
        if wrong and bool(torch.stack(wrong).any()):
            raise ValueError(
                f"Particles: {self.operator} changes tokens that it has revealed, and a guide restricts which tokens "
                "are revealed together. The reference could pass a rejected sequence and leave it again, for which no "
                "weight makes up. Accepted are operators that keep what they reveal, such as Ancestral and Unmask"
            )

    def finish(self) -> Float[Tensor, " B"]:
        """Return the sums (B,); raise ValueError if a choice was not made again."""
        if self.left:
            site, (_, _, ids) = next(iter(self.left.items()))
            self.refuse(ids, site, "does not make the choice that the proposal makes")
        return self.total


def same_model(one: Denoiser, other: Denoiser) -> bool:
    """Return whether two denoisers are the same network with the same guides."""
    network = one.fn is other.fn and one.call is other.call and one.context is other.context
    return network and len(one.guides) == len(other.guides) and all(map(lambda a, b: a is b, one.guides, other.guides))


def not_weighable(sampler: Sampler) -> Operator | None:
    """Return the first operator that is not ``weighable``, or None."""
    for _, t, s, operator, _ in sampler.parts():
        for _, part, _ in acting(operator, t, s, t):
            if not part.weighable:
                return part
    return None
