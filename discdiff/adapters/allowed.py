"""List the accepted configuration keys of each class of transformers and of each author's format.

Each list is an ``Allowed``. Only the keys in its ``used`` and ``parts`` reach a class of transformers; each has a type
and a range. A key in ``looked`` must have a value at which it has no effect. A key in ``passed`` does not change the
forward pass in evaluation. Any other key raises an error with its name.

Keys mean what they mean in transformers 4.57 and 5, and in the configurations that the authors publish.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from discdiff.adapters.rope import FLAT, NESTED, flat_rope, layered_rope, modernbert_rope
from discdiff.adapters.settings import Settings
from discdiff.checks import shown

__all__ = ["AUTHORS", "CLASSES", "FLAG", "SIZE", "Allowed", "Reader"]

Reader = Callable[[Settings, str], Any]
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def _whole(least: int = 1, most: int = (1 << 31) - 1) -> Reader:
    return lambda settings, key: settings.whole(key, least=least, most=most)


def _number(interval: str) -> Reader:
    return lambda settings, key: settings.number(key, interval=interval)


def _word(*accepted: str) -> Reader:
    return lambda settings, key: settings.word(key, accepted=accepted)


def FLAG(settings: Settings, key: str) -> bool:
    """Read True or False."""
    return settings.flag(key)


def _only(*neutral: object) -> Reader:
    """Make a reader that accepts only the values ``neutral``, at which the setting has no effect."""

    def look(settings: Settings, key: str) -> None:
        value = settings[key]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            accepted = " or ".join(shown(one) for one in neutral) or "null"
            raise settings.refused(
                f"{key}={shown(value)} changes what the network computes and is not supported (accepted: {accepted}); "
                f"if it does not, pass ignore=({key!r},)"
            )

    return look


def _dtype(settings: Settings, key: str) -> None:
    """Check that a setting names a dtype; it is not used, as the network gets the dtype of its weights."""
    settings.word(key, accepted=(*DTYPES, *(f"torch.{name}" for name in DTYPES[1:])))


def _ones(settings: Settings, key: str) -> None:
    """Check that a list holds only ones, so that every layer has experts."""
    if any(one != 1 or isinstance(one, bool) for one in settings.items_of(key)):
        raise settings.refused(f"{key} must be ones: layers without experts are not supported")


def _sliding(settings: Settings) -> dict[str, Any]:
    """Check the keys of windowed attention; the windows must be switched off."""
    if settings.flag("use_sliding_window", default=False):
        raise settings.refused("use_sliding_window=true changes what the network computes and is not supported")
    if settings.get("sliding_window") is not None and settings.get("use_sliding_window") is None:
        raise settings.refused(
            f"sliding_window={shown(settings['sliding_window'])} changes what the network computes and is not "
            "supported, unless use_sliding_window is false; if it does not, pass ignore=('sliding_window',)"
        )
    if any(kind != "full_attention" for kind in settings.items_of("layer_types")):
        raise settings.refused("layer_types must all be full_attention; windows of attention are not supported")
    return {}


def _rotated(settings: Settings) -> dict[str, Any]:
    """Read LLaDA2's rotary positions; ``rotary_dim`` must agree with ``partial_rotary_factor``."""
    found = flat_rope(settings, partial=0.5)
    if settings.get("rotary_dim") is not None:
        heads = settings.whole("num_attention_heads", least=1)
        head = settings.whole("head_dim", least=1, default=settings.whole("hidden_size", least=1) // heads)
        if settings.whole("rotary_dim", least=0) != int(head * found["partial_rotary_factor"]):
            raise settings.refused(
                f"rotary_dim={settings['rotary_dim']} is not partial_rotary_factor = {found['partial_rotary_factor']} "
                f"of a head of {head}"
            )
    return found


def _overrides(settings: Settings) -> dict[str, Any]:
    """Read the table of sizes that apply to single layers of DiffusionGemma; its keys are numbers of layers."""
    if settings.get("per_layer_config") is None:
        return {}
    layers, found = settings.part("per_layer_config"), {}
    for name in layers:
        if not (name.isascii() and name.isdigit() and len(name) < 7):
            raise layers.refused(f"its keys must be numbers of layers, got {shown(name)}")
        table = layers.part(name)
        if not set(table) <= {"head_dim", "num_key_value_heads"}:
            raise table.refused(f"it may hold head_dim and num_key_value_heads, got {', '.join(sorted(table))}")
        found[int(name)] = {key: table.whole(key, least=1, most=1 << 20) for key in table}
    return {"per_layer_config": found}


def _places(settings: Settings) -> dict[str, Any]:
    """Check that ESM-1's table of positions has rows after its padding row, where positions begin."""
    rows, padding = (settings.whole(key, default=None) for key in ("max_position_embeddings", "pad_token_id"))
    rotary = settings.word("position_embedding_type", default="absolute") == "rotary"
    if not rotary and rows is not None and (padding is None or rows <= padding + 1):
        raise settings.refused(
            f"pad_token_id must be one of 0..{rows - 2}, for positions begin behind it and there are "
            f"max_position_embeddings={rows}; got {padding}"
        )
    return {}


SIZE, _EPSILON = _whole(), _number("[0, 1]")
_PLACES = _whole(1, 1 << 24)
_ACTIVATION = _word(
    "gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "mish", "quick_gelu", "relu", "relu2", "silu",
    "swish", "tanh",
)  # fmt: skip
_WINDOWS = (frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}), _sliding)
_ROPE = (FLAT, flat_rope)

