"""Runs with rewards: splits, counts, rollouts' calls, blocks, sites that are settled, weights of 0, and errors."""

import itertools
from typing import Any

import pytest
import torch
from joint_laws import Alike
from problems import named
from rewarded import FIVE, MASKED, UNIFORM, V, apart, log_w, reached, world
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.operator import Run
from discdiff.theory.world import all_states, state_index

ESTIMATORS = ("swap", "control_variate", "self_normalised", "standardised")


def reward(x: Tensor) -> Tensor:
    return log_w(x.shape[1])[state_index(x, V)]


def guided(process: dd.Process, *given: Any, length: int = 3, **named: Any) -> dd.Denoiser:  # noqa: ANN401
    return world(length).denoiser(process, "loo").guided(dd.Reward(reward, *given, **named))


def given(model: dd.Denoiser, z: Tensor, draws: Tensor, t: float = 0.5) -> dd.Prediction:
    """The prediction at states (n, L) if the guide's draws are (n, M, L)."""
    run = Run.start(model, len(z), 0)
    run.given = lambda site, law, rows, scored: draws
    state, at = run.begin(z, t)
    return at.predict(state)


def everywhere() -> list[Any]:
    """Estimators, rollouts and processes; most are tried in the slow run."""
    found, few = [], ((1, "swap"), (3, "control_variate"))
    for process in (*FIVE, dd.AbsorbingUniform(V, dd.Linear())):
        for rollout, estimator in itertools.product((1, 3), ESTIMATORS):
            slow = (rollout, estimator) not in few or process not in FIVE[:2]
            name = f"{rollout}-{estimator}-{named(process)}"
            found.append(pytest.param(rollout, estimator, process, marks=pytest.mark.slow if slow else (), id=name))
    return found


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("rollout", "estimator", "process"), everywhere())
def test_tokens_do_not_depend_on_the_split_of_the_batch(rollout: int, estimator: str, process: dd.Process) -> None:
    model = None if rollout == 1 else world(3).denoiser(process, "loo")
    plain = guided(process, 3, estimator, rollout, model)
    for operator in (S.Ancestral(), S.Ancestral() >> S.Gibbs()):
        sampler = dd.Sampler(process, plain, operator, steps=3)
        out = sampler.sample(8, seed=3, record=True)
        parts = [sampler.sample(n, seed=3, first_row=k, record=True) for k, n in ((0, 3), (3, 1), (4, 4))]
        assert torch.equal(torch.cat([part.tokens for part in parts]), out.tokens)
        assert out.log_prob is not None
        torch.testing.assert_close(torch.cat([part.log_prob for part in parts]), out.log_prob, atol=1e-11, rtol=0)
    assert not torch.equal(sampler.sample(8, seed=3, first_row=8).tokens, out.tokens)


def test_the_draws_of_a_guide_are_one_choice() -> None:
    sampler = dd.Sampler(UNIFORM, guided(UNIFORM, 5), S.Ancestral(), steps=2)
    out = sampler.sample(4, seed=0, record="choices", prompt=[2])
    assert out.choices is not None
    draws = out.choices.guides
    assert [*draws] == ["1.0.guide0.x0", "2.0.guide0.x0"]
    assert all(value.shape == (4, 5, 3) and bool((value[..., 0] == 2).all()) for value in draws.values())
    assert not torch.equal(draws["1.0.guide0.x0"][:, 0], draws["1.0.guide0.x0"][:, 1])


def test_rewards_are_counted_and_asked_for_in_parts() -> None:
    sizes: list[int] = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return reward(x)

    for process, estimator, at_once in itertools.product((MASKED, UNIFORM), ESTIMATORS, (4096, 17)):
        sizes.clear()
        model = world(3).denoiser(process, "loo").guided(dd.Reward(counted, 4, estimator, at_once=at_once))  # type: ignore[arg-type]
        out = dd.Sampler(process, model, S.Ancestral(), steps=3).sample(4, seed=0)
        assert out.rewards == sum(sizes)
        assert max(sizes) <= at_once
        if estimator != "swap":
            assert out.rewards == out.nfe * 4 * 4
        elif process.masks:  # each site is read once, in the step that reveals it
            assert out.rewards == 4 * 3 * V * 4
        else:
            assert out.rewards <= out.nfe * 4 * 3 * V * 4
    sizes.clear()
    one = world(3).denoiser(MASKED, "loo").guided(dd.Reward(counted, 1, "control_variate"))
    assert dd.Sampler(MASKED, one, S.Ancestral(), steps=2).sample(2, seed=0).rewards == 0
    same = dd.Sampler(MASKED, world(3).denoiser(MASKED, "loo"), S.Ancestral(), steps=2).sample(2, seed=0)
    assert torch.equal(dd.Sampler(MASKED, one, S.Ancestral(), steps=2).sample(2, seed=0).tokens, same.tokens)


