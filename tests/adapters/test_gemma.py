"""DiffusionGemma: loaded from what transformers saves; canvases behind ragged prefixes against one row at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load
from discdiff.adapters.gemma import Canvas
from discdiff.denoiser import Cached

transformers = pytest.importorskip("transformers", minversion="5.11")
V, BEGIN = 40, 2


def write(folder: Path) -> nn.Module:
    """A tiny one, as transformers saves it."""
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    text = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_experts": 4}
    text |= {"top_k_experts": 2, "moe_intermediate_size": 16, "sliding_window": 5, "rope_parameters": rope}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "position_embedding_size": 16}
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=4)
    torch.manual_seed(0)
    network = transformers.DiffusionGemmaForBlockDiffusion(config).eval().requires_grad_(False)
    for part in network.parameters():
        part.normal_(std=0.3)
    network.save_pretrained(folder)
    return network


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("gemma")
    return folder, write(folder)


def own(network: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    """Its own forward: the encoder reads the prefix, the decoder the canvas."""
    return network(input_ids=prefix, decoder_input_ids=x).logits


def test_its_configuration_chooses_nothing(written: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """No tower for images is made, of whatever class it names; sizes are told before memory is asked for."""
    folder, _ = written
    config, x = json.loads((folder / "config.json").read_text()), tokens(1, 3, 4)
    shutil.copy(folder / "model.safetensors", tmp_path)

    def load_with(**more: object) -> dd.adapters.Loaded:
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        return load(tmp_path, quiet=True)

    model = load_with(vision_config={"model_type": "bert", "num_hidden_layers": 10**9, "auto_map": "somebody/kernel"})
    assert float((model(x, 0.5).denoiser - load(folder, quiet=True)(x, 0.5).denoiser).abs().max()) == 0
    assert not [name for name, _ in model.network.named_parameters() if "vision" in name]
    assert any("passed over: model.encoder." in note for note in model.convention.notes)
    text = {key: value for key, value in config["text_config"].items() if key != "layer_types"}
    for more, message in (
        ({"num_hidden_layers": 10**9}, "layers are 1000000000, but the weights have 3"),
        ({"num_experts": 10**8}, "experts are 100000000, but the weights have"),
        ({"num_experts": 16}, "of another shape"),
        ({"attention_k_eq_v": False}, "attention_k_eq_v=False changes what the network computes"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' changes"),
        ({"per_layer_config": {"0": {"attn_implementation": "somebody/kernel"}}}, "it may hold head_dim and"),
        ({"rope_parameters": {"else": {}}}, "else is no kind of layer"),
    ):
        with pytest.raises(ValueError, match=message):
            load_with(text_config=text | more)


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_it_says_what_its_own_forward_says(written: tuple[Path, nn.Module]) -> None:
    folder, network = written
    model = load(folder, quiet=True)
    assert model.convention.family == "DiffusionGemma"
    assert model.process == dd.Uniform(V, dd.Linear())
    assert (model.call.time, model.convention.block) == (None, 4)
    x = tokens(1, 3, 4)
    begin = torch.full((3, 1), BEGIN)
    said = own(network, begin, x)
    assert float(said.std()) > 0.1
    assert float((model(x, 0.5).denoiser - said.log_softmax(-1)).abs().max()) < 1e-4
    assert float((own(network, begin + 1, x) - said).abs().max()) > 1e-3  # the planted fault


def test_ragged_prefixes_say_what_each_says_alone(written: tuple[Path, nn.Module]) -> None:
    """Longer than the sliding window, shorter, and none; then a block behind them; and some rows of these."""
    folder, network = written
    fn = load(folder, quiet=True).fn
    assert isinstance(fn, Cached)
    shown, length = tokens(2, 3, 9), torch.tensor([9, 3, 0])
    canvas, block, after = tokens(3, 3, 4), tokens(4, 3, 4), tokens(5, 3, 3)
    memory = fn.prefill(shown, length, 20)
    for row in range(3):
        prefix = shown[row : row + 1, : length[row]] if length[row] else torch.tensor([[BEGIN]])
        for _ in range(2):  # a call leaves nothing behind
            said = fn.evaluate(memory, canvas, None)[row]
            assert float((said - own(network, prefix, canvas[row : row + 1])[0]).abs().max()) < 1e-4
    fn.extend(memory, block)
    some = torch.tensor([2, 0, 2])
    for part, rows in ((memory, torch.arange(3)), (memory.select(some), some)):
        said = fn.evaluate(part, after[rows], None)
        for place, row in enumerate(rows.tolist()):
            prefix = shown[row : row + 1, : length[row]] if length[row] else torch.tensor([[BEGIN]])
            prefix = torch.cat([prefix, block[row : row + 1]], 1)
            assert float((said[place] - own(network, prefix, after[row : row + 1])[0]).abs().max()) < 1e-4


def test_self_conditioning_is_a_second_look(written: tuple[Path, nn.Module]) -> None:
    _, network = written
    x, begin = tokens(6, 2, 4), torch.full((2, 1), BEGIN)
    once, twice = (Canvas(network, BEGIN, rounds)(x) for rounds in (0, 1))
    again = network(input_ids=begin, decoder_input_ids=x, self_conditioning_logits=once).logits
    assert float((twice - again).abs().max()) < 1e-4
    assert float((twice - once).abs().max()) > 1e-3


def test_canvases_begin_where_the_prompt_ends(written: tuple[Path, nn.Module]) -> None:
    model = load(written[0], quiet=True)
    prompt = [2, 7, 9, 11, 5]
    out = dd.Blockwise(model.process, model, S.Ancestral(), block=[5, 4], steps=3).sample(2, 13, seed=0, prompt=prompt)
    assert out.tokens[:, :5].tolist() == [prompt] * 2
    assert out.nfe == 1 + 2 * 3
    said = dd.generate(model, torch.tensor([prompt] * 2), max_new_tokens=8, steps=3, seed=0)
    assert torch.equal(said, out.tokens)
    with pytest.raises(ValueError, match="uniform and has no mask"):
        load(written[0], mask_id=4, quiet=True)