# keys at whose every value the networks here compute the same
_PASSED = re.compile(
    r"architectures|model_type|transformers_version|_?name_or_path|_commit_hash|auto_map|custom_pipelines|_auto_class"
    r"|trust_remote_code|use_cache|return_dict|use_return_dict|return_dict_in_generate|output_\w+|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|task_specific_params|prefix|tokenizer_class|\w+_token_id|initializer_\w+"
    r"|(attention|hidden|embedding|residual|output|mlp|classifier)_dropout(_prob)?|attention_probs_dropout_prob|dropout"
    r"|(resid|embd|attn)_pdrop|gradient_checkpointing|_?attn_implementation\w*|_?experts_implementation\w*"
    r"|(base_model_)?(tp|pp|ep|sp|fsdp)_plan|torchscript|use_bfloat16|tf_legacy_loss|chunk_size_feed_forward"
    r"|use_kernels|kernel_config|keys_to_ignore_at_inference|loss_type|router_aux_loss_coef|_flash_attn_2_enabled"
    r"|pretraining_tp|unsloth_\w+|_comment\w*"
    # operators decide how tokens are drawn
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p"
    r"|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|exponential_decay_length_penalty|(begin_)?suppress_tokens|remove_invalid_values"
)
_LOOKED: dict[str, Reader] = {
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "is_encoder_decoder": _only(False),
    "is_decoder": _only(False),
    "add_cross_attention": _only(False),
    "cross_attention_hidden_size": _only(),
    "tie_encoder_decoder": _only(False),
    "pruned_heads": _only({}),
    "quantization_config": _only(),
    "per_layer_config": _only({}),
}


@dataclass(frozen=True)
class Allowed:
    """The accepted keys of a class of transformers, or of an author's format.

    Attributes:
        used: keys to pass to the class, with a reader for each.
        looked: keys to check but not to pass, with a reader for each.
        passed: a regular expression for further keys, which have no effect.
        parts: sets of keys that one reader reads together.
        needed: required keys.
    """

    used: Mapping[str, Reader]
    looked: Mapping[str, Reader] = field(default_factory=dict)
    passed: str = "(?!)"
    parts: tuple[tuple[frozenset[str], Callable[[Settings], dict[str, Any]]], ...] = ()
    needed: tuple[str, ...] = ()

    def read(
        self, settings: Settings, ignore: Collection[str] = (), more: Mapping[str, Reader] | None = None
    ) -> dict[str, Any]:
        """Return the settings for the class, by name, after a check of their types and ranges.

        Args:
            settings: the whole configuration.
            ignore: keys that the user chose to ignore.
            more: further accepted keys, with their readers; they are checked but not returned.

        Raises:
            Refused: for an unknown key, or a value that is not accepted.
        """
        settings = Settings({key: settings[key] for key in settings if key not in ignore}, settings.file)
        for key in self.needed:
            if settings.get(key) is None:
                raise settings.refused(f"{key} is missing")
        looked = {**_LOOKED, **self.looked, **(more or {})}
        together = {key for keys, _ in self.parts for key in keys}
        found = {}
        for key in settings:
            if settings[key] is None or key in together:
                continue
            if key in self.used:
                found[key] = self.used[key](settings, key)
            elif key in looked:
                looked[key](settings, key)
            elif not (_PASSED.fullmatch(key) or re.fullmatch(self.passed, key)):
                name = repr(key[:80])
                raise settings.refused(
                    f"{name[1:-1]}={shown(settings[key])} is not known here and might change what the network "
                    f"computes; if it does not, pass ignore=({name},)"
                )
        for _, read in self.parts:
            found |= read(settings)
        return found


