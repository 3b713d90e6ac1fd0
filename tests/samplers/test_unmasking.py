"""Orders of unmasking, and the choices they are made of."""

import itertools
import math

import pytest
import torch
from ledger import caught, within
from problems import chain, states, strong
from scipy.stats import chisquare, kstest

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import Key, Noise, Other, Ranking, Subset, Waiting

PROCESS = dd.Masked(3, dd.Linear())
SELECT = ["random", "max_prob", "entropy", "margin", "left_to_right", "spread"]


def law(operator: dd.Operator, steps: int = 8) -> torch.Tensor:
    return T.law(dd.Sampler(PROCESS, strong().denoiser(PROCESS, predicts="loo"), operator, steps=steps))


# --- one token a call is exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("select", SELECT)
def test_any_order_is_exact_whatever_it_looks_at(select: str, block: int | None, noise: float) -> None:
    """On one step of the grid, and as ``Unmask`` with as many steps as sites."""
    p0 = strong().p0
    within(16, float((law(S.AnyOrder(select, noise, block), steps=1) - p0).abs().max()), 1e-12)
    within(16, float((law(S.Unmask(select, noise, block), steps=3) - p0).abs().max()), 1e-12)


def test_sample_then_select_is_biased() -> None:
    """The order of LLaDA and P2: with a perfect denoiser and a call for every token the law is far from p0."""
    p0 = strong().p0
    caught(16, T.tv(law(S.Unmask(draw_first=True)), p0), 0.1)
    caught(16, T.tv(law(S.P2(), steps=3), p0), 0.1)


def test_parallel_unmasking_costs_the_total_correlation() -> None:
    """A fixed order in two steps: KL(p0 || law) = the expected total correlations of what is revealed together."""
    world = strong()
    p0 = world.p0.view(3, 3, 3)
    # two steps: quota 2, then 1; "left_to_right" reveals sites 0 and 1 first
    pair = p0.sum(2)
    tc = T.kl(pair.flatten(), torch.outer(pair.sum(1), pair.sum(0)).flatten())
    found = T.kl(world.p0, law(S.Unmask("left_to_right"), steps=2))
    single = p0.sum((1, 2))
    rest = p0 / single[:, None, None]
    other = sum(float(single[v]) * _tc(rest[v]) for v in range(3))
    assert found == pytest.approx(tc, abs=1e-12) or found == pytest.approx(other, abs=1e-12)


def _tc(pair: torch.Tensor) -> float:
    return T.kl(pair.flatten(), torch.outer(pair.sum(1), pair.sum(0)).flatten())


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.2])
def test_the_entropy_bound_holds(gamma: float) -> None:
    """KL <= gamma a call; the last step reveals what is left, so there are as many steps as sites."""
    world = strong()
    sampler = dd.Sampler(PROCESS, world.denoiser(PROCESS), S.EntropyBounded(gamma), steps=3)
    assert T.kl(world.p0, T.law(sampler)) <= 3 * gamma + 1e-12


def test_thresholds_trade_calls_for_error() -> None:
    law_, process = chain(4, 48), dd.Masked(4, dd.Linear())
    model = law_.denoiser(process)
    calls = [
        dd.Sampler(process, model, S.Threshold(level), steps=48).sample(8, seed=0).nfe_rows.double().mean()
        for level in (0.3, 0.6, 1.0)
    ]
    assert calls[0] < calls[1] < calls[2] <= 48
    kl_stable = [
        dd.Sampler(process, model, S.KLStable(0.5, kl), steps=48).sample(8, seed=0).nfe_rows.double().mean()
        for kl in (1e-4, 10.0)
    ]
    assert kl_stable[1] < kl_stable[0]


STAYING = [
    S.Unmask(), S.Unmask("entropy"), S.Unmask("margin", block=3), S.Threshold(), S.EntropyBounded(), S.KLStable(),
    S.P2(), S.AnyOrder("margin"), S.FirstHitting(), S.ReMDM(), S.Ancestral() >> S.Remask(0.2),
]  # fmt: skip


