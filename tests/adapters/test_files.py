"""The reader of files: what is odd, damaged or larger than it may be is one error of ours."""

import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from discdiff.adapters import Files, load
from discdiff.adapters.averages import bare, weights_of
from discdiff.adapters.dit import DiffusionTransformer
from discdiff.adapters.documents import CONFIGURATION, json_table, yaml_table
from discdiff.adapters.inert import Inert, load_inert, plain
from discdiff.adapters.loading import fit
from discdiff.adapters.low_rank import merged
from discdiff.adapters.settings import Refused, Settings
from discdiff.adapters.tokenizer import Tokenizer

CONFIG = {"model_type": "mdlm", "n_heads": 2}
HYDRA = {"algo": {"name": "mdlm"}, "model": {"n_heads": 2}, "noise": {"type": "loglinear"}}


def state(value: float | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = DiffusionTransformer(12, 16, 2, 1, 8)
    return {
        name: torch.full_like(part, value) if value is not None else part for name, part in network.state_dict().items()
    }


def folder(path: Path, weights: dict[str, Tensor] | None = None, **documents: object) -> Path:
    """A folder of MDLM's, with other JSON files by their stem."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights or state(), path / "model.safetensors")
    for stem, content in {"config": CONFIG, **documents}.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return path


def first(source: Path, **arguments: Any) -> float:  # noqa: ANN401
    """One number of the network that is loaded."""
    return float(next(load(source, quiet=True, **arguments).network.parameters()).flatten()[0])


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00}\x00", "config.json is not text in UTF-8: invalid start byte at byte 0"),
        (b'{"a": "\xe9"}', "config.json is not text in UTF-8"),
        (b"", "config.json is not JSON: Expecting value"),
        (b"[" * 100_000, "config.json is nested too deeply"),
        (b'{"a":' * 100_000, "config.json is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json is not JSON: Exceeds the limit .4300 digits."),
        (b'{"a": NaN}', "config.json is not JSON: NaN is no number of JSON"),
        (b'{"a": -Infinity}', "config.json is not JSON: -Infinity is no number of JSON"),
        (b'{"a": 1e999}', "config.json is not JSON: the number 1e999 is too large"),
        (b'{"a": 1, "a": 2}', "config.json is not JSON: the key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "config.json is not JSON: the key 'b' is there twice"),
        (b"[]", "config.json must hold a table of names at its top, got a list"),
        (b"null", "config.json must hold a table of names at its top, got a NoneType"),
        (b"{}" + b" " * CONFIGURATION, "config.json must be at most 16777216 bytes, got more"),
    ],
)
def test_json_that_is_odd_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    where = folder(tmp_path / "run")
    (where / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^load: {where}: {message}"):
        load(where, quiet=True)


def test_a_mark_of_the_byte_order_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    assert dict(json_table(tmp_path / "config.json")) == CONFIG
    assert dict(json_table(tmp_path / "none.json")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 1500, "config.yaml is nested too deeply"),
        ("a: &a {b: 1}\nc: {<<: *a}", "config.yaml is not YAML: merge keys are not read"),
        ("a: 1\na: 2", "config.yaml is not YAML: a key is there twice at line 1"),
        ("a: 2001-13-40", "config.yaml is not YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [exit]", "config.yaml is not YAML: could not determine a constructor"),
        ("? [a]\n: 1", "config.yaml is not YAML: while constructing a mapping in .* found unhashable key"),
        ("1: a", "config.yaml must hold a table of names at its top"),
        ("- a", "config.yaml must hold a table of names at its top, got a list"),
        ("a: '" + "b" * 2**18 + "'", "config.yaml must be at most 262144 bytes"),
    ],
)
def test_yaml_that_is_odd_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(Refused, match=f"^{message}"):
        yaml_table(tmp_path / "config.yaml")


def test_aliases_of_yaml_are_no_copies(tmp_path: Path) -> None:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    (tmp_path / "config.yaml").write_text(laughs)
    assert len(yaml_table(tmp_path / "config.yaml")) == 40


# --- what is no file --------------------------------------------------------------------------------------------------


def _fifo(place: Path) -> None:
    os.mkfifo(place)


def _socket(place: Path) -> None:
    here = os.getcwd()
    os.chdir(place.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(here)


def _loop(place: Path) -> None:
    place.symlink_to(place.name)


def _nowhere(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "config.yaml"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_fifo, "is a fifo, not a file"),
        (_socket, "is a socket, not a file"),
        (Path.mkdir, "is a folder, not a file"),
        (_loop, "cannot be read: Too many levels of symbolic links"),
        (_nowhere, "is a link to a file that is not there"),
    ],
)
def test_what_is_no_regular_file_is_refused(
    make: Callable[[Path], None], message: str, name: str, tmp_path: Path
) -> None:
    where = folder(tmp_path / "run", {} if name != "config.yaml" else None)
    (where / name).unlink(missing_ok=True)
    if name == "config.yaml":
        (where / "config.json").unlink()
    make(where / name)
    with pytest.raises(ValueError, match=rf"^load: .*{name} {message}"):
        load(where, quiet=True)


def test_a_source_that_is_no_folder_or_file_is_refused(tmp_path: Path) -> None:
    for make, message in (
        (_fifo, "run.pt is a fifo, not a file"),
        (_loop, "Too many levels"),
        (_nowhere, "is a link to"),
    ):
        place = tmp_path / "run.pt"
        make(place)
        with pytest.raises(ValueError, match=rf"^load: .*{message}"):
            load(place)
        place.unlink()
    with pytest.raises(ValueError, match="this cannot be read: File name too long"):
        load("x" * 5000)
    with pytest.raises(ValueError, match="this cannot be read: embedded null byte"):
        load("x\0y")
    for name in ("nothing", "./a/b", "a//b", "../a/b", "a/../b", ""):
        with pytest.raises((FileNotFoundError, ValueError), match=r"^load: "):
            load(name or tmp_path / "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_may_not_be_read_is_refused(tmp_path: Path) -> None:
    where = folder(tmp_path / "run")
    for name in ("config.json", "model.safetensors"):
        (where / name).chmod(0)
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            load(where, quiet=True)
        (where / name).chmod(0o600)


# --- archives ---------------------------------------------------------------------------------------------------------


def _saved(content: object, path: Path, **arguments: Any) -> Path:  # noqa: ANN401
    torch.save(content, path, **arguments)
    return path


class _Subclass(Tensor):
    pass


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "holds sparse tensors"),
        (lambda: torch.ones(2, device="meta"), "holds tensors without numbers"),
        (
            lambda: torch.ones(2, dtype=torch.complex64),
            "a must hold real or whole numbers, got a strided tensor on cpu of",
        ),
        (lambda: torch.ones(2).to(torch.uint16), "a must hold real or whole numbers, got a .* of torch.uint16"),
        (lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), r"quantized \(torch.float8_e4m3fn, by a\)"),
        (lambda: torch.ones(1).expand(2**20, 2**20), "its tensors have more numbers than 16 times the file"),
        (lambda: bytearray(b"abc"), r"holds bytes of any number \(builtins.bytearray\)"),
    ],
)
def test_tensors_of_odd_kinds_are_refused(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    file = _saved({"state_dict": {"a": make(), "b": torch.ones(2)}}, tmp_path / "odd.pt")
    with pytest.raises(Refused, match=rf"odd.pt.* {message}"):
        _ = Files(file).weights


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantized_tensors_and_subclasses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds quantized tensors"):
        _ = Files(_saved({"a": _quantized()}, tmp_path / "a.pt")).weights
    odd = torch.ones(2).as_subclass(_Subclass)
    odd.more = 1
    with pytest.raises(Refused, match=r"cannot be read as a file of torch.save"):
        _ = Files(_saved({"a": odd}, tmp_path / "b.pt")).weights


def _edited(path: Path, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip file of torch's whose data.pkl is another, with the right checksums."""
    with zipfile.ZipFile(path) as archive:
        held = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in held:
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)
    return path


