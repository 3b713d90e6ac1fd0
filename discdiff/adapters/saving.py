"""Write a denoiser to a folder (``Denoiser.save``), and define the family by which ``load`` reads such folders.

    discdiff.json         the convention, the process and how the network is built
    model.safetensors     the network's weights (in several files, if transformers writes them so)
    config.json           the author's settings, if the network is of a class of transformers

A network of this package is recorded by its name and arguments. A network of a class of transformers is rebuilt by its
family from its author's settings. Any other network must be passed to ``load`` as ``network=``, because a file cannot
name a class to import.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from discdiff.adapters.archives import opened, owned
from discdiff.adapters.builders import built, described_network
from discdiff.adapters.convention import Called, Convention, Loaded
from discdiff.adapters.documents import is_there, json_table
from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family, every_family, fit, keep_settings
from discdiff.adapters.record import clock_of, convention_of, described, dtype_of, known, recorded
from discdiff.adapters.settings import Refused, Settings
from discdiff.checks import decided, shown
from discdiff.denoiser import Denoiser
from discdiff.process import Schedule

__all__ = ["SAVED", "save"]

FORMAT = 1
_RECORD, _WEIGHTS = "discdiff.json", "model.safetensors"
_BY_HAND = "by hand"


def save(model: Denoiser, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Save a model to a folder that ``load`` reads, as ``Denoiser.save`` does; return the folder's path.

    Raises:
        TypeError: if an argument has a wrong type.
        FileExistsError: if ``folder`` is a file, or a folder that is not empty. With ``overwrite=True`` a folder that
            holds a saved model is replaced.
        ValueError: if a part of the model cannot be written; the error names it.
    """
    target = _free(folder, decided(overwrite, "save: overwrite"))
    network, convention = _parts(model)
    kind, tensors, settings = _network(network, convention)
    weights, tied = ({}, {}) if tensors is None else _distinct(tensors)
    clock = None if model.process == convention.process else described(model.process.schedule, "save: the schedule")
    record = {
        "format": FORMAT,
        "network": kind,
        "convention": recorded(convention),
        "direct": not isinstance(model.fn, Called),
        "length": model.length,
        "time_dtype": model.call.time_dtype and str(model.call.time_dtype).removeprefix("torch."),
        "clock": clock,
        "tied": tied,
        "name": model.name,
        "cost": model.cost,
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        if tensors is None:
            _written(_inner(network), beside)
            (beside / "generation_config.json").unlink(missing_ok=True)  # the convention holds its contents
            (beside / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        else:
            save_file(weights, beside / _WEIGHTS, metadata={"format": "pt"})
        (beside / _RECORD).write_text(text + "\n", encoding="utf-8")
        _put(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _written(network: Any, folder: Path) -> None:  # noqa: ANN401
    """Write the weights by the names of transformers' class, which every version of transformers reads."""
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network.save_pretrained(folder)
    finally:
        if shows:
            logging.enable_progress_bar()


# --- the folder -------------------------------------------------------------------------------------------------------


def _free(folder: object, overwrite: bool) -> Path:
    """Return the folder's resolved path after a check that it may be written."""
    if not isinstance(folder, str | Path):
        raise TypeError(f"save: folder must be a path, got {shown(folder)}")
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"save: {folder} is a file; a folder is written")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise FileExistsError(f"save: {folder} is not empty; pass overwrite=True to replace what was saved there")
        if not (target / _RECORD).is_file():
            raise FileExistsError(f"save: {folder} holds no {_RECORD}, so it is no saved model, and is not overwritten")
    return target


def _put(written: Path, target: Path) -> None:
    """Move a written folder to its target; set an old target aside first, and restore it if the move fails."""
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(written, target)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    os.replace(target, aside)
    try:
        os.replace(written, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


# --- the contents -----------------------------------------------------------------------------------------------------


def _parts(model: Denoiser) -> tuple[nn.Module, Convention]:
    """Return the model's network and its convention.

    Raises:
        ValueError: if the model's function is not a module, or the model has guides, a context or a head.
    """
    for name, held in (("guides", model.guides), ("context", model.context), ("head", model.call.head)):
        if held:
            raise ValueError(f"save: its {name} cannot be written: {shown(held)}; save the denoiser without")
    fn = model.fn
    if not isinstance(fn, nn.Module):
        raise ValueError(f"save: {fn!r} is no module, so there are no weights to write")
    call, own = model.call, model.call.process
    columns = own.columns if model.predicts == "ratio" else own.vocab_size
    made = Convention(
        _BY_HAND, own, model.predicts, columns, "none needed" if own.mask_id is None else "given", time=call.time,
        shift=call.shift, suppress=call.suppress, scalar_time=call.scalar_time, ids="", clock="",
    )  # fmt: skip
    if not isinstance(fn, Called):
        return fn, made
    usual, names = fn.convention.call, ("time", "shift", "suppress", "scalar_time")  # what differs from it is kept
    said = {name: getattr(made, name) for name in names if getattr(call, name) != getattr(usual, name)}
    return fn.network, replace(fn.convention, process=own, predicts=model.predicts, **said)


def _network(
    network: nn.Module, convention: Convention
) -> tuple[dict[str, object], dict[str, Tensor] | None, dict[str, Any]]:
    """Return how to rebuild a network, its weights (None if transformers writes them), and its author's settings."""
    state = network.state_dict()
    wrong = [name for name, part in state.items() if not isinstance(part, Tensor) or part.is_meta or part.is_sparse]
    if wrong:
        raise ValueError(f"save: {', '.join(wrong[:3])} of {type(network).__name__} cannot be written as tensors")
    inner, (family, settings, ignore) = _inner(network), getattr(network, "foreign_settings", ("", {}, ()))
    if settings and inner is not None and convention.family != _BY_HAND:
        for name, value in (("rounds", 0), ("block", convention.block)):
            if inner is not network and getattr(network, name, value) != value:
                raise ValueError(f"save: {name} of its {type(network).__name__} is not {value}, as its family makes it")
        with torch.device("meta"):
            own = type(inner)(inner.config).state_dict()
        held = inner.state_dict()
        _same(inner, {name: part for name, part in own.items() if name in held}, held)  # the family may drop parts
        return {"family": family, "ignore": list(ignore)}, None, settings
    try:
        kind = described_network(network)
    except (AttributeError, TypeError) as error:
        raise _changed(network, str(error)) from error
    if kind is None:
        return {"class": type(network).__name__}, state, {}
    with torch.device("meta"):
        own = built(Settings({"network": kind}, _RECORD).part("network"), 1 << 20).state_dict()
    _same(network, own, state)
    if len(_dtypes(state)) > 1:
        raise ValueError(
            f"save: the weights of a {type(network).__name__} must have one dtype, got {' and '.join(_dtypes(state))}"
        )
    return kind, state, {}


def _inner(network: nn.Module) -> Any:  # noqa: ANN401
    """Return the network, or the one in its attribute ``network``, if it is of transformers; else None."""
    held = [network, getattr(network, "network", None)]
    return next((one for one in held if hasattr(one, "save_pretrained") and hasattr(one, "config")), None)


def _same(network: nn.Module, built: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    """Raise ValueError if the weights differ in names or shapes from those of a new network of the class."""
    shapes = [{name: tuple(part.shape) for name, part in state.items()} for state in (built, held)]
    changed = [name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)]
    if changed:
        raise _changed(network, ", ".join(sorted(changed)[:3]))


def _changed(network: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"save: this {type(network).__name__} has other parts than its class makes ({what}); a quantized network is "
        "saved before it is quantized"
    )


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, as a copy, and a map from further names of a tensor to its first name."""
    first: dict[tuple[object, ...], str] = {}
    found, tied = dict[str, Tensor](), dict[str, str]()
    for name, part in state.items():
        key = (part.data_ptr(), part.device, part.dtype, tuple(part.shape), part.stride())
        if part.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            found[name] = part.detach().to("cpu", copy=True).contiguous()
    return found, tied


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved(Convention):
    """A convention together with further settings of a saved ``Denoiser``."""

    direct: bool = False
    length: int | None = None
    time_dtype: torch.dtype | None = None
    retimed: Schedule | None = None
    own_name: str = "model"
    cost: float | None = None

    def denoiser(self, network: nn.Module) -> Loaded:
        model = Loaded(network, Convention(**{one.name: getattr(self, one.name) for one in fields(Convention)}))
        model.call = replace(model.call, length=self.length, time_dtype=self.time_dtype)
        model.name, model.cost = self.own_name, self.cost
        if self.direct:
            model.fn = network
        return model if self.retimed is None else model.with_schedule(self.retimed)


def _build(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    network, convention = _built(files, asked)
    try:
        convention.denoiser(network)
    except (TypeError, ValueError) as error:
        raise Refused(f"{_RECORD}: {error}") from error
    return network, convention


def _built(files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
    if asked.mask_id is not None or asked.block is not None:
        raise Refused(f"{_RECORD} says the mask and the block; neither is to be given")
    said = json_table(files.folder / _RECORD)
    known(said, {"format", "network", "convention", "direct", "length", "time_dtype", "clock", "tied", "name", "cost"})
    said.whole("format", least=1, most=FORMAT)
    part = said.part("network")
    if "class" not in part and asked.network is not None:
        raise Refused(f"{_RECORD} says how its network is built; network= is not to be given")
    if "family" in part:
        convention = _convention(said, asked, files.shapes.values())
        return _by_family(part, files, convention), convention
    weights = _weights(said, files)
    convention = _convention(said, asked, [tuple(tensor.shape) for tensor in weights.values()])
    network = _given(part, asked.network) if "class" in part else _own(part, weights)
    for name, held in chain(network.named_parameters(), network.named_buffers()):
        if name in weights and held.is_floating_point() and weights[name].is_floating_point():
            held.data = held.data.to(weights[name].dtype)
    fit(network, weights, files)
    return network, convention


def _convention(said: Settings, asked: Asked, shapes: Iterable[tuple[int, ...]]) -> _Saved:
    """Read the convention; sizes and ids in its process are bounded by the largest size in ``shapes``."""
    largest = max((size for shape in shapes for size in shape), default=1)
    given = convention_of(said.part("convention"), largest + 1)
    if asked.schedule is not None and given.get("time") == "t":
        raise Refused("this network is told t of its own clock; use load(...).with_schedule(schedule)")
    clock = clock_of(said.part("clock"), largest) if said.get("clock") is not None else None
    direct, length = said.flag("direct"), said.whole("length", least=1, default=None)
    dtype = dtype_of(said, "time_dtype")
    name, cost = said.word("name", default="model"), said.number("cost", interval="[0, inf)", default=None)
    clock = asked.schedule or clock
    try:
        return _Saved(**given, direct=direct, length=length, time_dtype=dtype, retimed=clock, own_name=name, cost=cost)
    except (TypeError, ValueError) as error:
        raise said.refused(str(error)) from error


def _by_family(part: Settings, files: Files, convention: Convention) -> nn.Module:
    """Build a network of a class of transformers from its author's settings in config.json."""
    known(part, {"family", "ignore"})
    families = {one.name: one for one in every_family() if one is not SAVED}
    chosen = families[part.word("family", accepted=families)]
    ignore = [key for key in part.items_of("ignore") if isinstance(key, str)]
    asked = Asked(mask_id=convention.process.mask_id, block=convention.block, ignore=tuple(ignore))
    network, _ = chosen.build(files, asked)
    keep_settings(network, chosen.name, files.config, asked.ignore)
    return network


def _given(part: Settings, network: nn.Module | None) -> nn.Module:
    """Return the user's own network; raise Refused if none was passed."""
    known(part, {"class"})
    if network is None:
        raise Refused(f"its network is a {part.word('class')} of the user's own: pass load(..., network=) such a one")
    return network


def _own(part: Settings, weights: dict[str, Tensor]) -> nn.Module:
    """Build a network of this package on the meta device, where it takes no memory."""
    dtypes = _dtypes(weights)
    if len(dtypes) > 1:
        raise Refused(f"{_WEIGHTS}: its weights must have one dtype, got {' and '.join(dtypes)}")
    with torch.device("meta"):
        return built(part, len(weights))


def _dtypes(weights: dict[str, Tensor]) -> list[str]:
    return sorted({str(tensor.dtype) for tensor in weights.values() if tensor.is_floating_point()})


def _weights(said: Settings, files: Files) -> dict[str, Tensor]:
    """Return the weights by the network's own names; prefixes of names are kept."""
    file = files.folder / _WEIGHTS
    found = owned(opened(file), [file])
    tied = said.part("tied")
    for name in tied:
        other = tied.word(name)
        if other not in found or name in found:
            raise tied.refused(f"{name} must name another weight that is in {_WEIGHTS}, got {shown(other)}")
    return found | {name: found[tied.word(name)] for name in tied}


SAVED = Family(
    "saved",
    "written by save",
    lambda files: files.path.is_dir() and is_there(files.folder / _RECORD),
    _build,
)
