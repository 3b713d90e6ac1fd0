"""What benchmarks compare is the same thing: every step draws from the exact law. With --benchmark-enable, its cost."""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from scipy import stats

import discdiff as dd
from discdiff import samplers as S
from discdiff.command import bench, bench_check, bench_goals, bench_steps, bench_sums
from discdiff.command.cli import main
from discdiff.samplers.expression import parse_operator

SMALL = bench.Problem(2, 8, 600, share=1 / 8)
OURS = ["masked step", "uniform step", "dense pass: read all rows", "dense pass: read and draw all rows"]
TINY = bench.Problem(2, 8, 5, share=1 / 8)
FEW = ("ancestral", bench_steps.CHAIN, "unmask('max_prob')", "split_leap")
WRITTEN = {
    "textbook": (bench.textbook_masked, bench.textbook_uniform),
    "plain": (bench_steps.plain_masked, bench_steps.plain_uniform),
}
needs_peers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="the bench extra is not there")


@pytest.mark.parametrize("process", [dd.Masked(5, dd.Linear()), dd.Uniform(5, dd.Linear())], ids=repr)
@pytest.mark.parametrize("whose", ["ours", *WRITTEN])
def test_all_steps_draw_from_the_exact_law(process: dd.Process, whose: str, failure_rate: float) -> None:
    """One site's law after a step from t = 0.5 to 0.3 against the plug-in bridge; the formulas written in torch too."""
    torch.manual_seed(0)
    n, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    z = torch.full((n, 1), 5 if process.absorbing else 1)
    expanded = logits.expand(n, 1, 5)
    if whose in WRITTEN:
        masked, uniform = WRITTEN[whose]
        drawn = (masked if process.absorbing else uniform)(expanded.contiguous(), z, 0.5, 0.7)
    else:
        model = dd.Denoiser(lambda x, t: expanded, process, "loo")
        drawn = dd.Sampler(process, model, S.Ancestral(), grid=[0.5, 0.3]).sample(n, 1, seed=0, initial=z).tokens
    prediction = dd.Prediction(expanded[:1], "loo", z[:1], 0.5, process)
    exact = prediction[torch.ones(1, 1, dtype=torch.bool)].reverse(0.7).dense().exp()[0]
    counts = torch.bincount(drawn.flatten(), minlength=len(exact))
    assert stats.chisquare(counts, n * exact).pvalue > failure_rate
    other = prediction[torch.ones(1, 1, dtype=torch.bool)].reverse(0.8).dense().exp()[0]  # planted: another time
    assert stats.chisquare(counts, n * other).pvalue < failure_rate


def test_ratios_are_taken_within_a_round() -> None:
    logits = SMALL.logits()
    results = bench.measure(bench.cases(SMALL, logits), rounds=2)
    named = {result.name: result for result in results}
    assert named["one read of the logits"].reads == 1
    assert all(result.milliseconds > 0 and result.reads > 0 for result in results)
    assert named["textbook eager step, masked"].peak_mib > logits.nbytes / 2**20
    assert named["one read of the logits"].peak_mib < 1e-3
    record = bench.report(SMALL, results)
    assert json.loads(json.dumps(record))["machine"]["threads"] == torch.get_num_threads()


def test_a_step_reveals_the_share_that_is_said() -> None:
    problem = bench.Problem(64, 64, 7, share=1 / 16)
    logits = problem.logits()
    tokens = bench.cases(problem, logits)["masked step"]().tokens
    masked = float((tokens == 7).double().mean())
    assert masked == pytest.approx(0.5 - 1 / 16, abs=0.03)


