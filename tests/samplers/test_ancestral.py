"""Ancestral sampling: the exact one-site reverse marginal, its order, and the fault the field knows."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from ledger import caught, within
from problems import joint, mislabelled, states, strong, weak
from problems import rank_one as zoo
from strategies import intervals, processes, worlds

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T


@given(worlds(vocab_size=3, length=1), processes(vocab_size=3), intervals())
def test_one_site_is_exact(world: T.Enumeration, process: dd.Process, interval: tuple[float, float]) -> None:
    """For L = 1 the kernel is p(z_s | z_t), by Bayes from the forward kernels alone."""
    t, s = interval
    p_s, p_t = world.marginal(process, s), world.marginal(process, t)
    forward = process.kernel(t, s)
    reached = p_t > 0
    exact = (p_s[:, None] * forward).T[reached] / p_t[reached, None]
    k = T.kernel(S.Ancestral(), process, world.denoiser(process, predicts="loo"), t=t, s=s)
    torch.testing.assert_close(k[reached], exact, atol=1e-12, rtol=0)
    torch.testing.assert_close(k.sum(-1), torch.ones(len(k)).double(), atol=1e-12, rtol=0)


@given(worlds(), processes(), intervals())
def test_each_site_moves_by_its_exact_marginal(
    world: T.Enumeration, process: dd.Process, interval: tuple[float, float]
) -> None:
    """For L = 2: site by site the kernel is p(z_s^i | z_t), and the sites are independent given z_t."""
    t, s = interval
    size, p_t = process.states, world.marginal(process, t)
    reached = p_t > 0
    k = T.kernel(S.Ancestral(), process, world.denoiser(process, predicts="loo"), t=t, s=s)[reached]
    pair = joint_of_times(world, process, t, s).view(-1, size, size)[reached] / p_t[reached, None, None]
    first, second = pair.sum(2), pair.sum(1)
    torch.testing.assert_close(k, (first[:, :, None] * second[:, None]).flatten(1), atol=1e-10, rtol=0)


def joint_of_times(world: T.Enumeration, process: dd.Process, t: float, s: float) -> torch.Tensor:
    """p(z_t, z_s), (S**L, S**L), from the forward kernels."""
    p_s = world.marginal(process, s)
    forward = torch.ones(1, 1).double()
    for _ in range(world.length):
        forward = torch.kron(forward, process.kernel(t, s))
    return (p_s[:, None] * forward).T


@pytest.mark.usefixtures("as_user")  # shapes are checked elsewhere: many small enumerations
@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_kl_falls_fourfold_a_doubling(process: dd.Process) -> None:
    world = weak()
    kl = terminal_kl(world, world.denoiser(process, predicts="loo"), [4, 8, 16, 32])
    falls = [a / b for a, b in itertools.pairwise(kl)]
    assert all(3.4 <= fall <= 4.1 for fall in falls), falls


def terminal_kl(world: T.Enumeration, model: dd.Denoiser, steps: list[int]) -> list[float]:
    return [T.kl(world.p0, T.law(dd.Sampler(model.process, model, S.Ancestral(), steps=n))) for n in steps]


def test_a_mislabelled_denoiser_does_not_converge() -> None:
    world, process = weak(), dd.Uniform(3, dd.Linear())
    kl = terminal_kl(world, mislabelled(world, process), [4, 8, 16])
    assert kl[0] / kl[-1] < 1.3, kl  # the right one falls by 13 over these


def test_on_a_masked_process_the_two_coincide() -> None:
    world, process = weak(), dd.Masked(3, dd.Linear())
    hidden = states(4, 3)
    d, o = (world.denoiser(process, predicts=what)(hidden, 0.4).logits for what in ("denoiser", "loo"))
    where = hidden == process.mask_id
    torch.testing.assert_close(d[where], o[where], atol=1e-12, rtol=0)
    right = terminal_kl(world, world.denoiser(process, predicts="loo"), [4, 8])
    assert terminal_kl(world, mislabelled(world, process), [4, 8]) == pytest.approx(right, abs=1e-12)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", zoo(), ids=repr)
@pytest.mark.parametrize("world", [weak(), strong()], ids=["weak", "strong"])
def test_declared_order_is_the_measured_one(process: dd.Process, world: T.Enumeration) -> None:
    model, op = world.denoiser(process, predicts="loo"), S.Ancestral()
    slope = T.order([8, 16, 32], lambda n: dd.Sampler(process, model, op, steps=n), window=(0.95, 0.1))
    within(12, abs(slope - op.order), 0.1)
    if not process.absorbing:
        wrong = mislabelled(world, process)
        lost = T.order([4, 8, 16], lambda n: dd.Sampler(process, wrong, op, steps=n), window=(0.95, 0.1))
        caught(12, op.order - lost, 0.5)


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_one_step_gives_the_product_of_marginals(process: dd.Process) -> None:
    """With n = 1 nothing is known but the marginals: KL is the total correlation of p0."""
    world = strong()
    marginals = [world.p0.view(3, 3, 3).sum([j for j in range(3) if j != i]) for i in range(3)]
    product = torch.einsum("a,b,c->abc", *marginals).flatten()
    law = T.law(dd.Sampler(process, world.denoiser(process), S.Ancestral(), steps=1))
    torch.testing.assert_close(law, product, atol=1e-12, rtol=0)


@pytest.mark.parametrize("predicts", ["denoiser", "loo", "ratio"])
@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_every_prediction_gives_the_same_kernel(process: dd.Process, predicts: str) -> None:
    world = strong()
    k = T.kernel(S.Ancestral(), process, world.denoiser(process, predicts=predicts), t=0.6, s=0.2)
    expected = T.kernel(S.Ancestral(), process, world.denoiser(process, predicts="loo"), t=0.6, s=0.2)
    torch.testing.assert_close(k, expected, atol=1e-12, rtol=0)


def test_no_mask_survives_time_zero_and_tokens_stay() -> None:
    process = dd.Masked(3, dd.LogLinear())
    k = T.kernel(S.Ancestral(), process, weak().denoiser(process), t=0.3, s=0.0)
    z = states(4, 3)
    masks = (z == 3).any(-1)
    assert k[:, masks].abs().max() == 0
    start, end = k.nonzero(as_tuple=True)
    revealed = z[start] != 3
    assert (z[start][revealed] == z[end][revealed]).all()


def test_nothing_moves_between_equal_survivals() -> None:
    class Late(dd.Linear):
        def _alpha(self, t: torch.Tensor) -> torch.Tensor:
            return (2 * (1 - t)).clamp(0, 1)

    for process in (dd.Masked(3, Late()), dd.Uniform(3, Late())):
        model = weak().denoiser(process, predicts="loo")
        k = T.kernel(S.Ancestral(), process, model, t=0.4, s=0.2)  # alpha = 1 at both
        torch.testing.assert_close(k, torch.eye(len(k)).double(), atol=1e-14, rtol=0)
    assert np.isfinite(terminal_kl(weak(), model, [4])[0])


def test_the_oracle_joint_is_a_law() -> None:
    for process in zoo():
        total = joint(weak(), process, [0.3, 0.0, 0.9]).sum()
        assert float(total) == pytest.approx(1, abs=1e-12)
