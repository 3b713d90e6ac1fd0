"""Read files of tensors (safetensors, torch's and numpy's archives) without running code in them.

The contents of a file of n bytes may take at most 16 n bytes plus 16 MiB of memory.
"""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from discdiff.adapters.documents import size
from discdiff.adapters.inert import load_inert
from discdiff.adapters.settings import Refused

__all__ = ["KNOWN", "TORCH", "metadata", "opened", "owned"]

TORCH = {".ckpt", ".pt", ".pth", ".bin", ".tar"}
KNOWN = {*TORCH, ".safetensors", ".npz"}
_TIMES, _MORE = 16, 2**24
_HEADER = 2**25  # most bytes of a safetensors header
_REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def opened(file: Path) -> Mapping[str, Any]:
    """Return the contents of a file by name: tensors, and from torch's files also other objects.

    Tensors are memory-mapped if the file's format allows it; ``owned`` copies them.

    Raises:
        Refused: a ValueError, if the file is damaged or of another format.
    """
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if file.suffix == ".npz":
        return _arrays(file)
    found = load_inert(file)
    if not isinstance(found, Mapping):
        raise Refused(f"{file.name} holds a {type(found).__name__}, not weights by name; save its state_dict")
    return found


def metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file; return an empty table for other files.

    Raises:
        Refused: a ValueError, for a safetensors file whose header cannot be read.
    """
    if file.suffix != ".safetensors":
        return {}
    _check_header(file)
    try:
        with safe_open(file, "pt") as archive:
            return dict(archive.metadata() or {})
    except Exception as error:  # SafetensorError, or others depending on the version
        raise Refused(f"{file.name} is not a safetensors file: {error}") from error


def _safetensors(file: Path) -> dict[str, Tensor]:
    _check_header(file)
    try:
        with safe_open(file, "pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, or others depending on the version
        raise Refused(f"{file.name} is not a safetensors file: {error}") from error


def _check_header(file: Path) -> None:
    """Raise Refused if the header is larger than any in use; safetensors itself checks the rest."""
    held = size(file)
    with file.open("rb") as opened:
        said = int.from_bytes(opened.read(8), "little")
    if said > min(held, _HEADER):
        raise Refused(
            f"{file.name} is not a safetensors file: its header must have at most {_HEADER} bytes, got {said}"
        )


def _arrays(file: Path) -> dict[str, Tensor]:
    """Return every array of a numpy archive after checks of the archive's size and of each array's shape."""
    most = size(file) * _TIMES + _MORE
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > most:
                raise Refused(f"{file.name} unpacks to more than {_TIMES} times its size, and is not read")
            return {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries}
    except Refused:
        raise
    except Exception as error:  # from zipfile, zlib, or numpy for invalid headers
        raise Refused(f"{file.name} is not an archive of arrays (numpy.savez): {error}") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    with archive.open(entry) as opened:
        version = np.lib.format.read_magic(opened)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(opened)
        if kind.hasobject or kind.names is not None:
            raise Refused(f"{entry.filename} holds objects, not numbers")
        held = opened.read(entry.file_size)
    if len(held) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{entry.filename} has {len(held)} bytes where its header says an array {shape} of {kind}")
    array = np.frombuffer(held, kind).reshape(shape, order="F" if fortran else "C")
    native = array.astype(kind.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def owned(tensors: Mapping[str, Tensor], files: list[Path]) -> dict[str, Tensor]:
    """Return copies of tensors, so that their files may be overwritten; tied tensors stay tied.

    Raises:
        Refused: if a tensor is not dense or does not hold real or whole numbers, or if all together take more than 16
            times the size of ``files`` plus 16 MiB.
    """
    where = files[0].name
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise Refused(f"{where}: {name} must be a plain tensor, got a {_kind(tensor)}")
        if tensor.is_meta or tensor.is_nested or tensor.dtype not in _REAL | _WHOLE:
            raise Refused(f"{where}: {name} must hold real or whole numbers, got a {_kind(tensor)}")
    most = sum(size(file) for file in files) * _TIMES + _MORE
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > most:
        raise Refused(f"{where}: its tensors have more numbers than {_TIMES} times the file, and are not read")
    found: dict[str, Tensor] = {}
    copies: dict[tuple[object, ...], Tensor] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in copies or not tensor.numel():
            copies[place] = tensor.detach().clone(memory_format=torch.contiguous_format)
        found[name] = copies[place]
    return found


def _kind(tensor: Tensor) -> str:
    named = [type(tensor).__name__ if type(tensor) is not Tensor else "", str(tensor.layout).removeprefix("torch.")]
    return " ".join([*filter(None, named), "tensor on", str(tensor.device), "of", str(tensor.dtype)])
