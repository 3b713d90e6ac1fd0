"""Refuse quantized weights with the name of their method; they are never converted."""

import re
from collections.abc import Mapping

from torch import Tensor

from discdiff.adapters.settings import Refused, Settings

__all__ = ["check_settings", "check_tensors"]

_NAMES = {
    "GPTQ or AWQ": r"qweight|qzeros|g_idx",
    "FP8": r"weight_scale_inv|weight_scale|input_scale",
    "bitsandbytes": r"absmax|nested_absmax|quant_map|SCB|quant_state\..*",
    "HQQ": r"W_q",
    "compressed-tensors": r"weight_packed",
}


def check_settings(config: Settings) -> None:
    """Check that a configuration is not that of quantized weights.

    Raises:
        Refused: if the weights are quantized; the error names the method and a remedy.
    """
    for table in (config, config.part("text_config")):
        for key in ("quantization_config", "compression_config"):
            said = table.part(key)
            if said:
                raise _refused(f"{said.word('quant_method', default=key)}, by {said.file}", config.file)


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that no names or dtypes of tensors are those of quantized weights.

    Raises:
        Refused: if the tensors are quantized weights; the error names the method and a remedy.
    """
    for name, tensor in tensors.items():
        method = next((one for one, ends in _NAMES.items() if re.search(rf"(^|\.)({ends})$", name)), None)
        if method is not None:
            raise _refused(f"{method}, by {name}", where)
        if "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
            raise _refused(f"{tensor.dtype}, by {name}", where)


def _refused(how: str, where: str) -> Refused:
    return Refused(
        f"{where}: the weights are quantized ({how}); load those that are not, or dequantize them, for instance by "
        "transformers' model.dequantize(), and save that"
    )
