"""Foreign settings: every key that transformers reads is used with its type, does nothing, or is refused by name."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import NATIVE, V
from places import ROOT

from discdiff.adapters import FAMILIES, load
from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family
from discdiff.adapters.settings import Refused, Settings

transformers = pytest.importorskip("transformers")
HERE = ROOT / "tests"
HOSTILE = ("somebody/kernel", ["os.system"], {"": "somebody/kernel", "quant_method": "gptq"}, 3)
GEMMA = "DiffusionGemma"
READ = (
    r"\bconfig(?:uration)?\.([A-Za-z_]\w*)",
    r"(?:get|has|set)attr\(\s*(?:\w+\.)*\w*config\w*,\s*[\"'](\w+)[\"']",
    r"(?:config_dict|config_kwargs|kwargs|model_kwargs|text_config|config)\.(?:pop|get)\(\s*[\"'](\w+)[\"']",
    r"config(?:_dict)?\[[\"'](\w+)[\"']\]",
)


def keys() -> list[str]:
    """Keys of configurations that transformers reads: of 4.57.6 and 5.23.0 as a list, of the installed from its source.

    They are those of the modules that load models and dispatch attention, kernels, parallelism and quantization, and of
    the configuration classes that are used here. The family and the mask's id are read by ``load`` itself.
    """
    root = Path(transformers.__file__).parent
    parts = ("integrations", "quantizers", "distributed", "loss", "generation", "utils")
    files = [*root.glob("*.py"), *(file for part in parts for file in (root / part).glob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    listed = {key for pattern in READ for key in re.findall(pattern, text)}
    assert {"_attn_implementation", "quantization_config", "tp_plan"} <= listed
    return sorted({*listed, *(HERE / "foreign_keys.txt").read_text().split()} - {"model_type", "mask_token_id"})


class _Reached(Exception):
    """The settings that would have been given to a class of transformers."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings


def family(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


def reached(one: Family, files: Files, config: dict[str, Any], ignore: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """What a family gives to transformers of a configuration."""
    files.config = Settings(config, "config.json")
    try:
        one.build(files, Asked(mask_id=3 if one.name != GEMMA else None, ignore=ignore))
    except _Reached as stop:
        return stop.settings
    raise AssertionError(f"{one.name} was built without transformers")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is not called: what it would have been given is raised."""

    def stop(name: str, settings: Mapping[str, Any], *others: object, **trial: object) -> None:
        raise _Reached(settings)

    for module in ("in_transformers", "gemma"):
        monkeypatch.setattr(f"discdiff.adapters.{module}.native", stop)


def text_config() -> dict[str, Any]:
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    text = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 2}
    return text | {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": rope}


def written(name: str, path: Path) -> tuple[Files, dict[str, Any]]:
    """A family's files, and its configuration."""
    if name == GEMMA:
        config = {"model_type": "diffusion_gemma", "canvas_length": 4, "text_config": text_config()}
        return Files(checkpoints.folder(path, config, {"none": torch.zeros(1)})), config
    folder = NATIVE[name](path).folder
    return Files(folder), json.loads((folder / "config.json").read_text())


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("Dream", "ESM-2", GEMMA) else pytest.mark.slow)
        for name in (*sorted(NATIVE), GEMMA)
    ],
)
def test_no_key_that_transformers_reads_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    """Planted with hostile values, at the top and inside: refused by name, or transformers is given the same as before.

    A number may be used, where the key is of a number: then it is that number, under a key that the family knows.
    """
    files, config = written(name, tmp_path / "checkpoint")
    one, before = family(name), None
    before = reached(one, files, config)
    refused = 0
    for key in keys():
        for value in HOSTILE:
            places = [config | {key: value}]
            if name == GEMMA:
                places.append(config | {"text_config": config["text_config"] | {key: value}})
            for planted in places:
                try:
                    said = reached(one, files, planted)
                except Refused as error:
                    assert re.search(rf"(?<!\w){key}(?!\w)", str(error)), f"{key}={value!r}: {error}"
                    refused += 1
                else:
                    assert said == before or value == 3, f"{name}: {key}={value!r} reached transformers"
                    assert "os.system" not in repr(said)
                    assert "somebody" not in repr(said)
    assert refused > 800, "most keys are not known, and nobody's business"


@pytest.mark.usefixtures("stopped")
def test_a_key_that_is_not_known_is_passed_over_as_asked(tmp_path: Path) -> None:
    files, config = written("Dream", tmp_path / "checkpoint")
    before, more = reached(family("Dream"), files, config), config | {"strange": 2, "unsloth_version": "1"}
    with pytest.raises(Refused, match=r"config.json: strange=2 is not known here .* pass ignore=\('strange',\)"):
        reached(family("Dream"), files, more)
    assert reached(family("Dream"), files, more, ignore=("strange",)) == before


