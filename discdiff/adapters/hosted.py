"""Build a network of transformers from checked settings and weights; check names and shapes before memory is used.

Transformers' own checkpoint reading is not used. The network is built on the meta device and compared with the weights
by name and shape. Then it is built again with memory for its tables of positions only, and the weights are inserted.
So a configuration on disk cannot name a hub repository, a kernel or a quantization.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from discdiff.adapters.files import Files
from discdiff.adapters.settings import Refused

__all__ = ["native"]

Weights = dict[str, Tensor]
_COMPUTED = re.compile(r"(.*\.)?(inv_freq|position_ids|token_type_ids|attn\.(masked_)?bias)")
_HEADS = r"|(v_head|value_head|score|classifier|qa_outputs)\..+"
# by class, what a file may hold beside its network: computed tables, and heads that sampling does not use
_BESIDE = {
    "BertForMaskedLM": r"bert\.pooler\..+|cls\.(?!predictions\.).+",
    "RobertaForMaskedLM": r"roberta\.pooler\..+",
    "EsmForMaskedLM": r"esm\.(pooler|contact_head)\..+",
    "DiffusionGemmaForBlockDiffusion": r"model\.encoder\.(vision_tower|embed_vision)\..+",
}
# by class, parts that sampling does not use: removed if they have no weights
_UNUSED = {
    "EsmForMaskedLM": ("esm.contact_head",),
    "DiffusionGemmaForBlockDiffusion": ("model.encoder.vision_tower", "model.encoder.embed_vision"),
}
_TABLES = 1 << 30  # most bytes of computed tables beside the weights
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Unfilled(TorchFunctionMode):
    """While active, ``torch.empty`` takes no memory (meta device); other functions of torch work as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        return func(*args, **kwargs | {"device": "meta"}) if func is torch.empty else func(*args, **kwargs)


def native(
    name: str,
    settings: Mapping[str, Any],
    files: Files,
    rename: Callable[[Weights], Weights] = dict,
    **trial: Tensor,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a network of transformers by its class name; also return notes on weights that were ignored.

    Args:
        name: the name of the class.
        settings: all settings of its configuration, checked by ``Allowed.read``.
        files: the checkpoint with its weights.
        rename: returns the weights by the names that the class uses, given those on disk. It is called twice, first
            with tensors on the meta device.
        trial: arguments of a trial call; by default ``input_ids`` of one token.

    Raises:
        ImportError: if transformers is missing or too old to have the class.
        Refused: if the class refuses the settings, if weights are missing, left over, of another shape or not
            floating-point numbers, or if tied weights differ.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"load: {name} needs transformers: pip install 'discdiff[hf]'") from error
    if not hasattr(transformers, name):
        raise ImportError(f"load: transformers {transformers.__version__} has no {name}; a newer one has")
    cls = getattr(transformers, name)
    on_disk, what = files.shapes, f"config.json: {name} cannot be made of these settings"
    with _said(what), _quiet(transformers):
        shapes = rename({key: torch.empty(shape, device="meta") for key, shape in on_disk.items()})
        _counted(settings, shapes)
        attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
        configuration = cls.config_class(**settings, attn_implementation=attention)
        with torch.device("meta"):
            skeleton = cls(configuration)
        _without(skeleton, name, shapes)
        passed = _compared(skeleton, name, _joined(skeleton, shapes))
        computed = sum(part.nbytes for part in skeleton.buffers())
        if computed > _TABLES:
            raise Refused(f"config.json: tables of positions would take {computed} bytes, more than {_TABLES}")
        with _Unfilled():
            network = cls(configuration)
        _without(network, name, shapes)
    weights = files.weights
    with _said(what), _quiet(transformers), torch.no_grad():
        _fill(network, _joined(network, rename(weights)))
        network.eval().requires_grad_(False)
        network(**(trial or {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}))
    return network, passed


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn any error of transformers' code into a ``Refused`` that names the configuration."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # of any kind, as foreign code runs with foreign numbers
        raise Refused(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:  # noqa: ANN401
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)


def _counted(settings: Mapping[str, Any], weights: Weights) -> None:
    """Check, before modules are made, that settings give no more layers and experts than the weights have."""
    wide = max((max(part.shape, default=0) for part in weights.values()), default=0)
    for what, keys, pattern, otherwise in (
        ("layers", ("num_hidden_layers", "n_layer"), r".*?\b(?:layers?|h)\.(\d+)\..*", 0),
        ("experts", ("num_experts", "n_routed_experts"), r".*\bexperts\.(\d+)\..*", wide),
    ):
        there = {match[1] for match in (re.fullmatch(pattern, key) for key in weights) if match}
        most = len(there) or otherwise
        for table in (settings, settings.get("text_config", {})):
            for key in keys:
                if table.get(key, 0) > most:
                    raise Refused(f"config.json: {what} are {table[key]}, but the weights have {most}")


