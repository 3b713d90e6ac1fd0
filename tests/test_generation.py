"""``generate``: the tokens of the sampler behind ragged prompts, as users of transformers expect them."""

from pathlib import Path

import checkpoints
import pytest
import torch
from problems import strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [0, 0, 8, 9, 4], [5, 4, 7, 8, 9], [0, 0, 0, 0, 0], [0, 0, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])


@pytest.fixture
def model(tmp_path: Path) -> dd.Loaded:
    return load(checkpoints.llada(tmp_path / "llada").folder, quiet=True)


def alone(maker: dd.Sampler | dd.Blockwise, row: int, new: int) -> Tensor:
    """What the sampler says of a row by itself."""
    prompt = PROMPTS[row, MASK[row] == 1]
    return maker.sample(1, len(prompt) + new, seed=3, first_row=row, prompt=prompt[None]).tokens[0, len(prompt) :]


def test_rows_are_those_of_the_sampler_whatever_stands_beside_them(model: dd.Loaded) -> None:
    out = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, steps=3, seed=3)
    assert torch.equal(out[:, :5], PROMPTS)
    for row in range(5):
        assert torch.equal(out[row, 5:], alone(dd.Sampler(model.process, model, S.Ancestral(), steps=3), row, 6))
    assert len({tuple(row) for row in out[:, 5:].tolist()}) == 5  # the first prompt and the last are the same
    said = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, steps=3, seed=3, operator="ancestral")
    assert torch.equal(out, said)
    other = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, steps=3, seed=3, operator=S.ReMDM(eta=0.5))
    assert not torch.equal(out, other)


def test_blocks_are_those_of_blockwise(model: dd.Loaded) -> None:
    """Semi-autoregressive, from where the prompt ends; the sites after a block are shown as noise."""
    out = dd.generate(model, PROMPTS[2:3], max_new_tokens=6, block_length=4, seed=3)
    maker = dd.Blockwise(model.process, model, S.Ancestral(), block=[5, 4], steps=4, future=True)
    assert torch.equal(out[:, 5:], maker.sample(1, 11, seed=3, prompt=PROMPTS[2:3]).tokens[:, 5:])


def test_a_model_of_blocks_knows_its_own(tmp_path: Path) -> None:
    model = load(checkpoints.llada2(tmp_path / "blocks").folder, quiet=True)
    assert model.convention.block == 4
    out = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, seed=3)
    maker = dd.Blockwise(model.process, model, S.Ancestral(), block=4, steps=4)  # from multiples of its size
    for row in range(5):
        assert torch.equal(out[row, 5:], alone(maker, row, 6))


def test_rows_end_where_they_say_so() -> None:
    process = dd.Masked(3, dd.Linear())
    model = strong().denoiser(process)
    none = torch.zeros(400, 0, dtype=torch.int64)
    free = dd.generate(model, none, max_new_tokens=3, steps=3, seed=1)
    out = dd.generate(model, none, max_new_tokens=3, steps=3, seed=1, eos_token_id=[1], pad_token_id=7)
    for before, after in zip(free.tolist(), out.tolist(), strict=True):
        end = before.index(1) + 1 if 1 in before else 3
        assert after == before[:end] + [7] * (3 - end)
    assert bool((out == 7).any())


@pytest.mark.usefixtures("as_user")
def test_what_cannot_be_is_refused(model: dd.Loaded) -> None:
    with pytest.raises(ValueError, match="padded on the left"):
        dd.generate(model, PROMPTS, MASK.flip(1), max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        dd.generate(model, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"attention_mask must be \(5, 5\), got \(4, 5\)"):
        dd.generate(model, PROMPTS, MASK[:4], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"input_ids must be \(B, P\), a row for each prompt, got \(2,\)"):
        dd.generate(model, torch.tensor([4, 5]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.1048575, got 0"):
        dd.generate(model, PROMPTS, max_new_tokens=2, steps=0)
    with pytest.raises(ValueError, match="block_length must be at least 1, got 0"):
        dd.generate(model, PROMPTS, max_new_tokens=2, block_length=0)
    with pytest.raises(ValueError, match="generate: operator: cannot read 'nothing'"):
        dd.generate(model, PROMPTS, max_new_tokens=2, operator="nothing")
