"""A decoder of transformers' in blocks: ragged prefixes that it keeps, against the whole sequence in one pass."""

import checkpoints
import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load
from discdiff.adapters.block_causal import BlockCausal

L, BLOCK = 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dd.Loaded:
    return load(checkpoints.llada2(tmp_path_factory.mktemp("llada2") / "hub").folder, quiet=True)


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(4, 36, shape, generator=torch.Generator().manual_seed(seed))


def test_all_blocks_in_one_pass_are_the_blocks_one_by_one(model: dd.Loaded) -> None:
    net, x0, x = model.network, tokens(0, 2, L), tokens(1, 2, L)
    assert isinstance(net, BlockCausal)
    whole = net.blocks_at_once(x0, x, None, BLOCK)
    for begin in range(0, L, BLOCK):
        here = slice(begin, begin + BLOCK)
        alone = net(torch.cat([x0[:, :begin], x[:, here]], 1))[:, here]
        assert float((whole[:, here] - alone).abs().max()) < 1e-5
    assert float((whole - net(x)).abs().max()) > 1e-2  # behind noisy ones, the planted fault


def test_ragged_prefixes_say_what_each_says_alone(model: dd.Loaded) -> None:
    net, shown, length = model.network, tokens(2, 3, 8), torch.tensor([8, 4, 0])
    assert isinstance(net, BlockCausal)
    noisy, block, after = tokens(3, 3, BLOCK), tokens(4, 3, BLOCK), tokens(5, 3, BLOCK)
    memory, some = net.prefill(shown, length, L), torch.tensor([2, 0, 2])

    def alone(row: int, *behind: Tensor) -> Tensor:
        parts = [shown[row : row + 1, : length[row]], *(part[row : row + 1] for part in behind)]
        return net(torch.cat(parts, 1))[0, -BLOCK:]

    for _ in range(2):  # a call leaves nothing behind
        said = net.evaluate(memory, noisy, None)
        assert max(float((said[row] - alone(row, noisy)).abs().max()) for row in range(3)) < 1e-5
    net.extend(memory, block)
    for part, rows in ((memory.select(some), some), (memory, torch.arange(3)), (memory, torch.arange(3))):
        said = net.evaluate(part, after[rows], None)
        for place, row in enumerate(rows.tolist()):
            assert float((said[place] - alone(row, block, after)).abs().max()) < 1e-5
    forgotten = net.prefill(shown, torch.full((3,), 8), L)  # the planted fault: lengths forgotten
    assert float((net.evaluate(forgotten, noisy, None)[1] - alone(1, noisy)).abs().max()) > 1e-3


def test_generation_is_the_same_with_and_without_what_is_kept(model: dd.Loaded) -> None:
    prompts = [[5, 6, 7, 8, 9], [5], [4, 4, 4, 4]]
    shown = model.calling(lambda x, time: model.fn(x, time))
    kept, again = (
        dd.Blockwise(model.process, one, S.Ancestral(), block=BLOCK, steps=3).sample(3, L, seed=1, prompt=prompts)
        for one in (model, shown)
    )
    assert torch.equal(kept.tokens, again.tokens)
    assert kept.queries < again.queries
