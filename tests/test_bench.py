"""What benchmarks compare is the same thing: every step draws from the exact law. With --benchmark-enable, its cost."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from scipy import stats

import discdiff as dd
from discdiff import bench
from discdiff import samplers as S
from discdiff.cli import main

SMALL = bench.Problem(2, 8, 600, share=1 / 8)
OURS = ["masked step", "uniform step", "dense pass: read all rows", "dense pass: read and draw all rows"]


@pytest.mark.parametrize("process", [dd.Masked(5, dd.Linear()), dd.Uniform(5, dd.Linear())], ids=repr)
@pytest.mark.parametrize("textbook", [False, True])
def test_all_steps_draw_from_the_exact_law(process: dd.Process, textbook: bool, failure_rate: float) -> None:
    """One site's law after a step from t = 0.5 to 0.3 against the plug-in bridge; the textbook's formulas too."""
    n, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    z = torch.full((n, 1), 5 if process.absorbing else 1)
    expanded = logits.expand(n, 1, 5)
    if textbook:
        step = bench.textbook_masked if process.absorbing else bench.textbook_uniform
        drawn = step(expanded.contiguous(), z, 0.5, 0.7)
    else:
        model = dd.Denoiser(lambda x, t: expanded, process, "loo")
        drawn = dd.Sampler(process, model, S.Ancestral(), grid=[0.5, 0.3]).sample(n, 1, seed=0, initial=z).tokens
    prediction = dd.Prediction(expanded[:1], "loo", z[:1], 0.5, process)
    exact = prediction.reverse_rows(torch.ones(1, 1, dtype=torch.bool), 0.7).exp()[0]
    counts = torch.bincount(drawn.flatten(), minlength=len(exact))
    assert stats.chisquare(counts, n * exact).pvalue > failure_rate
    other = prediction.reverse_rows(torch.ones(1, 1, dtype=torch.bool), 0.8).exp()[0]  # planted: another time
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


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="the bench extra is not installed")
@pytest.mark.filterwarnings("ignore")
def test_peers_run() -> None:
    logits = SMALL.logits()
    made = bench.cases(SMALL, logits, textbook=False, peers=True)
    step = made["diffusers DiscreteDDIMScheduler.step, uniform"]()
    assert step.prev_sample.shape == logits.shape[:2]
    made["flow_matching Euler step, masked"]()
    assert len(made) == 8


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
