r"""Merge low-rank adapters, as PEFT saves them, into the weights of their base.

    W <- W + s B A        s = alpha / r, or alpha / sqrt(r) with ``use_rslora``

W is a weight of the base. A and B are the adapter's two matrices for it, of rank r. The adapter's configuration gives
alpha. B A is transposed for layers that store (in, out) (``fan_in_fan_out``) and for embeddings. Whole modules, biases
and embedding tables in the adapter's file replace those of the base. Methods with another formula, such as DoRA, are
refused by name.

References: LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685); rsLoRA (Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732).
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from discdiff.adapters.settings import Settings

__all__ = ["is_adapter", "merged"]

_AROUND = "base_model.model."
_PASSED_OVER = {  # settings of training, or those that the names of the weights show too
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_USED = {"lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
_OWN_STARTS = ("gaussian", "orthogonal", "eva")  # change A and B only; others start from a changed base


def is_adapter(names: Mapping[str, object]) -> bool:
    """Return whether the names of weights are those of an adapter."""
    return any(".lora_A" in name or ".lora_embedding_A" in name for name in names)


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], said: Settings, tied: bool) -> dict[str, Tensor]:
    """Return the base's weights with an adapter merged into them.

    Args:
        base: the weights of the base by name.
        adapter: the weights in the adapter's file by name.
        said: the contents of adapter_config.json.
        tied: whether the base's output layer shares the weights of its embedding table.

    Raises:
        Refused: if the method is not LoRA, settings are unknown, or names or shapes do not fit the base.
    """
    _check(said)
    found = dict(base)
    left = {name.removeprefix(_AROUND).replace(".base_layer.", "."): part for name, part in adapter.items()}
    for name in [name for name in sorted(left) if ".lora_" not in name]:
        if name not in found or found[name].shape != left[name].shape:
            raise said.refused(f"{name} is saved with the adapter, and the base has none of that name and shape")
        found[name] = left.pop(name).to(found[name].dtype)
    for name in sorted(left):
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name)
        if match is None:
            continue
        module, table = match[1], bool(match[2])
        up = left.pop(_other(name), None)
        down = left.pop(name)
        weight = found.get(f"{module}.weight")
        if weight is None or up is None:
            lost = f"{module}.weight of the base" if weight is None else _other(name)
            raise said.refused(f"{name} needs {lost}, which is not there")
        if table and tied:
            raise said.refused(f"{name} adapts a table of embeddings that is the output layer too, and is not read")
        found[f"{module}.weight"] = _sum(weight, up, down, said, module, table)
    if left:
        raise said.refused(f"{min(left)} is of an adapter that is not read; merge it by PEFT's merge_and_unload()")
    return found


def _check(said: Settings) -> None:
    kind = said.word("peft_type")
    if kind != "LORA":
        raise said.refused(f"peft_type must be LORA, got {kind}; merge it by PEFT's merge_and_unload() and save that")
    start = said.get("init_lora_weights")
    if isinstance(start, str) and start not in _OWN_STARTS:
        raise said.refused(f"init_lora_weights must be one of true, {', '.join(_OWN_STARTS)}, got {start}")
    for key, value in said.items():
        if key not in _PASSED_OVER | _USED and value not in (None, False, [], {}, ""):
            raise said.refused(f"{key} is not read; merge it by PEFT's merge_and_unload() and save that")


def _other(name: str) -> str:
    return re.sub(r"\.lora_(embedding_)?A(?=(\.weight)?$)", r".lora_\1B", name)


def _sum(weight: Tensor, up: Tensor, down: Tensor, said: Settings, module: str, table: bool) -> Tensor:
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise said.refused(
            f"{module}: B A must be a product of matrices, got {tuple(up.shape)} and {tuple(down.shape)}"
        )
    rank = down.shape[0]
    alpha = _alpha(said, module)
    scale = alpha / (math.sqrt(rank) if said.flag("use_rslora", default=False) else rank)
    change = (up.float() @ down.float()) * scale
    if table or said.flag("fan_in_fan_out", default=False):
        change = change.T
    if change.shape != weight.shape:
        raise said.refused(f"{module}: B A is {tuple(change.shape)}, and the base's weight {tuple(weight.shape)}")
    return (weight.float() + change).to(weight.dtype)


def _alpha(said: Settings, module: str) -> float:
    """Return the alpha of the first pattern that ends the module's name, else the common alpha."""
    patterns = said.part("alpha_pattern")
    for pattern in patterns:
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise patterns.refused(f"{pattern} must be the end of a module's name; other patterns are not read")
        if f".{module}".endswith(f".{pattern}") or pattern == f"^{module}":
            return patterns.number(pattern)
    return said.number("lora_alpha", default=8.0)
