"""Faults that an attack on guides found: denoisers asked by name, for some rows, behind contexts; large tilts."""

from dataclasses import dataclass

import pytest
import torch
from guides import Coin, Plain, table
from problems import strong, weak
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import GuideAt
from discdiff.theory.world import state_index

WORLD, OTHER = strong(), weak()
G, H = table(3, 3, 0, 3.0), table(3, 3, 1, 3.0)
COIN = Coin(torch.stack([G, H]))
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
PROCESSES = [MASKED, UNIFORM]
pytestmark = pytest.mark.usefixtures("as_user")


@dataclass(frozen=True, eq=False)
class Asks(dd.Guide):
    """Combines with other denoisers, which it may ask at some rows, twice, or under a name."""

    asked: dd.Denoiser | str
    how: str = "once"
    nfe = 1.0

    @property
    def models(self) -> tuple[dd.Denoiser | str, ...]:
        return (self.asked,)

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        if self.how == "rows":  # every row twice, in reversed order
            index = torch.arange(len(state.rows)).flip(0).repeat(2)
            said = at.ask(self.asked, state.select(index))
            own = at.ask(self.asked, state)
            torch.testing.assert_close(said.select(index.argsort(stable=True)[::2]).denoiser, own.denoiser)
            return prediction
        said = at.ask(self.asked, state)
        if self.how == "twice":
            said = said.combined([at.ask(self.asked, state, name="again")], [0.5, 0.5])
        return prediction.combined([said], [1.5, -0.5])


def law_of_samples(sampler: dd.Sampler, draws: int, failure_rate: float) -> None:
    """Compare ``T.law`` of a sampler with its samples."""
    law = T.law(sampler)
    seen = torch.bincount(state_index(sampler.sample(draws, seed=1).tokens, 3), minlength=27).double()
    some = law > 1e-9
    assert float(seen[~some].sum()) == 0
    assert chisquare(seen[some], law[some] * draws / law[some].sum()).pvalue > failure_rate


# --- guides that ask a denoiser whose guides draw --------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_guide_draws_if_a_denoiser_that_it_asks_does(process: dd.Process) -> None:
    model, other = WORLD.denoiser(process), OTHER.denoiser(process)

    def kernel(asked: dd.Denoiser) -> Tensor:
        return T.kernel(S.Ancestral(), process, model.guided(dd.ClassifierFree(asked, -0.5)), t=0.8, s=0.4)

    mean = 0.7 * kernel(other.guided(Plain(G))) + 0.3 * kernel(other.guided(Plain(H)))
    possible = WORLD.reachable(process, 0.8)
    assert float((kernel(other.guided(COIN)) - mean)[possible].abs().max()) < 1e-12
    assert float((kernel(other.guided(Plain(G))) - mean)[possible].abs().max()) > 1e-2, "planted: one value of the coin"
    with pytest.raises(TypeError, match=r"(?s)ClassifierFree.*draws, so it takes a run"):
        model.guided(dd.ClassifierFree(other.guided(COIN)))(process.prior(2, 3).sample(), 1.0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_law_of_a_guide_that_asks_a_drawing_denoiser_by_its_name(process: dd.Process, failure_rate: float) -> None:
    models = {"c": WORLD.denoiser(process).guided(Asks("u")), "u": OTHER.denoiser(process).guided(COIN)}
    law_of_samples(dd.Sampler(process, models, S.Ancestral(), steps=2), 20_000, failure_rate)
    with pytest.raises(TypeError, match=r"Multistep.*a guide that draws"):
        T.law(dd.Sampler(process, models, S.Multistep(), steps=3))


def test_questions_to_one_drawing_denoiser_are_told_apart_by_a_name() -> None:
    asked = OTHER.denoiser(UNIFORM).guided(COIN)
    out = dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(Asks(asked, "twice")), S.Ancestral(), steps=2).sample(
        64, seed=0, record="choices"
    )
    assert out.choices is not None
    first, again = (out.choices.guides[f"1.0.guide0.0{name}.guide0.side"] for name in ("", ".again"))
    assert not torch.equal(first, again)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("kind", ["tilted", "truncated", "asking"])
def test_the_law_of_an_operator_that_scores_clean_tokens(kind: str, process: dd.Process, failure_rate: float) -> None:
    """All autoregressive predictions have the same blank tokens, but each is its clean tokens' own."""
    other = OTHER.denoiser(process)
    guides = {"tilted": Plain(G), "truncated": dd.Truncation(0.5), "asking": dd.ClassifierFree(other, 1.0)}
    model = WORLD.denoiser(process).guided(guides[kind])
    law_of_samples(dd.Sampler(process, model, S.ARPC("nll"), grid=[1.0, 0.4, 0.0]), 10_000, failure_rate)


# --- names, rows, contexts --------------------------------------------------------------------------------------------


