"""The absorbing reformulation of the uniform process: its steps, and unmasking policies on it, unchanged."""

import pytest
import torch
from problems import dirichlet

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

pytestmark = pytest.mark.usefixtures("as_user")

PAIRS, UNIFORM = dd.AbsorbingUniform(2, dd.Linear()), dd.Uniform(2, dd.Linear())


def law(operator: dd.Operator, process: dd.Process, world: T.Enumeration, steps: int) -> torch.Tensor:
    return T.law(dd.Sampler(process, world.denoiser(process, predicts="loo"), operator, steps=steps))


WAYS = [
    (S.Ancestral(), dd.Uniform(3, dd.Linear())), (S.MaximalCoupling(), dd.Uniform(3, dd.Linear())),
    (S.Ancestral(), dd.AbsorbingUniform(3, dd.Linear())), (S.Renoising(), dd.AbsorbingUniform(3, dd.Linear())),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "process"), WAYS, ids=repr)
def test_one_site_is_exact_for_any_number_of_steps(operator: dd.Operator, process: dd.Process) -> None:
    world = dirichlet(0.5, 3, length=1)
    for steps in (1, 2, 7):
        assert T.tv(law(operator, process, world, steps), world.p0) < 1e-12


@pytest.mark.parametrize(
    ("operator", "process"),
    [(S.Ancestral(), UNIFORM), (S.MaximalCoupling(), UNIFORM), (S.Ancestral(), PAIRS), (S.Renoising(), PAIRS)],
    ids=repr,
)
def test_one_step_loses_the_total_correlation_and_more_steps_less(operator: dd.Operator, process: dd.Process) -> None:
    world = dirichlet(0.5, 3, vocab_size=2)
    joint = world.p0.view(2, 2, 2)
    single = [joint.sum([k for k in range(3) if k != site]) for site in range(3)]
    correlation = sum(float(T.entropy(p)) for p in single) - float(T.entropy(world.p0))
    kl = [T.kl(world.p0, law(operator, process, world, steps)) for steps in (1, 4, 8, 16)]
    assert kl[0] == pytest.approx(correlation, abs=1e-12)
    assert kl[0] > kl[1] > 2.5 * kl[2] > 2.5**2 * kl[3]


def test_declared_order_is_the_measured_one() -> None:
    """Fresh noise tokens keep the pairs' law at a distance inside (0, 1); the tokens' law is reached at the end."""
    world = dirichlet(0.5, 3, vocab_size=2, length=2)
    model = world.denoiser(PAIRS, predicts="loo")
    for operator, steps in ((S.Ancestral(), [8, 16, 32]), (S.Renoising(), [128, 256, 512])):
        slope = T.order(steps, lambda n, o=operator: dd.Sampler(PAIRS, model, o, steps=n), window=(0.95, 0.1))
        assert slope == pytest.approx(operator.order, abs=0.1)
    whole = T.order([16, 32, 64], lambda n: dd.Sampler(PAIRS, model, S.Renoising(), steps=n))
    assert whole == pytest.approx(1, abs=0.1)


def test_renoising_has_the_paths_of_the_uniform_process_and_a_frozen_noise_token_has_not() -> None:
    """One site: p(z_s | z_t) of the pairs, u averaged over its law given z_t, against the uniform process."""
    world, t, s = dirichlet(0.5, 3, length=1), 0.7, 0.3
    pairs, uniform = dd.AbsorbingUniform(3, dd.Linear()), dd.Uniform(3, dd.Linear())
    p_t = world.marginal(pairs, t)
    right = T.kernel(S.Ancestral(), uniform, world.denoiser(uniform, predicts="loo"), t=t, s=s)
    token = pairs.split(torch.arange(9))[0]
    onto = torch.nn.functional.one_hot(token, 3).double()
    gaps = []
    for operator in (S.Renoising(), S.Ancestral()):
        k = T.kernel(operator, pairs, world.denoiser(pairs, predicts="loo"), t=t, s=s)
        both = onto.T @ (p_t[:, None] * k) @ onto  # (z_t, z_s)
        gaps.append(float((both / both.sum(-1, keepdim=True) - right).abs().max()))
        torch.testing.assert_close(p_t @ k, world.marginal(pairs, s), atol=1e-12, rtol=0)
    assert gaps[0] < 1e-12
    assert gaps[1] > 0.05


@pytest.mark.parametrize("select", ["random", "max_prob", "entropy", "left_to_right"])
def test_one_token_a_call_is_exact_in_any_order(select: str) -> None:
    process, world = dd.Masked(2, dd.Linear()), dirichlet(0.5, 3, vocab_size=2)
    assert T.tv(law(S.AnyOrder(select), process, world, 1), world.p0) < 1e-12


@pytest.mark.parametrize("operator", [S.ReMDM(0.5, "rate"), S.ReMDM(0.1)], ids=repr)
def test_remasking_works_on_noise_tokens(operator: dd.Operator) -> None:
    """Orders of unmasking need a true mask (test_laws); coins do not count what is hidden."""
    world = dirichlet(0.5, 3, vocab_size=2)
    one, many = (T.kl(world.p0, law(operator, PAIRS, world, steps)) for steps in (1, 8))
    assert one == pytest.approx(0.443, abs=1e-3)
    assert 0 < many < 0.12


def test_remasking_one_site_keeps_the_law_of_the_pairs() -> None:
    world = dirichlet(0.5, 3, vocab_size=2)
    p = world.marginal(PAIRS, 0.4)
    moved = {}
    for sites in (1, 2):
        k = T.kernel(S.Remask(0.5, sites), PAIRS, world.denoiser(PAIRS, predicts="loo"), t=0.4)
        moved[sites] = T.tv(p @ k, p)
    assert moved[1] < 1e-12
    assert moved[2] > 1e-3


@pytest.mark.parametrize("operator", [S.Ancestral(), S.Renoising(), S.FirstHitting()], ids=repr)
def test_a_single_token_is_sampled(operator: dd.Operator) -> None:
    process = dd.AbsorbingUniform(1, dd.Linear())
    model = T.Enumeration(torch.ones(1).double(), vocab_size=1, length=3).denoiser(process, predicts="loo")
    assert dd.Sampler(process, model, operator, steps=3).sample(2, seed=0).tokens.tolist() == [[0, 0, 0]] * 2


def test_renoising_needs_noise_tokens() -> None:
    with pytest.raises(ValueError, match="needs an AbsorbingUniform process"):
        dd.Sampler(UNIFORM, dirichlet(0.5, 3, vocab_size=2).denoiser(UNIFORM), S.Renoising(), steps=2)
