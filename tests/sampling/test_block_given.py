"""Blockwise runs with given sites and first states, their trajectories, and parts of a batch."""

import itertools

import pytest
import torch
from blocks import (
    CACHED,
    FROZEN,
    HELD,
    MASKED,
    ORACLES,
    PROCESSES,
    PROMPTS,
    STEPS,
    UNIFORM,
    B,
    L,
    blocks_of,
    length,
    same,
)
from operators import accepted
from problems import named, strong
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.operator import State

# Hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")


# --- trajectories ---------------------------------------------------------------------------------------------------


def test_the_trajectory_of_one_block_is_the_plain_sampler() -> None:
    for process in PROCESSES:
        whole = dd.Sampler(process, CACHED[process], S.Ancestral(), steps=3).sample(3, L, seed=2, record=True)
        block = dd.Blockwise(process, CACHED[process], S.Ancestral(), block=L, steps=3)
        out = block.sample(3, L, seed=2, record=True)
        same(out, whole)
        assert torch.equal(out.trajectory, whole.trajectory)  # type: ignore[arg-type]
        assert vars(block.sample(3, L, seed=2, record=True))["trajectory"].dtype == torch.int16


def test_blocks_that_have_not_begun_are_minus_one() -> None:
    maker = dd.Blockwise(UNIFORM, CACHED[UNIFORM], S.Ancestral(), block=2, steps=3)
    out = maker.sample(3, 6, seed=0, record=True, prompt=torch.tensor([0, 0, 0, 0, 0, 2]), frozen=[False] * 5 + [True])
    assert out.trajectory is not None
    assert out.trajectory.shape == (10, 3, 6)
    begun = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 3, 3])[:, None] * 2 > torch.arange(6)
    begun[:, 5] = True  # given
    assert torch.equal(out.trajectory >= 0, begun[:, None].expand_as(out.trajectory))
    assert torch.equal(out.trajectory[3, :, :2], out.tokens[:, :2])
    assert torch.equal(out.trajectory[-1], out.tokens)


# --- given sites and first states -----------------------------------------------------------------------------------


class Stay(dd.Predictor):
    """Moves in time alone."""

    def __call__(self, state: State, at: dd.At) -> State:
        return state.at(state.tokens, at.s)


def test_blocks_begin_with_the_states_given() -> None:
    states = torch.randint(3, (B, L), generator=torch.Generator().manual_seed(0))
    for block in (1, 2, 3, {1: 0.5, 2: 0.5}):
        stay = dd.Blockwise(UNIFORM, CACHED[UNIFORM], Stay(), block=block, steps=2)
        assert torch.equal(stay.sample(initial=states, seed=0).tokens, states)
        assert not torch.equal(stay.sample(B, L, seed=0).tokens, states)
    for process in PROCESSES:
        noise = states if process is UNIFORM else torch.full((B, L), 3)
        whole = dd.Sampler(process, ORACLES[process], S.Ancestral(), steps=3)
        block = dd.Blockwise(process, ORACLES[process], S.Ancestral(), block=L, steps=3)
        assert torch.equal(block.sample(initial=noise, seed=1).tokens, whole.sample(initial=noise, seed=1).tokens)
    maker, asked = blocks_of("cached", MASKED, S.Ancestral())  # masks are the only first states
    assert torch.equal(maker.sample(**asked, initial=torch.full((B, L), 3)).tokens, maker.sample(**asked).tokens)  # type: ignore[arg-type]


class Careless(dd.Predictor):
    """Draws every site, given or not, from the global generator."""

    def __call__(self, state: State, at: dd.At) -> State:
        return state.at(torch.randint(3, state.tokens.shape), at.s)


