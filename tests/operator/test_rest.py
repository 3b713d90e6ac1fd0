"""What cannot work in a step is known when the sampler is built: a corrector rests at time 0, or is refused."""

import pytest
import torch
from problems import dirichlet, families, named, strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

pytestmark = pytest.mark.usefixtures("as_user")

MASKED, UNIFORM, PAIRS = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear()), dd.AbsorbingUniform(3, dd.Linear())
ZERO = dd.Marginal(torch.tensor([0.4, 0.6, 0.0]), dd.Linear())
CORRECTORS = [
    S.Gibbs(), S.Gibbs(2), S.Gibbs(scan="systematic"), S.ForwardBackward(0.7), S.TauForwardBackward(0.1),
    S.InformedGibbs(), S.InformedGibbs(exact=True), S.LocallyBalanced(), S.TauLocallyBalanced(0.1), S.EntropyRedraw(),
    S.EntropyRedraw(1.0, sites=1),
]  # fmt: skip


def table(process: dd.Process, predicts: str = "denoiser") -> tuple[dd.Denoiser, list[int]]:
    """A fixed network, and how often it was called."""
    width = process.columns if predicts == "ratio" else process.vocab_size
    logits, calls = torch.randn(process.states, width, generator=torch.Generator().manual_seed(0)), [0]

    def fn(x: Tensor, time: Tensor | None) -> Tensor:
        calls[0] += 1
        return logits[x]

    return dd.Denoiser(fn, process, predicts, time=None), calls  # type: ignore[arg-type]


@pytest.mark.parametrize("process", [UNIFORM, families()[4], families()[7]], ids=repr)
@pytest.mark.parametrize("corrector", CORRECTORS, ids=repr)
def test_a_corrector_rests_where_no_leave_one_out_is_determined(corrector: dd.Corrector, process: dd.Process) -> None:
    try:
        corrector.check(process)
    except ValueError:
        pytest.skip("it does not accept the process")
    model, calls = table(process)
    sampler = dd.Sampler(process, model, S.Ancestral() >> corrector, steps=3)
    out = sampler.sample(4, 6, seed=0)
    assert (out.tokens < 3).all()
    assert f"{corrector} rests at t = 0" in repr(sampler)
    away = dd.Sampler(process, model, dd.when(lambda t: t > 0.5, S.Ancestral() >> corrector, S.Ancestral()), steps=3)
    assert torch.equal(away.sample(4, 6, seed=0).tokens, out.tokens)
    assert out.nfe == away.sample(4, 6, seed=0).nfe <= calls[0]
    if corrector.nfe is not None:
        assert sampler.nfe == 3 + 2 * corrector.nfe
    world = dirichlet(0.5, 3, length=2)
    rest = T.kernel(corrector, process, world.denoiser(process, predicts="denoiser"), t=0.0)
    assert torch.equal(rest, torch.eye(process.states**2, dtype=torch.float64))
    if isinstance(corrector, S.TauForwardBackward):
        return  # it rests wherever alpha = 1: its noise would stay
    moved = T.kernel(corrector, process, world.denoiser(process, predicts="loo"), t=0.0)
    assert float((moved - rest).abs().max()) > 1e-3  # with a leave-one-out it works there, and says nothing
    told = dd.Sampler(process, world.denoiser(process, predicts="loo"), S.Ancestral() >> corrector, steps=3)
    assert "rests" not in repr(told)


def test_what_rests_is_exact_in_laws_and_counted_in_any_composition() -> None:
    world = strong()
    model = world.denoiser(UNIFORM, predicts="denoiser")
    moves = dd.mix({S.Gibbs(): 0.5, S.Gibbs() ** 3: 0.5})
    sampler = dd.Sampler(UNIFORM, model, S.Ancestral() >> moves >> S.Gibbs(), steps=2)
    away = dd.when(lambda t: t > 0.5, S.Ancestral() >> moves >> S.Gibbs(), S.Ancestral())
    assert sampler.nfe == 2 + (0.5 + 1.5 + 1)
    torch.testing.assert_close(T.law(sampler), T.law(dd.Sampler(UNIFORM, model, away, steps=2)), atol=1e-14, rtol=0)
    blocks = dd.Blockwise(UNIFORM, table(UNIFORM)[0], S.Ancestral() >> S.Gibbs(), block=2, steps=4)
    assert blocks.nfe(4) == 2 * (4 + 3)
    assert blocks.sample(2, 4, seed=0).nfe <= 14
    assert "rests at t = 0" in repr(blocks)


