"""``generate``: the tokens of the sampler behind ragged prompts, as users of transformers expect them."""

import inspect
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from framed import Network, convention
from problems import strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [0, 0, 8, 9, 4], [5, 4, 7, 8, 9], [0, 0, 0, 0, 0], [0, 0, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])


@pytest.fixture
def model(tmp_path: Path) -> dd.adapters.Loaded:
    return load(checkpoints.llada(tmp_path / "llada").folder, quiet=True)


def alone(maker: dd.Sampler | dd.Blockwise, row: int, new: int) -> Tensor:
    """What the sampler says of a row by itself."""
    prompt = PROMPTS[row, MASK[row] == 1]
    return maker.sample(1, len(prompt) + new, seed=3, first_row=row, prompt=prompt[None]).tokens[0, len(prompt) :]


def test_rows_are_those_of_the_sampler_whatever_stands_beside_them(model: dd.adapters.Loaded) -> None:
    out = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, steps=3, seed=3)
    assert torch.equal(out[:, :5], PROMPTS)
    for row in range(5):
        assert torch.equal(out[row, 5:], alone(dd.Sampler(model.process, model, S.Ancestral(), steps=3), row, 6))
    assert len({tuple(row) for row in out[:, 5:].tolist()}) == 5  # the first prompt and the last are the same
    said = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, steps=3, seed=3, operator="ancestral")
    assert torch.equal(out, said)
    other = dd.generate(model, PROMPTS, MASK, max_new_tokens=6, steps=3, seed=3, operator=S.ReMDM(eta=0.5))
    assert not torch.equal(out, other)


def test_blocks_are_those_of_blockwise(model: dd.adapters.Loaded) -> None:
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
def test_what_cannot_be_is_refused(model: dd.adapters.Loaded) -> None:
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


# --- what tokenizers give ---------------------------------------------------------------------------------------------


