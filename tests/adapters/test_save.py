"""Back to disk: what is saved is loaded with equal logits, convention and process; the rest is refused by name."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_checkpoint import EVERY, by_hand
from safetensors.torch import load_file
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters.convention import Convention
from discdiff.adapters.evodiff import Tabulated, blosum
from discdiff.adapters.record import clock_of, convention_of, described, recorded
from discdiff.adapters.settings import Refused, Settings
from discdiff.process import FromFunction

X = torch.randint(0, 6, (2, 5), generator=torch.Generator().manual_seed(3))


def said(model: dd.Denoiser, seed: int = 0) -> Tensor:
    """What the network says of random states at an early and a late time."""
    length = 64 if getattr(model.fn, "side", None) or getattr(getattr(model.fn, "network", None), "side", None) else 8
    x = torch.randint(model.process.states, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.output(x, torch.tensor([[0.2], [0.9]], dtype=torch.float64)).source


def convention(model: dd.Denoiser) -> Convention:
    assert isinstance(model, dd.adapters.Loaded)
    return replace(model.convention, **({"files": ""} if hasattr(model.convention, "files") else {}))


@pytest.mark.parametrize("name", list(EVERY))
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    model = dd.load(EVERY[name](tmp_path / "read"), quiet=True)
    folder = model.save(tmp_path / "a" / "saved")
    again = dd.load(folder, quiet=True)
    assert torch.equal(said(again), said(model))
    assert float(said(model).std()) > 0.01
    assert convention(again) == convention(model)
    assert (again.process, again.call.time, again.call.shift, again.call.suppress) == (
        model.process, model.call.time, model.call.shift, model.call.suppress,
    )  # fmt: skip
    assert type(again.network) is type(model.network)
    twice = dd.load(again.save(tmp_path / "twice"), quiet=True)
    assert torch.equal(said(twice), said(model))
    assert convention(twice) == convention(model)
    assert sorted(os.listdir(tmp_path / "a")) == ["saved"], "nothing is left beside it"


def test_a_correction_and_another_clock_are_kept(tmp_path: Path) -> None:
    model = dd.load(EVERY["GIDD"](tmp_path / "read"), quiet=True)
    corrected = replace(model.convention, suppress=(1, 4), shift=True).denoiser(model.network)
    again = dd.load(corrected.with_schedule(dd.Cosine()).save(tmp_path / "saved"), quiet=True)
    assert (again.call.suppress, again.call.shift, again.process.schedule) == ((1, 4), True, dd.Cosine())
    assert torch.equal(said(again), said(corrected.with_schedule(dd.Cosine())))
    assert not torch.equal(said(again), said(corrected))
    with pytest.raises(ValueError, match="its own clock"):
        dd.load(tmp_path / "saved", schedule=dd.Linear(), quiet=True)
    with pytest.raises(ValueError, match="says the mask and the block"):
        dd.load(tmp_path / "saved", mask_id=3, quiet=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = dd.load(EVERY["BERT"](tmp_path / "read"), quiet=True, dtype=dtype)
    again = dd.load(model.save(tmp_path / "bert"), quiet=True)
    assert {part.dtype for part in again.network.parameters()} == {dtype}
    assert torch.equal(said(again), said(model))
    own = by_hand()
    own.fn.to(dtype)  # type: ignore[attr-defined]
    assert {part.dtype for part in load_file(own.save(tmp_path / "own") / "model.safetensors").values()} == {dtype}
    assert torch.equal(said(dd.load(tmp_path / "own", quiet=True)), said(own))


# --- made by hand -----------------------------------------------------------------------------------------------------


class Mine(nn.Module):
    """A user's own: tied weights, a buffer, whole numbers, a view, and a forward that wants both arguments."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.module = nn.Embedding(7, 4)  # a name that wrappers have as their prefix
        self.module.weight.data = torch.randn(7, 4, generator=generator)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.module.weight
        wide = torch.randn(2, 4, generator=generator)
        self.register_buffer("offset", wide[0])
        self.register_buffer("more", wide[1])
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        told = 0.0 if time is None else time[:, None, None]
        return self.head(self.module(x) * self.count + self.offset + self.more) + told * torch.arange(7)


