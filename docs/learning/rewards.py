"""Jobs of study.py on rewards: the masked network of Sudoku 4 learns by policy gradient to solve grids in few calls.

The reward of a sample is 1 if it is solved, less 1/8 for each symbol that a row, column or box lacks. The figure is the
share of solved samples. The reference is the kept network. How far a network is from it is measured in three ways:

* the KL divergence of runs, ``path_kl``, by sampling. It is at least that of the samples.
* the same where cells are revealed in a fixed order. There a sample has one run, so it is that of the samples.
* exactly, by ``dd.theory.law``, for puzzles with four free cells, which have 256 answers, two of them right.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff.learning.likelihoods import path_kl
from discdiff.learning.policy import PolicyGradient

sys.path.insert(0, str(Path(__file__).parent))
import sudoku

CALLS, STEPS, COPIES, RATE, SAMPLES = 4, 160, 256, 3e-3, 2048
PUZZLE_STEPS, PUZZLE_COPIES = 160, 64
PENALTY = 0.05
KINDS: dict[str, dict[str, Any]] = {
    "runs": {},
    "runs, penalty": {"kl": PENALTY},
    "one-step approximation": {"likelihood": "one_step"},
}


def reward(tokens: Int[Tensor, "N 16"]) -> Tensor:
    """1 for a solved grid, -1/8 for each symbol that a unit lacks."""
    return sudoku.solved(tokens, 4).double() - sudoku.violations(tokens, 4).double() / 8


def steps(operator: str) -> tuple[dd.Operator, list[float]]:
    """The operator and grid of four calls."""
    if operator == "ancestral":
        return S.Ancestral(), [1 - n / CALLS for n in range(CALLS)] + [0.0]
    return S.Reveal("spread", calls=CALLS), [1.0, 0.0]


def figures(sampler: dd.Sampler, reference: dd.Denoiser, seed: int, samples: int) -> dict[str, float]:
    """The share of solved grids, how many differ, and the KL divergence of runs with its standard error."""
    tokens = sampler.sample(samples, 16, seed=100 + seed).tokens
    right = tokens[sudoku.solved(tokens, 4)]
    _, counts = torch.unique(right, dim=0, return_counts=True)
    met = float((counts * (counts - 1)).sum()) / max(1, len(right) * (len(right) - 1))
    kl = path_kl(sampler, reference, batch=samples, length=16, seed=200 + seed)
    return {
        "solved": len(right) / samples, "collision": met, "grids": len(counts), "path KL": float(kl.value),
        "error": float(kl.error),
    }  # fmt: skip


def fit(
    network: nn.Module, model: dd.Denoiser, loss: PolicyGradient, length: int, seed: int, many: int
) -> tuple[dd.Denoiser, list[tuple[int, float]]]:
    """Train by policy gradient; return the denoiser and the curve of the reward."""
    trainer = dd.Trainer(
        network, model.process, loss, lambda _: torch.zeros(1, length, dtype=torch.int64), predicts="denoiser",
        time=None, rate=RATE, warmup=many // 10, ema=0.8, seed=seed, every=10, progress=False,
    )  # fmt: skip
    found = trainer.fit(many)
    return found, [(step, round(-value, 4)) for step, value in trainer.curve]


def grid_job(kind: str, operator: str, tiny: bool, seeds: int) -> dict[str, Any]:
    """Whole grids: before and after the training, with each seed."""
    many, samples = (2, 16) if tiny else (STEPS, SAMPLES)
    found: dict[str, Any] = {"steps": many, "rows": COPIES, "before": [], "after": [], "seconds": []}
    for seed in range(seeds):
        (network, model), (_, reference) = sudoku.load("sudoku4-masked"), sudoku.load("sudoku4-masked")
        run, grid = steps(operator)
        before = dd.Sampler(model.process, reference, run, grid=grid)
        found["before"].append(figures(before, reference, seed, samples))
        more = dict(KINDS[kind])
        if "kl" in more:
            more["reference"] = reference
        loss = PolicyGradient(before, reward, copies=COPIES, **more)
        begin = time.perf_counter()
        learned, curve = fit(network, model, loss, 16, seed, many)
        found["seconds"].append(round(time.perf_counter() - begin, 1))
        after = dd.Sampler(model.process, learned, run, grid=grid)
        found["after"].append(figures(after, reference, seed, samples) | {"curve": curve})
    return found


# --- puzzles with four free cells -----------------------------------------------------------------------------------


class Given(nn.Module):
    """A network of whole grids as one of the free cells (B, 4) of a puzzle."""

    puzzle: Tensor
    free: Tensor

    def __init__(self, inner: nn.Module, puzzle: Int[Tensor, " 16"], free: Int[Tensor, " 4"]) -> None:
        super().__init__()
        self.inner: nn.Module = inner
        self.register_buffer("puzzle", puzzle)
        self.register_buffer("free", free)

    def forward(self, x: Int[Tensor, "B 4"], _: Tensor | None = None) -> Tensor:
        """Return the logits (B, 4, 4) of the free cells."""
        whole = self.puzzle.expand(len(x), -1).index_copy(1, self.free, x)
        return self.inner(whole)[:, self.free]


def puzzle(seed: int) -> tuple[Tensor, Tensor]:
    """A random grid with two answers, and its four free cells: two rows of a band hold a, b and b, a in two columns."""
    for grid in sudoku.grids(4, 200, seed):
        for top in (0, 2):
            for left in (0, 1):
                for right in (2, 3):
                    cells = torch.tensor([4 * top + left, 4 * top + right, 4 * top + 4 + left, 4 * top + 4 + right])
                    one, two, three, four = grid[cells].tolist()
                    if one == four and two == three:
                        return grid, cells
    raise RuntimeError("no such grid was drawn")


def exact_job(tiny: bool, seeds: int) -> dict[str, Any]:
    """Puzzles with two answers and two calls, by the exact law: the share solved and the KL divergence of samples."""
    many = 2 if tiny else PUZZLE_STEPS
    found: dict[str, Any] = {"steps": many, "calls": 2}
    for penalty in (0.0, 0.3):
        rows: list[dict[str, Any]] = []
        for seed in range(seeds):
            whole, free = puzzle(seed)
            network, reference = (Given(sudoku.load("sudoku4-masked")[0], whole, free).eval() for _ in range(2))
            process = sudoku.process_of("sudoku4-masked")
            model, fixed = (dd.Denoiser(one, process, "denoiser", time=None) for one in (network, reference))
            before = dd.Sampler(process, fixed, S.Ancestral(), steps=2)

            def gained(tokens: Tensor, whole: Tensor = whole, free: Tensor = free) -> Tensor:
                """The reward of answers (N, 4)."""
                return reward(whole.expand(len(tokens), -1).index_copy(1, free, tokens))

            answers = torch.cartesian_prod(*[torch.arange(4)] * 4)
            loss = PolicyGradient(
                before, gained, copies=PUZZLE_COPIES, reference=fixed if penalty else None, kl=penalty,
            )  # fmt: skip
            learned, _ = fit(network, model, loss, 4, seed, many)
            after = dd.Sampler(process, learned, S.Ancestral(), steps=2)
            p, q = (dd.theory.law(one, length=4) for one in (after, before))
            paths = path_kl(after, fixed, batch=256 if tiny else 4096, length=4, seed=seed)
            good = (gained(answers) == 1).double()
            rows.append({
                "solved before": float(q @ good), "solved after": float(p @ good),
                "KL": float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()),
                "path KL": float(paths.value), "error": float(paths.error), "answers": p[good > 0].tolist(),
            })  # fmt: skip
        found[f"penalty {penalty:g}"] = rows
    return found


def jobs(tiny: bool) -> dict[str, Callable[[int], dict[str, Any]]]:
    """The jobs by name; each takes the number of seeds."""
    found: dict[str, Callable[[int], dict[str, Any]]] = {}
    for kind in KINDS:
        found[f"sudoku4: rewarded, {kind}"] = functools.partial(grid_job, kind, "ancestral", tiny)
    found["sudoku4: rewarded, fixed order, penalty"] = functools.partial(grid_job, "runs, penalty", "order", tiny)
    found["sudoku4: rewarded, four free cells"] = functools.partial(exact_job, tiny)
    return found
