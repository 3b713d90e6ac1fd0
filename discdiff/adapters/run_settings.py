"""Read configurations of MDLM and its relatives as one flat table, from hub folders, checkpoints or Hydra's YAML.

Only the tables of the model, the algorithm, the noise, the graph and the data are merged into it. Those of trainer,
optimiser, loader, logger and evaluation are ignored. A setting that changes the network and is not supported here is
refused by name, unless the user passes it in ``ignore=``.
"""

import re
from collections.abc import Mapping

from discdiff.adapters.files import Files
from discdiff.adapters.inert import plain
from discdiff.adapters.settings import Settings
from discdiff.checks import shown

__all__ = ["check_known", "configuration", "said"]

_TABLES = ("model", "algo", "noise", "graph", "data")
_LARGEST = 24  # the power of two of the largest block
_GELU = ("gelu", "gelu_tanh", "gelu_new", "gelu_pytorch_tanh")
# settings that change the network, with the values supported here
_ONE: dict[str, tuple[object, ...]] = {
    "activation": _GELU,
    "activation_type": _GELU,
    "attention_bias": (False,),
    "attn_soft_cap": (),
    "causal": (False,),
    "causal_attention": (False,),
    "head_dim": (),
    "hidden_act": _GELU,
    "layer_norm_eps": (1e-5,),
    "logit_soft_cap": (),
    "mlp_ratio": (4,),
    "n_kv_heads": (),
    "norm_eps": (1e-5,),
    "norm_type": ("layernorm",),
    "num_key_value_heads": (),
    "qk_norm": (False,),
    "residual_scale": (1,),
    "right_shift_logits": (False,),
    "rope_scaling": (),
    "rope_theta": (10_000,),
    "rotary_base": (10_000,),
    "self_conditioning": (False,),
    "shift_logits": (False,),
    "sliding_window": (),
    "temb_strategy": ("adaln",),
    "use_qk_norm": (False,),
}
_READ = {
    "adaln", "block_size", "cond_dim", "cross_attn", "hidden_dim", "hidden_size", "mask_token_id", "n_blocks",
    "n_heads", "num_attention_heads", "num_hidden_layers", "scale_by_sigma", "time_conditioning", "vocab_size",
}  # fmt: skip
# keys of the hub's folders: batch sizes, training, and what every configuration of transformers has
_PASSED = {
    "_attn_implementation", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures",
    "attn_backend", "attn_implementation", "auto_map", "bos_token_id", "cfg", "cfg_num_classes",
    "chunk_size_feed_forward", "cls_token_id", "cross_attention_hidden_size", "decoder_start_token_id", "dropout",
    "dtype", "eos_token_id", "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length",
    "max_length", "model_length", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
    "problem_type", "pruned_heads", "return_dict", "sampling_eps_max", "sampling_eps_min", "sep_token_id",
    "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_bfloat16", "use_cache", "var_min",
}  # fmt: skip
_STRICT = ("mdlm", "duo", "udlm", "bd3lm")  # families whose hub configurations are known completely


def said(files: Files) -> Settings:
    """Return config.json, else the hyperparameters in a Lightning checkpoint, else the YAML of a training run."""
    if files.config:
        return files.config
    held = plain(files.saved.get("hyper_parameters"))
    inside = held.get("config", held) if isinstance(held, dict) else {}
    if isinstance(inside, dict) and inside:
        known = {name: value for name, value in inside.items() if isinstance(name, str)}
        return Settings(known, f"hyper_parameters of {files.chosen}")
    return files.run


def configuration(files: Files) -> Settings:
    """Return the configuration as one flat table; if a key occurs twice, the inner value is taken.

    The keys "type", "name" and "eps" of an inner table get the table's name as prefix, as in "noise_type".

    Raises:
        Refused: a ValueError, if ``block_weights`` is invalid.
    """
    whole = said(files)
    tables = {part for part in _TABLES if isinstance(whole.get(part), Mapping)}
    flat = {name: _resolved(value, whole) for name, value in whole.items() if name not in tables}
    for part in _TABLES:
        inner = whole.get(part)
        if isinstance(inner, Mapping):
            own = ("type", "name", "eps")
            named = {(f"{part}_{name}" if name in own else name): value for name, value in inner.items()}
            flat |= {name: _resolved(value, whole) for name, value in named.items() if isinstance(name, str)}
    found = Settings(flat, whole.file)
    return found | _in_blocks(found, files)


def check_known(config: Settings, files: Files, ignore: tuple[str, ...]) -> None:
    """Raise Refused if a setting changes, or may change, the network to one that is not supported here."""
    whole = said(files)
    for part in _TABLES:
        whole.part(part)
    for key, accepted in _ONE.items():
        value = config.get(key)
        right = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted)
        if value is not None and key not in ignore and not right:
            only = " or ".join(map(repr, accepted)) or "absent"
            raise config.refused(f"{key} must be {only}, the only network of this family here, got {shown(value)}")
    if files.config.get("model_type") not in _STRICT:
        return
    there = {key for key, value in files.config.items() if value is not None}
    strange = sorted(there - {*_READ, *_PASSED, *_ONE, *_TABLES, *ignore})
    if strange:
        raise files.config.refused(
            f"{', '.join(map(shown, strange[:3]))} may change the network and is not known here; "
            f"pass ignore=[{strange[0]!r}] if it does not"
        )


def _resolved(value: object, whole: Mapping[str, object]) -> object:
    """Resolve a reference of Hydra such as "${model.length}"; return any other value as it is."""
    pointed = re.fullmatch(r"\$\{([\w.]{1,200})\}", value) if isinstance(value, str) else None
    if pointed is None:
        return value
    found: object = whole
    for name in pointed[1].split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _in_blocks(config: Settings, files: Files) -> dict[str, object]:
    """Return BlockGen's noise and largest block size, from a run's configuration or else from folder names."""
    algorithm = str(config.get("algo_name", ""))
    if config.get("type") != "block-dit" and not algorithm.startswith("blockgen-"):
        return {}
    noise = algorithm.rpartition("-")[2]
    named = files.path.absolute().as_posix()
    found = [noise] if noise else [kind for kind in ("absorb", "uniform") if f"/{kind}" in named]
    size = re.search(r"block_size/([0-9]{1,6})/", named)
    several = _block_weights(config)
    sizes = {"block_size": several} if several else {} if size is None else {"block_size": int(size[1])}
    return {"in_blocks": found[0] if len(found) == 1 else "", **sizes}


def _block_weights(config: Settings) -> int | None:
    """Return the largest block size with a positive weight in ``block_weights``; None without weights.

    The weights are for sizes 1, 2, 4, ...: "0.05 0.0 0.95" gives 4.

    Raises:
        Refused: if the weights are invalid.
    """
    told = config.word("block_weights", default="").split()
    try:
        weights = [float(weight) for weight in told]
    except ValueError as error:
        raise config.refused(f"block_weights must hold numbers, got {shown(' '.join(told))}") from error
    if not told:
        return None
    if len(weights) > _LARGEST or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise config.refused(f"block_weights must hold 1 to {_LARGEST} weights, got {shown(' '.join(told))}")
    return 2 ** max(n for n, weight in enumerate(weights) if weight > 0)