@pytest.mark.parametrize("time", [None, "alpha"])
@pytest.mark.usefixtures("as_user")
def test_a_network_of_ones_own_is_given_back(time: dd.denoiser.TimeArgument, tmp_path: Path) -> None:
    process, options = dd.Masked(7, dd.Polynomial(1.5), mask_id=3), {"shift": True, "suppress": [5], "length": 8}
    options |= {"name": "mine", "cost": 2.0}
    model = dd.Denoiser(Mine(2), process, "denoiser", time=time, time_dtype=torch.float64, **options)
    folder = model.save(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"a Mine of the user's own: pass load\(\.\.\., network=\) such a one"):
        dd.load(folder, quiet=True)
    again = dd.load(folder, network=Mine(), quiet=True)
    assert torch.equal(said(again), said(model))
    assert (again.process, again.predicts, again.length, again.call.time_dtype) == (
        process,
        "denoiser",
        8,
        torch.float64,
    )
    assert (again.call.time, again.call.shift, again.call.suppress) == (time, True, (5,))
    assert (again.name, again.cost) == ("mine", 2.0)
    assert isinstance(again.network, Mine)
    assert again.network.head.weight is again.network.module.weight, "what was tied is tied"
    assert int(again.network.count) == 2
    tokens = [dd.Sampler(process, one, S.Ancestral(), steps=3).sample(2, 8, seed=1).tokens for one in (model, again)]
    assert torch.equal(*tokens)
    with pytest.raises(ValueError, match=r"do not fit a Linear: .* missing"):
        dd.load(folder, network=nn.Linear(3, 3), quiet=True)
    with pytest.raises(TypeError, match="network must be a module"):
        dd.load(folder, network=3, quiet=True)  # type: ignore[arg-type]
    own = by_hand().save(tmp_path / "own")
    with pytest.raises(ValueError, match="says how its network is built"):
        dd.load(own, network=Mine(), quiet=True)
    with pytest.raises(ValueError, match="no folder that save wrote, so network= is not"):
        dd.load(EVERY["MDLM"](tmp_path / "mdlm"), network=Mine(), quiet=True)


# --- what cannot be written, and where --------------------------------------------------------------------------------


class Odd(dd.Uniform):
    """A process that nobody knows."""


