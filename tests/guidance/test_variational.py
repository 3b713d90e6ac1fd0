"""Mean-field posteriors against coordinate ascent on tables, exact denoisers of chains, and what is exact of them."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from guides import table
from problems import chain, dirichlet, product_of_marginals, strong
from scipy.optimize import minimize
from scipy.stats import chisquare, norm
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.guidance.mean_field import coordinate_ascent
from discdiff.theory.world import all_states

pytestmark = pytest.mark.usefixtures("as_user")  # enumerations and errors of users

MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
X = all_states(3, 3)
LOG_W = torch.as_tensor(np.random.default_rng(8).normal(size=27))
# AGREE: two sites that agree almost surely, so that each agreement is a local optimum
AGREE = T.Enumeration(torch.tensor([0.499, 0.001, 0.001, 0.499], dtype=torch.float64), vocab_size=2, length=2)


def weight(x: Tensor, log_w: Tensor = LOG_W) -> Tensor:
    return log_w[(x * torch.tensor([9, 3, 1])).sum(-1)]


def ascend(log_f: np.ndarray, q: np.ndarray, sweeps: int = 5000) -> np.ndarray:
    """q_i(v) <- exp(E_{q_-i} log f), by sums over all sequences; log f (V, ..., V), q (L, V)."""
    length, size = q.shape
    for _ in range(sweeps):
        for i in range(length):
            mean = np.zeros(size)
            for x in itertools.product(range(size), repeat=length):
                mean[x[i]] += log_f[x] * np.prod([q[j, x[j]] for j in range(length) if j != i])
            new = np.exp(mean - mean.max())
            before, q[i] = q[i].copy(), new / new.sum()
            if i == 0:
                moved = 0.0
            moved = max(moved, float(np.abs(q[i] - before).max()))
        if moved < 1e-14:
            break
    return q


def objective(log_f: np.ndarray, q: np.ndarray) -> float:
    """KL(q || f) of a product law."""
    law = q[0]
    for row in q[1:]:
        law = np.multiply.outer(law, row)
    some = law > 0
    return float((law[some] * (np.log(law[some]) - log_f[some])).sum())


# --- the fitted product law -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_it_is_coordinate_ascent_on_the_table(seed: int) -> None:
    """The denoiser alone is asked; the other side knows p0. From the default start, and from random ones."""
    world = dirichlet(0.7, seed)
    log_w = torch.as_tensor(np.random.default_rng(seed).normal(size=27))
    log_f = (world.p0.log() + log_w).view(3, 3, 3).numpy()
    model = world.denoiser(MASKED)
    marginals = np.stack([world.p0.view(3, 3, 3).sum([j for j in range(3) if j != i]).numpy() for i in range(3)])
    starts = [None, *(np.random.default_rng(100 + k).dirichlet(np.ones(3), size=3) for k in range(3))]
    log_z = float((world.p0.log() + log_w).logsumexp(0))
    for start in starts:
        given = None if start is None else torch.as_tensor(np.log(start))
        found = dd.variational_posterior(model, lambda x, w=log_w: weight(x, w), start=given, steps=5000)
        exact = ascend(log_f, (marginals if start is None else start).copy())
        assert float((found.log_q.exp() - torch.as_tensor(exact)).abs().max()) < 1e-6
        assert found.bound == pytest.approx(-objective(log_f, exact), abs=1e-10)
        q = found.log_prob(X).exp()
        assert log_z - found.bound == pytest.approx(T.kl(q, world.tilted(log_w).p0), abs=1e-12)
        assert (found.error, found.rewards) == (0.0, 27)
        assert found.change <= 1e-13
    wrong = dirichlet(0.7, seed + 50).denoiser(MASKED)
    other = dd.variational_posterior(wrong, lambda x: weight(x, log_w))
    assert float((other.log_q.exp() - torch.as_tensor(exact)).abs().max()) > 1e-2, "planted: another prior"


def test_no_product_law_nearby_is_better() -> None:
    """A general optimiser over logits, started at the answer and beside it, finds nothing below."""
    world = strong()
    log_f = (world.p0.log() + LOG_W).view(3, 3, 3).numpy()
    found = dd.variational_posterior(world.denoiser(MASKED), weight)

    def loss(logits: np.ndarray) -> float:
        rows = np.exp(logits.reshape(3, 3) - logits.reshape(3, 3).max(-1, keepdims=True))
        return objective(log_f, rows / rows.sum(-1, keepdims=True))

    start = found.log_q.numpy().flatten()
    best = min(minimize(loss, start + 0.05 * np.random.default_rng(k).normal(size=9), tol=1e-12).fun for k in range(3))
    assert -found.bound <= best + 1e-8
    assert loss(start + 0.05 * np.random.default_rng(0).normal(size=9)) > -found.bound + 1e-4


def test_local_optima_are_found_from_their_starts_and_the_bound_tells_them_apart() -> None:
    model, tilt = AGREE.denoiser(dd.Masked(2, dd.Linear())), torch.tensor([0.0, 0.3], dtype=torch.float64)

    def log_w(x: Tensor) -> Tensor:
        return tilt[x].sum(-1)

    found = []
    for side in (0.9, 0.1):
        start = torch.tensor([[side, 1 - side]] * 2, dtype=torch.float64).log()
        found.append(dd.variational_posterior(model, log_w, start=start, steps=1000))
    assert float(found[0].log_q[0, 0].exp()) > 0.8
    assert float(found[1].log_q[0, 0].exp()) < 0.2
    assert found[1].bound > found[0].bound + 0.1
    posterior = AGREE.tilted(log_w(all_states(2, 2))).p0
    for one in found:
        q = one.log_prob(all_states(2, 2)).exp()
        assert T.kl(q, posterior) < T.kl(posterior, q), "each leaves a mode out"


def test_a_product_prior_and_a_product_weight_give_the_posterior() -> None:
    prior = product_of_marginals(strong(), MASKED, 0.0).view(4, 4, 4)[:3, :3, :3].flatten()
    world, sites = T.Enumeration(prior, vocab_size=3, length=3), table(3, 3)
    found = dd.variational_posterior(world.denoiser(MASKED), lambda x: sites[torch.arange(3), x].sum(-1))
    exact = world.tilted(sites[torch.arange(3), X].sum(-1)).p0
    assert float((found.log_prob(X).exp() - exact).abs().max()) < 1e-14


def test_a_mask_among_the_tokens_gets_nothing() -> None:
    inside = dd.Masked(4, dd.Linear(), mask_id=1)
    tokens = inside.data_tokens
    column = torch.full((4,), -1)
    column[tokens] = torch.arange(3)
    found = dd.variational_posterior(strong().denoiser(inside), lambda x: weight(column[x]))
    plain = dd.variational_posterior(strong().denoiser(MASKED), weight)
    assert bool((found.log_q[:, 1] == -math.inf).all())
    assert float((found.log_q[:, tokens] - plain.log_q).abs().max()) < 1e-12
    assert bool((found.sample(200, seed=0) != 1).all())


def test_held_sites_condition_it() -> None:
    """With a site held, it is the answer of the conditional world."""
    world = strong()
    model = world.denoiser(MASKED).condition(torch.tensor([0, 2, 0]), torch.tensor([True, False, True]))
    found = dd.variational_posterior(
        model, lambda x: weight(torch.stack([x[:, 0], torch.full_like(x[:, 0], 2), x[:, 1]], 1))
    )
    log_f = (world.p0.log() + LOG_W).view(3, 3, 3)[:, 2].numpy()
    log_f = log_f - world.p0.view(3, 3, 3)[:, 2].sum().log().item()
    marginals = np.stack([np.exp(found.log_q[i].numpy()) for i in range(2)])
    assert float(np.abs(ascend(log_f, marginals.copy()) - marginals).max()) < 1e-9
    assert found.bound == pytest.approx(-objective(log_f, marginals), abs=1e-10)


# --- by draws ---------------------------------------------------------------------------------------------------------


def of_chain(world: T.MarkovChain, sites: Tensor, sweeps: int = 500) -> Tensor:
    """The mean-field posterior of a chain under a weight of single sites, by its transitions; and its bound's parts."""
    length, size = sites.shape
    log_a, q = world.transition.log(), torch.full((length, size), 1 / size, dtype=torch.float64)
    for _ in range(sweeps):
        for i in range(length):
            left = world.initial.log() if i == 0 else q[i - 1] @ log_a
            right = log_a @ q[i + 1] if i + 1 < length else torch.zeros(size, dtype=torch.float64)
            q[i] = (left + right + sites[i]).softmax(-1)
    return q


