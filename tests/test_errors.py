"""Bad input: one clear error that says what was wrong, where, and what is accepted."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import chain, weak

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

pytestmark = pytest.mark.usefixtures("as_user")

UNIFORM, MASKED = dd.Uniform(3, dd.Linear()), dd.Masked(3, dd.Linear())
ZEROS = torch.zeros(2, 3, dtype=torch.int64)
CLOCKS = dd.PerSite(dd.Linear(), torch.zeros(4))


def model(value: float = 0.0, process: dd.Process = UNIFORM, width: int = 3) -> dd.Denoiser:
    return dd.Denoiser(lambda x, t: torch.full((*x.shape, width), value), process, predicts="loo")


def sampler(m: dd.Denoiser | None = None, **kwargs: object) -> dd.Sampler:
    chosen = m or model()
    return dd.Sampler(chosen.process, chosen, S.Ancestral(), **({"steps": 2} | kwargs))


def nan_at(row: int, site: int, process: dd.Process) -> dd.Denoiser:
    def fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*x.shape, 3)
        logits[row, site, 1] = math.nan
        return logits

    return dd.Denoiser(fn, process, predicts="loo")


CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    # shapes
    (
        lambda: model()(ZEROS[0], 0.5),
        ValueError,
        r"x must be an int64 \(B, L\) tensor, got torch.int64 of shape \(3,\)",
    ),
    (lambda: model()(ZEROS.float(), 0.5), ValueError, "x must be an int64"),
    (
        lambda: model()(ZEROS, torch.zeros(5)),
        ValueError,
        r"time t must be a float, \(2,\) or \(2, 3\), got shape \(5,\)",
    ),
    (lambda: model(width=4)(ZEROS, 0.5), ValueError, r"must return \(2, 3, 3\) = \(B, L, V\), got \(2, 3, 4\)"),
    (lambda: UNIFORM.bridge(ZEROS, ZEROS[:1], 0.5, 0.2), ValueError, "differ in shape"),
    (lambda: sampler().sample(2, 3, initial=ZEROS[:, :2]), ValueError, r"initial must have shape \(2, 3\)"),
    (lambda: sampler().sample(2, 3, prompt=[0] * 4), ValueError, r"prompt must be \(P,\) or \(2, P\) with P <= 3"),
    (lambda: sampler().sample(2, 3, prompt=[0.5]), ValueError, "token ids"),
    (lambda: sampler().sample(2, 3, prompt=[0, 1, 2], frozen=[1, 0, 0]), ValueError, "frozen must be a bool mask"),
    (lambda: sampler().sample(2, 3, prompt=[0], frozen=[True] * 3), ValueError, "prompt must cover all 3 sites"),
    (lambda: sampler().sample(2, 3, frozen=[True] * 3), ValueError, "prompt= or initial="),
    (lambda: sampler().sample(2), ValueError, "give length="),
    (lambda: sampler().sample(0, 3), ValueError, "batch must be at least 1"),
    (lambda: sampler().sample(1, 0), ValueError, "length must be at least 1"),
    (lambda: sampler(weak().denoiser(UNIFORM)).sample(1, 7), ValueError, "the model is for length 3"),
    (lambda: T.Enumeration(torch.ones(8) / 8, vocab_size=3, length=2), ValueError, r"\(9,\) = \(V\*\*L,\)"),
    (lambda: T.Enumeration(torch.ones(9), vocab_size=3, length=2), ValueError, "its sum 9"),
    (lambda: T.MarkovChain(torch.ones(2) / 2, torch.ones(2, 2), 4), ValueError, "transition must hold probabilities"),
    (lambda: model()([[0, 1, 2]], 0.5), ValueError, "x must be an int64 .* got list"),
    (lambda: sampler().sample(2, 3, initial=[[0.5] * 3] * 2), ValueError, "initial must hold states"),
    (lambda: weak().denoiser(UNIFORM)(ZEROS[:, :2], 0.5), ValueError, "length 3, got length 2"),
    (lambda: T.MarkovChain(torch.ones(2) / 2, torch.ones(2, 2) / 2, 3).log_prob(ZEROS + 2), ValueError, "in 0..1"),
    (lambda: dd.kernels.draw([[0.0]], seed=0, rows=ZEROS[0], positions=ZEROS[0]), ValueError, "got list"),
    # ids outside the vocabulary
    (lambda: UNIFORM.marginal(ZEROS + 3, 0.5), ValueError, r"x0: row 0, position 0 holds 3; accepted ids: 0..2"),
    (lambda: MASKED.marginal(ZEROS + 3, 0.5), ValueError, r"x0: row 0, position 0 holds 3; accepted ids: 0..2"),
    (lambda: model()(ZEROS - 1, 0.5), ValueError, "holds -1; accepted ids: 0..2"),
    (lambda: sampler().sample(2, 3, prompt=[5]), ValueError, "prompt: row 0, position 0 holds 5"),
    (lambda: sampler().sample(2, 3, initial=ZEROS + 9), ValueError, "initial: row 0, position 0 holds 9"),
    # NaN, and rows without mass
    (lambda: sampler(nan_at(1, 2, UNIFORM)).sample(2, 3, seed=0), ValueError, "row 1, position 2: the denoiser gave"),
    (lambda: sampler(nan_at(1, 2, MASKED)).sample(2, 3, seed=0), ValueError, "row 1, position 2: the denoiser gave"),
    (
        lambda: sampler(nan_at(1, 2, MASKED)).sample(2, 3, seed=0, first_row=40),
        ValueError,
        "row 41, position 2: the denoiser gave logits without mass",
    ),
    (
        lambda: sampler(model(-math.inf, MASKED)).sample(2, 3, seed=0),
        ValueError,
        "row 0, position .: the denoiser gave",
    ),
    (lambda: T.kernel(S.Ancestral(), UNIFORM, model(math.nan), t=0.5, s=0.2, length=2), ValueError, "NaN"),
    # times
    (lambda: UNIFORM.bridge(ZEROS, ZEROS, 0.2, 0.5), ValueError, "s must not exceed t"),
    (lambda: UNIFORM.kernel(0.2, 0.5), ValueError, "s must not exceed t"),
    (lambda: UNIFORM.marginal(ZEROS, 1.5), ValueError, r"time t must lie in \[0, 1\]"),
    (lambda: model()(ZEROS, -0.5), ValueError, r"time t must lie in \[0, 1\]"),
    (lambda: T.kernel(S.Ancestral(), UNIFORM, weak().denoiser(UNIFORM), t=0.2, s=0.5), ValueError, "0 <= s < t <= 1"),
    (lambda: T.kernel(S.Ancestral(), UNIFORM, weak().denoiser(UNIFORM), t=0.2), ValueError, "is a predictor"),
    (lambda: T.kernel(S.Gibbs(), UNIFORM, weak().denoiser(UNIFORM), t=0.5, s=0.2), ValueError, "is a corrector"),
    (lambda: sampler(steps=None, grid=[0.0, 1.0]), ValueError, "strictly decreasing"),
    (lambda: sampler(steps=None, grid=[1.0]), ValueError, "at least two"),
    (lambda: sampler(steps=0), ValueError, "steps must lie in 1.."),
    (lambda: sampler(grid=[1.0, 0.0]), ValueError, "either steps=N or grid="),
    # a parameterisation that cannot be converted
    (lambda: weak().denoiser(MASKED)(ZEROS, 0.5).loo, ValueError, "undefined at row 0, position 0"),
    (
        lambda: dd.Sampler(MASKED, weak().denoiser(MASKED), S.Ancestral() >> S.InformedGibbs(), steps=2),
        ValueError,
        r"at t = 0.5 .* undefined there .*predict 'loo'",
    ),
    # processes that differ, and things that are not what they should be
    (lambda: dd.Sampler(MASKED, model(), S.Ancestral(), steps=2), ValueError, "the model is for Uniform"),
    (
        lambda: T.kernel(S.Gibbs(), dd.Uniform(3, dd.Cosine()), weak().denoiser(UNIFORM), t=0.5),
        ValueError,
        "with_schedule",
    ),
    (lambda: dd.Sampler(UNIFORM, lambda x, t: x, S.Ancestral(), steps=2), TypeError, "must be a Denoiser"),
    (lambda: dd.Sampler(UNIFORM, model(), S.Gibbs(), steps=2), TypeError, "needs a predictor"),
    (lambda: dd.Sampler(UNIFORM, model(), "ancestral", steps=2), TypeError, "Sampler takes operators"),
    (lambda: dd.Sampler(UNIFORM, model(), S.Ancestral, steps=2), TypeError, r"it is a class: add \(\)"),
    (lambda: S.Gibbs(sites=1.5), TypeError, "whole number"),
    (lambda: dd.Sampler("uniform", model(), S.Ancestral(), steps=2), TypeError, "process must be a Process"),
    (lambda: dd.Denoiser(lambda x, t: 3, UNIFORM, predicts="loo")(ZEROS, 0.5), TypeError, "must return a tensor"),
    (lambda: dd.Uniform(0, dd.Linear()), ValueError, "vocab_size must lie in 1.."),
    (lambda: dd.Uniform(3, "linear"), TypeError, "schedule must be a Schedule"),
    (lambda: dd.Masked(3, dd.Linear(), mask_id=7), ValueError, r"mask_id must lie in 0..3"),
    (lambda: weak().denoiser(dd.Uniform(4, dd.Linear())), ValueError, "4 data tokens, the law has 3"),
    (lambda: T.kernel(S.Gibbs(), UNIFORM, model(), t=0.5), ValueError, "length="),
    (lambda: T.law(sampler()), ValueError, "length="),
    (lambda: T.law(sampler(), length=3, prompt=[1, 2]), ValueError, "prompt= and frozen= go together"),
    (
        lambda: T.kernel(S.Gibbs(), UNIFORM, model(), t=0.5, length=2, frozen=[True]),
        ValueError,
        r"frozen must have shape \(2,\)",
    ),
    (lambda: T.order([2, 4], lambda n: sampler()), ValueError, "three numbers of steps"),
    (lambda: T.order([2, 4, 8], lambda n: sampler()), ValueError, "give target="),
    (lambda: sampler().sample(2, 3, seed=-1), ValueError, "seed must lie in"),
    (lambda: sampler().sample(2, 3, first_row=-1), ValueError, "row ids must lie in"),
    # processes and schedules
    (
        lambda: dd.Marginal(torch.tensor([0.5, 0.6]), dd.Linear()),
        ValueError,
        "pi must hold probabilities that sum to 1",
    ),
    (lambda: dd.Hybrid(3, dd.Linear(), p_uniform=1.0), ValueError, r"p_uniform must lie in \[0, 1\)"),
    (
        lambda: dd.Hybrid(3, dd.Linear(), lambda a: 2 * a),
        ValueError,
        r"share must lie in \[0, 1\], got .* at alpha = 0.999",
    ),
    (lambda: dd.Ordinal(3, dd.Linear(), torch.ones(2) / 2), ValueError, "pi must hold 3 positive probabilities"),
    (lambda: dd.General(torch.eye(3), dd.Linear()), ValueError, "rows of a generator sum to 0, but row 0 sums to 1"),
    (lambda: dd.General([[1.0, -1.0], [1.0, -1.0]], dd.Linear()), ValueError, "got -1 from state 0 to 1"),
    (lambda: dd.General(torch.zeros(3, 3), dd.Linear()), ValueError, "more than one stationary law"),
    (lambda: dd.TimeVarying(lambda t: [[-1, 1], [1, -1]], dd.Linear()), ValueError, "finite total noise"),
    (lambda: dd.Interpolant(3, dd.Linear(), torch.ones(2) / 2), ValueError, r"source must have shape \(3,\)"),
    (lambda: dd.AbsorbingUniform(0, dd.Linear()), ValueError, "vocab_size must lie in 1.."),
    (lambda: dd.Uniform(3, lambda t: 1 + t), ValueError, r"strictly decreasing, but alpha\(0\) = 1 and alpha\(0.001\)"),
    (lambda: dd.Uniform(3, lambda t: 1 - 2 * t), ValueError, r"must stay in \[0, 1\], got alpha\(1\) = -1"),
    (lambda: dd.Uniform(3, lambda t: 0.5 - 0.5 * t), ValueError, r"alpha\(0\) must be 1, got 0.5"),
    (lambda: dd.Polynomial(0), ValueError, r"k must lie in \(0, inf\)"),
    (lambda: dd.Geometric(2, 1), ValueError, "0 < smin < smax"),
    (lambda: UNIFORM.rate(1.0), ValueError, "infinite at t = 1.0"),
    (lambda: dd.Uniform(3, CLOCKS).marginal(ZEROS, 0.5), ValueError, "clocks for sequences of length 4, got length 3"),
    (
        lambda: sampler(model(process=dd.Uniform(3, CLOCKS))).sample(1, 3),
        ValueError,
        "sequences of length 4, got length 3",
    ),
    # theory, bridges, losses
    (lambda: T.check_process("uniform"), TypeError, "check_process: process must be a Process"),
    (lambda: T.check_process(dd.Uniform(3, CLOCKS)), ValueError, "clock for every site"),
    (lambda: dd.bridge.ReMDM(2.0), ValueError, "sigma must lie in"),
    (lambda: dd.bridge.ReMDM(0.1)(UNIFORM, ZEROS, ZEROS, 0.5, 0.2), ValueError, "applies to a Masked process"),
    (lambda: dd.losses.DiscreteBound(0), ValueError, "steps must be at least 1"),
    (lambda: dd.losses.ScoreEntropy()(model(), ZEROS + 9), ValueError, "x0: row 0, position 0 holds 9"),
    (
        lambda: dd.losses.ScoreEntropy().estimate(model(), ZEROS, 1, 0),
        ValueError,
        "draws, for an error bar, must be at",
    ),
    (lambda: T.reverse_law(model(process=dd.Uniform(3, dd.LogLinear())), 2), ValueError, r"alpha\(1\) = 0"),
    (lambda: T.fit.transition_test(chain(3, 4), ZEROS), ValueError, r"x must be \(B, 4\) int64 tokens"),
    (lambda: T.fit.energy_test(ZEROS, ZEROS[:, :2]), ValueError, r"got \(2, 3\) and \(2, 2\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_wrong_with_good_input() -> None:
    """The cases above fail for their own reason, not because everything does."""
    assert sampler().sample(2, 3, seed=0).tokens.shape == (2, 3)
    assert sampler().sample(2, 3, seed=0, prompt=[]).tokens.shape == (2, 3)
    assert torch.equal(
        sampler(steps=None, grid=np.linspace(1, 0, 3)).sample(2, 3, seed=0).tokens,
        sampler(steps=np.int64(2)).sample(2, 3, seed=0).tokens,
    )
    assert sampler().sample(2, 3, seed=0, initial=[[0, 1, 2], [2, 1, 0]]).nfe == 2
    assert T.kl(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0
    assert sampler(model(process=MASKED)).sample(2, 3, seed=0, prompt=[1]).tokens[:, 0].tolist() == [1, 1]
