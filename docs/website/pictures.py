"""Draw the pictures of the reference from the objects themselves: matrices of operators, noise, and guided laws.

A small world of two sites and three tokens, a, b and c, stands for a trained network: its predictions are exact.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from facts import settings
from torch import Tensor

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.denoiser import Guide
from discdiff.operator import Corrector, Operator
from discdiff.theory.catalogue import KINDS

TOKENS, MASK = "abc", "_"
T_START, T_END = 0.7, 0.4
RUNS = 400  # from each state, where a matrix has no finite tree
LARGE = ("Adaptive",)  # finite trees that do not fit here


def world() -> T.Enumeration:
    """Return a law of two sites and three tokens, in which the sites mostly agree."""
    p0 = torch.tensor([[0.22, 0.03, 0.05], [0.05, 0.18, 0.02], [0.02, 0.08, 0.35]], dtype=torch.float64)
    return T.Enumeration(p0.flatten(), vocab_size=3, length=2)


def processes() -> dict[str, dd.Process]:
    """Return one process of each class, as the checks of operators have them."""
    kinds = ("masked", "uniform", "marginal", "hybrid", "ordinal", "general", "time_varying", "absorbing_uniform")
    found = [KINDS[kind].build(3, dd.Linear()) for kind in kinds]
    source = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    found.append(dd.Interpolant(3, dd.Linear(), source, p_uniform=0.3))
    return {type(process).__name__: process for process in found}


def accepted(operator: Operator) -> list[dd.Process]:
    """Return up to two processes that an operator runs on: masked and uniform, else pairs of tokens."""
    found = []
    for name in ("Masked", "Uniform", "AbsorbingUniform"):
        process = processes()[name]
        try:
            operator.check(process)
        except ValueError:
            continue
        found.append(process)
    return found[:2]


def matrix(operator: Operator, process: dd.Process) -> tuple[Tensor, list[str]]:
    """Return the probabilities (S**L, S**L) of going from a state to another, and the names of the states.

    They are enumerated from the operator's own program. If its choices have no finite tree, they are the shares of
    ``RUNS`` runs from each state.
    """
    model = world().denoiser(process, predicts="loo")
    length = 1 if process.states > 5 else 2
    if length == 1:
        p0 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        model = T.Enumeration(p0, vocab_size=3, length=1).denoiser(process, predicts="loo")
    names = states(process, length)
    end = None if isinstance(operator, Corrector) else T_END
    if _enumerated(operator):
        return T.kernel(operator, process, model, t=T_START, s=end), names
    return sampled(operator, process, model, length), names


def _enumerated(operator: Operator) -> bool:
    return operator.enumerable and type(operator).__name__ not in LARGE


def sampled(operator: Operator, process: dd.Process, model: dd.Denoiser, length: int) -> Tensor:
    """Return the shares (S**L, S**L) of runs that go from each state to each other."""
    size = process.states
    place = size ** torch.arange(length - 1, -1, -1)
    start = torch.arange(size**length)[:, None] // place % size
    sampler = dd.Sampler(process, model, operator, grid=[T_START, T_END])
    tokens = sampler.sample(seed=0, initial=start.repeat_interleave(RUNS, 0)).tokens
    found = (tokens * place).sum(-1).reshape(-1, RUNS)
    return torch.stack([row.bincount(minlength=size**length) for row in found]).double() / RUNS


def states(process: dd.Process, length: int) -> list[str]:
    """Return the names of the states: letters, an underscore for the mask, and pairs for pairs."""
    size = process.states
    one = [*TOKENS, MASK][:size] if size <= 4 else [f"{a}{b}" for a in TOKENS for b in TOKENS][:size]
    return one if length == 1 else [x + y for x in one for y in one]


def _heat(axes: Axes, values: Tensor, names: list[str], title: str) -> None:
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("after", fontsize=8)


def of_operator(name: str) -> tuple[Figure, str]:
    """Return the picture of an operator, its matrices on up to two processes, with a caption."""
    operator = next(iter(settings(name).values()))
    found = accepted(operator)
    figure = Figure(figsize=(3.4 * len(found) + 0.4, 3.6), layout="constrained")
    for axes, process in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        values, names = matrix(operator, process)
        _heat(axes, values, names, type(process).__name__)
        axes.set_ylabel("before", fontsize=8)
    times = f"at t = {T_START}" if isinstance(operator, Corrector) else f"from t = {T_START} to {T_END}"
    what = "enumerated from its program" if _enumerated(operator) else f"shares of {RUNS} runs from each state"
    world_of = "a law of two sites of three tokens" if len(states(found[0], 2)) < 30 else "one site of three tokens"
    says = f"{operator!r} {times} on {world_of}: the probability of each state after, {what}."
    return figure, f"{says} An underscore is a mask."


def of_process(name: str) -> tuple[Figure, str]:
    """Return the picture of a process: the law of a noisy site for each clean token, at three times."""
    process = processes()[name]
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    names = states(process, 1)
    for axes, t in zip(figure.subplots(1, 3), (0.1, 0.5, 0.9), strict=True):
        clean = torch.arange(3)[:, None] if process.pairs is None else process.data_tokens[:, None]
        alpha = float(process.schedule.alpha(torch.tensor(t, dtype=torch.float64)))
        rows = process.transition(alpha, 1.0)[clean[:, 0]]
        axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_yticks(range(len(clean)), list(TOKENS)[: len(clean)], fontsize=8)
        axes.set_title(f"t = {t}", fontsize=9)
        axes.set_xlabel("noisy", fontsize=8)
    says = f"{name}: the law of a noisy site for each clean token (rows), at three times."
    return figure, f"{says} An underscore is a mask."


def guides() -> dict[str, Callable[[dd.Denoiser], dd.Denoiser]]:
    """Map each guide to a function that guides a model by an example of it."""
    other = T.Enumeration(torch.full((9,), 1 / 9, dtype=torch.float64), vocab_size=3, length=2)
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    weight = lambda x: 1.5 * (x == 0).sum(-1).double()  # noqa: E731

    def measured() -> dd.Measurement:
        noise = dd.GaussianNoise(torch.tensor([1.5, 0.5], dtype=torch.float64), 0.7)
        return dd.Measurement(codes, lambda e: e.sum(-2), noise)

    return {
        "Allow": lambda m: m.guided(dd.Allow(torch.tensor([[True, False, True], [True, True, True]]))),
        "Forbid": lambda m: m.guided(dd.Forbid([1])),
        "Truncation": lambda m: m.guided(dd.Truncation(temperature=0.5)),
        "ClassifierFree": lambda m: m.guided(dd.ClassifierFree(other.denoiser(m.process), 1.0)),
        "Constraint": lambda m: m.guided(dd.Constraint.regex("ab*|cc", list(TOKENS))),
        "Doob": lambda m: m.guided(dd.Doob(world().log_h(m.process, weight(_all())))),
        "Reward": lambda m: m.guided(dd.Reward(weight, samples=4)),
        "APS": lambda m: m.guided(dd.APS(measured())),
    }


def guide(name: str) -> Guide | None:
    """Return the example of a guide, or None if there is none that declares anything."""
    if name not in guides():
        return None
    model = guides()[name](world().denoiser(dd.Masked(3, dd.Linear())))
    held = (part for value in vars(model).values() if isinstance(value, tuple) for part in value)
    return next((part for part in held if isinstance(part, Guide)), None)


def _all() -> Tensor:
    return torch.arange(9)[:, None] // torch.tensor([3, 1]) % 3


def of_guide(name: str) -> tuple[Figure, str]:
    """Return the picture of a guide: the law of samples without and with it."""
    process = dd.Masked(3, dd.Linear())
    model = world().denoiser(process)
    laws = []
    for one in (model, guides()[name](model)):
        tokens = dd.Sampler(process, one, S.Ancestral(), steps=16).sample(2000, 2, seed=0).tokens
        laws.append((tokens * torch.tensor([3, 1])).sum(-1).bincount(minlength=9) / 2000)
    figure = Figure(figsize=(5.6, 2.6), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(9)
    axes.bar(places - 0.2, laws[0], 0.4, label="without", color="0.7")
    axes.bar(places + 0.2, laws[1], 0.4, label="with", color="tab:blue")
    axes.set_xticks(range(9), [TOKENS[int(x)] + TOKENS[int(y)] for x, y in _all()])
    axes.set_ylabel("share of 2000 samples", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    return figure, f"{name}: samples of two sites of three tokens, without the guide and with an example of it."


def makers() -> dict[str, Callable[[str], tuple[Figure, str]]]:
    """Map each operator, process and guide that has a picture to the function that draws it."""
    made = dict.fromkeys(S.__all__, of_operator) | dict.fromkeys(processes(), of_process)
    return made | dict.fromkeys(guides(), of_guide)


def draw(folder: Path) -> dict[str, str]:
    """Draw all pictures into a folder, and map each name to its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, maker in makers().items():
        figure, captions[name] = maker(name)
        figure.savefig(folder / f"{name}.png", dpi=100)
    return captions