def bound_of_chain(world: T.MarkovChain, sites: Tensor, q: Tensor) -> float:
    log_a = world.transition.log()
    inside = sum(float(q[i] @ log_a @ q[i + 1]) for i in range(len(q) - 1))
    return float(q[0] @ world.initial.log()) + inside + float((q * (sites - q.log())).sum())


@pytest.fixture(scope="module")
def fitted() -> tuple[T.MarkovChain, Tensor, dd.guidance.MeanFieldPosterior, list[int]]:
    """A chain of 24 sites with a weight of single sites, fitted by draws; how many sequences the weight was given."""
    strong_chain, sites, seen = chain(3, 24), table(3, 24, 3), [0]
    world = T.MarkovChain(strong_chain.initial, strong_chain.transition / 2 + 1 / 6, length=24)

    def log_w(x: Tensor) -> Tensor:
        seen[0] += len(x)
        return sites[torch.arange(24), x].sum(-1)

    made = dd.variational_posterior(world.denoiser(MASKED), log_w, samples=16, steps=60, seed=2)
    return world, sites, made, seen


def test_draws_find_the_optimum_of_a_long_chain(fitted: tuple) -> None:  # type: ignore[type-arg]
    world, sites, made, _ = fitted
    exact = of_chain(world, sites)
    assert float((made.log_q.exp() - exact).abs().max()) < 0.05
    assert float((made.log_q.exp() - exact).abs().mean()) < 0.005
    without = of_chain(world, 0 * sites)
    assert float((made.log_q.exp() - without).abs().max()) > 0.3, "planted: without the weight"
    assert bound_of_chain(world, sites, made.log_q.exp()) > bound_of_chain(world, sites, exact) - 0.05


