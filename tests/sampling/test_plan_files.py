"""Plans as text: what comes back, what cannot be written, and files that are damaged or hostile."""

import builtins
import json
import random
import re
import string
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from guides import Coin
from operators import CORRECTORS, PREDICTORS

import discdiff as dd
from discdiff import samplers as S
from discdiff.operator import Between, When
from discdiff.sampling import notation

pytestmark = pytest.mark.usefixtures("as_user")

UNIFORM = dd.Uniform(3, dd.Linear())
MODEL = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), UNIFORM, "loo")
ODD = (0.1 + 0.2, 1 / 3, 1e-300, 0.1)  # numbers whose last digits are lost by a short format
LATE = dd.before(ODD[1])


def written(operator: dd.Operator) -> bool:
    return not (isinstance(operator, S.P2) and operator.planner is not None)


OPERATORS: list[dd.Operator] = [
    *filter(written, PREDICTORS),
    *CORRECTORS,
    S.Ancestral() >> S.Gibbs() >> S.ForwardBackward(ODD[0]),
    S.Ancestral() >> (S.Gibbs() >> S.Remask()),
    S.Gibbs() >> (S.Ancestral() >> S.Gibbs() ** 2),
    (S.Gibbs() >> S.Remask()) ** 3,
    (S.Gibbs() ** 2) ** 3,
    S.Gibbs() ** 0,
    dd.mix({S.Ancestral(): ODD[1], S.Euler() >> S.Gibbs(): 1 - ODD[1]}),
    dd.mix({S.Gibbs(): ODD[0], S.Gibbs(sites=2) ** 2: 0.2, dd.mix({S.Remask(): 1.0}): 0.5 - 1e-17}),
    dd.when(LATE, S.Ancestral(), dd.when(dd.after(ODD[2]), S.Euler(), S.SplitLeap() >> S.Gibbs())),
    dd.when(dd.between(0.1, ODD[0]), S.Gibbs(), S.Remask() ** 2),
    S.Ancestral() >> dd.when(dd.after(0.5), S.Gibbs(), dd.mix({S.Gibbs(): 0.5, S.Remask(): 0.5})) ** 2,
    S.RePaint(ODD[0], dd.when(LATE, S.Euler(), S.Ancestral() >> S.Gibbs()), steps=2),
    S.ReMDM(eta=ODD[1]),
]
MASK = torch.tensor([[True, False, True], [False, True, True]])
GUIDES: list[object] = [
    dd.Truncation(),
    dd.Truncation(temperature=ODD[0], top_k=3, top_p=ODD[1], min_p=1e-300, of="denoiser"),
    dd.Forbid([0, 2]),
    dd.Forbid(torch.tensor([1])),
    dd.Forbid([]),
    dd.Allow(MASK),
    dd.ClassifierFree("u", -ODD[0]),
    dd.ClassifierFree('a name\'s "quotes", \\ and\nlines; naïve 中 \ud800', 1e300),
    dd.when(LATE, dd.ClassifierFree("u", 1.5)),
    dd.when(dd.between(-1.0, ODD[0]), dd.Truncation(top_k=2), dd.when(dd.after(0.0), dd.Forbid([1]))),
]


def plan_of(operator: dd.Operator, guides: list[object] = [], model: str | None = None) -> dd.Plan:  # noqa: B006
    return dd.Plan([1.0, ODD[1], 0.0] if operator.moves else [ODD[0]],
                   [dd.Step(operator, guides, model)] * (1 + operator.moves))  # type: ignore[arg-type]  # fmt: skip


def name(thing: object) -> str:
    return repr(thing).partition(" at 0x")[0].encode("ascii", "replace").decode()


# --- what comes back --------------------------------------------------------------------------------------------------


def comes_back(plan: dd.Plan) -> None:
    text = plan.to_json()
    again = dd.Plan.from_json(text)
    assert again == plan
    assert (again.grid, again.steps) == (plan.grid, plan.steps)
    assert again.to_json() == text
    assert json.loads(text).keys() == {"grid", "steps"}
    text.encode("ascii")


