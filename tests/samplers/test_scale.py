"""What an operator may not do: allocate as many numbers as there are logits, or draw but through the kernels."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import ROOT

import discdiff as dd
from discdiff import samplers as S
from discdiff.command.bench import Meter
from discdiff.operator import Then
from discdiff.samplers._jumps import Jumps

B, L, V = 3, 24, 100_003


PROCESSES = {
    "masked": dd.Masked(V, dd.Linear()),
    "mask among the tokens": dd.Masked(V, dd.Linear(), mask_id=7),
    "uniform": dd.Uniform(V, dd.Linear()),
    "marginal": dd.Marginal(torch.arange(1, V + 1).double() / (V * (V + 1) / 2), dd.Linear()),
    "hybrid": dd.Hybrid(V, dd.Linear(), p_uniform=0.3),
    "absorbing uniform": dd.AbsorbingUniform(V, dd.Linear()),
}
CASES = [(name, "loo") for name in PROCESSES] + [("masked", "denoiser"), ("uniform", "denoiser"), ("masked", "ratio")]
OPERATORS = [getattr(S, name) for name in S.__all__]
COARSE = {S.Adaptive: lambda: S.Adaptive(tolerance=20.0, first=0.4)}  # or it takes a hundred steps


def step(operator: Callable[[], dd.Operator]) -> dd.Operator:
    made = COARSE.get(operator, operator)()
    return made if made.moves else S.Ancestral() >> made


NEEDS_LOO = (S.P2, S.InformedGibbs, S.LocallyBalanced, S.TauLocallyBalanced, S.EntropyRedraw)


def applies(operator: dd.Operator, process: dd.Process) -> bool:
    try:
        operator.check(process)
    except ValueError:
        return False
    return True


class Network:
    """Its output is there already, and it can be asked for the autoregressive law."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        return self.logits[: len(x)]

    def prefill(self, tokens: torch.Tensor, length: torch.Tensor, capacity: int) -> "Network":
        return self

    def select(self, rows: torch.Tensor) -> "Network":
        return self

    def extend(self, cache: "Network", tokens: torch.Tensor) -> None: ...

    def evaluate(self, cache: "Network", x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        return self.logits[: len(x)]

    def score(self, cache: "Network", x: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(x)]


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(B, L, V, generator=torch.Generator().manual_seed(0))


def measured(sampler: dd.Sampler, **options: bool) -> Meter:
    with Meter() as meter:
        sampler.sample(B, L, seed=0, **options)
    return meter


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("name", "predicts"), CASES)
def test_no_operator_allocates_the_logits_again(
    operator: Callable[[], dd.Operator], name: str, predicts: str, logits: torch.Tensor
) -> None:
    """Two steps, the last of which may change every site: temporaries stay below a twentieth of the logits."""
    process, op = PROCESSES[name], step(operator)
    if not applies(op, process):
        pytest.skip(f"{op} says that it does not apply to {process}")
    model = dd.Denoiser(Network(logits), process, predicts)
    if predicts != "loo" and process.absorbing and operator in NEEDS_LOO:
        pytest.skip("it needs the LOO at revealed sites")
    grid = [1.0, 0.5, 0.05]
    if isinstance(op, Jumps):  # a few events; from noise that is no mask the first step is ancestral
        grid = [1.0, 0.95, 0.9] if process.absorbing else [1.0, 0.5, 0.45]
    elif isinstance(op, Then):  # a corrector, after half of the time
        grid = grid[:2]
    meter = measured(dd.Sampler(process, model, op, grid=grid))
    assert meter.largest < logits.nbytes / 10
    assert meter.peak < logits.nbytes / 3
    assert meter.drawn == []


def test_the_log_probability_of_a_run_allocates_no_more(logits: torch.Tensor) -> None:
    process = PROCESSES["masked"]
    model = dd.Denoiser(lambda x, t: logits, process, "loo")
    meter = measured(dd.Sampler(process, model, S.Ancestral(), steps=2), record=True)
    assert meter.largest < logits.nbytes / 10


class Wasteful(S.Ancestral):
    """The textbook step: probabilities for every site, and torch's own generator."""

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        p = at.predict(state).logits.softmax(-1)
        return state.at(torch.multinomial(p.flatten(0, 1), 1).view(state.tokens.shape), at.s)


def test_the_meter_sees_a_textbook_step(logits: torch.Tensor) -> None:
    model = dd.Denoiser(lambda x, t: logits, PROCESSES["masked"], "loo")
    meter = measured(dd.Sampler(PROCESSES["masked"], model, Wasteful(), steps=1))
    assert meter.largest >= logits.nbytes
    assert meter.drawn == ["aten.multinomial.default"]


RANDOM = {
    "Bernoulli", "Categorical", "Generator", "bernoulli", "exponential_", "gumbel_softmax", "multinomial", "normal",
    "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random",
    "random_", "randperm", "uniform_",
}  # fmt: skip
# A seed where none was given, new weights, rows of data; whether a guide is ``random``. Training, diagnostics and
# textbook steps draw much.
MAY = {
    "checks.py": {"randint"}, "keys.py": {"randint"}, "models.py": {"randn"}, "cli.py": {"Generator"},
    "data.py": {"Generator", "randint"}, "guide.py": {"random"}, "guiding.py": {"random"},
    "reward.py": {"random"},  # a guide declares it
    "blocks.py": {"Generator"},  # the type of a Python generator
    "consistency.py": {"rand"}, "reflowing.py": {"Generator", "rand", "randint", "randperm"},  # rows of a batch
    "demo_command.py": {"Generator"}, "doctor.py": {"Generator", "randn"},  # which examples, which logits to read
}  # fmt: skip
WHOLLY = (
    {"training.py", "losses/base.py", "losses/blocks.py", "noising.py", "bench.py", "bench_steps.py"}
    | {f"learning/{name}.py" for name in ("batches", "objectives", "run", "trainer")}
    | {f"plans/{name}.py" for name in ("correcting", "evolving", "intervals", "methods", "space", "trials")}
)  # searches draw, and statistics draw noise and sites


def drawn_names(file: Path) -> set[str]:
    """Names of other random sources that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
    return found & RANDOM


@pytest.mark.parametrize(
    "file",
    [
        file
        for room in ("discdiff", "samplers", "kernels")
        for file in sorted((ROOT / room).rglob("*.py"))
        if file.parent.name not in ("adapters", "theory") and not any(above.is_symlink() for above in file.parents)
    ],
    ids=lambda f: f"{f.parent.name}/{f.name}",
)
def test_there_is_no_second_sampling_path(file: Path) -> None:
    """Whatever is random in core, operators and kernels is a function of a Philox word."""
    if not {file.name, f"{file.parent.name}/{file.name}"} & WHOLLY:
        assert drawn_names(file) <= MAY.get(file.name, set())


def test_the_rule_can_fail(tmp_path: Path) -> None:
    fault = tmp_path / "fast.py"
    fault.write_text("import torch\n\ndef draw(p):\n    return (p / -torch.rand_like(p).log()).argmax(-1)\n")
    assert drawn_names(fault) == {"rand_like"}
