r"""Compute what weighted particles estimate, by enumeration of all runs of one group.

    evidence(x) = E[ (1/P) sum_p w_p 1(x_p = x) ],    exact: law_ref(x) psi_0(x),  with sum Z

The program is that of the particles, with all their choices, weights and resamplings. After each step, runs of equal
tokens and weights are merged.
"""

import copy
import itertools
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import shown
from discdiff.checks import whole as whole_number
from discdiff.choices import Choice, Key
from discdiff.denoiser import drawing
from discdiff.operator import Run, State
from discdiff.sampling import Particles, Weighed, Weighing
from discdiff.theory.exact import Asked
from discdiff.theory.paths import TooManyPaths
from discdiff.theory.world import all_states, check_size, law_of_data, law_of_prior, state_index

__all__ = ["evidence"]

_MOST_PATHS = 2_000_000
_DIGITS = 1e11  # log weights that agree to 1 / _DIGITS are merged


@torch.no_grad()
def evidence(
    steered: Particles,
    initial: Float[Tensor, " N"] | None = None,
    *,
    length: SupportsIndex | None = None,
    most: SupportsIndex = _MOST_PATHS,
) -> Float[Tensor, " M"]:
    """Compute E[mean_p w_p 1(x_p = x)] for every x by enumeration of the particles of one group.

    Args:
        steered: the particles, with at most two in a group.
        initial: (N,) law of the N = S**L states at the first time of the grid; by default the prior.
        length: L, needed if the model has none of its own.
        most: the maximal number of runs that are followed at a time.

    Returns:
        (M,) a measure whose sum is E[Zhat]: over the M = n**L sequences of n data tokens if the grid ends at 0, else
        over the M = S**L states.

    Raises:
        TypeError: for anything but ``Particles``, or an operator with an unbounded number of choices.
        ValueError: for more than two particles in a group, for a grid that starts below 1 without ``initial``, and as
            ``Particles.sample``; a group without a positive weight counts as 0.
        TooManyPaths: a ValueError, for more than ``most`` runs.
    """
    if not isinstance(steered, Particles):
        raise TypeError(f"evidence: takes Particles, got {shown(steered)}")
    sampler, process, size = steered.sampler, steered.process, steered.per_group
    if size > 2:
        raise ValueError(f"evidence: enumerates groups of at most two particles, got per_group = {size}")
    sites = sampler.model.length if length is None else whole_number(length, "evidence: length", 1)
    if sites is None:
        raise ValueError("evidence: length= must say how many sites; this model has no length of its own")
    most = whole_number(most, "evidence: most", 1)
    for _, _, _, operator, model in sampler.parts():
        if not operator.enumerable:
            raise TypeError(
                f"{operator} makes an unbounded number of choices and cannot be enumerated; test samples instead"
            )
        if operator.remembers and drawing(model.guides, sampler.models) is not None:
            raise TypeError(f"evidence: {operator} uses its previous step, which a guide that draws makes impossible")
    check_size(process.states, sites, "evidence", axes=2)
    if initial is None and sampler.grid[0] != 1:
        raise ValueError(f"evidence: the grid starts at t = {sampler.grid[0]}; give initial=, the law there")
    law = law_of_prior(process, sites) if initial is None else torch.as_tensor(initial, dtype=torch.float64)
    engine = copy.copy(steered._inner)
    engine.alive = False
    return _Enumeration(engine, size, sites, most)(law)


