"""Samplers with a given number of denoiser calls."""

from typing import Literal, SupportsIndex

from discdiff.checks import whole
from discdiff.denoiser import Denoiser
from discdiff.operator import Operator, before, check_operator, when
from discdiff.process import Process, by_time
from discdiff.sampling.planned import calls_for_one
from discdiff.sampling.sampler import Sampler

__all__ = ["predictor_corrector"]


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
    r"""Make a sampler with equal steps that takes at most ``nfe`` denoiser calls.

    As many steps as possible have a corrector. Let a predictor step take p calls, and the ``repeats`` corrector
    moves after it c calls in total, with the calls of guides; of a guide that varies with time the most count. The
    sampler takes

        N = floor((nfe - c n) / p) steps, of which n = floor((nfe - p) / (p + c)) are corrected

    ``Sampler.nfe`` gives the total number of calls.

    Args:
        process, model: as for ``Sampler``.
        predictor, corrector: the parts of a step; both must have a known ``nfe``.
        nfe: the budget, at least p.
        repeats: corrector moves after a corrected step.
        corrected: "first" corrects the first n steps, as in the paper, so the tokens drawn at t = 0 are final. "last"
            corrects the last n steps, with the step to t = 0. No later step removes errors made there, and the model
            must determine the leave-one-out at t = 0.

    Raises:
        TypeError: if the predictor does not move in time, or the corrector does.
        ValueError: if the budget is below one predictor step, or an operator's ``nfe`` is None.

    Reference: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).
    """
    for part in (predictor, corrector):
        check_operator(part, "predictor_corrector")
    nfe, repeats = whole(nfe, "predictor_corrector: nfe"), whole(repeats, "predictor_corrector: repeats", 0)
    both = predictor >> corrector**repeats
    calls, more = predictor.nfe, (corrector**repeats).nfe
    if isinstance(model, Denoiser):  # another type is refused by Sampler
        calls, more = (n and n * calls_for_one(model) for n in (calls, more))
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
        return Sampler(process, model, when(before(times[n]), both, predictor), grid=times)
    if corrected == "last":
        return Sampler(process, model, when(before(times[len(times) - 1 - n]), predictor, both), grid=times)
    raise ValueError(f"predictor_corrector: corrected must be 'first' or 'last', got {corrected!r}")