def test_a_pickle_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    numbers = pickle.BININT1 + bytes([100])
    for new in (bytes([200]), bytes([50]), bytes([101])):
        file = _saved({"a": torch.arange(100.0), "b": torch.ones(7)}, tmp_path / "a.pt")
        with pytest.raises(Refused, match=r"a.pt (is damaged|cannot be read)"):
            load_inert(_edited(file, lambda held, new=new: held.replace(numbers, pickle.BININT1 + new)))
    file = _saved({"a": torch.arange(100.0)}, tmp_path / "a.pt")
    with pytest.raises(Refused, match=r"a.pt is damaged: .*/data/0 has another checksum"):
        load_inert(_flipped(file, b"\x00\x00\xc6\x42"))  # 99
    assert list(Files(_edited(_saved(state(), file), bytes)).weights) == list(state())


def _flipped(file: Path, held: bytes) -> Path:
    content = file.read_bytes()
    assert content.count(held) == 1
    file.write_bytes(content.replace(held, bytes([held[0] ^ 1]) + held[1:]))
    return file


def test_archives_that_unpack_to_more_are_refused(tmp_path: Path) -> None:
    file = _edited(_saved({"a": torch.zeros(2**22)}, tmp_path / "a.pt"), bytes, zipfile.ZIP_DEFLATED)
    with pytest.raises(Refused, match=r"a.pt is compressed, which torch.save does not do"):
        load_inert(file)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(2**24, np.float32))
    with pytest.raises(Refused, match=r"a.npz unpacks to more than 16 times its size"):
        _ = Files(tmp_path / "a.npz").weights


