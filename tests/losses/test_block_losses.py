"""Likelihoods and losses of blocks: exact for oracles, one pass for networks, mixtures in their shares."""

import itertools

import numpy as np
import pytest
import torch
from problems import block_network, strong
from torch import Tensor

import discdiff as dd
from discdiff.demo.transformer import Transformer
from discdiff.losses import base as losses
from discdiff.losses import blocks as block_losses

pytestmark = pytest.mark.usefixtures("as_user")
MASKED, UNIFORM, PAIRS = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear()), dd.AbsorbingUniform(3, dd.Linear())

BOUNDS = [(MASKED, losses.MaskedNELBO()), (UNIFORM, losses.UniformNELBO()), (PAIRS, losses.AbsorbingNELBO())]


@pytest.mark.parametrize(("process", "bound"), BOUNDS, ids=lambda x: repr(x))
@pytest.mark.parametrize("times", ["sequence", "block"])
@pytest.mark.parametrize("block", [1, 2])
def test_the_bound_of_blocks_is_exact_for_an_oracle(
    process: dd.Process, bound: losses.Objective, times: str, block: int, failure_rate: float
) -> None:
    """In the mean over x0: E[NELBO] is the entropy; a bound of another law's data is not."""
    world = strong()
    x0 = torch.cartesian_prod(*[torch.arange(3)] * 3)[torch.multinomial(world.p0, 20_000, True)]
    value = block_losses.Blocks(bound, block, times)(world.denoiser(process), x0)  # type: ignore[arg-type]
    excess = value + world.p0.log()[(x0 * torch.tensor([9, 3, 1])).sum(-1)]
    z = float(excess.mean() / (excess.std() / len(excess) ** 0.5).clamp(min=1e-12))
    limit = -float(np.sqrt(2)) * float(torch.erfinv(torch.tensor(failure_rate - 1.0, dtype=torch.float64)))
    assert abs(float(excess.mean())) < 1e-9 if block == 1 else abs(z) < limit
    assert float((value.mean() + world.p0.flip(0).log()[(x0 * torch.tensor([9, 3, 1])).sum(-1)].mean()).abs()) > 0.05


def test_the_network_pass_is_the_sum_of_its_blocks() -> None:
    """``Behind`` in one pass and block by block, for a network that has both."""
    model = block_network(UNIFORM)
    x0, x_t = torch.randint(3, (2, 3, 10), generator=torch.Generator().manual_seed(0))
    t = torch.full((1, 1), 0.4, dtype=torch.float64)
    whole = model.given(block_losses.Behind(x0, 4)).evaluate(x_t, t).logits
    for begin, end in itertools.pairwise([0, 4, 8, 10]):
        net = model.fn
        assert isinstance(net, Transformer)
        cache = net.prefill(x0[:, :begin], torch.full((3,), begin), 10)
        assert (net.evaluate(cache, x_t[:, begin:end], torch.full((3,), 0.6)) - whole[:, begin:end]).abs().max() < 1e-5


def test_mixture_bounds_are_ordered_and_the_optimism_is_what_is_missing() -> None:
    """log-sum-exp of few draws is too small in the mean, by about what is said."""
    world, process = strong(), UNIFORM
    model = world.denoiser(process)
    mixture = block_losses.BlockMixture(losses.UniformNELBO(), {1: 0.5, 3: 0.5})
    x0 = torch.cartesian_prod(*[torch.arange(3)] * 3)
    found = [mixture.likelihood(model, x0, draws=16, seed=seed) for seed in range(120)]
    exact = -world.p0.log()  # both block sizes are exact
    few = torch.stack([one.log_sum_exp for one in found])
    missing, said = (exact - few).mean(0), torch.stack([one.optimism for one in found]).mean(0)
    error = few.std(0) / len(found) ** 0.5
    assert (missing > 5 * error).float().mean() > 0.7  # optimistic, and seen to be
    assert ((missing - said).abs() < 0.35 * missing + 5 * error).all()
    one = found[0]
    assert (one.log_sum_exp <= one.jensen.value + 1e-9).all()
    assert set(one.components) == {1, 3}


def test_a_mixture_trains_each_size_in_its_share() -> None:
    seen: list[int] = []

    class Spy(losses.Objective):
        def at(self, model: dd.Denoiser, x0: Tensor, u: Tensor) -> Tensor:
            assert isinstance(model.context, block_losses.Behind)
            seen.extend([model.context.block] * len(x0))
            return torch.zeros(len(x0), dtype=torch.float64)

    block_losses.BlockMixture(Spy(), {2: 0.25, 3: 0.75})(strong().denoiser(UNIFORM), torch.zeros(64, 3).long())
    assert seen.count(2) == 16
    assert seen.count(3) == 48