CODE = """
import json, sys, types
from pathlib import Path
asked, root = [], Path(sys.argv[1])

class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **named: asked.append((name, args))

import torch, transformers, huggingface_hub
import transformers.integrations.hub_kernels as hub
import transformers.integrations.flash_attention, transformers.modeling_utils

stub = sys.modules["kernels"] = Stub("kernels")
names = ("get_kernel", "load_and_register_kernel", "load_and_register_attn_kernel", "snapshot_download")
names += ("hf_hub_download", "cached_file", "cached_files", "get_class_from_dynamic_module")
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").split(".")[0] in ("transformers", "huggingface_hub"):
        for name in names:
            if name in vars(module):
                setattr(module, name, getattr(stub, name))
        if "is_kernels_available" in vars(module):
            module.is_kernels_available = lambda *args, **named: True

def control():
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, attn_implementation="somebody/kernel")
    try:
        transformers.LlamaForCausalLM(config)
    except Exception:
        pass

control()
print("control", len(asked))
asked.clear()
import discdiff as dd
half = torch.full((1, 1), 0.5, dtype=torch.float64)
for folder in sorted(root.iterdir()):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    model = dd.load(folder, quiet=True)
    x = torch.tensor([[5, 6, 7, 8]])
    before = model.output(x, half).source.clone()
    for value in json.loads(sys.argv[2]):
        for names in json.loads(sys.argv[3]):
            file.write_text(json.dumps(config | {name: value for name in names}))
            try:
                same = torch.equal(dd.load(folder, quiet=True).output(x, half).source, before)
                print(folder.name, "loads", "same" if same else "OTHER")
            except ValueError as error:
                print(folder.name, "refused", "named" if any(n.strip("_") in str(error) for n in names) else error)
print("asked", len(asked), asked[:2])
"""
ASKING = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
ASKING += ("dtype", "torch_dtype", "quantization_config", "tp_plan", "kernel_config", "use_kernels", "auto_map")
PASSED = ("attn_implementation", "_attn_implementation", "experts_implementation", "tp_plan", "kernel_config")
PASSED += ("use_kernels", "auto_map", "trust_remote_code", "architectures", "torchscript", "chunk_size_feed_forward")


@pytest.mark.parametrize(
    "names", [["Dream"], pytest.param([one for one in sorted(NATIVE) if one != "Dream"], marks=pytest.mark.slow)]
)
def test_nothing_on_disk_asks_a_hub_for_code(names: list[str], tmp_path: Path) -> None:
    """In a process of its own, with stubs that record whoever asks for kernels or files; one control does ask."""
    for name in names:
        NATIVE[name](tmp_path / name)
    planted = [*([name] for name in ASKING), list(PASSED)]
    values = ["somebody/kernel", ["os.system"], {"": "somebody/kernel"}]
    arguments = [str(tmp_path), json.dumps(values), json.dumps(planted)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert int(lines[0].removeprefix("control ")) > 0, "the stub is asked, when a configuration says so"
    assert lines[-1].startswith("asked 0 "), lines[-1]
    assert len(lines) == 2 + len(names) * len(values) * len(planted)
    assert {line.split(" ", 1)[1] for line in lines[1:-1]} == {"loads same", "refused named"}


# --- sizes, types, tables ---------------------------------------------------------------------------------------------


def changed(folder: Path, **more: object) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | more
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "Dream",
            {"hidden_size": 10**6, "vocab_size": 10**6},
            "do not fit .* of another shape, such as lm_head.weight",
        ),
        ("Dream", {"num_hidden_layers": 10**9}, "layers are 1000000000, but the weights have 2"),
        ("Dream", {"hidden_size": 10**30}, r"hidden_size must lie in 1\.\.2147483647"),
        ("BERT", {"vocab_size": 10**9, "intermediate_size": 2**30}, "do not fit BertForMaskedLM"),
        ("BERT", {"max_position_embeddings": 2**40}, "max_position_embeddings must lie in"),
        ("DiffuGPT", {"n_positions": 10**6}, r"transformer.wpe.weight \(64, 32\) instead of \(1000000, 32\)"),
        ("LLaDA-MoE", {"num_experts": 10**9}, "experts are 1000000000, but the weights have 4"),
        ("LLaDA", {"n_layers": 0}, "n_layers must be at least 1|n_layers must lie in"),
        ("LLaDA", {"n_heads": "4"}, "n_heads must be a whole number, got '4'"),
        ("LLaDA", {"d_model": ...}, "d_model is missing"),
        ("A2D-Llama", {"num_attention_heads": 3}, "A2D-Llama|LlamaForCausalLM"),
        ("A2D-Qwen3", {"rms_norm_eps": -1}, r"rms_norm_eps must lie in \[0, 1\]"),
        ("A2D-Qwen3", {"hidden_act": "xielu"}, "hidden_act must be one of gelu"),
        ("A2D-Qwen3", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ("A2D-Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be"),
        ("A2D-Qwen3", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config="),
        ("LLaDA2", {"rotary_dim": 6}, "rotary_dim=6 is not partial_rotary_factor"),
        ("LLaDA2", {"num_key_value_heads": 3}, "query_key_value.weight must have 80 rows"),
        ("LLaDA-MoE", {"moe_layer_freq": [0, 1]}, "moe_layer_freq must be ones"),
        (
            "ESM-2",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type must be one of absolute, rotary",
        ),
        ("ModernBERT", {"rope_scaling": {"factor": 2}}, "rope_scaling changes"),
    ],
)
def test_what_cannot_be_is_told_before_memory_is_asked_for(
    name: str, more: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder, begin = changed(NATIVE[name](tmp_path / "checkpoint").folder, **more), time.process_time()
    with pytest.raises(ValueError, match=message):
        load(folder, family=name, quiet=True)
    assert time.process_time() - begin < 5


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0},
    "llama3": {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ROPE))
