"""Sample by a function with the interface of transformers' ``generate``."""

import itertools
from collections.abc import Sequence, Sized
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.adapters.convention import Loaded
from discdiff.checks import affordable, array, seeded, several, token_ids, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.operator import Operator, alone, check_operator, under, while_listening
from discdiff.sampling import Blockwise, Sampler

__all__ = ["generate"]

_LEFT = "padding_side='left')"


@while_listening(alone)
def generate(
    model: Denoiser,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: SupportsIndex,
    operator: Operator | str = "ancestral",
    steps: SupportsIndex | None = None,
    block_length: SupportsIndex | None = None,
    eos_token_id: SupportsIndex | Sequence[int] | None = (),
    pad_token_id: SupportsIndex | None = None,
    seed: SupportsIndex | None = None,
    listen: bool = False,
    token_type_ids: object = None,
    overflow_to_sample_mapping: object = None,
    special_tokens_mask: object = None,
    offset_mapping: object = None,
    length: object = None,
    overflowing_tokens: object = None,
    num_truncated_tokens: object = None,
) -> Int[Tensor, "B N"]:
    """Continue prompts with a model, as transformers' ``generate`` does.

    The result is tokens (B, N) with N = P + ``max_new_tokens``. A call looks like this:
    ``generate(model, **tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"), max_new_tokens=64)``.
    The new tokens are ``[:, P:]``. ``Sampler``, or ``Blockwise`` in blocks, draws the same ones with the same seed. The
    tokens of a row depend on (seed, row) and not on the other rows. Consecutive rows of equal length are denoised
    together.

    A model that was trained between a start and an end token (``Convention.frame``) takes prompts that begin
    and end with these two, as its tokenizer makes them. New tokens go between the prompt and the end token: they are
    ``[:, P - 1 : -1]``, and the end token stays the last of every row. If prompts lack both tokens, the result lacks
    them too.

    Args:
        model: a denoiser; one from ``load`` knows its block size.
        input_ids: (B, P) prompts, padded on the left: a tensor, an array or rows of one length.
        attention_mask: (B, P) 0 for padding and 1 elsewhere, or bools.
        max_new_tokens: how many tokens to add to each prompt.
        operator: one step of the sampler, or an expression such as "ancestral >> gibbs(sites=2)".
        steps: the number of steps for all new tokens, or for each block if there are blocks. By default it is the
            number of tokens that are denoised at a time.
        block_length: the number of new tokens to denoise at a time. By default it is the block size that the model was
            trained with; a model that was not trained in blocks denoises all new tokens at once. If it gets a
            ``block_length``, it sees noise at the positions after the block (semi-autoregressive).
        eos_token_id: end tokens; a row ends at its first new end token, and the rest of the row is padded.
        pad_token_id: the padding token; by default the first one of ``eos_token_id``.
        seed: 64-bit key of the randomness; drawn from torch's global generator if None.
        listen: make every choice a Pyro site, as in ``Sampler.sample``. If rows are denoised together, the sites are
            named after the first of these rows, as in "row3/1.0.where".
        token_type_ids: an output of some tokenizers; must be 0, as the network takes no second segment.
        overflow_to_sample_mapping: an output of some tokenizers; must be 0 ... B - 1, that is one row for each text.
        special_tokens_mask, offset_mapping, length, overflowing_tokens, num_truncated_tokens: outputs of some
            tokenizers; ignored.

    Raises:
        TypeError, ValueError: if prompts are padded on the right, only some prompts have the start and end token, or
            the sampler refuses an argument.
    """
    check_denoiser(model, "generate")
    if isinstance(input_ids, Sequence) and len({len(row) for row in input_ids if isinstance(row, Sized)}) > 1:
        raise ValueError("generate: input_ids must be rows of one length: tokenizer(..., padding=True, " + _LEFT)
    input_ids = token_ids(input_ids, "generate: input_ids", "token ids").to(torch.int64)
    if input_ids.ndim != 2 or len(input_ids) < 1:
        raise ValueError(f"generate: input_ids must be (B, P), a row for each prompt, got {tuple(input_ids.shape)}")
    _check_segments(token_type_ids, overflow_to_sample_mapping, len(input_ids))
    lengths, width = _lengths(input_ids, attention_mask), input_ids.shape[1]
    edge = _edge(model, input_ids, lengths)  # 1 if prompts are between the ends
    max_new_tokens = whole(max_new_tokens, "generate: max_new_tokens", 1)
    last = model.process.vocab_size - 1
    eos = () if eos_token_id is None else several(eos_token_id, "generate: eos_token_id", 0, last)
    pad_token_id = None if pad_token_id is None else whole(pad_token_id, "generate: pad_token_id", 0)
    block_length = None if block_length is None else whole(block_length, "generate: block_length", 1)
    affordable(len(input_ids) * (width + max_new_tokens), f"generate: {len(input_ids)} rows of new tokens")
    if isinstance(operator, str):
        from discdiff.samplers.expression import parse_operator

        operator = parse_operator(operator, "generate: operator")
    check_operator(operator, "generate: operator")
    seed = seeded(seed, "generate: seed")
    out = torch.nn.functional.pad(input_ids, (0, max_new_tokens))
    row = 0
    behind = slice(width - edge, width - edge + max_new_tokens)
    for size, run in itertools.groupby(lengths):
        batch, given = len(list(run)), size - 2 * edge
        here = slice(row, row + batch)
        prompt = input_ids[here, width - edge - given : width - edge]
        maker = _maker(model, operator, given, max_new_tokens, steps, block_length)
        told: dict[str, Any] = {"prompt": prompt, "seed": seed, "first_row": row, "listen": listen}
        told["device"] = input_ids.device
        if isinstance(maker, Blockwise):
            told["stop"] = eos  # an ended row takes part in no further calls
        with under(f"row{row}", listen):
            out[here, behind] = maker.sample(batch, given + max_new_tokens, **told).tokens[:, given:]
        row += batch
    ends = torch.tensor(eos, dtype=torch.int64)
    if len(ends):
        new = out[:, behind]
        ended = torch.isin(new, ends.to(out.device)).long()
        over = ended.cumsum(1) - ended > 0
        out[:, behind] = torch.where(over, int(ends[0]) if pad_token_id is None else pad_token_id, new)
    if edge and model.frame is not None:
        out[:, -1] = model.frame[1]
    return out


