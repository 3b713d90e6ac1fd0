"""APS against its definition, and what is exact of it: one site, no measurement, known tokens, splits."""

import math

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.guidance.aps import nearest

pytestmark = pytest.mark.usefixtures("as_user")  # enumerations and errors of users

CODES = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
MASKED, UNIFORM = dd.Masked(4, dd.Linear()), dd.Uniform(4, dd.Linear())
SLOPE = torch.tensor([0.7, -1.0], dtype=torch.float64)


def linear(e: Tensor) -> Tensor:
    """A log-likelihood that is linear in the embedding, with another slope at each site."""
    weights = torch.arange(1.0, 1 + e.shape[1], dtype=torch.float64)
    return -((e @ SLOPE) * weights).sum(-1)


def curved(e: Tensor) -> Tensor:
    return -((e.flatten(1).pow(2).sum(-1) - 1.0) ** 2) / 2 - (e[:, 0] * e[:, -1]).sum(-1)


def gentle(e: Tensor) -> Tensor:
    return curved(e) / 5


def network(
    process: dd.Process, predicts: dd.prediction.Predicts = "denoiser", length: int | None = None
) -> dd.Denoiser:
    """Logits from the neighbours and the place."""
    table = torch.randn(process.states, 4, generator=torch.Generator().manual_seed(1)).double()
    place = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return table[x.roll(1, 1)] + table[x.roll(-1, 1)] / 2 + place[: x.shape[1]]

    return dd.Denoiser(fn, process, predicts, length=length)


def by_hand(d: Tensor, x: Tensor, loss: object, inner: int, total: float, quantised: bool) -> Tensor:
    """p after the steps of exponentiated gradient, row by row and site by site; x (L,) holds -1 at unknown sites."""
    p = d.clone()
    for _ in range(inner):
        e = []
        for i, law in enumerate(p):
            mean = sum(law[v] * CODES[v] for v in range(4)) if x[i] < 0 else CODES[x[i]]
            distances = [float((mean - code).norm()) for code in CODES]
            e.append(CODES[distances.index(min(distances))] if quantised and x[i] < 0 else mean)
        point = torch.stack(e)[None].detach().requires_grad_()
        (slope,) = torch.autograd.grad(-loss(point).sum(), point)  # type: ignore[operator]
        for i in range(len(p)):
            if x[i] < 0:
                p[i] = p[i] * torch.exp(-(total / inner) * (CODES @ slope[0, i]))
                p[i] = p[i] / p[i].sum()
    return p


# --- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("inner", [1, 7, 100])
def test_one_site_with_a_linear_loss_is_bayes(inner: int, quantised: bool) -> None:
    p0 = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    world = T.Enumeration(p0, vocab_size=4, length=1)
    exact = p0 * torch.exp(linear(CODES[:, None]))
    exact = exact / exact.sum()
    guide = dd.APS(linear, CODES, inner=inner, quantised=quantised)
    for process in (MASKED, UNIFORM):
        law = T.law(dd.Sampler(process, world.denoiser(process).guided(guide), S.Ancestral(), steps=4))
        # on a uniform process the site is noisy, and its tilt is that of the clean value at every step
        assert float((law - exact).abs().max()) < (1e-15 if process is MASKED else 1e-14)
    half = T.law(
        dd.Sampler(MASKED, world.denoiser(MASKED).guided(dd.APS(linear, CODES, total=0.5)), S.Ancestral(), steps=4)
    )
    assert float((half - exact).abs().max()) > 0.01, "planted: half of the steps"
    bent = T.law(dd.Sampler(MASKED, world.denoiser(MASKED).guided(dd.APS(curved, CODES)), S.Ancestral(), steps=4))
    true = world.tilted(curved(CODES[:, None])).p0
    assert float((bent - true).abs().max()) > 0.01, "a loss that is not linear is not Bayes"


def test_a_certain_site_is_a_fixed_point_of_the_quantiser() -> None:
    codes = torch.randn(50, 3, generator=torch.Generator().manual_seed(3)).double()
    assert torch.equal(nearest(torch.eye(50, dtype=torch.float64) @ codes, codes), torch.arange(50))