def test_rollouts_declare_and_count_their_calls() -> None:
    plain = world(3).denoiser(UNIFORM, "loo")
    model = guided(UNIFORM, 2, rollout=4, model=plain)
    sampler = dd.Sampler(UNIFORM, model, S.Ancestral(), steps=5)
    assert sampler.nfe == 5 * 4
    out = sampler.sample(3, seed=0)
    assert out.nfe == 20
    assert out.nfe_rows.tolist() == [20] * 3
    assert out.queries == 5 * 3 * 3 * (1 + 3 * 2)  # two copies of each row in a rollout's calls
    mapping = {"net": plain, "other": world(3).denoiser(UNIFORM, "loo")}
    plan = dd.Plan(
        [1.0, 0.5, 0.0], [dd.Step(S.Ancestral(), guides=[dd.Reward(reward, 2, rollout=3, model="other")])] * 2
    )
    named = dd.Sampler(UNIFORM, mapping, plan=plan).sample(3, seed=0)
    assert named.calls == {"net": 2, "other": 4}
    same = dd.Sampler(UNIFORM, guided(UNIFORM, 2, rollout=3, model=plain), S.Ancestral(), grid=[1.0, 0.5, 0.0])
    assert torch.equal(same.sample(3, seed=0).tokens, named.tokens)
    assert not torch.equal(
        dd.Sampler(UNIFORM, guided(UNIFORM, 2), S.Ancestral(), steps=5).sample(40, seed=0).tokens,
        sampler.sample(40, seed=0).tokens,
    )


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", FIVE, ids=named)
def test_frozen_sites_keep_their_token_in_draws_and_rollouts(process: dd.Process) -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x)
        return reward(x)

    plain = world(3).denoiser(process, "loo")
    for rollout in (1, 2):
        guide = dd.Reward(watched, 2, "control_variate", rollout, model=None if rollout == 1 else plain)
        sampler = dd.Sampler(process, plain.guided(guide), S.Ancestral(), steps=3)
        frozen = [False, True, False]
        out = sampler.sample(20, seed=0, prompt=[0, 2, 0], frozen=frozen)
        assert bool((out.tokens[:, 1] == 2).all())
        parts = [sampler.sample(n, seed=0, first_row=k, prompt=[0, 2, 0], frozen=frozen) for k, n in ((0, 4), (4, 16))]
        assert torch.equal(torch.cat([part.tokens for part in parts]), out.tokens)
    assert bool((torch.cat(seen)[:, 1] == 2).all())
    assert bool((torch.cat(seen) < V).all())


def test_at_a_revealed_site_the_tilt_is_of_o_and_not_of_d() -> None:
    """D is a point mass there; "swap" tilts what the other sites say all the same."""
    z = all_states(V, 2)  # all sites are revealed
    base = world().denoiser(MASKED, "loo")
    o = base(z, 0.5).loo.exp()
    for estimator in ESTIMATORS:
        model = base.guided(dd.Reward(reward, 2, estimator))  # type: ignore[arg-type]
        said = given(model, z, z[:, None].expand(-1, 2, -1))
        assert apart(said.denoiser.exp(), base(z, 0.5).denoiser.exp()) < 1e-14
        if estimator != "swap":
            assert apart(said.loo.exp(), o) < 1e-14
            continue
        g = torch.stack([torch.stack([reward(z.clone().index_fill_(1, torch.tensor([i]), v)) for v in range(V)], -1)
                         for i in range(2)], 1).exp()  # fmt: skip
        assert apart(said.loo.exp(), o * g / (o * g).sum(-1, keepdim=True)) < 1e-12
        assert apart(said.loo.exp(), o) > 0.1
    only_d = world().denoiser(MASKED, "denoiser").guided(dd.Reward(reward, 2))
    assert dd.Sampler(MASKED, only_d, S.Ancestral() >> S.Gibbs(), steps=3).sample(5, seed=0).tokens.shape == (5, 2)


