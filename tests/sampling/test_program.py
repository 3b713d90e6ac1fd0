"""A sampler as a Pyro model: trace, replay, condition, enumeration, posteriors, importance weights, SVI."""

from collections.abc import Callable

import pyro
import pytest
import torch
from problems import weak
from pyro import poutine
from pyro.infer import SVI, Importance, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.optim import Adam
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

WORLD = T.Enumeration(torch.tensor([0.4, 0.1, 0.05, 0.45], dtype=torch.float64), vocab_size=2, length=2)
MASKED, UNIFORM = dd.Masked(2, dd.Linear()), dd.Uniform(2, dd.Linear())


def sampler(process: dd.Process, operator: dd.Operator, steps: int) -> dd.Sampler:
    return dd.Sampler(process, WORLD.denoiser(process, predicts="loo"), operator, steps=steps)


SMALL = {
    "masked": sampler(MASKED, S.Ancestral(), 2),
    "uniform": sampler(UNIFORM, S.Ancestral(), 1),
    "mix": sampler(MASKED, dd.mix({S.Ancestral(): 0.3, S.Greedy(): 0.7}), 1),
    "a ranking": sampler(MASKED, S.Unmask(noise=0.5), 1),
}


def total(trace: poutine.Trace) -> Tensor:
    """The joint log-probability of every combination of values and row."""
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


def law(trace: poutine.Trace, row: int) -> Tensor:
    """The law of the tokens of a row, from an enumerated trace."""
    joint = total(trace)
    tokens = trace.nodes["_RETURN"]["value"]
    joint, index = torch.broadcast_tensors(joint, tokens[..., 0] * 2 + tokens[..., 1])
    single = joint.shape[-1] == 1 or "rows" not in trace.nodes
    joint, index = (joint, index) if single else (joint[..., row], index[..., row])
    return torch.zeros(4, dtype=torch.float64).index_add(0, index.flatten(), joint.exp().flatten().double())


def test_a_program_is_its_sampler() -> None:
    uniform = dd.Uniform(3, dd.Linear())
    maker = dd.Sampler(uniform, weak().denoiser(uniform), S.Ancestral(), steps=3)
    program = dd.program(maker)
    assert torch.equal(program(4, seed=3), maker.sample(4, seed=3).tokens)
    assert torch.equal(program(4, seed=3, prompt=[1]), maker.sample(4, seed=3, prompt=[1]).tokens)
    assert torch.equal(program(2, seed=3, first_row=2), maker.sample(4, seed=3).tokens[2:])
    assert not torch.equal(program(64), program(64)), "a fresh seed each call"
    pyro.set_rng_seed(7)
    first = program(64)
    pyro.set_rng_seed(7)
    assert torch.equal(program(64), first)
    trace = poutine.trace(program).get_trace(4)
    assert torch.equal(poutine.replay(program, trace=trace)(4), trace.nodes["_RETURN"]["value"])
    recorded = maker.sample(4, seed=3, record=True).log_prob
    torch.testing.assert_close(total(poutine.trace(program).get_trace(4, seed=3)), recorded)


@pytest.mark.usefixtures("as_user")
def test_what_is_no_sampler_is_refused() -> None:
    with pytest.raises(TypeError, match="program: takes a Sampler"):
        dd.program(S.Ancestral())


@pytest.mark.parametrize(
    ("name", "dim"), [("masked", -1), ("uniform", -1), ("uniform", -3), ("mix", -2), ("a ranking", -1)]
)
def test_parallel_enumeration_is_exact(name: str, dim: int) -> None:
    program = dd.program(SMALL[name])
    trace = poutine.trace(poutine.enum(config_enumerate(program), first_available_dim=dim)).get_trace()
    torch.testing.assert_close(law(trace, 0), T.law(SMALL[name]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "mix"])
def test_rows_are_enumerated_beside_each_other(name: str) -> None:
    """Three rows in a plate, with starts of their own; rows of the mix that took another branch are left out."""
    maker = SMALL[name]
    model = poutine.enum(config_enumerate(dd.program(maker)), first_available_dim=-2)
    starts = [[0, 1], [1, 1], [1, 0]] if name == "uniform" else [[2, 2], [2, 2], [2, 2]]
    trace = poutine.trace(model).get_trace(3, initial=torch.tensor(starts))
    for row, start in enumerate(starts):
        states = maker.process.states
        initial = torch.zeros(states**2, dtype=torch.float64)
        initial[start[0] * states + start[1]] = 1
        torch.testing.assert_close(law(trace, row), T.law(maker, initial), atol=1e-12, rtol=0)


def conditioned(name: str, site: str, value: Tensor) -> Callable[..., Tensor]:
    return pyro.condition(dd.program(SMALL[name]), data={site: value})


def test_conditioning_counts() -> None:
    """Of one masked step, the tokens' log-probability is what the denoiser says, in every row."""
    data = torch.tensor([[0, 1], [1, 1], [0, 0]])
    maker = sampler(MASKED, S.Ancestral(), 1)
    trace = poutine.trace(pyro.condition(dd.program(maker), data={"1.0.token": data})).get_trace(3)
    assert torch.equal(trace.nodes["_RETURN"]["value"], data)
    marginal = torch.tensor([[0.5, 0.45], [0.5, 0.55]], dtype=torch.float64)  # row: token; column: site
    torch.testing.assert_close(total(trace), marginal[data, torch.arange(2)].log().sum(1))
    with pytest.raises(ValueError, match=r"site 1.0.token: takes a value of shape \(3, 2\), rows and event"):
        pyro.condition(dd.program(maker), data={"1.0.token": data[:2]})(3)
    with pytest.raises(ValueError, match=r"site 1.0.token: takes a value of shape \(1, 2\), rows and event"):
        pyro.condition(dd.program(maker), data={"1.0.token": data})(1)


