"""Find the weight files of a folder: by the usual names, as shards with or without an index, or the newest."""

import re
from pathlib import Path, PurePosixPath

from discdiff.adapters.archives import KNOWN
from discdiff.adapters.documents import CONFIGURATION, is_there, json_table
from discdiff.adapters.settings import Refused
from discdiff.checks import shown

__all__ = ["ADAPTERS", "beside", "inside", "named_parts", "newest_folder", "parts", "weights_in"]

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_HUB = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_TRAINED = ("model.pt", "checkpoints-meta/checkpoint.pth")  # the names of the trainers of GIDD and SEDD
_ASIDE = re.compile(r"(optimi[sz]er|scheduler|scaler|rng_state|random_states|training_args|.*_optim_states).*")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<n>\d{5})-of-(?P<of>\d{5})(?P<end>\.\w+)")
_SHOWN = 6


def parts(folder: Path) -> list[Path]:
    """Return the weight files of a folder, which has several if the weights are in shards.

    A file with a usual name, such as model.safetensors, is taken first. Without one, the only file of weights is taken,
    else the file named ``last``, else the file with the most training steps in its name.

    Raises:
        FileNotFoundError: if the folder has no weights.
        Refused: if shards are missing, or if the names of several files do not show which is the newest.
    """
    for name in _HUB:
        found = _usual(folder, name)
        if found:
            return found
    for name in _TRAINED:
        if is_there(folder / name):
            return [folder / name]
    names = weights_in(folder)
    if not names:
        raise FileNotFoundError(f"load: {folder} holds no weights ({', '.join(sorted(KNOWN))})")
    whole = {_SHARD.sub(r"\g<stem>\g<end>", name): name for name in names}
    return beside(folder / whole[_chosen(sorted(whole))])


def named_parts(folder: Path, name: str) -> list[Path]:
    """Return the file of that name in a folder; if it is a shard, return all shards.

    Raises:
        Refused: if the file is outside the folder, missing, or not a file of weights, or if shards are missing.
    """
    file = folder / inside(name, "file=")
    if not is_there(file):
        others = ", ".join(weights_in(folder)[:_SHOWN]) or "no weights"
        raise Refused(f"file= must name a file of weights of the folder, got {name!r}; it has {others}")
    if file.suffix not in KNOWN:
        raise Refused(f"file= must name a file of weights ({', '.join(sorted(KNOWN))}), got {name!r}")
    return beside(file)


def beside(file: Path) -> list[Path]:
    """Return a list with a file of weights; if it is one shard of a set, the list has the whole set.

    Raises:
        Refused: if shards are missing.
    """
    shard = _SHARD.fullmatch(file.name)
    if shard is None:
        return [file]
    of = int(shard["of"])
    if not 0 < of <= 10_000:
        raise Refused(f"{file.name} is a shard of {of}, and accepted are 1 to 10000")
    names = [f"{shard['stem']}-{n:05d}-of-{shard['of']}{shard['end']}" for n in range(1, of + 1)]
    _all_there(file.parent, names, "the shards")
    return [file.parent / name for name in names]


def inside(name: object, what: str) -> str:
    """Return a file name after a check that it stays inside its folder.

    Raises:
        Refused: if the name is an absolute path, contains "..", or is invalid.
    """
    plain = isinstance(name, str) and 0 < len(name) < 1000 and not re.search(r"[\\\x00-\x1f]", name)
    path = PurePosixPath(str(name))
    if not plain or path.is_absolute() or ".." in path.parts or not path.parts:
        raise Refused(f"{what} must name a file inside the folder, got {shown(name)}")
    return str(name)


