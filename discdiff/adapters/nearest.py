"""The family nearest to files that no family recognises, by the name of their model and their weights' names."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from discdiff.adapters.files import Files
from discdiff.adapters.settings import Refused

__all__ = ["unknown"]


# Weight name -> a family whose network has it, the most specific first.
_TELLING = (
    (r".*self_attn\.q_norm\.weight", "A2D-Qwen3"),
    (r".*self_attn\.q_proj\.bias", "A2D-Qwen2"),
    (r".*self_attn\.q_proj\.weight", "A2D-Llama"),
    (r"(.*\.)?esm\.encoder\..*", "ESM-2"),
    (r"(.*\.)?bert\.encoder\..*", "BERT"),
)
_OF_EXPERTS = r".*\.experts\..*"


def unknown(files: Files, known: Mapping[str, tuple[str, ...]]) -> Refused:
    """Make the error for files that no family recognises: it names their model and the nearest family.

    Args:
        files: the files of the checkpoint.
        known: the families' names, with the ``model_type`` values of each.
    """
    said = files.config.word("model_type", default=None)
    named = [str(one) for one in files.config.items_of("architectures")]
    if said is not None:
        what = f"model_type {said!r}" + (f" (architectures {', '.join(named)})" if named else "")
    elif named:
        what = f"the architectures {', '.join(named)}"
    else:
        what = f"its weights' names ({', '.join(list(files.shapes)[:3])})"
    name = _nearest(files, known, said or (named[0] if named else ""))
    if name is None:
        return Refused(f"no family recognises {what}; pass family= one of {', '.join(known)}")
    block = files.config.get("block_size")
    size = block if isinstance(block, int) and not isinstance(block, bool) else "..."
    call = f"load(family={name!r}, block={size})" if _in_blocks(files) else f"load(family={name!r})"
    return Refused(f"no family recognises {what}; the nearest is {name}: {call}; known: {', '.join(known)}")


def _in_blocks(files: Files) -> bool:
    """Whether it may be causal between blocks: its configuration mentions a block, or its weights are a decoder's."""
    return any("block" in key for key in files.config) or any(".self_attn." in name for name in _names(files))


def _nearest(files: Files, known: Mapping[str, tuple[str, ...]], said: str) -> str | None:
    """Choose by the weights if they are specific, else by similar names."""
    weights = _names(files)
    if not any(re.fullmatch(_OF_EXPERTS, weight) for weight in weights):
        for pattern, name in _TELLING:
            if name in known and any(re.fullmatch(pattern, weight) for weight in weights):
                return name
    kinds = {kind.lower(): name for name, own in known.items() for kind in (*own, name)}
    return next((kinds[kind] for kind in get_close_matches(said.lower()[:64], list(kinds), 1)), None)


def _names(files: Files) -> Sequence[str]:
    """Return the names of the weights; empty if there are none, which is reported elsewhere."""
    try:
        return list(files.shapes)
    except (FileNotFoundError, Refused):
        return []
