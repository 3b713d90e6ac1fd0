"""Logits that are no law become errors that name row and site, whatever looks at them: a draw or a reading."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from operators import STEPS, accepted
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At

pytestmark = pytest.mark.usefixtures("as_user")

B, V, L, SITE, FIRST = 16, 5, 4, 2, 40  # the bad site, and the id of the first row
PROCESSES = [dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear()), dd.AbsorbingUniform(V, dd.Linear())]
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN everywhere": lambda row: torch.full_like(row, torch.nan),
    "NaN at one token": lambda row: row.index_fill(-1, torch.tensor([2]), torch.nan),
    "+inf": lambda row: row.index_fill(-1, torch.tensor([1]), torch.inf),
    "massless": lambda row: torch.full_like(row, -torch.inf),
}
GUIDES = [
    None,
    dd.Truncation(temperature=0.0),
    dd.Truncation(top_p=0.9),
    dd.Truncation(top_k=2),
    dd.Truncation(min_p=0.1),
    dd.Truncation(temperature=0.7, top_k=3),
]
NAMES = r"row (4\d|5[0-5]), position 2: the denoiser gave"


def logits(process: dd.Process, seed: int = 0) -> Callable[[Tensor], Tensor]:
    weight = 2 * torch.randn(2, process.states, V, generator=torch.Generator().manual_seed(seed))
    return lambda x: weight[0][x] + weight[1][x.roll(1, -1)]


class Told:
    """A denoiser whose output is changed at one site, at chosen calls."""

    def __init__(self, process: dd.Process, change: Callable[[Tensor], Tensor] | None, calls: object = None) -> None:
        self.good, self.other, self.change, self.at, self.calls = logits(process), logits(process, 1), change, calls, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out = self.good(x)
        if self.at is None or self.calls == self.at:
            out[:, SITE] = self.other(x)[:, SITE] if self.change is None else self.change(out[:, SITE])
        return out


def run(process: dd.Process, operator: dd.Operator, fn: Told, guide: object = None, grid: object = None) -> Tensor:
    model = dd.Denoiser(fn, process, predicts="loo")
    model = model if guide is None else model.guided(guide)
    return (
        dd.Sampler(process, model, operator, grid=grid or [1.0, 0.6, 0.0]).sample(B, L, seed=1, first_row=FIRST).tokens
    )


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
@pytest.mark.parametrize("process", PROCESSES[:2], ids=lambda process: type(process).__name__)
def test_no_operator_makes_tokens_of_bad_logits(process: dd.Process, guide: object) -> None:
    for operator, (name, fault) in itertools.product(STEPS, FAULTS.items()):
        if accepted(operator, process):
            try:
                tokens = run(process, operator, Told(process, fault), guide)
            except ValueError as error:
                assert re.match(NAMES, str(error)), f"{operator}, {name}: {error}"
            else:
                pytest.fail(f"{operator}, {name}: {tokens[0].tolist()}")


def silent(process: dd.Process, operator: dd.Operator, thorough: bool = False) -> Iterator[str]:
    """Where an operator makes tokens of bad logits, one denoiser call after another.

    A call that it does not read may be bad: one whose logits it can do without, so that others give the same tokens.
    Every call has one fault in turn, or all of them.
    """
    grid = [1.0, 0.6, 0.3]  # without the step to time 0, which reads all
    count = Told(process, None, 0)
    usual = run(process, operator, count, None, grid)
    for call in range(1, min(count.calls, 6 if thorough else 3) + 1):
        other = run(process, operator, Told(process, None, call), None, grid)
        if not torch.equal(usual, other):
            for name, fault in list(FAULTS.items()) if thorough else [list(FAULTS.items())[call % len(FAULTS)]]:
                try:
                    run(process, operator, Told(process, fault, call), None, grid)
                except ValueError as error:
                    if not re.match(NAMES, str(error)):
                        yield f"{name} at call {call}: {error}"
                else:
                    yield f"{name} at call {call}"


@pytest.mark.parametrize("process", PROCESSES[:2], ids=lambda process: type(process).__name__)
def test_what_is_read_is_looked_at(process: dd.Process) -> None:
    for operator in STEPS:
        if accepted(operator, process):
            assert list(silent(process, operator)) == [], operator


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_every_fault_at_every_call(process: dd.Process) -> None:
    for operator in STEPS:
        if accepted(operator, process):
            assert list(silent(process, operator, thorough=True)) == [], operator


@dataclass(frozen=True)
class Unlooked(S.Greedy):
    """The planted fault: it reads rows past the door."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        where = state.free
        best = kernels.read(at.predict(state)[where].loo.rows, top=True).argmax
        return state.at(state.tokens.masked_scatter(where, best.clamp(max=V - 1)), at.s)


