"""``load``: from a path or a hub's id to a ``Denoiser``, by the convention of the family it belongs to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from discdiff.adapters.files import Files
from discdiff.adapters.settings import Refused
from discdiff.checks import shown
from discdiff.convention import Convention, Loaded
from discdiff.plugins import plugged
from discdiff.schedule import Schedule

__all__ = ["Asked", "Family", "load"]


@dataclass(frozen=True)
class Asked:
    """What the user settles, None where he leaves it to the files; ``ignore`` names foreign settings to pass over."""

    mask_id: int | None = None
    schedule: Schedule | None = None
    block: int | None = None
    mask_source: str = "given"
    ignore: tuple[str, ...] = ()
    weights: Literal["raw", "ema"] | None = None
    network: nn.Module | None = None


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: what it is called.
        about: whose it is and what it is, in a line.
        recognises: whether files are of this kind; it reads configurations and the names of weights only.
        build: the network with its weights, and its convention.
        kinds: the values of ``model_type`` in config.json that it has, where it goes by them.
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
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    families: Sequence[Family] | None = None,
    quiet: bool = False,
) -> Loaded:
    """A denoiser from files: the family is recognised, its convention inferred and printed on standard error.

    Nothing on disk is run: configurations are read as JSON, weights as safetensors, arrays, or torch files of which
    everything but the weights is left inert.

    Args:
        source: a folder as ``save_pretrained`` writes it, a file of weights, or "owner/name", perhaps with a folder
            behind it, of a repository on the hub, whose JSON, text and weights are fetched.
        family: its name, where the files do not say it (``discdiff list`` has all).
        mask_id: the mask's id, where the files disagree or say nothing.
        schedule: the clock it is to be sampled on; the family's own by default.
        block: the block size, where a network of blocks does not say it.
        network: one of your own, which gets the weights of a folder that ``save`` wrote of such a one.
        dtype: what the weights are converted to; as they are by default.
        device: where to put the network.
        families: which to try, those of the package and of installed plug-ins by default.
        quiet: print nothing.

    Returns:
        The denoiser in evaluation mode, with ``convention`` and ``network``. What was inferred wrongly is corrected by
        ``dataclasses.replace(model.convention, shift=True).denoiser(model.network)``; ``probe`` tells what is wrong.

    Raises:
        FileNotFoundError: if there is nothing there.
        ValueError: if no family recognises the files, they do not fit the family's network, or their parts disagree
            on the mask's id.
        ImportError: if a package is needed that is not there.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"load: source must be a path or an id of the hub, got {shown(source)}")
    known = tuple(families) if families is not None else every_family()
    found = ""
    try:
        files = Files(_fetched(source))
        chosen = _chosen(files, known, family)
        found = f" (family {chosen.name})"
        if network is not None and chosen.name != "saved":
            raise Refused("this is no folder that save wrote, so network= is not to be given")
        made, convention = chosen.build(files, Asked(mask_id, schedule, block, network=network))
        convention = replace(convention, files=files.chosen)
    except Refused as error:
        raise ValueError(f"load: {source}{found}: {error}") from error
    made = made.to(device=device, dtype=dtype).eval().requires_grad_(False)
    made.__dict__["foreign_settings"] = dict(files.config)  # ``save`` writes them again
    model = convention.denoiser(made)
    if not quiet:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"{source}: {chosen.about}", markup=False)
        for name, value in convention.lines().items():
            console.print(f"  {name + ':':<16}{value}", markup=False)
    return model


def every_family() -> tuple[Family, ...]:
    """Our families, then those of installed packages (entry points of the group ``discdiff.families``)."""
    from discdiff.adapters import FAMILIES  # it imports every family, and those this module

    found, _ = plugged("families")
    wrong = [name for name, one in found.items() if not isinstance(one, Family)]
    if wrong:
        raise TypeError(f"load: the entry point group 'discdiff.families' must hold Family objects; {wrong} are none")
    return (*FAMILIES, *(one for one in found.values() if isinstance(one, Family)))


def _chosen(files: Files, known: Sequence[Family], name: str | None) -> Family:
    names = [one.name for one in known]
    if name is not None:
        if name not in names:
            raise ValueError(f"load: there is no family {name!r}; known: {', '.join(names)}")
        return known[names.index(name)]
    fitting = [one for one in known if one.recognises(files)]
    fitting = [one for one in fitting if one.name == "saved"] or fitting  # its own record comes before config.json
    if len(fitting) == 1:
        return fitting[0]
    if "architectures" in files.config:
        what = f"architectures {files.config['architectures']}"
    else:
        what = f"its weights' names ({', '.join(list(files.shapes)[:3])})"
    found = " and ".join(one.name for one in fitting)
    raise Refused(f"recognised by {found or 'no family'} from {what}; pass family= one of {', '.join(names)}")


def _fetched(source: str | Path) -> Path:
    """A path as it is; anything else of the form owner/name or owner/name/folder from the hub, without code."""
    path = Path(source)
    if path.exists() or isinstance(source, Path) or "/" not in source or source.startswith((".", "/", "~")):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"load: there is no file {source}, and hub ids need huggingface_hub: pip install 'discdiff[hf]'"
        ) from error
    owner, name, *within = source.split("/")
    kinds = ("*.json", "*.txt", "*.safetensors", "*.bin", "*.ckpt", "*.npz")
    wanted = ["/".join([*within, kind]) for kind in kinds]
    try:
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted)).joinpath(*within)
    except Exception as error:  # of many kinds, and none says that the path may have been meant
        raise FileNotFoundError(
            f"load: there is no file or folder {source}, and the hub gave nothing for it: {error}"
        ) from error


def fit(network: nn.Module, weights: Mapping[str, Tensor], files: Files | None = None) -> None:
    """Put weights into a network, all of them; they are converted to the dtype that its own parameters have.

    A network that was built on the meta device, ``with torch.device("meta"): network = ...``, gets them in the place of
    its own, so that sizes which do not fit are told before memory is asked for. A buffer that is not saved must be made
    outside of it.

    Args:
        network: whose names and shapes are compared with the weights'.
        weights: by name.
        files: where they are from, for the error.

    Raises:
        Refused: if some are missing, left over, of another shape or kind, which are named.
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