def test_the_bound_by_draws_has_its_error(fitted: tuple, failure_rate: float) -> None:  # type: ignore[type-arg]
    world, sites, made, _ = fitted
    exact = bound_of_chain(world, sites, made.log_q.exp())
    assert 2 * norm.sf(abs(made.bound - exact) / made.error) > failure_rate
    assert made.error < 1
    assert 2 * norm.sf(abs(made.bound + 6 - exact) / made.error) < failure_rate, "planted: six nats off"


def test_calls_by_draws_are_counted(fitted: tuple) -> None:  # type: ignore[type-arg]
    _, _, made, seen = fitted
    assert made.rewards == seen[0] == 60 * 16 * 24 * 3 + 16 * 24
    assert made.sequences == 1 + 60 * 16 * 24 + 16 * 24


def test_draws_are_keyed_by_the_seed() -> None:
    model = strong().denoiser(MASKED)
    runs = [dd.variational_posterior(model, weight, samples=4, steps=5, seed=seed) for seed in (0, 0, 1)]
    torch.manual_seed(5)
    again = dd.variational_posterior(model, weight, samples=4, steps=5, seed=0)
    assert torch.equal(runs[0].log_q, runs[1].log_q) and torch.equal(runs[0].log_q, again.log_q)
    assert runs[0].bound == again.bound
    assert not torch.equal(runs[0].log_q, runs[2].log_q)


# --- what it gives ----------------------------------------------------------------------------------------------------