@pytest.mark.parametrize("operator", OPERATORS, ids=name)
def test_every_operator_comes_back(operator: dd.Operator) -> None:
    plan = plan_of(operator, model="small")
    comes_back(plan)
    back = dd.Plan.from_json(plan.to_json()).steps[0].operator
    assert (type(back), repr(back)) == (type(operator), repr(operator))
    assert (back.width, back.nfe, back.order) == (operator.width, operator.nfe, operator.order)
    assert plan != plan_of(operator, [dd.Forbid([0])], "small"), "planted: another plan"


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_every_guide_comes_back(guide: object) -> None:
    plan = plan_of(S.Ancestral(), [guide, dd.Truncation(top_k=2)])
    comes_back(plan)
    assert plan != plan_of(S.Ancestral(), [dd.Truncation(top_k=2), guide]) or guide == dd.Truncation(top_k=2)


def test_numbers_come_back_exactly() -> None:
    values = random.Random(0)
    for _ in range(200):
        number = values.random()
        step = dd.Step(
            S.ReMDM(eta=number), [dd.Truncation(temperature=number), dd.when(dd.after(number), dd.Forbid([1]))]
        )
        back = dd.Plan.from_json(dd.Plan([1.0, number, 0.0], [step] * 2).to_json())
        condition = back.steps[0].guides[1].condition  # type: ignore[union-attr]
        assert back.grid[1] == back.steps[0].operator.eta == back.steps[0].guides[0].temperature == number  # type: ignore
        assert condition == dd.after(number)
    assert not condition(number + 1e-9)


def test_a_plan_of_a_thousand_steps_is_written_at_once() -> None:
    plan = dd.Plan([1 - n / 1000 for n in range(1001)], [dd.Step(S.Ancestral() >> S.Gibbs(), [dd.Forbid([1])])] * 1000)
    start = time.process_time()
    comes_back(plan)
    assert time.process_time() - start < 10


# --- what cannot be written -------------------------------------------------------------------------------------------


class Mine(S.Ancestral):
    """An operator of one's own."""


class Ancestral(S.Ancestral):
    """One with the name of a shipped operator."""


class Later(Between):
    """A condition of one's own with a shipped one's repr."""

    def __call__(self, t: float) -> bool:
        return t < self.low


class Either(When):
    """A composition of one's own."""


UNWRITTEN: dict[str, tuple[Callable[[], dd.Step], str]] = {
    "a lambda": (
        lambda: dd.Step(dd.when(lambda t: t < 0.5, S.Ancestral(), S.Euler())),
        "step 2: operator: when: the condition: <function .*<lambda>",
    ),
    "a lambda within": (
        lambda: dd.Step(S.Ancestral() >> dd.when(lambda t: t < 0.5, S.Gibbs(), S.Remask()) ** 2),
        "step 2: operator: when: the condition: <function .*<lambda>",
    ),
    "a lambda of a guide": (
        lambda: dd.Step(S.Ancestral(), [dd.when(lambda t: True, dd.Forbid([1]))]),
        "step 2: guide 1: when: the condition: <function .*<lambda>",
    ),
    "a condition of one's own": (
        lambda: dd.Step(dd.when(Later(0.5, 1.0), S.Ancestral(), S.Euler())),
        "step 2: operator: when: the condition: between",
    ),
    "a composition of one's own": (lambda: dd.Step(Either(LATE, S.Ancestral(), S.Euler())), "step 2: operator: when"),
    "an operator": (lambda: dd.Step(Mine()), r"step 2: operator: Mine\(\)"),
    "an operator of a shipped name": (lambda: dd.Step(Ancestral()), r"step 2: operator: Ancestral\(\)"),
    "an operator within": (lambda: dd.Step(dd.mix({Mine() >> S.Gibbs(): 1.0})), r"step 2: operator: Mine\(\)"),
    "a predictor of RePaint": (
        lambda: dd.Step(S.Ancestral() >> S.RePaint(0.5, Mine())),
        r"step 2: operator: RePaint: predictor: Mine\(\)",
    ),
    "a planner": (
        lambda: dd.Step(S.P2(planner=lambda x: -x.double())),
        "step 2: operator: P2: planner: <function .*<lambda>",
    ),
    "a guide": (lambda: dd.Step(S.Ancestral(), [dd.Forbid([1]), Coin(torch.zeros(2, 2, 3))]), "step 2: guide 2: Coin"),
    "a function": (lambda: dd.Step(S.Ancestral(), [lambda said: said]), "step 2: guide 1: <function .*<lambda>"),
    "a guide within": (
        lambda: dd.Step(S.Ancestral(), [dd.when(LATE, Coin(torch.zeros(2, 2, 3)))]),
        "step 2: guide 1: Coin",
    ),
    "a denoiser": (
        lambda: dd.Step(S.Ancestral(), [dd.ClassifierFree(MODEL, 0.5)]),
        "step 2: guide 1: ClassifierFree: unconditional: Denoiser",
    ),
    "a long mask": (
        lambda: dd.Step(S.Ancestral(), [dd.Allow(torch.ones(400, 400).bool())]),
        "step 2: guide 1: Allow.* characters",
    ),
}


