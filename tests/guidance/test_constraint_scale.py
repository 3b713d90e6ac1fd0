"""Constraints at scale: chains of 256 sites against their oracle, 4,096 sites, the memory of large vocabularies."""

from types import ModuleType

import pytest
import torch
from places import ROOT
from problems import chain
from scipy import stats
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import GuideAt
from discdiff.theory import fit

V, L = 4, 256
MASKED = dd.Masked(V, dd.Linear())
pytestmark = pytest.mark.usefixtures("as_user")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that computes the tables of the documentation."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import constraints

    return constraints


def thirds() -> tuple[Tensor, Tensor]:
    """The number of zeros is a multiple of three, and no three follows a zero."""
    moves = torch.full((7, V), 6)
    for count in range(3):
        for zero in range(2):
            one = [2 * ((count + 1) % 3) + 1, 2 * count, 2 * count, 6 if zero else 2 * count]
            moves[2 * count + zero] = torch.tensor(one)
    accept = torch.zeros(7, dtype=torch.bool)
    accept[:2] = True
    return moves, accept


def fits(x: Tensor) -> Tensor:
    return ((x == 0).sum(-1) % 3 == 0) & ~((x[:, :-1] == 0) & (x[:, 1:] == 3)).any(-1)


MOVES, ACCEPT = thirds()
THIRDS = dd.Constraint(MOVES, 0, ACCEPT)
TILT = T.Tilt(automaton=T.Automaton(MOVES, torch.where(ACCEPT, 0.0, -torch.inf)))


def independent() -> T.MarkovChain:
    law = torch.tensor([0.2, 0.3, 0.4, 0.1], dtype=torch.float64)
    return T.MarkovChain(law, law.expand(V, V), length=L)


def zeros(x: Tensor) -> Tensor:
    return (x == 0).sum(-1)


def pairs(x: Tensor) -> Tensor:
    """How often each pair of neighbours occurs at an even site and the next one, over all sequences."""
    return torch.bincount((x[:, ::2] * V + x[:, 1::2]).flatten(), minlength=V * V)


class Sitewise(dd.Guide):
    """Planted: the marginals as a tilt of single sites."""

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        return THIRDS(prediction, state, at).untruncated


@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap(), S.Unmask("max_prob"), S.ReMDM(0.2)], ids=repr)
def test_all_samples_of_a_chain_are_accepted(operator: dd.Operator) -> None:
    model = chain(V, L).denoiser(MASKED)
    sampler = dd.Sampler(MASKED, model.guided(THIRDS), operator, steps=3)
    tokens = sampler.sample(24, L, seed=0).tokens
    assert bool(fits(tokens).all())
    assert torch.equal(sampler.sample(5, L, seed=0, first_row=7).tokens, tokens[7:12])
    alone = dd.Sampler(MASKED, model.guided(Sitewise()), operator, steps=3).sample(24, L, seed=0).tokens
    assert not bool(fits(alone).all()), "planted: a tilt of single sites"


def test_samples_of_independent_sites_follow_the_tilted_oracle(failure_rate: float) -> None:
    """By log-likelihoods, by the number of zeros and by pairs of neighbours; the oracle draws by a code of its own."""
    law = independent()
    tilted = law.tilted(TILT)
    model = law.denoiser(MASKED)
    oracle, possible = tilted.sample(800, seed=1), torch.arange(V * V) != 3  # no three follows a zero
    assert bool(fits(oracle).all())
    seen = {}
    for name, guided in (("joint", model.guided(THIRDS)), ("none", model)):
        x = dd.Sampler(MASKED, guided, S.Ancestral(), steps=2).sample(800, L, seed=0).tokens
        right = fits(x)
        found = [fit.two_sample(x, oracle, statistic).pvalue for statistic in (law.log_prob, zeros)]
        both = torch.stack([pairs(x), pairs(oracle)])[:, possible].numpy()
        seen[name] = min(*found, float(stats.chi2_contingency(both).pvalue))
        assert bool(right.all()) == (name == "joint")
    assert seen["joint"] > failure_rate
    assert seen["none"] < failure_rate


@pytest.mark.slow
def test_redraws_of_one_site_keep_the_tilted_oracle(failure_rate: float) -> None:
    """Given all other sites the law of one site is exact, also where sites depend on each other."""
    law = chain(V, L)
    tilted = law.tilted(TILT)
    start, oracle = tilted.sample(200, seed=3), tilted.sample(1000, seed=4)
    found = {}
    for name, model in (("constraint", law.denoiser(MASKED).guided(THIRDS)), ("none", law.denoiser(MASKED))):
        sampler = dd.Sampler(MASKED, model, S.Gibbs() ** 100, time=0.0)
        x = sampler.sample(initial=start, seed=0).tokens
        assert float((x != start).double().mean()) > 0.1
        assert bool(fits(x).all()) == (name == "constraint")
        found[name] = min(fit.two_sample(x, oracle, statistic).pvalue for statistic in (law.log_prob, zeros))
    assert found["constraint"] > failure_rate
    assert found["none"] < failure_rate


def test_one_draw_of_four_thousand_sites() -> None:
    """Exactly 1,000 of the first kind of token, which is rare: its probability underflows."""
    count, length = 1000, 4096
    moves = torch.stack([(torch.arange(count + 2) + 1).clamp(max=count + 1), torch.arange(count + 2)], 1)
    exact = dd.Constraint(moves, 0, torch.arange(count + 2) == count)
    process = dd.Masked(2, dd.Linear())
    logits = torch.tensor([-12.0, 0.0])
    model = dd.Denoiser(lambda x, t: logits.expand(*x.shape, 2), process, "denoiser").guided(exact)
    tokens = dd.Sampler(process, model, S.Ancestral(), steps=1).sample(1, length, seed=0).tokens
    assert int((tokens == 0).sum()) == count
    first, last = (int((tokens[0, part] == 0).sum()) for part in (slice(2048), slice(2048, None)))
    assert 400 < first < 600
    assert 400 < last < 600


def test_a_large_vocabulary_takes_little_memory(page: ModuleType) -> None:
    """50,000 tokens, 64 sites, 100 states: no table of sites, tokens and pairs of states, 2.6 TB, nor of logits."""
    cost = page.Cost(page.dense(100, 50_000, 300), 2, 64)
    assert cost.memory() < 60e6
    more = page.Cost(cost.constraint, 6, 64)
    assert more.memory() < 1.6 * cost.memory()
    assert more.logits.nbytes > 60e6


@pytest.mark.slow
def test_tokens_that_all_move_differently_take_bounded_memory(page: ModuleType) -> None:
    cost = page.Cost(page.dense(100, 50_000, 50_000), 2, 64)
    assert cost.constraint.automaton.classes == 50_000
    assert cost.memory() < 300e6
