"""``generate``: the call that users of transformers know, around a sampler."""

import itertools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.blockwise import Blockwise
from discdiff.checks import affordable, array, seeded, several, token_ids, whole
from discdiff.convention import Loaded
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.handlers import alone, under, while_listening
from discdiff.operator import Operator, check_operator
from discdiff.sampler import Sampler

__all__ = ["generate"]


@while_listening(alone)
def generate(
    model: Denoiser,
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"] | None = None,
    *,
    max_new_tokens: SupportsIndex,
    operator: Operator | str = "ancestral",
    steps: SupportsIndex | None = None,
    block_length: SupportsIndex | None = None,
    eos_token_id: SupportsIndex | Sequence[int] | None = (),
    pad_token_id: SupportsIndex | None = None,
    seed: SupportsIndex | None = None,
    listen: bool = False,
) -> Int[Tensor, "B N"]:
    """Prompts and what a model says behind them, as ``generate`` of transformers returns it: (B, P + new) tokens.

    ``generate(model, **tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"), max_new_tokens=64)``;
    new tokens are ``[:, P:]``. They are those of ``Sampler``, or ``Blockwise``, with the same seed: a function of
    (seed, row), whatever the other rows are. Rows of one length that follow each other are denoised together.

    Args:
        model: a denoiser; one from ``load`` knows its own blocks.
        input_ids: (B, P) prompts, padded on the left.
        attention_mask: (B, P) 0 for padding.
        max_new_tokens: how many tokens to add to each prompt.
        operator: what a step does, or an expression such as "ancestral >> gibbs(sites=2)".
        steps: how many, in each block; as many as there are sites by default.
        block_length: denoise so many new tokens at a time, the ones after them shown as noise (semi-autoregressive); of
            a model that was trained in blocks, its own block size.
        eos_token_id: tokens that end a row; behind them it is padded.
        pad_token_id: with what; the end token itself by default.
        seed: 64-bit key of the randomness; drawn from torch's global generator if None.
        listen: make every choice a Pyro site, as of ``Sampler.sample``. Those of rows that are denoised together are
            under the first of them, "row3/1.0.where".

    Raises:
        ValueError: for padding on the right, or what the sampler refuses.
    """
    check_denoiser(model, "generate")
    input_ids = token_ids(input_ids, "generate: input_ids", "token ids").to(torch.int64)
    if input_ids.ndim != 2 or len(input_ids) < 1:
        raise ValueError(f"generate: input_ids must be (B, P), a row for each prompt, got {tuple(input_ids.shape)}")
    length, width = _lengths(input_ids, attention_mask), input_ids.shape[1]
    max_new_tokens = whole(max_new_tokens, "generate: max_new_tokens", 1)
    last = model.process.vocab_size - 1
    eos = () if eos_token_id is None else several(eos_token_id, "generate: eos_token_id", 0, last)
    pad_token_id = None if pad_token_id is None else whole(pad_token_id, "generate: pad_token_id", 0)
    block_length = None if block_length is None else whole(block_length, "generate: block_length", 1)
    affordable(len(input_ids) * (width + max_new_tokens), f"generate: {len(input_ids)} rows of new tokens")
    if isinstance(operator, str):
        from discdiff.expression import parse_operator

        operator = parse_operator(operator, "generate: operator")
    check_operator(operator, "generate: operator")
    seed = seeded(seed, "generate: seed")
    out = torch.nn.functional.pad(input_ids, (0, max_new_tokens))
    row = 0
    for size, run in itertools.groupby(length):
        batch = len(list(run))
        here = slice(row, row + batch)
        prompt = input_ids[here, width - size :]
        maker = _maker(model, operator, size, max_new_tokens, steps, block_length)
        told: dict[str, Any] = {"prompt": prompt, "seed": seed, "first_row": row, "listen": listen}
        told["device"] = input_ids.device
        if isinstance(maker, Blockwise):
            told["stop"] = eos  # what has ended costs nothing more
        with under(f"row{row}", listen):
            out[here, width:] = maker.sample(batch, size + max_new_tokens, **told).tokens[:, size:]
        row += batch
    ends = torch.tensor(eos, dtype=torch.int64)
    if len(ends):
        new = out[:, width:]
        ended = torch.isin(new, ends.to(out.device)).long()
        behind = ended.cumsum(1) - ended > 0
        out[:, width:] = torch.where(behind, int(ends[0]) if pad_token_id is None else pad_token_id, new)
    return out


def _lengths(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Tokens of each prompt."""
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    attention_mask = array(attention_mask, "generate: attention_mask")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if bool((attention_mask.long().diff(dim=1) < 0).any()):
        raise ValueError("generate: prompts must be padded on the left: tokenizer(..., padding_side='left')")
    return [int(n) for n in attention_mask.long().sum(1)]


def _maker(
    model: Denoiser, operator: Operator, prompt: int, new: int, steps: SupportsIndex | None, block_length: int | None
) -> Sampler | Blockwise:
    said = model.convention if isinstance(model, Loaded) else None
    trained = None if said is None else said.block
    block = trained if block_length is None else block_length
    if block is None:
        return Sampler(model.process, model, operator, steps=new if steps is None else steps)
    sizes = block if prompt == 0 or (said is not None and trained is not None and said.aligned) else [prompt, block]
    steps = block if steps is None else steps
    return Blockwise(model.process, model, operator, block=sizes, steps=steps, future=trained is None)