def test_evidence_by_enumeration() -> None:
    """-ELBO of an enumerated model without a guide is -log of the evidence."""
    evidence = TraceEnum_ELBO(max_plate_nesting=0)
    for token, p in [(1, 0.3 * 0.5 * 0.55), (0, 0.3 * 0.5 * 0.45 + 0.7)]:  # 0 stands for the branch without a draw
        observed = conditioned("mix", "1.1.token", torch.tensor([[token, token]]))
        loss = evidence.loss(config_enumerate(observed), lambda: None)
        assert loss == pytest.approx(-torch.tensor(p).log().item(), abs=1e-6)


def test_a_guide_is_enumerated_one_value_after_another() -> None:
    """The divergence of two programs' joint laws, by sequential enumeration and by parallel."""
    blind = T.Enumeration(torch.full((4,), 0.25, dtype=torch.float64), vocab_size=2, length=2)
    p = dd.program(SMALL["uniform"])
    q = dd.program(dd.Sampler(UNIFORM, blind.denoiser(UNIFORM), S.Ancestral(), steps=1))
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(p, config_enumerate(q, "sequential"))
    log_p, log_q = (
        total(poutine.trace(poutine.enum(config_enumerate(model), first_available_dim=-2)).get_trace())
        for model in (p, q)
    )
    expected = (log_q.exp() * (log_q - log_p).masked_fill(log_q == -torch.inf, 0.0)).sum()
    assert loss == pytest.approx(float(expected), abs=1e-9)
    assert loss > 1e-3


def test_posteriors_are_sampled(failure_rate: float) -> None:
    """``infer_discrete`` draws the branch that each of 400 rows took given its tokens, and finds the likelier one."""
    program = dd.program(SMALL["mix"], coded=True)
    token = program.code(torch.tensor([0, 0]))  # as of rows without a draw
    assert int(token) == 1 * 4 + 1
    model = config_enumerate(pyro.condition(program, data={"1.1.token": token}))
    drawn = poutine.trace(infer_discrete(model, first_available_dim=-2)).get_trace(400, seed=1)
    count = torch.bincount(drawn.nodes["1.0.branch"]["value"], minlength=2).numpy()
    joint = torch.tensor([0.3 * 0.5 * 0.45, 0.7], dtype=torch.float64)
    assert chisquare(count, (400 * joint / joint.sum()).numpy()).pvalue > failure_rate
    assert chisquare(count, [120, 280]).pvalue < failure_rate, "400 draws tell the posterior from the prior"
    likeliest = poutine.trace(infer_discrete(model, first_available_dim=-1, temperature=0)).get_trace(1)
    assert int(likeliest.nodes["1.0.branch"]["value"]) == 1
    with pytest.raises(ValueError, match="too many to be coded"):
        dd.program(sampler(MASKED, S.Ancestral(), 1), coded=True).code(torch.zeros(1, 50, dtype=torch.int64))


def test_importance_weights_correct_another_program(failure_rate: float) -> None:
    """Rows of a program that believes in independent tokens, weighted, follow the law of the one that does not."""
    blind = T.Enumeration(torch.full((4,), 0.25, dtype=torch.float64), vocab_size=2, length=2)
    target = sampler(MASKED, S.Ancestral(), 4)
    other = dd.Sampler(MASKED, blind.denoiser(MASKED), S.Ancestral(), steps=4)
    proposed = poutine.trace(dd.program(other)).get_trace(4000, seed=0)
    weighted = poutine.trace(poutine.replay(dd.program(target), trace=proposed)).get_trace(4000)
    weight = (total(weighted) - total(proposed)).exp()
    tokens = proposed.nodes["_RETURN"]["value"]
    same, exact = (tokens[:, 0] == tokens[:, 1]).double(), float(T.law(target)[[0, 3]].sum())

    def improbable(estimate: Tensor) -> float:
        error = (estimate.mean() - exact) / (estimate.std() / len(estimate) ** 0.5)
        return float(torch.erfc(error.abs() / 2**0.5))

    assert improbable(weight * same) > failure_rate
    assert improbable(same) < failure_rate
    posterior = Importance(dd.program(target), dd.program(other), num_samples=5).run(8)
    assert len(posterior.log_weights) == 5
    assert bool(torch.stack(posterior.log_weights).isfinite().all())


def test_svi_learns_a_denoiser() -> None:
    """Maximum likelihood of conditioned tokens: the logits become the frequencies."""
    pyro.clear_param_store()
    data = torch.tensor([[0, 1]] * 3 + [[1, 1]])

    def model() -> Tensor:
        logits = pyro.param("logits", torch.zeros(2, 2, dtype=torch.float64))
        denoiser = dd.Denoiser(lambda x, t: logits.expand(len(x), 2, 2), MASKED, "denoiser", time=None)
        return dd.program(dd.Sampler(MASKED, denoiser, S.Ancestral(), steps=1))(4, 2)

    observed = config_enumerate(pyro.condition(model, data={"1.0.token": data}))
    svi = SVI(observed, lambda: None, Adam({"lr": 0.4}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = [svi.step() for _ in range(25)]
    assert losses[-1] < losses[0] - 1
    learned = pyro.param("logits").softmax(-1)
    torch.testing.assert_close(learned[0], torch.tensor([0.75, 0.25]).double(), atol=0.05, rtol=0)
    assert float(learned[1, 1].detach()) > 0.95
