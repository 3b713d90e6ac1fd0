"""Find weights, or their exponential moving averages, in the files of trainers.

Weights are at the top level, or under one of ``state_dict``, ``model_state_dict``, ``model``, ``module`` (DeepSpeed),
``params``, ``network``, ``net``. Averages are under ``state_dict_ema``, ``ema_state_dict``, ``ema``, ``model_ema``,
``ema_model``, ``params_ema`` or ``shadow_params``. They may also be among the weights, with a prefix such as
``ema_model.``. Averages are a table of tensors, which may be nested under further such names, or a list in the order of
the parameters. In JAX files the path of an average is the weight's path with ``ema_params`` in place of ``params``.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from discdiff.adapters.inert import Inert, tensors_in
from discdiff.adapters.settings import Refused

__all__ = ["Which", "bare", "weights_of"]

Which = Literal["raw", "ema"]
_RAW = ("state_dict", "model_state_dict", "model", "module", "params", "network", "net")
_AVERAGED = ("state_dict_ema", "ema_state_dict", "ema", "model_ema", "ema_model", "params_ema", "shadow_params")
_AMONG = ("ema_model.", "model_ema.", "ema.", "params_ema.")
_COUNTERS = re.compile(r"((ema_model|model_ema|ema)\.)?(n_averaged|num_updates|decay|initted|step)")
_JAX = re.compile(r"(.*[/.])?ema_params[/.].+")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_AROUND = ("module.", "base_model.model.")
_COMPUTED = re.compile(
    r"(.*\.)?(rotary_emb\..*|inv_freq|position_ids|noise\..*|sampling_eps_.*|limiting_distribution|logit_bias)"
)

Tensors = dict[str, Tensor]


def bare(tensors: Mapping[str, Tensor]) -> Tensors:
    """Remove the prefixes that wrappers (compilation, FSDP, DDP, DeepSpeed, PEFT) add to names.

    Raises:
        Refused: if two tensors have the same name without prefixes.
    """
    found = _renamed(tensors, [_WRAPPERS.sub("", name) for name in tensors])
    while True:
        around = next((one for one in _AROUND if found and all(name.startswith(one) for name in found)), None)
        if around is None:
            return found
        found = _renamed(found, [_WRAPPERS.sub("", name.removeprefix(around)) for name in found])


def _renamed(tensors: Mapping[str, Tensor], names: list[str]) -> Tensors:
    found = dict(zip(names, tensors.values(), strict=True))
    if len(found) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise Refused(f"two of its tensors have the name {twice} once the wrappers' prefixes are gone")
    return found


def weights_of(held: Mapping[str, Any], which: Which | None, where: str) -> tuple[Tensors, bool]:
    """Find the weights in the contents of files; also return whether they are averages.

    Args:
        held: the contents: tensors by name, possibly inside the tables that trainers save.
        which: "raw", "ema", or None to take averages if there are any.
        where: the name of the file, for errors.

    Raises:
        Refused: if there are no weights of the kind ``which``, or the averages do not fit the weights.
    """
    found = _raw(held, where)
    beside = {name: part for name, part in found.items() if _JAX.fullmatch(name)}
    if beside and which != "raw":
        return beside, True
    raw, among = _divided({name: part for name, part in found.items() if name not in beside})
    if which != "raw":
        average = _averaged(held, where) or among
        if average:
            return (_merged(average, raw, where) if raw else _named(average, where)), True
    if which == "ema":
        raise Refused(f"{where} holds no averages of its weights, and weights='ema' asks for them")
    if not raw:
        more = "; its averages are taken by weights='ema'" if which == "raw" else ""
        raise Refused(f"{where} holds no tensors by name under {_keys(held)}{more}")
    return raw, False


def _raw(held: Mapping[Any, Any], where: str, deep: int = 2) -> Tensors:
    """Return the weights by name; the table may also hold averages, under names with a prefix."""
    for key in _RAW if deep else ():
        inner = held.get(key)
        if isinstance(inner, Inert):
            raise Refused(f"{where} holds a whole {type(inner).__name__}, which is code; save its state_dict()")
        found = _raw(inner, where, deep - 1) if isinstance(inner, Mapping) else {}
        if found:
            return found
    return bare(_tensors(held, where))


def _tensors(table: Mapping[Any, Any], where: str) -> Tensors:
    """Return the tensors of a table by name, without the counters of averages.

    Raises:
        Refused: if a weight or a bias is an object of another class.
    """
    found = {name: value for name, value in table.items() if isinstance(value, Tensor) and isinstance(name, str)}
    for name, value in table.items() if found else ():
        if isinstance(value, Inert) and str(name).endswith((".weight", ".bias")):
            raise Refused(f"{where}: {name} must be a plain tensor, got a {type(value).__name__}")
    return {name: value for name, value in found.items() if not (value.numel() == 1 and _COUNTERS.fullmatch(name))}


def _divided(raw: Tensors) -> tuple[Tensors, Tensors]:
    """Split a table into its weights and its averages; the names of averages have a prefix."""
    for prefix in _AMONG:
        average = {name.removeprefix(prefix): part for name, part in raw.items() if name.startswith(prefix)}
        if average:
            rest = {name: part for name, part in raw.items() if not name.startswith(prefix)}
            online = {name.removeprefix("online_model."): part for name, part in rest.items()}
            return online, bare(average)
    return raw, {}


def _averaged(held: Mapping[str, Any], where: str) -> Tensors | list[Tensor]:
    """Return averages by name, or as a list in the order of the weights; empty if there are none.

    Raises:
        Refused: if tensors under a name of averages are neither a table nor a list.
    """
    for key in _AVERAGED:
        found = _average(held.get(key), where, 2)
        if found:
            return found
        if any(part.numel() > 1 for part in tensors_in(held.get(key))):
            raise Refused(f"{where}: what lies under {key} is no average that is known; weights='raw' passes it over")
    return {}


def _average(value: object, where: str, deep: int) -> Tensors | list[Tensor]:
    """Return the averages in a value, nested in at most ``deep`` tables; the result is empty if there are none."""
    if isinstance(value, Inert):
        value = value.state
    if isinstance(value, list | tuple):
        tensors = [part for part in value if isinstance(part, Tensor)]
        return tensors if len(tensors) == len(value) else []
    if not isinstance(value, Mapping):
        return {}
    for key in (*_AVERAGED, "shadow", *_RAW) if deep else ():
        found = _average(value.get(key), where, deep - 1)
        if found:
            return found
    raw, among = _divided(bare(_tensors(value, where)))
    return among or raw


def _named(average: Tensors | list[Tensor], where: str) -> Tensors:
    if isinstance(average, list):
        raise Refused(f"{where} holds a list of averages, and no weights that give them names")
    return average


def _merged(average: Tensors | list[Tensor], raw: Tensors, where: str) -> Tensors:
    """Replace weights by their averages; keep buffers that have no average.

    Raises:
        Refused: if the averages differ from the weights in number, names or shapes.
    """
    if isinstance(average, list):
        return raw | _paired(average, raw, where)
    names = _places(average, raw)
    if names is None:
        lost = next(iter(average))
        raise Refused(f"{where}: the averages, such as {lost}, are not of its weights, such as {next(iter(raw))}")
    found = {names[name]: part for name, part in average.items()}
    odd = next((name for name, part in found.items() if part.shape != raw[name].shape), None)
    if odd is not None:
        raise Refused(
            f"{where}: the average of {odd} must have its shape {tuple(raw[odd].shape)}, got {tuple(found[odd].shape)}"
        )
    return raw | found


def _paired(average: list[Tensor], raw: Tensors, where: str) -> Tensors:
    """Give the averages of a list the names of their weights.

    The list has an average of every parameter, of every parameter that is not recomputed, or of every tensor.
    """
    first: dict[object, str] = {}  # the first name of tied parameters, which are listed once
    alias = {
        name: first.setdefault((part.data_ptr(), part.shape) if part.numel() else name, name)
        for name, part in raw.items()
    }
    learned = [name for name in dict.fromkeys(alias.values()) if raw[name].is_floating_point()]
    shapes = [part.shape for part in average]
    for names in (learned, [name for name in learned if not _COMPUTED.fullmatch(name)], list(raw)):
        if [raw[name].shape for name in names] == shapes:
            by_name = dict(zip(names, average, strict=True))
            return by_name | {
                name: by_name[own] for name, own in alias.items() if own in by_name and name not in by_name
            }
    raise Refused(f"{where}: its {len(average)} averages are not of its {len(learned)} parameters, in number or shapes")


def _places(average: Tensors, raw: Tensors) -> dict[str, str] | None:
    """Map the name of each average to the name of its weight; return None if names do not match.

    The names of averages may have a further prefix, or those of weights may. Some trainers remove the dots from the
    names of averages.
    """
    for names in (
        {name: name for name in raw},
        {name.replace(".", ""): name for name in raw},
    ):
        if len(names) < len(raw):
            continue
        one = next(iter(average))
        for longer in [name for name in names if name.endswith(one)]:
            prefix = longer.removesuffix(one)
            if all(prefix + name in names for name in average):
                return {name: names[prefix + name] for name in average}
        for shorter in [name for name in names if one.endswith(name)]:
            prefix = one.removesuffix(shorter)
            if all(name.startswith(prefix) and name.removeprefix(prefix) in names for name in average):
                return {name: names[name.removeprefix(prefix)] for name in average}
    return None


def _keys(held: Mapping[Any, Any]) -> str:
    names = [str(name) for name in held]
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "") if names else "nothing"