def learned_clock() -> dd.PerSite:
    return dd.PerSite(dd.Linear(), nn.Parameter(torch.zeros(8)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.guided(dd.Truncation(top_k=2)), "its guides cannot be written"),
        (lambda m: m.calling(lambda x, time: m.fn(x, time)), "is no module"),
        (lambda m: dd.quantize(m), r"other parts than its class makes \(.*quantized network"),
        (lambda m: m.with_schedule(learned_clock()), "log_power of PerSite, cannot be written: it is to be learned"),
        (lambda m: m.with_schedule(FromFunction(lambda t: 1 - t)), "function of FromFunction, cannot be .*<lambda>"),
        (lambda m: dd.Denoiser(m.fn, Odd(7, dd.Linear()), "loo"), r"process cannot be written: Odd\(7.*known kinds"),
        (
            lambda m: dd.Denoiser(m.fn, dd.Hybrid(7, dd.Linear(), p_uniform=lambda a: a / 4), "loo"),
            "p_uniform of Hybrid, cannot be written: it is a function",
        ),
        (
            lambda m: dd.Denoiser(
                m.fn, dd.TimeVarying(lambda t: torch.ones(7, 7) - 7 * torch.eye(7), dd.LogLinear()), "loo"
            ),
            "process cannot be written: TimeVarying",
        ),
        (lambda m: dd.Denoiser(m.fn, m.process, "loo", head=nn.Linear(7, 7)), "its head cannot be written"),
    ],
)
def test_what_cannot_be_written_is_named_before_anything_is(
    spoil: Callable[[dd.Denoiser], dd.Denoiser], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        spoil(by_hand()).save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_quantized_network_of_transformers_is_refused(tmp_path: Path) -> None:
    model = dd.load(EVERY["LLaDA2"](tmp_path / "read"), quiet=True)
    with pytest.raises(ValueError, match="other parts than its class makes"):
        dd.quantize(model).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.usefixtures("as_user")
def test_a_folder_is_not_overwritten_by_chance(tmp_path: Path) -> None:
    model, other = by_hand(), dd.load(EVERY["MDLM"](tmp_path / "mdlm"), quiet=True)
    folder = tmp_path / "saved"
    folder.mkdir()
    model.save(folder)  # an empty one is there to be filled
    before = said(model)
    with pytest.raises(FileExistsError, match="is not empty; pass overwrite=True"):
        other.save(folder)
    (folder / "note.txt").touch()
    other.save(folder, overwrite=True)
    assert torch.equal(said(dd.load(folder, quiet=True)), said(other))
    assert not (folder / "note.txt").exists()
    (folder / "discdiff.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds no discdiff\.json, so it is no saved model"):
        model.save(folder, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; a folder is written"):
        model.save(tmp_path / "file")
    with pytest.raises(TypeError, match="folder must be a path, got 3"):
        model.save(3)  # type: ignore[arg-type]
    assert torch.equal(said(model), before)


@pytest.mark.parametrize("fails", ["save_file", "_put"])
def test_a_failure_leaves_what_was_there(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = by_hand(), tmp_path / "saved"
    model.save(folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full(*arguments: object, **named: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(f"discdiff.adapters.saving.{fails}", full)
    with pytest.raises(OSError, match="no space left"):
        dd.load(EVERY["MDLM"](tmp_path / "mdlm"), quiet=True).save(folder, overwrite=True)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert sorted(os.listdir(tmp_path)) == ["mdlm", "saved"]


# --- the record -------------------------------------------------------------------------------------------------------

SCHEDULES = [
    dd.Linear(), dd.LogLinear(0.01), dd.Cosine(), dd.Polynomial(0.1 + 0.2), dd.Geometric(1e-4, 30.0), dd.Sigmoid(3.0),
    Tabulated((0.0, 0.1, 1 / 3)),
]  # fmt: skip
LAW = torch.tensor([0.1, 0.3, 0.25, 0.35])
RATES = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).fill_diagonal_(0).double()
RATES = RATES - torch.diag(RATES.sum(1))
PROCESSES = [
    dd.Uniform(4, dd.Linear()), dd.Masked(4, dd.LogLinear()), dd.Masked(4, dd.LogLinear(), mask_id=2),
    dd.Marginal(LAW, dd.Cosine()), dd.Hybrid(4, dd.Linear(), p_uniform=0.3), dd.Ordinal(4, dd.Linear()),
    dd.Ordinal(4, dd.Linear(), LAW), dd.General(RATES, dd.LogLinear(), mask_id=1),
    dd.General(RATES.to_sparse(), dd.Linear()), dd.Interpolant(4, dd.Linear(), LAW, p_uniform=0.1),
    dd.Interpolant(4, dd.Linear()), dd.AbsorbingUniform(4, dd.Linear()), blosum(),
]  # fmt: skip


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_every_process_comes_back(process: dd.Process) -> None:
    own = Convention("x", process, "loo", 4, suppress=(1,), autocast=torch.bfloat16, notes=("a", "b"))
    read = convention_of(Settings(json.loads(json.dumps(recorded(own))), "discdiff.json"), 100)
    assert Convention(**read) == own
    if isinstance(process, dd.General):
        assert read["process"]._q.is_sparse == process._q.is_sparse


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule_comes_back(schedule: dd.Schedule) -> None:
    text = json.dumps(described(schedule, "save: it"))
    assert clock_of(Settings(json.loads(text), "discdiff.json"), 100) == schedule
    each = dd.PerSite(schedule, torch.tensor([0.1, -1.0]))
    back = clock_of(Settings(json.loads(json.dumps(described(each, "save: it"))), "discdiff.json"), 100)
    assert torch.equal(back.alpha(torch.tensor(0.3)), each.alpha(torch.tensor(0.3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"discdiff\.json: format must lie in 1\.\.1, got 2"),
        ({"more": 1}, "'more' is not known; a newer discdiff may have written it"),
        ({"direct": "yes"}, "direct must be true or false, got 'yes'"),
        ({"network": {"builder": "os.system", "arguments": {}}}, r"network: builder must be one of .*got 'os\.system'"),
        ({"network": {"family": "saved"}}, "family must be one of"),
        ({"network": {"class": 3}}, "class must be a string, got 3"),
        ({"clock": {"kind": "Uniform"}}, "clock: kind must be one of .*Cosine.* got 'Uniform'"),
        ({"tied": {"vocab_embed.embedding": "x"}}, "must name another weight"),
        ({"time_dtype": "int8"}, "time_dtype must be one of bfloat16"),
        ({"length": 0}, "length must be at least 1, got 0"),
    ],
)
def test_a_record_that_says_something_else_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = by_hand().save(tmp_path / "saved") / "discdiff.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        dd.load(tmp_path / "saved", quiet=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth", 10**9, "depth must lie in 1.."),
        ("depth", 2, r"do not fit a DiffusionTransformer: .* missing, such as blocks\.1"),
        ("width", 1 << 23, "of another shape"),
        ("heads", 3, "3 heads of even width do not fit"),
        ("heads", None, "heads is missing"),
        ("norm_shift", 1, "norm_shift must be true or false"),
        ("more", 1, "'more' is not known"),
    ],
)
def test_arguments_of_a_network_have_types_and_bounds(key: str, value: object, message: str, tmp_path: Path) -> None:
    file = by_hand().save(tmp_path / "saved") / "discdiff.json"
    record = json.loads(file.read_text())
    record["network"]["arguments"][key] = value
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        dd.load(tmp_path / "saved", quiet=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("process", {"kind": "Ordinal", "vocab_size": 10**6, "schedule": {"kind": "Linear"}}, "vocab_size must lie in"),
        ("process", {"kind": "Linear"}, "process: kind must be one of AbsorbingUniform"),
        (
            "process",
            {"kind": "Marginal", "pi": [1, [2]], "schedule": {"kind": "Linear"}},
            "pi must be a list of numbers",
        ),
        ("process", {"kind": "Marginal", "pi": [1, 1], "schedule": {"kind": "Linear"}}, "probabilities that sum to 1"),
        ("predicts", "everything", "predicts must be one of denoiser, loo, ratio"),
        ("autocast", "int8", "autocast must be one of"),
        ("time", "noon", "time must be one of alpha, sigma, t"),
        ("suppress", [10**12], r"suppress: 0 must lie in 0\.\."),
        ("suppress", [8], r"discdiff\.json: Denoiser: suppress must lie in 0\.\.6, got 8"),
        ("columns", None, "columns is missing"),
        ("notes", [[]], "notes: 0 must be a string"),
    ],
)
def test_a_convention_has_types_and_bounds(key: str, value: object, message: str, tmp_path: Path) -> None:
    file = by_hand().save(tmp_path / "saved") / "discdiff.json"
    record = json.loads(file.read_text())
    record["convention"][key] = value
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        dd.load(tmp_path / "saved", quiet=True)


def test_numbers_that_are_none_are_refused() -> None:
    for wrong in ([float("nan")], [True], ["1"], [], [10**400], [[1], [1, 2]]):
        with pytest.raises(Refused):
            clock_of(Settings({"kind": "Tabulated", "sigmas": wrong}, "discdiff.json"), 100)
