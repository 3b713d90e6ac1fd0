"""Planted faults for the identities whose two sides are independent formulas: each check must see its wrong object.

On the fixed, correlated laws of the zoo; the distances are listed in docs/identities.md.
"""

import pytest
import torch
from ledger import caught
from pinned import posterior_rates
from problems import families, irreversible, mislabelled, states, strong

import discdiff as dd
from discdiff import theory as T

NOISY = families(3)[1:4]  # Uniform, Marginal, Hybrid: the leave-one-out and the denoiser differ


def test_2_an_exponential_at_another_time_is_caught() -> None:
    q = irreversible(3)
    right, late = dd.General(q, dd.Linear()), dd.General(q, dd.Polynomial(1.05))
    caught(2, float((right.kernel(0.5) - late.kernel(0.5)).abs().max()))


@pytest.mark.parametrize("process", [families(3)[k] for k in (2, 3, 5, 6)], ids=str)  # not those that are symmetric
def test_4_the_transposed_generator_is_caught(process: dd.Process) -> None:
    """Kolmogorov's equation with rates from and to exchanged, as a column convention would read them."""
    a, h = float(process.schedule.alpha(0.5)), 1e-4
    slope = (process.transition(a * (1 - h), 1.0) - process.transition(a * (1 + h), 1.0)) / (2 * h)
    kernel, rates = process.transition(a, 1.0), process.generator(a)
    assert float((slope - kernel @ rates).abs().max()) < 1e-6
    caught(4, float((slope - kernel @ rates.T).abs().max()))


@pytest.mark.parametrize("process", NOISY, ids=str)
def test_5_rates_from_a_mislabelled_denoiser_are_caught(process: dd.Process) -> None:
    world, t = strong(), 0.5
    p, forward = world.marginal(process, t), T.reversal.joint_generator(process, 3, float(process.schedule.alpha(t)))
    wrong = T.model_generator(mislabelled(world, process), t)
    caught(5, float((p @ wrong + p @ forward).abs().max()))


@pytest.mark.parametrize("process", NOISY, ids=str)
def test_6_pinned_rates_under_the_loo_are_caught(process: dd.Process) -> None:
    """R is the mean of pinned rates under D; under O it is not."""
    world, t = strong(), 0.5
    a, z = float(process.schedule.alpha(t)), states(process.states, 3)
    prediction = world.denoiser(process, predicts="loo")(z, t)
    pinned = torch.stack([posterior_rates(process, v, a) for v in process.data_tokens.tolist()])
    for log_belief, right in ((prediction.denoiser, True), (prediction.loo, False)):
        belief = log_belief.exp()[:, 0]
        mean = torch.einsum("nx,xnv->nv", belief, pinned[:, z[:, 0]])
        mean = mean.scatter(-1, z[:, :1], 0.0)
        error = float((mean - prediction.rates[:, 0] / a).abs().max())
        if right:
            assert error < 1e-10
        else:
            caught(6, error)


@pytest.mark.parametrize("process", NOISY, ids=str)
def test_7_a_denoiser_said_to_be_the_loo_is_caught(process: dd.Process) -> None:
    z = states(process.states, 3)
    right, wrong = strong().denoiser(process, predicts="loo")(z, 0.5), mislabelled(strong(), process)(z, 0.5)
    caught(7, float((right.ratio - wrong.ratio).abs().max()), 0.05)
    caught(7, float((right.denoiser.exp() - wrong.denoiser.exp()).abs().max()), 0.05)