@pytest.mark.parametrize("what", UNWRITTEN)
def test_what_a_file_cannot_hold_is_named(what: str) -> None:
    make, text = UNWRITTEN[what]
    plan = dd.Plan([1.0, 0.5, 0.0], [dd.Step(S.Ancestral()), make()])
    with pytest.raises(ValueError, match=f"^Plan.to_json: {text}"):
        plan.to_json()
    assert plan == dd.Plan([1.0, 0.5, 0.0], plan.steps)
    assert plan != dd.Plan([1.0, 0.4, 0.0], plan.steps)


def test_what_is_nested_too_deep_is_not_written() -> None:
    deep: dd.Operator = S.Gibbs()
    for _ in range(250):  # what Python's parser cannot read again
        deep = S.Gibbs() >> deep
    with pytest.raises(ValueError, match="step 1: operator: "):
        dd.Plan([0.5], [dd.Step(deep)]).to_json()
    flat: dd.Operator = S.Gibbs()
    for _ in range(200):
        flat = flat >> S.Gibbs()
    comes_back(dd.Plan([0.5], [dd.Step(flat)]))


# --- damaged and hostile files ----------------------------------------------------------------------------------------

GOOD = {"operator": "Ancestral()", "guides": ["Forbid(tokens=[1])"], "model": None}
TEXT = dd.Plan(
    [1.0, 0.5, 0.0],
    [
        dd.Step(S.Ancestral() >> S.Gibbs() ** 2, [dd.when(LATE, dd.Allow(MASK))], "a"),
        dd.Step(dd.mix({S.Euler(): 0.5, S.Ancestral(): 0.5}), [dd.ClassifierFree("u")]),
    ],
).to_json()


def held(*steps: object, grid: object = (1.0, 0.0)) -> str:
    return json.dumps({"grid": grid, "steps": steps})


