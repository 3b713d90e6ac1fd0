"""``load``: from a path or a hub's id to a ``Denoiser``, by the convention of the family it belongs to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from discdiff.adapters.files import Files
from discdiff.checks import shown
from discdiff.convention import Convention, Loaded
from discdiff.plugins import plugged
from discdiff.schedule import Schedule

__all__ = ["Asked", "Family", "load"]


@dataclass(frozen=True)
class Asked:
    """What the user settles, None where he leaves it to the files."""

    mask_id: int | None = None
    schedule: Schedule | None = None
    block: int | None = None
    mask_source: str = "given"
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: what it is called.
        about: whose it is and what it is, in a line.
        recognises: whether files are of this kind; it reads configurations and the names of weights only.
        build: the network with its weights, and its convention.
        kinds: the values of ``model_type`` in config.json that it has.
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
    files = Files(_fetched(source))
    chosen = _chosen(files, known, family)
    network, convention = chosen.build(files, Asked(mask_id, schedule, block))
    network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    model = convention.denoiser(network)
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
    if len(fitting) == 1:
        return fitting[0]
    if "architectures" in files.config:
        what = f"architectures {files.config['architectures']}"
    else:
        what = f"its weights' names ({', '.join(list(files.shapes)[:3])})"
    found = " and ".join(one.name for one in fitting)
    raise ValueError(
        f"load: {files.path} is recognised by {found or 'no family'} from {what}; "
        f"pass family= one of {', '.join(names)}"
    )


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


def fit(network: nn.Module, weights: dict[str, torch.Tensor], where: Path) -> None:
    """Put weights into a network, all of them.

    Raises:
        ValueError: if some are missing, left over or of another shape, which are named.
    """
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = {
        "missing": sorted(own.keys() - given.keys()),
        "left over": sorted(given.keys() - own.keys()),
        "of another shape": sorted(name for name in own.keys() & given.keys() if own[name] != given[name]),
    }
    told = [f"{len(names)} {kind}, such as {', '.join(names[:3])}" for kind, names in wrong.items() if names]
    if told:
        raise ValueError(f"load: the weights of {where} do not fit a {type(network).__name__}: {'; '.join(told)}")
    network.load_state_dict(weights)