@pytest.mark.parametrize("operator", STAYING, ids=repr)
def test_no_mask_is_left_and_prompts_stay(operator: dd.Operator) -> None:
    world = chain(4, 12)
    process = dd.Masked(4, dd.Linear())
    sampler = dd.Sampler(process, world.denoiser(process, predicts="loo"), operator, steps=5)
    out = sampler.sample(3, seed=0, prompt=[1, 2, 0], record=True)
    last = operator.right if hasattr(operator, "right") else None
    assert last is not None or bool(
        (out.tokens < 4).all()
    )  # a corrector after the last step may mask at alpha = 1: never
    assert bool((out.tokens[:, :3] == torch.tensor([1, 2, 0])).all())
    assert out.log_prob is not None
    assert bool(torch.isfinite(out.log_prob).all())


def test_revealed_tokens_stay_and_blocks_come_in_order() -> None:
    world, process = chain(4, 12), dd.Masked(4, dd.Linear())
    sampler = dd.Sampler(process, world.denoiser(process), S.Unmask("entropy", block=4), steps=6)
    path = sampler.sample(4, seed=1, record=True).trajectory
    assert path is not None
    for before, after in itertools.pairwise(path):
        shown = before != 4
        assert bool((before[shown] == after[shown]).all())
        assert bool(((after != 4).sum(-1) == (before != 4).sum(-1) + 2).all())  # the schedule's number
        open_ = (after.view(4, 3, 4) == 4).sum(-1)  # masks of each block: full ones only after one that is begun
        assert bool((open_.diff(dim=-1) >= 0).all())


