"""Temperature and truncation: the exact law of a guided sampler is that of the tempered leave-one-out."""

from dataclasses import replace

import pytest
import torch
from problems import dirichlet, processes, states, strong

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
        rows = exact.evaluate(x, time)[torch.ones_like(x, dtype=torch.bool)].loo.dense()
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


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
@pytest.mark.parametrize("predicts", ["denoiser", "loo", "ratio"])
def test_the_contrast_tempers_the_denoiser(guide: dd.Truncation, predicts: str) -> None:
    """What the field does, labelled: D is tempered and cut, so the site's own token counts once more as evidence."""
    process, z = dd.Uniform(3, dd.Linear()), states(3, 3)
    plain, contrast = strong().denoiser(process, predicts=predicts), replace(guide, of="denoiser")
    found, by_definition = plain.guided(contrast)(z, 0.6).denoiser.exp(), tempered(plain(z, 0.6).denoiser, guide).exp()
    torch.testing.assert_close(found, by_definition, atol=1e-12, rtol=0)
    assert float((found - plain.guided(guide)(z, 0.6).denoiser.exp()).abs().max()) > 0.05
    if predicts == "loo":  # where alpha = 1 a site is its token, and O says what else it might have been
        clean = plain.guided(contrast)(z, 0.0)
        torch.testing.assert_close(clean.denoiser.exp(), torch.nn.functional.one_hot(z, 3).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(clean.loo, plain(z, 0.0).loo, atol=1e-12, rtol=0)


@pytest.mark.parametrize("predicts", ["denoiser", "loo"])
@pytest.mark.parametrize("guide", [GUIDES[0], GUIDES[1]], ids=repr)
@pytest.mark.parametrize("operator", [S.Euler(), S.TauLeaping(), S.ThetaTrapezoidal(), S.DFM(1.5)], ids=repr)
def test_jumps_follow_the_contrast(operator: dd.Operator, guide: dd.Truncation, predicts: str) -> None:
    """Where a jump may lead is read behind a conversion too: the law is that of D tempered and cut by hand."""
    process, world = dd.Uniform(3, dd.Linear()), dirichlet(0.5, 3, length=2)
    exact = world.denoiser(process, predicts="denoiser")

    def cut(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return tempered(exact.fn(x, alpha), guide)

    by_hand = dd.Denoiser(cut, process, "denoiser", time="alpha", length=2, time_dtype=torch.float64)
    model = world.denoiser(process, predicts=predicts)
    found = T.kernel(operator, process, model.guided(replace(guide, of="denoiser")), t=0.6, s=0.4)
    torch.testing.assert_close(found, T.kernel(operator, process, by_hand, t=0.6, s=0.4), atol=1e-12, rtol=0)
    other = T.kernel(operator, process, model.guided(guide), t=0.6, s=0.4)
    assert float((found - other).abs().max()) > 1e-3, "planted: the leave-one-out tempered instead"


def test_the_contrast_follows_its_formula_for_the_leave_one_out() -> None:
    """log O' = log O / T + (1/T - 1) log w at the own token."""
    process, z = dd.Uniform(3, dd.Linear()), states(3, 3)
    model = strong().denoiser(process)
    weight = process.log_weight(z, torch.full(z.shape, 0.4, dtype=torch.float64))
    own = torch.nn.functional.one_hot(z, 3) * weight[..., None]
    expected = (2 * model(z, 0.6).loo + own).log_softmax(-1)
    found = model.guided(dd.Truncation(temperature=0.5, of="denoiser"))(z, 0.6).loo
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_one_site_is_tempered_exactly_through_the_leave_one_out(process: dd.Process, steps: int) -> None:
    """L = 1: the law is p0^{1/T}, normalised, for any number of steps; not through the denoiser, unless masked."""
    p0 = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    if process.vocab_size != 3:
        pytest.skip("for three tokens")
    model = T.Enumeration(p0, vocab_size=3, length=1).denoiser(process, predicts="loo")
    right, wrong = (
        T.law(dd.Sampler(process, model.guided(dd.Truncation(temperature=0.5, of=of)), S.Ancestral(), steps=steps))
        for of in ("loo", "denoiser")
    )
    target = p0**2 / (p0**2).sum()
    assert T.tv(right, target) < 1e-12
    if process.absorbing or steps == 1:  # a hidden site, or one that alpha = 0 says nothing about, has no evidence
        assert T.tv(wrong, target) < 1e-12
    else:
        assert T.tv(wrong, target) > 0.02


def test_cold_samples_are_the_most_probable() -> None:
    process = dd.Masked(3, dd.Linear())
    world = T.Enumeration(torch.tensor([0.2, 0.5, 0.3]), vocab_size=3, length=1)
    model = world.denoiser(process).guided(dd.Truncation(temperature=0.0))
    assert dd.Sampler(process, model, S.Ancestral(), steps=4).sample(50, seed=0).tokens.unique().tolist() == [1]


@pytest.mark.usefixtures("as_user")
def test_a_guided_model_says_so() -> None:
    model = strong().denoiser(dd.Masked(3, dd.Linear())).guided(dd.Truncation(top_p=0.9))
    assert repr(model).endswith(".guided(Truncation(top_p=0.9))")
    with pytest.raises(TypeError, match="guide is called as"):
        model.guided("cold")
    contrast = model.guided(dd.Truncation(temperature=0.5, of="denoiser"))
    assert repr(contrast).endswith(".guided(Truncation(temperature=0.5, of='denoiser'))")
    for wrong in ({"of": "D"}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 2.0}, {"min_p": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dd.Truncation(**wrong)
