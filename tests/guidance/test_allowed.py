"""Tokens that sites may hold: no mass elsewhere, the law of what is left, positions behind a prefix."""

import pytest
import torch
from problems import processes, states, strong

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

WORLD, X = strong(), states(3, 3)
ALLOWED = torch.tensor([[True, True, False], [False, False, True], [True, False, True]])
FITS = ALLOWED[torch.arange(3), X].all(-1)
pytestmark = pytest.mark.usefixtures("as_user")


@pytest.mark.parametrize("process", processes(), ids=repr)
def test_no_sample_holds_a_token_that_is_not_allowed(process: dd.Process) -> None:
    model = WORLD.denoiser(process, predicts="loo")
    law = T.law(dd.Sampler(process, model.guided(dd.Allow(ALLOWED)), S.Ancestral(), steps=2))
    assert float(law[~FITS].sum()) == 0
    assert float(law[FITS].min()) > 0
    assert float(T.law(dd.Sampler(process, model, S.Ancestral(), steps=2))[~FITS].sum()) > 0.1, "planted: no guide"
    none = T.law(dd.Sampler(process, model.guided(dd.Forbid([1])), S.Ancestral(), steps=2))
    assert float(none[(X == 1).any(-1)].sum()) == 0
    same = T.law(dd.Sampler(process, model.guided(dd.Forbid([])), S.Ancestral(), steps=2))
    torch.testing.assert_close(same, T.law(dd.Sampler(process, model, S.Ancestral(), steps=2)), atol=1e-14, rtol=0)


def test_one_site_at_a_time_follows_the_restricted_law_of_a_product() -> None:
    """Site by site, O' is the conditional of p0 restricted to a product set only if p0 is a product."""
    process, sites = dd.Masked(3, dd.Linear()), torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).double()
    sites = sites / sites.sum(-1, keepdim=True)
    p0 = (sites[0][:, None, None] * sites[1][:, None] * sites[2]).flatten()
    model = T.Enumeration(p0, vocab_size=3, length=3).denoiser(process).guided(dd.Allow(ALLOWED))
    law = T.law(dd.Sampler(process, model, S.Unmask("left_to_right"), steps=3))
    right = torch.where(FITS, p0, 0.0)
    torch.testing.assert_close(law, right / right.sum(), atol=1e-14, rtol=0)


def test_the_positions_of_a_block_are_those_of_the_sequence() -> None:
    process = dd.Masked(3, dd.Linear())
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = dd.Denoiser(lambda x, t: logits[x], process, "denoiser").guided(dd.Allow(ALLOWED))
    blocks = dd.Blockwise(process, model, S.Ancestral(), block=2, steps=2)
    law = T.law(blocks, length=3)
    assert float(law[~FITS].sum()) == 0
    assert float(law[FITS].min()) > 0
    tokens = blocks.sample(64, 3, seed=0, prompt=[[0], [1, 2]] * 32).tokens
    assert bool(ALLOWED[torch.arange(3), tokens].all())


def test_errors_name_the_token_the_site_and_the_length() -> None:
    model = WORLD.denoiser(dd.Uniform(3, dd.Linear()))
    for mask, kind, text in (
        (ALLOWED.double(), TypeError, "must hold bools"),
        (ALLOWED[0], ValueError, r"mask must be \(L, V\)"),
        (ALLOWED & torch.tensor([[True], [False], [True]]), ValueError, "site 1 may hold no token"),
    ):
        with pytest.raises(kind, match=text):
            dd.Allow(mask)
    with pytest.raises(ValueError, match=r"mask must be \(L, 3\), got \(3, 2\)"):
        model.guided(dd.Allow(ALLOWED[:, :2] | True))
    with pytest.raises(ValueError, match="mask is for 2 sites, but the sequence has 3"):
        dd.Sampler(model.process, model.guided(dd.Allow(ALLOWED[:2])), S.Ancestral(), steps=1).sample(1, seed=0)
    with pytest.raises(ValueError, match="ids below 3, got 3"):
        model.guided(dd.Forbid([3]))
    every = dd.Sampler(model.process, model.guided(dd.Forbid([0, 1, 2])), S.Ancestral(), steps=1)
    with pytest.raises(ValueError, match=r"row 0, position \d: the denoiser gave logits without mass"):
        every.sample(1, seed=0)
