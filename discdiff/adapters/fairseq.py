"""Load RoBERTa as fairseq's trainer saves it: one file of weights and arguments, with a list of words beside it.

The network runs as transformers' RoBERTa, with sequences between <s> and </s>. A vocabulary of fairseq is <s>, <pad>,
</s>, <unk>, then the words of dict.txt, and finally <mask>.

References: RoBERTa (Liu et al., 2019, https://arxiv.org/abs/1907.11692), for instance Sapiens (Prihoda et al., 2022,
https://doi.org/10.1080/19420862.2021.2020203).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from discdiff.adapters.convention import Convention
from discdiff.adapters.files import Files
from discdiff.adapters.hosted import native
from discdiff.adapters.in_transformers import masked
from discdiff.adapters.inert import plain
from discdiff.adapters.loading import Asked, Family, keep_settings
from discdiff.adapters.settings import Refused, Settings
from discdiff.checks import shown

__all__ = ["FAIRSEQ"]

_START, _PAD, _END, _UNKNOWN = range(4)
_BODY = r"(?:decoder|encoder)\.sentence_encoder\."
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_WORDS, _PLACES = (f"roberta.embeddings.{name}_embeddings.weight" for name in ("word", "position"))
_INNER = "roberta.encoder.layer.0.intermediate.dense.weight"
_ENDS = {
    "embed_tokens.weight": _WORDS,
    "embed_positions.weight": _PLACES,
    "emb_layer_norm.weight": "roberta.embeddings.LayerNorm.weight",
    "emb_layer_norm.bias": "roberta.embeddings.LayerNorm.bias",
    "layernorm_embedding.weight": "roberta.embeddings.LayerNorm.weight",  # since 0.12
    "layernorm_embedding.bias": "roberta.embeddings.LayerNorm.bias",
}
# The arguments that change the network, with the values at which it is transformers' RoBERTa.
_SAME: dict[str, tuple[object, ...]] = {
    "activation_fn": ("gelu",),
    "encoder_learned_pos": (True,),
    "no_token_positional_embeddings": (False,),
    "layernorm_embedding": (True,),
    "encoder_layers_to_keep": (None,),
    "untie_weights_roberta": (False,),
    "no_scale_embedding": (True,),
}


def _recognises(files: Files) -> bool:
    own = "model_type" not in files.config  # fairseq writes no config.json
    return own and any(re.fullmatch(_BODY + r"layers\.0\.fc1\.weight", name) for name in files.shapes)


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to transformers' names, add a table of token types of zeros, and drop classifiers."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        inner, body = re.sub("^" + _BODY, "", name), re.match(_BODY, name) is not None
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", inner)
        if body and layer and layer[2] in _LAYER:
            found[f"roberta.encoder.layer.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"] = tensor
        elif body and inner in _ENDS:
            found[_ENDS[inner]] = tensor
        elif head := re.fullmatch(r"(?:decoder|encoder)\.lm_head\.(.+)", name):
            found["lm_head." + ("decoder.weight" if head[1] == "weight" else head[1])] = tensor
        elif not re.match(r"(decoder\.|encoder\.)?classification_heads\.", name) and not name.endswith(".version"):
            found[name] = tensor
    if _WORDS in found:
        found["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros_like(found[_WORDS][:1])
    return found


def _arguments(files: Files) -> Settings:
    """Return the training arguments: the namespace "args", or the table "model" in "cfg" since fairseq 0.12."""
    saved = files.saved
    told = plain(saved.get("args"))
    if not isinstance(told, dict):
        config = plain(saved.get("cfg"))
        told = config.get("model") if isinstance(config, dict) else None
        told = plain(told) if isinstance(told, Mapping) else None
    if not isinstance(told, dict):
        raise Refused("it holds no arguments of its training (args, or cfg), which say the number of heads")
    return Settings({str(key): value for key, value in told.items()}, "args")


def _build(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    said = _arguments(files)
    weights = _renamed({name: torch.empty(shape, device="meta") for name, shape in files.shapes.items()})
    for key, accepted in _SAME.items():
        if key in said and said[key] not in accepted and key not in asked.ignore:
            raise said.refused(f"{key} must be {accepted[0]}, got {shown(said[key])}; no other is known here")
    missing = [theirs for theirs in (_WORDS, _PLACES, _INNER) if theirs not in weights or weights[theirs].ndim != 2]
    if missing:
        raise Refused(f"the weights lack a matrix {missing[0]}")
    rows, width = weights[_WORDS].shape
    places, layers = len(weights[_PLACES]), len({n for name in weights for n in re.findall(r"\.layer\.(\d+)\.", name)})
    heads = said.whole("encoder_attention_heads", least=1)
    if width % heads or rows < _UNKNOWN + 2:
        raise said.refused(f"encoder_attention_heads must divide the width {width} of {rows} tokens, got {heads}")
    settings = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": len(weights[_INNER]),
        "max_position_embeddings": places,
        "type_vocab_size": 1,
        "pad_token_id": _PAD,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }
    network, passed = native("RobertaForMaskedLM", settings, files, _renamed)
    keep_settings(network, "RoBERTa", {"model_type": "roberta", **settings}, ())
    mask, source = files.mask_id(rows - 1, asked.mask_id)
    process, beyond = masked(rows, mask, files, asked, source)
    behind = 1 - said.number("leave_unmasked_prob", default=0.0) - said.number("random_token_prob", default=0.0)
    notes = (
        () if behind > 1e-6 else ("its training hid tokens behind others, never behind the mask: masks are new to it",)
    )
    return network, Convention(
        "RoBERTa-fairseq",
        process,
        "denoiser",
        rows,
        mask_source=source,
        suppress=(*beyond, _PAD, _UNKNOWN),
        returns="logits",
        attention="ones",
        longest=places - (_PAD + 1) - 2,  # positions begin after that of the padding
        frame=(_START, _END),
        notes=notes + passed,
    )


FAIRSEQ = Family(
    "RoBERTa-fairseq", "RoBERTa as fairseq saves it, run as transformers' (Liu et al., 2019)", _recognises, _build
)
