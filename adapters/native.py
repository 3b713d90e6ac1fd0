"""Families whose weights fit classes that transformers has: they run there, not in remote code.

What their authors' classes add to Llama, Qwen2, Qwen3-MoE or GLM-4-MoE is the attention mask, which is an argument.
It is so in transformers 4.57 and 5.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from discdiff.adapters.block_causal import BlockCausal
from discdiff.adapters.files import Files
from discdiff.adapters.frame import BERT_TOKENS, ESM_TOKENS, ROBERTA_TOKENS, UNFRAMED, Specials
from discdiff.adapters.loading import Asked, Family
from discdiff.convention import Attention, Convention
from discdiff.process import Process
from discdiff.rank_one import Masked
from discdiff.schedule import Linear

__all__ = ["NATIVE"]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class _Native:
    """A family as a transformers class.

    Attributes:
        name, about: of the ``Family``.
        kinds: the ``model_type`` values in config.json that it has.
        cls: the name of the class in transformers.
        needs: a key that config.json has, where two families have the same ``model_type``.
        settings: of the author's config.json, those of the class's own configuration.
        rename: the class's own names of the weights.
        attention: what is passed as a mask.
        shift: whether position i speaks of i + 1; or the key in config.json that says so.
        mask_rule: the mask's id where nothing on disk says it.
        specials: the special tokens of a family that is trained between a start and an end token; they are never
            predicted.
        block: the block size of one that is causal between blocks, where its configuration does not say it.
        notes: for the convention.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    cls: str
    needs: str = ""
    settings: Callable[[dict[str, Any]], dict[str, Any]] = dict
    rename: Callable[[Weights, dict[str, Any]], Weights] = lambda weights, config: weights
    attention: Attention = "bidirectional"
    shift: bool | str = False
    mask_rule: int | None = None
    specials: Specials | None = None
    block: int | None = None
    notes: tuple[str, ...] = ()

    def family(self) -> Family:
        return Family(self.name, self.about, self.recognises, self.build)

    def recognises(self, files: Files) -> bool:
        return files.config.get("model_type") in self.kinds and (not self.needs or self.needs in files.config)

    def build(self, files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
        network = native(self.cls, self.settings(dict(files.config)), self.rename(files.weights, dict(files.config)))
        columns = network.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        rule = self.specials.usual(files, columns, "mask") if self.specials else self.mask_rule
        mask, source = files.mask_id(rule, asked.mask_id)
        process, suppress = masked(columns, mask, files, asked, source)
        frame, longest, notes = None, _table(network), self.notes
        if self.specials:
            frame = self.specials.frame(files, columns)
            suppress += tuple(v for v in self.specials.unpredicted(files, columns) if v != mask)
            notes += (UNFRAMED,) if frame is None else ()
            notes += ("its tokens are named by ../vocab.txt",) if files.beside else ()
        if frame is not None and longest is not None:
            longest -= len(frame)
        block = (
            None if self.block is None else asked.block or files.config.whole("block_size", least=1, default=self.block)
        )
        convention = Convention(
            family=self.name,
            process=process,
            predicts="denoiser",
            columns=columns,
            mask_source=source,
            shift=self.shift if isinstance(self.shift, bool) else bool(files.config.get(self.shift, False)),
            suppress=tuple(sorted({v for v in suppress if v < process.vocab_size})),
            returns="logits",
            attention=self.attention,
            longest=longest,
            frame=frame,
            notes=notes,
        )
        if block is None:
            return network, convention
        return BlockCausal(network, block), replace(convention, block=block, ids="", returns="tensor", attention=None)


def _table(network: nn.Module) -> int | None:
    """Places in its table of positions, which may begin behind the padding's; rotary ones have no end."""
    for name, part in network.named_modules():
        if name.endswith(("position_embeddings", ".wpe")) and isinstance(part, nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return None


def masked(columns: int, mask: int, files: Files, asked: Asked, source: str) -> tuple[Process, tuple[int, ...]]:
    """The masked process of an output of so many columns, and the ids beyond the tokenizer.

    A mask that is the last column needs no place among the data; one beyond it does not exist.

    Raises:
        ValueError: for a mask id that the network has no embedding for.
    """
    if not 0 <= mask < columns:
        raise ValueError(
            f"load: the mask id is {mask} ({source}), but the network of {files.path} knows ids 0..{columns - 1}; "
            "pass the right one as mask_id="
        )
    schedule = asked.schedule or Linear()
    last = mask == columns - 1
    size = columns - 1 if last else columns
    beyond = tuple(v for v in range(files.tokenizer_size or size, size) if v != mask)
    return Masked(size, schedule) if last else Masked(size, schedule, mask_id=mask), beyond


def native(name: str, settings: dict[str, Any], weights: Weights) -> nn.Module:
    """A transformers model from its class's name, settings and weights, all of which must fit.

    Raises:
        ImportError: if transformers is missing or too old to have the class.
        ValueError: if weights are missing, left over or of another shape.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"load: {name} needs transformers: pip install 'discdiff[hf]'") from error
    if not hasattr(transformers, name):
        raise ImportError(f"load: transformers {transformers.__version__} has no {name}; a newer one has")
    cls = getattr(transformers, name)
    configuration = cls.config_class(**settings)
    quiet = transformers.utils.logging
    level, bars = quiet.get_verbosity(), quiet.is_progress_bar_enabled()
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        # the dtype is that of the weights: 4.57 would convert them to float32
        dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        network, told = cls.from_pretrained(
            None, config=configuration, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"load: the weights do not fit {name}: {error}") from error
    finally:
        quiet.set_verbosity(level)
        if bars:
            quiet.enable_progress_bar()
    wrong = {kind: sorted(map(str, told[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        parts = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in wrong.items() if names)
        raise ValueError(f"load: the weights do not fit {name}: {parts}")
    return network


def _renamed(*rules: tuple[str, str]) -> Callable[[Weights, dict[str, Any]], Weights]:
    """Rename by regular expressions, the first that fits the whole name."""

    def rename(weights: Weights, config: dict[str, Any]) -> Weights:
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


def _without(pattern: str) -> Callable[[Weights, dict[str, Any]], Weights]:
    """Pass over weights that sampling does not use."""
    return lambda weights, config: {n: tensor for n, tensor in weights.items() if not re.fullmatch(pattern, n)}


def _llada(config: dict[str, Any]) -> dict[str, Any]:
    """Of an OLMo-like configuration, Llama's."""
    rows = config.get("embedding_size") or config["vocab_size"]
    hidden = config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"]
    return {
        "vocab_size": rows,
        "hidden_size": config["d_model"],
        "intermediate_size": hidden,
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config.get("n_kv_heads") or config["n_heads"],
        "max_position_embeddings": config["max_sequence_length"],
        "rope_theta": config.get("rope_theta", 10000.0),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "attention_bias": bool(config.get("include_qkv_bias")),
        "tie_word_embeddings": bool(config.get("weight_tying")),
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


def _llada_moe(config: dict[str, Any]) -> dict[str, Any]:
    """Of LLaDA-MoE's configuration, Qwen3-MoE's."""
    same: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    same += ("max_position_embeddings", "rope_theta", "rms_norm_eps", "num_experts", "num_experts_per_tok")
    settings = {name: config[name] for name in same if name in config}
    hidden = config["expert_intermediate_size"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return settings | {
        "moe_intermediate_size": hidden,
        "intermediate_size": config.get("dense_intermediate_size") or hidden,
        "head_dim": head,
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
        "attention_bias": bool(config.get("attention_bias")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }


def _llada2(config: dict[str, Any]) -> dict[str, Any]:
    """Of LLaDA2's configuration, GLM-4-MoE's."""
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    same += ["num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "num_experts_per_tok"]
    same += ["n_group", "topk_group", "routed_scaling_factor", "moe_intermediate_size", "first_k_dense_replace"]
    settings = {name: config[name] for name in same if name in config}
    partial = config.get("partial_rotary_factor", 0.5)
    return settings | {
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config.get("num_shared_experts", 0),
        "norm_topk_prob": True,
        "use_qk_norm": config.get("use_qk_norm", True),
        "attention_bias": bool(config.get("use_qkv_bias")),
        "partial_rotary_factor": partial,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.get("rope_theta", 10000.0),
            "partial_rotary_factor": partial,
        },
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }


def _llada2_weights(weights: Weights, config: dict[str, Any]) -> Weights:
    """Queries, keys and values lie in one matrix there, and the router's bias has another name."""
    renamed = _renamed(
        (r"model\.word_embeddings\.weight", "model.embed_tokens.weight"),
        (r"(.*)\.attention\.dense\.(.*)", r"\1.self_attn.o_proj.\2"),
        (r"(.*)\.attention\.query_layernorm\.(.*)", r"\1.self_attn.q_norm.\2"),
        (r"(.*)\.attention\.key_layernorm\.(.*)", r"\1.self_attn.k_norm.\2"),
        (r"(.*)\.gate\.expert_bias", r"\1.gate.e_score_correction_bias"),
    )(weights, config)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rows = [width * config[key] for key in ("num_attention_heads", *2 * ("num_key_value_heads",))]
    found = {}
    for name, tensor in renamed.items():
        if ".attention.query_key_value." in name:
            for letter, part in zip("qkv", tensor.split(rows), strict=True):
                found[name.replace("attention.query_key_value", f"self_attn.{letter}_proj")] = part.clone()
        else:
            found[name] = tensor
    return found


def _diffugpt(weights: Weights, config: dict[str, Any]) -> Weights:
    """The wrapper that was saved keeps embeddings, body and head as attributes of its own."""
    body, tokens = ("transformer", "wte") if config["model_type"] == "gpt2" else ("model", "embed_tokens")
    rules = (r"denoise_model\.(.*)", rf"{body}.\1"), (r"embed_tokens\.weight", f"{body}.{tokens}.weight")
    causal = re.compile(r".*\.attn\.(masked_)?bias")
    return {name: part for name, part in _renamed(*rules)(weights, config).items() if not causal.fullmatch(name)}


@dataclass(frozen=True)
class _Wrapped(_Native):
    """One that is recognised by the names of its weights, its configuration being the plain model's."""

    def recognises(self, files: Files) -> bool:
        own = files.config.get("model_type") in self.kinds
        return own and any(name.startswith("denoise_model.") for name in files.shapes)


_AR = ("made from an autoregressive model, it keeps the shift: nothing speaks of the first position",)
_TIMELESS = ("it takes no time: what is masked says it",)

NATIVE: tuple[Family, ...] = tuple(
    one.family()
    for one in (
        _Native(
            "LLaDA", "LLaDA, a masked diffusion language model, run as Llama (Nie et al., 2025)", ("llada",),
            "LlamaForCausalLM", "d_model", _llada, _LLADA, mask_rule=126336, notes=_TIMELESS,
        ),
        _Native(
            "LLaDA-MoE", "LLaDA with experts, run as Qwen3-MoE (Zhu et al., 2025)", ("llada", "lladamoe", "llada_moe"),
            "Qwen3MoeForCausalLM", "num_experts", _llada_moe, mask_rule=156895, notes=_TIMELESS,
        ),
        _Native(
            "LLaDA2", "LLaDA2, block diffusion with experts, run as GLM-4-MoE (inclusionAI, 2025)", ("llada2_moe",),
            "Glm4MoeForCausalLM", "", _llada2, _llada2_weights, mask_rule=156895, block=32,
            notes=("blocks begin at multiples of the block size, prompts included",),
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
                f"{base}ForCausalLM", shift="right_shift_logits",
            )
            for base in ("Llama", "Qwen2", "Qwen3")
        ),
        _Native(
            "BERT", "a masked language model of BERT's kind", ("bert",),
            "BertForMaskedLM", rename=_without(r"bert\.pooler\..*|cls\.(seq_relationship|species|chain|graft)\..*"),
            attention="ones", specials=BERT_TOKENS,
        ),
        _Native(
            "RoBERTa", "a masked language model of RoBERTa's kind", ("roberta",),
            "RobertaForMaskedLM", rename=_without(r"roberta\.(pooler\..*|embeddings\.position_ids)"),
            attention="ones", specials=ROBERTA_TOKENS,
        ),
        _Native(
            "ModernBERT", "a masked language model of ModernBERT's kind", ("modernbert",),
            "ModernBertForMaskedLM", attention="ones", specials=BERT_TOKENS,
        ),
        _Native(
            "ESM-2", "ESM-2 or DPLM, protein language models (Lin et al., 2023; Wang et al., 2024)", ("esm",),
            "EsmForMaskedLM", attention="ones", specials=ESM_TOKENS,
        ),
    )
)  # fmt: skip
