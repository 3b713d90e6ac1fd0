"""Damaged and odd files for ``fuzzed``: copies of every fixture, spoilt one way each, and files written to be hard."""

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from fuzzed import Case, fixtures, given, names
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".npz"}
Bytes = Callable[[bytes], bytes]
DEEP = 20_000


@cache
def cases() -> list[Case]:
    """All of them; the same at every call."""
    makers = (_bytes, _archives, _tensors, _headers, _pickles, _arrays, _settings, _tokenizers, _indices, _texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of nested and of quantized tensors
        found = [case for make in (*makers, _yaml, _places) for case in make()]
    assert len({case.name for case in found}) == len(found)
    return found


def spoilt(name: str, how: str, spoil: Callable[[Path], object], same: bool = True) -> Case:
    """A copy of a fixture, in whose folder something is done; what that returns is loaded, where it is a path."""

    def make(folder: Path) -> Path:
        copy = folder / "copy"
        shutil.copytree(fixtures() / name, copy, symlinks=True)
        where = given(name, copy)
        other = spoil(copy)
        return other if isinstance(other, Path) else where

    return Case(f"{name}: {how}", make, name, same)


def weights_in(folder: Path) -> Path:
    """The file of weights of a fixture."""
    return next(file for file in sorted(folder.rglob("*")) if file.suffix in WEIGHTS and file.is_file())


# --- bytes ------------------------------------------------------------------------------------------------------------


def _bytes() -> list[Case]:
    """Every fixture's weights cut, lengthened, and with bytes changed."""
    whole: dict[str, Bytes] = {
        "empty": lambda data: b"",
        "cut in its head": lambda data: data[:10],
        "cut in the middle": lambda data: data[: len(data) // 2],
        "cut before the last byte": lambda data: data[:-1],
        "with zeros behind": lambda data: data + bytes(100),
        "twice": lambda data: data + data,
        "of zeros": lambda data: bytes(len(data)),
    }
    found = []
    for name in names():
        for how, change in whole.items():
            found.append(spoilt(name, how, lambda folder, change=change: _changed(weights_in(folder), change)))
        for seed in range(4):
            flip = spoilt(
                name, f"byte flipped {seed}",
                lambda folder, seed=seed: _changed(weights_in(folder), lambda data: _flipped(data, seed)), same=False,
            )  # fmt: skip
            found.append(flip)
    lengths = {"0": 0, "2": 2, "2^31": 2**31, "2^63": 2**63, "2^64 - 1": 2**64 - 1}
    for name in ("LLaDA", "MDLM", "saved", "discdiff"):
        for how, length in lengths.items():
            head = struct.pack("<Q", length)
            found.append(
                spoilt(
                    name, f"header of {how} bytes",
                    lambda folder, head=head: _changed(weights_in(folder), lambda data: head + data[8:]),
                )
            )  # fmt: skip
    return found


def _changed(file: Path, change: Bytes) -> None:
    file.write_bytes(change(file.read_bytes()))


def _flipped(data: bytes, seed: int) -> bytes:
    """One bit: the first two in the head, where the least is needed to harm."""
    draw = random.Random(seed)
    place = draw.randrange(min(len(data), 400) if seed < 2 else len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


# --- archives ---------------------------------------------------------------------------------------------------------


def _archives() -> list[Case]:
    """Archives of torch.save and numpy with entries gone, twice, or larger than they say."""
    found = []
    for name in [name for name in names() if zipfile.is_zipfile(weights_in(fixtures() / name))]:
        for how, change in {
            "without its first entry": lambda entries: entries[1:],
            "without its last entry": lambda entries: entries[:-1],
            "without entries": lambda entries: [],
            "an entry twice": lambda entries: [*entries, entries[0]],
            "entries under other names": lambda entries: [(f"../{entry}", data) for entry, data in entries],
            "an entry cut": lambda entries: [(entry, data[: len(data) // 2]) for entry, data in entries],
        }.items():
            found.append(spoilt(name, how, lambda folder, change=change: _rezipped(weights_in(folder), change)))
        found.append(spoilt(name, "an entry that swells to 3 GB", lambda folder: _bomb(weights_in(folder))))
    return found


def _rezipped(file: Path, change: Callable[[Any], Any]) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.namelist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry, data in change(entries):
            archive.writestr(entry, data)


def _bomb(file: Path) -> None:
    """Its largest entry, in a deflated stream of zeros that is a thousandth of what it swells to."""
    with zipfile.ZipFile(file) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.namelist()]
    worst = max(entries, key=lambda entry: len(entry[1]))[0]
    size = 3 << 30
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in entries:
            if entry != worst:
                archive.writestr(entry, data)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    stream = block * (size >> 20) + squeeze.flush()
    _append_deflated(file, worst, stream, size)


def _append_deflated(file: Path, name: str, stream: bytes, size: int) -> None:
    """An entry whose stream is given as it is; its checksum is none."""
    data, encoded = file.read_bytes(), name.encode()
    end = data.rindex(b"PK\x05\x06")
    count, _, start = struct.unpack("<HII", data[end + 10 : end + 20])
    central, here = data[start:end], start
    head = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(stream), size, len(encoded), 0)
    local = b"PK\x03\x04" + head + encoded + stream
    entry = b"PK\x01\x02" + struct.pack("<H", 20) + head + struct.pack("<HHHII", 0, 0, 0, 0, here) + encoded
    central += entry
    tail = struct.pack("<HHHHIIH", 0, 0, count + 1, count + 1, len(central), here + len(local), 0)
    file.write_bytes(data[:start] + local + central + b"PK\x05\x06" + tail)


# --- tensors ----------------------------------------------------------------------------------------------------------

_KINDS = torch.bfloat16, torch.float64
HOSTS = ("LLaDA", "BERT", "Dream", "MDLM", "SEDD", "GIDD", "saved")


def _tensors() -> list[Case]:
    """Well-written files that hold other weights than the network has."""
    found = []
    for name in HOSTS:
        for how, change in {
            "a tensor gone": lambda w: dict(list(w.items())[1:]),
            "half of them gone": lambda w: dict(list(w.items())[::2]),
            "the last one gone": lambda w: dict(list(w.items())[:-1]),
            "one too many": lambda w: w | {"more.weight": torch.zeros(3)},
            "transposed": lambda w: {n: t.T.contiguous() if t.ndim == 2 else t for n, t in w.items()},
            "flattened": lambda w: {n: t.flatten() for n, t in w.items()},
            "with an axis more": lambda w: {n: t[None].contiguous() for n, t in w.items()},
            "of no elements": lambda w: {n: t[:0].contiguous() for n, t in w.items()},
            "of no axes": lambda w: {n: t.flatten()[0].clone() for n, t in w.items()},
            "whole numbers": lambda w: {n: t.long() for n, t in w.items()},
            "truth values": lambda w: {n: t > 0 for n, t in w.items()},
            "complex": lambda w: {n: t.to(torch.complex64) for n, t in w.items()},
            "of eight bits": lambda w: {n: t.to(torch.float8_e4m3fn) for n, t in w.items()},
            "of mixed types": lambda w: {n: t.to(_KINDS[k % 2]) for k, (n, t) in enumerate(w.items())},
            "named otherwise": lambda w: {f"x.{n}": t for n, t in w.items()},
            "layers without numbers": lambda w: {_renumbered(n, "x"): t for n, t in w.items()},
            "a layer of a million million": lambda w: {_renumbered(n, str(10**12), "1"): t for n, t in w.items()},
            "a layer before the first": lambda w: {_renumbered(n, "-1", "1"): t for n, t in w.items()},
            "a layer of another script": lambda w: {_renumbered(n, "\u0663", "1"): t for n, t in w.items()},
            "a layer left out": lambda w: {_renumbered(n, "7", "1"): t for n, t in w.items()},
        }.items():
            spoil = spoilt(name, how, lambda folder, change=change: _rewritten(weights_in(folder), change))
            found.append(spoil)
        for how, value in (("not a number", torch.nan), ("infinite", torch.inf), ("huge", 1e38)):
            fill = spoilt(
                name, how,
                lambda folder, v=value: _rewritten(
                    weights_in(folder), lambda w, v=v: {n: torch.full_like(t, v) for n, t in w.items()}
                ),
                same=False,
            )  # fmt: skip
            found.append(fill)
    return found


def _rewritten(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file)


def _renumbered(name: str, new: str, old: str | None = None) -> str:
    """A layer's number replaced in a name."""
    parts = name.split(".")
    return ".".join(new if part.isdigit() and old in (None, part) else part for part in parts)


def _headers() -> list[Case]:
    """Headers of safetensors that say what the rest does not hold."""

    def entry(**change: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def spoil(header: dict[str, Any]) -> dict[str, Any]:
            first = next(name for name in header if name != "__metadata__")
            return header | {first: header[first] | change}

        return spoil

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "dtype F4": entry(dtype="F4"),
        "dtype a number": entry(dtype=3),
        "dtype null": entry(dtype=None),
        "a shape below nothing": entry(shape=[-1, -1]),
        "a shape of 2^62": entry(shape=[2**62]),
        "a shape whose product is too large": entry(shape=[2**40, 2**40]),
        "a shape of a thousand axes": entry(shape=[1] * 1000),
        "a shape of words": entry(shape=["x"]),
        "no shape": entry(shape=None),
        "offsets behind the end": entry(data_offsets=[0, 2**40]),
        "offsets below nothing": entry(data_offsets=[-8, 8]),
        "offsets the wrong way": entry(data_offsets=[64, 0]),
        "offsets of no bytes": entry(data_offsets=[0, 0]),
        "three offsets": entry(data_offsets=[0, 8, 16]),
        "all at one place": lambda h: {
            n: e | {"data_offsets": list(h.values())[-1]["data_offsets"]} if n != "__metadata__" else e
            for n, e in h.items()
        },
        "a list": lambda h: [h],
        "null": lambda h: None,
        "a word": lambda h: "x",
        "metadata that are a list": lambda h: h | {"__metadata__": [1]},
        "metadata of numbers": lambda h: h | {"__metadata__": {"card": 3}},
        "metadata in tables": lambda h: h | {"__metadata__": {"card": {"x": {}}}},
        "an entry that is null": lambda h: h | {"x": None},
        "a name of lines": lambda h: h | {"a\nb\r\x00c": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        "a name of a megabyte": lambda h: h | {"x" * 10**6: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    }
    found = []
    for how, change in changes.items():
        for name in ("MDLM", "BERT"):
            spoil = lambda folder, change=change: _headed(weights_in(folder), lambda h: json.dumps(change(h)))  # noqa: E731
            found.append(spoilt(name, f"header: {how}", spoil))
    raw: dict[str, Callable[[dict[str, Any]], str]] = {
        "a name twice": lambda h: json.dumps(h)[:-1] + "," + json.dumps(h)[1:],
        "nested deeply": lambda h: '{"x":' * DEEP + "1" + "}" * DEEP,
        "blanks of 60 MB": lambda h: json.dumps(h) + " " * 60_000_000,
        "no JSON": lambda h: json.dumps(h)[:-3],
        "half a character": lambda h: json.dumps(h)[:-1] + ', "\\ud800": 1}',
    }
    return found + [
        spoilt("MDLM", f"header: {how}", lambda folder, change=change: _headed(weights_in(folder), change))
        for how, change in raw.items()
    ]


def _headed(file: Path, change: Callable[[dict[str, Any]], str]) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + length])).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


# --- pickles ----------------------------------------------------------------------------------------------------------


class Shout:
    """Pickled as a call."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def _nested(depth: int) -> object:
    found: object = 1
    for _ in range(depth):
        found = [found]
    return found


def _laughing(count: int) -> list[object]:
    found: list[object] = [0]
    for _ in range(count):
        found = [found, found]
    return found


def _endless() -> dict[str, object]:
    found: dict[str, object] = {}
    found["x"] = found
    return found


class Endless:
    """Keeps itself in its state."""

    def __init__(self) -> None:
        self._content: object = self


def _pickles() -> list[Case]:
    """Files of torch.save: what they hold beside weights, and pickles written by hand."""
    from adapters.test_diffusion_transformers import HEADS, weights

    config = {"model": {"n_heads": HEADS}, "algo": {"name": "mdlm"}}
    own = {f"backbone.{name}": part for name, part in weights().items()}
    plain = {"state_dict": own, "hyper_parameters": {"config": config}}
    one = torch.zeros(1)
    held: dict[str, object] = {
        "a call of os.system": plain | {"x": Shout(os.system, "touch ran")},
        "a call of eval": plain | {"x": Shout(eval, "__import__('os').system('touch ran')")},
        "a call of exec": plain | {"x": Shout(exec, "import os; os.system('touch ran')")},
        "a call of getattr": plain | {"x": Shout(getattr, one, "numpy")},
        "a call of __import__": plain | {"x": Shout(__import__, "antigravity")},
        "a call of open": plain | {"x": Shout(open, "ran", "w")},
        "a call of torch.load": plain | {"x": Shout(torch.load, "ran")},
        "a call of a large tensor": plain | {"x": Shout(torch.empty, 10**12)},
        "a call of bytearray": plain | {"x": Shout(bytearray, 10**11)},
        "a call of range": plain | {"x": Shout(list, Shout(range, 10**9))},
        "hyperparameters that call": plain | {"hyper_parameters": {"config": Shout(os.system, "touch ran")}},
        "hyperparameters that end nowhere": plain | {"hyper_parameters": _endless()},
        "hyperparameters that hold themselves": plain | {"hyper_parameters": {"config": Endless()}},
        "hyperparameters nested deeply": plain | {"hyper_parameters": {"config": _nested(200)}},
        "hyperparameters that double": plain | {"hyper_parameters": {"config": {"x": _laughing(40)}}},
        "hyperparameters of a list": plain | {"hyper_parameters": [config]},
        "hyperparameters of numbers": plain | {"hyper_parameters": {3: 4, "config": {5: config, "model": 7}}},
        "heads that are a tensor": plain | {"hyper_parameters": {"config": config | {"model": {"n_heads": one}}}},
        "an average of a number": plain | {"ema": 3},
        "an average of words": plain | {"ema": {"shadow_params": ["x"] * len(own)}},
        "an average of other shapes": plain | {"ema": {"shadow_params": [one] * len(own)}},
        "an average that ends nowhere": plain | {"ema": _endless()},
        "an average of names": plain | {"ema": {"shadow_params": {"x": one}}},
        "weights null": plain | {"state_dict": None},
        "weights a list": plain | {"state_dict": list(own.values())},
        "weights of numbers": plain | {"state_dict": dict.fromkeys(own, 1.0)},
        "weights named by numbers": plain | {"state_dict": dict(enumerate(own.values()))},
        "weights without end": plain | {"state_dict": _endless()},
        "weights in weights": plain | {"state_dict": {"state_dict": own}},
        "weights larger than their memory": plain | {"state_dict": own | {"backbone.more": one.expand(2**40)}},
        "one weight larger than its memory": plain
        | {"state_dict": own | {"backbone.vocab_embed.embedding": one.expand(2**20, 2**20)}},
        "sparse weights": plain | {"state_dict": {n: t.to_sparse() for n, t in own.items()}},
        "meta weights": plain | {"state_dict": {n: t.to("meta") for n, t in own.items()}},
        "complex weights": plain | {"state_dict": {n: t.to(torch.complex64) for n, t in own.items()}},
        "eight-bit weights": plain
        | {"state_dict": {n: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) for n, t in own.items()}},
        "nested weights": plain | {"state_dict": {n: torch.nested.nested_tensor([t]) for n, t in own.items()}},
        "nothing": {},
        "null": None,
        "a number": 7,
        "a tensor": one,
        "a list": [plain],
        "a set": {1, 2},
        "bytes": b"x" * 100,
        "a whole module": torch.nn.Linear(2, 2),
    }
    found = []
    for how, content in held.items():
        found.append(Case(f"torch.save: {how}", lambda folder, c=content: _torch(folder, c), "", True))
    streams = {
        "no end": b"\x80\x02}q\x00",
        "nothing": b"",
        "a stack too short": b"\x80\x02.",
        "a memo that is not there": b"\x80\x02h\xff.",
        "a memo of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a word of 2^60 letters": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
        "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
        "a number of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "marks without end": b"\x80\x02" + b"(" * 10**6 + b".",
        "tuples without end": b"\x80\x02)" + b"\x85" * 10**5 + b".",
        "lists without end": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        "tables without end": b"\x80\x02" + b"}K\x01" * 10**4 + b"}" + b"s" * 10**4 + b".",
        "a foreign class": b"\x80\x02cnt\nsystem\nX\x09\x00\x00\x00touch ran\x85R.",
        "a class without a module": b"\x80\x02c\n\n.",
        "a class by the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        "an object built": b"\x80\x02cbuiltins\nobject\n)\x81}b.",
        "a persistent id": b"\x80\x02K\x01Q.",
        "an extension": b"\x80\x02\x82\x01.",
        "protocol 9": b"\x80\x09}.",
        "old ways": b"(S'touch ran'\nios\nsystem\n.",
    }
    for how, stream in streams.items():
        found.append(Case(f"pickle: {how}", lambda folder, s=stream: _pickled(folder, s), "", True))
        found.append(Case(f"old pickle: {how}", lambda folder, s=stream: _written(folder / "last.ckpt", s), "", True))
    legacy = Case("torch.save: in its old way", lambda folder: _torch(folder, plain, zipped=False), "", True)
    script = Case("torch.save: a script", _scripted, "", True)
    return [*found, legacy, script]


def _torch(folder: Path, content: object, zipped: bool = True) -> Path:
    torch.save(content, folder / "last.ckpt", _use_new_zipfile_serialization=zipped)
    return folder / "last.ckpt"


def _written(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def _pickled(folder: Path, stream: bytes) -> Path:
    """An archive of torch.save with another pickle."""
    file = _torch(folder, {"x": torch.zeros(2)})
    _rezipped(file, lambda entries: [(n, stream if n.endswith("data.pkl") else data) for n, data in entries])
    return file


def _scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "last.pt"))
    return folder / "last.pt"


def _arrays() -> list[Case]:
    """Archives of numpy."""

    def headed(**change: object) -> bytes:
        said = {"descr": "<f4", "fortran_order": False, "shape": (2,)} | change
        text = (repr(said) + "\n").encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(8)

    objects = io.BytesIO()
    np.save(objects, np.array([Shout(os.system, "touch ran")], dtype=object), allow_pickle=True)
    arrays = {
        "objects": objects.getvalue(),
        "a pickle": pickle.dumps(Shout(os.system, "touch ran")),
        "a shape of 2^40": headed(shape=(2**40,)),
        "a shape too large": headed(shape=(2**62, 2**62)),
        "a shape below nothing": headed(shape=(-5,)),
        "a shape of words": headed(shape=("x",)),
        "records": headed(descr=[("a", "<f4"), ("b", "O")]),
        "dates": headed(descr="<M8[s]"),
        "words": headed(descr="<U2"),
        "quarters": headed(descr="<f2"),
        "big ends": headed(descr=">f4"),
        "long floats": headed(descr="<f16"),
        "code": headed(descr="__import__('os').system('touch ran')"),
        "nested": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60_000) + b"(" * 60_000,
        "version 9": b"\x93NUMPY\x09\x00" + bytes(60),
        "nothing": b"",
    }

    def make(folder: Path, data: bytes) -> Path:
        with zipfile.ZipFile(folder / "md4.npz", "w") as archive:
            archive.writestr("params/Transformer_0/TransformerBlock_0/attention/wq/kernel.npy", data)
        return folder / "md4.npz"

    return [Case(f"numpy: {how}", lambda folder, d=data: make(folder, d)) for how, data in arrays.items()]


# --- settings ---------------------------------------------------------------------------------------------------------

_odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 10**40, 0, 1]),
    st.floats(), st.sampled_from([1e308, 5e-324, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "4", "True", "auto", "os.system", "somebody/attention", "\u0000", "\ud800", "\u202e"]),
    st.just("a" * 10**5), st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["x", "type", "rope_type"]), st.integers(), max_size=2),
)  # fmt: skip


def drawn(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """So many examples, the same at every call."""
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2 * count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def keep(value: object) -> None:
        found.append(value)

    keep()
    return found[:count]


def _settings() -> list[Case]:
    """Every JSON of settings, one value in it another, gone, or there twice."""
    found = []
    for seed, name in enumerate(names()):
        files = [file for file in (fixtures() / name).glob("*.json") if file.name in ("config.json", "discdiff.json")]
        for file in files:
            leaves = list(_leaves(json.loads(file.read_text())))
            many = 40 if name == "saved" else 9
            for n, (place, value) in enumerate(drawn(st.tuples(st.integers(0, 10**6), _odd), many, seed)):
                where, old = leaves[place % len(leaves)]
                spoil = lambda folder, f=file.name, w=where, v=value: _set(folder / f, w, v)  # noqa: E731
                key = ".".join(map(str, where))
                free = value is None or old is None or type(value) is type(old) or name == "saved"
                found.append(spoilt(name, f"{n} {key} is {_short(value)}", spoil, same=not free))
            for n, place in enumerate(drawn(st.integers(0, 10**6), 2, seed)):
                where, _ = leaves[place % len(leaves)]
                gone = lambda folder, f=file.name, w=where: _drop(folder / f, w)  # noqa: E731
                found.append(spoilt(name, f"{n} without {'.'.join(map(str, where))}", gone, same=False))
    return found


def _short(value: object) -> str:
    return repr(value)[:30] + ("..." if len(repr(value)) > 30 else "")


def _leaves(table: Any, where: tuple[Any, ...] = ()) -> Any:  # noqa: ANN401
    """Every value with its place, tables too."""
    inner = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in inner:
        yield (*where, key), value
        yield from _leaves(value, (*where, key))


def _set(file: Path, where: tuple[Any, ...], value: object) -> None:
    table = json.loads(file.read_text())
    inner = table
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    file.write_text(json.dumps(table))


def _drop(file: Path, where: tuple[Any, ...]) -> None:
    table = json.loads(file.read_text())
    inner = table
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    file.write_text(json.dumps(table))


def _texts() -> list[Case]:
    """JSON that is none, or none of ours."""
    found = []
    for name in ("LLaDA", "ESM-2", "saved", "MDLM"):
        file = "discdiff.json" if name == "saved" else "config.json"
        wide = lambda folder, f=file: _changed(folder / f, lambda data: data + b" " * 40_000_000)  # noqa: E731
        found.append(spoilt(name, f"{file} with 40 MB of blanks", wide))
        said = (fixtures() / name / file).read_text()
        texts: dict[str, bytes] = {
            "empty": b"",
            "a list": b"[1, 2]",
            "null": b"null",
            "a word": b'"x"',
            "cut": said[: len(said) // 2].encode(),
            "nested deeply": b'{"x":' * DEEP + b"1" + b"}" * DEEP,
            "lists nested deeply": b'{"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "with a mark of byte order": b"\xef\xbb\xbf" + said.encode(),
            "of two bytes a letter": said.encode("utf-16"),
            "of an old alphabet": said[:-2].rstrip().encode() + ',\n"x": "\u00e9"}'.encode("latin-1"),
            "with zeros": said.encode() + b"\x00\x00",
            "a number of 5000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"," + said.strip()[1:].encode(),
            "all keys twice": said.strip()[:-1].encode() + b"," + said.strip()[1:].encode(),
        }
        for how, text in texts.items():
            found.append(
                spoilt(name, f"{file} {how}", lambda folder, f=file, t=text: _changed(folder / f, lambda _, t=t: t))
            )
    return found


# --- tokenizers, indices, YAML, places --------------------------------------------------------------------------------


def _put(folder: Path, name: str, content: object) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))


def _tokenizers() -> list[Case]:
    contents: list[tuple[str, object]] = [
        ("vocab.txt", b"\xff\xfe\x00"),
        ("vocab.txt", "a\n" * 10**6),
        ("vocab.txt", "x" * 10**7),
        ("vocab.json", [1, 2]),
        ("vocab.json", {"<mask>": "36"}),
        ("vocab.json", {"<mask>": None}),
        ("vocab.json", {"<mask>": -4}),
        ("vocab.json", {"<mask>": 10**30}),
        ("vocab.json", {"<mask>": [36]}),
        ("vocab.json", {"<mask>": True}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"model": {"vocab": [["a"], 3]}}),
        ("tokenizer.json", {"model": {"vocab": [[["a"], 0.5]]}}),
        ("tokenizer.json", {"model": {"vocab": {"<mask>": 1e300}}}),
        ("tokenizer.json", {"model": {"vocab": 7}, "added_tokens": 3}),
        ("tokenizer.json", {"added_tokens": [{"content": "<mask>"}]}),
        ("tokenizer.json", {"added_tokens": [{"content": ["<mask>"], "id": {}}]}),
        ("tokenizer.json", {"added_tokens": {"x": None}}),
        ("tokenizer.json", [None]),
        ("added_tokens.json", {"<mask>": {}}),
        ("added_tokens.json", {"<mask>": "x"}),
        ("added_tokens.json", "not JSON"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<mask>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"36": "<mask>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "<mask>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"mask_token": {}}),
        ("tokenizer_config.json", {"mask_token": {"content": 3}}),
        ("tokenizer_config.json", {"mask_token": ["<mask>"]}),
        ("tokenizer_config.json", {"mask_token": 7}),
        ("special_tokens_map.json", {"mask_token": {"content": None}}),
        ("special_tokens_map.json", {"cls_token": [[]]}),
        ("special_tokens_map.json", 3),
        ("generation_config.json", {"mask_token_id": "36"}),
        ("generation_config.json", {"mask_token_id": [36]}),
        ("generation_config.json", {"mask_token_id": 1e300}),
        ("generation_config.json", {"mask_token_id": True}),
        ("generation_config.json", [[]]),
    ]
    found = []
    for n, (file, content) in enumerate(contents):
        for name in ("ESM-2", "LLaDA"):
            free = file == "vocab.txt" or "vocab" in str(content)
            spoil = lambda folder, f=file, c=content: _put(folder, f, c)  # noqa: E731
            found.append(spoilt(name, f"{n} {file} {_short(content)}", spoil, same=not free))
    return found


def _indices() -> list[Case]:
    maps: list[object] = [
        {"x": "../../../etc/passwd"}, {"x": "/etc/passwd"}, {"x": "missing.safetensors"}, {"x": 3}, {"x": None},
        {"x": ["model.safetensors"]}, [1], "x", None, 7, {"x": "config.json"}, {"x": ""}, {"x": "."}, {"x": "a\x00b"},
        {"x": "\n"}, {"x": "a" * 10**4}, {f"x{n}": f"part-{n}.safetensors" for n in range(1000)},
    ]  # fmt: skip
    found = []
    for n, value in enumerate(maps):
        for whole in (True, False):

            def spoil(folder: Path, value: object = value, whole: bool = whole) -> None:
                _put(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": value})
                if not whole:
                    (folder / "model.safetensors").rename(folder / "part-0.safetensors")

            how = f"index {n} {_short(value)}, {'a whole file too' if whole else 'parts'}"
            found.append(spoilt("LLaDA", how, spoil))
    return found


def _yaml() -> list[Case]:
    start = "tokens: 12\ngraph: {type: absorb}\n"
    lines = {
        "a call": "x: !!python/object/apply:os.system ['touch ran']\n",
        "a module": "x: !!python/module:antigravity\n",
        "laughs": "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)),
        "merged laughs": "a0: &a0 {x0: 1}\n"
        + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(12)),
        "itself": "x: &x [*x]\n",
        "model is itself": "model: &m {n_heads: *m}\n",
        "nested": "x: " + "[" * DEEP + "]" * DEEP + "\n",
        "a tab": "\tx: 1\n",
        "zeros": "x: \x00\n",
        "a date": "x: 2024-99-99\n",
        "a number in sixties": "x: " + "1:" * 10**4 + "1\n",
        "a set": "x: !!set {a, b}\n",
        "bytes": "x: !!binary '%%%'\n",
        "keys that are lists": "? [1, 2]\n: 3\n",
        "keys that are numbers": "3: 4\nnull: 5\n",
        "5 MB": "x: [" + "1, " * 2 * 10**6 + "1]\n",
        "a half character": 'x: "\\ud800"\n',
        "heads of words": "model: {n_heads: four}\n",
        "heads none": "model: {n_heads: 0}\n",
        "model a list": "model: [1]\n",
        "noise a word": "noise: loud\n",
        "sigmas the wrong way": "noise: {type: geometric, sigma_min: 5, sigma_max: 1}\n",
        "references round": "model: {n_heads: '${model.n_heads}'}\n",
        "a reference far": "model: {n_heads: '${" + "a." * 10**4 + "a}'}\n",
        "tokens a list": "tokens: [1]\n",
    }
    found = []
    for how, text in lines.items():
        spoil = lambda folder, t=text: _put(folder, ".hydra/config.yaml", start + t)  # noqa: E731
        found.append(spoilt("SEDD's trainer", f"YAML of {how}", spoil, same=False))
    for how, whole in {"a list": "[1, 2]", "nothing": "", "a word": "x", "two": "a: 1\n---\nb: 2\n"}.items():
        spoil = lambda folder, t=whole: _put(folder, ".hydra/config.yaml", t)  # noqa: E731
        found.append(spoilt("SEDD's trainer", f"YAML is {how}", spoil, same=False))
    return found


def _places() -> list[Case]:
    """What has the name of a file and is none, and names that are hard to write."""

    def fifo(file: Path) -> None:
        os.mkfifo(file)

    def link(target: str) -> Callable[[Path], None]:
        return lambda file: file.symlink_to(target)

    def listens(file: Path) -> None:
        here = os.getcwd()
        os.chdir(file.parent)  # its name may be too long from far away
        socket.socket(socket.AF_UNIX).bind(file.name)
        os.chdir(here)

    odd: dict[str, Callable[[Path], object]] = {
        "a fifo": fifo,
        "a socket": listens,
        "a folder": lambda file: file.mkdir(),
        "a link to itself": link("config.json"),
        "a link to nothing": link("nothing"),
        "a link to zeros": link("/dev/zero"),
        "a link to a terminal": link("/dev/tty"),
        "not to be read": lambda file: (file.touch(), file.chmod(0)),
    }
    found = []
    for name, files in (
        ("LLaDA", ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "vocab.txt")),
        ("saved", ("discdiff.json", "model.safetensors")),
        ("SEDD's trainer", (".hydra/config.yaml", "checkpoints-meta/checkpoint.pth")),
        ("MD4", ("config.json", "arrays.npz")),
    ):
        for file in files:
            for how, put in odd.items():

                def spoil(folder: Path, file: str = file, put: Callable[[Path], object] = put, how: str = how) -> None:
                    (folder / file).unlink(missing_ok=True)
                    if how == "a link to itself":
                        (folder / file).symlink_to(Path(file).name)
                    else:
                        put(folder / file)

                free = file in ("generation_config.json", "tokenizer.json", "vocab.txt", "config.json")
                found.append(spoilt(name, f"{file} is {how}", spoil, same=not free))

    def alone(put: Callable[[Path], object], name: str = "last.ckpt") -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            put(folder / name)
            return folder / name

        return make

    for how, put in odd.items():
        if how != "a link to itself":
            found.append(Case(f"last.ckpt is {how}", alone(put)))
    for how, called in {"lines": "a\nb", "half a character": "a\udce9", "blanks": " ", "a dash": "--help"}.items():
        again = lambda folder, c=called: folder.rename(folder.with_name(c))  # noqa: E731
        found.append(spoilt("MDLM", f"a folder named by {how}", again))
        found.append(Case(f"nothing named by {how}", lambda folder, c=called: folder / c))
    found.append(Case("a name too long", lambda folder: folder / ("x" * 5000)))
    found.append(Case("a name with a zero", lambda folder: folder / "a\x00b"))
    found.append(Case("an empty folder", lambda folder: folder))
    found.append(Case("a file below a file", lambda folder: _written(folder / "a.ckpt", b"") / "b"))
    return found
