"""RoBERTa as fairseq's trainer leaves it: the file loads, and says what the same weights say in transformers."""

import argparse
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import native
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load

ROWS = 15  # <s> <pad> </s> <unk>, ten words, <mask>
NAMES = {
    "roberta.embeddings.word_embeddings.": "embed_tokens.",
    "roberta.embeddings.position_embeddings.": "embed_positions.",
    "roberta.embeddings.LayerNorm.": "emb_layer_norm.",
    "roberta.encoder.layer.": "layers.",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}


def written(path: Path, legacy: bool = True, spoil: Any = None, **arguments: Any) -> Any:  # noqa: ANN401
    """A checkpoint of random weights, and the network they are from."""
    network = native(
        "RobertaForMaskedLM",
        vocab_size=ROWS,
        pad_token_id=1,
        max_position_embeddings=34,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
    )
    network.roberta.embeddings.token_type_embeddings.weight.data.zero_()
    weights: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("lm_head."):
            if not name.startswith("lm_head.decoder."):
                weights[f"decoder.{name}"] = tensor
        elif "token_type" not in name and "position_ids" not in name:
            for theirs, own in NAMES.items():
                name = name.replace(theirs, own)
            weights[f"decoder.sentence_encoder.{name}"] = tensor
    weights["decoder.lm_head.weight"] = weights["decoder.sentence_encoder.embed_tokens.weight"]
    weights["decoder.classification_heads.some.dense.weight"] = torch.zeros(2, 2)
    if spoil is not None:
        spoil(weights)
    told = {"arch": "roberta_base", "encoder_attention_heads": 4, "activation_fn": "gelu", **arguments}
    told = {key: value for key, value in told.items() if value is not ...}
    saved = {"args": argparse.Namespace(**told), "model": weights, "extra_state": {"epoch": 3}}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    return network


@pytest.mark.parametrize("legacy", [True, False])
def test_it_says_what_the_same_weights_say_in_transformers(legacy: bool, tmp_path: Path) -> None:
    network = written(tmp_path / "checkpoint_best.pt", legacy)
    model = load(tmp_path / "checkpoint_best.pt", quiet=True)
    said = model.convention
    assert (said.family, said.frame, said.longest) == ("RoBERTa-fairseq", (0, 2), 30)
    assert model.process == dd.Masked(ROWS - 1, dd.Linear())
    assert model.call.suppress == (0, 1, 2, 3)
    x = torch.randint(4, ROWS, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([torch.full((2, 1), 0), x, torch.full((2, 1), 2)], 1)
    own = network(whole).logits[:, 1:-1, : ROWS - 1]
    assert float((model.fn(x, None) - own).abs().max()) < 1e-5
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=4).sample(2, 30, seed=0)
    assert bool((out.tokens >= 4).all())
    with pytest.raises(ValueError, match="at most 30 tokens between its start and its end, got 31"):
        model(torch.full((1, 31), 5), 0.5)


def test_a_network_that_was_never_shown_a_mask_is_told_so(tmp_path: Path) -> None:
    for unmasked, noted in ((0.1, False), (0.5, True)):
        written(tmp_path / "a.pt", leave_unmasked_prob=unmasked, random_token_prob=0.5)
        notes = load(tmp_path / "a.pt", quiet=True).convention.notes
        assert any("never behind the mask" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("arguments", "spoil", "message"),
    [
        ({"activation_fn": "relu"}, None, "args: activation_fn must be gelu, got 'relu'"),
        ({"untie_weights_roberta": True}, None, "args: untie_weights_roberta must be False, got True"),
        ({"encoder_attention_heads": 5}, None, "args: encoder_attention_heads must divide the width 32"),
        ({"encoder_attention_heads": "4"}, None, "args: encoder_attention_heads must be a whole number"),
        ({"encoder_attention_heads": ...}, None, "args: encoder_attention_heads is missing"),
        ({"leave_unmasked_prob": "no"}, None, "args: leave_unmasked_prob must be a number"),
        ({}, lambda w: w.pop("decoder.sentence_encoder.embed_positions.weight"), "lack a matrix roberta.*position"),
        (
            {},
            lambda w: w.update({"decoder.sentence_encoder.layer_norm.weight": torch.ones(32)}),
            "sentence_encoder.layer_norm",
        ),
        ({}, lambda w: w.pop("decoder.sentence_encoder.layers.1.fc2.bias"), "layer.1.output.dense.bias"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments: Any, spoil: Any, message: str, tmp_path: Path) -> None:  # noqa: ANN401
    written(tmp_path / "a.pt", spoil=spoil, **arguments)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.pt", quiet=True)


def test_weights_without_arguments_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({"model": saved["model"]}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds no arguments of its training"):
        load(tmp_path / "b.pt", quiet=True)


SAPIENS = {
    "vh": (
        "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCARDRGYYYGMDVWGQGTTVTVSS",
        [[0.0687, -0.1435, -0.2869], [-1.2796, -0.9881, -1.0499], [-0.5349, -0.5218, -0.6272]],
    ),
    "vl": (
        "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQSYSTPLTFGGGTKVEIK",
        [[-0.7281, -0.2819, -0.0849], [5.6185, -0.4242, -0.3076], [0.1778, -0.4296, -0.9312]],
    ),
}


@pytest.mark.parametrize("chain", list(SAPIENS))
def test_sapiens_says_what_fairseqs_own_modules_say(chain: str) -> None:
    """The wheel of sapiens 1.0.5; its own code needs a torch of years ago.

    The figures are logits of A, C and Y at three masks of a domain, from the encoder and head of fairseq 0.10.2.
    """
    try:
        package = importlib.metadata.distribution("sapiens")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the wheel of sapiens 1.0.5")
    model = load(Path(str(package.locate_file(f"sapiens/models/v1/checkpoint_{chain}.pt"))), quiet=True)
    sequence, figures = SAPIENS[chain]
    ids = torch.tensor([[4 + "ACDEFGHIKLMNPQRSTVWY".index(letter) for letter in sequence]])
    where = torch.arange(20, 100, 30)
    ids[0, where] = model.process.mask_id
    said = model.fn(ids, None)[0, where][:, [4, 5, 23]]
    torch.testing.assert_close(said, torch.tensor(figures), rtol=0, atol=2e-4)
    assert re.search("never behind the mask", " ".join(model.convention.notes))