def test_its_draws_follow_q_and_rows_are_their_own(failure_rate: float) -> None:
    made = dd.variational_posterior(strong().denoiser(MASKED), weight)
    x, law = made.sample(20_000, seed=3), made.log_prob(X).exp()
    seen = torch.bincount((x * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    some = law > 1e-4
    assert chisquare(seen[some], law[some] / law[some].sum() * seen[some].sum()).pvalue > failure_rate
    flat = torch.full((27,), 1 / 27, dtype=torch.float64)[some]
    assert chisquare(seen[some], flat / flat.sum() * seen[some].sum()).pvalue < failure_rate, "planted"
    assert torch.equal(torch.cat([made.sample(7, 3), made.sample(5, 3, first_row=7)]), x[:12])
    assert repr(made).startswith("MeanFieldPosterior((3, 3) tokens, bound=")


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_its_denoiser_samples_q_in_any_number_of_steps(process: dd.Process) -> None:
    made = dd.variational_posterior(strong().denoiser(MASKED), weight)
    for steps in (1, 3):
        law = T.law(dd.Sampler(process, made.denoiser(process), S.Ancestral(), steps=steps))
        assert float((law - made.log_prob(X).exp()).abs().max()) < 1e-13


# --- the guide --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_the_guide_is_coordinate_ascent_on_the_product_of_d(process: dd.Process) -> None:
    model = strong().denoiser(process, predicts="loo")
    x = torch.tensor([[3, 3, 3], [3, 1, 3], [0, 3, 2], [2, 1, 0]]) % process.states
    d = model(x, 0.5).denoiser.exp()
    said = model.guided(dd.MeanField(weight, sweeps=5000))(x, 0.5).denoiser.exp()
    one = model.guided(dd.MeanField(weight, sweeps=1))(x, 0.5).denoiser.exp()
    for row in range(len(x)):
        log_f = LOG_W.view(3, 3, 3).numpy().copy()
        for i in range(3):
            shape = [1, 1, 1]
            shape[i] = 3
            log_f = log_f + np.log(np.maximum(d[row, i].numpy(), 1e-290)).reshape(shape)
        exact = ascend(log_f, d[row].numpy().copy())
        assert float((said[row] - torch.as_tensor(exact)).abs().max()) < 1e-9
    assert float((one - said).abs().max()) > 1e-3, "planted: one sweep"


def test_the_guide_is_exact_where_all_is_a_product() -> None:
    prior = product_of_marginals(strong(), MASKED, 0.0).view(4, 4, 4)[:3, :3, :3].flatten()
    world, sites = T.Enumeration(prior, vocab_size=3, length=3), table(3, 3)
    log_w = sites[torch.arange(3), X].sum(-1)
    for process in (MASKED, UNIFORM):
        model = world.denoiser(process).guided(dd.MeanField(lambda x: sites[torch.arange(3), x].sum(-1)))
        law = T.law(dd.Sampler(process, model, S.Ancestral(), steps=4))
        own = T.law(dd.Sampler(process, world.tilted(log_w).denoiser(process), S.Ancestral(), steps=4))
        assert float((law - own).abs().max()) < 1e-13


def test_the_guide_by_draws_tends_to_the_listed_one() -> None:
    model = strong().denoiser(MASKED)
    said: dict[int | None, Tensor] = {}

    def kept(samples: int | None) -> Callable[[dd.Prediction], dd.Prediction]:
        def keep(prediction: dd.Prediction) -> dd.Prediction:
            said[samples] = prediction.denoiser.exp()
            return prediction

        return keep

    for samples, sweeps in ((None, 500), (2, 4), (2000, 32)):
        guided = model.guided(dd.MeanField(weight, sweeps, samples)).guided(kept(samples))
        dd.Sampler(MASKED, guided, S.Ancestral(), steps=1).sample(4, seed=0)
    assert float((said[2000] - said[None]).abs().max()) < 0.01 < float((said[2] - said[None]).abs().max())


def test_the_guide_by_draws_is_enumerable_and_rows_are_their_own(failure_rate: float) -> None:
    process, log_w = dd.Masked(2, dd.Linear()), torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    guide = dd.MeanField(lambda x: log_w[2 * x[:, 0] + x[:, 1]], sweeps=2, samples=1)
    sampler = dd.Sampler(process, AGREE.denoiser(process).guided(guide), S.Ancestral(), steps=2)
    law, out = T.law(sampler), sampler.sample(8000, seed=1)
    seen = torch.bincount(2 * out.tokens[:, 0] + out.tokens[:, 1], minlength=4)
    assert chisquare(seen, law * 8000).pvalue > failure_rate
    assert chisquare(
        seen, T.law(dd.Sampler(process, AGREE.denoiser(process), S.Ancestral(), steps=2)) * 8000
    ).pvalue < (failure_rate), "planted: no guide"
    parts = [sampler.sample(n, seed=1, first_row=row).tokens for row, n in ((0, 5), (5, 1), (6, 10))]
    assert torch.equal(torch.cat(parts), out.tokens[:16])


def test_rewards_of_the_guide_are_counted() -> None:
    model = strong().denoiser(MASKED)
    listed = dd.Sampler(MASKED, model.guided(dd.MeanField(weight)), S.Ancestral(), steps=4).sample(8, seed=0)
    assert listed.rewards == 27 * listed.nfe
    drawn = dd.Sampler(MASKED, model.guided(dd.MeanField(weight, 3, 5)), S.Ancestral(), steps=1).sample(8, seed=0)
    assert drawn.rewards == 3 * 5 * 8 * 3 * 3


def test_sweeps_of_coordinate_ascent_never_raise_the_divergence() -> None:
    log_f = (strong().p0.log() + LOG_W).view(3, 3, 3)
    zero = torch.zeros(1, 3, 3, dtype=torch.float64)
    values = [
        objective(
            log_f.numpy(), coordinate_ascent("", zero, zero, log_f.flatten().expand(3, -1), X, n).log_q[0].exp().numpy()
        )
        for n in range(1, 8)
    ]
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(values))
    assert values[0] - values[-1] > 1e-4


# --- errors -----------------------------------------------------------------------------------------------------------


def never(x: Tensor) -> Tensor:
    return torch.where(x[:, 0] == x[:, 1], 0.0, -torch.inf).double()


MODEL = strong().denoiser(MASKED)
ANY = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), MASKED, "denoiser")
REFUSED = [
    (lambda: dd.variational_posterior(strong().denoiser(UNIFORM), weight), ValueError, "a Masked process, got Uniform"),
    (lambda: dd.variational_posterior(weight, weight), TypeError, "model must be a Denoiser"),  # type: ignore[arg-type]
    (lambda: dd.variational_posterior(MODEL, 3), TypeError, "a Measurement or a function of tokens"),  # type: ignore[arg-type]
    (lambda: dd.variational_posterior(MODEL, lambda x: x), ValueError, r"must give \(27,\) log-likelihoods"),
    (lambda: dd.variational_posterior(MODEL, lambda x: weight(x) * math.nan), ValueError, "of sequence 0 is nan"),
    (lambda: dd.variational_posterior(MODEL, weight, length=4), ValueError, "the model's is 3, got 4"),
    (lambda: dd.variational_posterior(ANY, weight), ValueError, "length= must say how many sites"),
    (lambda: dd.variational_posterior(ANY, weight, length=20), ValueError, r"3\*\*20 sequences .* samples=M"),
    (lambda: dd.variational_posterior(MODEL, weight, start=torch.zeros(3, 3)), ValueError, r"start must hold \(3, 3\)"),
    (lambda: dd.variational_posterior(MODEL, weight, samples=0), ValueError, "samples must be at least 1"),
    (lambda: dd.variational_posterior(MODEL, weight, steps=0), ValueError, "steps must be at least 1"),
    (lambda: dd.variational_posterior(MODEL, never), ValueError, "-inf for every token of a site"),
    (lambda: dd.variational_posterior(MODEL.guided(dd.Reward(weight)), weight), TypeError, "draws, so it takes a run"),
    (lambda: dd.MeanField(3), TypeError, "a Measurement or a function of tokens"),  # type: ignore[arg-type]
    (lambda: dd.MeanField(weight, 0), ValueError, "sweeps must be at least 1"),
    (lambda: dd.MeanField(weight, 33, 2), ValueError, r"sweeps must lie in 1\.\.32"),
    (lambda: dd.Sampler(MASKED, MODEL.guided(dd.MeanField(never)), S.Ancestral(), steps=2).sample(2, seed=0),
     ValueError, "MeanField: the log-likelihood, or that of the prior, is -inf for every token"),
    (lambda: dd.Sampler(MASKED, ANY.guided(dd.MeanField(weight)), S.Ancestral(), steps=2).sample(2, 20, seed=0),
     ValueError, "too many to list"),
    (lambda: dd.Blockwise(MASKED, ANY.guided(dd.MeanField(weight)), S.Ancestral(), block=2, steps=2),
     ValueError, "needs the sites after a block"),
    (lambda: dd.variational_posterior(MODEL, weight).log_prob(X[:, :2]), ValueError, r"x must be \(B, 3\)"),
    (lambda: dd.variational_posterior(MODEL, weight).sample(0, 0), ValueError, "batch must be at least 1"),
    (lambda: dd.variational_posterior(MODEL, weight).denoiser(dd.Masked(4, dd.Linear())), ValueError, "q has 3 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_bad_arguments_are_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
