"""Temperature and truncation: the exact law of a guided sampler is that of the tempered leave-one-out."""

import pytest
import torch
from problems import processes, states, strong

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

GUIDES = [
    dd.Truncation(temperature=0.5),
    dd.Truncation(top_k=2),
    dd.Truncation(top_p=0.6),
    dd.Truncation(min_p=0.4),
    dd.Truncation(temperature=1.5, top_k=2, top_p=0.9),
    dd.Truncation(temperature=0.0),
]


def tempered(log_o: torch.Tensor, guide: dd.Truncation) -> torch.Tensor:
    """The definition, by sorting: a row of probabilities at a time."""
    rows = []
    for row in log_o.flatten(0, -2):
        p = (row / guide.temperature).softmax(-1) if guide.temperature else (row == row.max()).double()
        order = p.argsort(descending=True)
        keep = order[: guide.top_k or len(p)]
        if guide.top_p is not None:
            share = p[keep] / p[keep].sum()
            keep = keep[share.cumsum(-1) - share < guide.top_p]
        kept = torch.zeros_like(p).index_fill(0, keep, 1.0) * p
        kept = torch.where(kept >= (guide.min_p or 0) * kept.max(), kept, 0.0)
        rows.append((kept / kept.sum()).log())
    return torch.stack(rows).view(log_o.shape)


def by_hand(process: dd.Process, guide: dd.Truncation) -> dd.Denoiser:
    """The world's leave-one-out, tempered by the definition."""
    exact = strong().denoiser(process, predicts="loo")

    def fn(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        time = process.schedule.time(alpha.reshape(len(x), -1))
        rows = exact.evaluate(x, time).loo_rows(torch.ones_like(x, dtype=torch.bool))
        return tempered(rows.unflatten(0, x.shape), guide)

    return dd.Denoiser(fn, process, "loo", time="alpha", length=3, time_dtype=torch.float64)


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
@pytest.mark.parametrize("predicts", ["denoiser", "loo"])
@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("operator", [S.Ancestral(), S.Gibbs()], ids=repr)
def test_the_kernel_is_that_of_the_tempered_prediction(
    operator: dd.Operator, process: dd.Process, predicts: str, guide: dd.Truncation
) -> None:
    times = {"t": 0.6, "s": 0.4} if operator.moves else {"t": 0.6}
    model = strong().denoiser(process, predicts=predicts)
    found = T.kernel(operator, process, model.guided(guide), **times)
    exact = T.kernel(operator, process, by_hand(process, guide), **times)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)
    plain = T.kernel(operator, process, model, **times)
    assert float((plain - exact).abs().max()) > 1e-3, "planted: no guide at all"


@pytest.mark.parametrize("process", processes(), ids=repr)
def test_the_denoiser_follows_from_the_tempered_prediction(process: dd.Process) -> None:
    guide, z = dd.Truncation(temperature=0.5), states(process.states, 3)
    for predicts in ("denoiser", "loo"):
        prediction = strong().denoiser(process, predicts=predicts).guided(guide)(z, 0.6)
        by_definition = by_hand(process, guide)(z, 0.6)
        torch.testing.assert_close(prediction.denoiser.exp(), by_definition.denoiser.exp(), atol=1e-12, rtol=0)


def test_tempering_the_denoiser_is_another_law() -> None:
    """The planted fault of the field: on a uniform process the site's own token would be tempered too."""
    process, z = dd.Uniform(3, dd.Linear()), states(3, 3)
    right = strong().denoiser(process).guided(dd.Truncation(temperature=0.5))(z, 0.6)
    wrong = tempered(strong().denoiser(process)(z, 0.6).denoiser, dd.Truncation(temperature=0.5))
    assert float((right.denoiser.exp() - wrong.exp()).abs().max()) > 0.05


def test_cold_samples_are_the_most_probable() -> None:
    process = dd.Masked(3, dd.Linear())
    world = T.Enumeration(torch.tensor([0.2, 0.5, 0.3]), vocab_size=3, length=1)
    model = world.denoiser(process).guided(dd.Truncation(temperature=0.0))
    assert dd.Sampler(process, model, S.Ancestral(), steps=4).sample(50, seed=0).tokens.unique().tolist() == [1]


@pytest.mark.usefixtures("as_user")
def test_a_guided_model_says_so() -> None:
    model = strong().denoiser(dd.Masked(3, dd.Linear())).guided(dd.Truncation(top_p=0.9))
    assert repr(model).endswith(".guided(Truncation(top_p=0.9))")
    with pytest.raises(ValueError, match="truncated once"):
        model.guided(dd.Truncation(top_k=1))(torch.zeros(1, 3, dtype=torch.int64), 0.5)
    with pytest.raises(TypeError, match="guide is called as"):
        model.guided("cold")
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 2.0}, {"min_p": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dd.Truncation(**wrong)