def test_confidence_is_taken_before_temperature() -> None:
    """The same sites are chosen at any temperature of what is drawn; confidence of tempered logits chooses others."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [1.5, 1.5, -9.0], [0.3, 0.2, 0.1]]]).expand(4, -1, -1)
    model = dd.Denoiser(lambda x, t: logits[: len(x)], PROCESS, predicts="denoiser")

    def first(m: dd.Denoiser, operator: dd.Operator) -> torch.Tensor:
        path = dd.Sampler(PROCESS, m, operator, steps=3).sample(4, 3, seed=0, record=True).trajectory
        assert path is not None
        return path[1] != 3

    for select in ("max_prob", "entropy", "margin"):
        plain = first(model, S.Unmask(select))
        for temperature in (0.0, 0.3, 5.0):
            cold = first(model.guided(dd.Truncation(temperature=temperature)), S.Unmask(select))
            torch.testing.assert_close(cold, plain)


def test_spread_sites_lie_far_apart() -> None:
    world, process = chain(4, 64), dd.Masked(4, dd.Linear())
    path = dd.Sampler(process, world.denoiser(process), S.Unmask("spread"), steps=8).sample(1, seed=0, record=True)
    assert path.trajectory is not None
    shown = [set((x[0] != 4).nonzero()[:, 0].tolist()) for x in path.trajectory]
    for before, after in itertools.pairwise(shown):
        fresh = sorted(after - before)
        assert min(b - a for a, b in itertools.pairwise(fresh)) >= 4


# --- calls ----------------------------------------------------------------------------------------------------------


def test_a_prediction_without_time_is_reused_while_tokens_stay() -> None:
    """The calls counted are the calls made; a denoiser that is told the time is asked again."""
    world, process, made = chain(4, 4), dd.Masked(4, dd.Linear()), []
    exact = world.denoiser(process)

    def spy(x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        made.append(len(x))
        return exact.fn(x, torch.full((len(x),), 0.5, dtype=torch.float64))

    timeless = dd.Denoiser(spy, process, predicts="denoiser", time=None, length=4)
    timed = dd.Denoiser(lambda x, t: spy(x, t), process, predicts="denoiser", length=4)
    out = dd.Sampler(process, timeless, S.Multistep(), steps=64).sample(1, seed=0)
    assert out.nfe == len(made) == int(out.nfe_rows[0]) <= 6  # one for each set of tokens
    made.clear()
    again = dd.Sampler(process, timed, S.Multistep(), steps=64).sample(1, seed=0)
    assert again.nfe == len(made) == 64 - 1 + int(again.nfe - 63)
    assert torch.equal(again.tokens, out.tokens)


def test_nothing_is_asked_when_nothing_can_change() -> None:
    world, process = chain(4, 4), dd.Masked(4, dd.Linear())
    model = world.denoiser(process)
    for operator in (S.Ancestral(), S.Unmask(), S.Threshold(0.0), S.EntropyBounded(9.0), S.SplitLeap()):
        assert dd.Sampler(process, model, operator, steps=64).sample(1, seed=0).nfe <= 8
    done = torch.zeros(2, 4, dtype=torch.int64)
    assert dd.Sampler(process, model, S.Ancestral(), grid=[0.5, 0.0]).sample(2, initial=done, seed=0).nfe == 0


# --- the choices ----------------------------------------------------------------------------------------------------


def test_rankings_and_subsets_are_laws(failure_rate: float) -> None:
    log_w = torch.tensor([[0.0, 1.0, -1.0, -torch.inf], [0.5, 0.5, 0.0, 2.0]], dtype=torch.float64)
    for choice in (Ranking(log_w, torch.tensor([2, 3])), Subset(log_w > -torch.inf, torch.tensor([2, 3]))):
        parent, value, log_p = choice.fork()
        for row in range(2):
            mine = parent == row
            assert float(log_p[mine].exp().sum()) == pytest.approx(1, abs=1e-12)
            one = Ranking(log_w[row : row + 1].expand(int(mine.sum()), -1), choice_count(choice, row, mine))
            if isinstance(choice, Ranking):
                torch.testing.assert_close(one.log_prob(value[mine]), log_p[mine], atol=1e-12, rtol=0)
    draws = 40_000
    many = Ranking(log_w[1:].expand(draws, -1), torch.full((draws,), 2))
    many.key = Key(3, torch.arange(draws))
    drawn = many.sample()
    _, values, log_p = Ranking(log_w[1:], torch.tensor([2])).fork()
    count = torch.stack([(drawn == value).all(-1).sum() for value in values])
    assert int(count.sum()) == draws
    assert chisquare(count.numpy(), (log_p.exp() * draws).numpy()).pvalue > failure_rate


def choice_count(choice: Ranking | Subset, row: int, mine: torch.Tensor) -> torch.Tensor:
    count = choice.count if isinstance(choice, Ranking) else choice.size
    return count[row].expand(int(mine.sum()))


def test_other_noise_is_never_the_own_state(failure_rate: float) -> None:
    pi = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    draws = 40_000
    for own in range(4):
        x = torch.full((draws, 1), own)
        choice = Other(
            Noise.of(pi, torch.device("cpu")), x, torch.ones_like(x, dtype=torch.bool), torch.zeros(draws, 1), None
        )
        choice.key = Key(5, torch.arange(draws))
        count = torch.bincount(choice.sample()[:, 0], minlength=4)
        expected = pi.index_fill(0, torch.tensor(own), 0.0)
        expected = expected / expected.sum()
        assert bool((count[expected == 0] == 0).all())
        keep = expected > 0
        assert chisquare(count[keep].numpy(), (expected[keep] * draws).numpy()).pvalue > failure_rate
        _, value, log_p = Other(choice.noise, x[:1], x[:1] >= 0, torch.zeros(1, 1), None).fork()
        torch.testing.assert_close(log_p.exp(), expected[value[:, 0]])


def test_waiting_times_are_exponential(failure_rate: float) -> None:
    choice = Waiting(torch.arange(20_000))
    choice.key = Key(1, torch.arange(20_000))
    wait = choice.sample()
    assert kstest(wait.numpy(), "expon").pvalue > failure_rate
    torch.testing.assert_close(choice.log_prob(wait), -wait)
    with pytest.raises(TypeError, match="cannot be listed"):
        choice.fork()


def test_turns_have_keys_of_their_own() -> None:
    """Choices of a loop share a name; their randomness must not be shared."""
    world = strong()
    out = dd.Sampler(PROCESS, world.denoiser(PROCESS), S.AnyOrder(), grid=[1.0, 0.0]).sample(4000, seed=0)
    count = torch.zeros(3, 3)
    count.index_put_((out.tokens[:, 0], out.tokens[:, 1]), torch.ones(4000), accumulate=True)
    pair = world.p0.view(3, 3, 3).sum(2).flatten()
    assert chisquare(count.flatten().numpy(), (pair * 4000).numpy()).pvalue > 1e-6
    assert math.isfinite(float(states(3, 2).sum()))
