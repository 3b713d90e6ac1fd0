"""What an operator may not do: allocate as many numbers as there are logits, or draw but through the kernels."""

import ast
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import discdiff as dd
from discdiff import samplers as S

ROOT = Path(__file__).parent.parent
B, L, V = 3, 48, 40_009


class Meter(TorchDispatchMode):
    """Weighs every tensor that torch makes, and notes what torch's own generators drew."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0
        self.seen: set[int] = set()
        self.drawn: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn.append(str(func))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given | self.seen:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


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


def step(operator: Callable[[], dd.Operator]) -> dd.Operator:
    made = operator()
    return made if made.moves else S.Ancestral() >> made


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(B, L, V, generator=torch.Generator().manual_seed(0))


def measured(sampler: dd.Sampler, **options: bool) -> Meter:
    gc.collect()
    with Meter() as meter:
        sampler.sample(B, L, seed=0, **options)
    return meter


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("name", "predicts"), CASES)
def test_no_operator_allocates_the_logits_again(
    operator: Callable[[], dd.Operator], name: str, predicts: str, logits: torch.Tensor
) -> None:
    """Two steps, the last of which may change every site: temporaries stay below a twentieth of the logits."""
    process = PROCESSES[name]
    model = dd.Denoiser(lambda x, t: logits, process, predicts)
    meter = measured(dd.Sampler(process, model, step(operator), grid=[1.0, 0.5, 0.05]))
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
# A seed where none was given, and the weights of a new network; training and diagnostics draw times and test sites.
MAY = {"distributions.py": {"randint"}, "sampler.py": {"randint"}, "models.py": {"randn"}}
WHOLLY = {"train.py", "losses.py", "diagnose.py"}


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
    [f for room in ("discdiff", "samplers", "kernels") for f in sorted((ROOT / room).glob("*.py"))],
    ids=lambda f: f"{f.parent.name}/{f.name}",
)
def test_there_is_no_second_sampling_path(file: Path) -> None:
    """Whatever is random in core, operators and kernels is a function of a Philox word."""
    if file.name not in WHOLLY:
        assert drawn_names(file) <= MAY.get(file.name, set())


def test_the_rule_can_fail(tmp_path: Path) -> None:
    fault = tmp_path / "fast.py"
    fault.write_text("import torch\n\ndef draw(p):\n    return (p / -torch.rand_like(p).log()).argmax(-1)\n")
    assert drawn_names(fault) == {"rand_like"}