def test_the_command_prints_a_table_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    sizes = ["--batch", "2", "--length", "8", "--vocab", "300", "--rounds", "1"]
    assert main(["bench", *sizes, "--json", str(out)]) == 0
    assert "masked step" in capsys.readouterr().out
    assert json.loads(out.read_text())["problem"]["vocab"] == 300
    assert main(["bench", "--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main(["bench", "--json", str(tmp_path / "none" / "x.json")]) == 2


def test_missing_peers_say_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert main(["bench", "--batch", "1", "--length", "4", "--vocab", "30", "--peers"]) == 2
    assert "discdiff[bench]" in capsys.readouterr().err


@needs_peers
@pytest.mark.filterwarnings("ignore")
def test_peers_run() -> None:
    logits = SMALL.logits()
    made = bench.cases(SMALL, logits, textbook=False, peers=True)
    for name in ("diffusers DiscreteDDIMScheduler.step, uniform", "flow_matching Euler step, masked"):
        assert made[name]().shape == logits.shape[:2]
    assert len(made) == 8


# --- small steps ----------------------------------------------------------------------------------------------------


def test_the_plain_step_reveals_the_surest_masks_as_the_operator_does(failure_rate: float) -> None:
    torch.manual_seed(0)
    n, row = 20_000, torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.1], [2.0, 0.0, -1.0], [0.0, 0.0, 9.0]])
    z = torch.tensor([[3, 3, 3, 1]]).expand(n, -1)
    plain = bench_steps.plain_unmask(row.expand(n, -1, -1), z, 2)
    model = dd.Denoiser(lambda x, t: row.expand(len(x), -1, -1), dd.Masked(3, dd.Linear()), "loo")
    sampler = dd.Sampler(model.process, model, S.Unmask("max_prob"), grid=[0.75, 0.25])
    ours = sampler.sample(n, 4, seed=0, initial=z).tokens
    for site in (0, 2):
        exact = row[site].softmax(-1).double()
        for drawn in (plain, ours):
            counts = torch.bincount(drawn[:, site], minlength=3)
            assert len(counts) == 3
            assert stats.chisquare(counts, n * exact / exact.sum()).pvalue > failure_rate
    for drawn in (plain, ours):
        assert bool((drawn[:, 1] == 3).all())  # the least sure one
        assert bool((drawn[:, 3] == 1).all())


@pytest.fixture(scope="module")
def tiny() -> Mapping[str, bench_steps.Case]:
    return bench_steps.steps(TINY, TINY.logits())


def test_every_shipped_operator_takes_a_small_step(tiny: Mapping[str, bench_steps.Case]) -> None:
    shape = (TINY.batch, TINY.length)
    for name, prepare in tiny.items():
        for run in (prepare(), prepare()):
            out = run()
            assert isinstance(out, dd.State | torch.Tensor), name
            assert (out.tokens if isinstance(out, dd.State) else out).shape == shape
        assert bench_steps.reference(name) in tiny
    shown = {name.rsplit(", ", 1)[0] for name in tiny}
    assert shown == {*bench_steps.operators(), "plain step"}
    classes = {type(parse_operator(text)).__name__ for text in shown - {"plain step"}}
    assert {name for name in S.__all__ if isinstance(getattr(S, name), type)} <= classes


@needs_peers
@pytest.mark.filterwarnings("ignore")
def test_other_packages_take_the_same_small_steps() -> None:
    logits = TINY.logits()
    for name, prepare in bench_steps.packages(TINY, logits).items():
        for _ in range(2):
            out = prepare()()
            assert isinstance(out, torch.Tensor)
            assert out.shape == (TINY.batch, TINY.length), name
            assert int(out.max()) <= TINY.vocab


@needs_peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Euler step, masked", "Euler step, uniform", "DDIM step, uniform"])
def test_other_packages_step_between_the_same_times(name: str) -> None:
    """By the share of sites that change: DDIM's posterior is ours, Euler's jumps have rate 1 / (1 - alpha)."""
    problem = bench.Problem(64, 256, 7)
    logits, (t, s) = problem.logits(), problem.times
    z, tokens = bench.states(problem)
    start = z if name.endswith("masked") else tokens
    torch.manual_seed(0)
    theirs = bench_steps.packages(problem, logits)[name]()()
    assert isinstance(theirs, torch.Tensor)
    if name.startswith("DDIM"):
        model = dd.Denoiser(lambda x, time: logits, dd.Uniform(7, dd.Linear()), "denoiser")
        ours = dd.Sampler(model.process, model, S.Ancestral(), grid=[t, s]).sample(seed=0, initial=start).tokens
        share = float((ours != start).double().mean())
    else:
        own = torch.nn.functional.pad(logits.softmax(-1), (0, 1)).gather(-1, start[..., None])
        share = -math.expm1(-(t - s) / t) * float((1 - own).mean())
    assert float((theirs != start).double().mean()) == pytest.approx(share, rel=0.07)


def test_times_are_of_one_thread_and_slow_cases_leave_early() -> None:
    threads: list[int] = []

    def prepare() -> Callable[[], object]:
        return lambda: threads.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    times = bench_steps.interleaved({"one": prepare, "other": prepare}, 3)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert set(threads) == {1}
    assert {name: len(taken) for name, taken in times.items()} == {"one": 3, "other": 3}
    assert all(seconds > 0 for taken in times.values() for seconds in taken)
    assert [len(taken) for taken in bench_steps.interleaved({"one": prepare}, 3, most=0.0).values()] == [1]


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    times = {"a": [2.0, 20.0, 9.0], "b": [1.0, 10.0, 1.0], "once": [3.0]}
    assert bench_steps.ratio(times, "a", "b") == 2
    assert bench_steps.ratio(times, "once", "b") == 3


