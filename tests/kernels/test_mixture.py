"""Mixtures of a LOO and noise, read and drawn by compiled code without their rows: the law and the tokens of torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff.choices import Sites
from discdiff.kernels import dispatch as kernels
from discdiff.kernels import native
from discdiff.prediction import Prediction
from discdiff.samplers._choosing import compare, total_variation
from discdiff.samplers._conditional import LOG_RATE, balanced

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler")
B, L = 3, 30
SPREAD = torch.tensor([0.0, 1e-300, 1e-9, 0.3, 0.8, 1 - 1e-16, 1.0], dtype=torch.float64)


def process_of(kind: str, width: int) -> dd.Process:
    pi = torch.arange(width, dtype=torch.float64)  # a token that is no noise
    return {
        "uniform": lambda: dd.Uniform(width, dd.Linear()),
        "masked": lambda: dd.Masked(width, dd.Linear()),
        "inside": lambda: dd.Masked(width, dd.Linear(), mask_id=1),
        "marginal": lambda: dd.Marginal(pi / pi.sum(), dd.Linear()),
        "hybrid": lambda: dd.Hybrid(width, dd.Linear(), p_uniform=0.3),
        "anchors": lambda: dd.AbsorbingUniform(width, dd.Linear()),
    }[kind]()


def prediction_of(
    kind: str, width: int, dtype: torch.dtype, spread: bool = True, turn: int = 0, bad: bool = False
) -> Prediction:
    """Logits with excluded columns, whole rows down to e^-900, and survival from 0 to 1."""
    process, made = process_of(kind, width), torch.Generator().manual_seed(width)
    logits = torch.randn(B, L, width, generator=made).mul(5)
    alpha = SPREAD[torch.arange(B * L) % len(SPREAD)].view(B, L) if spread else torch.full((B, L), 0.4).double()
    logits[0, :, 0] = -torch.inf
    logits[1, :5] = torch.linspace(-900, 0, width)
    logits[1, 5:10] = torch.linspace(0, -1e-40, width)  # subnormal
    logits = logits.roll(turn, 1)
    if bad:
        logits[2, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
    x = torch.randint(process.states, (B, L), generator=made).roll(turn, 1)
    return Prediction(logits.to(dtype), "loo", x, alpha, process)


def sites_of(prediction: Prediction) -> Iterator[Sites]:
    everywhere = torch.ones(prediction.x.shape, dtype=torch.bool)
    yield prediction[everywhere].conditional
    for balance in (None, *LOG_RATE):
        yield balanced(prediction[everywhere], balance)


def close(mine: Tensor, right: Tensor) -> None:
    """Equal to the rounding of logarithms, which is absolute in log space."""
    torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13, equal_nan=True)


KINDS = ["uniform", "masked", "inside", "marginal", "hybrid", "anchors"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [2, 17, 1025])
def test_sums_are_those_of_torch(kind: str, width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        prediction = prediction_of(kind, width, dtype)
        for sites in sites_of(prediction):
            assert isinstance(sites.rows, kernels.Computed)
            assert (native.mixture_sums(sites.rows) is None) == (dtype == torch.float64)  # read in torch
            mine, right = (kernels.read(sites.rows, entropy=False, backend=by) for by in ("native", "torch"))
            close(mine.log_sum_exp, right.log_sum_exp)
            close(mine.peak.double().amax(-1), right.peak.double().amax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_probability_of_the_own_token_is_that_of_torch(kind: str) -> None:
    prediction = prediction_of(kind, 17, torch.float32)
    sites = prediction[torch.ones(B, L, dtype=torch.bool)].conditional
    own = prediction.process.column(prediction.x).flatten()
    for at in (own, (own + 1) % prediction.process.columns):  # the kernel knows the first only
        mine, right = (kernels.read(sites.rows, at=at, entropy=False, backend=by) for by in ("native", "torch"))
        close(mine.log_prob, right.log_prob)


@pytest.mark.parametrize(("kind", "width"), [*((kind, 17) for kind in KINDS), ("hybrid", 1025), ("uniform", 1500)])
def test_draws_are_those_of_torch_for_any_number_of_threads_and_subset(kind: str, width: int) -> None:
    ids, positions = torch.arange(B).repeat_interleave(L) * 7, torch.arange(L).repeat(B)
    key, some = {"seed": 2**64 - 1, "step": 3, "tag": 9}, torch.arange(B * L) % 3 == 1
    threads, drawn = torch.get_num_threads(), []
    try:
        for sites in sites_of(prediction_of(kind, width, torch.bfloat16)):
            torch.set_num_threads(1)
            right = kernels.draw(sites.rows, rows=ids, positions=positions, backend="torch", **key)
            for used in (1, 2):
                torch.set_num_threads(used)
                mine = kernels.draw(sites.rows, rows=ids, positions=positions, **key)
                assert torch.equal(mine, right)
            part = kernels.draw(sites.rows.subset(some), rows=ids[some], positions=positions[some], **key)
            assert torch.equal(part, right[some])
            drawn.append(right)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(drawn[0], drawn[2])


def test_bad_rows_are_those_of_torch() -> None:
    prediction = prediction_of("uniform", 17, torch.float32, spread=False, bad=True)
    ids = torch.arange(B * L)
    for sites in sites_of(prediction):
        mine, right = (kernels.read(sites.rows, entropy=False, backend=by).log_sum_exp for by in ("native", "torch"))
        assert torch.equal(mine.isnan(), right.isnan())
        assert mine.isnan().sum() >= 3
        token = kernels.draw(sites.rows, seed=0, rows=ids, positions=ids)
        assert token[2 * L : 2 * L + 3].tolist() == [-1, -1, -1]
        with pytest.raises(ValueError, match="row 2, position 0"):
            sites.known()


@pytest.mark.parametrize("kind", ["uniform", "masked", "hybrid"])
def test_combined_rates_are_those_of_torch(kind: str) -> None:
    """Differences of the rates of two predictions, where some sites have none: their noise does not reach them."""
    late, early = (prediction_of(kind, 33, torch.float32, False, turn) for turn in (0, 1))
    early.alpha = early.alpha / 2
    where = torch.arange(B * L).view(B, L) % 2 == 0
    one, two = late[where].rates.dense().exp(), early[where].rates.dense().exp()
    own = late.process.column(late.x[where])
    a = torch.linspace(-2, 3, len(own), dtype=torch.float64)
    right = (a[:, None] * one + (1 - a)[:, None] * two).scatter(-1, own[:, None], 0.0).clamp(min=0).sum(-1)
    sides = late[where].mixed_rates(a), early[where].mixed_rates(1 - a)
    assert sides[0] is not None
    assert sides[1] is not None
    mixed = kernels.Mixed((sides[0], sides[1]), without=own)
    rows = kernels.Computed(lambda n: one[n], late.process.columns, torch.arange(len(own)), mixed=mixed)
    found = native.mixture_sums(rows, strict=False)
    assert found is not None
    torch.testing.assert_close(found[2], right, rtol=1e-12, atol=1e-300)
    assert (right == 0).any() or kind != "masked"


def test_total_variation_is_that_of_torch_and_has_its_gradient() -> None:
    one, two = (prediction_of("uniform", 33, torch.float32, turn=turn) for turn in (0, 1))
    everywhere = torch.ones(B, L, dtype=torch.bool)
    p, q = one[everywhere].loo, two[everywhere].loo
    right = compare(p, q, lambda log_p, log_q: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2)
    with torch.no_grad():
        mine = total_variation(p, q)
    assert right.max() > 0.5
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-15)
    logits = one.logits.detach().clone().requires_grad_()
    again = Prediction(logits, "loo", one.x, one.alpha, one.process)[everywhere].loo
    total = total_variation(again, q)
    assert torch.equal(total, mine)
    total.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [5, 1025])
def test_values_do_not_depend_on_gradients(width: int) -> None:
    prediction = prediction_of("hybrid", width, torch.float32, spread=False)
    logits = prediction.logits.detach().clone().requires_grad_()
    other = Prediction(logits, "loo", prediction.x, prediction.alpha, prediction.process)
    everywhere = torch.ones(B, L, dtype=torch.bool)
    plain, deep = (balanced(said[everywhere], "sqrt").known().log_sum_exp for said in (prediction, other))
    assert torch.equal(plain, deep)
    (slope,) = torch.autograd.grad(deep[:4].sum(), logits)
    assert slope.abs().sum() > 0


def test_a_kernel_with_other_noise_is_caught() -> None:
    sites = balanced(prediction_of("uniform", 5, torch.float32, False)[torch.ones(B, L, dtype=torch.bool)], "barker")
    right = kernels.read(sites.rows, entropy=False, backend="torch").log_sum_exp
    assert isinstance(sites.rows, kernels.Computed)
    assert sites.rows.mixed is not None
    sites.rows.mixed.of[0].level.mul_(1 + 1e-10)
    wrong = kernels.read(sites.rows, entropy=False).log_sum_exp
    with pytest.raises(AssertionError):
        close(wrong, right)