class _Enumeration:
    """All runs of one group of ``size`` particles of ``sites`` sites."""

    def __init__(self, engine: Weighing, size: int, sites: int, most: int) -> None:
        self.engine, self.size, self.sites, self.most = engine, size, sites, most
        self.process = engine.process

    def __call__(self, law: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
        """Return the measure; ``law`` (N,) is that of one particle's first state."""
        index = torch.cartesian_prod(*[torch.arange(len(law))] * self.size).view(-1, self.size)
        mass = law[index].prod(-1)
        index, mass = index[mass > 0], mass[mass > 0]
        tokens = all_states(self.process.states, self.sites)[index].flatten(0, 1)
        parts = [*self.engine.parts()]
        merged = not any(part[3].remembers for part in parts)  # one that remembers is followed from the first step on
        log_weight: Tensor | None = None
        for begin, end in itertools.pairwise(range(len(parts) + 1) if merged else (0, len(parts))):
            tokens, log_weight, mass = self._through(tokens, log_weight, mass, begin, end)
        assert log_weight is not None
        share = (mass[:, None] / self.size * log_weight.view(-1, self.size).exp()).flatten()
        found = torch.zeros(self.process.states**self.sites, dtype=torch.float64)
        found = found.index_add(0, state_index(tokens, self.process.states), share)
        return found if self.engine.grid[-1] > 0 else law_of_data(self.process, found, self.sites)

    def _through(
        self, tokens: Tensor, log_weight: Tensor | None, mass: Tensor, begin: int, end: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, log weights and probabilities of all runs after step ``end``, from those after ``begin``."""
        runs, time = _Runs(len(mass), self.size, self.most), self.engine.grid[begin]
        while True:
            here = runs.rows()
            run = _Listed.start(self.engine.model, len(here), 0)
            run.models, run.given = self.engine.models, runs
            state, _ = run.begin(tokens[here], time)
            state = self.engine.weighed(State(state.tokens, time, state.rows, step=begin), run)
            if log_weight is not None:
                state = _with(state, log_weight[here])
            try:
                for after in itertools.islice(self.engine.through(state, run), end - begin):
                    assert isinstance(after, Weighed)
                    state = after
            except _Further as further:
                runs.extend(*further.args)
                continue
            break
        mass = mass[runs.source] * runs.log_p.exp()
        return self._merged(state, mass)

    def _merged(self, state: Weighed, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, weight = state.tokens.view(len(mass), -1), state.log_weight.view(len(mass), -1)
        living = (mass > 0) & (weight > -torch.inf).any(-1)
        tokens, weight, mass = tokens[living], weight[living], mass[living]
        seen = torch.cat([tokens.double(), (weight * _DIGITS).round()], -1)
        _, index = seen.unique(dim=0, return_inverse=True)
        count = int(index.max()) + 1 if len(index) else 0
        first = torch.full((count,), len(index)).scatter_reduce(0, index, torch.arange(len(index)), "amin")
        mass = torch.zeros(count, dtype=torch.float64).index_add(0, index, mass)
        return tokens[first].view(-1, self.sites), weight[first].flatten(), mass


def _with(state: Weighed, log_weight: Tensor) -> Weighed:
    return Weighed(**{**vars(state), "log_weight": log_weight})


class _Listed(Asked):
    """Run whose choices come from a function instead of Pyro's handlers."""

    def key(self, name: str, state: State, step: int, slot: int, turn: int = 0, seed: int | None = None) -> Key:
        return Run.key(self, name, state, step, slot, turn, seed)


class _Further(BaseException):
    """Raised for a choice that the runs do not cover yet."""


class _Runs:
    """Prefixes of choices of groups; called by ``choose`` for the value of each choice."""

    def __init__(self, count: int, size: int, most: int) -> None:
        self.size, self.most = size, most
        self.source, self.log_p = torch.arange(count), torch.zeros(count, dtype=torch.float64)
        self.values: dict[str, Tensor] = {}

    def rows(self) -> Int[Tensor, " R"]:
        """Return the row in which each particle of each run began."""
        return (self.source[:, None] * self.size + torch.arange(self.size)).flatten()

    def __call__(self, site: str, law: Choice, ids: Int[Tensor, " R"], scored: bool) -> Tensor:
        if site not in self.values:
            raise _Further(site, law)
        return self.values[site][ids]

    def extend(self, site: str, law: Choice) -> None:
        """Extend each run by all values of a choice that some of its particles make."""
        assert law.key is not None
        parent, value, log_p = law.fork()
        row = law.key.ids[parent]
        count = len(self.source)
        run, chosen = torch.arange(count), torch.full((count, 0), -1)
        for particle in range(self.size):
            own = (row % self.size == particle).nonzero()[:, 0]
            own = own[(row[own] // self.size).argsort(stable=True)]
            options = torch.bincount(row[own] // self.size, minlength=count)
            begin = options.cumsum(0) - options
            repeats = options[run].clamp(min=1)
            if int(repeats.sum()) > self.most:
                raise TooManyPaths(f"site {site}: more than {self.most} runs; use a smaller vocabulary or length")
            place = torch.arange(len(run)).repeat_interleave(repeats)
            number = torch.arange(len(place)) - (repeats.cumsum(0) - repeats)[place]
            run, chosen = run[place], chosen[place]
            none = options[run] == 0
            pick = own[(begin[run] + number).clamp(max=max(len(own) - 1, 0))] if len(own) else run.new_zeros(len(run))
            chosen = torch.cat([chosen, pick.masked_fill(none, -1)[:, None]], -1)
        made = chosen >= 0
        self.source = self.source[run]
        self.log_p = self.log_p[run] + torch.where(made, log_p.double()[chosen.clamp(min=0)], 0.0).sum(-1)
        self.values = {
            name: old.unflatten(0, (count, self.size))[run].flatten(0, 1) for name, old in self.values.items()
        }
        new = value[chosen.clamp(min=0)]
        new[~made] = 0
        self.values[site] = new.flatten(0, 1)
