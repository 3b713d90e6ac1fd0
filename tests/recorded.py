"""Tokens of every shipped operator, process and kind of prediction: ``python tests/recorded.py`` writes recorded.json.

A refactoring keeps them; a change of the law of an operator records them anew and says so in its commit.
"""

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import discdiff as dd
from discdiff.command import verify
from discdiff.command.cli import parse_operator

__all__ = ["FILE", "SETTINGS", "recorded"]

FILE = Path(__file__).with_suffix(".json")
V, L, B = 5, 6, 3
_SLOWEST = "adaptive"  # thousands of calls at a small tolerance
_MATRIX = torch.full((V, V), 0.2, dtype=torch.float64) - torch.eye(V, dtype=torch.float64)

PROCESSES: dict[str, dd.Process] = {
    "masked": dd.Masked(V, dd.Linear()),
    "masked inside": dd.Masked(V, dd.Cosine(), mask_id=2),
    "uniform": dd.Uniform(V, dd.Linear()),
    "marginal": dd.Marginal(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64), dd.Linear()),
    "hybrid": dd.Hybrid(V, dd.LogLinear(), p_uniform=0.3),
    "absorbing uniform": dd.AbsorbingUniform(V, dd.Linear()),
    "general": dd.General(_MATRIX, dd.Linear()),
}
SETTINGS = list(itertools.product(verify.SHIPPED, PROCESSES, ("denoiser", "loo", "ratio")))


def _model(process: dd.Process, predicts: str) -> dd.Denoiser:
    """Logits of a site from its neighbours, its place and the time; of a ratio, over the states."""
    width = V if predicts != "ratio" or process.masks else process.columns
    generator = torch.Generator().manual_seed(1)
    near, place = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (process.states, L))

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return (near[x.roll(1, 1)] + near[x.roll(-1, 1)] / 2 + place * (1 + t.reshape(len(x), -1, 1))).float()

    return dd.Denoiser(fn, process, predicts)  # type: ignore[arg-type]


def recorded(text: str, kind: str, predicts: str) -> str | None:
    """A hash of the tokens at every time of four steps, and the calls; None where the operator refuses the setting."""
    process, operator = PROCESSES[kind], parse_operator(text)
    step = operator if operator.moves else dd.samplers.Ancestral() >> operator
    late = [] if text == _SLOWEST else [0.3, 0.1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sampler = dd.Sampler(process, _model(process, predicts), step, grid=[1.0, 0.8, 0.6, *late])
            out = sampler.sample(B, L, seed=7)
            again = sampler.sample(B, L, seed=7, record=True)
        except (TypeError, ValueError):
            return None
    assert torch.equal(out.tokens, again.tokens)  # fused and site by site
    assert again.trajectory is not None
    return hashlib.sha256(json.dumps([again.trajectory.tolist(), out.nfe]).encode()).hexdigest()[:12]


def _all() -> Iterator[tuple[str, str]]:
    for setting in SETTINGS:
        found = recorded(*setting)
        if found is not None:
            yield " | ".join(setting), found


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps(dict(_all()), indent=0) + "\n", encoding="utf-8")
