"""Files of tensors: safetensors, torch's and numpy's archives, each opened without running what is in them.

What is read is bounded by the size of the file: an archive may hold at most 16 times as much, and 16 MiB.
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
_HEADER = 2**25  # bytes, of safetensors
_REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def opened(file: Path) -> Mapping[str, Any]:
    """What a file holds by name: tensors, and of torch's files whatever is beside them.

    Tensors are mapped from the file where its format allows; ``owned`` makes them copies.

    Raises:
        Refused: if it is damaged, or no such file.
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
    """What is said in the header of a safetensors file; nothing of other files."""
    if file.suffix != ".safetensors":
        return {}
    _check_header(file)
    try:
        with safe_open(file, "pt") as archive:
            return dict(archive.metadata() or {})
    except Exception as error:  # SafetensorError, and others by version
        raise Refused(f"{file.name} is not a safetensors file: {error}") from error


def _safetensors(file: Path) -> dict[str, Tensor]:
    _check_header(file)
    try:
        with safe_open(file, "pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and others by version
        raise Refused(f"{file.name} is not a safetensors file: {error}") from error


def _check_header(file: Path) -> None:
    """Refuse a header of names and shapes that is larger than any in use; the library looks at all else."""
    held = size(file)
    with file.open("rb") as opened:
        said = int.from_bytes(opened.read(8), "little")
    if said > min(held, _HEADER):
        raise Refused(
            f"{file.name} is not a safetensors file: its header must have at most {_HEADER} bytes, got {said}"
        )


def _arrays(file: Path) -> dict[str, Tensor]:
    """Every array of an archive of numpy's; its header's shape must be that of its bytes before memory is asked for."""
    most = size(file) * _TIMES + _MORE
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > most:
                raise Refused(f"{file.name} unpacks to more than {_TIMES} times its size, and is not read")
            return {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries}
    except Refused:
        raise
    except Exception as error:  # of zipfile, of zlib, and of numpy for headers that are none
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
    """Copies that depend on no file, so that it may be written again; what is tied stays tied.

    Raises:
        Refused: for tensors that are not plain numbers in memory, and for those that hold more than their files.
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
