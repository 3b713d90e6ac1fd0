"""The excess of a sampler's states over noisy data: enumerated, and correctors where it is large and where small."""

import pytest
import torch
from problems import states, strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import law_of_prior

P = dd.plans
WORLD, STEPS = strong(), 4
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())


def rows(count: int) -> Tensor:
    drawn = torch.multinomial(WORLD.p0, count, replacement=True, generator=torch.Generator().manual_seed(3))
    return states(3, 3)[drawn]


def enumerated(process: dd.Process, sampler: dd.Sampler) -> Tensor:
    """e(t) at every time by sums over all states: conditionals are ratios of the noisy law itself."""
    size, law, found = process.states, law_of_prior(process, 3), []
    for (_, t, s), step in zip(sampler.intervals(), sampler.plan.steps, strict=True):
        law = law @ T.kernel(step.operator, process, sampler.model, t=t, s=s)
        p = WORLD.marginal(process, s)
        joint = p.view(size, size, size)
        surprise = sum(-(joint / joint.sum(i, keepdim=True)).log() for i in range(3))
        assert isinstance(surprise, Tensor)
        held = p > 0
        found.append((law - p)[held] @ surprise.flatten()[held])
        assert float(law[~held].sum()) < 1e-12
    return torch.stack(found)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
@pytest.mark.parametrize("sites", [1, 3])
def test_the_excess_is_the_enumerated_one(process: dd.Process, sites: int) -> None:
    sampler = dd.Sampler(process, WORLD.denoiser(process), S.Ancestral(), steps=STEPS)
    found, exact = P.excess(sampler, rows(2000), sites=sites, seed=1), enumerated(process, sampler)
    assert found.times == tuple(sampler.grid[1:])
    assert float(((found.nats - exact).abs() / found.standard_error).max()) < 3
    if process is UNIFORM:
        assert float(((found.nats - exact.flip(0)).abs() / found.standard_error).max()) > 3, "planted: times reversed"


def test_correctors_pay_where_the_excess_is_large() -> None:
    """Two redraws of one site more, behind one step: the end law is better, the larger the excess."""
    model = WORLD.denoiser(UNIFORM)
    plain = dd.Sampler(UNIFORM, model, S.Ancestral(), steps=STEPS)
    found = P.excess(plain, rows(2000), seed=2).nats[:-1]  # a corrector at time 0 redraws nothing that is noisy
    steps = [T.kernel(S.Ancestral(), UNIFORM, model, t=t, s=s) for _, t, s in plain.intervals()]

    def end(corrected: int | None) -> float:
        law = law_of_prior(UNIFORM, 3)
        for number, step in enumerate(steps):
            law = law @ step
            if number == corrected:
                redraw = T.kernel(S.Gibbs(), UNIFORM, model, t=plain.grid[number + 1])
                law = law @ redraw @ redraw
        return T.kl(WORLD.p0, law)

    assert found.tolist() == sorted(found.tolist())
    best, worst = end(int(found.argmax())), end(int(found.argmin()))
    assert best < worst - 0.01
    assert best < end(None) - 0.01
    assert worst <= end(None) + 1e-12


def test_a_sampler_that_ends_at_data_has_no_excess() -> None:
    exact = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM), S.Reveal(calls=3), grid=[1.0, 0.0])
    found = P.excess(exact, rows(2000), seed=4)
    assert abs(float(found.nats[-1])) < 3 * float(found.standard_error[-1])


@pytest.mark.usefixtures("as_user")
def test_bad_input_is_refused() -> None:
    sampler = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM), S.Ancestral(), steps=2)
    with pytest.raises(ValueError, match="excess: sites"):
        P.excess(sampler, rows(4), sites=0)
    with pytest.raises(ValueError, match="begins at t = 1, got"):
        P.excess(dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM), S.Ancestral(), grid=[0.6, 0.0]), rows(4))
    with pytest.raises(TypeError, match="takes a Sampler"):
        P.excess(S.Ancestral(), rows(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="excess: data"):
        P.excess(sampler, rows(4) + 3)
