"""Networks that were trained between a start and an end token: sampled between them, and lengths do not count them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MASK, NATIVE, V, folder, native
from framed import END, START, Network, convention

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters import load
from discdiff.adapters.frame import UNFRAMED
from discdiff.losses import base as losses

FRAMED = ["BERT", "ESM-2", "ModernBERT", "RoBERTa"]
OPERATORS = [
    S.Ancestral(),
    S.Unmask(),
    S.Unmask(select="max_prob"),
    S.Unmask(select="margin"),
    S.Unmask(select="entropy"),
    S.Greedy(),
    S.Threshold(0.9),
    S.EntropyBounded(0.5),
    S.KLStable(),
    S.ReMDM(eta=0.2),
    S.Ancestral() >> S.Gibbs(sites=1),
]


@pytest.fixture
def model() -> dd.adapters.Loaded:
    return convention().denoiser(Network())


def by_hand(network: Network) -> dd.Denoiser:
    """The same wrapped by hand: the ends are a part of the sequence, frozen."""
    return dd.Denoiser(lambda x, _: network(x), dd.Masked(7, dd.Linear()), "denoiser", time=None, suppress=(START, END))


def test_the_network_is_shown_the_ends_and_its_logits_are_those_of_the_inner_sites(
    model: dd.adapters.Loaded,
) -> None:
    x = torch.tensor([[7, 1, 7], [2, 7, 7]])
    said = model(x, 0.5).denoiser
    (shown,) = model.network.shown
    assert shown.tolist() == [[START, 7, 1, 7, END], [START, 2, 7, 7, END]]
    whole = by_hand(Network())(shown, 0.5).denoiser
    assert torch.equal(said, whole[:, 1:-1])
    assert bool((said[..., [START, END]] == -torch.inf).any())
    assert model.call.suppress == model.convention.unpredicted == (START, END)
    assert model.convention.lines()["frame"] == "5 before and 6 behind every sequence"


def test_called_by_itself_it_takes_sequences_that_hold_both_ends(model: dd.adapters.Loaded) -> None:
    """As its tokenizer gives them; nothing is put around them twice, and every site is spoken of."""
    whole = torch.tensor([[START, 7, 1, END], [START, 2, 7, END]])
    said = model.output(whole, torch.full((1, 1), 0.5, dtype=torch.float64)).source
    assert torch.equal(model.network.shown[-1], whole)
    assert said.shape == (2, 4, 7)
    assert torch.equal(said[:, 1:-1], model.fn(whole[:, 1:-1], None))
    some = torch.tensor([[START, 7, 1, END], [1, 2, 7, END]])  # not all of them hold both
    assert model.fn(some, None).shape == (2, 4, 7)
    assert model.network.shown[-1].shape == (2, 6)


def test_samples_are_those_of_the_ends_frozen_by_hand(model: dd.adapters.Loaded) -> None:
    """The exact law of what is sampled between the ends is the law of the longer sequence whose ends are given."""
    ours = T.law(dd.Sampler(model.process, model, S.Ancestral(), steps=2), length=2)
    whole = by_hand(model.network)
    inner = whole.condition(torch.tensor([START, 0, 0, END]), torch.tensor([False, True, True, False]))
    theirs = T.law(dd.Sampler(whole.process, inner, S.Ancestral(), steps=2), length=2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert float(ours.view(7, 7)[[START, END]].sum() + ours.view(7, 7)[:, [START, END]].sum()) == 0


def test_samples_know_their_ends(model: dd.adapters.Loaded, tmp_path: Path) -> None:
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=3).sample(4, 3, seed=0)
    assert out.tokens.shape == (4, 3)
    assert bool((out.tokens < START).all())
    assert out.framed().tolist() == [[START, *row, END] for row in out.tokens.tolist()]
    out.save(tmp_path / "out.safetensors")
    again = dd.Samples.load(tmp_path / "out.safetensors")
    assert again == out
    assert again.frame == (START, END)
    blocks = dd.Blockwise(model.process, model, S.Ancestral(), block=2, steps=2).sample(4, 5, seed=0, prompt=[1])
    assert blocks.framed().shape == (4, 7)
    bare = replace(model.convention, frame=None).denoiser(model.network)
    with pytest.raises(ValueError, match=r"framed: .* without start and end tokens .* take \.tokens"):
        dd.Sampler(bare.process, bare, S.Ancestral(), steps=3).sample(4, 3, seed=0).framed()


def test_conditions_and_wrappers_are_framed_where_sequences_are_whole(model: dd.adapters.Loaded) -> None:
    allowed = torch.ones(3, 7, dtype=torch.bool)
    kept = model.guided(dd.Allow(allowed))
    assert kept.frame == model.frame == model.guided(dd.Truncation(top_p=0.9)).frame == (START, END)
    assert model.with_schedule(dd.Cosine()).frame == (START, END)
    part = model.condition(torch.tensor([1, 2, 3]), torch.tensor([True, False, True]))
    assert part.frame is None  # the sites that move do not stand between the ends
    part(torch.tensor([[7, 7]]), 0.5)
    assert model.network.shown[-1].tolist() == [[START, 7, 2, 7, END]]


def test_times_of_the_ends_are_those_of_clean_tokens() -> None:
    for argument, clean in (("t", 0.0), ("sigma", 0.0), ("alpha", 1.0)):
        said = convention(time=argument, scalar_time=False, clock="", time_scale=10.0)
        model = said.denoiser(Network())
        model.evaluate(torch.tensor([[7, 1]]), torch.tensor([[0.5, 0.25]], dtype=torch.float64))
        (time,) = model.network.times
        assert (float(time[0, 0]), float(time[0, -1])) == (10 * clean, 10 * clean)
        assert time.shape == (1, 4)


ENDS = {
    "prompt": lambda sampler: sampler.sample(2, 3, seed=0, prompt=[START, 1]),
    "prompt of a row": lambda sampler: sampler.sample(2, 2, seed=0, prompt=[[1, 1], [1, END]]),
    "frozen": lambda sampler: sampler.sample(
        2, 3, seed=0, prompt=[0, 1, END], frozen=torch.tensor([[False, True, False], [False, True, True]])
    ),
    "initial": lambda sampler: sampler.sample(initial=torch.tensor([[START, 7, 7]]), seed=0),
    "call": lambda sampler: sampler.model(torch.tensor([[START, 7, 7]]), 0.5),
    "blocks": lambda sampler: dd.Blockwise(sampler.process, sampler.model, S.Ancestral(), block=2, steps=1).sample(
        1, 4, prompt=[START, 1]
    ),
    "whole blocks": lambda sampler: dd.Blockwise(
        sampler.process, sampler.model, S.Ancestral(), block=2, steps=1
    ).sample(1, 2, prompt=[1, END]),
    "loss": lambda sampler: losses.MaskedNELBO()(sampler.model, torch.tensor([[1, 2, END]])),
    "estimate": lambda sampler: losses.MaskedNELBO().estimate(sampler.model, torch.tensor([[START, 2]]), 2, 0),
    "probe": lambda sampler: dd.probe(sampler.model, torch.tensor([[START, 1, 2, 3, END]] * 2)),
    "conditional": lambda sampler: sampler.model.condition(
        torch.tensor([START, 2]), torch.tensor([False, True])
    ),
}  # fmt: skip


@pytest.mark.parametrize("door", list(ENDS))
@pytest.mark.usefixtures("as_user")
def test_tokens_that_hold_the_ends_are_refused_with_what_to_do(door: str, model: dd.adapters.Loaded) -> None:
    sampler = dd.Sampler(model.process, model, S.Ancestral(), steps=2)
    said = (
        r"row \d (begins with the start token, 5|ends with the end token, 6); leave both ends out, they are put around"
    )
    with pytest.raises(ValueError, match=said):
        ENDS[door](sampler)


def test_an_end_inside_is_a_token_like_others(model: dd.adapters.Loaded) -> None:
    """Pairs of sentences hold the end token twice, and a prompt may stop behind the first."""
    sampler = dd.Sampler(model.process, model, S.Ancestral(), steps=2)
    assert sampler.sample(1, 4, seed=0, prompt=[1, END]).tokens[0, :2].tolist() == [1, END]
    start = {"prompt": torch.tensor([START, 0]), "frozen": torch.tensor([False, True])}
    assert sampler.sample(1, 2, seed=0, **start).tokens.shape == (1, 2)  # a site that is not frozen holds anything
    uniform = replace(model.convention, process=dd.Uniform(7, dd.Linear())).denoiser(model.network)
    uniform(torch.tensor([[START, 1]]), 0.5)  # noise may be any token


@pytest.mark.parametrize(
    ("frame", "more", "message"),
    [
        ((5,), {}, "frame must be two ids, of the start and the end token, got"),
        ((5, "x"), {}, "frame must be a whole number"),
        ((-1, 5), {}, "frame must be at least 0"),
        ((5, 7), {}, "frame must not hold the mask's id, 7"),
        ((5, 6), {"shift": True}, "shift=True do not go together; pass frame=None"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_what_is_no_frame_is_refused(frame: Any, more: dict[str, Any], message: str) -> None:  # noqa: ANN401
    with pytest.raises((TypeError, ValueError), match=message):
        replace(convention(), frame=frame, **more)


# --- from files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FRAMED)
def test_families_with_ends_are_sampled_between_them(family: str, tmp_path: Path) -> None:
    model = load(NATIVE[family](tmp_path / "checkpoint").folder, quiet=True)
    assert model.convention.frame == (0, 2)  # <cls> and <eos> of the tokenizer
    assert UNFRAMED not in model.convention.notes
    for operator in OPERATORS:
        out = dd.Sampler(model.process, model, operator, steps=4).sample(2, 8, seed=0)
        assert not bool(torch.isin(out.tokens, torch.tensor([MASK, *model.call.suppress])).any()), operator
        assert out.framed()[:, [0, -1]].tolist() == [[0, 2]] * 2
    with pytest.raises(ValueError, match="leave both ends out"):
        dd.Sampler(model.process, model, S.Ancestral(), steps=4).sample(2, 8, seed=0, prompt=[0, 5])
    x0 = torch.randint(4, MASK, (4, 9), generator=torch.Generator().manual_seed(0))
    assert {finding.name for finding in dd.probe(model, x0).found} == {"shift", "mask id", "time", "predicts"}


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_without_a_frame_masks_alone_make_no_tokens_of_nan(operator: dd.Operator, tmp_path: Path) -> None:
    """ESM's token_dropout divides by the share of tokens that are not masked, which is none."""
    model = load(NATIVE["ESM-2"](tmp_path / "checkpoint").folder, quiet=True)
    bare = replace(model.convention, frame=None).denoiser(model.network)
    with pytest.raises(ValueError, match=r"row 0, position \d.* logits without mass, or with a Na"):
        dd.Sampler(bare.process, bare, operator, steps=4).sample(2, 8, seed=0)