def _without(network: nn.Module, name: str, weights: Weights) -> None:
    """Remove parts without weights in the files, if sampling does not use them, so that no weights stay random."""
    for part in _UNUSED.get(name, ()):
        wanted = {f"{part}.{key}": tensor.shape for key, tensor in network.get_submodule(part).state_dict().items()}
        if not all(key in weights and weights[key].shape == shape for key, shape in wanted.items()):
            parent, _, last = part.rpartition(".")
            setattr(network.get_submodule(parent), last, None)


def _joined(network: nn.Module, weights: Weights) -> Weights:
    """Join the experts' weights: on disk each expert has its own tensors, in the network one tensor holds all."""
    found = dict(weights)
    for name, own in network.state_dict().items():
        for joint, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            if not name.endswith(f".experts.{joint}") or name in found:
                continue
            stem = name.removesuffix(joint)
            keys = [[f"{stem}{n}.{part}.weight" for part in parts] for n in range(own.shape[0])]
            if all(key in found for pair in keys for key in pair):
                found[name] = torch.stack([torch.cat([found.pop(key) for key in pair]) for pair in keys])
    return found


def _tied(network: nn.Module) -> list[list[str]]:
    """Return the names of tied tensors: a list for each tensor with several names."""
    groups: dict[int, list[str]] = {}
    for name, part in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(part), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _compared(network: nn.Module, name: str, weights: Weights) -> tuple[str, ...]:
    """Compare the weights with the network by name and shape; return a note on ignored weights.

    Raises:
        Refused: for weights that are missing, left over or of another shape.
    """
    own = {key: tuple(part.shape) for key, part in network.state_dict().items() if not _COMPUTED.fullmatch(key)}
    given = {key: tuple(part.shape) for key, part in weights.items()}
    beside = re.compile(_BESIDE.get(name, "(?!)") + _HEADS)
    passed = [key for key in given if key not in own and (_COMPUTED.fullmatch(key) or beside.fullmatch(key))]
    absent = own.keys() - given.keys()
    for group in _tied(network):
        if not absent.issuperset(group):
            absent -= set(group)
    wrong = {
        "missing": sorted(absent),
        "left over": sorted(given.keys() - own.keys() - set(passed)),
        "of another shape": [
            f"{key} {given[key]} instead of {own[key]}"
            for key in sorted(own.keys() & given.keys())
            if own[key] != given[key]
        ],
    }
    told = [f"{len(names)} {kind}, such as {', '.join(names[:3])}" for kind, names in wrong.items() if names]
    if told:
        raise Refused(f"the weights do not fit {name}: {'; '.join(told)}")
    more = f" and {len(passed) - 1} more" if len(passed) > 1 else ""
    return (f"passed over: {passed[0]}{more}, which sampling does not use",) if passed else ()


def _fill(network: Any, weights: Weights) -> None:  # noqa: ANN401
    """Insert the weights into the network, tied ones under all their names.

    Each weight gets the dtype that most weights have, or float32 where the class requires it.

    Raises:
        Refused: if tied weights differ, or weights are missing or not floating-point numbers.
    """
    own = network.state_dict()
    found = {key: part for key, part in weights.items() if key in own and not _COMPUTED.fullmatch(key)}
    sizes: Counter[torch.dtype] = Counter()
    for key, part in found.items():
        if part.dtype not in _DTYPES:
            raise Refused(f"the weight {key} is of {str(part.dtype).removeprefix('torch.')}, which is not supported")
        sizes[part.dtype] += part.numel()
    dtype = max(sizes, key=lambda one: sizes[one])
    exact = {*(network._keep_in_fp32_modules_strict or ()), *(network._keep_in_fp32_modules or ())}
    for key, part in found.items():
        wide = any(re.search(rf"\b{one}\b", key) for one in exact)
        found[key] = part.to(torch.float32 if wide else dtype)
    for group in _tied(network):
        there = [key for key in group if key in found]
        for key in there[1:]:
            if not torch.equal(found[key], found[there[0]]):
                raise Refused(
                    f"config.json: tie_word_embeddings makes {there[0]} and {key} one, but the file has two that "
                    "differ; set it to false if both are meant"
                )
        found |= {key: found[there[0]] for key in group if there}
    network.load_state_dict(found, strict=False, assign=True)
    network.tie_weights()
    empty = [key for key, part in (*network.named_parameters(), *network.named_buffers()) if part.is_meta]
    if empty:
        raise Refused(f"the weights do not fit {type(network).__name__}: {len(empty)} missing, such as {empty[0]}")
