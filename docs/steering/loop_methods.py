"""Methods that design a third loop, each with the same number of network calls and at most the same of rewards.

The budget of a design of L residues: 8 L evaluations of one sequence by the network, and 8 (12 L (L + 1) + L + 1)
rewards. The rewards are those that the dearest method takes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import TypeVar

import torch
from loop_rules import MASK, Framework, antiberty, frameworks, letters, tokens
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.choices import Draws
from discdiff.operator import GuideAt, choose
from discdiff.sampling import ParticleSamples

X, Y = TypeVar("X"), TypeVar("Y")
ROWS, TURNS, PROPOSALS = 8, (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25), 900
BEST, CANDIDATES, SWAP, APS = "best of 8", "best of all candidates", "swap, best of 8", "APS, best of 8"
VARIATIONAL, SPLIT = "variational, best of 8", "split Gibbs"
PARTICLES, STEERED = "constraint, particles", "constraint, swap, particles"
STEERED_BEST = f"{STEERED}, best of 8"
METHODS = (BEST, CANDIDATES, SWAP, APS, VARIATIONAL, SPLIT, PARTICLES, STEERED, STEERED_BEST)
CONSTRAINED = (PARTICLES, STEERED, STEERED_BEST)


@dataclass(frozen=True)
class Design:
    """A loop, and how it was found.

    Attributes:
        method, framework, length, seed: how.
        loop: the loop.
        rows: the number of loops among which it was chosen, and ``met`` how many of them meet the hard conditions.
        calls: the evaluations of one sequence by the network.
        rewards: the loops whose reward was computed.
        natural: the mean log-probability of its residues, each masked in turn.
    """

    method: str
    framework: str
    length: int
    seed: int
    loop: str
    rows: int
    met: int
    calls: int
    rewards: int
    natural: float = 0.0


@cache
def network() -> dd.Denoiser:
    """The network; bfloat16 takes a third of the time of float32 on processors that multiply it."""
    return dd.load(antiberty(), dtype=torch.bfloat16, quiet=True)


def conditioned(framework: Framework, length: int) -> dd.Denoiser:
    """The denoiser of the third loop given the rest of the domain."""
    x0 = torch.tensor(tokens(framework.before + "A" * length + framework.after))
    moving = torch.zeros(len(x0), dtype=torch.bool)
    moving[len(framework.before) : len(framework.before) + length] = True
    return network().condition(x0, moving)


@dataclass(frozen=True, eq=False)
class Candidates(dd.Guide):
    """Changes nothing; draws complete loops from each prediction and keeps the best one that it has seen.

    Args:
        framework: the framework.
        samples: the number of draws from the prediction of each row.
        seen: where the best loop is kept, with what it was chosen by.
    """

    framework: Framework
    samples: int
    seen: dict[str, float]
    random = True

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        hidden = ~prediction.process.revealed(prediction.x, prediction.alpha)
        law = Draws(prediction[hidden].denoiser, prediction.x, self.samples)
        x = choose("candidates", law, state, at).flatten(0, 1)
        at.reward(self.framework.log_weight, x)
        values = self.framework.choice(x)
        place = int(values.argmax())
        self.seen[letters(x[place].tolist())] = float(values[place])
        return prediction


@dataclass(frozen=True)
class Task:
    """A framework, a length and a seed: what every method designs one loop for."""

    framework: Framework
    length: int
    seed: int

    @property
    def model(self) -> dd.Denoiser:
        return conditioned(self.framework, self.length)

    @property
    def key(self) -> int:
        """The seed of the random numbers: no two tasks share any."""
        return self.seed + 100 * self.length + 10_000 * frameworks().index(self.framework)

    @property
    def most(self) -> int:
        """The rewards of a row, without those of particles, L + 1."""
        return 12 * self.length * (self.length + 1)

    def sampler(self, *guides: dd.Guide) -> dd.Sampler:
        """Reveals one site a step, in random order."""
        model = self.model
        for guide in guides:
            model = model.guided(guide)
        return dd.Sampler(model.process, model, S.Unmask(), steps=self.length)

    def found(self, method: str, loop: Tensor, rows: Tensor, calls: float, rewards: int) -> Design:
        """Return a design; ``rows`` (N, L) are the loops among which it was chosen."""
        met = int(self.framework.constraint.accepts(rows).sum())
        name, text = self.framework.name, letters(loop.tolist())
        return Design(method, name, self.length, self.seed, text, len(rows), met, round(calls), rewards)

    def calls(self, out: dd.Samples) -> float:
        """The evaluations of one sequence by the network."""
        return out.queries / (len(self.framework.before) + self.length + len(self.framework.after))

    def best(self, method: str, *guides: dd.Guide) -> Design:
        """The best of the rows of a sampler."""
        out = self.sampler(*guides).sample(ROWS, self.length, seed=self.key)
        best = dd.best_of(out, self.framework.choice, ROWS)
        return self.found(method, best.tokens[0], out.tokens, self.calls(out), best.rewards)

    # --- methods ------------------------------------------------------------------------------------------------------

    def unguided(self) -> Iterator[Design]:
        """Best of n, and best of all loops that could be drawn from the same predictions."""
        seen: dict[str, float] = {}
        most = self.most // self.length + 1  # for each row and step; with the last rows themselves as many as allowed
        out = self.sampler(Candidates(self.framework, most, seen)).sample(ROWS, self.length, seed=self.key)
        best = dd.best_of(out, self.framework.choice, ROWS)
        yield self.found(BEST, best.tokens[0], out.tokens, self.calls(out), ROWS)
        seen[letters(best.tokens[0].tolist())] = float(best.reward[0])
        loop = torch.tensor(tokens(max(seen, key=seen.__getitem__)))
        yield self.found(CANDIDATES, loop, loop[None], self.calls(out), best.rewards)

    def swap(self) -> Iterator[Design]:
        """As many draws as the rewards allow; each site is read once, in the step that draws it."""
        samples = (self.length + 1) // 2
        yield self.best(SWAP, dd.Reward(self.framework.log_weight, samples=samples, at_once=1 << 16))

    def aps(self) -> Iterator[Design]:
        """With one-hot codes and a hundred inner steps, which take a reward only where a code has changed."""
        yield self.best(APS, dd.APS(self.framework.of_embedded, torch.eye(25, dtype=torch.float64)))

    def variational(self) -> Iterator[Design]:
        """Seven steps of one draw: L calls each, and L for the bound that comes with the result."""
        fit = dd.variational_posterior(self.model, self.framework.log_weight, samples=1, steps=ROWS - 1, seed=self.key)
        x = fit.sample(ROWS, self.key + 50)
        best = x[self.framework.choice(x).argmax()]
        yield self.found(VARIATIONAL, best, x, fit.sequences, fit.rewards + ROWS)

    def particles(self) -> Iterator[Design]:
        """A constraint alone proposes; the weights carry the reward."""
        out = self._steered(self.framework.constraint)
        yield self.found(PARTICLES, out.draw(self.key)[0], out.tokens, self.calls(out), out.rewards)

    def steered(self) -> Iterator[Design]:
        """A swap guide of one draw and a constraint propose: one particle by its weight, and the best one."""
        swap = dd.Reward(self.framework.log_weight, samples=1, at_once=1 << 16)
        out = self._steered(swap, self.framework.constraint)
        yield self.found(STEERED, out.draw(self.key)[0], out.tokens, self.calls(out), out.rewards)
        best = out.tokens[self.framework.choice(out.tokens).argmax()]
        yield self.found(STEERED_BEST, best, out.tokens, self.calls(out), out.rewards)

    def _steered(self, *guides: dd.Guide) -> ParticleSamples:
        sampler, log_weight = self.sampler(*guides), self.framework.log_weight
        return dd.Particles(sampler, lambda x, t: log_weight(x), per_group=ROWS).sample(
            ROWS, self.length, seed=self.key
        )


WAYS: tuple[Callable[[Task], Iterator[Design]], ...] = (
    Task.unguided, Task.swap, Task.aps, Task.variational, Task.particles, Task.steered
)  # fmt: skip


@torch.no_grad()
def naturalness(framework: Framework, loops: list[str]) -> list[float]:
    """The mean log-probability of the residues of loops of one length, each site masked in turn, in nats."""
    length, count = len(loops[0]), len(loops)
    x = torch.tensor([tokens(loop) for loop in loops])
    alone = torch.eye(length, dtype=torch.bool).repeat(count, 1)
    clean = x.repeat_interleave(length, 0)
    states, found = torch.where(alone, MASK, clean), []
    model = conditioned(framework, length)
    for some in torch.arange(len(states)).split(64):
        log_p = model(states[some], 0.5)[alone[some]].denoiser.dense().double().log_softmax(-1)
        found.append(log_p.gather(-1, clean[some][alone[some]][:, None])[:, 0])
    return torch.cat(found).view(count, length).mean(-1).tolist()


def split(tasks: Sequence[Task]) -> Iterator[Design]:
    """One chain a task, of seven turns that take as many calls as seven rows. The tasks differ in their seeds alone."""
    first, count = tasks[0], len(tasks)
    turns = dd.SplitGibbs(first.sampler(), first.framework.log_weight, TURNS, proposals=PROPOSALS, per_group=1)
    out = turns.sample(count, first.length, seed=first.key)
    for task, x in zip(tasks, out.tokens, strict=True):
        yield task.found(SPLIT, x, x[None], first.calls(out) / count, out.rewards // count)


def designed(tasks: Sequence[Task]) -> list[Design]:
    """The designs of all methods, with their naturalness, for tasks that differ in their seeds alone."""
    made = [one for task in tasks for way in WAYS for one in way(task)] + [*split(tasks)]
    loops = [*dict.fromkeys(one.loop for one in made)]
    natural = dict(zip(loops, naturalness(tasks[0].framework, loops), strict=True))
    made.sort(key=lambda one: (one.seed, METHODS.index(one.method)))
    return [replace(one, natural=natural[one.loop]) for one in made]


def alone(framework: Framework) -> float:
    """The naturalness of a framework's own loop."""
    return naturalness(framework, [framework.natural])[0]


def everywhere(function: Callable[[X], Y], over: Sequence[X], processes: int) -> Iterator[Y]:
    """Map a function in several processes of one thread each; results come in order."""
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(function, over)