def test_rows_whose_weights_are_all_0_stay_as_they_are() -> None:
    never = lambda x: torch.full((len(x),), -torch.inf)  # noqa: E731
    some = lambda x: torch.where(x[:, 0] == 1, 0.0, -torch.inf)  # noqa: E731
    for process in (MASKED, UNIFORM):
        z = reached(world(), process, 0.5)
        base = world().denoiser(process, "loo")
        right = base(z, 0.5).denoiser.exp()
        open_ = ~process.revealed(z, torch.full(z.shape, 0.5).double())
        draws = torch.where(open_, torch.zeros_like(z), z)[:, None].expand(-1, 2, -1)  # a first token of weight 0
        for estimator in ESTIMATORS:
            none = given(base.guided(dd.Reward(never, 2, estimator)), z, draws).denoiser.exp()  # type: ignore[arg-type]
            assert apart(none, right) < 1e-14
            found = given(base.guided(dd.Reward(some, 2, estimator)), z, draws).denoiser.exp()  # type: ignore[arg-type]
            assert not bool(found.isnan().any())
            if estimator != "swap":
                assert apart(found[draws[:, 0, 0] != 1], right[draws[:, 0, 0] != 1]) < 1e-14
                continue
            could = right[:, 0, 1] > 0
            assert apart(found[could, 0, 1], torch.ones(int(could.sum())).double()) < 1e-14
            stay = draws[:, 0, 0] != 1  # the second site cannot help
            assert apart(found[stay, 1], right[stay, 1]) < 1e-14
        allowed = base.guided(dd.Forbid([1])).guided(dd.Reward(some, 2))
        out = dd.Sampler(process, allowed, S.Ancestral() if process.masks else S.Ancestral() >> S.Gibbs(), steps=3)
        assert not bool((out.sample(20, seed=0).tokens == 1).any()), "no token comes back that O rules out"


