r"""DiffusionGemma: an encoder caches clean tokens, and a decoder denoises a block ("canvas") after them.

    logits of the canvas x = decoder(x, encoder(prefix))

The encoder is causal. The decoder attends to the prefix and the whole canvas, and takes no time. Noise is uniform: a
canvas starts as random tokens. The network runs in transformers' own classes (5.11 or newer). Each finished canvas
takes one more pass of the encoder, which does not count as a denoiser call.

Reference: DiffusionGemma (Google, 2026, https://huggingface.co/google/diffusiongemma-26B-A4B-it).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from discdiff.adapters.allowed import CLASSES
from discdiff.adapters.convention import Convention
from discdiff.adapters.files import Files
from discdiff.adapters.hosted import native
from discdiff.adapters.in_transformers import said_by
from discdiff.adapters.loading import Asked, Family
from discdiff.adapters.prefix import Prefix, left_padded
from discdiff.adapters.settings import Refused
from discdiff.process import Linear, Uniform

__all__ = ["GEMMA", "Canvas"]

_CLASS = "DiffusionGemmaForBlockDiffusion"
# the class always makes an image tower, which sampling text does not use; so the smallest is made and removed
_NO_TOWER = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 4)
_NO_TOWER |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
_NO_TOWER |= {"global_head_dim": 4, "position_embedding_size": 1}


class Canvas(nn.Module):
    """DiffusionGemma with a cache of clean prefixes, around transformers' ``DiffusionGemmaForBlockDiffusion``.

    Shapes: tokens are (B, L) in a sequence, (B, n) in a block and (B, P) in a prefix. The lengths of prefixes are (B,).
    Logits are (B, L, V) or (B, n, V), for V tokens.

    Args:
        network: the model of transformers.
        beginning: the token to put before a canvas without a prefix; the authors' prompts begin with it.
        rounds: how many further passes the decoder makes with its last logits as input (self-conditioning). The authors
            use the logits of the previous step, so their step depends on more than the tokens.
    """

    network: Any

    def __init__(self, network: nn.Module, beginning: int, rounds: int = 0) -> None:
        super().__init__()
        self.network = network
        self.beginning: int = beginning
        self.rounds: int = rounds

    def forward(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Return the logits of a canvas without a prefix."""
        none = torch.zeros_like(x[:, 0])
        return self.evaluate(self.prefill(x[:, :0], none, 0), x, None)

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> Prefix:
        """Cache the first ``length`` tokens of each row; a row without tokens gets ``beginning``.

        ``capacity`` is ignored, as the cache grows when needed.
        """
        from transformers import DynamicCache

        empty, tokens = length == 0, nn.functional.pad(tokens, (0, 1))
        tokens[empty, 0] = self.beginning
        length = length + empty.long()
        prefix = Prefix(DynamicCache(config=self.network.config.get_text_config()), tokens[:, :0], tokens[:, :0])
        self._read(prefix, *left_padded(tokens, length))
        return prefix

    def extend(self, prefix: Prefix, tokens: Int[Tensor, "B n"]) -> None:
        """Append a clean block to the prefix: the encoder reads it into the cache."""
        self._read(prefix, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def evaluate(self, prefix: Prefix, x: Int[Tensor, "B n"], time: None) -> Float[Tensor, "B n V"]:
        """Return the logits of a canvas after the prefix."""
        said = None
        for _ in range(self.rounds + 1):
            said = self.network(
                past_key_values=prefix.kept,
                decoder_input_ids=x,
                decoder_attention_mask=torch.cat([prefix.seen, torch.ones_like(x)], 1),
                decoder_position_ids=prefix.length[:, None] + torch.arange(x.shape[1], device=x.device),
                self_conditioning_logits=said,
            ).logits
        assert said is not None
        return said

    def _read(self, prefix: Prefix, tokens: Tensor, real: Tensor) -> None:
        held = prefix.seen.shape[1]
        prefix.seen = torch.cat([prefix.seen, real.long()], 1)
        self.network.model.encoder(
            input_ids=tokens,
            attention_mask=prefix.seen,
            position_ids=prefix.position[:, held:],
            past_key_values=prefix.kept,
        )


def _build(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    if asked.mask_id is not None:
        raise Refused(f"DiffusionGemma's noise is uniform and has no mask, got mask_id={asked.mask_id}")
    said = said_by(files)
    settings = CLASSES[_CLASS].read(said, asked.ignore)
    written = CLASSES["DiffusionGemmaTextConfig"].read(said.part("text_config"), asked.ignore)
    settings |= {"text_config": written, "vision_config": _NO_TOWER}
    one = torch.zeros(1, 1, dtype=torch.int64)
    network, passed = native(_CLASS, settings, files, input_ids=one, decoder_input_ids=one)
    text: Any = network.config.get_text_config()  # type: ignore[union-attr, operator]
    block = asked.block or said.whole("canvas_length", least=1, default=256)
    convention = Convention(
        "DiffusionGemma",
        Uniform(text.vocab_size, asked.schedule or Linear()),
        "denoiser",
        text.vocab_size,
        suppress=tuple(range(files.tokenizer_size or text.vocab_size, text.vocab_size)),
        ids="",
        block=block,
        aligned=False,
        notes=(
            f"canvases of {block} begin where the prompt ends: Blockwise(block=[len(prompt), {block}])",
            "self-conditioning is off: Canvas(network.network, beginning, rounds=1) shows it its own logits once",
            "how it was trained is not published; its authors sample from its output as from a denoiser's",
            *passed,
        ),
    )
    return Canvas(network, int(text.bos_token_id)), convention


GEMMA = Family(
    "DiffusionGemma",
    "DiffusionGemma, uniform diffusion in blocks (Google, 2026)",
    lambda files: files.config.get("model_type") == "diffusion_gemma",
    _build,
    ("diffusion_gemma",),
)
