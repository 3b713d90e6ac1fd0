"""Read the settings of rotary positions and return them in a form that transformers 4.57 and 5 both accept.

Version 4.57 writes ``rope_theta`` and ``rope_scaling``; version 5 writes a single table ``rope_parameters``. Both are
read. Each ``rope_type`` has its own numbers, and other keys are refused. The type "dynamic" is refused, as its
frequencies depend on earlier inputs.
"""

from typing import Any

from discdiff.adapters.settings import Settings
from discdiff.checks import shown

__all__ = ["FLAT", "NESTED", "flat_rope", "layered_rope", "modernbert_rope"]

FLAT = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
NESTED = frozenset({"layer_types", "rope_parameters", "rope_scaling", "rope_theta"})
NESTED |= {"global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"}
_POSITIVE, _SHARE = "(0, inf)", "(0, 1]"
# the numbers of each kind: their interval, and whether they are required
_NUMBERS: dict[str, dict[str, tuple[str, bool]]] = {
    "default": {},
    "linear": {"factor": (_POSITIVE, True)},
    "yarn": {
        "factor": (_POSITIVE, True),
        "attention_factor": (_POSITIVE, False),
        "beta_fast": (_POSITIVE, False),
        "beta_slow": (_POSITIVE, False),
        "mscale": (_POSITIVE, False),
        "mscale_all_dim": ("[0, inf)", False),
        "original_max_position_embeddings": ("[1, inf)", False),
    },
    "llama3": {
        "factor": (_POSITIVE, True),
        "low_freq_factor": (_POSITIVE, True),
        "high_freq_factor": (_POSITIVE, True),
        "original_max_position_embeddings": ("[1, inf)", True),
    },
    "proportional": {"factor": (_POSITIVE, False)},
}
_KINDS = ("default", "linear", "llama3", "yarn")
_LAYERS = ("full_attention", "sliding_attention")


def _table(table: Settings, theta: float, kinds: tuple[str, ...], share: bool) -> dict[str, Any]:
    """Read one table: its ``rope_type``, its base ``rope_theta`` and the numbers of this type.

    Raises:
        Refused: for an unknown type or key, or a number outside its interval.
    """
    kind = table.word("rope_type", "type", accepted=kinds, default="default")
    found: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": table.number("rope_theta", interval=_POSITIVE, default=theta),
    }
    for key, (interval, needed) in _NUMBERS[kind].items():
        if needed or table.get(key) is not None:
            whole = key == "original_max_position_embeddings"
            found[key] = table.whole(key, least=1, most=1 << 24) if whole else table.number(key, interval=interval)
    if kind == "yarn" and table.get("truncate") is not None:
        found["truncate"] = table.flag("truncate")
    if share and table.get("partial_rotary_factor") is not None:
        found["partial_rotary_factor"] = table.number("partial_rotary_factor", interval=_SHARE)
    elif table.number("partial_rotary_factor", interval=_SHARE, default=1.0) != 1:
        raise table.refused("partial_rotary_factor must be 1 for this network")
    known = {*found, "type", "partial_rotary_factor"}
    for key in table:
        if key not in known and table[key] is not None:
            raise table.refused(f"{key} is not a number of rope_type {kind!r}")
    return found


def flat_rope(settings: Settings, partial: float | None = None, theta: float = 10000.0) -> dict[str, Any]:
    """Return ``rope_theta``, ``rope_scaling`` and, if ``partial`` is not None, ``partial_rotary_factor``.

    Args:
        settings: a configuration; the keys in ``FLAT`` are read.
        partial: the default share of a head that rotates; None for a network that rotates whole heads.
        theta: the default base.

    Raises:
        Refused: if the configuration has both ``rope_scaling`` and ``rope_parameters``, or if ``rope_theta``
            or ``partial_rotary_factor`` has one value in the given table and another outside it. Also if a key or a
            ``rope_type`` is unknown, or a number is not accepted.
    """
    if settings.get("rope_scaling") and settings.get("rope_parameters"):
        raise settings.refused("rope_scaling and rope_parameters are both given; keep one")
    table = settings.part("rope_parameters" if settings.get("rope_parameters") else "rope_scaling")
    for key in ("rope_theta", "partial_rotary_factor"):
        if None not in (settings.get(key), table.get(key)) and settings[key] != table[key]:
            raise settings.refused(
                f"{key} is {shown(settings[key])}, but {shown(table[key])} in {table.file}; keep one"
            )
    outer = settings.number("rope_theta", interval=_POSITIVE, default=theta)
    found = _table(table, outer, _KINDS, partial is not None)
    said: dict[str, Any] = {"rope_theta": found.pop("rope_theta")}
    share = settings.number("partial_rotary_factor", interval=_SHARE, default=partial)
    share = found.pop("partial_rotary_factor", share)
    if partial is not None:
        said["partial_rotary_factor"] = share
    elif share is not None and share != 1:
        raise settings.refused(f"partial_rotary_factor must be 1 for this network, got {share}")
    return said | {"rope_scaling": None if found["rope_type"] == "default" else found}


