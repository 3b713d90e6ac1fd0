"""Measure steps at small sizes, the growth of their times with size, and the pass over the logits.

The figures are compared with bounds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from discdiff.command import bench
from discdiff.command.bench_peers import installed
from discdiff.command.bench_steps import (
    BLOCKS,
    CHAIN,
    GROWTH,
    PLAIN,
    SINGLE,
    SIZES,
    SLOW,
    Case,
    growing,
    interleaved,
    named,
    one_thread,
    operators,
    packages,
    ratio,
    reference,
    single,
    slope,
    steps,
)
from discdiff.command.bench_sums import ONE, SUMS, TWO, draws, largest_temporary

__all__ = ["DENSE", "Goal", "Tabled", "dense", "figures", "goals", "tables"]

Figures = dict[str, Any]  # what a file holds

DENSE = (bench.Problem(4), bench.Problem(1, 512, 126_464, dtype="bfloat16"))
READ, PASS = "one read of the logits", "dense pass: read all rows"
_DDIM, _EULER = "DDIM step, uniform", "Euler step, uniform"
# Steps with a bound of their own, and what they are set against beside the plain step.
_BESIDE = {
    "ancestral, masked": ("Euler step, masked", *BLOCKS.values()),
    "ancestral, uniform": (_DDIM, _EULER),
    f"{CHAIN}, masked": tuple(BLOCKS.values()),
    f"{CHAIN}, uniform": tuple(BLOCKS.values()),
    "unmask('max_prob'), masked": tuple(BLOCKS.values()),
}
_MOST = {"ancestral, masked": (8.5, 6.5, 4.5, 2.0), "ancestral, uniform": (9.5, 1.4, 1.0, 1.0)}  # V = 2, 20, 50, 256
_MOST_EXPONENT, _MOST_READS = 1.05, {"float32": 2.2, "bfloat16": 3.3}
_MOST_OF_TWO, _MOST_ELEMENTS = 3.0, 2.0**20


@dataclass(frozen=True)
class Goal:
    """Figure that should be at most ``bound``; ``found`` is None if it could not be measured."""

    name: str
    bound: float
    found: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the figure is at most its bound; None if it could not be measured."""
        return None if self.found is None else self.found <= self.bound