_BODY = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), SIZE)
_BODY |= {"num_attention_heads": SIZE, "max_position_embeddings": _PLACES, "tie_word_embeddings": FLAG}
_DECODER = _BODY | {"num_key_value_heads": SIZE, "head_dim": SIZE, "hidden_act": _ACTIVATION, "rms_norm_eps": _EPSILON}
_ENCODER = {"position_embedding_type": _only("absolute")}
_TRAINED = "(debug|ep_size|fuse_cross_entropy|micro_forward|skip_checkpoint)"  # SDAR's trainer

CLASSES: dict[str, Allowed] = {
    "LlamaForCausalLM": Allowed(_DECODER | {"attention_bias": FLAG, "mlp_bias": FLAG}, parts=(_ROPE, _WINDOWS)),
    "Qwen2ForCausalLM": Allowed(
        _DECODER, {"use_mrope": _only(False)}, "attention_bias", (_ROPE, _WINDOWS)
    ),  # its projections always have a bias
    "Qwen3ForCausalLM": Allowed(_DECODER | {"attention_bias": FLAG}, {}, _TRAINED, (_ROPE, _WINDOWS)),
    "GPT2LMHeadModel": Allowed(
        {
            **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head", "n_inner"), SIZE),
            "n_positions": _PLACES,
            "activation_function": _ACTIVATION,
            "layer_norm_epsilon": _EPSILON,
            "tie_word_embeddings": FLAG,
        },
        {
            "scale_attn_weights": _only(True),
            "scale_attn_by_inverse_layer_idx": _only(False),
            "reorder_and_upcast_attn": _only(False),
        },
        r"n_ctx|summary_\w+|intermediate_size",  # the class reads n_inner
    ),
    "BertForMaskedLM": Allowed(
        _BODY | {"hidden_act": _ACTIVATION, "type_vocab_size": SIZE, "layer_norm_eps": _EPSILON},
        _ENCODER,
        r"pooler_\w+|directionality",
    ),
    "RobertaForMaskedLM": Allowed(
        {
            **_BODY,
            "hidden_act": _ACTIVATION,
            "type_vocab_size": SIZE,
            "layer_norm_eps": _EPSILON,
            "pad_token_id": _whole(0),
        },
        _ENCODER,
    ),
    "ModernBertForMaskedLM": Allowed(
        {
            **_BODY,
            **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "decoder_bias"), FLAG),
            "hidden_activation": _ACTIVATION,
            "norm_eps": _EPSILON,
            "local_attention": SIZE,
        },
        _ENCODER,
        r"classifier_\w+|deterministic_flash_attn|sparse_pred\w+|reference_compile|repad_logits_with_grad|layer_norm_eps",
        ((NESTED, modernbert_rope),),
        ("num_hidden_layers",),
    ),
    "EsmForMaskedLM": Allowed(
        {
            **_BODY,
            "layer_norm_eps": _EPSILON,
            "position_embedding_type": _word("absolute", "rotary"),
            "emb_layer_norm_before": FLAG,
            "token_dropout": FLAG,
            "mask_token_id": _whole(0),
            "pad_token_id": _whole(0),
        },
        {
            "hidden_act": _only("gelu"),
            "rope_theta": _only(10000.0),
            "is_folding_model": _only(False),
            "esmfold_config": _only(),
        },
        "vocab_list",
        ((frozenset(), _places),),
    ),
    "DiffusionGemmaForBlockDiffusion": Allowed(
        {"tie_word_embeddings": FLAG},
        {"canvas_length": SIZE, "text_config": lambda settings, key: settings.part(key)},
        # only text is sampled: keys of images are ignored, and no image tower is built
        r"vision_config|audio_config|vision_soft_tokens_per_image",
        needed=("text_config",),
    ),
    "DiffusionGemmaTextConfig": Allowed(
        {
            **_BODY,
            **dict.fromkeys(
                ("num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads", "sliding_window",
                 "num_experts", "top_k_experts", "moe_intermediate_size"), SIZE,
            ),
            "hidden_activation": _ACTIVATION,
            "rms_norm_eps": _EPSILON,
            "attention_bias": FLAG,
            "final_logit_softcapping": _number("(0, inf)"),
            "bos_token_id": _whole(0),
        },
        {
            "use_bidirectional_attention": _only("vision"),
            "attention_k_eq_v": _only(True),
            "enable_moe_block": _only(True),
            "hidden_size_per_layer_input": _only(0),
            "num_kv_shared_layers": _only(0),
            "use_double_wide_mlp": _only(False),
        },
        "vocab_size_per_layer_input",
        ((NESTED, layered_rope), (frozenset({"per_layer_config"}), _overrides)),
        ("vocab_size", "num_hidden_layers"),
    ),
}  # fmt: skip

