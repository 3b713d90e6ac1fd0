"""Measure guidance: draws from the combined logits of two sources against draws from one, and the memory of a step.

Draws are CPU times of one thread, as in ``bench_steps``.
"""

import torch

from discdiff.command.bench import Meter, Problem, states
from discdiff.command.bench_steps import Case
from discdiff.denoiser import Denoiser
from discdiff.guidance import classifier_free
from discdiff.kernels import dispatch as kernels
from discdiff.process import Linear, Masked, Uniform
from discdiff.samplers import Ancestral
from discdiff.sampling import Sampler

__all__ = ["ONE", "SUMS", "TWO", "draws", "largest_temporary"]

SUMS = Problem(2)
ONE, TWO = "draws from one source", "draws from two sources"


def draws(problem: Problem) -> dict[str, Case]:
    """Return cases by name: a draw from each row of one source, and of two sources with weights 2 and -1.

    Both sources hold the same numbers at different addresses, so that both cases draw the same tokens.
    """
    one, other = (kernels.Rows.of(problem.logits().flatten(0, 1)) for _ in range(2))
    ids = torch.arange(len(one), device=one.device)

    def case(rows: kernels.Rows) -> Case:
        return lambda: lambda: kernels.draw(rows, seed=0, rows=ids, positions=ids)

    return {ONE: case(one), TWO: case(one.plus(2.0, [(-1.0, other)]))}


def largest_temporary(problem: Problem) -> int:
    """Return the size, in float32 elements, of the largest tensor that guided masked and uniform steps make.

    The two networks have their logits at hand, so the size is that of the step alone.
    """
    logits, (t, s), (z, tokens), found = problem.logits(), problem.times, states(problem), 0
    for process, start in ((Masked(problem.vocab, Linear()), z), (Uniform(problem.vocab, Linear()), tokens)):
        one, other = (Denoiser(lambda x, time: logits, process, "loo", time=None) for _ in range(2))
        sampler = Sampler(process, classifier_free(one, other), Ancestral(), grid=[t, s])
        with Meter() as meter:
            sampler.sample(seed=0, initial=start)
        found = max(found, meter.largest)
    return found // 4
