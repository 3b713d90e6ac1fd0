"""Samplers with a given number of denoiser calls."""

from dataclasses import dataclass
from typing import Literal, SupportsIndex

from discdiff.checks import whole
from discdiff.denoiser import Denoiser
from discdiff.operator import Operator, check_operator, when
from discdiff.process import Process, by_time
from discdiff.sampling.sampler import Sampler

__all__ = ["After", "predictor_corrector"]


def predictor_corrector(
    process: Process,
    model: Denoiser,
    predictor: Operator,
    corrector: Operator,
    *,
    nfe: SupportsIndex,
    repeats: SupportsIndex = 1,
    corrected: Literal["first", "last"] = "first",
) -> Sampler:
    r"""Make a sampler of at most ``nfe`` denoiser calls: equal steps, as many of them as possible with a corrector.

    Let a predictor step take p calls, and all corrector moves after a step c calls. The sampler takes

        floor((nfe - c n) / p) steps, of which n = floor((nfe - p) / (p + c)) have corrector moves

    ``Sampler.nfe`` gives the total.

    Args:
        process, model: as for ``Sampler``.
        predictor, corrector: the parts of a step; both must declare their calls.
        nfe: the budget, at least p.
        repeats: corrector moves after a corrected step.
        corrected: "first": correct the first n steps, as published; no corrector follows the step to t = 0. "last":
            correct the last n, because no later steps remove their errors. The step to t = 0 is one of them, so the
            model must have a LOO at t = 0.

    Raises:
        TypeError: if the predictor does not move in time, or the corrector does.
        ValueError: for a budget below one predictor step, or an operator that does not declare its calls.

    Reference: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).
    """
    for part in (predictor, corrector):
        check_operator(part, "predictor_corrector")
    nfe, repeats = whole(nfe, "predictor_corrector: nfe"), whole(repeats, "predictor_corrector: repeats", 0)
    both = predictor >> corrector**repeats
    calls, more = predictor.nfe, (corrector**repeats).nfe
    if calls is None or more is None or not calls > 0:
        raise ValueError(
            f"predictor_corrector: the predictor and the corrector must declare their calls; {predictor} has "
            f"nfe = {calls}, {corrector}**{repeats} has {more}"
        )
    if nfe < calls:
        raise ValueError(f"predictor_corrector: nfe must be at least {calls:g}, one step of {predictor}; got {nfe}")
    n = int((nfe - calls) // (calls + more))
    times = by_time(int((nfe - more * n) // calls))
    if corrected == "first":
        return Sampler(process, model, when(After(times[n]), both, predictor), grid=times)
    if corrected == "last":
        return Sampler(process, model, when(After(times[len(times) - 1 - n]), predictor, both), grid=times)
    raise ValueError(f"predictor_corrector: corrected must be 'first' or 'last', got {corrected!r}")


@dataclass(frozen=True)
class After:
    """The condition t > time, for the steps that start before this time."""

    time: float

    def __call__(self, t: float) -> bool:
        return t > self.time

    def __repr__(self) -> str:
        return f"t > {self.time:.4g}"
