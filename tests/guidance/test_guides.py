"""Guides of every kind against laws computed by hand: kernels, splits, threads, counts."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyro.poutine
import pytest
import torch
from guides import Coin, Noisy, Plain, by_hand, table
from operators import STEPS, accepted
from problems import processes, strong, weak
from scipy.stats import binomtest, chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import GuideAt
from discdiff.theory.world import all_states, state_index

WORLD, OTHER = strong(), weak()
G, H = table(3, 3, 0), table(3, 3, 1)
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
MARGINAL, ABSORBING = dd.Marginal(torch.tensor([0.5, 0.3, 0.2]), dd.Linear()), dd.AbsorbingUniform(3, dd.Linear())
RANK_ONE = [MASKED, UNIFORM, MARGINAL, ABSORBING]
SPLITS = [
    S.Ancestral(), S.SplitLeap(), S.Adaptive(tolerance=3.0), S.FirstHitting(), S.Multistep(), S.Gillespie(),
    S.KLStable(), S.Ancestral() >> S.LocallyBalanced(), S.Unmask("margin"), S.ReMDM(0.5, confident=True), S.P2(),
    S.ARPC("nll"), S.Ancestral() >> S.Gibbs() ** 2, S.Euler(), S.Ancestral() >> S.RePaint(),
]  # fmt: skip
OPERATORS = [
    S.Ancestral(), S.SplitLeap(), S.TauLeaping(), S.Euler(), S.DFM(1.0), S.ThetaTrapezoidal(), S.Renoising(),
    S.Unmask("max_prob"), S.Unmask("entropy"), S.P2(), S.ReMDM(eta=0.3), S.Greedy(), S.MaximalCoupling(), S.Gibbs(),
    S.LocallyBalanced(), S.InformedGibbs(exact=True), S.TauForwardBackward(), S.Remask(), S.EntropyRedraw(sites=1),
]  # fmt: skip
# Enumerations and hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")


def name(operator: dd.Operator) -> str:
    return repr(operator).partition(" at 0x")[0]


def matrix(operator: dd.Operator, model: dd.Denoiser, t: float = 0.8, s: float = 0.4) -> Tensor:
    times = {"t": t, "s": s} if operator.moves else {"t": s}
    return T.kernel(operator, model.process, model, **times)


def apart(one: Tensor, other: Tensor, model: dd.Denoiser, t: float) -> float:
    """The largest difference of two kernels from states that are possible at the start."""
    return float((one - other)[WORLD.reachable(model.process, t)].abs().max())


# --- each kind against the same prediction made by hand --------------------------------------------------------------


@pytest.mark.parametrize("process", RANK_ONE, ids=repr)
@pytest.mark.parametrize("operator", OPERATORS, ids=name)
def test_a_kernel_of_a_tilted_model_is_that_of_tilted_rows(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    # an operator that reads O at revealed sites needs a model that predicts it; the guide then tilts it there too
    model = WORLD.denoiser(process, predicts="loo")
    start = 0.8 if operator.moves else 0.4
    plain, exact = matrix(operator, model), matrix(operator, by_hand(model, G))
    assert apart(matrix(operator, model.guided(Plain(G))), exact, model, start) < 1e-12
    assert (
        apart(matrix(operator, model.guided(lambda said: said.tilted(G.expand(*said.x.shape, 3)))), exact, model, start)
        < 1e-12
    )
    assert apart(plain, exact, model, start) > 1e-3, "planted: no guide at all"


@pytest.mark.parametrize("process", RANK_ONE, ids=repr)
@pytest.mark.parametrize("predicts", ["denoiser", "loo", "ratio"])
def test_changes_compose_in_order_whatever_the_network_predicts(
    process: dd.Process, predicts: dd.prediction.Predicts
) -> None:
    model, other = WORLD.denoiser(process, predicts=predicts), OTHER.denoiser(process)
    guided = model.guided(Plain(G)).guided(dd.ClassifierFree(other, 0.7)).guided(Plain(H))
    hand = by_hand(
        by_hand(
            by_hand(WORLD.denoiser(process, predicts="loo"), G), OTHER.denoiser(process, predicts="loo"), (1.7, -0.7)
        ),
        H,
    )
    assert apart(matrix(S.Ancestral(), guided), matrix(S.Ancestral(), hand), model, 0.8) < 1e-11
    turned = model.guided(dd.ClassifierFree(other, 0.7)).guided(Plain(G)).guided(Plain(H))
    assert apart(matrix(S.Ancestral(), turned), matrix(S.Ancestral(), hand), model, 0.8) > 1e-3


def test_a_guide_of_a_condition_acts_by_the_start_of_the_step() -> None:
    for process in (MASKED, UNIFORM):
        model = WORLD.denoiser(process)
        early = model.guided(dd.when(dd.before(0.5), Plain(G)))
        late = model.guided(dd.when(dd.after(0.5), Plain(G), Plain(H)))
        for t, s in ((0.8, 0.4), (0.5, 0.2), (0.4, 0.1)):
            first = model.guided(Plain(G)) if t > 0.5 else model
            second = model.guided(Plain(G if t <= 0.5 else H))
            assert apart(matrix(S.Ancestral(), early, t, s), matrix(S.Ancestral(), first, t, s), model, t) == 0
            assert apart(matrix(S.Ancestral(), late, t, s), matrix(S.Ancestral(), second, t, s), model, t) == 0


@pytest.mark.parametrize("process", RANK_ONE, ids=repr)
@pytest.mark.parametrize("operator", [S.Ancestral(), S.Euler(), S.Gibbs(), S.Unmask("max_prob")], ids=name)
def test_a_kernel_under_a_guide_that_draws_is_the_mean_over_its_draws(
    operator: dd.Operator, process: dd.Process
) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    model = WORLD.denoiser(process, predicts="loo")
    start = 0.8 if operator.moves else 0.4
    mean = 0.7 * matrix(operator, model.guided(Plain(G))) + 0.3 * matrix(operator, model.guided(Plain(H)))
    found = matrix(operator, model.guided(Coin(torch.stack([G, H]))))
    assert apart(found, mean, model, start) < 1e-12
    assert apart(matrix(operator, model.guided(Coin(torch.stack([H, G])))), mean, model, start) > 1e-3


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize(
    "operator", [S.ThetaTrapezoidal(), S.LocallyBalanced(), S.Ancestral() >> S.LocallyBalanced()], ids=name
)
def test_operators_of_several_predictions_draw_one_coin_for_each(
    operator: dd.Operator, process: dd.Process, failure_rate: float
) -> None:
    model, draws = WORLD.denoiser(process, predicts="loo").guided(Coin(torch.stack([G, H]))), 20_000
    sampler = (
        dd.Sampler(process, model, operator, grid=[0.8, 0.5])
        if operator.moves
        else dd.Sampler(process, model, operator, time=0.5)
    )
    start = all_states(process.states, 3)[WORLD.marginal(process, sampler.grid[0]).argmax()]
    kernel = matrix(operator, model, sampler.grid[0], 0.5)
    out = sampler.sample(initial=start.expand(draws, -1), seed=5).tokens
    law = kernel[int(state_index(start, process.states))]
    seen = torch.bincount(state_index(out, process.states), minlength=len(law)).double()
    some = law > 1e-9
    assert float(seen[~some].sum()) == 0
    assert chisquare(seen[some], law[some] * draws / law[some].sum()).pvalue > failure_rate


def test_operators_that_remember_are_refused_under_a_guide_that_draws() -> None:
    model = WORLD.denoiser(MASKED).guided(Coin(torch.stack([G, H])))
    with pytest.raises(TypeError, match=r"Multistep.*a guide that draws"):
        T.law(dd.Sampler(MASKED, model, S.Multistep(), steps=3))
    assert float(T.law(dd.Sampler(MASKED, model, S.Ancestral(), steps=3)).sum()) == pytest.approx(1)


# --- runs: splits, threads, counts ------------------------------------------------------------------------------------


def cases() -> list[object]:
    """Some operators on two processes; in the slow run every operator on two of all, by turns, that it is made for."""
    some = [(operator, process) for operator in SPLITS for process in (MASKED, UNIFORM)]
    every = []
    for number, operator in enumerate(one for one in STEPS if not isinstance(one, S.Adaptive)):
        turned = processes()[number % len(processes()) :] + processes()[: number % len(processes())]
        every += [(operator, process) for process in turned if accepted(operator, process)][:2]
    return [pytest.param(*case, id=f"{name(case[0])}-{case[1]}") for case in some] + [
        pytest.param(*case, marks=pytest.mark.slow, id=f"all-{name(case[0])}-{case[1]}") for case in every
    ]


@pytest.mark.parametrize(("operator", "process"), cases())
def test_a_row_is_its_own_under_a_guide_that_draws_and_asks(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    other = OTHER.denoiser(process, predicts="loo")
    model = WORLD.denoiser(process, predicts="loo").guided(Noisy()).guided(dd.ClassifierFree(other, 0.5))
    sampler = dd.Sampler(process, model, operator, steps=4)
    whole = sampler.sample(16, seed=3)
    for sizes in ([1] * 4, [3, 3, 3, 3, 4]):
        ends = [0, *itertools.accumulate(sizes)]
        parts = [sampler.sample(size, seed=3, first_row=row).tokens for row, size in zip(ends, sizes, strict=False)]
        assert torch.equal(torch.cat(parts), whole.tokens[: ends[-1]])
    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(sampler.sample, 8, seed=3, first_row=row) for row in (0, 8)]
        assert torch.equal(torch.cat([thread.result().tokens for thread in threads]), whole.tokens)
    wrong = [sampler.sample(8, seed=3, first_row=row).tokens for row in (0, 9)]
    assert not torch.equal(torch.cat(wrong), whole.tokens) or isinstance(operator, S.Greedy)


def test_calls_of_all_networks_are_counted_by_name() -> None:
    for process in (MASKED, UNIFORM):
        other = dd.Denoiser(
            OTHER.denoiser(process).fn,
            process,
            "denoiser",
            time="alpha",
            time_dtype=torch.float64,
            length=3,
            name="free",
            cost=2.0,
        )
        model = WORLD.denoiser(process)
        sampler = dd.Sampler(process, dd.classifier_free(model, other, 1.0), S.Ancestral(), steps=8)
        out = sampler.sample(64, seed=0)
        assert (out.nfe, out.calls, sampler.nfe, sampler.calls) == (
            16,
            {"model": 8, "free": 8},
            16.0,
            {"model": 8.0, "free": 8.0},
        )
        assert out.queries == 16 * 64 * 3 or process.absorbing
        assert torch.equal(out.nfe_rows, torch.full((64,), 16)) or process.absorbing
        named = dd.Sampler(
            process, {"c": model.guided(dd.ClassifierFree("u", 1.0)), "u": other}, S.Ancestral(), steps=8
        )
        again = named.sample(64, seed=0)
        assert again.calls == {"c": 8, "u": 8}
        assert torch.equal(again.tokens, out.tokens)
        assert (named.cost, sampler.cost) == (None, None)
        still = dd.Sampler(process, dd.classifier_free(model, other, 0.0), S.Ancestral(), steps=8)
        assert (still.nfe, still.sample(64, seed=0).calls) == (8.0, {"model": 8})


def test_two_guides_in_one_slot_keep_their_streams_apart(failure_rate: float) -> None:
    """An operator's choice and guides' choices of the same name, in one slot, are independent draws."""
    same = Coin(torch.stack([G, H]), 0.5, name="where")  # Ancestral's own choice is called "where"
    model = WORLD.denoiser(UNIFORM).guided(same).guided(same)
    sampler = dd.Sampler(UNIFORM, model, S.Ancestral(), steps=1)
    with dd.alone():
        nodes = pyro.poutine.trace(lambda: sampler.sample(4096, seed=0, listen=True)).get_trace().nodes
    assert [site for site in nodes if "guide" in site] == ["1.0.guide0.where", "1.0.guide1.where"]
    sides = [nodes[f"1.0.guide{number}.where"]["value"] for number in (0, 1)]
    same = int((sides[0] == sides[1]).sum())
    assert binomtest(same, 4096, 0.5).pvalue > failure_rate


def test_choices_of_guides_are_no_part_of_the_log_probability() -> None:
    law = torch.stack([G, G])
    coin = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(Coin(law)), S.Ancestral(), steps=3).sample(
        8, seed=0, record=True
    )
    plain = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(Plain(G)), S.Ancestral(), steps=3).sample(
        8, seed=0, record=True
    )
    assert torch.equal(coin.tokens, plain.tokens)
    torch.testing.assert_close(coin.log_prob, plain.log_prob)


# --- rewards, errors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewarded(dd.Guide):
    """Counts and checks rewards of the noisy tokens."""

    value: float = 1.0

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        x = at.sequence(prediction.x)
        found = at.reward(lambda x: torch.where(x[:, 0] >= 0, self.value, 0.0).float(), x)
        assert found.dtype == torch.float64
        return prediction


def test_rewards_are_counted_and_checked() -> None:
    out = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(Rewarded()), S.Ancestral(), steps=4).sample(8, seed=0)
    assert out.rewards == 32
    for bad in (float("nan"), float("inf")):
        sampler = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(Rewarded(bad)), S.Ancestral(), steps=4)
        with pytest.raises(ValueError, match=r"Rewarded.*the reward of sequence 0, \[\d, \d, \d\], is"):
            sampler.sample(8, seed=0)
    dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(Rewarded(-float("inf"))), S.Ancestral(), steps=4).sample(
        8, seed=0
    )


class Wrong(dd.Guide):
    """Returns another thing than it should."""

    def __init__(self, made: object) -> None:
        self.made = made

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        return self.made(prediction, state, at)  # type: ignore[operator,no-any-return]


class Silent(Coin):
    """Draws, and does not declare it."""

    random = False


def test_a_guide_that_breaks_its_word_is_named() -> None:
    model, other = WORLD.denoiser(UNIFORM), OTHER.denoiser(UNIFORM)
    x = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"(?s)Silent.*declare random = True"):
        dd.Sampler(UNIFORM, model.guided(Silent(torch.stack([G, H]))), S.Ancestral(), steps=2).sample(2, seed=0)
    with pytest.raises(TypeError, match=r"draws, so it takes a run"):
        model.guided(Coin(torch.stack([G, H])))(x, 0.5)
    with pytest.raises(TypeError, match="a guide returns a Prediction, got 3"):
        model.guided(lambda said: 3)(x, 0.5)
    with pytest.raises(ValueError, match="same tokens, alpha and process"):
        model.guided(lambda said: said.select(torch.tensor([1, 0])) if bool((said.x[0] != said.x[1]).any()) else said)(
            torch.tensor([[0, 1, 2], [1, 1, 1]]), 0.5
        )
    with pytest.raises(ValueError, match=r"asks Denoiser.*not in its models"):
        model.guided(Wrong(lambda said, state, at: at.ask(other, state)))(x, 0.5)
    with pytest.raises(TypeError, match="a guide is given its prediction"):
        model.guided(Wrong(lambda said, state, at: at.predict(state)))(x, 0.5)
    with pytest.raises(ValueError, match=r"asks .*Masked.*is for Uniform"):
        model.guided(dd.ClassifierFree(OTHER.denoiser(MASKED)))
    with pytest.raises(ValueError, match="a guide asks the model 'free'; there are"):
        dd.Sampler(UNIFORM, model.guided(dd.ClassifierFree("free")), S.Ancestral(), steps=2)
    with pytest.raises(TypeError, match="got the class Coin"):
        model.guided(Coin)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is an operator"):
        model.guided(S.Gibbs())  # type: ignore[arg-type]
    for mixed in (
        lambda: dd.when(dd.before(0.5), S.Gibbs(), Plain(G)),
        lambda: dd.when(dd.before(0.5), Plain(G), S.Gibbs()),
    ):
        with pytest.raises(TypeError, match="when takes operators"):
            mixed()