def test_a_reading_past_the_door_is_caught() -> None:
    assert len(list(silent(PROCESSES[1], Unlooked(), thorough=True))) == 8  # four faults at two calls
    assert list(silent(PROCESSES[1], S.Greedy(), thorough=True)) == []


@dataclass(frozen=True)
class Taken(dd.Predictor):
    """An operator of a user's, who takes whole rows."""

    what: str

    def __call__(self, state: dd.State, at: At) -> dd.State:
        said, everywhere = at.predict(state), torch.ones_like(state.free)
        rows = {
            "denoiser": lambda: said.denoiser,
            "loo": lambda: said.loo,
            "ratio": lambda: said.ratio,
            "rates": lambda: said.rates,
            "rows": lambda: said[everywhere].loo.dense().view(B, L, V),
            "reverse": lambda: said[everywhere].reverse(0.5).dense().view(B, L, V),
        }[self.what]()
        return state.at(rows.argmax(-1), at.s)


@pytest.mark.parametrize("what", ["denoiser", "loo", "ratio", "rates", "rows", "reverse"])
def test_whole_rows_are_looked_at_in_a_run(what: str) -> None:
    assert list(silent(PROCESSES[1], Taken(what), thorough=True)) == []


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_ratios_too(fault: str) -> None:
    process = PROCESSES[1]
    model = dd.Denoiser(Told(process, FAULTS[fault]), process, predicts="ratio")
    for operator in (S.Ancestral(), S.Euler(), S.Greedy(), S.Ancestral() >> S.Gibbs()):
        with pytest.raises(ValueError, match=NAMES):
            dd.Sampler(process, model, operator, grid=[0.9, 0.5, 0.0]).sample(
                B, L, seed=1, first_row=FIRST, initial=torch.zeros(B, L, dtype=torch.int64)
            )


def test_a_planner_is_looked_at() -> None:
    for value in (torch.nan, torch.inf):
        planner = S.P2(planner=lambda x, value=value: torch.zeros(x.shape).index_fill(1, torch.tensor([2]), value))
        with pytest.raises(ValueError, match="row 40, position 2: the planner gave NaN or"):
            run(PROCESSES[0], planner, Told(PROCESSES[0], None, 0))


def test_weights_of_sites_are_looked_at() -> None:
    weight = torch.zeros(2, 3).index_fill(1, torch.tensor([1]), torch.nan)
    ranking = dd.choices.Ranking(weight, torch.ones(2, dtype=torch.int64))
    for use in (ranking.sample, ranking.fork):
        with pytest.raises(ValueError, match="row 0, position 1: a weight to choose a site by is NaN"):
            use()


@pytest.mark.parametrize("process", PROCESSES[:2], ids=lambda process: type(process).__name__)
def test_blocks_and_exact_laws_refuse_them(process: dd.Process) -> None:
    model = dd.Denoiser(Told(process, FAULTS["NaN at one token"]), process, predicts="loo")
    for operator in (S.Ancestral(), S.Greedy(), S.Ancestral() >> S.InformedGibbs()):
        with pytest.raises(ValueError, match=NAMES):
            dd.Blockwise(process, model, operator, block=L, steps=2).sample(B, L, seed=0, first_row=FIRST)
        with pytest.raises(ValueError, match=r"row .*position 2: .*the denoiser gave"):
            T.kernel(operator, process, model, t=0.6, s=0.3, length=3)
        with pytest.raises(ValueError, match=r"row .*position 2: .*the denoiser gave"):
            T.law(dd.Sampler(process, model, operator, steps=2), length=3)