def _npz(path: Path, name: str, header: str, data: bytes) -> Path:
    said = header.encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + len(said).to_bytes(2, "little") + said + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", "has 8 bytes where its header says"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", "has 8 bytes where its header says"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "a.npy holds objects, not numbers"),
        (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': __import__('os')}",
            "is not an archive of arrays",
        ),
        ("{" * 400, "is not an archive of arrays"),
    ],
)
def test_arrays_are_what_their_headers_say(header: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        _ = Files(_npz(tmp_path / "a.npz", "a.npy", header, bytes(8))).weights


def test_a_header_of_safetensors_is_bounded(tmp_path: Path) -> None:
    for said in (2**63, 2**26, 10**6):
        (tmp_path / "a.safetensors").write_bytes(said.to_bytes(8, "little") + b"{}" + b" " * 100)
        with pytest.raises(Refused, match=f"its header must have at most 33554432 bytes, got {said}"):
            _ = Files(tmp_path / "a.safetensors").weights


def test_arrays_are_read_in_every_order_of_theirs(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / "a.npz", a=array, b=np.asfortranarray(array), c=array.astype(">f4"), d=np.float32(3))
    found = Files(tmp_path / "a.npz").weights
    for name in "abc":
        assert found[name].double().tolist() == array.tolist()
    assert found["d"].shape == ()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b""), "cannot be read as a file of torch.save"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1})), "cannot be read as a file of torch.save"),
        (lambda file: torch.save(state(), file, pickle_protocol=4), "is pickled by a protocol that is not read"),
        (lambda file: torch.save([1], file), "holds a list, not weights by name"),
        (lambda file: torch.save({"a": 1}, file), "holds no tensors by name under a"),
        (
            lambda file: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file),
            "is a TorchScript archive, which is code",
        ),
        (lambda file: torch.save({"model": nn.Linear(2, 2)}, file), "holds a whole Linear, which is code"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_are_none_of_torchs_are_refused(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.pt")
    with pytest.raises(Refused, match=f"^a.pt {message}"):
        _ = Files(tmp_path / "a.pt").weights


class _Loud:
    """It would speak if it were made."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return print, ("it ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_objects_are_inert_in_both_formats(
    zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"state_dict": state(), "loud": _Loud(), "hyper_parameters": {"config": HYDRA}}
    file = _saved(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    model = load(file, quiet=True)
    assert isinstance(Files(file).saved["loud"], Inert)
    assert "it ran" not in capsys.readouterr().out
    assert torch.equal(model.network.state_dict()["vocab_embed.embedding"], state()["vocab_embed.embedding"])


def test_configurations_that_never_end_are_refused() -> None:
    laughs: object = "x"
    for _ in range(40):
        laughs = [laughs, laughs]
    around: list[object] = []
    around.append(around)
    for value in (laughs, around):
        with pytest.raises(Refused, match="nested too deeply, or too large"):
            plain(value)
    assert plain({"a": (1, [2.0, None])}) == {"a": [1, [2.0, None]]}


def test_what_is_loaded_depends_on_no_file(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        file = tmp_path / name
        torch.save({"a": torch.ones(1000)}, file) if name == "a.pt" else save_file({"a": torch.ones(1000)}, file)
        found = Files(file).weights["a"]
        with file.open("r+b") as opened:
            opened.truncate(0)
        assert float(found.sum()) == 1000


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    a = torch.ones(3)
    found = Files(_saved({"a": a, "b": a, "c": a + 1}, tmp_path / "a.pt")).weights
    assert found["a"] is found["b"]
    assert found["a"] is not found["c"]


# --- which file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("0-5000.ckpt 0-100000.ckpt 3-20000.ckpt", "0-100000.ckpt"),
        ("0-5000.ckpt last.ckpt", "last.ckpt"),
        ("last.ckpt last-v1.ckpt last-v2.ckpt best.ckpt", "last-v2.ckpt"),
        ("epoch=3-step=20000.ckpt epoch=12-step=9000.ckpt", "epoch=3-step=20000.ckpt"),
        ("epoch=9-val_loss=0.99.ckpt epoch=10-val_loss=1.5.ckpt", "epoch=10-val_loss=1.5.ckpt"),
        ("step_1000.pt step_999.pt", "step_1000.pt"),
        ("model_0500.pt model_1000.pt model_0999.pt", "model_1000.pt"),
        ("a.ckpt optimizer.pt scheduler.pt rng_state_0.pth training_args.bin", "a.ckpt"),
        ("mp_rank_00_model_states.pt zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"),
        ("model.safetensors pytorch_model.bin", "model.safetensors"),
        ("model.pt other.pt", "model.pt"),
        ("model-00001-of-00002.safetensors model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors to "),
        ("pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin to "),
        ("mine-00001-of-00002.pt mine-00002-of-00002.pt", "mine-00001-of-00002.pt to mine-00002-of-00002.pt"),
        (
            "diffusion_pytorch_model-00001-of-00002.safetensors diffusion_pytorch_model-00002-of-00002.safetensors",
            "diffusion_pytorch_model-00001-of-00002.safetensors to ",
        ),
        ("model.safetensors model-00001-of-00002.safetensors", "model.safetensors"),
    ],
)
def test_of_several_files_the_usual_the_last_or_the_newest_is_taken(names: str, chosen: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).touch()
    assert Files(tmp_path).chosen.startswith(chosen)


@pytest.mark.parametrize(
    "names",
    [
        "best.ckpt final.ckpt",
        "step_1000.pt model_0500.pt",
        "val=0.25.ckpt val=0.75.ckpt",
        "step=100.ckpt step=100-v1.ckpt",
        "ema-step=100.pt raw-step=200.pt",
        "mp_rank_00_model_states.pt mp_rank_01_model_states.pt",
    ],
)
def test_files_without_an_order_are_asked_about(names: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).touch()
    first, second = sorted(names.split())
    with pytest.raises(
        Refused, match=f"which of its 2 files of weights is meant. pass file= one of {first}, {second}$"
    ):
        _ = Files(tmp_path).parts
    assert Files(tmp_path, first).chosen == first


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "model-00002-of-00003.safetensors").touch()
    with pytest.raises(Refused, match=r"the shards: of 3 files model-00001-of-00003.safetensors, model-00003-of"):
        _ = Files(tmp_path).parts
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(Refused, match="there are shards of several sets"):
        _ = Files(tmp_path).parts
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        Refused, match=r"model.safetensors.index.json: of 2 files model-00002-of-00002.safetensors are not"
    ):
        _ = Files(tmp_path).parts


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.pt", "a/../../x.pt", "a\\x.pt", "", ".", "x\0.pt", 3, None, ["x.pt"]]
)
def test_names_of_shards_stay_inside_the_folder(name: object, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(Refused, match="weight_map must name a file inside the folder, got"):
        _ = Files(tmp_path).parts


def test_the_hubs_links_to_blobs_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = folder(tmp_path / "blobs"), tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load(snapshot, quiet=True).convention.files == "model.safetensors"
    assert blobs.is_dir()


def test_file_names_the_file_or_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "run"
    for step, value in ((500, 1.0), (1000, 2.0)):
        folder(where / f"checkpoint-{step}", state(value))
        torch.save({}, where / f"checkpoint-{step}" / "optimizer.pt")
    assert first(where) == 2
    assert first(where, file="checkpoint-500") == 1
    assert first(where, file="checkpoint-500/model.safetensors") == 1
    capsys.readouterr()
    load(where, file="checkpoint-500")
    assert "  file:           checkpoint-500/model.safetensors\n" in capsys.readouterr().err
    for name, message in (
        ("nothing.pt", r"file= must name a file of weights of the folder, got 'nothing.pt'; it has no weights"),
        ("../x.pt", "file= must name a file inside the folder"),
        ("checkpoint-500/config.json", "file= must name a file of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            load(where, file=name)
    with pytest.raises(ValueError, match="file= chooses among the files of a folder"):
        load(where / "checkpoint-500" / "model.safetensors", file="x.pt")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("checkpoint-500/a.pt checkpoint-1000/a.pt checkpoint-x/a.pt", "checkpoint-1000/a.pt"),
        (
            "global_step9/mp_rank_00_model_states.pt global_step10/mp_rank_00_model_states.pt",
            "global_step10/mp_rank_00",
        ),
        ("checkpoints/0-500.ckpt checkpoints/last.ckpt", "checkpoints/last.ckpt"),
        ("checkpoints/0-500.ckpt a.pt checkpoint-500/a.pt", "a.pt"),
    ],
)
def test_folders_of_checkpoints_are_looked_into(names: str, chosen: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert Files(tmp_path).chosen.startswith(chosen)


# --- prefixes and averages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("module.a.w module.b", "a.w b"),
        ("module._orig_mod.a _orig_mod.b module.module.c", "_orig_mod.b"),
        ("_forward_module._orig_mod.a _forward_module.b", "a b"),
        ("base_model.model.module.a base_model.model.module.b", "a b"),
        ("model._orig_mod.a model.layers.0._fsdp_wrapped_module.b", "model.a model.layers.0.b"),
        ("layers.0._checkpoint_wrapped_module.a", "layers.0.a"),
        ("module.a b", "module.a b"),
        ("model.a backbone.b", "model.a backbone.b"),
    ],
)
def test_prefixes_of_wrappers_are_taken_away(names: str, expected: str) -> None:
    found = list(bare({name: torch.zeros(1) for name in names.split()}))
    assert found == expected.split() or (expected == "_orig_mod.b" and found == ["module.a", "b", "module.module.c"])


def test_names_that_become_one_are_refused() -> None:
    with pytest.raises(Refused, match="two of its tensors have the name a once"):
        bare({"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)})


RAW = {"a": torch.zeros(2), "b.c": torch.zeros(3)}
EMA = {name: part + 1 for name, part in RAW.items()}


@pytest.mark.parametrize(
    "held",
    [
        {"state_dict": RAW, "state_dict_ema": EMA},
        {"state_dict": RAW, "ema_state_dict": EMA},
        {"model": RAW, "ema": EMA},
        {"model": RAW, "model_ema": {"module": EMA}},
        {"model": RAW, "ema": {"decay": 0.9, "shadow_params": EMA}},
        {"model": RAW, "ema": {"decay": 0.9, "shadow_params": list(EMA.values())}},
        {"model": RAW, "ema": {"shadow": EMA, "backup": {}}},
        {"params": RAW, "params_ema": EMA},
        {"net": RAW, "shadow_params": list(EMA.values())},
        {"module": RAW, "ema": {"module.a": EMA["a"], "module.b.c": EMA["b.c"]}},
        {"state_dict": {f"backbone.{n}": w for n, w in RAW.items()} | {f"ema_model.{n}": w for n, w in EMA.items()}},
        {"state_dict": {f"net.{n}": w for n, w in RAW.items()} | {"ema.a": EMA["a"], "ema.b.c": EMA["b.c"]}},
        RAW | {"model_ema.a": EMA["a"], "model_ema.bc": EMA["b.c"], "model_ema.decay": torch.tensor(0.9)},
        {"model": {f"online_model.{n}": w for n, w in RAW.items()} | {f"ema_model.{n}": w for n, w in EMA.items()}},
        {"state_dict": RAW, "ema": {"n_averaged": torch.tensor(3)} | {f"module.{n}": w for n, w in EMA.items()}},
    ],
)
def test_averages_are_found_under_every_usual_name(held: dict[str, Any]) -> None:
    for which, value, averaged in ((None, 1, True), ("ema", 1, True), ("raw", 0, False)):
        found, ema = weights_of(held, which, "x.pt")
        names = [name.removeprefix("backbone.").removeprefix("net.") for name in found if "online" not in name]
        assert (sorted(names), ema) == (["a", "b.c"], averaged)
        assert {float(part.mean()) for part in found.values()} == {value}


def test_averages_by_their_paths_are_chosen() -> None:
    raw, ema = (
        {f"state/{key}/a/kernel": torch.full((2,), value)} for key, value in (("params", 0.0), ("ema_params", 1.0))
    )
    assert weights_of(raw | ema, None, "x") == (ema, True)
    assert weights_of(raw | ema, "raw", "x") == (raw, False)
    assert weights_of(raw, None, "x") == (raw, False)
    with pytest.raises(Refused, match="x holds no averages of its weights"):
        weights_of(raw, "ema", "x")


def test_averages_in_an_inert_object_and_without_weights_are_found() -> None:
    kept = Inert()
    kept.__setstate__({"shadow_params": list(EMA.values())})
    assert float(weights_of({"model": RAW, "ema": kept}, None, "x")[0]["a"][0]) == 1
    assert weights_of({"ema": EMA}, None, "x") == (EMA, True)
    with pytest.raises(Refused, match=r"x holds no tensors by name under ema; its averages are taken by weights='ema'"):
        weights_of({"ema": EMA}, "raw", "x")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {"model": RAW, "ema": list(EMA.values())[:1]},
            "its 1 averages are not of its 2 parameters, in number or shapes",
        ),
        ({"model": RAW, "ema": list(EMA.values())[::-1]}, "its 2 averages are not of its 2 parameters"),
        ({"model": RAW, "ema": {"a": torch.zeros(3)}}, r"the average of a must have its shape \(2,\), got \(3,\)"),
        (
            {"model": RAW, "ema": {"other": torch.zeros(2)}},
            "the averages, such as other, are not of its weights, such as a",
        ),
        (
            {"model": RAW, "ema": {"deep": {"er": EMA}}},
            "what lies under ema is no average that is known; weights='raw'",
        ),
        ({"ema": list(EMA.values())}, "holds a list of averages, and no weights that give them names"),
    ],
)
def test_averages_that_are_not_of_the_weights_are_refused(held: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        weights_of(held, None, "x.pt")


def test_numbers_under_the_name_of_averages_are_none() -> None:
    for value in (0.999, None, True, {}, [], {"decay": torch.tensor(0.9), "num_updates": 3}):
        assert weights_of({"model": RAW, "ema": value}, None, "x") == (RAW, False)


def test_a_list_of_averages_has_no_place_for_buffers_and_what_is_tied() -> None:
    tied = torch.zeros(2)
    raw = {
        "a": tied,
        "count": torch.tensor([1]),
        "b": torch.zeros(3),
        "head": tied,
        "rotary_emb.inv_freq": torch.ones(1),
    }
    found, _ = weights_of({"model": raw, "ema": [torch.ones(2), torch.ones(3)]}, None, "x")
    assert {name: float(part.float().mean()) for name, part in found.items()} == dict.fromkeys(raw, 1.0)
    assert found["head"] is found["a"]


def test_weights_chooses_and_what_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": state(1.0), "ema": state(2.0), "hyper_parameters": {"config": HYDRA}}, file)
    assert (first(file), first(file, weights="raw"), first(file, weights="ema")) == (2, 1, 2)
    assert load(file, quiet=True).convention.weights == "ema"
    assert load(file, quiet=True, weights="raw").convention.weights == "raw"
    with pytest.raises(ValueError, match=r"model.safetensors holds no averages of its weights, and weights='ema' asks"):
        load(folder(tmp_path / "run"), weights="ema")


# --- tokenizer and mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab", {"a": 1.5}, "vocab.json: the id of 'a' must be a whole number, got 1.5"),
        ("vocab", {"a": True}, "vocab.json: the id of 'a' must be a whole number, got True"),
        ("vocab", {"a": -1}, "vocab.json: the id of 'a' must lie in 0..2147483648, got -1"),
        ("tokenizer", {"added_tokens": "x"}, "tokenizer.json: added_tokens must be a list, got 'x'"),
        ("tokenizer", {"added_tokens": ["x"]}, "tokenizer.json, added_tokens: a token must be a table, got 'x'"),
        ("tokenizer", {"added_tokens": [{"id": 1}]}, "tokenizer.json, added_tokens: content is missing"),
        ("tokenizer", {"added_tokens": [{"id": "1", "content": "a"}]}, "id must be a whole number, got '1'"),
        ("tokenizer", {"model": []}, r"tokenizer.json: model must be a table, got \[\]"),
        ("tokenizer", {"model": {"vocab": 3}}, "tokenizer.json, model: vocab must be a table, got 3"),
        (
            "tokenizer",
            {"model": {"vocab": [["a", 0.0], "b"]}},
            "model: vocab must hold tokens with their scores, got 'b'",
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {}}}, "an id must be a whole number, got 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "x"}}, "a token must be a table, got 'x'"),
    ],
)
def test_a_tokenizer_of_wrong_types_is_refused(name: str, content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match=message):
        _ = Tokenizer(tmp_path).tokens


def test_null_in_a_tokenizer_is_none(tmp_path: Path) -> None:
    for name, content in {
        "tokenizer": {"model": {"vocab": None}, "added_tokens": None},
        "tokenizer_config": {"added_tokens_decoder": None, "mask_token": None},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = Tokenizer(tmp_path)
    assert (found.tokens, found.size, found.special("mask_token")) == ({}, None, None)


def test_a_word_list_has_a_word_a_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("a\r\nb\u2028c\r\n\x85\r\n".encode())
    assert Tokenizer(tmp_path).tokens == {"a": 0, "b\u2028c": 1, "\x85": 2}


@pytest.mark.parametrize("value", ["11", [11], True, 11.0, -1, {}])
@pytest.mark.parametrize("where", ["config", "generation_config", "text_config", "dllm_config"])
def test_a_mask_id_is_a_whole_number(value: object, where: str, tmp_path: Path) -> None:
    inner = {"mask_token_id": value}
    documents = (
        {where: inner}
        if where == "generation_config"
        else {"config": CONFIG | (inner if where == "config" else {where: inner})}
    )
    named = f"{where}.json" if where.endswith("config") and "_c" not in where.replace("generation_c", "") else where
    with pytest.raises(
        ValueError, match=rf"family MDLM\): .*{named}: mask_token_id must be (a whole number|at least 0), got"
    ):
        load(folder(tmp_path, **documents), quiet=True)


def test_a_mask_id_is_found_wherever_it_is_said(tmp_path: Path) -> None:
    added = {"added_tokens_decoder": {"7": {"content": "[M]"}}}
    for documents, source in (
        ({"config": CONFIG | {"mask_token_id": 7}, "generation_config": {"mask_token_id": None}}, "config.json"),
        ({"config": CONFIG | {"text_config": {"mask_token_id": 7}}}, "config.json, text_config"),
        ({"config": CONFIG | {"dllm_config": {"mask_token_id": 7}}}, "config.json, dllm_config"),
        ({"tokenizer_config": added | {"mask_token": "[M]"}}, "the tokenizer"),
        ({"tokenizer_config": added | {"mask_token": {"content": "[M]"}}}, "the tokenizer"),
        ({"tokenizer_config": added, "special_tokens_map": {"mask_token": {"content": "[M]"}}}, "the tokenizer"),
    ):
        where = folder(tmp_path / str(len(list(tmp_path.iterdir()))), **documents)
        assert Files(where).mask_id(None, None) == (7, source)
        assert Files(where).config.keys() <= {*CONFIG, "mask_token_id"}
    where = folder(tmp_path / "none", tokenizer_config={"mask_token": "[M]"})
    with pytest.raises(
        Refused, match=r"nothing in its files says the mask id \(the tokenizer names '\[M\]', which none"
    ):
        Files(where).mask_id(None, None)
    where = folder(tmp_path / "odd", tokenizer_config={"mask_token": 7})
    with pytest.raises(Refused, match=r"tokenizer_config.json: mask_token must be a string, got 7"):
        Files(where).mask_id(None, None)


# --- quantized weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("layers.0.q_proj.qweight", "GPTQ or AWQ"),
        ("layers.0.q_proj.weight_scale_inv", "FP8"),
        ("layers.0.q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("layers.0.q_proj.SCB", "bitsandbytes"),
    ],
)
def test_quantized_weights_are_refused_by_their_method(name: str, method: str, tmp_path: Path) -> None:
    where = folder(tmp_path, state() | {name: torch.zeros(2)})
    with pytest.raises(
        ValueError, match=rf"the weights are quantized \({method}, by {name}\); load those that are not, or"
    ):
        load(where, quiet=True)


def test_a_configuration_that_says_so_is_believed(tmp_path: Path) -> None:
    where = folder(tmp_path, config=CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ValueError, match=r"quantized \(gptq, by config.json, quantization_config\); load those"):
        load(where, quiet=True)
    assert load(folder(tmp_path, config=CONFIG | {"quantization_config": None}), quiet=True).convention.family == "MDLM"


# --- adapters ---------------------------------------------------------------------------------------------------------

RANK = 3


def adapter(path: Path, base: str, more: dict[str, Tensor] | None = None, **settings: object) -> dict[str, Tensor]:
    """PEFT's folder, for one layer and the table of embeddings; what it holds."""
    torch.manual_seed(1)
    path.mkdir(parents=True)
    held = {
        "blocks.0.attn_qkv.lora_A.weight": torch.randn(RANK, 16),
        "blocks.0.attn_qkv.lora_B.weight": torch.randn(48, RANK),
    } | (more or {})
    save_file({f"base_model.model.{name}": part for name, part in held.items()}, path / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": 8,
        "lora_alpha": 5,
        "target_modules": ["attn_qkv"],
    }
    (path / "adapter_config.json").write_text(json.dumps(said | settings))
    return held


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 5 / RANK),
        ({"use_rslora": True}, 5 / RANK**0.5),
        ({"alpha_pattern": {"attn_qkv": 7}}, 7 / RANK),
        ({"alpha_pattern": {"^blocks.0.attn_qkv": 7, "attn_qkv": 9}}, 7 / RANK),
        ({"alpha_pattern": {"qkv": 7}}, 5 / RANK),
        ({"use_dora": False, "lora_dropout": 0.1, "megatron_config": None, "init_lora_weights": "gaussian"}, 5 / RANK),
    ],
)
def test_an_adapter_is_merged_into_its_base(
    settings: dict[str, object], scale: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "base")
    held = adapter(tmp_path / "lora", "../base", **settings)
    found = load(tmp_path / "lora").network.state_dict()
    a, b = (held[f"blocks.0.attn_qkv.lora_{one}.weight"] for one in "AB")
    base = state()
    expected = base["blocks.0.attn_qkv.weight"] + scale * (b @ a)
    torch.testing.assert_close(found["blocks.0.attn_qkv.weight"], expected)
    assert all(torch.equal(found[name], base[name]) for name in base if name != "blocks.0.attn_qkv.weight")
    assert "  file:           adapter_model.safetensors, merged into " in capsys.readouterr().err


