"""A network that somebody else trained, from the index of packages: antiberty 0.1.3, 26 million weights."""

import importlib.metadata
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from places import ROOT
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load

HEAVY = "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR"


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    """docs/antibodies.py."""
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import antibodies
    finally:
        sys.path.pop(0)
    return antibodies


@pytest.fixture(scope="module")
def folder(docs: ModuleType) -> Path:
    try:
        return docs.antiberty()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the extra antibody")


@pytest.fixture(scope="module")
def model(folder: Path) -> dd.adapters.Loaded:
    return load(folder, quiet=True)


def test_its_convention_is_what_its_authors_say(model: dd.adapters.Loaded) -> None:
    said = model.convention
    assert (said.family, said.frame, said.longest) == ("BERT", (2, 3), 510)
    assert model.process == dd.Masked(25, dd.Linear(), mask_id=4)
    assert model.call.suppress == (0, 1, 2, 3)  # [PAD] [UNK] [CLS] [SEP]
    passed, named = said.notes
    assert re.fullmatch(
        r"passed over: bert\.embeddings\.position_ids and \d more, .*|passed over: bert\.pooler.*", passed
    )
    assert named == "its tokens are named by ../vocab.txt"


def test_logits_are_those_of_its_own_class(model: dd.adapters.Loaded, folder: Path) -> None:
    """The class in its package, whose forward is theirs; transformers 5 wants an attribute that it does not set."""
    from antiberty.model.AntiBERTy import AntiBERTy
    from transformers import BertConfig

    own_class = type("Own", (AntiBERTy,), {"all_tied_weights_keys": {}})
    own = own_class(BertConfig(**json.loads((folder / "config.json").read_text()))).eval()
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    left = own.load_state_dict(weights, strict=False)
    assert left.missing_keys == []
    assert set(left.unexpected_keys) <= {"bert.embeddings.position_ids"}
    x = torch.randint(5, 25, (3, 40), generator=torch.Generator().manual_seed(0))
    x[:, ::3], x[:, 0], x[:, -1] = 4, 2, 3
    with torch.no_grad():
        theirs: Tensor = own(x, attention_mask=torch.ones_like(x)).prediction_logits
        ours = model.fn(x[:, 1:-1], None)
    assert torch.equal(ours, theirs[:, 1:-1])
    assert float(theirs.std()) > 1


def test_the_probe_finds_nothing_against_it(model: dd.adapters.Loaded, docs: ModuleType) -> None:
    rows = [row for row in docs.known()["PDB, light"] if len(row) == 107]
    found = dd.probe(model, torch.tensor([docs.tokens(row) for row in rows[:10]]))
    assert found.wrong == (), str(found)
    assert found["shift"].verdict == found["mask id"].verdict == "right"


def test_domains_from_masks_alone_are_domains(model: dd.adapters.Loaded, docs: ModuleType) -> None:
    """Two of them here; the page has two hundred."""
    said = model.guided(dd.Truncation(temperature=0.8))
    sampler = dd.Sampler(model.process, said, S.Unmask(select="entropy"), steps=40)
    out = sampler.sample(2, 112, seed=0)
    domains = [docs.letters(row) for row in out.tokens.tolist()]
    assert any(re.search(docs.RULES["Cys 23, Trp 41"], domain) for domain in domains), domains
    assert out.framed()[:, [0, -1]].tolist() == [[2, 3]] * 2


def test_the_third_loop_of_a_given_domain_is_filled(model: dd.adapters.Loaded, docs: ModuleType) -> None:
    """Between the residues around it, which stay."""
    before, loop, behind = HEAVY, 9, "WGQGTLVTVSS"
    where = [False] * (len(before) + loop + len(behind))
    where[: len(before)] = [True] * len(before)
    where[-len(behind) :] = [True] * len(behind)
    given = docs.tokens(before + "A" * loop + behind)
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=loop).sample(
        4, len(given), seed=0, prompt=given, frozen=where
    )
    domains = [docs.letters(row) for row in out.tokens.tolist()]
    assert all(domain.startswith(before) and domain.endswith(behind) for domain in domains)
    assert len({domain[len(before) : -len(behind)] for domain in domains}) > 1
    # [DA] [Y] before the tryptophan is what most heavy chains have: F or M, D, then Y, V or I
    assert sum(domain[len(before) + loop - 2] == "D" for domain in domains) >= 2, domains


def test_the_page_has_the_table_of_its_sequences(docs: ModuleType) -> None:
    known = docs.known()
    natural = known["PDB, heavy"] + known["PDB, light"]
    assert len(natural) == len(set(natural)) == len(known[docs.SOURCE]) == len(known[docs.MIXED]) == 200
    text = docs.PAGE.read_text()
    (found,) = re.findall(r"<!-- domains -->\n(.*?)\n<!-- end -->", text, re.S)
    assert found == docs.table(known)


def test_sampled_domains_have_their_residues_as_often_as_natural_ones(docs: ModuleType) -> None:
    """The exact intervals of both proportions overlap, for every rule; at the lengths of both kinds they do not."""
    from scipy.stats import binomtest

    known = docs.known()
    for rule in docs.RULES.values():
        ends = {}
        for source in ("PDB, heavy", docs.SOURCE, docs.MIXED):
            kept = sum(bool(re.search(rule, sequence)) for sequence in known[source])
            ends[source] = binomtest(kept, len(known[source])).proportion_ci(0.95, method="exact")
        assert ends[docs.SOURCE].high >= ends["PDB, heavy"].low, rule
    assert ends[docs.MIXED].high < ends["PDB, heavy"].low