def keeps(maker: dd.Blockwise, prompt: Tensor, frozen: Tensor) -> None:
    out, where = maker.sample(B, L, seed=3, prompt=prompt, frozen=frozen, stop=1), frozen.expand(B, L)
    assert torch.equal(out.tokens[where], prompt.expand(B, L)[where])
    mask = maker.inner.process.mask_id
    assert mask is None or not bool((out.tokens == mask).any())


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("operator", STEPS, ids=named)
def test_given_sites_keep_their_tokens(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    for frozen, prompt in ((FROZEN, HELD), (FROZEN[0], HELD[0])):
        for models, block in ((CACHED, 2), (ORACLES, {1: 0.5, 4: 0.5})):
            keeps(dd.Blockwise(process, models[process], operator, block=block, steps=2), prompt, frozen)


def test_an_operator_that_changes_given_sites_is_caught() -> None:
    maker = dd.Blockwise(UNIFORM, CACHED[UNIFORM], Careless(), block=2, steps=2)
    with pytest.raises(AssertionError):
        keeps(maker, HELD, FROZEN)


def test_given_first_sites_are_a_prompt() -> None:
    for setting in ("prompts", "cached", "window"):
        maker, asked = blocks_of(setting, UNIFORM, S.Ancestral() >> S.Gibbs())
        frozen = torch.arange(L) < torch.tensor([len(prompt) for prompt in PROMPTS])[:, None]
        tokens = torch.tensor([[*prompt, *[2] * (L - len(prompt))] for prompt in PROMPTS])
        other = maker.sample(**{**asked, "prompt": tokens, "frozen": frozen}, record=True)  # type: ignore[arg-type]
        assert other == maker.sample(**asked, record=True)  # type: ignore[arg-type]
        start = {**asked, "prompt": None, "frozen": frozen, "initial": tokens}
        again = maker.sample(**start)  # type: ignore[arg-type]
        assert torch.equal(again.tokens[frozen], tokens[frozen])


def test_a_given_block_takes_no_step() -> None:
    maker = dd.Blockwise(MASKED, CACHED[MASKED], S.Unmask(), block=2, steps=2)
    frozen, prompt = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 2, 2, 1, 0, 0])
    out = maker.sample(3, 8, seed=0, prompt=prompt, frozen=frozen, record=True)
    assert length(out) == out.nfe == 4
    greedy = dd.Blockwise(MASKED, CACHED[MASKED], S.Greedy(), block=2, steps=1)
    one = greedy.sample(3, 8, seed=0, prompt=prompt, frozen=frozen).tokens
    assert torch.equal(greedy.sample(3, 8, seed=0, prompt=one[:, :6]).tokens, one)
    every = maker.sample(3, 8, seed=0, prompt=prompt, frozen=torch.ones(8, dtype=torch.bool), record=True)
    assert (every.nfe, length(every)) == (0, 0)
    assert torch.equal(every.tokens, prompt.expand(3, 8))


def test_a_given_site_conditions_its_block(failure_rate: float) -> None:
    """p(x_1) p(x_2 | x_1, x_3): one site at a time, which is exact; the third site is given."""
    world, given = strong(), 1
    maker = dd.Blockwise(MASKED, world.denoiser(MASKED), S.Ancestral(), block=[1, 2], steps=1)
    out = maker.sample(20_000, 3, seed=4, prompt=[0, 0, given], frozen=[False, False, True])
    joint = world.p0.view(3, 3, 3)
    law = joint.sum((1, 2))[:, None] * joint[:, :, given] / joint[:, :, given].sum(1, keepdim=True)
    count = torch.bincount(out.tokens[:, 0] * 3 + out.tokens[:, 1], minlength=9)
    assert chisquare(count.numpy(), law.flatten().numpy() * 20_000).pvalue > failure_rate
    alone = joint.sum((1, 2))[:, None] * joint.sum(2) / joint.sum((1, 2))[:, None]
    assert chisquare(count.numpy(), alone.flatten().numpy() * 20_000).pvalue < failure_rate


def split(process: dd.Process, operator: dd.Operator, block: int | dict[int, float], size: int) -> None:
    """Compare 16 rows with parts of the batch."""
    frozen = torch.rand(16, L, generator=torch.Generator().manual_seed(1)) < 0.4
    frozen[::4] = frozen[1]
    prompt = torch.randint(3, (16, L), generator=torch.Generator().manual_seed(2))
    states = torch.randint(process.states, (16, L), generator=torch.Generator().manual_seed(3))
    maker = dd.Blockwise(process, CACHED[process], operator, block=block, steps=2)
    whole = maker.sample(16, L, seed=5, prompt=prompt, frozen=frozen, initial=states, stop=2, record=True)
    for row in range(0, 16, size):
        here = slice(row, min(row + size, 16))
        told = {"prompt": prompt[here], "frozen": frozen[here], "initial": states[here], "first_row": row}
        part = maker.sample(seed=5, stop=2, record=True, **told)  # type: ignore[arg-type]
        assert torch.equal(part.tokens, whole.tokens[here])
        assert torch.equal(part.lengths, whole.lengths[here])  # type: ignore[arg-type, index]
        torch.testing.assert_close(part.log_prob, whole.log_prob[here], rtol=1e-5, atol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_may_be_split(process: dd.Process, size: int) -> None:
    """Tokens, log-probabilities and lengths of 16 rows are those of parts of the batch."""
    for operator, block in itertools.product((S.Ancestral(), S.Unmask("margin"), S.Multistep()), (2, {1: 0.5, 3: 0.5})):
        if accepted(operator, process):
            split(process, operator, block, size)


def test_randomness_without_a_key_is_caught() -> None:
    with pytest.raises(AssertionError):
        split(UNIFORM, Careless(), 2, 3)