def test_a_guide_that_asks_the_denoiser_it_guides_is_refused() -> None:
    model = WORLD.denoiser(UNIFORM)
    with pytest.raises(ValueError, match=r"guides of .*Asks.* ask, in the end, 'c' itself"):
        dd.Sampler(UNIFORM, {"c": model.guided(Asks("c"))}, S.Ancestral(), steps=2)
    with pytest.raises(ValueError, match=r"ask, in the end, '[cu]' itself"):
        both = {"c": model.guided(Asks("u")), "u": model.guided(Asks("c"))}
        dd.Sampler(UNIFORM, both, S.Ancestral(), steps=2)
    # the guides of a step are not those of the denoiser that it names
    plan = dd.Plan([1.0, 0.0], [dd.Step(S.Ancestral(), [Asks("c")])])
    assert dd.Sampler(UNIFORM, {"c": model}, plan=plan).sample(2, seed=0).calls == {"c": 2}
    assert dd.Sampler(UNIFORM, model.guided(Asks(model)), S.Ancestral(), steps=2).sample(2, seed=0).calls == {
        "model": 4
    }


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_guide_asks_about_some_rows_in_any_order_behind_prompts(process: dd.Process) -> None:
    model = WORLD.denoiser(process).guided(Asks(OTHER.denoiser(process), "rows"))
    dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(), steps=3).sample(3, seed=0, prompt=[[0], [1], [2]])
    dd.Sampler(process, model, dd.mix({S.Ancestral(): 0.5, S.SplitLeap(): 0.5}), steps=3).sample(5, seed=0, prompt=[0])


class Elsewhere(Asks):
    """Asks about a row that the prediction lacks."""

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        at.ask(self.asked, dd.State(state.tokens[:1], state.t, state.rows[:1] + 7))
        return prediction


def test_a_guide_that_asks_about_an_unknown_row_is_told() -> None:
    model = WORLD.denoiser(UNIFORM).guided(Elsewhere(OTHER.denoiser(UNIFORM)))
    with pytest.raises(ValueError, match=r"Elsewhere.*asks about row 7, which the prediction does not have"):
        dd.Sampler(UNIFORM, model, S.Ancestral(), steps=2).sample(3, seed=0, prompt=[[0], [1], [2]])


def test_guides_that_ask_are_refused_where_the_asked_denoisers_would_not_know_the_held_sites() -> None:
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    model = dd.Denoiser(lambda x, t: weights[x] + weights[x.roll(1, -1)], UNIFORM, "loo")
    guided, moving = model.guided(dd.ClassifierFree(model, 0.5)), torch.tensor([True, False, True])
    x0 = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"condition: ClassifierFree.*hold them in each denoiser first"):
        guided.condition(x0, moving)
    with pytest.raises(ValueError, match=r"marginal: ClassifierFree.*hold them in each denoiser first"):
        guided.marginal(moving)
    held = model.condition(x0, moving)
    held.guided(dd.ClassifierFree(held, 0.5))(torch.zeros(2, 2, dtype=torch.int64), 0.5)
    assert len(model.guided(Plain(G)).condition(x0, moving).guides) == 1
    for one in (model.condition(x0[:2], moving[:2]), model.guided(dd.ClassifierFree(model.condition(x0, moving)))):
        with pytest.raises(ValueError, match=r"Blockwise: .* has a context of its own"):
            dd.Blockwise(UNIFORM, one, S.Ancestral(), block=2, steps=2)


def test_a_new_schedule_is_checked_against_the_denoisers_that_guides_ask() -> None:
    model = WORLD.denoiser(UNIFORM).guided(dd.ClassifierFree(OTHER.denoiser(UNIFORM)))
    with pytest.raises(ValueError, match=r"with_schedule: .*asks .*Linear.*is for Uniform\(3, Cosine\(\)\)"):
        model.with_schedule(dd.Cosine())
    assert len(WORLD.denoiser(UNIFORM).guided(Plain(G)).with_schedule(dd.Cosine()).guides) == 1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("whole", "yes", r"Declares\.whole must be True or False, got 'yes'"),
        ("models", (3,), r"Declares\.models must be a tuple of denoisers or their names, got \(3,\)"),
        ("models", [], r"Declares\.models must be a tuple of denoisers or their names, got \[\]"),
        ("random", 1, r"Declares\.random must be True or False, got 1"),
    ],
)
def test_wrong_attributes_of_a_guide_are_named(name: str, value: object, says: str) -> None:
    guide = type("Declares", (Plain,), {name: value})(G)
    with pytest.raises(TypeError, match=says):
        WORLD.denoiser(UNIFORM).guided(guide)


