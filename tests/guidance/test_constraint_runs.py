"""Runs under hard constraints: log-probabilities, dead ends, given tokens, other processes, blocks."""

import pytest
import torch
from constrained import (
    ABSORBING,
    ALIKE,
    MASKED,
    PARITY,
    RIGHT,
    SAME,
    WORLD,
    L,
    V,
    X,
    by_hand,
    network,
    product,
    takes,
)
from operators import STEPS, accepted
from problems import named
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.guidance import marginals
from discdiff.operator import GuideAt
from discdiff.theory.world import all_states, state_index

pytestmark = pytest.mark.usefixtures("as_user")  # many small enumerations


# --- runs ------------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A network whose logits are its weights."""

    def __init__(self) -> None:
        super().__init__()
        logits = torch.randn(4**L, L, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits[state_index(x, 4)]


@pytest.mark.parametrize(
    "operator", [S.Ancestral(), S.SplitLeap(), S.ReMDM(0.4), S.Ancestral() >> S.Gibbs()], ids=named
)
def test_the_log_probability_of_a_run_is_made_again_with_gradients(operator: dd.Operator) -> None:
    net = Table()
    model = dd.Denoiser(net, MASKED, "loo", length=L, time_dtype=torch.float64).guided(PARITY)
    sampler = dd.Sampler(MASKED, model, operator, steps=2)
    out = sampler.sample(6, L, seed=5, record="choices")
    again = sampler.log_prob(out)
    assert out.log_prob is not None
    torch.testing.assert_close(again, out.log_prob, atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(again.sum(), net.logits)
    for index in grad.abs().flatten().topk(3).indices.tolist():
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                net.logits.view(-1)[index] += step
                values.append(float(sampler.log_prob(out).sum()))
                net.logits.view(-1)[index] -= step
        assert float(grad.flatten()[index]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)
    other = sampler.log_prob(out, model=dd.Denoiser(net, MASKED, "loo", length=L, time_dtype=torch.float64))
    assert bool((other < again).all()), "planted: without the constraint each draw is less likely"


def test_recorded_log_probabilities_are_those_of_the_law() -> None:
    """In one step from all masks the tokens are the only choice."""
    sampler = dd.Sampler(MASKED, network().guided(PARITY), S.Ancestral(), steps=1)
    out, law = sampler.sample(50, L, seed=0, record=True), T.law(sampler)
    assert out.log_prob is not None
    torch.testing.assert_close(out.log_prob.exp(), law[state_index(out.tokens, V)], atol=1e-12, rtol=0)
    heard = sampler.sample(50, L, seed=0, listen=True)
    assert torch.equal(heard.tokens, out.tokens)


def never(token: int) -> dd.Denoiser:
    """A network that gives a token no probability."""
    logits = torch.zeros(V, dtype=torch.float64)
    logits[token] = -torch.inf
    return dd.Denoiser(lambda x, t: logits.expand(*x.shape, V), MASKED, "denoiser", length=L, time_dtype=torch.float64)


def test_a_dead_end_names_the_row() -> None:
    ones = dd.Constraint(torch.tensor([[1, 0, 1], [1, 1, 1]]), 0, torch.tensor([True, False]))  # ones alone
    sampler = dd.Sampler(MASKED, never(1).guided(ones), S.Ancestral(), grid=[1.0, 0.0])
    with pytest.raises(ValueError, match="row 7: no sequence that the constraint accepts has positive probability"):
        sampler.sample(2, L, seed=0, first_row=7)
    with pytest.raises(ValueError, match="law: with probability 1 the run ends in an error"):
        T.law(sampler)
    for select in ("max_prob", "margin"):  # which read the marginals before a token is drawn
        with pytest.raises(ValueError, match="row 7: no sequence that the constraint accepts"):
            dd.Sampler(MASKED, never(1).guided(ones), S.Unmask(select), steps=1).sample(2, L, seed=0, first_row=7)
    given = dd.Sampler(MASKED, network().guided(PARITY), S.Ancestral(), steps=2)
    with pytest.raises(ValueError, match="row 0: no sequence that the constraint accepts"):
        given.sample(2, L, seed=0, prompt=[0, 2])


def test_a_dead_end_that_is_rarely_met_is_no_silent_loss() -> None:
    """A cut of tokens that depends on what is revealed: the law says with what probability a run fails."""
    logits = torch.zeros(4**L, L, V, dtype=torch.float64)
    states = all_states(4, L)
    logits[(states == 1).any(-1), :, 1] = -torch.inf  # after a one there is no other one
    net = dd.Denoiser(lambda x, t: logits[state_index(x, 4)], MASKED, "denoiser", length=L, time_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"law: with probability 0\.\d+ the run ends in an error"):
        T.law(dd.Sampler(MASKED, net.guided(PARITY), S.Ancestral(), steps=3))
    assert float(T.law(dd.Sampler(MASKED, net.guided(PARITY), S.Ancestral(), steps=1)).sum()) == pytest.approx(1)


def test_given_tokens_are_respected() -> None:
    for held in ([1, -1, -1], [-1, 1, -1], [-1, -1, 2], [0, -1, 1], [-1, 0, -1]):
        prompt, frozen = torch.tensor(held).clamp(min=0), torch.tensor(held) >= 0
        fits = (X[:, frozen] == prompt[frozen]).all(-1)
        for operator in (S.Ancestral(), S.Unmask("max_prob"), S.ReMDM(0.4), S.Ancestral() >> S.Gibbs()):
            sampler = dd.Sampler(MASKED, network().guided(PARITY), operator, steps=2)
            law = T.law(sampler, prompt=prompt, frozen=frozen)
            assert float(law[~(RIGHT & fits)].sum()) == 0
            assert bool((law[RIGHT & fits] > 0).all())
            tokens = sampler.sample(50, L, seed=0, prompt=prompt, frozen=frozen).tokens
            assert bool((tokens[:, frozen] == prompt[frozen]).all())
            assert bool(by_hand(tokens).all())
    world = product()
    sampler = dd.Sampler(MASKED, world.denoiser(MASKED).guided(PARITY), S.Ancestral(), steps=2)
    law = T.law(sampler, prompt=[0, 1, 0], frozen=[False, True, False])
    goal = world.p0 * RIGHT * (X[:, 1] == 1)
    torch.testing.assert_close(law, goal / goal.sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("operator", [one for one in STEPS if accepted(one, ABSORBING) and takes(one)], ids=named)
def test_noise_tokens_in_place_of_masks(operator: dd.Operator) -> None:
    """A state of this process is a token with its noise token; ``Ancestral`` reads whether they are equal by chance."""
    model = WORLD.denoiser(ABSORBING).guided(PARITY)
    sampler = dd.Sampler(ABSORBING, model, operator, steps=3)
    refused = "a guide gave a joint law of the clean tokens"
    try:
        tokens = sampler.sample(500, L, seed=0).tokens
    except ValueError as error:
        assert refused in str(error)
        assert "Ancestral" in repr(operator) or isinstance(operator, S.SplitLeap | S.ARPC | S.FirstHitting)
    else:
        assert bool(by_hand(tokens).all())
        assert isinstance(operator, S.ReMDM | S.Reveal)


def test_a_mask_among_the_tokens_is_no_token() -> None:
    process = dd.Masked(4, dd.Linear(), mask_id=1)
    even = dd.Constraint(torch.tensor([[0, 0, 1, 0], [1, 1, 0, 1]]), 0, torch.tensor([True, False]))
    world = T.Enumeration(WORLD.p0, vocab_size=3, length=L)
    model = world.denoiser(process)
    for operator in (S.Ancestral(), S.Unmask("max_prob")):
        sampler = dd.Sampler(process, model.guided(even), operator, steps=2)
        tokens = sampler.sample(200, L, seed=0).tokens
        assert not bool((tokens == 1).any())
        assert bool(((tokens == 2).sum(-1) % 2 == 0).all())
        law = T.law(sampler)
        odd = (X == 1).sum(-1) % 2 == 1  # the second data token is the token 2
        assert float(law[odd].sum()) == 0
    masks = dd.Constraint(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), 0, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="without the mask, token 1: no sequence is accepted"):
        model.guided(masks)


# --- blocks ----------------------------------------------------------------------------------------------------------


def blind() -> dd.Denoiser:
    """A network for any length."""
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(3))
    return dd.Denoiser(lambda x, t: logits[x], MASKED, "denoiser")


@pytest.mark.parametrize("block", [1, (1, 2), {1: 0.5, 2: 0.5}, 3], ids=str)
def test_blocks_of_any_size_end_in_accepted_sequences(block: object) -> None:
    for constraint, right, operator in (
        (PARITY, RIGHT, S.Unmask("max_prob")), (ALIKE, SAME, S.Ancestral()), (PARITY & ALIKE, RIGHT & SAME, S.P2(0.0)),
    ):  # fmt: skip
        maker = dd.Blockwise(MASKED, blind().guided(constraint), operator, block=block, steps=2)  # type: ignore[arg-type]
        law = T.law(maker, length=L)
        assert float(law[~right].sum()) == 0
        assert bool((law[right] > 0).all())
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
        for length in (L, 7):
            out = maker.sample(64, length, seed=0)
            assert bool(constraint.accepts(out.tokens).all())


def test_blocks_look_at_what_can_still_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the states at the end of a block have no weights."""
    maker = dd.Blockwise(MASKED, blind().guided(PARITY), S.Ancestral(), block=1, steps=1)
    right = T.law(maker, length=L)

    def all_alike(edges: marginals.Edges, at: GuideAt, block: int) -> Tensor:
        end = torch.zeros(len(at.rows), edges.automaton.states + 1, dtype=torch.float64)
        end[:, -1] = -torch.inf
        return end

    monkeypatch.setattr("discdiff.guidance.constraint.ends", all_alike)
    assert float(T.law(maker, length=L)[~RIGHT].sum()) > 0.1
    monkeypatch.undo()
    torch.testing.assert_close(T.law(maker, length=L), right, atol=0, rtol=0)


def test_given_tokens_of_later_blocks_are_looked_at() -> None:
    """The last token is given: the first must be the same one, and blocks are drawn from left to right."""
    given = torch.tensor([[0, 0, 0, 0, v] for v in (0, 1, 2, 1)])
    frozen = torch.tensor([[False] * 4 + [True]] * 3 + [[False] * 5])
    maker = dd.Blockwise(MASKED, blind().guided(ALIKE), S.Ancestral(), block=2, steps=2)
    for seed in range(10):
        tokens = maker.sample(4, 5, seed=seed, prompt=given, frozen=frozen).tokens
        assert bool(ALIKE.accepts(tokens).all())
        assert tokens[:3, -1].tolist() == [0, 1, 2]
    middle = frozen.roll(-1, 1)
    tokens = maker.sample(4, 5, seed=0, prompt=given, frozen=middle | frozen).tokens
    assert bool(ALIKE.accepts(tokens).all())
    prompts = maker.sample(6, 6, seed=0, prompt=[[], [1], [2, 0, 1], [0, 0, 0, 0, 2], [1, 1], [2]]).tokens
    assert bool(ALIKE.accepts(prompts).all())
    assert prompts[2, :3].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="no sequence that the constraint accepts"):
        maker.sample(1, 5, seed=0, prompt=[[0, 0, 0, 0, 1]], frozen=[[True, False, False, False, True]])


def test_a_stop_token_that_pads_ends_rows_in_accepted_sequences() -> None:
    text = dd.Constraint.regex("a(ba)*", ["a", "b", None], pad=2)
    maker = dd.Blockwise(MASKED, blind().guided(text), S.Ancestral(), block=3, steps=2)
    out = maker.sample(200, 9, seed=0, stop=2)
    assert bool(text.accepts(out.tokens).all())
    assert len(out.lengths.unique()) > 2  # type: ignore[union-attr]
    for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True):  # type: ignore[union-attr]
        kept = row[: length - 1] if 2 in row else row
        assert kept == [0, 1] * (len(kept) // 2) + [0]


def test_rows_of_blocks_do_not_depend_on_the_split() -> None:
    maker = dd.Blockwise(MASKED, blind().guided(PARITY & ALIKE), S.Ancestral(), block={1: 0.5, 3: 0.5}, steps=2)
    prompts = [[], [1], [0, 0], [2, 1, 2]] * 2
    whole = maker.sample(8, 8, seed=3, prompt=prompts).tokens
    parts = [maker.sample(1, 8, seed=3, prompt=prompts[row : row + 1], first_row=row).tokens for row in range(8)]
    assert torch.equal(torch.cat(parts), whole)
