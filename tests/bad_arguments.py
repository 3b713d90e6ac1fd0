"""What is no number: wrong types, shapes, dtypes, devices, ids, files, words of the command; sizes beyond memory."""

import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bad_numbers import (
    CHAIN,
    CLOCKS,
    LATE,
    LOGITS,
    MASKED,
    OF_MASKS,
    PAIR,
    PLAIN,
    ROWS,
    UNIFORM,
    ZEROS,
    blockwise,
    cascade,
    drawn,
    model,
    sampler,
)  # fmt: skip

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters import diagnostics
from discdiff.command.cli import main, parse_operator
from discdiff.demo.data import ASSETS
from discdiff.losses import BlockMixture, Blocks
from discdiff.losses import base as losses
from discdiff.process import grid

Rows = list[tuple[str, Callable[[], object], str]]
HUGE = 10**13


class Refused(ValueError):
    """What the command said, with its exit status."""


def command(*words: str) -> None:
    """The command, which must end with status 2 and one line."""
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        try:
            status = main(list(words))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    if status == 2 and len(lines) == 1 and lines[0].startswith("discdiff: "):
        raise Refused(lines[0])
    if status != 0:
        raise RuntimeError(f"status {status}: {said.getvalue()[-300:]}")


def kept(content: bytes) -> Path:
    """A file of this content."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False, dir=FOLDER) as file:
        file.write(content)
    return Path(file.name)


FOLDER = tempfile.mkdtemp()
NOT_MODELS: dict[str, object] = {"None": None, "a string": "model", "a function": lambda x, t: x, "a number": 3}
NOT_PROCESSES: dict[str, object] = {"None": None, "a string": "masked", "a class": dd.Masked, "a schedule": dd.Linear()}
NOT_OPERATORS: dict[str, object] = {"None": None, "a string": "ancestral", "a class": S.Ancestral, "a number": 3}
NOT_SCHEDULES: dict[str, object] = {"None": None, "a string": "linear", "a class": dd.Linear, "a number": 0.5}
NOT_FUNCTIONS: dict[str, object] = {"None": None, "a string": "f", "a number": 0.5, "a list": []}


NOT_GUIDES: dict[str, object] = {
    "None": None, "a string": "f", "a number": 3, "a class": dd.Forbid, "an operator": S.Gibbs(),
    "a condition": dd.before(0.5),
}  # fmt: skip
NOT_NAMES: dict[str, object] = {"a number": 3, "a model": PLAIN, "a list": ["a"], "a class": str, "bytes": b"a"}
NO_LISTS: dict[str, object] = {"None": None, "a string": "ab", "a number": 3, "one operator": S.Gibbs()}
NOT_STEPS: dict[str, object] = {
    "None": None, "a string": "Ancestral()", "a class": dd.Step, "an operator": S.Ancestral(), "a list": [],
}  # fmt: skip
NOT_PLANS: dict[str, object] = {"a string": "plan", "a class": dd.Plan, "a step": dd.Step(S.Ancestral()), "a list": []}
NOT_GRIDS: dict[str, object] = {
    "None": None, "a number": 1.0, "a string": "10", "empty": [], "one of text": ["1"], "bools": [True, False],
    "outside": [1.5, 0.0], "late": [1.0, -0.1], "NaN": [math.nan, 0.0], "equal": [0.5, 0.5], "turned": [0.0, 1.0],
    "nested": [[1.0, 0.0]], "two axes": torch.tensor([[1.0, 0.0]]), "no axis": torch.tensor(1.0), "one outside": [1.5],
}  # fmt: skip
PLAN = dd.Plan([1.0, 0.5, 0.0], [dd.Step(S.Ancestral())] * 2)


def planned(guides: list[object] | None = None, model: str | None = None, operator: object = None) -> dd.Sampler:
    """A sampler of two steps, the second of these."""
    second = dd.Step(S.Ancestral() if operator is None else operator, guides or (), model)  # type: ignore[arg-type]
    return dd.Sampler(UNIFORM, {"a": PLAIN}, plan=dd.Plan([1.0, 0.5, 0.0], [dd.Step(S.Ancestral()), second]))


def each(name: str, call: Callable[..., object], values: dict[str, object], says: str) -> Rows:
    """A call with each of several values."""
    return [(f"{name} is {what}", lambda value=value: call(value), says) for what, value in values.items()]


MODELS = [
    *each("Sampler: model", lambda m: dd.Sampler(UNIFORM, m, S.Ancestral(), steps=2), NOT_MODELS, "model must be"),
    *each("Blockwise: model", lambda m: dd.Blockwise(MASKED, m, S.Ancestral(), block=2, steps=2), NOT_MODELS, "model"),
    *each("generate: model", lambda m: dd.generate(m, ZEROS, max_new_tokens=2), NOT_MODELS, "model must be"),
    *each("probe: model", lambda m: dd.probe(m, ZEROS), NOT_MODELS, "model must be"),
    *each("T.kernel: model", lambda m: T.kernel(S.Gibbs(), UNIFORM, m, 0.5), NOT_MODELS, "model must be"),
    *each("loss: model", lambda m: losses.ScoreEntropy()(m, ZEROS), NOT_MODELS, "model must be"),
    *each("quantize: model", dd.quantize, NOT_MODELS, "model must be"),
    *each("Cascade: first", lambda m: dd.Cascade(m, sampler()), NOT_MODELS, "Cascade: takes a Sampler"),
    *each("T.law: sampler", T.law, NOT_MODELS, "sampler must be"),
    *each("loo_sensitivity: model", lambda m: diagnostics.loo_sensitivity(m, ZEROS, 0.5), NOT_MODELS, "model must be"),
    *each("cycle_residual: model", lambda m: diagnostics.cycle_residual(m, ZEROS, 0.5), NOT_MODELS, "model must be"),
    *each("reverse_law: model", lambda m: T.reverse_law(m, 2), NOT_MODELS, "model must be"),
    *each("features: model", lambda m: diagnostics.features(m, ZEROS, [0.5], []), NOT_MODELS, "model must be"),
]

TYPES = [
    *each("Sampler: process", lambda p: dd.Sampler(p, PLAIN, S.Ancestral(), steps=2), NOT_PROCESSES, "process must be"),
    *each("Denoiser: process", lambda p: dd.Denoiser(lambda x, t: x, p, "loo"), NOT_PROCESSES, "process must be"),
    *each("oracle: process", lambda p: CHAIN.denoiser(p), NOT_PROCESSES, "process must be"),
    *each("T.kernel: process", lambda p: T.kernel(S.Gibbs(), p, PAIR, 0.5), NOT_PROCESSES, "process must be"),
    *each("check_process", T.check_process, NOT_PROCESSES, "process must be a Process"),
    *each("Sampler: operator", lambda o: dd.Sampler(UNIFORM, PLAIN, o, steps=2), NOT_OPERATORS, "takes operators"),
    *each(">>", lambda o: S.Ancestral() >> o, NOT_OPERATORS, "takes operators"),
    *each("when", lambda o: dd.when(lambda t: True, S.Ancestral(), o), NOT_OPERATORS, "takes operators"),
    *each("mix", lambda o: dd.mix({o: 1.0}), NOT_OPERATORS, "takes operators"),
    *each("RePaint: predictor", lambda o: S.RePaint(0.5, o), NOT_OPERATORS, "takes operators"),
    *each("T.kernel: operator", lambda o: T.kernel(o, UNIFORM, PAIR, 0.5), NOT_OPERATORS, "takes operators"),
    *each(
        "predictor_corrector",
        lambda o: dd.predictor_corrector(UNIFORM, PLAIN, o, S.Gibbs(), nfe=4),
        NOT_OPERATORS,
        "takes operators",
    ),
    *each("Uniform: schedule", lambda s: dd.Uniform(3, s), NOT_SCHEDULES, "schedule must be"),
    *each("General: schedule", lambda s: dd.General([[-1.0, 1.0], [1.0, -1.0]], s), NOT_SCHEDULES, "schedule must be"),
    *each("PerSite: base", lambda s: dd.PerSite(s, torch.zeros(3)), NOT_SCHEDULES, "base must be"),
    *each("with_schedule", PLAIN.with_schedule, NOT_SCHEDULES, "schedule must be"),
    *each("by_alpha", lambda s: grid.by_alpha(s, 4), NOT_SCHEDULES, "schedule"),
    *each("Denoiser: fn", lambda f: dd.Denoiser(f, UNIFORM, "loo"), NOT_FUNCTIONS, "fn must be callable"),
    *each("guided", PLAIN.guided, NOT_FUNCTIONS, "a guide is called"),
    *each("when: condition", lambda f: dd.when(f, S.Ancestral(), S.Euler()), NOT_FUNCTIONS, "condition must be"),
    *each("P2: planner", lambda f: S.P2(planner=f), {"a string": "f", "a number": 1.0}, "planner must be"),
    *each("TimeVarying", lambda f: dd.TimeVarying(f, dd.LogLinear()), NOT_FUNCTIONS, "generator must be"),
    *each("Denoiser: head", lambda f: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", head=f), {"a string": "f"}, "head"),
    *each("T.order: build", lambda f: T.order([2, 4, 8], f), NOT_FUNCTIONS, "build must be"),
    *each("fit.holds", T.fit.holds, NOT_FUNCTIONS, "test must be"),
    *each("guided: a class", PLAIN.guided, {"Forbid": dd.Forbid, "Truncation": dd.Truncation}, "got the class"),
    *each("guided: an operator", PLAIN.guided, {"Gibbs": S.Gibbs(), "a step": S.Ancestral() >> S.Gibbs()}, "operator"),
    *each("Step: operator", dd.Step, NOT_OPERATORS, "Step takes operators"),
    *each("Step: guides", lambda g: dd.Step(S.Ancestral(), [g]), NOT_GUIDES, "Step: guides must be guides"),
    *each("Step: no list of guides", lambda g: dd.Step(S.Ancestral(), g), NO_LISTS, "Step: guides must be a sequence"),
    *each("Step: model", lambda m: dd.Step(S.Ancestral(), model=m), NOT_NAMES, "Step: model must be a name"),
    *each("Plan: grid", lambda g: dd.Plan(g, [dd.Step(S.Ancestral())]), NOT_GRIDS, "Plan: grid"),
    *each("Plan: steps", lambda s: dd.Plan([1.0, 0.0], [s]), NOT_STEPS, "Plan: steps must be Steps"),
    *each("Plan: no list of steps", lambda s: dd.Plan([1.0, 0.0], s), NO_LISTS, "Plan: steps must be a sequence"),
    *each("Plan.from_json", dd.Plan.from_json, {"None": None, "a plan": PLAN, "3": 3, "": ""}, "takes the text"),
    *each("Sampler: plan", lambda p: dd.Sampler(UNIFORM, PLAIN, plan=p), NOT_PLANS, "plan must be a Plan"),
    *each("Blockwise: plan", lambda p: dd.Blockwise(UNIFORM, PLAIN, block=1, plan=p), NOT_PLANS, "plan must be a Plan"),
    *each("Sampler: models", lambda m: dd.Sampler(UNIFORM, {"a": m}, S.Ancestral(), steps=2), NOT_MODELS, "model must"),
    *each(
        "Sampler: names",
        lambda n: dd.Sampler(UNIFORM, {n: PLAIN}, S.Ancestral(), steps=2),
        {"None": None, "a number": 3, "a model": PLAIN, "a tuple": ("a",)},
        "a mapping of models is",
    ),
    *each(
        "ClassifierFree: unconditional",
        dd.ClassifierFree,
        {name: value for name, value in NOT_MODELS.items() if name != "a string"},
        "ClassifierFree: model must be",
    ),
    *each("classifier_free", lambda m: dd.classifier_free(m, PLAIN), NOT_MODELS, "classifier_free: model must be"),
    *each("when: a guide", lambda g: dd.when(dd.before(0.5), g), NOT_GUIDES, "when takes"),
    *each(
        "when: another guide",
        lambda g: dd.when(dd.before(0.5), dd.Forbid([1]), g),
        {name: value for name, value in NOT_GUIDES.items() if name != "None"},
        "when takes",
    ),
    *each(
        "when: condition of a guide",
        lambda f: dd.when(f, dd.Forbid([1])),
        NOT_FUNCTIONS | {"a guide": dd.Forbid([1]), "an operator": S.Gibbs(), "a Truncation": dd.Truncation()},
        "condition must be",
    ),
    *each(
        "Forbid: tokens",
        dd.Forbid,
        {"None": None, "3": 3, "'ab'": "ab", "reals": [1.5], "nested": [[1]], "bools": torch.tensor([True])},
        "Forbid: tokens must be",
    ),
    *each(
        "Allow: mask",
        dd.Allow,
        {
            "None": None,
            "a string": "x",
            "ragged": [[True], [True, False]],
            "whole numbers": [[1, 0]],
            "reals": torch.ones(2, 3),
            "a function": max,
        },
        "Allow: mask must",
    ),
    *each("Denoiser: name", lambda n: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", name=n), NOT_NAMES, "name must be"),
    *each("with_name", PLAIN.with_name, {"None": None, "a number": 3, "a model": PLAIN}, "name must be"),
    ("Sampler: no models", lambda: dd.Sampler(UNIFORM, {}, S.Ancestral(), steps=2), "with at least one"),
    ("Sampler: plan and operator", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), plan=PLAN), "its own operators"),
    ("Sampler: plan and steps", lambda: dd.Sampler(UNIFORM, PLAIN, steps=2, plan=PLAN), "its own operators and grid"),
    ("Sampler: plan and grid", lambda: dd.Sampler(UNIFORM, PLAIN, grid=[1.0, 0.0], plan=PLAN), "its own operators"),
    ("Sampler: plan and time", lambda: dd.Sampler(UNIFORM, PLAIN, time=0.5, plan=PLAN), "its own operators and grid"),
    ("Plan: too few steps", lambda: dd.Plan([1.0, 0.5, 0.0], [dd.Step(S.Ancestral())]), "3 times take 2 steps, got 1"),
    ("Plan: too many steps", lambda: dd.Plan([0.5], [dd.Step(S.Gibbs())] * 2), "1 times take 1 steps, got 2"),
    ("Plan: a corrector", lambda: dd.Plan([1.0, 0.0], [dd.Step(S.Gibbs())]), "a step needs a predictor"),
    ("Plan: a predictor alone", lambda: dd.Plan([0.5], [dd.Step(S.Ancestral())]), "a step needs a corrector"),
    ("Plan: an unknown model", lambda: planned(model="b"), "step 2 takes the model 'b'; there are"),
    ("Plan: an unknown asked", lambda: planned([dd.ClassifierFree("b")]), "a guide asks the model 'b'; there are"),
    ("Plan: a guide of another vocabulary", lambda: planned([dd.Forbid([3])]), "step 2: Forbid: tokens must be ids"),
    (
        "Plan: a mask of another vocabulary",
        lambda: planned([dd.Allow(torch.ones(3, 4).bool())]),
        r"mask must be \(L, 3\)",
    ),
    ("Plan: an operator of other processes", lambda: planned(operator=S.Unmask()), "Masked|absorbing"),
    (
        "Blockwise: a corrector's plan",
        lambda: dd.Blockwise(UNIFORM, PLAIN, block=1, plan=dd.Plan([0.5], [dd.Step(S.Gibbs())])),
        "from t = 1 to 0",
    ),
    ("on_grid of a plan that changes", lambda: planned([dd.Forbid([1])]).on_grid([1.0, 0.0]), "steps are alike"),
    ("Forbid: another vocabulary", lambda: PLAIN.guided(dd.Forbid([0, 3])), "Forbid: tokens must be ids below 3"),
    ("Forbid: all", lambda: sampler(PLAIN.guided(dd.Forbid([0, 1, 2]))).sample(2, 3, seed=0), "mass|no token"),
    ("Allow: another vocabulary", lambda: PLAIN.guided(dd.Allow(torch.ones(3, 4).bool())), "Allow: mask must be"),
    ("Allow: one dimension", lambda: dd.Allow(torch.ones(3).bool()), "Allow: mask must be"),
    (
        "Allow: a site without a token",
        lambda: dd.Allow(torch.eye(3).bool() & (torch.arange(3) > 0)),
        "site 0 may hold no",
    ),
    (
        "Allow: another length",
        lambda: sampler(PLAIN.guided(dd.Allow(torch.ones(2, 3).bool()))).sample(2, 3, seed=0),
        "mask is for 2 sites, but the sequence has 3",
    ),
    (
        "Allow: too long",
        lambda: sampler(PLAIN.guided(dd.Allow(torch.ones(4, 3).bool()))).sample(2, 3, seed=0),
        "mask is for 4 sites, but the sequence has 3",
    ),
    (
        "ClassifierFree: another process",
        lambda: PLAIN.guided(dd.ClassifierFree(OF_MASKS)),
        "asks .*Masked.*is for Uniform",
    ),
    ("between: no interval", lambda: dd.between(0.5, 0.5), "takes s < t"),
    ("between: turned", lambda: dd.between(0.7, 0.2), "takes s < t"),
    ("when: a condition", lambda: dd.when(dd.before(0.5), dd.before(0.5)), "when takes"),
    ("when: an operator and a guide", lambda: dd.when(dd.before(0.5), S.Gibbs(), dd.Forbid([1])), "takes operators"),
    ("when: an operator and nothing", lambda: dd.when(dd.before(0.5), S.Gibbs()), "takes operators"),
    (
        "a step of a plan by an old sampler",
        lambda: dd.Plan.from_json(PLAN.to_json().replace("Ancestral", "Ancestor")),
        "step 1: operator: cannot read 'Ancestor",
    ),
    (
        "Plan.to_json: a lambda",
        lambda: dd.Plan([0.5], [dd.Step(dd.when(lambda t: True, S.Gibbs(), S.Remask()))]).to_json(),
        "step 1: operator: when: the condition",
    ),
    ("Denoiser: fn is a class", lambda: dd.Denoiser(torch.nn.Linear, UNIFORM, "loo"), "it is a class"),
    ("Denoiser: predicts", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "x0"), "predicts|'loo'"),
    ("Denoiser: predicts a list", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, ["loo"]), "predicts|'loo'"),
    ("Denoiser: time", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", time="beta"), "time must be"),
    ("Denoiser: shift", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", shift="yes"), "shift must be True"),
    ("Denoiser: scalar_time", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", scalar_time=1), "scalar_time"),
    ("Denoiser: time_dtype", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", time_dtype=torch.int64), "time_dtype"),
    ("Denoiser: suppress a number", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", suppress=3), "suppress"),
    ("oracle: predicts", lambda: CHAIN.denoiser(UNIFORM, predicts="x0"), "predicts|'loo'"),
    ("select", lambda: S.Unmask("best"), "select must be one of"),
    ("InformedGibbs: select", lambda: S.InformedGibbs("best"), "select must be one of"),
    ("InformedGibbs: exact", lambda: S.InformedGibbs(exact=1), "exact must be True"),
    ("InformedGibbs: several exact", lambda: S.InformedGibbs(exact=True, sites=2), "sites"),
    ("Gibbs: scan", lambda: S.Gibbs(scan="left"), "scan must be"),
    ("ReMDM: rule", lambda: S.ReMDM(rule="max"), "rule must be"),
    ("ReMDM: eta above 1", lambda: S.ReMDM(2.0), r"eta must lie in \[0, 1\]"),
    ("ARPC: score", lambda: S.ARPC("x"), "score must be"),
    ("TauLeaping: several", lambda: S.TauLeaping("x"), "several must be"),
    ("LocallyBalanced: balance", lambda: S.LocallyBalanced("x"), "balance must be"),
    ("Truncation: of", lambda: dd.Truncation(of="x"), "of must be"),
    ("Unmask: draw_first", lambda: S.Unmask(draw_first="x"), "draw_first must be True"),
    (
        "corrected",
        lambda: dd.predictor_corrector(UNIFORM, PLAIN, S.Ancestral(), S.Gibbs(), nfe=4, corrected="x"),
        "corrected must be",
    ),
    ("two predictors", lambda: S.Ancestral() >> S.Euler(), "a step has one predictor"),
    ("a predictor repeated", lambda: S.Ancestral() ** 2, "only a corrector"),
    ("a corrector alone", lambda: dd.Sampler(UNIFORM, PLAIN, S.Gibbs(), steps=2), "needs a predictor"),
    ("a mix of kinds", lambda: dd.mix({S.Ancestral(): 0.5, S.Gibbs(): 0.5}), "all be predictors"),
    ("an empty mix", lambda: dd.mix({}), "mix"),
    ("a mix of a list", lambda: dd.mix([S.Gibbs()]), "mix"),
    ("weights that miss 1", lambda: dd.mix({S.Gibbs(): 0.5}), "sum to 1"),
    ("kinds of when", lambda: dd.when(lambda t: True, S.Ancestral(), S.Gibbs()), "all be predictors"),
    ("times: of blocks", lambda: Blocks(losses.MaskedNELBO(), 2, "x"), "times must be"),
    ("Blocks: bound", lambda: Blocks("nelbo", 2), "bound must be"),
    ("BlockMixture: none", lambda: BlockMixture(losses.MaskedNELBO(), {}), "weights"),
    ("generate: operator", lambda: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, operator=3), "operator"),
    ("generate: expression", lambda: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, operator="gib"), "cannot read"),
    ("sample: record", lambda: sampler().sample(2, 3, seed=0, record="yes"), "record must be"),
    ("sample: progress", lambda: sampler().sample(2, 3, seed=0, progress=1), "progress must be"),
    ("Blockwise: future", lambda: blockwise(future="yes"), "future must be"),
    ("Blockwise: no block", lambda: blockwise(block=[]), "block must be"),
    ("Blockwise: none", lambda: blockwise(block=None), "block"),
    ("Blockwise: steps and grid", lambda: blockwise(grid=[1.0, 0.0]), "either steps"),
    ("steps and grid", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), steps=2, grid=[1.0, 0.0]), "either steps"),
    ("neither steps nor grid", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral()), "either steps"),
    ("choose: no choice", lambda: T.kernel(S.Ancestral(), UNIFORM, PAIR, 0.2, 0.5), "0 <= s < t"),
]

SHAPES = [
    ("Denoiser: x of one dimension", lambda: PLAIN(ZEROS[0], 0.5), "x must be an int64"),
    ("Denoiser: x of floats", lambda: PLAIN(ZEROS.float(), 0.5), "x must be an int64"),
    ("Denoiser: x of int32", lambda: PLAIN(ZEROS.int(), 0.5), "x must be an int64"),
    ("Denoiser: x a list", lambda: PLAIN([[0, 1, 2]], 0.5), "x must be an int64"),
    ("Denoiser: x out of range", lambda: PLAIN(ZEROS + 3, 0.5), "accepted ids"),
    ("Denoiser: negative x", lambda: PLAIN(ZEROS - 1, 0.5), "accepted ids"),
    ("Denoiser: t of another shape", lambda: PLAIN(ZEROS, torch.zeros(5)), "time t must be"),
    ("Denoiser: t of a string", lambda: PLAIN(ZEROS, "late"), "time t must be"),
    ("logits too wide", lambda: model(width=4)(ZEROS, 0.5), "must return"),
    ("fn gives no tensor", lambda: dd.Denoiser(lambda x, t: 3, UNIFORM, "loo")(ZEROS, 0.5), "must return a tensor"),
    ("fn gives a tuple", lambda: sampler(dd.Denoiser(lambda x, t: (x,), UNIFORM, "loo")).sample(1, 2), "must return"),
    (
        "fn gives other rows",
        lambda: dd.Denoiser(lambda x, t: torch.zeros(1, 3, 3), UNIFORM, "loo")(ZEROS, 0.5),
        "must return",
    ),
    (
        "fn gives integers",
        lambda: dd.Denoiser(lambda x, t: torch.zeros(2, 3, 3).long(), UNIFORM, "loo")(ZEROS, 0.5).loo,
        "must return|floating",
    ),
    ("marginal: x0 a list", lambda: UNIFORM.marginal([[0]], 0.5), "x0 must be an int64"),
    ("marginal: a mask", lambda: MASKED.marginal(ZEROS + 3, 0.5), "accepted ids"),
    ("marginal: NaN time", lambda: UNIFORM.marginal(ZEROS, torch.full((2,), math.nan)), "time t must lie"),
    ("bridge: other shapes", lambda: UNIFORM.bridge(ZEROS, ZEROS[:1], 0.5, 0.2), "differ in shape"),
    ("bridge: s > t", lambda: UNIFORM.bridge(ZEROS, ZEROS, 0.2, 0.5), "s must not exceed t"),
    ("bridge: impossible", lambda: MASKED.bridge(ZEROS, ZEROS + 1, 0.5, 0.2), "cannot come from"),
    ("kernel: s > t", lambda: UNIFORM.kernel(0.2, 0.5), "s must not exceed t"),
    ("rate at 1", lambda: UNIFORM.rate(1.0), "infinite at t"),
    ("clocks: other length", lambda: dd.Uniform(3, CLOCKS).marginal(ZEROS, 0.5), "clocks for sequences"),
    ("clocks: kernel", lambda: dd.Uniform(3, CLOCKS).kernel(0.5), "clock for every site"),
    ("PerSite: a list", lambda: dd.PerSite(dd.Linear(), [0.0]), "log_power must be"),
    ("PerSite: a matrix", lambda: dd.PerSite(dd.Linear(), torch.zeros(2, 2)), "log_power must be"),
    ("PerSite: NaN", lambda: dd.PerSite(dd.Linear(), torch.tensor([math.nan])), "log_power must hold"),
    ("PerSite: none", lambda: dd.PerSite(dd.Linear(), torch.zeros(0)), "log_power must be"),
    ("PerSite: of PerSite", lambda: dd.PerSite(CLOCKS, torch.zeros(4)), "base must be"),
    ("Marginal: no law", lambda: dd.Marginal([0.5, 0.6], dd.Linear()), "pi must hold"),
    ("Marginal: negative", lambda: dd.Marginal([-0.5, 1.5], dd.Linear()), "pi must hold"),
    ("Marginal: NaN", lambda: dd.Marginal([math.nan, 1.0], dd.Linear()), "pi must hold"),
    ("Marginal: empty", lambda: dd.Marginal([], dd.Linear()), "pi must hold"),
    ("Marginal: a string", lambda: dd.Marginal("uniform", dd.Linear()), "pi must be"),
    ("Marginal: a matrix", lambda: dd.Marginal(torch.ones(2, 2) / 4, dd.Linear()), "pi must hold"),
    ("Masked: mask_id too large", lambda: dd.Masked(3, dd.Linear(), mask_id=7), "mask_id must lie in 0..3"),
    ("Masked: no data left", lambda: dd.Masked(1, dd.Linear(), mask_id=0), "leave a data token"),
    ("Ordinal: one token", lambda: dd.Ordinal(1, dd.Linear()), "vocab_size"),
    ("Ordinal: pi of another size", lambda: dd.Ordinal(3, dd.Linear(), torch.ones(2) / 2), "pi must hold 3"),
    ("Ordinal: pi has a zero", lambda: dd.Ordinal(2, dd.Linear(), torch.tensor([0.0, 1.0])), "pi must hold 2"),
    ("Ordinal: pi a string", lambda: dd.Ordinal(2, dd.Linear(), "x"), "pi must be"),
    ("Ordinal: pi NaN", lambda: dd.Ordinal(2, dd.Linear(), [math.nan, 1.0]), "pi must hold 2"),
    ("General: rows", lambda: dd.General(torch.eye(3), dd.Linear()), "rows of a generator"),
    ("General: not square", lambda: dd.General(torch.zeros(2, 3), dd.Linear()), "square"),
    ("General: a string", lambda: dd.General("Q", dd.Linear()), "array of numbers"),
    ("General: NaN", lambda: dd.General([[math.nan, 1.0], [1.0, -1.0]], dd.Linear()), "rates must be finite"),
    ("General: empty", lambda: dd.General(torch.zeros(0, 0), dd.Linear()), "square|at least"),
    ("General: ragged", lambda: dd.General([[1.0], [1.0, 2.0]], dd.Linear()), "array of numbers"),
    ("General: no limit", lambda: dd.General(torch.zeros(3, 3), dd.Linear()), "stationary"),
    ("TimeVarying: alpha(1) = 0", lambda: dd.TimeVarying(lambda t: [[-1, 1], [1, -1]], dd.Linear()), "total noise"),
    ("TimeVarying: no generator", lambda: dd.TimeVarying(lambda t: None, dd.LogLinear()), "array of numbers"),
    ("Hybrid: share of another shape", lambda: dd.Hybrid(3, dd.Linear(), lambda a: 0.5), "p_uniform"),
    ("Hybrid: share above 1", lambda: dd.Hybrid(3, dd.Linear(), lambda a: 2 * a), "share must lie"),
    ("Interpolant: source", lambda: dd.Interpolant(3, dd.Linear(), torch.ones(2) / 2), "source must have shape"),
    ("Interpolant: no source", lambda: dd.Interpolant(3, dd.Linear()).prior(1, 2), "no source law"),
    ("schedule rises", lambda: dd.Uniform(3, lambda t: 1 + t), "strictly decreasing"),
    ("schedule below 0", lambda: dd.Uniform(3, lambda t: 1 - 2 * t), "must stay in"),
    ("schedule begins low", lambda: dd.Uniform(3, lambda t: 0.5 - 0.5 * t), r"alpha\(0\) must be 1"),
    ("schedule NaN", lambda: dd.Uniform(3, lambda t: t * math.nan), "schedule: alpha"),
    ("schedule of a number", lambda: dd.Uniform(3, lambda t: 0.5), "schedule: the function"),
    ("schedule that fails", lambda: dd.Uniform(3, lambda t: t.no_such_thing), "schedule: the function"),
    ("schedule of math", lambda: dd.Uniform(3, lambda t: math.cos(t)), "schedule: the function"),
    ("Geometric: ends crossed", lambda: dd.Geometric(2.0, 1.0), "smin < smax"),
    ("time below alpha(1)", lambda: dd.LogLinear(0.1).time(0.05), "alpha must lie"),
    ("initial of another shape", lambda: sampler().sample(2, 3, initial=ZEROS[:, :2]), "initial must have shape"),
    ("initial of another batch", lambda: sampler().sample(4, 3, initial=ZEROS), "initial must have shape"),
    ("initial of one dimension", lambda: sampler().sample(initial=[0, 1, 2]), "initial must be"),
    ("initial of floats", lambda: sampler().sample(2, 3, initial=ZEROS.float()), "initial must hold"),
    ("initial of bools", lambda: sampler().sample(2, 3, initial=ZEROS.bool()), "initial must hold"),
    ("initial of strings", lambda: sampler().sample(2, 3, initial=[["a"]]), "initial must be"),
    ("initial out of range", lambda: sampler().sample(2, 3, initial=ZEROS + 5), "initial: row 0"),
    ("initial empty", lambda: sampler().sample(initial=[]), "initial must be"),
    ("initial ragged", lambda: sampler().sample(initial=[[0], [0, 1]]), "initial must be"),
    ("initial without rows", lambda: sampler().sample(initial=ZEROS[:0]), "batch"),
    ("no batch", lambda: sampler().sample(length=3), "batch"),
    ("no length", lambda: sampler().sample(2), "give length="),
    ("length of another model", lambda: sampler(PAIR).sample(2, 5), "the model is for length 2"),
    ("prompt too long", lambda: sampler().sample(2, 3, prompt=[0] * 4), "P <= 3"),
    ("prompt of floats", lambda: sampler().sample(2, 3, prompt=[0.5]), "token ids"),
    ("prompt a string", lambda: sampler().sample(2, 3, prompt="abc"), "prompt must be"),
    ("prompt out of range", lambda: sampler().sample(2, 3, prompt=[7]), "prompt: row 0"),
    ("prompt negative", lambda: sampler().sample(2, 3, prompt=[-1]), "prompt: row 0"),
    ("prompt of a mask", lambda: sampler(OF_MASKS).sample(2, 3, prompt=[3]), "without the mask"),
    ("prompt of three dimensions", lambda: sampler().sample(2, 3, prompt=ZEROS[None]), "prompt must be"),
    ("prompt of other rows", lambda: sampler().sample(3, 3, prompt=ZEROS), "prompt must be"),
    ("prompt of bools", lambda: sampler().sample(2, 3, prompt=[True]), "token ids"),
    ("frozen of numbers", lambda: sampler().sample(2, 3, prompt=[0, 1, 2], frozen=[1, 0, 0]), "frozen must be a bool"),
    ("frozen a string", lambda: sampler().sample(2, 3, prompt=[0, 1, 2], frozen="x"), "frozen must be"),
    ("frozen of another length", lambda: sampler().sample(2, 3, prompt=[0, 1, 2], frozen=[True]), "frozen must be"),
    ("frozen without prompt", lambda: sampler().sample(2, 3, frozen=[True, False, False]), "must say what they hold"),
    ("grid rises", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=[0.0, 1.0]), "decreasing"),
    ("grid of one", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=[1.0]), "at least two"),
    ("grid empty", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=[]), "at least two"),
    ("grid a number", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=4), "grid must be"),
    ("grid a string", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid="linear"), "grid must be"),
    ("grid without end", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=iter(lambda: 0.5, 1)), "decreasing"),
    ("grid above 1", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=[1.5, 0.0]), r"\[0, 1\]"),
    (
        "a late grid without initial",
        lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=[0.5, 0.0]).sample(1, 2),
        "give initial=",
    ),
    ("grid.by_time: end after start", lambda: grid.by_time(4, start=0.2, end=0.5), "end < start"),
    ("row ids too large", lambda: sampler().sample(2, 3, first_row=2**32 - 1), "row ids"),
    ("seed too large", lambda: sampler().sample(2, 3, seed=2**64), "seed must lie"),
    ("device of no name", lambda: sampler().sample(2, 3, device="gpu0"), "device must be"),
    ("device that is not here", lambda: sampler().sample(2, 3, device="cuda:63"), "device must be"),
    ("device of a number", lambda: sampler().sample(2, 3, device=1.5), "device must be"),
    ("Blockwise: device", lambda: blockwise().sample(2, 3, device="tpu"), "device must be"),
    ("Blockwise: prompt a number", lambda: blockwise().sample(2, 3, prompt=3), "prompt must be"),
    ("Blockwise: prompt a string", lambda: blockwise().sample(2, 3, prompt="abc"), "prompt must be"),
    ("Blockwise: prompt of floats", lambda: blockwise().sample(2, 3, prompt=[0.5]), "token ids"),
    ("Blockwise: prompt out of range", lambda: blockwise().sample(2, 3, prompt=[9]), "prompt of row 0"),
    ("Blockwise: prompt too long", lambda: blockwise().sample(2, 3, prompt=[0] * 4), "at most 3 each"),
    ("Blockwise: other rows", lambda: blockwise().sample(3, 3, prompt=[[0], [1]]), "3 rows"),
    ("Blockwise: prompt of strings", lambda: blockwise().sample(2, 3, prompt=[["a"], ["b"]]), "prompt of row 0"),
    ("Blockwise: window too small", lambda: blockwise(window=1), "window must hold"),
    ("Blockwise: a late grid", lambda: blockwise(steps=None, grid=[0.9, 0.0]), "from t = 1 to 0"),
    ("Blockwise: stop of a mask", lambda: blockwise().sample(2, 3, stop=3), "stop"),
    ("Blockwise: weights", lambda: blockwise(block={1: 0.5, 2: 0.2}), "weights of block sizes"),
    ("Cascade: second", lambda: dd.Cascade(sampler(), blockwise()), "Cascade"),
    ("Cascade: one length", lambda: cascade().sample(2, 3), "lengths"),
    ("Cascade: three lengths", lambda: cascade().sample(2, (1, 2, 3)), "lengths must be two"),
    ("generate: a row", lambda: dd.generate(OF_MASKS, torch.tensor([1, 2]), max_new_tokens=2), "input_ids must be"),
    ("generate: floats", lambda: dd.generate(OF_MASKS, torch.zeros(2, 2), max_new_tokens=2), "input_ids must hold"),
    ("generate: strings", lambda: dd.generate(OF_MASKS, ["The "], max_new_tokens=2), "input_ids must be"),
    ("generate: no row", lambda: dd.generate(OF_MASKS, ZEROS[:0], max_new_tokens=2), "input_ids must"),
    ("generate: out of range", lambda: dd.generate(OF_MASKS, ZEROS + 9, max_new_tokens=2, seed=0), "row 0"),
    ("generate: mask of another shape", lambda: dd.generate(OF_MASKS, ZEROS, ZEROS[:1], max_new_tokens=2), "mask must"),
    ("generate: mask a string", lambda: dd.generate(OF_MASKS, ZEROS, "x", max_new_tokens=2), "attention_mask"),
    (
        "generate: padded on the right",
        lambda: dd.generate(OF_MASKS, ZEROS, torch.tensor([[1, 1, 0], [1, 1, 1]]), max_new_tokens=2),
        "on the left",
    ),
    ("processes that differ", lambda: dd.Sampler(MASKED, PLAIN, S.Ancestral(), steps=2), "model is for"),
    ("Unmask on Uniform", lambda: sampler(PLAIN, S.Unmask()), "needs a process"),
    ("condition: moving of another length", lambda: OF_MASKS.condition(ZEROS, torch.ones(2).bool()), "moving"),
    ("condition: moving a list", lambda: OF_MASKS.condition(ZEROS, [True, False, False, 3]), "moving"),
    ("condition: nothing moves", lambda: OF_MASKS.condition(ZEROS, torch.zeros(3).bool()), "moving"),
    ("condition: x0 a string", lambda: OF_MASKS.condition("x", torch.ones(3).bool()), "x0"),
    (
        "condition: x0 out of range",
        lambda: OF_MASKS.condition(ZEROS + 5, torch.tensor([True, False, False])),
        "x0: row 0",
    ),
    ("marginal: moving a number", lambda: OF_MASKS.marginal(3), "moving"),
    ("with_condition: a number", lambda: PLAIN.with_condition(3), "condition must"),
    ("with_condition: no row", lambda: PLAIN.with_condition(ZEROS[:0]), "condition must"),
    ("suppress outside", lambda: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", suppress=[5]), "suppress"),
    ("quantize: no module", lambda: dd.quantize(PLAIN), "nn.Module"),
    ("features: no module", lambda: diagnostics.features(PLAIN, ZEROS, [0.5], ["x"]), "nn.Module"),
    ("loo_sensitivity: masked", lambda: diagnostics.loo_sensitivity(OF_MASKS, ZEROS, 0.5), "needs a process"),
    ("loo_sensitivity: x of floats", lambda: diagnostics.loo_sensitivity(PLAIN, ZEROS.float(), 0.5), "x must be"),
    ("loo_sensitivity: x a list", lambda: diagnostics.loo_sensitivity(PLAIN, [[0]], 0.5), "x must be"),
    ("sensitivity_curve: none", lambda: diagnostics.sensitivity_curve(PLAIN, ZEROS, []), "alphas must lie"),
    (
        "sensitivity_curve: one row",
        lambda: diagnostics.sensitivity_curve(PLAIN, ZEROS[:1], [0.5]),
        "at least 2 rows",
    ),
    ("sensitivity_curve: a number", lambda: diagnostics.sensitivity_curve(PLAIN, ZEROS, 0.5), "alphas must"),
    ("cycle_residual: one site", lambda: diagnostics.cycle_residual(PLAIN, ZEROS[:, :1], 0.5), "site"),
    ("cycle_residual: x a list", lambda: diagnostics.cycle_residual(PLAIN, [[0, 1]], 0.5), "x must be"),
    ("probe: one row", lambda: dd.probe(PLAIN, ZEROS[:1]), "at least 2 rows"),
    ("probe: out of range", lambda: dd.probe(PLAIN, ZEROS + 9), "x0: row 0"),
    ("probe: a list", lambda: dd.probe(PLAIN, [[0]]), "x0 must be"),
]

LAWS = [
    ("Enumeration: another size", lambda: T.Enumeration(torch.ones(8) / 8, vocab_size=3, length=2), "p0 must have"),
    ("Enumeration: no law", lambda: T.Enumeration(torch.ones(9), vocab_size=3, length=2), "p0 must be a law"),
    ("Enumeration: negative", lambda: T.Enumeration([-1.0, 2.0, 0.0], vocab_size=3, length=1), "p0 must be a law"),
    ("Enumeration: NaN", lambda: T.Enumeration([math.nan] * 3, vocab_size=3, length=1), "p0 must be a law"),
    ("Enumeration: a string", lambda: T.Enumeration("p", vocab_size=3, length=1), "p0 must be"),
    ("Enumeration: too large", lambda: T.Enumeration(torch.ones(9) / 9, vocab_size=50257, length=1024), "states"),
    ("Coupling: shape", lambda: T.Coupling(torch.ones(2, 2) / 4, vocab_size=3, length=1), "joint must have"),
    (
        "Coupling: on Uniform",
        lambda: T.Coupling(torch.eye(3) / 3, vocab_size=3, length=1).denoiser(UNIFORM)(ZEROS[:, :1], 0.5),
        "Interpolant",
    ),
    ("MarkovChain: shapes", lambda: T.MarkovChain(torch.ones(3) / 3, torch.ones(2, 2) / 2, 3), "a chain needs"),
    ("MarkovChain: no law", lambda: T.MarkovChain(torch.ones(3), torch.ones(3, 3) / 3, 3), "initial must hold"),
    ("MarkovChain: a number", lambda: T.MarkovChain(1.0, torch.ones(3, 3) / 3, 3), "initial|a chain needs"),
    ("MarkovChain: strings", lambda: T.MarkovChain("ab", "cd", 3), "initial"),
    ("HMM: final", lambda: T.HMM([0.5, 0.5], [[0.5, 0.5]] * 2, [[0.5, 0.5]] * 2, 3, final=[-1.0, 1.0]), "final must"),
    (
        "HMM: final of another size",
        lambda: T.HMM([0.5, 0.5], [[0.5, 0.5]] * 2, [[0.5, 0.5]] * 2, 3, final=[1.0]),
        "final must",
    ),
    ("HMM: nothing", lambda: T.HMM([0.5, 0.5], [[0.5, 0.5]] * 2, [[0.5, 0.5]] * 2, 3, final=[0.0, 0.0]), "no sequence"),
    ("ConstrainedChain: moves", lambda: T.ConstrainedChain(CHAIN, torch.full((2, 3), 5), [0]), "moves must be"),
    ("ConstrainedChain: a row", lambda: T.ConstrainedChain(CHAIN, [0, 1, 0], [0]), "moves must be"),
    ("ConstrainedChain: floats", lambda: T.ConstrainedChain(CHAIN, torch.zeros(2, 3), [0]), "moves must"),
    ("ConstrainedChain: accepting", lambda: T.ConstrainedChain(CHAIN, torch.zeros(2, 3).long(), [5]), "accepting"),
    (
        "ConstrainedChain: accepting a number",
        lambda: T.ConstrainedChain(CHAIN, torch.zeros(2, 3).long(), 0),
        "accepting",
    ),
    ("ConstrainedChain: chain", lambda: T.ConstrainedChain("ab", torch.zeros(2, 3).long(), [0]), "chain must be"),
    ("Tree: no root", lambda: T.Tree([0, 0], [0.5, 0.5], [[0.5, 0.5]] * 2), "parents must be"),
    ("Tree: empty", lambda: T.Tree([], [0.5, 0.5], [[0.5, 0.5]] * 2), "parents must be"),
    ("Tree: a number", lambda: T.Tree(3, [0.5, 0.5], [[0.5, 0.5]] * 2), "parents must be"),
    ("Tree: shapes", lambda: T.Tree([-1, 0], [0.5, 0.5], torch.ones(3, 3) / 3), "transition must be"),
    ("Tree: root a number", lambda: T.Tree([-1, 0], 1.0, [[0.5, 0.5]] * 2), "root must"),
    ("ProductMixture: shapes", lambda: T.ProductMixture([1.0], torch.ones(2, 2, 2) / 2), "a mixture needs"),
    ("ProductMixture: no law", lambda: T.ProductMixture([0.5, 0.6], torch.ones(2, 2, 2) / 2), "weights must hold"),
    ("ProductMixture: strings", lambda: T.ProductMixture("ab", torch.ones(2, 2, 2) / 2), "weights must"),
    ("oracle: another alphabet", lambda: CHAIN.denoiser(dd.Uniform(4, dd.Linear())), "data tokens"),
    ("oracle: another length", lambda: CHAIN.denoiser(UNIFORM)(ZEROS[:, :2], 0.5), "length 3"),
    ("log_prob: out of range", lambda: CHAIN.log_prob(ZEROS + 5), "x must be"),
    ("log_prob: a list", lambda: CHAIN.log_prob([[0, 1, 2]]), "x must be"),
    ("log_prob: floats", lambda: CHAIN.log_prob(ZEROS.float()), "x must be"),
    ("log_marginal: out of range", lambda: CHAIN.log_marginal(UNIFORM, ZEROS + 5, 0.5), "z: row 0"),
    ("log_marginal: another length", lambda: CHAIN.log_marginal(UNIFORM, ZEROS[:, :2], 0.5), "length 3"),
    ("posterior: another length", lambda: CHAIN.posterior(UNIFORM, ZEROS[:, :2], 0.5, 0), "length 3"),
    ("oracle: to a device", lambda: CHAIN.to("cuda:63"), "device"),
    ("T.kernel: a predictor without s", lambda: T.kernel(S.Ancestral(), UNIFORM, PAIR, 0.5), "0 <= s < t"),
    ("T.kernel: a corrector with s", lambda: T.kernel(S.Gibbs(), UNIFORM, PAIR, 0.5, 0.2), "alone"),
    ("T.kernel: no length", lambda: T.kernel(S.Gibbs(), UNIFORM, PLAIN, 0.5), "length="),
    ("T.kernel: another length", lambda: T.kernel(S.Gibbs(), UNIFORM, PAIR, 0.5, length=4), "length="),
    ("T.kernel: frozen", lambda: T.kernel(S.Gibbs(), UNIFORM, PAIR, 0.5, frozen=[True]), "frozen must have"),
    ("T.kernel: no tree", lambda: T.kernel(S.Gillespie(), UNIFORM, PAIR, 0.5, 0.2), "cannot be enumerated"),
    ("T.law: a late grid", lambda: T.law(dd.Sampler(UNIFORM, PAIR, S.Ancestral(), grid=[0.5, 0.0])), "give initial="),
    ("T.law: initial of another size", lambda: T.law(sampler(PAIR), torch.ones(3) / 3), "initial must have"),
    (
        "T.law: a prompt of blocks",
        lambda: T.law(dd.Blockwise(UNIFORM, PAIR, S.Ancestral(), block=1, steps=1), prompt=[0, 1]),
        "takes length= alone",
    ),
    ("T.law: prompt alone", lambda: T.law(sampler(PAIR), prompt=[0, 1]), "go together"),
    ("T.order: two", lambda: T.order([2, 4], lambda n: sampler(PAIR, steps=n)), "three numbers of steps"),
    ("T.order: a number", lambda: T.order(8, lambda n: sampler(PAIR, steps=n)), "steps must be"),
    ("T.order: no sampler", lambda: T.order([2, 4, 8], lambda n: n), "build must"),
    ("T.order: no target", lambda: T.order([2, 4, 8], lambda n: sampler(steps=n)), "give target="),
    ("T.reverse_law: alpha(1)", lambda: T.reverse_law(model(LATE), 2), r"alpha\(1\) = 0"),
    ("T.bound: no bound", lambda: T.bound("nelbo", PAIR), "bound"),
    ("integrand: no integral", lambda: T.likelihood.integrand(losses.DiscreteBound(2), PAIR, 0.5), "no|not"),
    ("fit: another length", lambda: T.fit.energy_test(ZEROS, ZEROS[:, :2]), "samples must be"),
    ("fit.transition_test: out of range", lambda: T.fit.transition_test(CHAIN, ZEROS + 5), "x must be"),
    ("check_process: clocks", lambda: T.check_process(dd.Uniform(3, CLOCKS)), "clock for every site"),
    ("bridge.ReMDM on Uniform", lambda: dd.bridge.ReMDM(0.1)(UNIFORM, ZEROS, ZEROS, 0.5, 0.2), "Masked"),
    ("MaskedNELBO on Uniform", lambda: losses.MaskedNELBO()(PLAIN, ZEROS), "Masked process"),
    ("UniformNELBO on Masked", lambda: losses.UniformNELBO()(OF_MASKS, ZEROS), "Uniform process"),
    ("AbsorbingNELBO on Uniform", lambda: losses.AbsorbingNELBO()(PLAIN, ZEROS), "pairs without"),
    ("loss: out of range", lambda: losses.ScoreEntropy()(PLAIN, ZEROS + 9), "x0: row 0"),
    ("loss: a list", lambda: losses.ScoreEntropy()(PLAIN, [[0]]), "x0 must be"),
    ("loss: no rows", lambda: losses.ScoreEntropy()(PLAIN, ZEROS[:0]), "x0"),
    ("loss: no sites", lambda: losses.ScoreEntropy()(PLAIN, ZEROS[:, :0]), "x0"),
]

KERNELS = [
    ("draw: logits of one dimension", lambda: drawn(logits=LOGITS[0]), "logits must be"),
    ("draw: logits of integers", lambda: drawn(logits=LOGITS.long()), "logits must be"),
    ("draw: logits a list", lambda: drawn(logits=[[0.0]]), "logits must be"),
    ("draw: no column", lambda: drawn(logits=LOGITS[:, :0]), "V must lie"),
    ("draw: rows of another length", lambda: drawn(rows=ROWS[:2]), "rows must be"),
    ("draw: rows of floats", lambda: drawn(rows=ROWS.float()), "rows must be"),
    ("draw: rows a list", lambda: drawn(rows=[0, 1, 2, 3]), "rows must be"),
    ("draw: positions", lambda: drawn(positions=ROWS[:, None]), "positions must be"),
    ("draw: negative rows", lambda: drawn(rows=ROWS - 1), "rows must"),
    ("draw: rows too large", lambda: drawn(rows=ROWS + 2**32), "rows must"),
    ("draw: negative positions", lambda: drawn(positions=ROWS - 1), "positions must"),
    ("draw: tag too large", lambda: drawn(tag=1024), "tag must lie"),
    ("draw: step too large", lambda: drawn(step=2**32), "step must lie"),
    ("draw: seed too large", lambda: drawn(seed=2**64), "seed must lie"),
    ("draw: backend", lambda: drawn(backend="jax"), "backend"),
    ("read: at", lambda: kernels.read(LOGITS, at=ROWS[:1]), "at must be"),
    ("read: at a list", lambda: kernels.read(LOGITS, at=[0, 1, 2, 0]), "at must be"),
    ("read: a list", lambda: kernels.read([[0.0]]), "logits must be"),
    ("race: first_column", lambda: kernels.race(LOGITS, seed=0, rows=ROWS, positions=ROWS, first_column=5), "multiple"),
    ("threshold: top_k", lambda: kernels.threshold(LOGITS, top_k=0), "top_k"),
    ("threshold: top_p", lambda: kernels.threshold(LOGITS, top_p=1.5), "top_p"),
    ("log_prob: a list", lambda: kernels.log_prob([[0.0]], ROWS), "logits must be"),
    ("log_prob: columns a list", lambda: kernels.log_prob(LOGITS, [0, 1, 2, 0]), "columns must be"),
    ("log_prob: columns of floats", lambda: kernels.log_prob(LOGITS, ROWS.float()), "columns must be"),
    ("log_prob: other rows", lambda: kernels.log_prob(LOGITS, ROWS[:2]), "columns must be"),
    ("winner: none", lambda: kernels.winner(), "winner"),
    ("philox: seed", lambda: kernels.philox("x", 0, 0, 0, 0), "seed"),
    ("philox: a counter", lambda: kernels.philox(0, 0.5, 0, 0, 0), "counter"),
]

BAD_LOGITS = [
    (f"{type(operator).__name__} of {what}", lambda operator=operator, value=value: sampler(
        model(MASKED, value, predicts="loo"), operator, 4).sample(2, 3, seed=0), "NaN|massless|mass")
    for operator in (S.Ancestral(), S.Euler(), S.Unmask(), S.ReMDM(), S.DFM(), S.FirstHitting(), S.AnyOrder(),
                     S.Ancestral() >> S.Gibbs(), S.SplitLeap(), S.ThetaTrapezoidal(), S.TauLeaping())
    for what, value in (("NaN", math.nan), ("+inf", math.inf), ("no mass", -math.inf))
]  # fmt: skip

SIZES = [
    ("sample: batch", lambda: sampler().sample(HUGE, 3, seed=0), "batch|row ids"),
    ("sample: length", lambda: sampler().sample(2, HUGE, seed=0), "memory"),
    ("Blockwise: length", lambda: blockwise().sample(2, HUGE, seed=0), "memory"),
    ("generate: new tokens", lambda: dd.generate(OF_MASKS, ZEROS, max_new_tokens=HUGE, seed=0), "memory"),
    ("Cascade: length", lambda: cascade().sample(2, (2, HUGE), seed=0), "memory"),
    ("steps", lambda: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), steps=HUGE), "steps must lie"),
    ("repetitions", lambda: sampler(PLAIN, S.Ancestral() >> S.Gibbs() ** HUGE), "slots"),
    ("RePaint: steps", lambda: sampler(PLAIN, S.Ancestral() >> S.RePaint(steps=HUGE)), "slots"),
    ("Ordinal", lambda: dd.Ordinal(HUGE, dd.Linear()), "memory"),
    ("AbsorbingUniform", lambda: dd.AbsorbingUniform(HUGE, dd.Linear()), "memory|must lie"),
    ("Uniform: kernel", lambda: dd.Uniform(10**7, dd.Linear()).kernel(0.5), "memory"),
    ("Uniform: tokens", lambda: dd.Uniform(HUGE, dd.Linear()), "vocab_size must lie"),
    ("prior", lambda: MASKED.prior(HUGE, HUGE), "memory"),
    (
        "TimeVarying: pieces",
        lambda: dd.TimeVarying(lambda t: [[-1.0, 1.0], [1.0, -1.0]], dd.LogLinear(), HUGE),
        "pieces must lie",
    ),
    ("MarkovChain: length", lambda: T.MarkovChain(torch.ones(3) / 3, torch.ones(3, 3) / 3, HUGE), "memory"),
    ("Oracle.sample", lambda: CHAIN.sample(HUGE, seed=0), "memory"),
    ("energy_test", lambda: T.fit.energy_test(ZEROS, ZEROS, HUGE), "memory"),
    ("joint_generator", lambda: T.reversal.joint_generator(UNIFORM, 40, 0.5), "states"),
    ("reverse_law", lambda: T.reverse_law(PLAIN, 40), "states"),
    ("model_generator", lambda: T.model_generator(PLAIN, 0.5, 40), "states"),
    ("T.kernel", lambda: T.kernel(S.Gibbs(), UNIFORM, PLAIN, 0.5, length=40), "states"),
    ("T.law", lambda: T.law(sampler(), length=40), "states"),
    ("T.bound", lambda: T.bound(losses.ScoreEntropy(), PLAIN, 40), "memory"),
]

FILES = [
    ("load: no file", lambda: dd.load("./no/such/model"), "no/such"),
    ("load: a number", lambda: dd.load(3), "load"),
    ("load: an empty folder", lambda: dd.load(tempfile.mkdtemp(dir=FOLDER)), "config|weights|folder"),
    ("Samples.load: no file", lambda: dd.Samples.load("no/such.safetensors"), "no file"),
    ("Samples.load: empty", lambda: dd.Samples.load(kept(b"")), "no safetensors file"),
    ("Samples.load: damaged", lambda: dd.Samples.load(kept(b"\x08\0\0\0\0\0\0\0{broken}")), "no safetensors file"),
    ("Samples.load: a folder", lambda: dd.Samples.load(FOLDER), "no file"),
    ("Samples.load: another class", lambda: dd.Samples.load(_saved_blocks()), "Samples.save wrote"),
    ("Samples.load: of another program", lambda: dd.Samples.load(_others()), "Samples.save wrote"),
    ("Samples.save: no folder", lambda: sampler().sample(1, 2, seed=0).save("no/such/x.safetensors"), "no folder"),
]


def _saved_blocks() -> Path:
    path = Path(FOLDER) / "blocks.safetensors"
    blockwise().sample(1, 2, seed=0).save(path)
    return path


def _others() -> Path:
    from safetensors.torch import save_file

    path = Path(FOLDER) / "others.safetensors"
    save_file({"tokens": ZEROS}, path)
    return path


WORDS = [
    ("no command", (), "command"),
    ("another command", ("paint",), "paint"),
    ("no data", ("sample",), "digits,text,FOLDER"),
    ("other data", ("sample", "music"), "music"),
    ("process", ("sample", "text", "--process", "gaussian"), "--process"),
    ("sampler", ("sample", "text", "--sampler", "euler_maruyama"), "--sampler"),
    ("sampler: no expression", ("sample", "text", "--sampler", "ancestral >>"), "--sampler"),
    ("sampler: a corrector", ("sample", "text", "--sampler", "gibbs"), "predictor"),
    ("sampler: argument", ("sample", "text", "--sampler", "gibbs(sites=True) >> ancestral"), "sites"),
    ("sampler: huge", ("sample", "text", "--sampler", "ancestral >> gibbs ** 10000000000"), "slots"),
    ("sampler: code", ("sample", "text", "--sampler", "__import__('os')"), "--sampler"),
    ("sampler: deep", ("sample", "text", "--sampler", "(" * 500 + "ancestral" + ")" * 500), "--sampler"),
    ("corrector", ("sample", "text", "--corrector", "arcp"), "--corrector"),
    ("steps: a word", ("sample", "text", "--steps", "many"), "--steps"),
    ("steps: none", ("sample", "text", "--steps", "0"), "steps"),
    ("steps: huge", ("sample", "text", "--steps", "10000000000"), "steps"),
    ("batch: none", ("sample", "text", "--batch", "0"), "batch"),
    ("batch: huge", ("sample", "text", "--batch", "10000000000000"), "batch|row ids"),
    ("batch: a fraction", ("sample", "text", "--batch", "1.5"), "--batch"),
    ("length: negative", ("sample", "text", "--length", "-3"), "length"),
    ("length: too long", ("sample", "text", "--length", "4000"), "128"),
    ("seed: negative", ("sample", "text", "--seed", "-3"), "seed"),
    ("seed: huge", ("sample", "text", "--seed", str(2**64)), "seed"),
    ("blocks: none", ("sample", "text", "--blocks", "0"), "block"),
    ("prompt: characters", ("sample", "text", "--prompt", "Thé"), "vocabulary"),
    ("prompt: too long", ("sample", "text", "--prompt", "too long", "--length", "3"), "P <= 3|prompt"),
    ("out: no folder", ("sample", "text", "--out", "no/such/x.txt"), "no folder"),
    ("out: a folder", ("sample", "digits", "--out", FOLDER), "folder"),
    ("out: no picture", ("sample", "digits", "--out", str(Path(FOLDER) / "x.what")), "--out"),
    ("text out: a folder", ("sample", "text", "--out", FOLDER), "folder"),
    ("sensitivity: data", ("sensitivity", "music"), "music"),
    ("sensitivity: rows", ("sensitivity", "digits", "--rows", "1"), "rows"),
    ("sensitivity: rows huge", ("sensitivity", "digits", "--rows", "10000000000000"), "rows"),
    ("sensitivity: seed", ("sensitivity", "digits", "--seed", "-1"), "seed"),
    ("sensitivity: weights", ("sensitivity", "digits", "--weights", "no/such.safetensors"), "no/such"),
    (
        "sensitivity: other weights",
        ("sensitivity", "digits", "--weights", str(ASSETS / "text-uniform.safetensors")),
        "17|vocabulary",
    ),
    (
        "sensitivity: damaged weights",
        ("sensitivity", "digits", "--weights", str(kept(b"nothing"))),
        "safetensors|weights",
    ),
    ("sensitivity: out", ("sensitivity", "digits", "--out", "no/such/x.png"), "no folder"),
    ("bench: batch", ("bench", "--batch", "0"), "batch"),
    ("bench: rounds", ("bench", "--rounds", "-1"), "rounds"),
    ("bench: vocab huge", ("bench", "--vocab", "10000000000000"), "memory|vocab"),
    ("bench: device", ("bench", "--device", "tpu9"), "device"),
    ("bench: dtype", ("bench", "--dtype", "int8"), "--dtype"),
    ("bench: two at once", ("bench", "--goals", "--check"), "--goals"),
    ("bench: json", ("bench", "--json", "no/such/x.json"), "no folder"),
    ("list: words", ("list", "more"), "more"),
]

COMMAND = [(f"discdiff {name}", lambda words=words: command(*words), says) for name, words, says in WORDS]
OPERATORS = each("parse_operator", parse_operator, {
    "a number": "3", "empty": "", "a product": "ancestral * gibbs", "an attribute": "S.Ancestral",
    "a lambda": "lambda: 1", "a fraction of times": "gibbs ** 1.5", "negative times": "gibbs ** -1",
    "a bool of times": "gibbs ** True",
}, "--sampler|\\*\\*") + each("parse_operator", parse_operator, {"None": None, "a list": []}, "expression")  # fmt: skip