def test_the_longest_sequence_leaves_room_for_the_ends(tmp_path: Path) -> None:
    network = native("BertForMaskedLM", max_position_embeddings=12)
    folder(tmp_path / "bert", network.config.to_dict() | {"mask_token_id": MASK}, network.state_dict())
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(37))]))
    model = load(tmp_path / "bert", quiet=True)
    assert (model.convention.longest, model.convention.frame) == (10, (1, 2))
    model(torch.full((1, 10), MASK), 0.5)
    with pytest.raises(ValueError, match="at most 10 tokens between its start and its end, got 11"):
        model(torch.full((1, 11), MASK), 0.5)


WORDS = [f"w{n}" for n in range(V - 5)]
Names = dict[str, Any]


@pytest.mark.parametrize(
    ("words", "files", "frame"),
    [
        # what the tokenizer's files declare, cls and sep before bos and eos
        (
            ["a", "b", "c", "d", "[MASK]"],
            {"special_tokens_map": {"cls_token": "b", "sep_token": {"content": "d"}}},
            (1, 3),
        ),
        (["a", "b", "c", "d", "[MASK]"], {"tokenizer_config": {"bos_token": "a", "eos_token": "c"}}, (0, 2)),
        (
            ["a", "b", "c", "d", "[MASK]"],
            {"tokenizer_config": {"cls_token": "d", "bos_token": "a", "eos_token": "c", "sep_token": "b"}},
            (3, 1),
        ),
        # config.json
        (["a", "b", "c", "d", "[MASK]"], {"config": {"bos_token_id": 2, "eos_token_id": 3}}, (2, 3)),
        (["a", "b", "c", "d", "[MASK]"], {"config": {"cls_token_id": 1, "bos_token_id": 2, "sep_token_id": 0}}, (1, 0)),
        # the usual names
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {}, (2, 3)),
        # a default of the class that the network does not know counts for nothing
        (
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            {"config": {"cls_token_id": 50281, "sep_token_id": 50282}},
            (2, 3),
        ),
        (["a", "b", "c", "d", "[MASK]"], {}, None),
        (["a", "b", "c", "[SEP]", "[MASK]"], {}, None),  # one end is no frame
    ],
)
def test_where_the_ends_are_named(
    words: list[str], files: dict[str, Names], frame: tuple[int, int] | None, tmp_path: Path
) -> None:
    network = native("BertForMaskedLM")
    config = network.config.to_dict() | {"mask_token_id": 4} | files.get("config", {})
    others = {name: content for name, content in files.items() if name != "config"}
    folder(tmp_path / "bert", config, network.state_dict(), **others)
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join([*words, *WORDS]))
    model = load(tmp_path / "bert", quiet=True)
    assert model.convention.frame == frame
    assert (UNFRAMED in model.convention.notes) == (frame is None)
    if frame is not None:
        assert set(frame) <= set(model.call.suppress)


