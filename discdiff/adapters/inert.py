"""Read torch's files without running code that is pickled in them."""

import _compat_pickle
import io
import itertools
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from discdiff.adapters.documents import size
from discdiff.adapters.settings import Refused

__all__ = ["Inert", "load_inert", "plain", "tensors_in"]

_PICKLE = 2**25  # most bytes pickled beside the numbers
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of torch.save before 1.6
_DEPTH, _PARTS = 64, 2**16  # limits for a configuration made plain
_ODD = {
    "torch._utils._rebuild_qtensor": "quantized tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors without numbers",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_wrapper_subclass": "tensors of another class",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensors of another device's class",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensors of another device's class",
    "builtins.bytearray": "bytes of any number",
}
_MADE = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
    "torch.nn.parameter.Parameter",
    "torch.Tensor",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
}  # what torch constructs itself; everything else is refused above, or replaced
_StandIn = tuple[Callable[..., object], str]


class Inert:
    """Stand-in for a pickled object whose class must not run; it only keeps the pickled data.

    Attributes:
        arguments: the constructor's arguments.
        state: the pickled state, usually a dictionary.
    """

    arguments: tuple[object, ...]
    state: object

    def __new__(cls, *arguments: object) -> "Inert":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def load_inert(path: Path) -> object:
    """Load a file of torch.save without running its code: each object of a foreign class becomes an ``Inert``.

    Lightning checkpoints hold objects of many packages beside their weights. Refusing such files would lose the
    weights; unpickling the objects would run foreign code. Torch loads the file with ``weights_only=True``. Tensors are
    memory-mapped if the file's format allows it.

    Raises:
        Refused: if torch.save did not write the file, if it is damaged, or if it holds special tensors,
            such as quantized, sparse or nested ones.
    """
    held = size(path)
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    zipped = start.startswith(b"PK\x03\x04")
    if not zipped and start != _LEGACY:
        raise Refused(f"{path.name} cannot be read as a file of torch.save; save its state_dict with safetensors")
    records = _records(path, held) if zipped else None
    try:
        foreign = [_stand_in(name, path) for name in sorted(_globals(path, zipped))]
        stand_ins: list[Callable[..., object] | _StandIn] = [one for one in foreign if one is not None]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes whose source has changed, as none is used
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Refused:
        raise
    except Exception as error:  # a damaged file makes torch and pickle raise errors of every kind
        raise Refused(f"{path.name} cannot be read as a file of torch.save: {_reason(error)}") from error
    _check_storages(found, records, held, path)
    return found


def _reason(error: Exception) -> str:
    """Return the reason in an error message of torch, without its advice to run pickled code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "WeightsUnpickler error:" in line), lines[0] if lines else "")
    return told.rpartition("WeightsUnpickler error:")[2].split(". Please use")[0].strip() or type(error).__name__


def _records(path: Path, held: int) -> Counter[int]:
    """Return how often each record size occurs in a zip file of torch.

    Raises:
        Refused: if the file is damaged, or not as torch.save writes it, for instance compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, held, path)
            damaged = archive.testzip()
    except Refused:
        raise
    except Exception as error:  # BadZipFile, or others for damaged tables
        raise Refused(f"{path.name} is a damaged zip file: {error}") from error
    if damaged is not None:
        raise Refused(f"{path.name} is damaged: {damaged} has another checksum than it was saved with")
    return Counter(entry.file_size for entry in entries)


