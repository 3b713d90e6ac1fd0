"""Resampling: each particle gets P w copies in expectation, and its law, its list of values and its draws agree."""

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from discdiff.choices import SCHEMES, Ancestors, Key

INF = torch.inf
WEIGHTS = {
    1: [[0.0]],
    2: [[0.0, 0.0], [0.0, -INF], [0.75, 0.25], [2.0, -1.0]],
    3: [[0.0, 0.0, 0.0], [-INF, 0.3, -INF], [1.0, 0.2, -0.7], [0.5, 0.25, 0.25]],
    4: [[0.1, -2.0, 0.3, 1.0], [0.0, 0.0, -INF, -INF], [3.0, -1.0, -1.0, -1.0]],
}


def copies(value: Tensor, particles: int) -> Tensor:
    return torch.nn.functional.one_hot(value, particles).sum(-2).double()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("particles", WEIGHTS)
def test_expected_copies_are_the_weights(scheme: str, particles: int) -> None:
    law = Ancestors(torch.tensor(WEIGHTS[particles]).double(), scheme)  # type: ignore[arg-type]
    parent, value, log_p = law.fork()
    mean = torch.zeros_like(law.weight).index_add(0, parent, log_p.exp()[:, None] * copies(value, particles))
    torch.testing.assert_close(mean, particles * law.weight, atol=1e-12, rtol=0)
    total = torch.zeros(len(law.weight)).double().index_add(0, parent, log_p.exp())
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)
    again = law.log_prob(value[:, None].expand(-1, len(law.weight), -1))
    torch.testing.assert_close(again.gather(1, parent[:, None])[:, 0], log_p, atol=1e-9, rtol=0)
    assert len(torch.cat([parent[:, None], value], -1).unique(dim=0)) == len(parent)


def test_a_wrong_scheme_is_caught() -> None:
    """Planted: weights rounded to whole copies do not give P w copies."""
    law = Ancestors(torch.tensor([[0.75, 0.25]]).double().log(), "residual")
    sure, _ = law._residual()
    assert float((sure.double() - 2 * law.weight).abs().max()) > 0.4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("particles", [2, 3, 4])
def test_draws_follow_the_law(scheme: str, particles: int, failure_rate: float) -> None:
    one = torch.tensor(WEIGHTS[particles][-1:]).double()
    law = Ancestors(one.expand(20_000, -1), scheme)  # type: ignore[arg-type]
    drawn = law._draw(Key(3, torch.arange(20_000)))
    power = particles ** torch.arange(particles)
    _, value, log_p = Ancestors(one, scheme).fork()  # type: ignore[arg-type]
    code, index = (value * power).sum(-1).unique(return_inverse=True)
    expected = torch.zeros(len(code)).double().index_add(0, index, log_p.exp()) * 20_000
    found = torch.bincount(torch.searchsorted(code, (drawn * power).sum(-1)), minlength=len(code)).double()
    assert torch.isin((drawn * power).sum(-1), code).all()
    often = expected > 5
    groups = [torch.cat([x[often], x[~often].sum()[None]]) for x in (found, expected)]
    keep = groups[1] > 0
    if int(keep.sum()) > 1:
        assert chisquare(groups[0][keep], groups[1][keep] * groups[0].sum() / groups[1].sum()).pvalue > failure_rate


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_particle_without_weight_is_never_drawn(scheme: str) -> None:
    log_w = torch.tensor([0.1, -0.4, 0.3, -INF, 0.2, -INF]).double()
    drawn = Ancestors(log_w.expand(3000, -1), scheme)._draw(Key(1, torch.arange(3000)))  # type: ignore[arg-type]
    assert not bool(((drawn == 3) | (drawn == 5)).any())
    assert bool((drawn == 4).any())


@pytest.mark.usefixtures("as_user")
def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="resample must be one of 'systematic'"):
        Ancestors(torch.zeros(1, 2).double(), "best")  # type: ignore[arg-type]
