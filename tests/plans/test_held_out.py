"""A plan that is found on one law is used on laws that the search has not seen: the exact KL of each, L = V = 3.

Only operators for networks with one time a row are searched. ``Reveal`` and ``Unmask`` are exact here with 3 calls,
because there are 3 sites, so they would leave nothing to find.
"""

import itertools
import random

import pytest
from problems import dirichlet, processes

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

P = dd.plans
STEPS = [S.Ancestral(), S.SplitLeap(), S.Ancestral() >> S.Gibbs()]
HELD_OUT = range(10)  # seeds; the search sees seed 100
CASES = [
    pytest.param(process, coupling, id=f"{process}-{coupling}", marks=[pytest.mark.slow] * (number > 0))
    for number, (process, coupling) in enumerate(itertools.product(processes(), ["strong", "weak"]))
]


def law(coupling: str, seed: int) -> T.Enumeration:
    """A law of the families ``weak`` and ``strong`` of problems.py, with another seed."""
    if coupling == "weak":
        return dirichlet(3.0, seed)
    p0 = dirichlet(0.5, seed).p0
    return T.Enumeration(0.05 / len(p0) + 0.95 * p0, vocab_size=3, length=3)


def kl(process: dd.Process, world: T.Enumeration, plan: dd.Plan) -> float:
    return P.KL(world).score(dd.Sampler(process, world.denoiser(process), plan=plan))


def ancestral(grid: list[float]) -> dd.Plan:
    return dd.Plan(grid, [dd.Step(S.Ancestral())] * (len(grid) - 1))


@pytest.mark.parametrize(("process", "coupling"), CASES)
def test_eight_found_calls_are_ahead_of_sixteen_ancestral_ones(process: dd.Process, coupling: str) -> None:
    """KL(found, 8 calls) <= KL(ancestral, uniform grid, 16 calls) on each of 10 held-out laws."""
    seen = law(coupling, 100)
    found = P.search(process, seen.denoiser(process), calls=8, operators=STEPS, objective=P.KL(seen), times=6,
                     method=P.Surrogate(40, 20, 3, 200))  # fmt: skip
    uniform = ancestral([1 - n / 16 for n in range(16)] + [0.0])
    rng = random.Random(0)
    planted = ancestral([1.0, *sorted((rng.random() for _ in range(7)), reverse=True), 0.0])
    ratios, faults = [], []
    for seed in HELD_OUT:
        world = law(coupling, seed)
        sampler = dd.Sampler(process, world.denoiser(process), plan=found)
        assert sampler.nfe is not None and sampler.nfe <= 8
        limit = kl(process, world, uniform)
        ratios.append(kl(process, world, found) / limit)
        faults.append(kl(process, world, planted) / limit)
    print(f"{process}, {coupling}: KL ratios {min(ratios):.3f} to {max(ratios):.3f}, random plan {min(faults):.2f}")
    assert max(ratios) <= 1
    assert min(faults) > 1, "planted: a random grid of 8 ancestral calls"


def test_as_many_groups_as_sites_are_exact() -> None:
    """Why ``Reveal`` is not among the choices: 3 of the 8 calls already leave nothing."""
    for process in processes():
        world = law("strong", 0)
        for calls, exact in ((3, True), (2, False)):
            found = kl(process, world, dd.Plan([1.0, 0.0], [dd.Step(S.Reveal(calls=calls))]))
            assert (found < 1e-12) == exact
