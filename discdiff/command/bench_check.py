"""``discdiff bench --check``: find steps that have become slower, by ratios that hardly change on a busy machine.

Each case is timed together with a reference, a plain PyTorch step or one read of the logits. A case fails if its ratio
to the reference is over twice the stored ratio in each of three tries. The second and third try take more rounds.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from discdiff.command.bench_goals import DENSE, PASS, READ, dense
from discdiff.command.bench_steps import (
    CHAIN,
    PLAIN,
    SIZES,
    SLOW,
    Case,
    interleaved,
    named,
    operators,
    ratio,
    reference,
    steps,
)
from discdiff.command.bench_sums import ONE, SUMS, TWO, draws

__all__ = ["STORED", "Group", "Slower", "check", "groups", "store"]

STORED = Path(__file__).with_name("ratios.json")
_FEW = ("ancestral", CHAIN, "unmask('max_prob')", "split_leap")
_FACTOR, _TRIES = 2.0, 3


@dataclass(frozen=True)
class Group:
    """Cases that are timed in turn, and the name of each case's reference.

    A reference is one of the cases too, but has no reference itself.
    """

    where: str
    cases: Mapping[str, Case]
    references: Mapping[str, str]

    def ratios(self, rounds: int, only: set[str] | None = None) -> dict[str, float]:
        """Measure the ratio of each case to its reference; return the ratios by name, "where: case".

        If ``only`` is given, only the cases with these names are measured.
        """
        wanted = {f"{self.where}: {name}": name for name in self.references}
        if only is not None:
            wanted = {key: name for key, name in wanted.items() if key in only}
        if not wanted:
            return {}
        timed = {*wanted.values(), *(self.references[name] for name in wanted.values())}
        times = interleaved({name: case for name, case in self.cases.items() if name in timed}, rounds)
        return {key: ratio(times, name, self.references[name]) for key, name in wanted.items()}


@dataclass(frozen=True)
class Slower:
    """Case that has become slower, with the stored ratio and the ratio found."""

    case: str
    stored: float
    found: float

    def __str__(self) -> str:
        return f"{self.case}: {self.found:.2f} times its reference, stored {self.stored:.2f}"


def groups() -> Iterator[Group]:
    """Yield the groups of cases to check.

    At one size all operators except those in ``SLOW`` are timed, and at two other sizes four operators. The pass over
    dense logits is timed in groups of its own, and so are draws from sums of two sources.
    """
    every = [name for name in operators() if name not in SLOW]
    small, middle, large = SIZES[:3]
    for problem, names in ((small, _FEW), (middle, every), (large, _FEW)):
        cases = steps(problem, problem.logits(), names)
        own = {name: reference(name) for name in cases if name not in PLAIN.values()}
        yield Group(named(problem), cases, own)
    for problem in DENSE:
        yield Group(problem.dtype, dense(problem), {PASS: READ})
    yield Group(named(SUMS), draws(SUMS), {TWO: ONE})


def store(rounds: int = 9) -> None:
    """Measure the ratios and write them to ``STORED``, the file that ``check`` reads."""
    ratios = {key: round(value, 3) for group in groups() for key, value in group.ratios(rounds).items()}
    STORED.write_text(json.dumps(ratios, indent=1) + "\n", encoding="utf-8")


def check(rounds: int = 9) -> tuple[list[Slower], dict[str, float]]:
    """Return the cases that have become slower, and the lowest ratio found for every case.

    Args:
        rounds: the number of rounds of the first try. The second and third try take two and three times as many, and
            repeat only the cases that failed before.

    Raises:
        ValueError: for a case without a stored ratio.
    """
    stored: dict[str, float] = json.loads(STORED.read_text(encoding="utf-8"))
    found: dict[str, float] = {}
    for group in groups():
        suspects: set[str] | None = None
        for turn in range(1, _TRIES + 1):
            for key, value in group.ratios(turn * rounds, suspects).items():
                if key not in stored:
                    raise ValueError(f"bench: no ratio is stored for {key!r}; python docs/bench.py steps stores all")
                found[key] = min(value, found.get(key, value))
            suspects = {key for key in found if found[key] > _FACTOR * stored[key]}
    return [Slower(key, stored[key], value) for key, value in found.items() if value > _FACTOR * stored[key]], found