@pytest.mark.parametrize("new", [False, True])
def test_scaled_positions_are_those_of_transformers(kind: str, new: bool, tmp_path: Path) -> None:
    """In the words of 4.57 and of 5."""
    theirs = ROPE[kind] | {"rope_type": kind}
    network = checkpoints.native("LlamaForCausalLM", rope_theta=500.0, rope_scaling=dict(theirs))
    said = {"rope_parameters": ROPE[kind] | {"rope_theta": 500.0}} if new else {"rope_scaling": ROPE[kind]}
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "model_type": "a2d-llama", "mask_token_id": 36}
    config = sizes | said | ({} if new else {"rope_theta": 500.0})
    folder = checkpoints.folder(tmp_path / "checkpoint", config, network.state_dict())
    x = torch.randint(4, 36, (1, 40), generator=torch.Generator().manual_seed(0))
    own = checkpoints.everyone_sees_all(network)(x)
    time_ = torch.full((1, 1), 0.5, dtype=torch.float64)
    assert float((load(folder, quiet=True).output(x, time_).source - own).abs().max()) < 1e-5
    plain = load(changed(folder, rope_scaling=..., rope_parameters=..., rope_theta=500.0), quiet=True)
    assert float((plain.output(x, time_).source - own).abs().max()) > 1e-3  # it matters


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, r"factor must lie in \(0, inf\)"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "more": 1}},
            "more is not a number of rope_type 'linear'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling must be a table"),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}}, "rope_theta is 7.0, but 8.0 in"),
        ({"rope_scaling": ROPE["linear"], "rope_parameters": ROPE["yarn"]}, "are both given"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ],
)
@pytest.mark.usefixtures("stopped")
def test_positions_of_another_kind_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    files, config = written("LLaDA", tmp_path / "checkpoint")
    with pytest.raises(Refused, match=message):
        reached(family("LLaDA"), files, {key: value for key, value in config.items() if key != "rope_theta"} | more)


@pytest.mark.usefixtures("stopped")
def test_a_single_expert_keeps_its_own_weight(tmp_path: Path) -> None:
    """LLaDA2's gate divides by the sum of its experts' weights only where there are two or more."""
    files, config = written("LLaDA2", tmp_path / "checkpoint")
    assert reached(family("LLaDA2"), files, config)["norm_topk_prob"] is True
    assert reached(family("LLaDA2"), files, config | {"num_experts_per_tok": 1})["norm_topk_prob"] is False


@pytest.fixture(params=["old", "new"])
def modernbert(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, torch.nn.Module]]:
    """ModernBERT's layers in the words of 4.57 and of 5, with windows of 4."""
    new = {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    }
    old = {"global_attn_every_n_layers": 2, "global_rope_theta": 300.0, "local_rope_theta": 50.0}
    five = transformers.__version__.startswith("5")
    more = {"num_hidden_layers": 3, "local_attention": 4}
    network = checkpoints.native("ModernBertForMaskedLM", **(new if five else old), **more)
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"model_type": "modernbert", "mask_token_id": 36, "position_embedding_type": "absolute"}
    config = sizes | more | (new if request.param == "new" else old)
    yield checkpoints.folder(tmp_path / "checkpoint", config, network.state_dict()), network


def test_layers_of_modernbert_are_read_in_both_forms(modernbert: tuple[Path, torch.nn.Module]) -> None:
    folder, network = modernbert
    x = torch.randint(4, 36, (1, 12), generator=torch.Generator().manual_seed(0))
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    said = load(folder, quiet=True).output(x, half).source
    assert float((said - network(input_ids=x).logits).abs().max()) < 1e-5
    changed(folder, local_attention=64)
    assert float((load(folder, quiet=True).output(x, half).source - said).abs().max()) > 1e-4
