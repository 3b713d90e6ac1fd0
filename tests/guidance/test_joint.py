"""Joint laws of clean tokens: every operator draws from them or refuses them."""

import pytest
import torch
from guides import table
from joint_laws import Alike
from operators import STEPS, accepted
from problems import strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states

WORLD = strong()
MASKED, ABSORBING = dd.Masked(3, dd.Linear()), dd.AbsorbingUniform(3, dd.Linear())
TOGETHER = [S.Ancestral(), S.Unmask("random"), S.Unmask("max_prob"), S.P2(), S.ReMDM(0.3), S.ARPC("random")]
ALONE = [S.AnyOrder("margin")]
pytestmark = pytest.mark.usefixtures("as_user")


def name(operator: dd.Operator) -> str:
    return repr(operator).partition(" at 0x")[0]


def model(guide: dd.Guide | None = None) -> dd.Denoiser:
    plain = WORLD.denoiser(MASKED, predicts="loo")
    return plain if guide is None else plain.guided(guide)


def unequal(states: Tensor) -> Tensor:
    """Which states (N, L) hold two different tokens; masks, state 3, are none."""
    return states.masked_fill(states == 3, 9).amin(1) < states.masked_fill(states == 3, -1).amax(1)


@pytest.mark.parametrize("operator", TOGETHER, ids=name)
def test_sites_drawn_together_follow_the_joint_law(operator: dd.Operator) -> None:
    states = all_states(4, 3)
    start = int((states == 3).all(1).nonzero())
    law = T.kernel(operator, MASKED, model(Alike()), t=1.0, s=0.4)[start]
    several = (states != 3).sum(1) > 1
    assert float(law.sum()) == pytest.approx(1)
    assert float(law[several].sum()) > 0.1
    assert float(law[unequal(states)].sum()) == 0
    plain = T.kernel(operator, MASKED, model(), t=1.0, s=0.4)[start]
    assert float(plain[unequal(states)].sum()) > 0.1, "planted: a draw that ignores the joint law"


def test_the_kernel_of_a_joint_law_is_the_one_computed_by_hand() -> None:
    """From three masks: each is revealed with probability 0.6, and all that are hold one token of the first's O."""
    states = all_states(4, 3)
    start = int((states == 3).all(1).nonzero())
    law = T.kernel(S.Ancestral(), MASKED, model(Alike()), t=1.0, s=0.4)[start]
    rows = model()(torch.full((1, 3), 3), 1.0).loo[0].exp()
    hand = torch.zeros(64, dtype=torch.float64)
    for number, state in enumerate(states):
        shown = (state != 3).nonzero()[:, 0]
        count = 0.6 ** len(shown) * 0.4 ** (3 - len(shown))
        if not len(shown):
            hand[number] = count
        elif len(state[shown].unique()) == 1:
            hand[number] = count * rows[shown[0], state[shown[0]]]
    torch.testing.assert_close(law, hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("operator", ALONE, ids=name)
def test_a_site_that_is_drawn_alone_follows_its_own_law(operator: dd.Operator) -> None:
    found = T.kernel(operator, MASKED, model(Alike()), t=1.0, s=0.4)
    torch.testing.assert_close(found, T.kernel(operator, MASKED, model(), t=1.0, s=0.4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("operator", [one for one in STEPS if accepted(one, MASKED)], ids=name)
def test_every_operator_draws_a_joint_law_in_any_split_or_refuses_it(operator: dd.Operator) -> None:
    tilt = torch.stack([table(3, 1, seed, 2.0)[0] for seed in range(4)])
    start = torch.full((16, 3), 3)
    run = {"grid": [1.0, 0.5, 0.2]} if operator.moves else {"time": 0.5}
    sampler = dd.Sampler(MASKED, model(Alike(tilt)), operator, **run)  # type: ignore[arg-type]
    try:
        whole = sampler.sample(initial=start, seed=3).tokens
    except ValueError as error:
        assert "a guide gave a joint law of the clean tokens" in str(error)
        assert operator not in (*TOGETHER, *ALONE)
        return
    for size in (1, 3):
        parts = [
            sampler.sample(initial=start[row : row + size], seed=3, first_row=row).tokens for row in range(0, 16, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_operators_that_draw_site_by_site_refuse_a_joint_law() -> None:
    for operator in (S.Greedy(), S.MaximalCoupling(), S.Euler(), S.TauLeaping(), S.ThetaTrapezoidal(), S.DFM(1.0)):
        with pytest.raises(ValueError, match=r"joint law of the clean tokens.*Accepted are operators that draw by"):
            dd.Sampler(MASKED, model(Alike()), operator, grid=[1.0, 0.4]).sample(4, seed=0)
    absorbing = WORLD.denoiser(ABSORBING).guided(Alike())
    dd.Sampler(ABSORBING, absorbing, S.ReMDM(0.2), steps=3).sample(4, seed=0)
    with pytest.raises(ValueError, match="joint law of the clean tokens"):
        dd.Sampler(ABSORBING, absorbing, S.Ancestral(), grid=[1.0, 0.4]).sample(4, seed=0)


def test_bad_joint_laws_are_refused() -> None:
    x = torch.full((2, 3), 3)
    said = model()(x, 0.5)
    with pytest.raises(TypeError, match="joint: law is called as"):
        said.joint(3)  # type: ignore[arg-type]
    uniform = WORLD.denoiser(dd.Uniform(3, dd.Linear()))(torch.zeros(2, 3, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match="joint: takes a prediction of an absorbing process"):
        uniform.joint(lambda prediction, row, where, keep: prediction.tokens(where, keep))
    everywhere = torch.ones_like(x, dtype=torch.bool)
    for made in (None, dd.Coins(torch.zeros(2, 2).double())):
        with pytest.raises(ValueError, match=r"joint: law must return a Choice of shape \(2, 3\)"):
            said.joint(lambda prediction, row, where, keep, made=made: made).tokens(everywhere, x)  # type: ignore[misc]
    joint = said.joint(lambda prediction, row, where, keep: prediction.tokens(where, keep))
    torch.testing.assert_close(joint.untruncated.loo, said.loo)
    value = torch.tensor([[0, 1, 2], [2, 2, 1]])
    expected = said.tokens(everywhere, x).log_prob(value)
    torch.testing.assert_close(joint.tokens(everywhere, x).log_prob(value), expected)