WRONG_JSON: dict[str, str] = {
    "empty": "", "no JSON": "Plan([1, 0])", "cut": TEXT[:-20], "null": "null", "a number": "3", "a list": "[1, 2]",
    "a string": '"x"', "no steps": '{"grid": [1, 0]}', "no grid": json.dumps({"steps": [GOOD]}), "{}": "{}",
    "another key": json.dumps({"grid": [1, 0], "steps": [GOOD], "code": "x"}), "deep": "[" * 100_000,
    "a key twice": '{"grid": [1.0, 0.0], "grid": [1.0, 0.5], "steps": []}',
    "a key of a step twice": held(GOOD).replace('"model": null', '"model": null, "model": "b"'),
    "huge number": '{"grid": [' + "9" * 100_000 + ', 0.0], "steps": []}',
    "steps a mapping": held(grid=[1, 0])[:-3] + "{}}", "steps a string": json.dumps({"grid": [1, 0], "steps": "x"}),
    "grid a string": held(GOOD, grid="10"), "grid a mapping": held(GOOD, grid={"1": 0, "0": 1}),
    "grid null": held(GOOD, grid=None), "grid of strings": held(GOOD, grid=["1", "0"]),
    "grid of bools": held(GOOD, grid=[True, False]), "grid nested": held(GOOD, grid=[[1.0, 0.0]]),
    "grid empty": held(grid=[]), "grid nan": held(GOOD, grid=[float("nan"), 0.0]),
    "grid inf": held(GOOD, grid=[float("inf"), 0.0]), "grid that grows": held(GOOD, grid=[0.0, 1.0]),
    "grid outside": held(GOOD, grid=[1.5, 0.0]), "too few steps": held(grid=[1.0, 0.0]),
    "too many steps": held(GOOD, GOOD), "a step of null": held(None),
    "a step of a list": held(["Ancestral()", [], None]),
    "a step without guides": held({"operator": "Ancestral()", "model": None}),
    "a step with more": held(GOOD | {"x": 1}), "operator null": held(GOOD | {"operator": None}),
    "operator a number": held(GOOD | {"operator": 3}), "operator a list": held(GOOD | {"operator": ["Ancestral()"]}),
    "guides null": held(GOOD | {"guides": None}), "guides a string": held(GOOD | {"guides": "Forbid([1])"}),
    "guides a mapping": held(GOOD | {"guides": {"Forbid([1])": 1}}), "a guide null": held(GOOD | {"guides": [None]}),
    "model a number": held(GOOD | {"model": 3}), "model a list": held(GOOD | {"model": ["a"]}),
    "a corrector": held(GOOD | {"operator": "Gibbs()"}), "a predictor at one time": held(GOOD, grid=[0.5]),
    "an operator among guides": held(GOOD | {"guides": ["Gibbs()"]}),
    "a condition among guides": held(GOOD | {"guides": ["before(0.5)"]}),
    "a guide as operator": held(GOOD | {"operator": "Forbid([1])"}),
    "a number as guide": held(GOOD | {"guides": ["3"]}),
}  # fmt: skip