def test_layers_of_other_orders_and_modules_to_save(tmp_path: Path) -> None:
    folder(tmp_path / "base")
    wide = {"output_layer.linear.weight": torch.randn(12, 16), "output_layer.linear.bias": torch.randn(12)}
    adapter(tmp_path / "saved", str(tmp_path / "base"), wide, modules_to_save=["linear"])
    found = load(tmp_path / "saved", quiet=True).network.state_dict()
    assert all(torch.equal(found[name], part) for name, part in wide.items())
    again = {"blocks.0.mlp.0.base_layer.bias": torch.randn(64)}
    adapter(tmp_path / "again", str(tmp_path / "base"), again)
    found = load(tmp_path / "again", quiet=True).network.state_dict()
    assert torch.equal(found["blocks.0.mlp.0.bias"], again["blocks.0.mlp.0.base_layer.bias"])
    torch.manual_seed(2)
    square = {
        "blocks.0.attn_out.lora_A.weight": torch.randn(2, 16),
        "blocks.0.attn_out.lora_B.weight": torch.randn(16, 2),
    }
    adapter(tmp_path / "in_out", "../base", square, fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"attn_qkv: B A is \(16, 48\), and the base's weight \(48, 16\)"):
        load(tmp_path / "in_out", quiet=True)
    file = tmp_path / "in_out" / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}": part for name, part in square.items()}, file)
    found = load(tmp_path / "in_out", quiet=True).network.state_dict()
    a, b = square.values()
    expected = state()["blocks.0.attn_out.weight"] + 5 / 2 * (b @ a).T
    torch.testing.assert_close(found["blocks.0.attn_out.weight"], expected)


