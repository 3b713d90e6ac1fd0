"""Compute the tables of hard constraints: mass on rejected sequences, distance to the restricted law, operators, cost.

Run it as ``python docs/steering/constraints.py``; it prints each table with its name. The laws are exact, by
enumeration; times are of one thread.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from page import table

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.command.bench import Meter
from discdiff.operator import GuideAt
from discdiff.theory.world import all_states, state_index

V, L = 3, 3
MASKED = dd.Masked(V, dd.Linear())
STEPS = (1, 2, 4, 16, 64)
SHORT = (2, 8, 32)


def parity() -> dd.Constraint:
    """The number of ones is even, and no two follows a zero: 10 of the 27 sequences of three sites."""
    moves = torch.full((5, V), 4)
    for state in range(4):
        odd, zero = state // 2, state % 2
        moves[state] = torch.tensor([odd * 2 + 1, (1 - odd) * 2, 4 if zero else odd * 2])
    return dd.Constraint(moves, 0, torch.tensor([True, True, False, False, False]))


class Sitewise(dd.Guide):
    """The messages of the constraint as a tilt of single sites, which are then drawn independently of each other."""

    def __init__(self, constraint: dd.Constraint) -> None:
        self.constraint = constraint

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        return self.constraint(prediction, state, at).untruncated


def network(predicts: dd.prediction.Predicts = "denoiser") -> dd.Denoiser:
    """A network that is no posterior of any law."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4**L, L, V, generator=generator, dtype=torch.float64) * 1.5
    return dd.Denoiser(lambda x, t: table[state_index(x, 4)], MASKED, predicts, length=L, time_dtype=torch.float64)


def correlated() -> T.Enumeration:
    """A law of dependent sites."""
    p0 = torch.as_tensor(np.random.default_rng(3).dirichlet(np.ones(V**L)))
    return T.Enumeration(p0, vocab_size=V, length=L)


def independent() -> T.Enumeration:
    """A product over sites."""
    sites = [torch.softmax(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64) * (i + 1), 0) for i in range(L)]
    p0 = (sites[0][:, None, None] * sites[1][:, None] * sites[2]).flatten()
    return T.Enumeration(p0 / p0.sum(), vocab_size=V, length=L)


def rejected(steps: Sequence[int] = STEPS) -> dict[str, list[float]]:
    """The mass on rejected sequences of Ancestral, for each number of steps: alone, site by site and jointly."""
    constraint, model = parity(), network()
    wrong = ~constraint.accepts(all_states(V, L))
    kinds = {"no guide": model, "site by site": model.guided(Sitewise(constraint)), "jointly": model.guided(constraint)}
    return {name: [float(T.law(ancestral(one, n))[wrong].sum()) for n in steps] for name, one in kinds.items()}


def ancestral(model: dd.Denoiser, steps: int) -> dd.Sampler:
    """The sampler of these tables."""
    return dd.Sampler(MASKED, model, S.Ancestral(), steps=steps)


def distances(steps: Sequence[int] = SHORT) -> dict[str, list[float]]:
    """Total variation to p0 restricted to accepted sequences, for each number of steps."""
    constraint = parity()
    right = constraint.accepts(all_states(V, L))
    found = {}
    for name, world in (("correlated sites", correlated()), ("independent sites", independent())):
        goal = world.p0 * right / (world.p0 * right).sum()
        for how, guide in (("site by site", Sitewise(constraint)), ("jointly", constraint)):
            model = world.denoiser(MASKED).guided(guide)
            found[f"{name}, {how}"] = [T.tv(T.law(ancestral(model, n)), goal) for n in steps]
    return found