WRONG_TEXT = [
    "", " ", "3", "'x'", "None", "True", "[]", "{}", "Ancestral", "Ancestral()()", "Ancestral().order",
    "(Ancestral().__class__)()", "Ancestral.__init__", "__import__('os').system('true')", "eval('1')", "exec('1')",
    "open('x')", "print()", "Mine()", "Plan()", "Denoiser()", "lambda: Ancestral()", "[Ancestral() for x in [1]]",
    "{x for x in [1]}", "(x for x in [1])", "{1: x for x in [1]}", "Ancestral() if True else Euler()",
    "Ancestral() and Euler()", "not Ancestral()", "Ancestral() == Euler()", "Ancestral() + Gibbs()",
    "Ancestral() >> Euler()", "Ancestral() ** 2", "Ancestral() >> 3", "3 >> Ancestral()", "Ancestral() >> Forbid([1])",
    "Ancestral() >> ", "Ancestral() @ Gibbs()", "Ancestral() << Gibbs()", "~Ancestral()", "-Ancestral()",
    "Ancestral()[0]", "Ancestral(*[1])", "Ancestral(**{})", "Ancestral(1)", "Ancestral(x=1)",
    "Gibbs(sites=1, sites=2) >> Ancestral()", "Gibbs(sites=0) >> Ancestral()", "Gibbs(sites=1.5) >> Ancestral()",
    "Gibbs(sites='1') >> Ancestral()", "Gibbs(sites=[1]) >> Ancestral()", "Gibbs(scan=[]) >> Ancestral()",
    "Gibbs(scan={}) >> Ancestral()", "Ancestral() >> Gibbs() ** True", "Ancestral() >> Gibbs() ** -1",
    "Ancestral() >> Gibbs() ** 1.5", "Ancestral() >> Gibbs() ** 10 ** 10", "10**10**10", "10 ** 10",
    "Ancestral() >> Gibbs() ** (10**10)", "ReMDM(eta=10**10**10)", "ReMDM(eta=1e999)", "ReMDM(eta=nan)",
    "ReMDM(eta=-inf)", "Gibbs(sites=" + "9" * 5000 + ")", "Gibbs(sites=0x" + "f" * 5000 + ")",
    "Gibbs() ** 0x" + "f" * 5000, "ReMDM(eta=0x" + "f" * 5000 + ")", "(" * 100_000, "-" * 100_000 + "1",
    "not " * 100_000 + "1", "[" * 100_000, "Ancestral()" + " >> Gibbs()" * 30_000, "Ancestral()" + ".x" * 100_000,
    "Ancestral" + "()" * 100_000, "a**" * 100_000 + "a", "lambda:" * 50_000 + "1", "when(" * 150 + "1" + ")" * 150,
    "1" * 600_000, "\x00", "Ancestral()\x00", "\ud800", "Ancestral()\n", "x = Ancestral()", "import os",
    "Ancestral(); Euler()", "Ancestral(), Euler()", "await Ancestral()", "yield Ancestral()", "(x := Ancestral())",
    "f'{Ancestral()}'", "b'x'", "...", "1j", "'a' 'b'", "mix()", "mix({})", "mix([Ancestral()])",
    "mix({Ancestral(): 0.5})", "mix({Ancestral(): 1.0, Gibbs(): 0.0})", "mix({Ancestral(): '1'})", "mix({'x': 1.0})",
    "mix({[1]: 1.0})", "mix({Ancestral(): 1.0, **{}})", "mix({Ancestral(): 0.5, Ancestral(): 0.5})", "mix(3)",
    "mix({Ancestral(): 1e999})", "when()", "when(before(0.5))", "when(before(0.5), Ancestral(), None)",
    "when(before(0.5), Ancestral(), Gibbs())", "when(before(0.5), Ancestral(), Forbid([1]))",
    "when(Ancestral(), Ancestral(), Euler())", "when(Forbid([1]), Ancestral(), Euler())",
    "when(Truncation(), Ancestral(), Euler())", "when(condition=Gibbs(), yes=Ancestral(), no=Euler())",
    "when(True, Ancestral(), Euler())", "when(before, Ancestral(), Euler())", "when('t < 1', Ancestral(), Euler())",
    "before(0.5)", "before('x')", "before(nan)", "between(1, 0)", "between(0.5)", "after([])",
    "RePaint(0.5, 3) >> Ancestral()", "RePaint(predictor=Gibbs()) >> Ancestral()", "P2(planner=before(0.5))",
    "Unmask(select=None)", "Unmask(block=[])", "ARPC({})", "Truncation(temperature=-1)", "Truncation(of=[])",
    "Forbid(3)", "Forbid('ab')", "Forbid([-1])", "Forbid([1.5])", "Forbid([[1]])", "Forbid()", "Allow([])",
    "Allow([[1, 0]])", "Allow([[True], [True, False]])", "Allow([[False]])", "Allow('x')", "Allow(None)",
    "Allow(" + "[" * 90 + "True" + "]" * 90 + ")", "Allow([[10000000000000000000]])", "ClassifierFree(3)",
    "ClassifierFree(None)", "ClassifierFree('u', 'x')", "ClassifierFree('u', inf)", "ClassifierFree(Ancestral())",
    "when(before(0.5), before(0.5))", "when(before(0.5), 3)", "Ancestral() # a comment",
    "Ancestral() >> Gibbs()" + " " * 600_000,
]  # fmt: skip
ACCEPTED = {"Ancestral()\n", "Ancestral() # a comment", "P2(planner=before(0.5))"}