def test_the_derivative_by_logits_through_the_quantiser() -> None:
    """d l / d logit_v = p_v <E_v - mean, grad l(Q(mean))>: autograd through mean + (Q(mean) - mean).detach()."""
    logits = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    mean = p @ CODES
    code = CODES[nearest(mean.detach().flatten(0, 1), CODES)].view_as(mean)
    straight = mean + (code - mean).detach()
    (found,) = torch.autograd.grad(curved(straight).sum(), logits)
    point = code.clone().requires_grad_()
    (slope,) = torch.autograd.grad(curved(point).sum(), point)
    by_formula = p * ((CODES - mean[..., None, :]) * slope[..., None, :]).sum(-1)
    found, by_formula = found.detach(), by_formula.detach()
    assert float((found - by_formula).abs().max()) < 1e-12 * float(found.abs().max())
    (soft,) = torch.autograd.grad(curved(logits.softmax(-1) @ CODES).sum(), logits)
    assert float((found - soft.detach()).abs().max()) > 0.1, "planted: without a quantiser"


@pytest.mark.parametrize(
    "change",
    [{"total": 0.0}, {"log_likelihood": lambda e: e.sum((1, 2)) * 0 - 3.0}, {"codebook": torch.ones(4, 2)}],
    ids=["no step", "a constant", "equal codes"],
)
def test_what_says_nothing_changes_nothing(change: dict[str, object]) -> None:
    given: dict[str, object] = {"log_likelihood": curved, "codebook": CODES, "inner": 3}
    x = torch.tensor([[4, 4, 1], [4, 2, 4]])
    plain = network(MASKED)(x, 0.5).denoiser
    found = network(MASKED).guided(dd.APS(**(given | change)))(x, 0.5).denoiser  # type: ignore[arg-type]
    torch.testing.assert_close(found, plain, atol=1e-14, rtol=0)
    told = network(MASKED).guided(dd.APS(**given))(x, 0.5).denoiser  # type: ignore[arg-type]
    assert float((told - plain)[plain > -torch.inf].abs().max()) > 0.1


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("inner", [1, 5])
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_a_step_is_the_one_of_the_definition(process: dd.Process, inner: int, quantised: bool) -> None:
    model = network(process, "loo")
    x = torch.tensor([[4, 4, 1], [4, 2, 4], [0, 3, 4], [4, 4, 4], [1, 2, 0]]) % process.states
    plain = model(x, 0.4)
    said = model.guided(dd.APS(gentle, CODES, inner, 0.8, quantised))(x, 0.4)
    d = plain.denoiser.exp()
    hidden = x == 4 if process.absorbing else torch.ones_like(x, dtype=torch.bool)
    known = torch.where(hidden, -1, x)
    for row in range(len(x)):
        p = by_hand(d[row], known[row], gentle, inner, 0.8, quantised)
        found = said.denoiser[row].exp()
        assert float((found - p).abs().max()) < 1e-13
    wrong = by_hand(d[0], known[0], gentle, inner, 0.8, not quantised)
    assert float((said.denoiser[0].exp() - wrong).abs().max()) > 1e-3, "planted: the other mean"


def test_a_measurement_brings_its_codes() -> None:
    noise = dd.GaussianNoise([0.3], 0.5)
    matrix = torch.tensor([[1.0, -1.0, 0.5, 0.2, 0.1, -0.4]], dtype=torch.float64)
    measurement = dd.Measurement(CODES, matrix, noise)
    x = torch.tensor([[4, 4, 1]])
    one = network(MASKED).guided(dd.APS(measurement))(x, 0.5).denoiser
    other = network(MASKED).guided(dd.APS(lambda e: noise(e.flatten(1) @ matrix.T), CODES))(x, 0.5).denoiser
    torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


def test_given_sites_are_known_on_every_process() -> None:
    """A prompt's code is the token's own, whatever the network says at its site."""
    seen: list[Tensor] = []

    def log_likelihood(e: Tensor) -> Tensor:
        seen.append(e[:, 0].detach())
        return curved(e)

    for process in (MASKED, UNIFORM):
        seen.clear()
        model = network(process, "loo").guided(dd.APS(log_likelihood, CODES, inner=2))
        tokens = dd.Sampler(process, model, S.Ancestral(), steps=3).sample(5, 3, seed=0, prompt=[2]).tokens
        assert bool((tokens[:, 0] == 2).all())
        assert seen and all(torch.equal(e, CODES[2].expand_as(e)) for e in seen)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_evaluations_are_counted() -> None:
    calls = [0]

    def log_likelihood(e: Tensor) -> Tensor:
        calls[0] += len(e)
        return curved(e)

    for quantised in (True, False):
        calls[0] = 0
        model = network(MASKED, length=3).guided(dd.APS(log_likelihood, CODES, 20, quantised=quantised))
        out = dd.Sampler(MASKED, model, S.Ancestral(), steps=4).sample(16, seed=0)
        assert out.rewards == calls[0] > 0
        predictions = int(out.nfe_rows.sum())
        assert predictions <= calls[0] < 20 * predictions if quantised else calls[0] == 20 * predictions