def operators() -> dict[str, str]:
    """The mass on rejected sequences after two steps of every exported operator, by name, or "refused".

    Of an operator that cannot be enumerated it is the share among 1,000 draws.
    """
    constraint, model = parity(), network("loo").guided(parity())
    wrong, found = ~constraint.accepts(all_states(V, L)), {}
    for name in S.__all__:
        one = getattr(S, name)()
        if isinstance(one, S.Renoising):  # of another process
            continue
        sampler = dd.Sampler(MASKED, model, one if one.moves else S.Ancestral() >> one, steps=2)
        try:
            drawn = sampler.sample(1000, L, seed=0).tokens
            share = float((~constraint.accepts(drawn)).double().mean())
            found[name] = f"{float(T.law(sampler)[wrong].sum()) if one.enumerable else share:.3g}"
        except ValueError as error:
            if "joint law" not in str(error):
                raise
            found[name] = "refused"
    return found


class Cost:
    """A constraint on a large vocabulary, with a network that costs nothing.

    Args:
        constraint: the constraint.
        batch, length: B and L.
    """

    def __init__(self, constraint: dd.Constraint, batch: int, length: int) -> None:
        size = constraint.automaton.tokens
        self.process, self.batch, self.length, self.constraint = dd.Masked(size, dd.Linear()), batch, length, constraint
        self.logits = torch.randn(batch, length, size, generator=torch.Generator().manual_seed(0))

    def sampler(self, guided: bool = True) -> dd.Sampler:
        """One ancestral step from all masks."""
        model = dd.Denoiser(lambda x, t: self.logits[: len(x)], self.process, "denoiser")
        model = model.guided(self.constraint) if guided else model
        return dd.Sampler(self.process, model, S.Ancestral(), steps=1)

    def seconds(self) -> float:
        """The processor time of the step, after a first one."""
        self.sampler().sample(self.batch, self.length, seed=0)
        start = time.process_time()
        self.sampler().sample(self.batch, self.length, seed=1)
        return time.process_time() - start

    def memory(self) -> int:
        """The largest number of bytes in use at one time, besides the logits."""
        with Meter() as meter:
            out = self.sampler().sample(self.batch, self.length, seed=0)
        assert bool(self.constraint.accepts(out.tokens).all())
        return meter.peak


def dense(states: int, tokens: int, classes: int, seed: int = 0) -> dd.Constraint:
    """A random automaton, whose tokens are in a number of classes."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randint(states, (states, classes), generator=generator)
    of = torch.randint(classes, (tokens,), generator=generator) if classes < tokens else torch.arange(tokens)
    return dd.Constraint(moves[:, of], 0, torch.rand(states, generator=generator) < 0.3)


def costs() -> dict[str, Callable[[], Cost]]:
    """The settings of the table of costs."""
    return {
        "50,000 tokens in 300 classes, 100 states": lambda: Cost(dense(100, 50_000, 300), 2, 64),
        "50,000 tokens, all different, 100 states": lambda: Cost(dense(100, 50_000, 50_000), 2, 64),
        "4 tokens, 101 states": lambda: Cost(dd.Constraint.regex("((a|b)*c){100}d*", ["a", "b", "c", "d"]), 2, 4096),
    }


def tables() -> dict[str, str]:
    """Return the tables by name, as markdown."""
    held = operators()
    cost = [
        [name, f"{made.batch} x {made.length}", f"{made.seconds():.2f}", f"{made.memory() / 1e6:.0f}"]
        for name, make in costs().items()
        for made in [make()]
    ]
    return {
        "rejected": table(
            ["Ancestral, steps", *map(str, STEPS)],
            [[name, *(f"{p:.3g}" for p in row)] for name, row in rejected().items()],
        ),
        "distances": table(
            ["TV to p0 restricted, steps", *map(str, SHORT)],
            [[name, *(f"{p:.2g}" for p in row)] for name, row in distances().items()],
        ),
        "operators": table(
            ["mass on rejected sequences", "operators"],
            [
                [mass, ", ".join(name for name, one in held.items() if one == mass)]
                for mass in sorted(set(held.values()))
            ],
        ),
        "cost": table(["constraint", "rows x sites", "seconds a step", "MB besides logits"], cost),
    }


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for name, made in tables().items():
        print(f"<!-- {name} -->\n{made}\n")


if __name__ == "__main__":
    main()