def test_a_slope_is_the_exponent() -> None:
    sizes = [2, 4, 8, 16]
    exact = [[3 * n**1.3] * 3 for n in sizes]
    assert bench_steps.slope(sizes, exact) == pytest.approx(1.3)
    noisy = [[y[0], y[1], y[2] * n] for n, y in zip(sizes, exact, strict=True)]  # planted: one round grows faster
    assert bench_steps.slope(sizes, noisy) == pytest.approx(1.3)
    assert bench_steps.slope(sizes, [[y[0], y[2] * n, y[2] * n] for n, y in zip(sizes, exact, strict=True)]) > 2


# --- what is promised, and what is stored ----------------------------------------------------------------------------


def stubbed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int], float]) -> None:
    """Timings that are said, of tiny problems; rounds are the first."""

    def interleaved(cases: Mapping[str, object], rounds: int, most: float = 1.0) -> dict[str, list[float]]:
        return {name: [seconds(name, rounds)] * rounds for name in cases}

    tiny = (TINY, bench.Problem(2, 8, 6), bench.Problem(2, 8, 7))
    for module in (bench_check, bench_goals):
        monkeypatch.setattr(module, "interleaved", interleaved)
        monkeypatch.setattr(module, "DENSE", (SMALL, bench.Problem(2, 8, 600, dtype="bfloat16")))
        monkeypatch.setattr(module, "SIZES", tiny)
        monkeypatch.setattr(module, "SUMS", bench.Problem(2, 8, 600))
    monkeypatch.setattr(bench_check, "operators", lambda: ["ancestral", bench_steps.CHAIN, "adaptive"])
    monkeypatch.setattr(bench.kernels, "row_pass", lambda: "native")
    monkeypatch.setattr(bench_goals, "GROWTH", {"V": [TINY, bench.Problem(2, 8, 10)]})
    monkeypatch.setattr(bench_goals, "growing", lambda variable: {"a step": {5: None, 10: None}})


