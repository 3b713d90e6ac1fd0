"""Load families whose weights fit classes of transformers; they run in these classes, not in remote code.

The authors' decoders differ from Llama, Qwen2, Qwen3, Qwen3-MoE or GLM-4-MoE only in the attention mask. The mask is an
argument of these classes in transformers 4.57 and 5. ``allowed`` lists the accepted keys of configurations.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from discdiff.adapters.allowed import AUTHORS, CLASSES, FLAG, SIZE, Allowed, Reader
from discdiff.adapters.block_causal import BlockCausal
from discdiff.adapters.convention import Attention, Convention
from discdiff.adapters.files import Files
from discdiff.adapters.frame import BERT_TOKENS, ESM_TOKENS, ROBERTA_TOKENS, UNFRAMED, Specials
from discdiff.adapters.hosted import native
from discdiff.adapters.loading import Asked, Family
from discdiff.adapters.settings import Refused, Settings
from discdiff.process import Linear, Masked, Process

__all__ = ["NATIVE", "masked", "said_by"]

Weights = dict[str, Tensor]
Rename = Callable[[Weights, Settings], Weights]


def said_by(files: Files) -> Settings:
    """Return the contents of config.json as ``Settings``, with typed getters."""
    return files.config if isinstance(files.config, Settings) else Settings(files.config, "config.json")


@dataclass(frozen=True)
class _Native:
    """A family that runs in a class of transformers.

    Attributes:
        name, about: fields of the ``Family``.
        kinds: its ``model_type`` values in config.json.
        cls: the name of the class in transformers.
        needs: a key of config.json that distinguishes the family from others with the same ``model_type``.
        allowed: the accepted keys of the author's config.json; those of the class by default.
        settings: maps the contents of config.json to settings of the class's own configuration.
        reads: further accepted keys of config.json, with their readers.
        rename: maps the names of weights to those of the class.
        attention: the attention mask to pass.
        shift: whether position i predicts i + 1; or the key of config.json with this flag.
        mask_rule: the mask's id if no file has one.
        specials: the special tokens of a family that is trained between a start and an end token; they are never
            predicted.
        block: the default block size of a family that is causal between blocks; None for other families.
        notes: notes for the convention.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    cls: str
    needs: str = ""
    allowed: Allowed | None = None
    settings: Callable[[dict[str, Any]], Mapping[str, Any]] = dict
    reads: Mapping[str, Reader] = field(default_factory=dict)
    rename: Rename = lambda weights, settings: weights
    attention: Attention = "bidirectional"
    shift: bool | str = False
    mask_rule: int | None = None
    specials: Specials | None = None
    block: int | None = None
    notes: tuple[str, ...] = ()

    def family(self) -> Family:
        return Family(self.name, self.about, self.recognises, self.build, self.kinds)

    def recognises(self, files: Files) -> bool:
        return files.config.get("model_type") in self.kinds and (not self.needs or self.needs in files.config)

    def build(self, files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
        said = said_by(files)
        block = self._block(said, asked)
        decoder = self.attention == "bidirectional"
        reads = {**self.reads, **({"block_size": SIZE} if decoder else {})}
        settings = self.settings((self.allowed or CLASSES[self.cls]).read(said, asked.ignore, reads))
        network, passed = native(self.cls, settings, files, lambda weights: self.rename(weights, said))
        columns = network.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        rule = self.specials.usual(files, columns, "mask") if self.specials else self.mask_rule
        mask, source = files.mask_id(rule, asked.mask_id)
        process, suppress = masked(columns, mask, files, asked, source)
        frame, longest = None, _longest(network)
        notes = (
            self.notes
            + passed
            + tuple(f"ignored as asked: {key} of config.json" for key in asked.ignore if key in said)
        )
        if self.specials:
            frame = self.specials.frame(files, columns)
            suppress += tuple(v for v in self.specials.unpredicted(files, columns) if v != mask)
            notes += (UNFRAMED,) if frame is None else ()
            notes += ("its tokens are named by ../vocab.txt",) if files.beside else ()
        if frame is not None and longest is not None:
            longest -= len(frame)
        convention = Convention(
            family=self.name,
            process=process,
            predicts="denoiser",
            columns=columns,
            mask_source=source,
            shift=self.shift if isinstance(self.shift, bool) else said.flag(self.shift, default=False),
            suppress=tuple(sorted({v for v in suppress if v < process.vocab_size})),
            returns="logits",
            attention=self.attention,
            longest=longest,
            frame=frame,
            notes=notes,
        )
        return (network, convention) if block is None else _in_blocks(network, convention, block)

    def _block(self, said: Settings, asked: Asked) -> int | None:
        """Return the user's block size, else the family's if it denoises in blocks, else None.

        A family that denoises in blocks takes the size from the configuration, or else its default size.

        Raises:
            Refused: if the user gives a block size for an encoder, or the configuration has one that the family does
                not read.
        """
        if asked.block is not None and self.attention != "bidirectional":
            raise said.refused(f"block={asked.block} is for decoders; {self.cls} sees every token in both directions")
        if self.block is not None:
            return asked.block or said.whole("block_size", least=1, default=self.block)
        if asked.block is None and said.get("block_size") is not None and "block_size" not in asked.ignore:
            size = said.whole("block_size", least=1)
            raise said.refused(
                f"block_size={size} makes attention causal between blocks, which {self.name} is not by itself; pass "
                f"block={size}, or ignore=('block_size',) for attention in both directions"
            )
        return asked.block


def _in_blocks(network: nn.Module, convention: Convention, block: int) -> tuple[nn.Module, Convention]:
    """Wrap a decoder to be causal between blocks; it moves shifted logits to the positions that they predict."""
    inside = ("position i speaks of i + 1 in the network; the logits are put in their places in each block",)
    return BlockCausal(network, block, convention.shift, convention.longest), replace(
        convention,
        block=block,
        ids="",
        returns="tensor",
        attention=None,
        shift=False,
        notes=convention.notes + (inside if convention.shift else ()),
    )


def _longest(network: nn.Module) -> int | None:
    """Return the largest number of tokens for the network's table of positions; None for rotary positions.

    If the table has a padding row, as in RoBERTa and ESM-1, positions start at the row after it.
    """
    for name, part in network.named_modules():
        if name.endswith(("position_embeddings", ".wpe")) and isinstance(part, nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return None


def masked(columns: int, mask: int, files: Files, asked: Asked, source: str) -> tuple[Process, tuple[int, ...]]:
    """Return the masked process of a network with ``columns`` output columns; also the ids that the tokenizer lacks.

    These ids are those above the tokenizer's largest, except the mask's.

    If the mask's id is the last column, it becomes the state V = ``columns`` - 1 after the data tokens. Any other mask
    id is one of the V = ``columns`` ids.

    Raises:
        Refused: if the mask's id is not one of the columns.
    """
    if not 0 <= mask < columns:
        raise Refused(
            f"the mask id is {mask} ({source}), but the network knows ids 0..{columns - 1}; "
            "pass the right one as mask_id="
        )
    schedule = asked.schedule or Linear()
    last = mask == columns - 1
    size = columns - 1 if last else columns
    beyond = tuple(v for v in range(files.tokenizer_size or size, size) if v != mask)
    return Masked(size, schedule) if last else Masked(size, schedule, mask_id=mask), beyond


def _renamed(*rules: tuple[str, str]) -> Rename:
    """Make a function that renames each weight by the first regular expression that matches its whole name."""

    def rename(weights: Weights, settings: Settings) -> Weights:
        found = {}
        for name, tensor in weights.items():
            for pattern, new in rules:
                if re.fullmatch(pattern, name):
                    found[re.sub(pattern, new, name)] = tensor
                    break
            else:
                found[name] = tensor
        return found

    return rename


def _taken(said: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return those of the named settings that are present, under the same names."""
    return {name: said[name] for name in names if name in said}


def _llada(said: dict[str, Any]) -> dict[str, Any]:
    """Convert an OLMo-like configuration to Llama's."""
    return _taken(said, "rope_theta", "rope_scaling") | {
        "vocab_size": said.get("embedding_size", said["vocab_size"]),
        "hidden_size": said["d_model"],
        "intermediate_size": said.get("mlp_hidden_size") or int(said.get("mlp_ratio", 4) * said["d_model"]),
        "num_hidden_layers": said["n_layers"],
        "num_attention_heads": said["n_heads"],
        "num_key_value_heads": said.get("n_kv_heads", said["n_heads"]),
        "max_position_embeddings": said["max_sequence_length"],
        "rms_norm_eps": said.get("rms_norm_eps", 1e-5),
        "attention_bias": said.get("include_qkv_bias", False),
        "tie_word_embeddings": said.get("weight_tying", False),
    }


_LLADA = _renamed(
    (r"model\.transformer\.wte\.weight", "model.embed_tokens.weight"),
    (r"model\.transformer\.ln_f\.weight", "model.norm.weight"),
    (r"model\.transformer\.ff_out\.weight", "lm_head.weight"),
    (r"model\.transformer\.blocks\.(\d+)\.([qkv])_proj\.(.*)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"model\.transformer\.blocks\.(\d+)\.attn_out\.(.*)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.ff_proj\.(.*)", r"model.layers.\1.mlp.gate_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.up_proj\.(.*)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.ff_out\.(.*)", r"model.layers.\1.mlp.down_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.attn_norm\.(.*)", r"model.layers.\1.input_layernorm.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.ff_norm\.(.*)", r"model.layers.\1.post_attention_layernorm.\2"),
)


_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "num_experts_per_tok"),
)


def _head(said: Mapping[str, Any]) -> int:
    return said.get("head_dim") or said["hidden_size"] // said["num_attention_heads"]


def _llada_moe(said: dict[str, Any]) -> dict[str, Any]:
    """Convert LLaDA-MoE's configuration to Qwen3-MoE's."""
    hidden = said["expert_intermediate_size"]
    return _taken(said, *_SAME, "num_experts") | {
        "moe_intermediate_size": hidden,
        "intermediate_size": said.get("dense_intermediate_size", hidden),
        "head_dim": _head(said),
        "norm_topk_prob": said.get("norm_topk_prob", False),
        "attention_bias": said.get("attention_bias", False),
        "tie_word_embeddings": said.get("tie_word_embeddings", False),
    }


def _llada2(said: dict[str, Any]) -> dict[str, Any]:
    """Convert LLaDA2's configuration to GLM-4-MoE's; with one expert a token, its weight is not normalized."""
    same = ("intermediate_size", "n_group", "topk_group", "routed_scaling_factor", "moe_intermediate_size")
    return _taken(said, *_SAME, *same, "first_k_dense_replace", "partial_rotary_factor") | {
        "head_dim": _head(said),
        "n_routed_experts": said["num_experts"],
        "n_shared_experts": said.get("num_shared_experts", 0),
        "norm_topk_prob": said.get("num_experts_per_tok", 8) > 1,
        "use_qk_norm": said.get("use_qk_norm", True),
        "attention_bias": said.get("use_qkv_bias", False),
        "tie_word_embeddings": said.get("tie_word_embeddings", False),
    }


def _llada2_weights(weights: Weights, settings: Settings) -> Weights:
    """Split the matrix that holds queries, keys and values, and rename the router's bias."""
    renamed = _renamed(
        (r"model\.word_embeddings\.weight", "model.embed_tokens.weight"),
        (r"(.*)\.attention\.dense\.(.*)", r"\1.self_attn.o_proj.\2"),
        (r"(.*)\.attention\.query_layernorm\.(.*)", r"\1.self_attn.q_norm.\2"),
        (r"(.*)\.attention\.key_layernorm\.(.*)", r"\1.self_attn.k_norm.\2"),
        (r"(.*)\.gate\.expert_bias", r"\1.gate.e_score_correction_bias"),
    )(weights, settings)
    heads = settings.whole("num_attention_heads", least=1)
    width = settings.whole("head_dim", least=1, default=settings.whole("hidden_size", least=1) // heads)
    rows = [width * heads, *2 * [width * settings.whole("num_key_value_heads", least=1)]]
    found = {}
    for name, tensor in renamed.items():
        if ".attention.query_key_value." in name:
            if tensor.ndim < 1 or tensor.shape[0] != sum(rows):
                raise Refused(f"the weight {name} must have {sum(rows)} rows, got {tuple(tensor.shape)}")
            for letter, part in zip("qkv", tensor.split(rows), strict=True):
                found[name.replace("attention.query_key_value", f"self_attn.{letter}_proj")] = part.clone()
        else:
            found[name] = tensor
    return found


def _diffugpt(weights: Weights, settings: Settings) -> Weights:
    """Rename the weights of the saved wrapper, ``denoise_model`` and ``embed_tokens``, to those of the class."""
    body, tokens = ("transformer", "wte") if settings["model_type"] == "gpt2" else ("model", "embed_tokens")
    rules = (r"denoise_model\.(.*)", rf"{body}.\1"), (r"embed_tokens\.weight", f"{body}.{tokens}.weight")
    return _renamed(*rules)(weights, settings)


_OLD_NORMS = _renamed(
    (r"(.*\bLayerNorm)\.gamma", r"\1.weight"), (r"(.*\bLayerNorm)\.beta", r"\1.bias")
)  # TensorFlow's names, from the first checkpoints of BERT


@dataclass(frozen=True)
class _Wrapped(_Native):
    """A family whose configuration is that of the plain model; the names of its weights identify it."""

    def recognises(self, files: Files) -> bool:
        own = files.config.get("model_type") in self.kinds
        return own and any(name.startswith("denoise_model.") for name in files.shapes)


_AR = ("made from an autoregressive model, it keeps the shift: nothing speaks of the first position",)
_FROM_ZERO = ("blocks begin at multiples of the block size, prompts included",)
_TIMELESS = ("it takes no time: what is masked says it",)

NATIVE: tuple[Family, ...] = tuple(
    one.family()
    for one in (
        _Native(
            "LLaDA", "LLaDA, a masked diffusion language model, run as Llama (Nie et al., 2025)", ("llada",),
            "LlamaForCausalLM", "d_model", AUTHORS["LLaDA"], _llada, rename=_LLADA, mask_rule=126336, notes=_TIMELESS,
        ),
        _Native(
            "LLaDA-MoE", "LLaDA with experts, run as Qwen3-MoE (Zhu et al., 2025)", ("llada", "lladamoe", "llada_moe"),
            "Qwen3MoeForCausalLM", "num_experts", AUTHORS["LLaDA-MoE"], _llada_moe, mask_rule=156895, notes=_TIMELESS,
        ),
        _Native(
            "LLaDA2", "LLaDA2, block diffusion with experts, run as GLM-4-MoE (inclusionAI, 2025)", ("llada2_moe",),
            "Glm4MoeForCausalLM", "", AUTHORS["LLaDA2"], _llada2, rename=_llada2_weights, mask_rule=156895, block=32,
            notes=_FROM_ZERO,
        ),
        _Native(
            "SDAR", "SDAR, block diffusion, run as Qwen3 (Cheng et al., 2025)", ("sdar",),
            "Qwen3ForCausalLM", mask_rule=151669, block=4, notes=_FROM_ZERO,
        ),
        _Native(
            "Dream", "Dream or DiffuCoder, run as Qwen2 (Ye et al., 2025)", ("Dream", "dream"),
            "Qwen2ForCausalLM", shift=True, notes=_AR,
        ),
        _Wrapped(
            "DiffuGPT", "DiffuGPT, adapted from GPT-2 (Gong et al., 2025)", ("gpt2",),
            "GPT2LMHeadModel", rename=_diffugpt, shift=True, notes=_AR,
        ),
        _Wrapped(
            "DiffuLLaMA", "DiffuLLaMA, adapted from Llama (Gong et al., 2025)", ("llama",),
            "LlamaForCausalLM", rename=_diffugpt, shift=True, notes=_AR,
        ),
        *(
            _Native(
                f"A2D-{base}", f"an autoregressive {base} made a masked diffusion model", (f"a2d-{base.lower()}",),
                f"{base}ForCausalLM", reads={"right_shift_logits": FLAG}, shift="right_shift_logits",
            )
            for base in ("Llama", "Qwen2", "Qwen3")
        ),
        _Native(
            "BERT", "a masked language model of BERT's kind", ("bert",),
            "BertForMaskedLM", rename=_OLD_NORMS, attention="ones", specials=BERT_TOKENS,
        ),
        _Native(
            "RoBERTa", "a masked language model of RoBERTa's kind", ("roberta",),
            "RobertaForMaskedLM", rename=_OLD_NORMS, attention="ones", specials=ROBERTA_TOKENS,
        ),
        _Native(
            "ModernBERT", "a masked language model of ModernBERT's kind", ("modernbert",),
            "ModernBertForMaskedLM", attention="ones", specials=BERT_TOKENS,
            settings=lambda said: {"pad_token_id": None, "reference_compile": False} | said,
        ),
        _Native(
            "ESM-2", "ESM-2 or DPLM, protein language models (Lin et al., 2023; Wang et al., 2024)", ("esm",),
            "EsmForMaskedLM", rename=_OLD_NORMS, attention="ones", specials=ESM_TOKENS,
        ),
    )
)  # fmt: skip
