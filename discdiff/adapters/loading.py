"""Load a ``Denoiser`` from a path or a hub repository, with the convention of its family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from discdiff.adapters.averages import Which
from discdiff.adapters.convention import Convention, Loaded
from discdiff.adapters.files import Files
from discdiff.adapters.hub import Hub
from discdiff.adapters.nearest import unknown
from discdiff.adapters.settings import Refused
from discdiff.checks import decided, listing, meant, placed, shown, whole
from discdiff.plugins import plugged
from discdiff.process import Schedule

__all__ = ["Asked", "Family", "load"]


@dataclass(frozen=True)
class Asked:
    """The user's choices for a family's ``build``; a choice is None if it is left to the files.

    Attributes:
        mask_id, schedule, block, ignore, weights, network: as in ``load``.
        mask_source: the source of ``mask_id``, such as "config.json"; "given" if the user passed it.
    """

    mask_id: int | None = None
    schedule: Schedule | None = None
    block: int | None = None
    mask_source: str = "given"
    ignore: tuple[str, ...] = ()
    weights: Which | None = None
    network: nn.Module | None = None


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: the family's name.
        about: a description in one line, with the authors.
        recognises: returns whether files are of this family, by file names, configurations and names of weights.
        build: makes the network with its weights, and its convention.
        kinds: the values of ``model_type`` in config.json by which the family is recognised, if any.
    """

    name: str
    about: str
    recognises: Callable[[Files], bool]
    build: Callable[[Files, Asked], tuple[nn.Module, Convention]]
    kinds: tuple[str, ...] = ()


def load(
    source: str | Path,
    *,
    family: str | None = None,
    mask_id: int | None = None,
    schedule: Schedule | None = None,
    block: int | None = None,
    network: nn.Module | None = None,
    file: str | None = None,
    weights: Which | None = None,
    ignore: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    families: Sequence[Family] | None = None,
    quiet: bool = False,
) -> Loaded:
    """Make a denoiser from files: recognise the family, infer its convention and print it on standard error.

    No code from the files runs. Configurations are read as JSON or YAML. Weights are read from safetensors, numpy
    archives or torch files; objects of foreign classes in torch files are kept as data. If a folder has several files
    of weights, one with a usual name such as model.safetensors is taken, else the file named ``last``, else the one
    with the most training steps in its name. A LoRA adapter in PEFT's format is merged into the weights of its base.

    Args:
        source: a folder as ``save_pretrained`` writes it, a file of weights, or "owner/name" of a repository on the
            hub, with a folder after it if needed. Only JSON, YAML, text and weights are fetched, no code.
        family: the family's name, if the files do not determine it (``discdiff list`` shows all).
        mask_id: the mask's id, if the files disagree or have none.
        schedule: the schedule for sampling; the family's own by default.
        block: the block size of a network that denoises in blocks, if its files do not have it.
        network: your own network, if ``save`` wrote the folder from such a network; the weights are put into it.
        file: the name of the file of weights in the folder, or of a folder in it such as "checkpoint-500".
        weights: "raw" for the weights as trained, "ema" for their moving average; by default "ema" if the files have
            an average.
        ignore: keys of the configuration that ``load`` would refuse, but that you know not to change the network.
        dtype: the dtype to convert the weights to; unchanged by default.
        device: where to put the network.
        revision: a branch, a tag or a commit of a repository on the hub.
        token: for a private repository on the hub.
        cache_dir: the folder for files fetched from the hub.
        families: the families to try; by default those of the package and of installed plug-ins.
        quiet: print nothing.

    Returns:
        The denoiser in evaluation mode, with attributes ``convention`` and ``network``. ``probe`` tests the convention.
        To correct it, use ``dataclasses.replace(model.convention, shift=True).denoiser(model.network)``.

    Raises:
        FileNotFoundError: if ``source`` does not exist or has no weights.
        TypeError: if an argument has a wrong type.
        ValueError: if no family recognises the files. Also if the files are damaged, too large or quantized, do not
            fit the family's network, or disagree on the mask's id. The text is "load: SOURCE (family NAME): FILE: ...".
        ImportError: if a needed package is missing.
    """
    asked = _asked(mask_id, schedule, block, ignore, weights, network)
    hub = _hub(source, revision, token, cache_dir, file)
    device = placed(device, "load: device")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load: dtype must be a torch.dtype of real numbers, got {shown(dtype)}")
    decided(quiet, "load: quiet")
    known = tuple(families) if families is not None else every_family()
    found = ""
    try:
        files = Files(hub.found(source), file, weights, hub)
        chosen = _chosen(files, known, family)
        found = f" (family {chosen.name})"
        if network is not None and chosen.name != "saved":
            raise Refused("this is no folder that save wrote, so network= is not to be given")
        made, convention = chosen.build(files, asked)
        averaged = chosen.name != "saved" and files.averaged  # the record of a saved model states what its weights are
        convention = replace(convention, files=files.chosen, weights="ema" if averaged else convention.weights)
        if weights == "ema" and convention.weights != "ema":
            raise Refused(f"{files.chosen} holds no averages of its weights, and weights='ema' asks for them")
    except Refused as error:
        raise ValueError(f"load: {source}{found}: {error}") from error
    made = made.to(device=device, dtype=dtype).eval().requires_grad_(False)
    keep_settings(made, chosen.name, files.config, asked.ignore)
    model = convention.denoiser(made)
    if not quiet:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"{source}: {chosen.about}", markup=False)
        for name, value in convention.lines().items():
            console.print(f"  {name + ':':<16}{value}", markup=False)
    return model


