"""Checkpoints: each family loads from files and says what its own network says; what disagrees is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import MASK, NATIVE, V, Written

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import FAMILIES, Files, load
from discdiff.adapters.own import load_trained
from discdiff.demo.data import ASSETS

Writer = Callable[[Path], Written]


def own_logits(written: Written, model: dd.adapters.Loaded, x: torch.Tensor) -> torch.Tensor:
    """What the network itself says; between the ends where it was trained so, and not of the ends."""
    frame = model.convention.frame
    if frame is None:
        return written.logits(x)
    start, end = (x.new_full((len(x), 1), v) for v in frame)
    return written.logits(torch.cat([start, x, end], 1))[:, 1:-1]


@pytest.mark.parametrize("family", sorted(NATIVE))
def test_a_family_says_what_its_own_network_says(family: str, tmp_path: Path) -> None:
    written = NATIVE[family](tmp_path / "checkpoint")
    model = load(written.folder, quiet=True)
    assert model.convention.family == family
    assert model.process.mask_id == written.mask_id
    x = torch.randint(4, MASK, (2, 9), generator=torch.Generator().manual_seed(1))
    x[:, 2:5] = written.mask_id
    own = own_logits(written, model, x)
    said = model.output(x, torch.full((1, 1), 0.5, dtype=torch.float64))
    assert float((said.source - own[..., : said.width]).abs().max()) < 1e-5
    assert float(own.std()) > 0.1  # it says something
    expected = torch.cat([own[:, :1], own[:, :-1]], 1) if model.call.shift else own
    expected = expected[..., : model.process.vocab_size].clone()
    expected[..., list(model.call.suppress)] = -torch.inf
    expected[..., MASK if model.process.mask_id == MASK else []] = -torch.inf
    masked = x == written.mask_id
    torch.testing.assert_close(model(x, 0.5).denoiser[masked], expected.log_softmax(-1)[masked], rtol=0, atol=1e-5)
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=4).sample(2, 8, seed=0, prompt=[5])
    assert not bool(torch.isin(out.tokens[:, 1:], torch.tensor([written.mask_id, *model.call.suppress])).any())


@pytest.mark.parametrize("family", ["LLaDA", "Dream", "DiffuGPT", "A2D-Qwen2"])
def test_attention_is_bidirectional(family: str, tmp_path: Path) -> None:
    model = load(NATIVE[family](tmp_path / "checkpoint").folder, quiet=True)
    x = torch.full((1, 6), 5)
    y = x.clone()
    y[0, -1] = 7
    first, second = (model.fn(state, None)[0, 0] for state in (x, y))
    assert float((first - second).abs().max()) > 1e-3
    causal = replace(model.convention, attention=None).denoiser(model.network)  # the planted fault
    first, second = (causal.fn(state, None)[0, 0] for state in (x, y))
    assert float((first - second).abs().max()) == 0


def test_a_mask_id_that_the_files_disagree_on_is_refused(tmp_path: Path) -> None:
    written = checkpoints.llada(tmp_path / "checkpoint")
    (written.folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 8}))
    with pytest.raises(ValueError, match=r"36 by config.json, 8 by generation_config.json; pass .* mask_id=36"):
        load(written.folder, quiet=True)
    model = load(written.folder, mask_id=36, quiet=True)
    assert (model.process.mask_id, model.convention.mask_source) == (36, "given")


def test_a_mask_id_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    written = checkpoints.a2d("Llama")(tmp_path / "checkpoint")
    config = json.loads((written.folder / "config.json").read_text())
    del config["mask_token_id"]
    (written.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"nothing in .* says the mask id; pass load"):
        load(written.folder, quiet=True)
    with pytest.raises(ValueError, match=r"the mask id is 40 \(given\), but the network knows ids 0..39"):
        load(written.folder, mask_id=V, quiet=True)


def test_rows_beyond_the_tokenizer_and_special_tokens_are_suppressed(tmp_path: Path) -> None:
    model = load(NATIVE["ESM-2"](tmp_path / "checkpoint").folder, quiet=True)
    assert model.call.suppress == (0, 1, 2, 3, 37, 38, 39)
    assert model.convention.lines()["suppressed ids"] == "0..3, 37..39"


def test_the_convention_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(NATIVE["Dream"](tmp_path / "checkpoint").folder)
    said = capsys.readouterr().err
    for line in (
        "family:         Dream",
        "mask id:        36 (config.json)",
        "shift:          position i speaks of i + 1",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda weights: weights.pop("lm_head.weight"),
            "do not fit Qwen2ForCausalLM: 1 missing, such as lm_head.weight",
        ),
        (lambda weights: weights.update(more=torch.zeros(2)), "do not fit Qwen2ForCausalLM: 1 left over, such as more"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(2)}),
            r"do not fit Qwen2ForCausalLM: 1 of another shape, such as model.norm.weight \(2,\) instead of \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    spoil: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    written = checkpoints.dream(tmp_path / "checkpoint")
    weights = dict(Files(written.folder).weights)
    spoil(weights)
    checkpoints.folder(written.folder, dict(Files(written.folder).config), weights)
    with pytest.raises(ValueError, match=message):
        load(written.folder, quiet=True)


def test_what_is_not_there_or_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load(tmp_path / "nothing")
    for name, message in (
        ("a.txt", r"a\.txt: this is no file of weights; accepted: \.bin, "),
        ("a.safetensors", r"a\.safetensors is not a safetensors file"),
        ("a.npz", r"a\.npz is not an archive of arrays"),
        ("broken/config.json", r"config\.json is not JSON"),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("nothing of the kind")
        with pytest.raises(ValueError, match=message):
            load(file.parent if file.suffix == ".json" else file)
        file.unlink()
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "architectures": ["Nobody"]}')
    with pytest.raises(
        ValueError, match=r"no family recognises model_type 'unheard_of' \(architectures Nobody\); pass family= one of"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match="there is no family 'x'; known: MDLM, "):
        load(tmp_path, family="x")
    written = checkpoints.dream(tmp_path / "empty")
    (written.folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load(written.folder)


def test_families_have_names_of_their_own() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert set(NATIVE) <= set(names)


@pytest.mark.parametrize("name", ["digits-masked", "text-uniform", "text-blocks-uniform"])
def test_what_was_trained_here_loads_too(name: str) -> None:
    path = ASSETS / f"{name}.safetensors"
    model, own = load(path, quiet=True), load_trained(path)
    assert (model.process, model.predicts, model.call.time) == (own.process, own.predicts, own.call.time)
    x = torch.randint(own.process.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x, 0.7).denoiser, own(x, 0.7).denoiser)
    assert model.scores_at_once == own.scores_at_once == ("blocks" in name)
    with pytest.raises(ValueError, match="the card of this file says its mask"):
        load(path, mask_id=3, quiet=True)


def test_a_hub_that_gives_nothing_is_told_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*arguments: object, **named: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        FileNotFoundError, match="no file or folder my/run, and the hub gave nothing for it: no network"
    ):
        load("my/run")


@pytest.mark.parametrize(("family", "longest"), [("BERT", 510), ("RoBERTa", 60), ("DiffuGPT", 64), ("LLaDA", None)])
def test_sequences_longer_than_the_table_of_positions_are_refused(
    family: str, longest: int | None, tmp_path: Path
) -> None:
    model = load(NATIVE[family](tmp_path / "checkpoint").folder, quiet=True)
    assert model.convention.longest == longest
    x = torch.full((1, 513), 5)
    if longest is None:
        model(x, 0.5)
        return
    with pytest.raises(ValueError, match=f"takes at most {longest} tokens.*, got 513"):
        model(x, 0.5)


# --- heads, poolers, tables and tied weights --------------------------------------------------------------------------

X = torch.tensor([[6, 7, MASK, 9, 5, 8]])
HALF = torch.full((1, 1), 0.5, dtype=torch.float64)


def rewritten(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: object
) -> dd.adapters.Loaded:
    """The checkpoint with other weights and settings, loaded."""
    files = Files(folder)
    weights, said = dict(files.weights), dict(files.config) | config
    change(weights)
    checkpoints.folder(folder, said, weights)
    return load(folder, quiet=True)


def old_norms(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "LayerNorm" in name]:
        for new, old in ((".weight", ".gamma"), (".bias", ".beta")):
            if name.endswith(new):
                weights[name.removesuffix(new) + old] = weights.pop(name)


HEADS: list[tuple[str, tuple[str, ...]]] = [
    ("BERT", ("bert.pooler.dense.weight", "cls.seq_relationship.weight", "cls.species.bias", "classifier.weight")),
    ("BERT", ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")),
    ("ESM-2", ("esm.pooler.dense.weight", "esm.embeddings.position_ids", "classifier.dense.weight")),
    ("ESM-2", ("esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq",)),
    ("ModernBERT", ("classifier.bias",)),
    ("A2D-Llama", ("model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight")),
    ("A2D-Qwen3", ("model.rotary_emb.inv_freq",)),
    ("Dream", ("v_head.summary.weight", "v_head.summary.bias")),
    ("DiffuGPT", ("denoise_model.h.1.attn.bias", "denoise_model.h.1.attn.masked_bias")),
]


@pytest.mark.parametrize(("family", "more"), HEADS)
def test_what_sampling_does_not_use_is_passed_over_and_named(
    family: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    written = NATIVE[family](tmp_path / "checkpoint")
    before = load(written.folder, quiet=True)
    model = rewritten(written.folder, lambda weights: weights.update({name: torch.ones(4) for name in more}))
    assert torch.equal(model.output(X, HALF).source, before.output(X, HALF).source)
    lines = " ".join(value for name, value in model.convention.lines().items() if name.startswith("note"))
    assert "passed over: " in lines
    assert any(name.split(".")[-1] in lines for name in more)
    if len(more) > 1:
        assert "more, which sampling does not use" in lines


@pytest.mark.parametrize("family", ["BERT", "ESM-2"])
def test_norms_may_have_their_old_names(family: str, tmp_path: Path) -> None:
    written = NATIVE[family](tmp_path / "checkpoint")
    model = rewritten(written.folder, old_norms)
    assert any(name.endswith("LayerNorm.gamma") for name in Files(written.folder).shapes)
    assert float((model.output(X, HALF).source - own_logits(written, model, X)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("family", "head"),
    [("BERT", "cls.predictions.decoder.weight"), ("ESM-2", "lm_head.decoder.weight"), ("ModernBERT", "decoder.weight")],
)
def test_a_tied_head_may_be_absent_and_must_agree(family: str, head: str, tmp_path: Path) -> None:
    written = NATIVE[family](tmp_path / "checkpoint")
    names = ("word_embeddings.weight", "tok_embeddings.weight")
    (whole,) = (part for name, part in Files(written.folder).weights.items() if name.endswith(names))
    model = rewritten(written.folder, lambda weights: weights.pop(head, None))
    assert float((model.output(X, HALF).source - own_logits(written, model, X)).abs().max()) < 1e-5
    rewritten(written.folder, lambda weights: weights.update({head: whole}))
    with pytest.raises(ValueError, match=f"tie_word_embeddings makes .*{head}.* one, but the file has two that differ"):
        rewritten(written.folder, lambda weights: weights.update({head: whole + 1}))
    with pytest.raises(ValueError, match=f"missing, such as .*{head}"):
        rewritten(written.folder, lambda weights: weights.pop(head), tie_word_embeddings=False)


def test_a_contact_head_may_be_absent(tmp_path: Path) -> None:
    """Nothing in it is random then: it is not there."""
    written = NATIVE["ESM-2"](tmp_path / "checkpoint")

    def without(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "contact_head" in name]:
            del weights[name]

    model = rewritten(written.folder, without)
    assert float((model.output(X, HALF).source - own_logits(written, model, X)).abs().max()) < 1e-5
    assert not [name for name, _ in model.network.named_parameters() if "contact_head" in name]


def test_weights_are_of_one_dtype_which_is_that_of_most(tmp_path: Path) -> None:
    written = NATIVE["A2D-Llama"](tmp_path / "checkpoint")

    def half(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name] = weights[name] if "norm" in name else weights[name].bfloat16()

    model = rewritten(written.folder, half, torch_dtype="float32")
    assert {part.dtype for part in model.network.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"the weight lm_head.weight is of int8, which is not supported"):
        rewritten(written.folder, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"].char()}))


def test_positions_may_begin_behind_padding(tmp_path: Path) -> None:
    """ESM-1 and RoBERTa count from the row after padding, so that a table of 26 takes 24 tokens."""
    network = checkpoints.native(
        "EsmForMaskedLM", position_embedding_type="absolute", max_position_embeddings=26, pad_token_id=1,
        mask_token_id=MASK,
    )  # fmt: skip
    folder = checkpoints.folder(tmp_path / "checkpoint", network.config.to_dict(), network.state_dict())
    model = load(folder, quiet=True)
    assert model.convention.longest == 24
    x = torch.full((1, 24), 5)
    assert float((model.output(x, HALF).source - network(input_ids=x).logits).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="takes at most 24 tokens, got 25"):
        model(torch.full((1, 25), 5), 0.5)
    with pytest.raises(ValueError, match=r"pad_token_id must be one of 0\.\.24, .*; got 25"):
        rewritten(folder, lambda weights: None, pad_token_id=25)


def test_sdar_is_qwen3_in_blocks(tmp_path: Path) -> None:
    written = checkpoints.a2d("Qwen3")(tmp_path / "checkpoint")
    model = rewritten(written.folder, lambda weights: None, model_type="sdar", fuse_cross_entropy=True)
    assert (model.convention.family, model.convention.block, model.convention.shift) == ("SDAR", 4, False)
    x = torch.full((1, 8), MASK)
    y = x.clone()
    y[0, 7] = 5
    first, second = (model.output(z, HALF).source[0] for z in (x, y))
    assert torch.equal(first[:4], second[:4])
    assert float((first[4:7] - second[4:7]).abs().max()) > 1e-3
    assert load(written.folder, block=8, quiet=True).convention.block == 8


def test_kinds_are_told() -> None:
    kinds = {kind: family.name for family in FAMILIES for kind in family.kinds}
    assert kinds["sdar"] == "SDAR"
    assert kinds["diffusion_gemma"] == "DiffusionGemma"
    assert {"Dream", "bert", "esm", "modernbert", "llada2_moe", "a2d-qwen3"} <= set(kinds)