@pytest.mark.parametrize("corrector", [S.Gibbs(), S.ForwardBackward(0.7), S.EntropyRedraw(1.0, sites=1)], ids=repr)
def test_what_hides_first_goes_on_at_time_0_on_a_masked_process(corrector: dd.Corrector) -> None:
    world = strong()
    sampler = dd.Sampler(MASKED, world.denoiser(MASKED), S.Ancestral() >> corrector, steps=2)
    assert "rests" not in repr(sampler)
    assert sampler.nfe == 4
    k = T.kernel(corrector, MASKED, world.denoiser(MASKED), t=0.0)
    assert float((k - torch.eye(64).double()).abs().max()) > 0.1
    p = world.marginal(MASKED, 0.0)
    assert float((p @ k - p).abs().max()) < 1e-12
    pairs = dd.Sampler(PAIRS, strong().denoiser(PAIRS), S.Ancestral() >> corrector, steps=2)
    assert "rests" in repr(pairs)  # a clean pair that looks hidden is surely clean at time 0


def test_adding_noise_for_a_moment_leaves_no_mask_at_time_0() -> None:
    world = strong()
    for process in (MASKED, PAIRS):
        for predicts in ("loo", "denoiser"):
            model = world.denoiser(process, predicts=predicts)
            k = T.kernel(S.TauForwardBackward(0.3), process, model, t=0.0, length=3) if process is MASKED else None
            if k is not None:
                assert torch.equal(k, torch.eye(64, dtype=torch.float64))
            out = dd.Sampler(process, model, S.Ancestral() >> S.TauForwardBackward(0.3), steps=2).sample(64, seed=0)
            assert (out.tokens < 3).all()


REFUSED = [
    (S.P2(), MASKED, "denoiser"), (S.P2(0.5), MASKED, "denoiser"), (S.ReMDM(confident=True), MASKED, "denoiser"),
    (S.AnchoredRemask(again=True), MASKED, "denoiser"),
    (S.Ancestral() >> S.InformedGibbs(), MASKED, "denoiser"),
    (S.Ancestral() >> S.LocallyBalanced() ** 2, MASKED, "denoiser"),
    (dd.when(lambda t: t < 0.9, S.Ancestral() >> S.EntropyRedraw(), S.Ancestral()), MASKED, "denoiser"),
    (S.Ancestral() >> dd.mix({S.Gibbs(): 0.5, S.TauLocallyBalanced(): 0.5}), MASKED, "denoiser"),
    (S.Ancestral() >> S.RePaint(0.6, S.P2()), MASKED, "denoiser"), (S.Ancestral() >> S.Gibbs(), ZERO, "denoiser"),
    (S.Ancestral() >> S.InformedGibbs(), PAIRS, "denoiser"), (S.Ancestral(), UNIFORM, "ratio"),
    (S.SplitLeap(), UNIFORM, "ratio"), (S.Gibbs() >> S.Ancestral(), dd.Ordinal(3, dd.Linear()), "ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "process", "predicts"), REFUSED, ids=named)
def test_what_cannot_work_is_refused_before_the_first_call(
    operator: dd.Operator, process: dd.Process, predicts: str
) -> None:
    model, calls = table(process, predicts)
    with pytest.raises(ValueError, match="leave-one-out prediction is undefined"):
        dd.Sampler(process, model, operator, steps=4)
    assert calls[0] == 0
    made = strong().denoiser(process, predicts=predicts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave-one-out prediction is undefined"):
        T.kernel(operator, process, made, t=1.0 if predicts == "ratio" else 0.4, s=0.3)


ACCEPTED = [
    (S.P2(), MASKED, "loo"), (S.P2(0.0), MASKED, "denoiser"), (S.AnchoredRemask(), MASKED, "denoiser"),
    (S.P2(planner=lambda x: torch.zeros(x.shape)), MASKED, "denoiser"), (S.ReMDM(), MASKED, "denoiser"),
    (S.Ancestral() >> S.ForwardBackward(), ZERO, "denoiser"),
    (S.Ancestral() >> S.TauForwardBackward(), ZERO, "denoiser"),
    (S.Ancestral(), dd.Uniform(3, dd.LogLinear()), "ratio"), (S.Ancestral() >> S.Gibbs(), MASKED, "ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "process", "predicts"), ACCEPTED, ids=named)
def test_what_works_is_not_refused(operator: dd.Operator, process: dd.Process, predicts: str) -> None:
    model, _ = table(process, predicts)
    for seed in range(8):
        assert (dd.Sampler(process, model, operator, steps=4).sample(4, 5, seed=seed).tokens < 3).all()