def bert_tokenizer(path: Path) -> Any:  # noqa: ANN401
    """transformers' own, of seven words; 5 takes the vocabulary under another name than 4.57."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (path / "vocab.txt").write_text("\n".join(words))
    named = "vocab" in inspect.signature(BertTokenizerFast.__init__).parameters
    return BertTokenizerFast(**{"vocab" if named else "vocab_file": str(path / "vocab.txt")})


def embedding(process: dd.Process) -> dd.Denoiser:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    return dd.Denoiser(lambda x, _: table[x], process, "denoiser", time=None)


@pytest.mark.usefixtures("as_user")
def test_what_a_tokenizer_gives_is_taken_as_it_is(tmp_path: Path) -> None:
    words = bert_tokenizer(tmp_path)
    model = embedding(dd.Masked(7, dd.Linear(), mask_id=4))
    texts = ["hello world", "hello"]
    more = dict.fromkeys(("return_special_tokens_mask", "return_offsets_mapping", "return_length"), True)
    asked = words(texts, padding=True, padding_side="left", return_tensors="pt", **more)
    assert set(asked) == {
        "input_ids", "token_type_ids", "attention_mask", "special_tokens_mask", "offset_mapping", "length",
    }  # fmt: skip
    out = dd.generate(model, **asked, max_new_tokens=3, seed=0)
    assert out.shape == (2, 7)
    alone = dd.generate(model, asked["input_ids"], asked["attention_mask"], max_new_tokens=3, seed=0)
    assert torch.equal(out, alone)
    for kind in ("np", None):  # arrays, and lists
        asked = words(texts, padding=True, padding_side="left", return_tensors=kind)
        assert torch.equal(out, dd.generate(model, **asked, max_new_tokens=3, seed=0))
    with pytest.raises(ValueError, match=r"input_ids must be rows of one length: tokenizer\(\.\.\., padding=True"):
        dd.generate(model, **words(texts), max_new_tokens=3, seed=0)


def test_what_would_change_the_meaning_is_refused_by_name(tmp_path: Path) -> None:
    words = bert_tokenizer(tmp_path)
    model = embedding(dd.Masked(7, dd.Linear(), mask_id=4))
    with pytest.raises(ValueError, match="token_type_ids must be 0 everywhere: the network is shown one segment"):
        dd.generate(model, **words([("hello", "world")], return_tensors="pt"), max_new_tokens=2, seed=0)
    cut = words(
        ["hello world hello world"], max_length=4, truncation=True, return_overflowing_tokens=True, return_tensors="pt"
    )
    with pytest.raises(ValueError, match=r"overflow_to_sample_mapping must be 0\.\.\d, a row for each text, got \[0"):
        dd.generate(model, **cut, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="attention_mask must hold 1, and 0 for padding, got 2"):
        dd.generate(model, PROMPTS % 4, MASK * 2, max_new_tokens=2, seed=0)
    with pytest.raises(TypeError, match="position_ids"):
        dd.generate(model, PROMPTS % 4, position_ids=PROMPTS, max_new_tokens=2, seed=0)  # type: ignore[call-arg]


IDS = [[1, 2], [0, 2]]


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": IDS},
        {"input_ids": np.array(IDS, dtype=np.int32)},
        {"input_ids": torch.tensor(IDS, dtype=torch.int32)},
        {"attention_mask": torch.ones(2, 2, dtype=torch.bool)},
        {"attention_mask": np.ones((2, 2), dtype=bool)},
        {"attention_mask": [[1, 1], [1, 1]]},
        {"attention_mask": torch.ones(2, 2)},
        {"eos_token_id": torch.tensor([6])},
        {"eos_token_id": torch.tensor(6)},
        {"eos_token_id": np.int64(6)},
        {"eos_token_id": [6], "pad_token_id": np.int64(6)},
        {"eos_token_id": (6,), "pad_token_id": torch.tensor(6)},
        {"token_type_ids": [[0, 0], [0, 0]], "num_truncated_tokens": [0, 0], "overflowing_tokens": [[], []]},
        {"overflow_to_sample_mapping": torch.arange(2)},
    ],
    ids=repr,
)
@pytest.mark.usefixtures("as_user")
def test_ids_and_masks_come_in_any_form(given: dict[str, Any]) -> None:
    model = embedding(dd.Masked(7, dd.Linear(), mask_id=4))
    plain = {"input_ids": torch.tensor(IDS), "eos_token_id": 6, "max_new_tokens": 6, "seed": 0}
    out = dd.generate(model, **plain)
    assert torch.equal(out, dd.generate(model, **(plain | given)))
    free = dd.generate(model, **(plain | {"eos_token_id": None, "pad_token_id": None}))
    assert not torch.equal(out, free)
    assert bool((free == 6).any())


# --- models with start and end tokens ---------------------------------------------------------------------------------


@pytest.fixture
def framed() -> dd.adapters.Loaded:
    return convention().denoiser(Network())


def test_prompts_between_the_ends_come_back_between_them(framed: dd.adapters.Loaded) -> None:
    """The end moves behind the new tokens; padding before the start stays where it is."""
    asked = torch.tensor([[0, 5, 1, 6], [0, 5, 2, 6], [5, 1, 2, 6], [0, 0, 5, 6]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    out = dd.generate(framed, asked, mask, max_new_tokens=3, steps=2, seed=3)
    assert torch.equal(out[:, :3], asked[:, :3])
    assert out[:, -1].tolist() == [6] * 4
    for row in range(4):
        inner = asked[row, mask[row] == 1][1:-1]
        sampler = dd.Sampler(framed.process, framed, S.Ancestral(), steps=2)
        own = sampler.sample(1, len(inner) + 3, seed=3, first_row=row, prompt=inner[None])
        start = int((mask[row] == 0).sum())
        assert out[row, start:].tolist() == own.framed()[0].tolist()
    blocks = dd.generate(framed, asked[:1], mask[:1], max_new_tokens=3, block_length=2, seed=3)
    assert blocks[0, [0, 1, 2, -1]].tolist() == [0, 5, 1, 6]
    bare = dd.generate(framed, asked[:2, 2:3], max_new_tokens=3, steps=2, seed=3)
    assert torch.equal(bare, out[:2, 2:-1])  # without the ends they come back without them


def test_rows_of_a_model_with_ends_end_before_its_end(framed: dd.adapters.Loaded) -> None:
    asked = torch.tensor([[5, 6]]).expand(60, 2)
    out = dd.generate(framed, asked, max_new_tokens=4, steps=4, seed=0, eos_token_id=[3, 6], pad_token_id=0)
    free = dd.generate(framed, asked, max_new_tokens=4, steps=4, seed=0)
    assert bool((free == 3).any())
    for before, after in zip(free.tolist(), out.tolist(), strict=True):
        kept = before[: before.index(3) + 1] if 3 in before else before[:-1]
        assert after == [*kept, *[0] * (5 - len(kept)), 6]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([[5, 1, 6], [1, 2, 3]], "row 1 does not begin so"),
        ([[5, 1, 6], [5, 2, 3]], "row 1 does not end so"),
        ([[5, 1, 2]], "row 0 does not end so"),
        ([[5]], "row 0 does not end so"),
    ],
)
def test_prompts_with_some_of_the_ends_are_refused(
    asked: list[list[int]], message: str, framed: dd.adapters.Loaded
) -> None:
    said = f"every prompt must stand between the start token 5 and the end token 6, .* or none may; {message}"
    with pytest.raises(ValueError, match=said):
        dd.generate(framed, asked, max_new_tokens=2, seed=0)