def newest_folder(folder: Path) -> Path:
    """Return the folder of the weights: ``folder`` if it has weights, else one of its folders.

    That is the last of checkpoint-500, checkpoint-1000, ..., else the last of DeepSpeed's global_step500, ..., else
    "checkpoints" if that has weights. Without any of these ``folder`` is returned.
    """
    if weights_in(folder) or any(is_there(folder / name) for name in (*ADAPTERS, *_TRAINED)):
        return folder
    for pattern in (r"checkpoint-(\d{1,18})", r"global_step(\d{1,18})"):
        steps = {inner: re.fullmatch(pattern, inner.name) for inner in folder.iterdir() if inner.is_dir()}
        found = {int(step[1]): inner for inner, step in steps.items() if step is not None}
        if found:
            return found[max(found)]
    inner = folder / "checkpoints"
    return inner if inner.is_dir() and weights_in(inner) else folder


def _usual(folder: Path, name: str) -> list[Path]:
    """Return the files of weights with one of the hub's names: one file, or its shards; empty if there are none."""
    if is_there(folder / name):
        return [folder / name]  # an index beside it is outdated
    index = f"{name}.index.json"
    if is_there(folder / index):
        table = json_table(folder / index, 4 * CONFIGURATION).part("weight_map")
        shards = sorted({inside(shard, f"{index}: weight_map") for shard in table.values()})
        if not shards:
            raise Refused(f"{index}: weight_map names no files")
        _all_there(folder, shards, index)
        if any(Path(shard).suffix not in KNOWN for shard in shards):
            raise Refused(f"{index}: weight_map names files that hold no weights, such as {shards[0]}")
        return [folder / shard for shard in shards]
    stem, dot, end = name.rpartition(".")
    matched = [_SHARD.fullmatch(file.name) for file in folder.iterdir()]
    own = [shard for shard in matched if shard is not None and (shard["stem"], shard["end"]) == (stem, dot + end)]
    shards = sorted(shard.string for shard in own)
    if len({shard["of"] for shard in own}) > 1:
        raise Refused(f"there are shards of several sets, such as {shards[0]} and {shards[-1]}; pass file= one of them")
    return beside(folder / shards[0]) if shards else []


def _all_there(folder: Path, names: list[str], who: str) -> None:
    missing = [name for name in names if not is_there(folder / name)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise Refused(f"{who}: of {len(names)} files {', '.join(missing[:3])}{more} are not there")


def weights_in(folder: Path) -> list[str]:
    """Return the names of a folder's weight files, without adapters and states of optimisers or random generators."""
    names = (file.name for file in folder.iterdir() if file.suffix in KNOWN and not file.is_dir())
    return sorted(name for name in names if not _ASIDE.fullmatch(name) and name not in ADAPTERS)


# --- a choice among several -----------------------------------------------------------------------------------------


def _chosen(names: list[str]) -> str:
    """Return the only name, else ``last``, else the name with the most steps.

    Raises:
        Refused: if the order cannot be determined.
    """
    if len(names) == 1:
        return names[0]
    last = [(int(found[1] or 0), name) for name in names if (found := re.fullmatch(r"last(?:-v(\d{1,9}))?\.\w+", name))]
    if last and len({version for version, _ in last}) == len(last):
        return max(last)[1]
    steps = [_step(name) for name in names]
    told = {step: name for step, name in zip(steps, names, strict=True) if step is not None}
    if len(told) == len(names) and len({form for form, _ in told}) == 1:
        return told[max(told)]
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    raise Refused(f"which of its {len(names)} files of weights is meant? pass file= one of {listed}")


def _step(name: str) -> tuple[str, int] | None:
    """Return a name without its numbers, and the number by which such names are ordered.

    This is the number of steps, else that of epochs, else the number at the end; without any the result is None.
    """
    stem, dot, end = name.rpartition(".")
    form = re.sub(r"\d+(\.\d+)?", "#", stem) + dot + end
    for pattern in (r"step[s=_-]*(\d{1,18})(?!\d)", r"epoch[s=_-]*(\d{1,18})(?!\d)"):
        found = re.findall(pattern, stem, re.IGNORECASE)
        if found:
            return form, int(found[-1])
    ends = re.search(r"(?<![\d.])(\d{1,18})$", stem)
    return None if ends is None else (form, int(ends[1]))
