"""A decoder of transformers' in blocks: ragged prefixes that it keeps, against the whole sequence in one pass."""

import json
from pathlib import Path

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
def model(tmp_path_factory: pytest.TempPathFactory) -> dd.adapters.Loaded:
    return load(checkpoints.llada2(tmp_path_factory.mktemp("llada2") / "hub").folder, quiet=True)


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(4, 36, shape, generator=torch.Generator().manual_seed(seed))


def test_all_blocks_in_one_pass_are_the_blocks_one_by_one(model: dd.adapters.Loaded) -> None:
    net, x0, x = model.network, tokens(0, 2, L), tokens(1, 2, L)
    assert isinstance(net, BlockCausal)
    whole = net.blocks_at_once(x0, x, None, BLOCK)
    for begin in range(0, L, BLOCK):
        here = slice(begin, begin + BLOCK)
        alone = net(torch.cat([x0[:, :begin], x[:, here]], 1))[:, here]
        assert float((whole[:, here] - alone).abs().max()) < 1e-5
    assert float((whole - net(x)).abs().max()) > 1e-2  # behind noisy ones, the planted fault


def test_ragged_prefixes_say_what_each_says_alone(model: dd.adapters.Loaded) -> None:
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


def test_generation_is_the_same_with_and_without_what_is_kept(model: dd.adapters.Loaded) -> None:
    prompts = [[5, 6, 7, 8, 9], [5], [4, 4, 4, 4]]
    shown = model.calling(lambda x, time: model.fn(x, time))
    kept, again = (
        dd.Blockwise(model.process, one, S.Ancestral(), block=BLOCK, steps=3).sample(3, L, seed=1, prompt=prompts)
        for one in (model, shown)
    )
    assert torch.equal(kept.tokens, again.tokens)
    assert kept.queries < again.queries


# --- any decoder, asked to be causal between blocks -------------------------------------------------------------------

DECODERS = ["LLaDA", "LLaDA-MoE", "Dream", "DiffuGPT", "DiffuLLaMA", "A2D-Llama", "A2D-Qwen2", "A2D-Qwen3"]


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_can_be_asked_for_blocks(family: str, tmp_path: Path) -> None:
    """Whole, from what is kept behind ragged prefixes, and all blocks at once: the same, and causal between blocks."""
    folder = checkpoints.NATIVE[family](tmp_path / "checkpoint").folder
    plain, model = load(folder, quiet=True), load(folder, block=BLOCK, quiet=True)
    net = model.network
    assert isinstance(net, BlockCausal)
    assert (model.convention.block, model.call.shift, net.shift) == (BLOCK, False, plain.call.shift)
    x0, x = tokens(0, 2, L), tokens(1, 2, L)
    later = torch.arange(L) // BLOCK > (torch.arange(L) // BLOCK)[:, None]
    mask = torch.zeros(L, L).masked_fill(later, torch.finfo(torch.float32).min)[None, None]
    own = plain.network(input_ids=x, attention_mask=mask).logits
    own = torch.cat([own[:, :1], own[:, :-1]], 1) if plain.call.shift else own
    assert float((net(x) - own).abs().max()) < 1e-5
    whole = net.blocks_at_once(x0, x, None, BLOCK)
    memory = net.prefill(x0, torch.tensor([8, 0]), L)
    for row, begin in ((0, 8), (1, 0)):
        here = slice(begin, begin + BLOCK)
        alone = net(torch.cat([x0[row : row + 1, :begin], x[row : row + 1, here]], 1))[0, here]
        assert float((whole[row, here] - alone).abs().max()) < 1e-5
        for _ in range(2):
            said = net.evaluate(memory, x[:, 8:12] if row == 0 else x[:, :4], None)[row]
            assert float((said - alone).abs().max()) < 1e-5
    block = x0[:, 8:12]
    net.extend(memory, block)
    for part, rows in ((memory.select(torch.tensor([1, 0])), [1, 0]), (memory, [0, 1])):
        said = net.evaluate(part, x[rows, 12:16], None)
        for place, row in enumerate(rows):
            behind = torch.cat([x0[row, : (8, 0)[row]], block[row], x[row, 12:16]])[None]
            assert float((said[place] - net(behind)[0, -BLOCK:]).abs().max()) < 1e-5
    out = dd.Blockwise(model.process, model, S.Ancestral(), block=BLOCK, steps=2).sample(2, 8, seed=0, prompt=[5, 6])
    shown = model.calling(lambda z, time: model.fn(z, time))
    again = dd.Blockwise(model.process, shown, S.Ancestral(), block=BLOCK, steps=2).sample(2, 8, seed=0, prompt=[5, 6])
    assert torch.equal(out.tokens, again.tokens)


def test_blocks_of_what_is_no_decoder_are_refused(tmp_path: Path) -> None:
    for family in ("BERT", "ESM-2", "ModernBERT"):
        folder = checkpoints.NATIVE[family](tmp_path / family).folder
        with pytest.raises(ValueError, match=r"block=4 is for decoders; \w+ForMaskedLM sees every token"):
            load(folder, block=4, quiet=True)


def test_a_block_size_that_a_family_does_not_read_is_asked_for(tmp_path: Path) -> None:
    folder = checkpoints.dream(tmp_path / "checkpoint").folder
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_size": 4}))
    with pytest.raises(ValueError, match=r"block_size=4 makes attention causal between blocks, .* pass block=4"):
        load(folder, quiet=True)
    assert load(folder, block=4, quiet=True).convention.block == 4


def test_a_table_of_positions_ends_in_blocks_too(tmp_path: Path) -> None:
    model = load(checkpoints.diffugpt(tmp_path / "checkpoint").folder, block=BLOCK, quiet=True)
    net = model.network
    assert isinstance(net, BlockCausal)
    memory = net.prefill(tokens(0, 1, 64), torch.tensor([62]), 64)
    net.evaluate(memory, tokens(1, 1, 2), None)
    with pytest.raises(ValueError, match="takes at most 64 tokens, got 65"):
        net.evaluate(memory, tokens(1, 1, 3), None)
    with pytest.raises(ValueError, match="takes at most 64 tokens, got 65"):
        net(tokens(1, 1, 65))