@pytest.mark.usefixtures("as_user")
def test_behind_a_prefix_whole_sequences_are_rewarded() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    for process, estimator in ((MASKED, "swap"), (UNIFORM, "swap"), (UNIFORM, "control_variate")):
        seen: list[Tensor] = []

        def like_the_first(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return 4.0 * (x[:, 1:] == x[:, :1]).sum(-1).double()

        net = dd.Denoiser(lambda x, t: logits[x], process, "loo", time="t")
        model = net.guided(dd.Reward(like_the_first, 8, estimator))  # type: ignore[arg-type]
        blocks = dd.Blockwise(process, model, S.Ancestral(), block=2, steps=2)
        prompts = [[0], [1, 2]] * 20
        out = blocks.sample(40, 5, seed=0, prompt=prompts)
        assert out.rewards == sum(map(len, seen))
        assert {x.shape[1] for x in seen} <= {3, 4, 5}
        assert all(bool((x[:, 0] <= 1).all()) for x in seen)
        assert bool((torch.cat([x.flatten() for x in seen]) >= -1).all())
        plain = dd.Blockwise(process, net, S.Ancestral(), block=2, steps=2).sample(40, 5, seed=0, prompt=prompts)
        share, before = (float((x[:, 2:] == x[:, :1]).double().mean()) for x in (out.tokens, plain.tokens))
        assert share > before + 0.15
        parts = [blocks.sample(n, 5, seed=0, first_row=k, prompt=prompts[:n]) for k, n in ((0, 6), (6, 34))]
        assert torch.equal(torch.cat([part.tokens for part in parts]), out.tokens)


def test_a_joint_law_and_truncations_of_earlier_guides_are_left_out_of_the_draws() -> None:
    base = world(3).denoiser(MASKED)
    model = base.guided(Alike()).guided(dd.Reward(reward, 4))
    out = dd.Sampler(MASKED, model, S.Ancestral(), grid=[1.0, 0.0]).sample(40, seed=0).tokens
    assert bool((out == out[:, :1]).all()), "the joint law still draws"
    assert not torch.equal(
        out, dd.Sampler(MASKED, base.guided(Alike()), S.Ancestral(), grid=[1.0, 0.0]).sample(40, seed=0).tokens
    )
    cold = dd.Truncation(temperature=1e-3)
    sampler = dd.Sampler(MASKED, base.guided(cold).guided(dd.Reward(reward, 4)), S.Ancestral(), steps=1)
    draws = sampler.sample(200, seed=0, record="choices").choices
    assert draws is not None
    assert draws.guides["1.0.guide1.x0"].unique().numel() == V


def test_a_log_probability_has_the_derivative_of_the_guided_model() -> None:
    """With its draws held; through D in the weights of the draws, and through O."""
    weights = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    move = torch.randn(V, V, generator=torch.Generator().manual_seed(1)).double()
    for process, estimator in itertools.product((MASKED, UNIFORM), ("swap", "control_variate")):
        table = torch.zeros(process.states, V).double()

        def net(w: Tensor, process: dd.Process = process, table: Tensor = table) -> dd.Denoiser:
            rows = torch.cat([w, table[V:]])
            return dd.Denoiser(lambda x, t: rows[x.flip(1)], process, "loo", length=2)

        guide = dd.Reward(reward, 3, estimator)  # type: ignore[arg-type]
        made = dd.Sampler(process, net(weights.detach()).guided(guide), S.Ancestral(), grid=[0.9, 0.5, 0.1])
        out = made.sample(initial=reached(world(), process, 0.9)[-6:], seed=0, record="choices")
        total = made.log_prob(out, model=net(weights).guided(guide)).sum()
        (slope,) = torch.autograd.grad(total, weights)
        sides = [made.log_prob(out, model=net(weights.detach() + e * move).guided(guide)).sum() for e in (1e-6, -1e-6)]
        assert float((slope * move).sum()) == pytest.approx(float(sides[0] - sides[1]) / 2e-6, rel=1e-5)


@pytest.mark.usefixtures("as_user")
def test_errors_name_what_and_where() -> None:
    plain = world(3).denoiser(UNIFORM, "loo")
    for make, kind, text in (
        (lambda: dd.Reward(3), TypeError, r"log_weight must map sequences \(N, L\) to \(N,\), got 3"),
        (lambda: dd.Reward(reward, 0), ValueError, "samples must be at least 1"),
        (lambda: dd.Reward(reward, 2.5), TypeError, "samples must be a whole number"),
        (lambda: dd.Reward(reward, estimator="best"), ValueError, "estimator must be one of 'swap', 'control_variate'"),
        (lambda: dd.Reward(reward, temperature=0), ValueError, r"temperature must lie in \(0, inf\)"),
        (lambda: dd.Reward(reward, rollout=2), ValueError, "rollout > 1 takes model=, and rollout=1 takes none"),
        (lambda: dd.Reward(reward, model=plain), ValueError, "rollout > 1 takes model=, and rollout=1 takes none"),
        (lambda: dd.Reward(reward, rollout=2, model=3), TypeError, "Reward: model must be a Denoiser"),
        (lambda: guided(MASKED, rollout=2, model=plain), ValueError, "but the model it guides is for Masked"),
        (lambda: plain.guided(dd.Reward), TypeError, r"got the class Reward; add \(\)"),
        (lambda: guided(UNIFORM)(all_states(V, 3), 0.5), TypeError, "draws, so it takes a run"),
        (
            lambda: dd.Sampler(UNIFORM, guided(UNIFORM, rollout=2, model="net"), S.Ancestral(), steps=2),
            ValueError,
            "a guide asks the model 'net'",
        ),
    ):
        with pytest.raises(kind, match=text):
            make()
    for estimator in ESTIMATORS:
        for bad in (torch.nan, torch.inf):
            wrong = dd.Reward(lambda x, bad=bad: torch.full((len(x),), bad), 2, estimator)  # type: ignore[arg-type]
            sampler = dd.Sampler(UNIFORM, plain.guided(wrong), S.Ancestral(), steps=2)
            with pytest.raises(ValueError, match=rf"the reward of a sequence of row 41, \[\d, \d, \d\], is {bad}"):
                sampler.sample(1, seed=0, first_row=41)
    with pytest.raises(ValueError, match=r"a reward must give \(\d+,\) numbers, one a sequence, got \(\d+, 3\)"):
        dd.Sampler(UNIFORM, plain.guided(dd.Reward(lambda x: x)), S.Ancestral(), steps=2).sample(1, seed=0)
    scored = dd.Sampler(MASKED, guided(MASKED), S.ARPC("nll"), steps=2)
    with pytest.raises(ValueError, match="this operator asks for an autoregressive one"):
        scored.sample(2, seed=0)
    assert repr(dd.Reward(reward)).startswith("Reward(log_weight=<function reward")
    assert "estimator='swap', rollout=1" in repr(dd.Reward(reward))
    assert dd.Reward(reward) == dd.Reward(reward) != dd.Reward(reward, 5)