def test_ids_beyond_the_network_are_refused(tmp_path: Path) -> None:
    network = native("BertForMaskedLM")
    names = {"cls_token": "far", "added_tokens_decoder": {"77": {"content": "far"}}}
    folder(
        tmp_path / "bert", network.config.to_dict() | {"mask_token_id": 4}, network.state_dict(), tokenizer_config=names
    )
    with pytest.raises(ValueError, match=r"the tokenizer's cls_token is 77, but the network knows ids 0\.\.39"):
        load(tmp_path / "bert", quiet=True)
    model = convention().denoiser(network)
    with pytest.raises(ValueError, match=r"frame=\(40, 6\), but the network knows ids 0\.\.39"):
        replace(model.convention, frame=(40, 6)).denoiser(network)


def test_esm_without_a_tokenizer_has_the_ends_of_its_vocabulary(tmp_path: Path) -> None:
    for rows, frame in ((33, (0, 2)), (34, None)):
        network = native("EsmForMaskedLM", vocab_size=rows, pad_token_id=1, position_embedding_type="rotary")
        config = {n: v for n, v in network.config.to_dict().items() if n not in ("bos_token_id", "eos_token_id")}
        folder(tmp_path / "esm", config | {"mask_token_id": 32}, network.state_dict())
        model = load(tmp_path / "esm", quiet=True)
        assert model.convention.frame == frame
        assert 1 in model.call.suppress  # the padding


def test_a_network_that_keeps_a_prefix_has_no_ends(tmp_path: Path) -> None:
    model = load(NATIVE["LLaDA2"](tmp_path / "blocks").folder, quiet=True)
    with pytest.raises(ValueError, match="needs a network of whole sequences, not one that keeps a prefix"):
        replace(model.convention, frame=(0, 1)).denoiser(model.network)