def test_the_check_fails_by_name_where_a_step_has_become_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rounds: list[int] = []
    once: set[str] = set()

    def seconds(name: str, of: int) -> float:
        rounds.append(of)
        return 5.0 if name in once and of == 9 else 1.5 if "gibbs" in name else 1.0

    stubbed(monkeypatch, seconds)
    stored, out = tmp_path / "ratios.json", tmp_path / "found.json"
    monkeypatch.setattr(bench_check, "STORED", stored)
    bench_check.store()
    right = json.loads(stored.read_text())
    case = "V=6, L=8, B=2: ancestral >> gibbs(8), uniform"
    assert right[case] == 1.5
    assert main(["bench", "--check", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["ratios"] == right
    assert set(rounds) == {9}
    assert "slower" not in capsys.readouterr().out

    stored.write_text(json.dumps(right | {case: 0.74, "bfloat16: dense pass: read all rows": 0.49}))  # planted
    assert main(["bench", "--check"]) == 1
    said = capsys.readouterr().out
    assert f"slower: {case}: 1.50 times its reference, stored 0.74" in said
    assert "slower: bfloat16: dense pass: read all rows: 1.00 times its reference, stored 0.49" in said
    assert said.count("slower") == 2
    assert {18, 27} <= set(rounds)  # it was measured again, for longer, before that was said

    stored.write_text(json.dumps(right))
    once.add("ancestral, masked")  # slow in the first try only, as on a machine that was busy
    assert main(["bench", "--check"]) == 0
    del right[case]
    stored.write_text(json.dumps(right))
    assert main(["bench", "--check"]) == 2
    assert "no ratio is stored for" in capsys.readouterr().err
    monkeypatch.setattr(bench.kernels, "row_pass", lambda: "torch")
    assert main(["bench", "--check"]) == 0
    assert "nothing is compared" in capsys.readouterr().out


def test_a_ratio_is_stored_for_every_case_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it `discdiff bench --check` would stop; `python docs/bench.py steps` stores all."""
    empty = lambda self: torch.zeros(self.batch, self.length, 1).expand(-1, -1, self.vocab)  # noqa: E731
    monkeypatch.setattr(bench.Problem, "logits", empty)
    monkeypatch.setattr(bench_check, "dense", lambda problem: {})
    keys = {f"{group.where}: {name}" for group in bench_check.groups() for name in group.references}
    stored = json.loads(bench_check.STORED.read_text())
    assert set(stored) == keys
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in stored.values())


def test_promises_are_those_of_the_issue_and_broken_ones_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_goals, "installed", lambda: False)
    stubbed(monkeypatch, lambda name, of: 3.0 if name in ("ancestral, masked", "10") else 1.0)
    out = tmp_path / "goals.json"
    assert main(["bench", "--goals", "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    goals = {goal["name"]: goal for goal in found["goals"]}
    masked = [goals[f"ancestral, masked / plain step, masked, V={v}, L=8, B=2"] for v in (5, 6, 7)]
    assert [(goal["bound"], goal["found"], goal["holds"]) for goal in masked] == [
        (8.5, 3, True),
        (6.5, 3, True),
        (4.5, 3, True),
    ]
    grown = goals["largest exponent in V: a step"]
    assert grown["found"] == pytest.approx(math.log2(3))
    assert not grown["holds"]
    assert goals["draws from two sources / draws from one source, V=600, L=8, B=2"]["bound"] == 3
    memory = goals["elements of a guided step's largest temporary, V=600, L=8, B=2"]
    assert memory["bound"] == 2**20
    assert 0 < memory["found"] < 2 * 8 * 600, "less than the logits"
    assert "NO" in said
    assert found["machine"]["threads"] == 1


@needs_peers
@pytest.mark.filterwarnings("ignore")
def test_promises_against_other_packages_begin_at_twenty_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, lambda name, of: 3.0 if name.startswith("unmask('max_prob')") else 2.0)
    monkeypatch.setattr(bench_goals, "SIZES", (TINY, bench.Problem(2, 8, 20)))
    found = bench_goals.figures(1)
    goals = {goal.name: (goal.bound, goal.found, goal.holds) for goal in bench_goals.goals(found)}
    where, blocks = "V=20, L=8, B=2", "BlockRefinement step, 32 sites"
    assert goals[f"unmask('max_prob'), masked / {blocks}, {where}"] == (1.5, 1.5, True)
    assert goals[f"ancestral >> gibbs(8), uniform / {blocks}, {where}"] == (2.5, 1, True)
    assert goals[f"ancestral, uniform / DDIM step, uniform, {where}"] == (1, 1, True)
    assert goals[f"ancestral, uniform / Euler step, uniform, {where}"] == (1, 1, True)
    assert not any(blocks in name and "V=5" in name for name in goals)
    assert len({table.title for table in bench_goals.tables(found)}) == 4


def test_both_cases_of_sums_draw_the_same_tokens() -> None:
    """2 a - a is a: the ratio compares the same draws, and neither of them reads the other's logits."""
    made = bench_sums.draws(bench.Problem(2, 8, 2500))
    one, two = (made[name]()() for name in (bench_sums.ONE, bench_sums.TWO))
    assert isinstance(one, torch.Tensor)
    assert isinstance(two, torch.Tensor)
    assert float((one == two).double().mean()) == 1
    assert bench_sums.largest_temporary(bench.Problem(2, 64, 20_000)) < 2**20 < 2 * 64 * 20_000


# --- the benchmarks of make bench ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_cost(name: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    """Timed at V = 50257 with --benchmark-enable; otherwise run once, small."""
    enabled = request.config.getoption("benchmark_enable")
    if enabled:
        torch.set_num_threads(torch.multiprocessing.cpu_count())
    problem = bench.Problem() if enabled else SMALL
    made = bench.cases(problem, problem.logits(), textbook=False)
    out = benchmark(made[name])
    torch.set_num_threads(1)
    if name.endswith("step"):
        assert out.tokens.shape == (problem.batch, problem.length)
    elif name.endswith("draw all rows"):
        assert bool((out >= 0).all())
    else:
        assert bool(out.log_sum_exp.isfinite().all())


SMALL_STEPS = [
    f"{text}, {kind}"
    for text in FEW
    for kind in ("masked", "uniform")
    if not (text.startswith("unmask") and kind == "uniform")
]


@pytest.mark.parametrize("name", SMALL_STEPS)
def test_cost_of_a_small_step(name: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    """Timed at V = 50, L = 256, B = 16 with --benchmark-enable; otherwise run once, tiny."""
    problem = bench_steps.SIZES[2] if request.config.getoption("benchmark_enable") else TINY
    prepare = bench_steps.steps(problem, problem.logits(), FEW)[name]
    out = benchmark.pedantic(lambda run: run(), setup=lambda: ((prepare(),), {}), rounds=200)
    assert out.tokens.shape == (problem.batch, problem.length)
