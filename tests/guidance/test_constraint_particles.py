"""A constraint inside particles: the estimate is the model's law, restricted to what is accepted, exactly."""

import pytest
import torch
from operators import STEPS, accepted
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states, state_index

V, L = 3, 2
PROCESS = dd.Masked(V, dd.Linear())
# an even number of tokens 1, and no 2 right after a 0; the last state is dead
MOVES = torch.tensor([[1, 2, 0], [1, 2, 4], [3, 0, 2], [3, 0, 4], [4, 4, 4]])
ACCEPT = torch.tensor([True, True, False, False, False])
CONSTRAINT = dd.Constraint(MOVES, 0, ACCEPT)
X = all_states(V, L)
OK = CONSTRAINT.accepts(X)
GRID = (1.0, 0.5, 0.0)
TABLE = 1.5 * torch.randn(4**L, L, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
pytestmark = pytest.mark.usefixtures("as_user")


def network() -> dd.Denoiser:
    """A network whose predictions belong to no law of data."""
    return dd.Denoiser(lambda x, t: TABLE[state_index(x, 4)], PROCESS, "denoiser", length=L, time_dtype=torch.float64)


def oracle() -> dd.Denoiser:
    law = torch.tensor([0.22, 0.03, 0.1, 0.05, 0.2, 0.02, 0.08, 0.1, 0.2]).double()
    return T.Enumeration(law, vocab_size=V, length=L).denoiser(PROCESS, predicts="loo")


def potential(x: Tensor, t: float) -> Tensor:
    return CONSTRAINT.accepts(x).double().log() if t == 0 else torch.zeros(len(x)).double()


@pytest.mark.parametrize("model", [network, oracle])
@pytest.mark.parametrize("operator", [S.Ancestral(), S.Unmask(), S.Unmask("left_to_right"), S.AnyOrder()], ids=str)
def test_the_estimate_is_the_restricted_law(model: object, operator: dd.Operator) -> None:
    one: dd.Denoiser = model()  # type: ignore[operator]
    steered = dd.Particles(dd.Sampler(PROCESS, one.guided(CONSTRAINT), operator, grid=GRID), None, 2, ess=0.8)
    goal = T.law(steered.reference) * OK
    assert float((T.evidence(steered) - goal).abs().max()) < 1e-12
    alone = T.law(steered.sampler)
    assert float(alone[~OK].sum()) == 0
    assert float((alone - goal / goal.sum()).abs().sum()) / 2 > 0.02  # planted: without weights the law is another one


def test_a_soft_guide_beside_the_constraint_is_weighed_too() -> None:
    log_g = torch.tensor([[0.4, -0.5, 0.1], [-0.2, 0.3, 0.6]]).double()
    soft = network().guided(lambda said: said.tilted(lambda row, site: log_g[site])).guided(CONSTRAINT)
    steered = dd.Particles(dd.Sampler(PROCESS, soft, S.Ancestral(), grid=GRID), None, 2, ess=0.8)
    assert float((T.evidence(steered) - T.law(steered.reference) * OK).abs().max()) < 1e-12
    cut = network().guided(dd.Truncation(top_k=1)).guided(CONSTRAINT)
    with pytest.raises(ValueError, match="the reference allows a value that the proposal rules out"):
        T.evidence(dd.Particles(dd.Sampler(PROCESS, cut, S.Ancestral(), grid=GRID), None, 2))


def variation(model: dd.Denoiser, potential: object) -> tuple[float, float]:
    """The coefficient of variation of the drawn evidence, and its mean."""
    steered = dd.Particles(dd.Sampler(PROCESS, model, S.Ancestral(), grid=GRID), potential, 2, ess=0.8)  # type: ignore[arg-type]
    steered._inner.alive = False  # a group without a particle counts as 0
    found = steered.sample(2 * 40_000, L, seed=1).evidence
    return float(found.std() / found.mean()), float(found.mean())


def test_a_constrained_proposal_has_less_variance() -> None:
    plain, z = variation(network(), potential)
    hard, same = variation(network().guided(CONSTRAINT), None)
    assert hard == pytest.approx(0.36, rel=0.05)  # steering.md
    assert plain == pytest.approx(0.90, rel=0.05)
    assert z == pytest.approx(same, rel=0.03)


def test_operators_that_mask_again_are_refused() -> None:
    """The reference could pass a rejected sequence and leave it again."""
    for operator in (S.SplitLeap(), S.ReMDM(0.5), S.Ancestral() >> S.Gibbs(), S.Ancestral() >> S.Remask(sigma=0.3)):
        steered = dd.Particles(
            dd.Sampler(PROCESS, oracle().guided(CONSTRAINT), operator, grid=(1, 0.5, 0.2, 0)), None, 2
        )
        with pytest.raises(ValueError, match=r"changes tokens that it has revealed|rules out"):
            steered.sample(2 * 500, seed=0)


def test_every_operator_keeps_the_constraint_or_refuses_it() -> None:
    """Those that draw tokens together have no mass on rejected sequences; tests/guidance/test_constraint has draws."""
    kept, refused = [], []
    for operator in STEPS:
        if not accepted(operator, PROCESS) or not operator.enumerable:
            continue
        try:
            law = T.law(dd.Sampler(PROCESS, oracle().guided(CONSTRAINT), operator, grid=GRID))
        except ValueError as error:
            refused.append(type(operator).__name__)
            assert "joint law" in str(error) or "paths" in str(error), (operator, error)
            continue
        assert float(law[~OK].sum()) == 0, operator
        kept.append(type(operator).__name__)
    assert {"Ancestral", "Unmask", "SplitLeap", "ReMDM", "P2"} <= set(kept)
    assert {"TauLeaping", "ThetaTrapezoidal", "Multistep"} <= set(refused)
