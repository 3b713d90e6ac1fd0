"""Best-of-n: its law by enumeration of all groups, never p0 W / Z; costs, splits, and errors for bad input."""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from places import ROOT
from problems import strong
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.sampling import BestSamples
from discdiff.theory.world import state_index

WORLD = strong()
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
LOG_W = torch.as_tensor(np.random.default_rng(1).normal(size=27)).round(decimals=1)  # with ties


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import recipes

    return recipes


def reward(x: Tensor) -> Tensor:
    return LOG_W[state_index(x, 3)]


def sampler(process: dd.Process = MASKED, steps: int = 4) -> dd.Sampler:
    return dd.Sampler(process, WORLD.denoiser(process, predicts="loo"), S.Ancestral(), steps=steps)


def by_groups(p: Tensor, values: Tensor, n: int) -> Tensor:
    """The law of the first best of n draws, by a sum over all groups."""
    groups = torch.cartesian_prod(*[torch.arange(len(p))] * n).view(-1, n)
    best = groups[torch.arange(len(groups)), values[groups].argmax(-1)]
    return torch.zeros_like(p).index_add(0, best, p[groups].prod(-1))


def pvalue(tokens: Tensor, law: Tensor) -> float:
    """Of a chi-square test; sequences with fewer than 5 expected draws are one cell."""
    seen, expected = torch.bincount(state_index(tokens, 3), minlength=27).double(), law * len(tokens)
    few = expected < 5
    cells = [torch.cat([one[~few], one[few].sum()[None]]).numpy() for one in (seen, expected)]
    return float(chisquare(*(cell[cells[1] > 0] for cell in cells)).pvalue)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_formula_is_the_sum_over_all_groups(page: ModuleType, n: int) -> None:
    p = T.law(sampler())
    for values in (LOG_W, torch.zeros(27).double(), torch.arange(27).double() // 9):
        torch.testing.assert_close(page.best_of_law(p, values, n), by_groups(p, values, n), atol=1e-14, rtol=0)
    two = page.best_of_law(p, LOG_W, 2)
    assert float((page.best_of_law(p, LOG_W, n) - two).abs().max()) > 1e-2 or n == 2  # planted: another n


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
def test_draws_follow_the_formula(page: ModuleType, process: dd.Process, failure_rate: float) -> None:
    run, p = sampler(process), T.law(sampler(process))
    best = dd.best_of(run.sample(4 * 8000, seed=3), reward, 4)
    assert best.tokens.shape == (8000, 3)
    assert torch.equal(best.reward, reward(best.tokens))
    assert pvalue(best.tokens, page.best_of_law(p, LOG_W, 4)) > failure_rate
    assert pvalue(best.tokens, page.best_of_law(p, LOG_W, 3)) < failure_rate  # planted
    assert pvalue(best.tokens, (p.log() + LOG_W).softmax(0)) < failure_rate  # it is not p0 W / Z


def test_it_is_an_order_statistic_and_never_the_tilted_law(page: ModuleType) -> None:
    p = T.law(sampler())
    tilted = (p.log() + LOG_W).softmax(0)
    laws = {n: page.best_of_law(p, LOG_W, n) for n in (1, 2, 3, 4, 8, 64, 1024)}
    assert min(T.tv(law, tilted) for law in laws.values()) > 0.05
    for n, law in laws.items():
        torch.testing.assert_close(page.best_of_law(p, (3 * LOG_W).exp(), n), law)  # the order alone counts
        assert T.kl(law, p) <= math.log(n) - (n - 1) / n + 1e-12
    top = p.where(LOG_W.eq(LOG_W.max()), 0.0)
    torch.testing.assert_close(laws[1024], top / top.sum(), atol=1e-3, rtol=0)


def test_costs_are_those_of_all_candidates() -> None:
    out = sampler().sample(24, seed=0)
    best = dd.best_of(out, reward, 8)
    assert (best.nfe, best.calls, best.queries, best.rewards) == (out.nfe, out.calls, out.queries, 24)
    assert torch.equal(best.nfe_rows, out.nfe_rows.view(3, 8).sum(-1))
    assert best.seed == out.seed


def test_groups_do_not_depend_on_the_batch() -> None:
    whole = dd.best_of(sampler(UNIFORM).sample(24, seed=7), reward, 4)
    parts = [dd.best_of(sampler(UNIFORM).sample(4 * size, seed=7, first_row=4 * begin), reward, 4)
             for size, begin in ((1, 0), (3, 1), (2, 4))]  # fmt: skip
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.reward for part in parts]), whole.reward)


def test_the_first_of_equal_candidates_is_kept() -> None:
    out = sampler().sample(12, seed=0)
    assert torch.equal(dd.best_of(out, lambda x: torch.zeros(len(x)), 4).tokens, out.tokens[::4])
    none = dd.best_of(out, lambda x: torch.full((len(x),), -torch.inf), 4)
    assert torch.equal(none.tokens, out.tokens[::4])
    assert bool((none.reward == -torch.inf).all())


def test_blocks_are_accepted_and_results_stored(tmp_path: Path) -> None:
    flat = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), MASKED, "denoiser")
    blocks = dd.Blockwise(MASKED, flat, S.Ancestral(), block=2, steps=2)
    with pytest.raises(ValueError, match="takes complete samples"):
        dd.best_of(blocks.sample(8, 4, seed=0, until=1), lambda x: x.sum(-1), 4)
    best = dd.best_of(blocks.sample(8, 4, seed=0), lambda x: x.sum(-1), 4)
    assert best.tokens.shape == (2, 4)
    best.save(tmp_path / "best.safetensors")
    assert BestSamples.load(tmp_path / "best.safetensors") == best


@pytest.mark.usefixtures("as_user")
def test_bad_input_is_refused() -> None:
    out = sampler().sample(8, seed=0)
    particles = dd.Particles(sampler(), lambda x, t: torch.zeros(len(x)), 4).sample(8, seed=0)
    for wrong in (particles, out.tokens, None):
        with pytest.raises(TypeError, match="best_of: takes Samples with independent rows"):
            dd.best_of(wrong, reward, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="best_of: reward is called with tokens"):
        dd.best_of(out, 3, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a multiple of n = 3, got 8"):
        dd.best_of(out, reward, 3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        dd.best_of(out, reward, 0)
    with pytest.raises(ValueError, match=r"this run has come to step 2, t = 0\.5"):
        dd.best_of(sampler().sample(8, seed=0, until=2), reward, 4)
    with pytest.raises(ValueError, match=r"must give \(8,\) numbers, one a row"):
        dd.best_of(out, lambda x: x, 4)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=rf"the reward of row 5, \[.*\], is {bad}"):
            dd.best_of(out, lambda x, bad=bad: torch.where(torch.arange(8) == 5, bad, 0.0), 4)