def layered_rope(settings: Settings) -> dict[str, Any]:
    """Return DiffusionGemma's ``layer_types`` and ``rope_parameters``, with a table for each type of layer.

    Raises:
        Refused: a ValueError, if a type of layer is unknown or a table is not accepted.
    """
    tables = settings.part("rope_parameters")
    found = {}
    for name in tables:
        if name not in _LAYERS:
            raise tables.refused(f"{name} is no kind of layer; known: {', '.join(_LAYERS)}")
        found[name] = _table(tables.part(name), 10000.0, (*_KINDS, "proportional"), True)
    return {"layer_types": layer_types(settings)} | ({"rope_parameters": found} if found else {})


def layer_types(settings: Settings) -> list[str] | None:
    """Return the type of attention of each layer; None if the configuration has no ``layer_types``."""
    kinds = settings.items_of("layer_types")
    for kind in kinds:
        if kind not in _LAYERS:
            raise settings.refused(f"layer_types must be of {', '.join(_LAYERS)}, got {kind!r}")
    layers = settings.whole("num_hidden_layers", least=1)
    if kinds and len(kinds) != layers:
        raise settings.refused(f"layer_types must be num_hidden_layers = {layers} words, got {len(kinds)}")
    return [str(kind) for kind in kinds] or None


def modernbert_rope(settings: Settings) -> dict[str, Any]:
    """Return the types and rotary bases of ModernBERT's layers.

    Transformers 4.57 writes two rotary bases and a period: every so many layers, one has full attention. Version 5
    writes ``layer_types`` and ``rope_parameters``. Either form is read, and the result has the keys of both.

    Raises:
        Refused: if positions are scaled, or the layers with full attention are not evenly spaced from the first on.
    """
    if settings.get("rope_scaling"):
        raise settings.refused("rope_scaling changes what the network computes and is not supported for ModernBERT")
    period = settings.whole("global_attn_every_n_layers", least=1, default=3)
    layers = settings.whole("num_hidden_layers", least=1)
    kinds = layer_types(settings) or [_LAYERS[i % period != 0] for i in range(layers)]
    full = settings.number("global_rope_theta", "rope_theta", interval=_POSITIVE, default=160000.0)
    alone = "local_rope_theta" in settings and settings["local_rope_theta"] is None  # then the global base is used
    local = full if alone else settings.number("local_rope_theta", interval=_POSITIVE, default=10000.0)
    tables = settings.part("rope_parameters")
    thetas = {}
    for name, theta in zip(_LAYERS, (full, local), strict=True):
        thetas[name] = _table(tables.part(name), theta, ("default",), False)["rope_theta"]
    if not set(tables) <= set(_LAYERS):
        raise tables.refused(f"its keys must be {' and '.join(_LAYERS)}, got {', '.join(sorted(tables))}")
    wide = [i for i, kind in enumerate(kinds) if kind == _LAYERS[0]]
    period = wide[1] - wide[0] if len(wide) > 1 else layers
    if wide != list(range(0, layers, period)):
        raise settings.refused("layer_types must be full_attention at layer 0 and at equal distances from there")
    return {
        "layer_types": kinds,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": theta} for name, theta in thetas.items()},
        "global_attn_every_n_layers": period,
        "global_rope_theta": thetas["full_attention"],
        "local_rope_theta": thetas["sliding_attention"],
    }