def _check_entries(entries: list[zipfile.ZipInfo], held: int, path: Path) -> None:
    names = [entry.filename for entry in entries]
    pickled = [entry for entry in entries if _is_pickle(entry.filename)]
    if any(name.endswith("/constants.pkl") for name in names):
        raise Refused(f"{path.name} is a TorchScript archive, which is code; save its state_dict with safetensors")
    if len(pickled) != 1 or len(set(names)) < len(names):
        raise Refused(
            f"{path.name} is a zip file and none of torch.save: it must hold one data.pkl, got {len(pickled)}"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused(f"{path.name} is compressed, which torch.save does not do; unpack it, or save it again")
    if pickled[0].file_size > _PICKLE:
        raise _too_long(path)
    if sum(entry.file_size for entry in entries) > held:
        raise Refused(f"{path.name} is damaged: it names more bytes than it has")


def _is_pickle(name: str) -> bool:
    return name.rpartition("/")[2] == "data.pkl"


def _globals(path: Path, zipped: bool) -> set[str]:
    """Return the full names of the classes and functions in a file's pickles."""
    if not zipped:
        with path.open("rb") as file:
            return {name for _ in range(4) for name in _named(file, path)}  # magic, protocol, machine, object
    with zipfile.ZipFile(path) as archive:
        name = next(filter(_is_pickle, archive.namelist()))
        return set(_named(io.BytesIO(archive.read(name)), path))


def _named(file: io.BufferedReader | io.BytesIO, path: Path) -> Iterator[str]:
    """Yield the full names of the classes and functions in one pickle."""
    start = file.tell()
    for code, said, place in pickletools.genops(file):
        if (place or 0) - start > _PICKLE:
            raise _too_long(path)
        if code.name in {"STACK_GLOBAL", "INST"} or (code.name == "PROTO" and said != 2):
            raise Refused(f"{path.name} is pickled by a protocol that is not read; save it with torch.save's own")
        if code.name == "GLOBAL":
            module, _, name = str(said).partition(" ")
            module, name = _compat_pickle.NAME_MAPPING.get(
                (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            )  # Python 2 names differ from those of Python 3
            yield f"{module}.{name}"


def _too_long(path: Path) -> Refused:
    return Refused(f"{path.name} holds more than {_PICKLE} bytes beside its tensors; save its state_dict alone")


def _stand_in(name: str, path: Path) -> _StandIn | None:
    """Make an inert class of that name; return None for a class that torch may construct itself.

    Raises:
        Refused: if the name is that of quantized, sparse, nested or other special tensors.
    """
    if name in _ODD:
        raise Refused(f"{path.name} holds {_ODD[name]} ({name}); save its weights as plain tensors")
    own = name.rpartition(".")[2]
    if name in _MADE or (name.startswith("torch.") and (own.endswith("Storage") or _is_dtype(own))):
        return None
    return type(own, (Inert,), {}), name


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _check_storages(found: object, records: Counter[int] | None, held: int, path: Path) -> None:
    """Check that each tensor storage has the size of a record in the file.

    Torch itself does not check the sizes in the pickle.

    Raises:
        Refused: if a storage has another size.
    """
    storages: dict[int, int] = {}
    for tensor in tensors_in(found):
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
    sizes = Counter(number for number in storages.values() if number)
    if sizes.total() and (sum(storages.values()) > held or (records is not None and sizes - records)):
        raise Refused(f"{path.name} is damaged: its tensors are of other sizes than what it holds of them")


def tensors_in(found: object) -> Iterator[Tensor]:
    """Yield all tensors in nested tables, lists and ``Inert`` objects, each once."""
    waiting, seen = [found], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, Inert):
            waiting += [value.state, value.arguments]


def plain(value: object) -> object:
    """Convert a configuration to dictionaries, lists and values; replace ``Inert`` objects by their contents.

    An object of OmegaConf is replaced by the value that it holds.

    Raises:
        Refused: if the configuration is nested too deeply or has too many parts, for instance if it contains itself.
    """
    return _plain(value, itertools.count(), 0)


def _plain(value: object, parts: Iterator[int], depth: int) -> object:
    if depth > _DEPTH or next(parts) > _PARTS:
        raise Refused("the configuration that is pickled with the weights is nested too deeply, or too large")
    if isinstance(value, Inert):
        state = value.state
        if isinstance(state, dict) and ("_content" in state or "_val" in state):
            return _plain(state["_content" if "_content" in state else "_val"], parts, depth + 1)
        return _plain(state or list(value.arguments), parts, depth + 1)
    if isinstance(value, dict):
        return {name: _plain(part, parts, depth + 1) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, parts, depth + 1) for part in value]
    return value