@pytest.mark.parametrize("who", ["asked by an object", "asked by name", "asked by a step"])
def test_dropout_of_an_asked_network_is_told(who: str) -> None:
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.drop(torch.ones(*x.shape, 3))

    model, asked = WORLD.denoiser(UNIFORM), dd.Denoiser(Dropping(), UNIFORM, "loo")
    steps = [dd.Step(S.Ancestral(), [dd.ClassifierFree("u")])]
    plan = dd.Plan([1.0, 0.0], steps if who == "asked by a step" else [dd.Step(S.Ancestral())])
    guided = {"asked by an object": dd.ClassifierFree(asked), "asked by name": dd.ClassifierFree("u")}
    main = model.guided(guided[who]) if who in guided else model
    with pytest.warns(UserWarning, match="Dropout 'drop' drops units"):
        dd.Sampler(UNIFORM, {"c": main, "u": asked}, plan=plan).sample(2, seed=0)


def test_rows_whose_times_need_different_guides_are_refused_outside_a_run() -> None:
    model, x = WORLD.denoiser(UNIFORM).guided(dd.when(dd.before(0.5), Plain(G))), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"different guides act, such as \[0\.25, 0\.75\]"):
        model(x, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(model(x, torch.tensor([0.6, 0.75])).loo[:1], model(x[:1], 0.6).loo, atol=1e-6, rtol=0)
    # the sites of a row share its largest time
    clean = torch.tensor([[0.0, 0.75, 0.75], [0.75, 0.75, 0.75]])
    torch.testing.assert_close(model(x, clean).loo[1:], model(x[1:], 0.75).loo)
    assert model(x[:0], torch.zeros(0)).loo.shape == (0, 3, 3)
    assert WORLD.denoiser(UNIFORM).guided(Plain(G))(x[:0], torch.zeros(0)).loo.shape == (0, 3, 3)


# --- plans and conditions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(dd.Guide):
    """A tilt in a dataclass whose comparison has no answer, as its field is an array."""

    log_g: Tensor

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        return prediction.tilted(lambda row, position: self.log_g[position])


def test_steps_whose_guides_hold_arrays_are_compared(failure_rate: float) -> None:
    steps = [dd.Step(S.Ancestral(), [Fixed(one)]) for one in (G, H)]
    plan = dd.Plan([1.0, 0.5, 0.0], steps)
    assert plan != dd.Plan([1.0, 0.5, 0.0], steps[:1] * 2)
    assert plan == dd.Plan([1.0, 0.5, 0.0], steps)
    assert not plan.alike
    assert "Step(Ancestral()" in repr(plan)
    law_of_samples(dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM), plan=plan), 10_000, failure_rate)


def test_the_law_of_an_operator_that_remembers_keeps_the_guides_of_the_earlier_step(failure_rate: float) -> None:
    model = WORLD.denoiser(UNIFORM).guided(dd.when(dd.before(0.6), Plain(G), Plain(H)))
    law_of_samples(dd.Sampler(UNIFORM, model, S.Multistep(), grid=[1.0, 0.7, 0.5, 0.2, 0.0]), 20_000, failure_rate)


def test_errors_of_a_file_name_the_step_once() -> None:
    plan = dd.Plan([1.0, 0.0], [dd.Step(S.Ancestral(), [dd.when(dd.before(0.5), dd.Truncation(temperature=0.5))])])
    text = plan.to_json()
    for right, wrong, says in (
        ("temperature=0.5", "temperature=-1", "Truncation: temperature must lie in"),
        ("top_k=None", "top_k='a'", "Truncation: top_k"),
        ("top_k=None", "top_k=2, top_k=None", "cannot read"),
    ):
        assert right in text
        with pytest.raises((TypeError, ValueError), match=rf"^Plan\.from_json: step 1: guide 1: {says}") as found:
            dd.Plan.from_json(text.replace(right, wrong))
        assert str(found.value).count("Plan.from_json") == 1


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("constant", [7e4, -7e4, 1e39, -1e39])
def test_a_constant_in_a_tilt_costs_no_digits(constant: float, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    said = dd.Prediction(logits, "loo", torch.zeros(2, 3, dtype=torch.int64), 0.5, UNIFORM)
    tilted = said.tilted(torch.full((2, 3, 3), constant, dtype=torch.float64))
    # a double keeps 16 digits of the sum: at 1e39 all tokens tie, and the law is uniform
    exact = said.loo if abs(constant) < 1e9 else torch.full((2, 3, 3), 1 / 3).log()
    torch.testing.assert_close(tilted.loo, exact, atol=1e-6, rtol=0)


def test_errors_of_changed_logits_name_the_guides() -> None:
    with pytest.raises(ValueError, match=r"row 0, position 0: .*; guides changed them: Forbid\(tokens=\(0, 1, 2\)\)"):
        dd.Sampler(UNIFORM, WORLD.denoiser(UNIFORM).guided(dd.Forbid([0, 1, 2])), S.Ancestral(), steps=2).sample(
            2, seed=0
        )
    x = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tilted: log_g must give \(3, 3\) at 3 sites, got None"):
        _ = WORLD.denoiser(UNIFORM).guided(lambda said: said.tilted(lambda row, position: None))(x, 0.5).loo
