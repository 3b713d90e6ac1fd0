"""Anchored remasking against its definition; what it is, and how far its law is from the model's."""

import itertools

import pytest
import torch
from guides import Plain, table
from problems import states, strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

PROCESS = dd.Masked(3, dd.Linear())
MODEL = strong().denoiser(PROCESS, predicts="loo")
TILT = table(3, 3)


def by_hand(model: dd.Denoiser, scores: dd.Denoiser, t: float, s: float) -> Tensor:
    """The kernel, by all draws of every state: ``model`` draws, and anchors are the best by the D of ``scores``."""
    z = states(4, 3)
    p, score = (one(z, t).denoiser.exp() for one in (model, scores))
    kernel = torch.zeros(64, 64, dtype=torch.float64)
    for row, state in enumerate(z.tolist()):
        masked = [i for i in range(3) if state[i] == 3]
        anchors = round((1 - s) * 3) - (3 - len(masked))  # of the masks; revealed tokens are anchors already
        for drawn in itertools.product(range(3), repeat=len(masked)):
            weight, told = 1.0, []
            for i, v in zip(masked, drawn, strict=True):
                weight *= float(p[row, i, v])
                told.append((-float(score[row, i, v]), i, v))
            after = list(state)
            for _, i, v in sorted(told)[: max(0, anchors)]:
                after[i] = v
            kernel[row, after[0] * 16 + after[1] * 4 + after[2]] += weight
    return kernel


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other)[strong().reachable(PROCESS, 0.9)].abs().max())


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.6), (0.7, 0.3), (0.3, 0.0)])
@pytest.mark.usefixtures("as_user")
def test_it_draws_all_keeps_the_best_and_masks_the_others(t: float, s: float) -> None:
    """With the confidence of the guided prediction, not of the network's own."""
    guided = MODEL.guided(Plain(TILT))
    kernel = T.kernel(S.AnchoredRemask(), PROCESS, guided, t, s)
    assert apart(kernel, by_hand(guided, guided, t, s)) < 1e-12
    if s > 0:
        assert apart(kernel, by_hand(guided, MODEL, t, s)) > 0.5, "planted: confidence without the guide"
        assert apart(kernel, by_hand(MODEL, MODEL, t, s)) > 0.5, "planted: no guide at all"


@pytest.mark.usefixtures("as_user")
def test_it_is_path_planning_with_the_denoiser_as_planner() -> None:
    for t, s in ((0.8, 0.4), (0.4, 0.0)):
        kernels = [T.kernel(one, PROCESS, MODEL, t, s) for one in (S.AnchoredRemask(), S.AnchoredRemask(again=True))]
        assert torch.equal(kernels[0], T.kernel(S.P2(0.0), PROCESS, MODEL, t, s))
        assert torch.equal(kernels[0], T.kernel(S.Unmask(draw_first=True), PROCESS, MODEL, t, s))
        assert torch.equal(kernels[1], T.kernel(S.P2(1.0), PROCESS, MODEL, t, s))
    assert (
        apart(*(T.kernel(one, PROCESS, MODEL, 0.8, 0.4) for one in (S.AnchoredRemask(), S.AnchoredRemask(True)))) > 0.1
    )


def test_the_schedule_sets_the_number_of_anchors_and_none_is_a_mask_at_the_end() -> None:
    for again in (False, True):
        sampler = dd.Sampler(PROCESS, MODEL, S.AnchoredRemask(again), steps=3)
        path = sampler.sample(32, seed=0, record=True).trajectory
        assert path is not None
        assert [int(n) for n in (path != 3).sum(-1).unique(dim=1)[:, 0]] == [0, 1, 2, 3]
        stays = bool((path[1:][path[:-1] != 3] == path[:-1][path[:-1] != 3]).all())
        assert stays is not again, "an anchor stays, unless it competes again"


def test_its_law_is_not_the_models_with_any_number_of_steps() -> None:
    """The declared bias: of an exact denoiser, and of an exact posterior."""
    posterior = strong().tilted(TILT[torch.arange(3), states(3, 3)].sum(-1))
    for world in (strong(), posterior):
        for steps in (3, 12):
            law = T.law(dd.Sampler(PROCESS, world.denoiser(PROCESS), S.AnchoredRemask(), steps=steps))
            assert T.tv(law, world.p0) > 0.05
    assert T.tv(T.law(dd.Sampler(PROCESS, MODEL, S.AnyOrder(), steps=1)), strong().p0) < 1e-12


@pytest.mark.usefixtures("as_user")
def test_what_it_says_of_itself() -> None:
    kept, again = S.AnchoredRemask(), S.AnchoredRemask(again=True)
    assert (kept.order, kept.invariant, kept.nfe, kept.moves) == (None, None, 1.0, True)
    assert (kept.reads, again.reads) == (None, "shown")
    assert not kept.weighable and not again.weighable
    with pytest.raises(TypeError, match="AnchoredRemask: again must be True or False, got 1"):
        S.AnchoredRemask(1)  # type: ignore[arg-type]
    for process in (dd.Uniform(3, dd.Linear()), dd.AbsorbingUniform(3, dd.Linear())):
        with pytest.raises(ValueError, match="needs a process with a true mask"):
            kept.check(process)


def test_it_runs_with_guides_towards_a_measurement() -> None:
    """The shapes of measurements, guides and posteriors are checked here."""
    codes = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    matrix = torch.ones(1, 6, dtype=torch.float64)
    model = strong().denoiser(PROCESS)
    for noise in (dd.GaussianNoise([0.3], 0.5), dd.LevelNoise([1], [-0.5, 0.5], 0.3)):
        measured = dd.Measurement(codes, matrix, noise)
        for guide in (dd.APS(measured, inner=3), dd.APS(measured, inner=3, quantised=False), dd.MeanField(measured),
                      dd.MeanField(measured, 2, 3), dd.APS(measured.of_embedded, codes, inner=2)):  # fmt: skip
            out = dd.Sampler(PROCESS, model.guided(guide), S.AnchoredRemask(), steps=3).sample(4, seed=0)
            assert bool((out.tokens < 3).all())
            assert out.rewards is not None and out.rewards > 0
        for samples in (None, 3):
            posterior = dd.variational_posterior(model, measured, samples=samples, steps=3)
            assert posterior.log_prob(posterior.sample(5, seed=0)).shape == (5,)
            steered = dd.Sampler(PROCESS, posterior.denoiser(PROCESS), S.AnchoredRemask(), steps=2)
            assert steered.sample(2, seed=0).tokens.shape == (2, 3)