def _check_segments(token_type_ids: object, overflow_to_sample_mapping: object, batch: int) -> None:
    """Raise ValueError if a prompt has two segments or a text takes several rows."""
    if token_type_ids is not None and bool(array(token_type_ids, "generate: token_type_ids").ne(0).any()):
        raise ValueError(
            "generate: token_type_ids must be 0 everywhere: the network is shown one segment, and a second one would "
            "be read as the first"
        )
    if overflow_to_sample_mapping is not None:
        rows = array(overflow_to_sample_mapping, "generate: overflow_to_sample_mapping").flatten().tolist()
        if rows != list(range(batch)):
            raise ValueError(
                f"generate: overflow_to_sample_mapping must be 0..{batch - 1}, a row for each text, got {rows}; "
                "tokenize without return_overflowing_tokens"
            )


def _edge(model: Denoiser, input_ids: Tensor, lengths: list[int]) -> int:
    """Return 1 if every prompt stands between the model's start and end token, 0 if none begins with the start."""
    frame = model.frame
    if frame is None or input_ids.shape[1] == 0:
        return 0
    start, end = frame
    width = input_ids.shape[1]
    begins = [size > 0 and int(input_ids[row, width - size]) == start for row, size in enumerate(lengths)]
    ends = [size > 1 and int(input_ids[row, -1]) == end for row, size in enumerate(lengths)]
    if not any(begins):
        return 0
    for row, (one, other) in enumerate(zip(begins, ends, strict=True)):
        if not (one and other):
            lacks = "begin" if not one else "end"
            raise ValueError(
                f"generate: every prompt must stand between the start token {start} and the end token {end}, as the "
                f"tokenizer gives it, or none may; row {row} does not {lacks} so"
            )
    return 1


def _lengths(input_ids: Tensor, attention_mask: object) -> list[int]:
    """Return the number of tokens of each prompt, without padding."""
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    attention_mask = array(attention_mask, "generate: attention_mask")
    odd = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if len(odd):
        raise ValueError(f"generate: attention_mask must hold 1, and 0 for padding, got {odd[0].item()}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if bool((attention_mask.long().diff(dim=1) < 0).any()):
        raise ValueError("generate: prompts must be padded on the left: tokenizer(..., " + _LEFT)
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