@pytest.mark.parametrize("operator", [S.Ancestral(), S.AnchoredRemask(), S.SplitLeap()], ids=repr)
def test_a_row_is_its_own(operator: dd.Operator) -> None:
    """With codes and laws that are symmetric, so that means lie between codes up to rounding."""
    opposite = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]], dtype=torch.float64)
    flat = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 4, dtype=torch.float64), MASKED, "denoiser", length=6)
    sampler = dd.Sampler(MASKED, flat.guided(dd.APS(curved, opposite, inner=10)), operator, steps=3)
    whole = sampler.sample(12, seed=3)
    for sizes in ([1] * 12, [3, 4, 5]):
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        parts = [sampler.sample(n, seed=3, first_row=row).tokens for row, n in zip(starts, sizes, strict=True)]
        assert torch.equal(torch.cat(parts), whole.tokens)
    assert not torch.equal(sampler.sample(12, seed=4).tokens, whole.tokens)


def test_a_tie_of_codes_goes_to_the_first_whatever_the_rounding() -> None:
    codes = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    e = torch.tensor([[0.0], [1e-16], [-1e-16], [-1e-9]], dtype=torch.float64)
    assert nearest(e, codes).tolist() == [0, 0, 0, 1]


def test_gradients_go_through_a_soft_mean() -> None:
    """The derivative of log-probabilities in the network's weights, that of the mean included, against differences."""
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[4, 4, 1]])
    for quantised in (False, True):

        def log_p(w: Tensor, quantised: bool = quantised) -> Tensor:
            model = dd.Denoiser(lambda x, t: w.expand(len(x), -1, -1), MASKED, "denoiser")
            return model.guided(dd.APS(curved, CODES, 3, quantised=quantised))(x, 0.5).denoiser[0, :2]

        assert torch.autograd.gradcheck(log_p, (weight,))


REFUSED = [
    (lambda: dd.APS(lambda x: x.sum(-1)), TypeError, "must be a Measurement, or a function of embedded"),
    (lambda: dd.APS(3, CODES), TypeError, "must be a Measurement, or a function of embedded"),  # type: ignore[arg-type]
    (lambda: dd.APS(curved, torch.zeros(2, 2, 2)), ValueError, r"codebook must be \(V, E\) numbers"),
    (lambda: dd.APS(curved, CODES, inner=0), ValueError, "inner must be at least 1"),
    (lambda: dd.APS(curved, CODES, total=-1.0), ValueError, r"total must lie in \[0, inf\)"),
    (lambda: dd.APS(curved, CODES, quantised=1), TypeError, "quantised must be True or False"),  # type: ignore[arg-type]
    (lambda: network(MASKED).guided(dd.APS(curved, CODES[:3])), ValueError, "must have 4 codes, one a token, got 3"),
    (lambda: dd.APS(dd.Measurement(CODES, curved, sum), CODES), ValueError, "has a codebook of its own"),
    (lambda: dd.Blockwise(MASKED, network(MASKED).guided(dd.APS(curved, CODES)), S.Ancestral(), block=2, steps=2),
     ValueError, r"APS.*needs the sites after a block"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_bad_arguments_are_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


LEVELS = dd.Measurement(CODES, lambda e: e[:, :, 0], dd.LevelNoise([1, 0, 1], [0.0]))
FAULTS = [
    (LEVELS, TypeError, "has no gradient there, as with exact levels"),
    (lambda e: e.detach().sum((1, 2)), TypeError, "must be differentiable in the embedded sequence"),
    (lambda e: e.sum(), ValueError, r"must give \(4,\) log-likelihoods, one a sequence, got \(\)"),
    (lambda e: e.sum((1, 2)) * math.nan, ValueError, "the log-likelihood of row 7 is nan"),
    (lambda e: (e - e.detach()).abs().sqrt().sum((1, 2)), ValueError, "the gradient at row 7 is not finite"),
]


@pytest.mark.parametrize(("log_likelihood", "error", "message"), FAULTS, ids=[case[2][:40] for case in FAULTS])
def test_bad_log_likelihoods_are_named(log_likelihood: object, error: type[Exception], message: str) -> None:
    codes = None if isinstance(log_likelihood, dd.Measurement) else CODES
    model = network(MASKED, length=3).guided(dd.APS(log_likelihood, codes))  # type: ignore[arg-type]
    with pytest.raises(error, match=f"APS: log_likelihood.*{message}"):
        dd.Sampler(MASKED, model, S.Ancestral(), steps=2).sample(4, seed=0, first_row=7)