def test_tables_of_embeddings_are_adapted_unless_they_are_the_output_layer_too() -> None:
    torch.manual_seed(0)
    base, a, b = {"embed.weight": torch.randn(7, 4)}, torch.randn(2, 7), torch.randn(4, 2)
    held = {"base_model.model.embed.lora_embedding_A": a, "base_model.model.embed.lora_embedding_B": b}
    said = Settings({"peft_type": "LORA", "lora_alpha": 3}, "adapter_config.json")
    found = merged(base, held, said, tied=False)
    torch.testing.assert_close(found["embed.weight"], base["embed.weight"] + 3 / 2 * (b @ a).T)
    with pytest.raises(Refused, match="adapts a table of embeddings that is the output layer too"):
        merged(base, held, said, tied=True)


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"use_dora": True}, {}, "adapter_config.json: use_dora is not read; merge it by PEFT's merge_and_unload"),
        ({"peft_type": "IA3"}, {}, "adapter_config.json: peft_type must be LORA, got IA3"),
        (
            {"init_lora_weights": "pissa"},
            {},
            "init_lora_weights must be one of true, gaussian, orthogonal, eva, got pissa",
        ),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication is not read"),
        ({"a_new_one": 3}, {}, "a_new_one is not read"),
        ({"alpha_pattern": {"(a+)+$": 3}}, {}, "must be the end of a module's name"),
        ({"lora_alpha": "x"}, {}, "lora_alpha must be a number in .*, got 'x'"),
        ({}, {"blocks.0.attn_qkv.lora_magnitude_vector": torch.ones(48)}, "lora_magnitude_vector is of an adapter"),
        ({}, {"nothing.lora_A.weight": torch.ones(1, 2)}, "nothing.lora_A.weight needs nothing.weight of the base"),
        (
            {},
            {"blocks.0.mlp.0.lora_A.weight": torch.ones(1, 2)},
            "needs blocks.0.mlp.0.lora_B.weight, which is not there",
        ),
        ({}, {"head.weight": torch.ones(2)}, "head.weight is saved with the adapter, and the base has none"),
        ({"base_model_name_or_path": None}, {}, "adapter_config.json: base_model_name_or_path is missing"),
        (
            {"base_model_name_or_path": "../none"},
            {},
            "base_model_name_or_path names '../none': there is no file or folder",
        ),
        ({"base_model_name_or_path": "../lora"}, {}, "this adapter's base is an adapter itself"),
        ({"base_model_name_or_path": ""}, {}, "base_model_name_or_path must name the base, got ''"),
    ],
)
def test_adapters_that_are_not_read_are_named(
    settings: dict[str, object], more: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    folder(tmp_path / "base")
    adapter(tmp_path / "lora", "../base", more, **settings)
    with pytest.raises(ValueError, match=f"^load: .*{message}"):
        load(tmp_path / "lora", quiet=True)


def test_an_adapter_beside_whole_weights_is_asked_about(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    adapter(tmp_path / "lora", str(base))
    folder(tmp_path / "lora", state(3.0))
    with pytest.raises(
        ValueError, match=r"holds an adapter, adapter_model.safetensors, and whole weights, model.safetensors"
    ):
        load(tmp_path / "lora", quiet=True)
    assert first(tmp_path / "lora", file="model.safetensors") == 3
    assert "merged into" in load(tmp_path / "lora", quiet=True, file="adapter_model.safetensors").convention.files
    assert (
        "merged into"
        in load(tmp_path / "lora" / "adapter_model.safetensors", quiet=True, family="MDLM").convention.files
    )
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"this is an adapter, and adapter_config.json is not beside it"):
        load(tmp_path / "lora" / "adapter_model.safetensors", quiet=True)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetch(name: str, **arguments: Any) -> str:  # noqa: ANN401
        asked.append((name, arguments))
        return str(folder(tmp_path / name.replace("/", "-")))

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    load("someone/model", quiet=True, revision="v2", token="secret", cache_dir=tmp_path)
    name, arguments = asked.pop()
    assert (name, arguments["revision"], arguments["token"]) == ("someone/model", "v2", "secret")
    assert arguments["cache_dir"] == tmp_path
    assert "*.py" in arguments["ignore_patterns"]
    assert not any("py" in kind.rpartition(".")[2] for kind in arguments["allow_patterns"])
    load("someone/model", quiet=True, file="model.safetensors")
    assert "*.safetensors" not in asked.pop()[1]["allow_patterns"]
    adapter(tmp_path / "lora", "someone/base", revision="v3")
    load(tmp_path / "lora", quiet=True, token="secret")
    name, arguments = asked.pop()
    assert (name, arguments["revision"], arguments["token"]) == ("someone/base", "v3", "secret")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("RevisionNotFoundError", "check revision=: a branch, a tag or a commit"),
        ("GatedRepoError", "accept its terms on its page, then pass token="),
        ("RepositoryNotFoundError", "for a private one pass token="),
        ("LocalEntryNotFoundError", "fetch it elsewhere and pass the folder"),
    ],
)
def test_the_hubs_errors_say_what_to_do(error: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), error)

    def refuse(*arguments: object, **named: object) -> None:
        raise kind.__new__(kind, "no")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=rf"the hub gave nothing for it: .*; .*{advice}"):
        load("someone/model", token="secret")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"file": 3}, "load: file must be a string, got 3"),
        ({"weights": "mean"}, "load: weights must be 'raw', 'ema' or None, got 'mean'"),
        ({"revision": 3}, "load: revision must be a string, got 3"),
        ({"token": b"secret"}, "load: token must be a string$"),
        ({"cache_dir": 3}, "load: cache_dir must be a path, got 3"),
        ({"ignore": "key"}, "load: ignore must be a sequence, got 'key'"),
        ({"ignore": [3]}, "load: ignore must hold names of settings"),
        ({"mask_id": 1.5}, "load: mask_id must be a whole number, got 1.5"),
        ({"mask_id": -1}, "load: mask_id must be at least 0, got -1"),
        ({"block": 0}, "load: block must be at least 1, got 0"),
        ({"dtype": "float32"}, "load: dtype must be a torch.dtype of real numbers, got 'float32'"),
        ({"dtype": torch.int64}, "load: dtype must be a torch.dtype of real numbers"),
        ({"schedule": "linear"}, "load: schedule must be a Schedule, got 'linear'"),
        ({"quiet": 1}, "load: quiet must be True or False, got 1"),
        ({"device": "tpu!"}, "load: device must be a device of this machine"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_arguments_of_load_are_looked_at(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        load(tmp_path, **arguments)


# --- families and networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "weight", "expected"),
    [
        ({"model_type": "theirs", "block_size": 4}, "model.layers.0.self_attn.q_norm.weight", r"A2D-Qwen3', block=4\)"),
        ({"model_type": "fast_dllm"}, "model.layers.0.self_attn.q_proj.bias", r"A2D-Qwen2', block=...\)"),
        ({"model_type": "dream2"}, "w", r"Dream'\)"),
        ({"model_type": "modern_bert"}, "w", r"ModernBERT'\)"),
    ],
)
def test_unknown_kinds_are_named_with_the_nearest_family(
    config: dict[str, Any], weight: str, expected: str, tmp_path: Path
) -> None:
    where = folder(tmp_path, {weight: torch.zeros(2)}, config=config | {"architectures": ["Theirs"]})
    said = rf"no family recognises model_type '{config['model_type']}' \(architectures Theirs\); the nearest is "
    with pytest.raises(ValueError, match=rf"^load: {where}: {said}.*: load\(family='{expected}; known: MDLM, "):
        load(where, quiet=True)


def test_weights_fit_a_network_that_has_no_memory_yet() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    whole = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    fit(network, {name: part.double() if part.is_floating_point() else part for name, part in whole.items()})
    assert {part.dtype for part in network.parameters()} == {torch.float32}
    assert network(torch.ones(2, 2)).shape == (2, 3)
    with torch.device("meta"):
        huge = nn.Linear(10**7, 10**7)
    with pytest.raises(Refused, match=r"weight \(2, 2\) in place of \(10000000, 10000000\)"):
        fit(huge, {"weight": torch.zeros(2, 2), "bias": torch.zeros(10**7)})
    for weights, message in (
        ({"weight": torch.zeros(1, 1)}, "1 missing, such as bias"),
        ({"weight": torch.zeros(1, 1), "bias": torch.zeros(1), "more": torch.zeros(1)}, "1 left over, such as more"),
        (
            {"weight": torch.zeros(1, 1), "bias": torch.zeros(1).long()},
            "1 of another kind, such as bias torch.int64 in",
        ),
    ):
        with pytest.raises(Refused, match=f"the weights do not fit a Linear: {message}"):
            fit(nn.Linear(1, 1), weights)


def test_a_buffer_that_is_not_saved_must_be_made() -> None:
    with torch.device("meta"):
        network = nn.Linear(1, 1)
        network.register_buffer("table", torch.zeros(2), persistent=False)
    with pytest.raises(RuntimeError, match="the buffers table are not saved; make them outside the meta device"):
        fit(network, {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})


def test_damaged_files_are_errors_of_ours(tmp_path: Path) -> None:
    """Every file of a folder and of checkpoints, cut short and with bytes replaced, loads or is refused by ``load``."""
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 11, "content": "[M]"}]}
    where = folder(tmp_path / "run", tokenizer=tokenizer, tokenizer_config={"mask_token": "[M]"})
    files = sorted(where.iterdir())
    for zipped in (True, False):
        content = {"state_dict": state(), "hyper_parameters": {"config": HYDRA}}
        files.append(_saved(content, tmp_path / f"{zipped}.ckpt", _use_new_zipfile_serialization=zipped))
    np.savez(tmp_path / "a.npz", **{name: part.numpy() for name, part in state().items()})
    random, failed = np.random.default_rng(0), 0
    for file in (*files, tmp_path / "a.npz"):
        whole = file.read_bytes()
        for trial in range(12):
            held, place = bytearray(whole), int(random.integers(min(len(whole), 2000)))
            if trial % 3 == 0:
                del held[place:]
            elif trial % 3 == 1:
                held[place] ^= 1 << int(random.integers(8))
            else:
                held[place : place + 4] = random.bytes(4)
            file.write_bytes(held)
            try:
                load(where if file.parent == where else file, quiet=True, family="MDLM")
            except (ValueError, FileNotFoundError) as error:
                assert str(error).startswith("load: "), (file.name, trial, error)
                failed += 1
        file.write_bytes(whole)
    assert failed > 60
    assert load(where, quiet=True).convention.family == "MDLM"


@pytest.mark.usefixtures("as_user")
def test_files_in_memory_are_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="source must be a path or an id of the hub"):
        load(io.BytesIO(b""))  # type: ignore[arg-type]