def refused(call: Callable[[], object], most: float = 5.0) -> str | None:
    """What the call said when it refused; None if it returned. It takes less than ``most`` seconds."""
    start = time.process_time()
    try:
        call()
    except (ValueError, TypeError) as error:
        assert type(error) in (ValueError, TypeError)
        said = str(error)
    else:
        said = None
    assert time.process_time() - start < most
    return said


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be evaluated, run or opened."""

    def never(*args: object, **kwargs: object) -> object:
        raise SystemExit(f"planted: {args}")

    for what in ("eval", "exec", "open", "print", "input", "breakpoint"):
        monkeypatch.setattr(builtins, what, never)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("what", WRONG_JSON)
def test_wrong_json_is_refused(what: str) -> None:
    said = refused(lambda: dd.Plan.from_json(WRONG_JSON[what]))
    assert said is not None
    assert said.startswith("Plan.from_json: ")
    assert len(said) < 1500


@pytest.mark.usefixtures("still")
def test_wrong_expressions_are_refused() -> None:
    for text in WRONG_TEXT:
        if text in ACCEPTED:
            continue
        for step in (GOOD | {"operator": text}, GOOD | {"guides": ["Forbid([1])", text]}):
            said = refused(partial(dd.Plan.from_json, held(GOOD, step, grid=[1.0, 0.5, 0.0])))
            assert said is not None, text[:100]
            assert re.match(r"Plan\.from_json: step 2: (operator|guide 2|Step)", said), (text[:100], said)
            assert len(said) < 3000, text[:100]


@pytest.mark.usefixtures("still")
def test_a_reader_that_evaluates_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notation, "_tree", lambda text: eval(text, vars(S)))
    with pytest.raises(SystemExit, match="planted"):
        dd.Plan.from_json(held(GOOD))


def test_a_text_takes_memory_in_proportion_to_its_length() -> None:
    """So the longest one that is accepted, of 2^19 characters, takes less than 2^29 bytes."""
    for text in ("Forbid([" + "1," * 8_000 + "])", "Ancestral()" + " >> Gibbs()" * 1_500, "{" + "1:1," * 4_000 + "}"):
        tracemalloc.start()
        try:
            refused(partial(dd.Plan.from_json, held(GOOD | {"guides": [text]})))
            assert tracemalloc.get_traced_memory()[1] < 1000 * len(text)
        finally:
            tracemalloc.stop()
    said = refused(partial(dd.Plan.from_json, held(GOOD | {"guides": ["Forbid([" + "1," * 300_000 + "])"]})), 1.0)
    assert said is not None


def test_nested_conditions_are_read_in_a_time_that_grows_with_their_number() -> None:
    operator: dd.Operator = S.Ancestral()
    for n in range(60):
        operator = dd.when(dd.before(n / 100), operator, S.Euler())
    start = time.process_time()
    plan = plan_of(operator)
    comes_back(plan)
    assert (operator.nfe, operator.order, operator.width) == (1.0, 1.0, 1)
    assert dd.Sampler(UNIFORM, MODEL, plan=plan).nfe == 2.0
    assert time.process_time() - start < 5


def mutated(text: str, values: random.Random) -> str:
    """The text with one to three edits: characters, pieces of other texts, brackets, numbers."""
    words = "** >> () null None inf nan 1e999 before(0.5) \\u0000 __class__ Gibbs() Forbid([1]) **{} if not lambda:"
    pieces = [
        *words.split(),
        "9" * 30,
        " for x in ",
        *string.punctuation,
        *random.Random(1).sample(string.printable, 20),
    ]
    for _ in range(values.choice((1, 1, 2, 3))):
        here, there = sorted((values.randrange(len(text) + 1), values.randrange(len(text) + 1)))
        match values.randrange(5):
            case 0:
                text = text[:here] + values.choice(pieces) + text[here:]
            case 1:
                text = text[:here] + text[min(there, here + 6) :]
            case 2:
                text = text[:here] + text[here : min(there, here + 12)] * 2 + text[here:]
            case 3:
                text = text[:here] + values.choice(pieces) + text[here + 1 :]
            case _:
                other = values.randrange(len(text) + 1)
                text = text[:here] + text[other : other + 12] + text[here:]
    return text


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_mutated_files_are_refused_or_read(seed: int) -> None:
    """Mutations of the whole file, and of an expression in it."""
    values, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    sources = [plan_of(operator, [values.choice(GUIDES)], "a").to_json() for operator in values.sample(OPERATORS, 12)]
    for trial in range(1500):
        source = values.choice(sources)
        if trial % 4 == 0:
            text = mutated(source, values)
        else:
            content = json.loads(source)
            step = values.choice(content["steps"])
            if values.randrange(2):
                step["operator"] = mutated(step["operator"], values)
            else:
                step["guides"][0] = mutated(step["guides"][0], values)
            text = json.dumps(content)
        said = refused(partial(lambda text: comes_back(dd.Plan.from_json(text)), text))
        outcomes["read" if said is None else "refused"] += 1
        assert said is None or said.startswith(("Plan.from_json: ", "Plan.to_json: ")), (text, said)
    assert min(outcomes.values()) > 10, outcomes