_EXPERTS = _BODY | dict.fromkeys(("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"), SIZE)
_EXPERTS |= {"hidden_act": _ACTIVATION, "rms_norm_eps": _EPSILON}

AUTHORS: dict[str, Allowed] = {
    # OLMo's switches; with LLaDA's values Llama computes the same
    "LLaDA": Allowed(
        {
            **dict.fromkeys(("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size"), SIZE),
            **dict.fromkeys(("vocab_size", "embedding_size"), SIZE),
            "mlp_ratio": _number("(0, 1024]"),
            "max_sequence_length": _PLACES,
            "rms_norm_eps": _EPSILON,
            "include_qkv_bias": FLAG,
            "weight_tying": FLAG,
        },
        {
            "activation_type": _only("silu"),
            "block_type": _only("llama"),
            "block_group_size": _only(1),
            "layer_norm_type": _only("rms"),
            "layer_norm_with_affine": _only(True),
            "rope": _only(True),
            "rope_full_precision": _only(True),
            **dict.fromkeys(
                ("alibi", "scale_logits", "input_emb_norm", "attention_layer_norm", "bias_for_layer_norm",
                 "include_bias", "multi_query_attention"), _only(False),
            ),
        },
        r"alibi_bias_max|attention_layer_norm_with_affine|flash_attention|init_\w+|precision|tie_word_embeddings",
        (_ROPE,),
        ("d_model", "n_heads", "n_layers", "max_sequence_length", "vocab_size"),
    ),
    "LLaDA-MoE": Allowed(
        {
            **_EXPERTS,
            **dict.fromkeys(("expert_intermediate_size", "dense_intermediate_size"), SIZE),
            "norm_topk_prob": FLAG,
            "attention_bias": FLAG,
        },
        {
            "qk_layernorm": _only(True),
            "moe_router_score_function": _only("softmax"),
            "moe_router_enable_expert_bias": _only(False),
            "routed_scaling_factor": _only(1),
            "moe_layer_freq": _ones,
        },
        parts=(_ROPE, _WINDOWS),
        needed=("hidden_size", "num_attention_heads", "expert_intermediate_size", "num_experts"),
    ),
    "LLaDA2": Allowed(
        {
            **_EXPERTS,
            **dict.fromkeys(("n_group", "topk_group", "moe_intermediate_size"), SIZE),
            **dict.fromkeys(("num_shared_experts", "first_k_dense_replace"), _whole(0)),
            "routed_scaling_factor": _number("(0, inf)"),
            "use_qk_norm": FLAG,
            "use_qkv_bias": FLAG,
        },
        {
            "norm_topk_prob": _only(True),
            "score_function": _only("sigmoid"),
            "router_dtype": _only("fp32"),
            "use_rmsnorm": _only(True),
            "moe_router_enable_expert_bias": _only(True),
            **dict.fromkeys(
                ("use_bias", "norm_head", "norm_softmax", "using_split_qkv_in_self_attention"), _only(False),
            ),
        },
        r"num_nextn_predict_layers|mtp_loss_scaling_factor|moe_shared_expert_intermediate_size",
        ((FLAT | {"rotary_dim"}, _rotated), _WINDOWS),
        ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts"),
    ),
}  # fmt: skip