def _asked(
    mask_id: object,
    schedule: Schedule | None,
    block: object,
    ignore: object,
    weights: Which | None,
    network: nn.Module | None,
) -> Asked:
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"load: schedule must be a Schedule, got {shown(schedule)}")
    if weights not in (None, "raw", "ema"):
        raise ValueError(f"load: weights must be 'raw', 'ema' or None, got {shown(weights)}")
    keys = listing(ignore, "load: ignore")
    if not all(isinstance(key, str) for key in keys):
        raise TypeError(f"load: ignore must hold names of settings, got {shown(keys)}")
    if network is not None and not isinstance(network, nn.Module):
        raise TypeError(f"load: network must be a module, got {shown(network)}")
    return Asked(
        None if mask_id is None else whole(mask_id, "load: mask_id", 0),
        schedule,
        None if block is None else whole(block, "load: block", 1),
        ignore=tuple(keys),
        weights=weights,
        network=network,
    )


def _hub(source: object, revision: object, token: object, cache_dir: object, file: object) -> Hub:
    if not isinstance(source, str | Path):
        raise TypeError(f"load: source must be a path or an id of the hub, got {shown(source)}")
    for name, value in {"revision": revision, "token": token, "file": file}.items():
        if value is not None and not isinstance(value, str):
            said = "" if name == "token" else f", got {shown(value)}"
            raise TypeError(f"load: {name} must be a string{said}")
    if cache_dir is not None and not isinstance(cache_dir, str | Path):
        raise TypeError(f"load: cache_dir must be a path, got {shown(cache_dir)}")
    return Hub(revision, token, cache_dir, file)  # type: ignore[arg-type]


def every_family() -> tuple[Family, ...]:
    """Return this package's families, then those of installed plug-ins (entry points ``discdiff.families``)."""
    from discdiff.adapters import FAMILIES  # imported here, as it imports every family, and those this module

    found, _ = plugged("families")
    wrong = [name for name, one in found.items() if not isinstance(one, Family)]
    if wrong:
        raise TypeError(f"load: the entry point group 'discdiff.families' must hold Family objects; {wrong} are none")
    return (*FAMILIES, *(one for one in found.values() if isinstance(one, Family)))


def _chosen(files: Files, known: Sequence[Family], name: str | None) -> Family:
    names = [one.name for one in known]
    if name is not None:
        if name not in names:
            raise ValueError(f"load: there is no family {shown(name)}{meant(name, names)}; known: {', '.join(names)}")
        return known[names.index(name)]
    fitting = [one for one in known if one.recognises(files)]
    fitting = [one for one in fitting if one.name == "saved"] or fitting  # our own record precedes config.json
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise Refused(f"{' and '.join(one.name for one in fitting)} recognise it; pass family= one of them")
    raise unknown(files, {one.name: one.kinds for one in known})


def keep_settings(network: nn.Module, family: str, settings: Mapping[str, object], ignore: tuple[str, ...]) -> None:
    """Store on a network the settings that it was built from, for ``save``; settings stored earlier are kept."""
    network.__dict__.setdefault("foreign_settings", (family, dict(settings), ignore))


def fit(network: nn.Module, weights: Mapping[str, Tensor], files: Files | None = None) -> None:
    """Put all weights into a network, converted to the dtype of its parameters.

    A network on the meta device (``with torch.device("meta"): network = ...``) takes no memory until it gets the
    weights, so wrong sizes are reported before memory is used. Buffers that are not in the ``state_dict`` get no values
    from the weights, so they must be made on another device.

    Args:
        network: the network; weights must have the names and shapes in its ``state_dict``.
        weights: the weights by name.
        files: the checkpoint that the weights are from; the error names its file.

    Raises:
        Refused: if weights are missing or left over, have another shape, or are integers in place of floating-point
            numbers or the reverse; the error names these weights.
        RuntimeError: if a buffer that is not in the ``state_dict`` is on the meta device.
    """
    own = network.state_dict()
    both = sorted(own.keys() & weights.keys())
    wrong = {
        "missing": sorted(own.keys() - weights.keys()),
        "left over": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} in place of {tuple(own[name].shape)}"
            for name in both
            if weights[name].shape != own[name].shape
        ],
        "of another kind": [
            f"{name} {weights[name].dtype} in place of {own[name].dtype}"
            for name in both
            if weights[name].is_floating_point() != own[name].is_floating_point()
        ],
    }
    told = [f"{len(names)} {kind}, such as {', '.join(names[:3])}" for kind, names in wrong.items() if names]
    if told:
        where = f"{files.chosen}: " if files is not None else ""
        raise Refused(f"{where}the weights do not fit a {type(network).__name__}: {'; '.join(told)}")
    unmade = any(tensor.is_meta for tensor in own.values())
    network.load_state_dict({name: weights[name].to(own[name].dtype) for name in both}, assign=unmade)
    lost = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if lost:
        raise RuntimeError(f"fit: the buffers {', '.join(lost)} are not saved; make them outside the meta device")