@dataclass(frozen=True)
class Tabled:
    """Table of text: a title, a header and rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # columns that hold words


def dense(problem: bench.Problem) -> dict[str, Case]:
    """Return two cases of a problem by name: one read of its logits, and the pass over all rows of its logits."""
    made = bench.cases(problem, problem.logits(), textbook=False)
    return {name: lambda run=made[name]: run for name in (READ, PASS)}  # type: ignore[misc]


def figures(rounds: int = 9, told: Callable[[str], object] = lambda text: None) -> Figures:
    """Measure all figures, which takes some minutes of one core.

    Steps of other packages are included if the packages are installed.

    Args:
        rounds: how often each case is timed.
        told: a function that gets the name of each measurement before it starts.
    """
    found: Figures = {"steps": [], "growth": [], "dense": []}
    with one_thread():
        found["machine"] = bench.machine()
    for problem in SIZES:
        told(f"steps at {named(problem)}")
        logits = problem.logits()
        names = [name for name in operators() if name not in SLOW or problem == SIZES[1]]
        cases = steps(problem, logits, names) | single(problem, logits)
        if installed():
            cases = packages(problem, logits) | cases
        times = interleaved(cases, rounds)
        record: Figures = {"problem": asdict(problem), "cases": {}}
        for name in cases:
            own = () if name in PLAIN.values() else (reference(name),)
            beside = [other for other in (*own, *_BESIDE.get(name, ())) if other in times]
            record["cases"][name] = {
                "ms": statistics.median(times[name]) * 1e3,
                "ratios": {other: ratio(times, name, other) for other in beside},
            }
        found["steps"].append(record)
    for variable in GROWTH:
        told(f"growth in {variable}")
        for name, by_size in growing(variable).items():
            times = interleaved({str(size): case for size, case in by_size.items()}, rounds)
            ms = [statistics.median(one) * 1e3 for one in times.values()]
            exponent = slope(list(by_size), list(times.values()))
            found["growth"].append(
                {"in": variable, "case": name, "sizes": list(by_size), "ms": ms, "exponent": exponent}
            )
    for problem in DENSE:
        told(f"the pass over {problem.dtype} logits")
        reads = ratio(interleaved(dense(problem), 2 * rounds, 10.0), PASS, READ)
        found["dense"].append({"problem": asdict(problem), "reads": reads})
    told("draws from two sources")
    found["sums"] = sums(rounds)
    found["goals"] = [asdict(goal) | {"holds": goal.holds} for goal in goals(found)]
    return found


def sums(rounds: int = 9) -> Figures:
    """Return the ratio of draws from two sources to draws from one, and the largest temporary of a guided step."""
    times = interleaved(draws(SUMS), 2 * rounds, 10.0)
    return {"problem": asdict(SUMS), "ratio": ratio(times, TWO, ONE), "elements": largest_temporary(SUMS)}


def goals(found: Figures) -> list[Goal]:
    """Return every goal with the figure that was found for it."""
    made = []
    for at, record in enumerate(found["steps"]):
        problem, cases = bench.Problem(**record["problem"]), record["cases"]

        def add(case: str, other: str, bound: float, cases: Figures = cases, where: str = named(problem)) -> None:
            made.append(Goal(f"{case} / {other}, {where}", bound, cases[case]["ratios"].get(other)))

        for case, bounds in _MOST.items():
            if at < len(bounds):
                add(case, reference(case), bounds[at])
        if problem.vocab >= 20:
            add("ancestral, uniform", _DDIM, 1.0)
            add("ancestral, uniform", _EULER, 1.0)
            add("unmask('max_prob'), masked", BLOCKS["32"], 1.5)
            add(f"{CHAIN}, masked", BLOCKS["32"], 2.5)
            add(f"{CHAIN}, uniform", BLOCKS["32"], 2.5)
    for record in found["dense"]:
        kind = record["problem"]["dtype"]
        made.append(Goal(f"pass over {kind} rows / one read", _MOST_READS[kind], record["reads"]))
    where = named(bench.Problem(**found["sums"]["problem"]))
    made.append(Goal(f"{TWO} / {ONE}, {where}", _MOST_OF_TWO, found["sums"]["ratio"]))
    elements = float(found["sums"]["elements"])
    made.append(Goal(f"elements of a guided step's largest temporary, {where}", _MOST_ELEMENTS, elements))
    for variable in dict.fromkeys(record["in"] for record in found["growth"]):
        most = max((r for r in found["growth"] if r["in"] == variable), key=lambda r: r["exponent"])
        made.append(Goal(f"largest exponent in {variable}: {most['case']}", _MOST_EXPONENT, most["exponent"]))
    return made


def tables(found: Figures) -> list[Tabled]:
    """Return the result of ``figures`` as tables, goals first."""
    sizes = [named(bench.Problem(**record["problem"])) for record in found["steps"]]
    columns = [record["cases"] for record in found["steps"]]

    def cell(one: Figures | None, to: str) -> str:
        if one is None:
            return ""
        own = one["ratios"].get(to)
        return f"{one['ms']:.2f}" + ("" if own is None else f" ({own:.{2 if own < 1 else 1}f})")

    def row(name: str) -> list[str]:
        return [name, *(cell(cases.get(name), reference(name)) for cases in columns)]

    added = ["what Sampler.sample adds to a run"]
    added += [f"{cases[SINGLE]['ms'] - cases['ancestral, masked']['ms']:.2f}" for cases in columns]
    beside = [
        [f"{name} / {other}", *(f"{cases[name]['ratios'][other]:.2f}" for cases in columns)]
        for name, others in _BESIDE.items()
        for other in others
        if other in columns[0][name]["ratios"]
    ]
    kept = [
        [goal.name, f"{goal.bound:g}", *(("not measured", "") if goal.found is None else _told(goal))]
        for goal in goals(found)
    ]
    grown = []
    for one in found["growth"]:
        ends = [f"{ms:.2f}" for ms in (one["ms"][0], one["ms"][-1])]
        sizes_of = f"{one['sizes'][0]} to {one['sizes'][-1]}"
        grown.append([one["in"], one["case"], sizes_of, *ends, f"{one['exponent']:.2f}"])
    return [
        Tabled("What is promised", ["figure", "at most", "found", "holds"], kept),
        Tabled("Milliseconds a step (and times the plain step)", ["step", *sizes], [*map(row, columns[1]), added]),
        Tabled("Beside other packages' steps", ["ratio", *sizes], beside),
        Tabled("Growth", ["in", "case", "sizes", "ms, first", "ms, last", "exponent"], grown, 3),
    ]


def _told(goal: Goal) -> tuple[str, str]:
    assert goal.found is not None
    return f"{goal.found:.2f}", "yes" if goal.holds else "NO"
