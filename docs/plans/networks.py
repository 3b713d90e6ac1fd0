"""Found plans on trained networks of digits and text: ``python docs/plans/networks.py``; docs/plans/networks.json.

Every network has seen one half of its data. The bound is searched on a part of the other half and scored on five more
parts of it. The judge, an autoregressive network, was trained on the other half; a plan is searched with one seed and
scored with five others. The five networks at once took two and a half minutes on an H100, with ``--device cuda``.
"""

import argparse
import functools
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters.own import load_trained
from discdiff.prediction import Truncation

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parameterisations"))
from networks import BLOCK, Judge, halves, judge, size  # noqa: E402

P = dd.plans
FIGURES = HERE / "networks.json"
CALLS, SEEDS = 8, 5
FOLDERS = {
    "digits, masked": ("digits", "steering/digits-masked"),
    "digits, uniform": ("digits", "parameterisations/digits-loo"),
    "digits, uniform, a time for every site": ("digits", "plans/digits-sites"),
    "text, masked": ("text", "blockgen/whole-masked"),
    "text, uniform": ("text", "blockgen/whole-uniform"),
}
TEMPERED = [Truncation(temperature=T, of=of) for T in (0.9, 1.1) for of in ("loo", "denoiser")]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: rows of data of a part, samples of a trial and of a score, trials of a search."""

    rows: int = 96
    trial: int = 192
    score: int = 512
    trials: int = 120
    times: int = 16  # of the fine grid; equal steps of 16 calls must be on it


def held_out(data: str, parts: int, rows: int, device: str) -> list[Tensor]:
    """Disjoint parts (rows, L) of data that no network of these saw."""
    length, half = size(data)[1], halves(data)[1]
    if data == "text":  # windows of the blocks
        half = half[:, : BLOCK // length * length].reshape(-1, length)
    order = torch.randperm(len(half), generator=torch.Generator().manual_seed(1))
    some = min(rows, len(half) // parts)
    return [half[order[n * some : (n + 1) * some]].to(device) for n in range(parts)]


def entropy(tokens: Tensor) -> float:
    """Nats a token: the entropy of the tokens within a sequence, averaged over sequences."""
    return P.Judge.entropy(tokens)


def bound(model: dd.Denoiser, parts: list[Tensor], times: int) -> dict[str, Any]:
    """The likelihood bound of 8 found steps beside equal steps, on parts that the search has not seen."""
    process, step = model.process, dd.Step(S.Ancestral())
    choices = {"grid": [step], "grid and temperature": [step, *(dd.Step(S.Ancestral(), (cut,)) for cut in TEMPERED)]}
    plans: dict[str, Any] = {
        f"{n} equal steps": dd.Plan([1 - i / n for i in range(n)] + [0.0], [step] * n) for n in (CALLS, 2 * CALLS)
    }
    for name, operators in choices.items():
        plans[name] = P.search(process, model, calls=CALLS, operators=operators, objective=P.KLUB(data=parts[0]),
                               method=P.Dynamic(), times=times)  # fmt: skip
    found: dict[str, Any] = {name: {"nats": [], "grid": list(plan.grid), "steps": [repr(one) for one in plan.steps]}
                             for name, plan in plans.items()}  # fmt: skip
    for number, part in enumerate(parts[1:]):
        objective = P.KLUB(data=part, seed=number + 1)
        objective.prepare(tuple([1 - i / times for i in range(times)] + [0.0]))
        for name, plan in plans.items():
            found[name]["nats"].append(objective.score(dd.Sampler(process, model, plan=plan)))
    return found


def candidates(name: str, process: dd.Process) -> dict[str, dd.Sampler | tuple[list[float], dd.Operator]]:
    """Samplers that a user may take without a search, by name: (grid, operator)."""
    equal = {n: [1 - i / n for i in range(n)] + [0.0] for n in (CALLS // 2, CALLS, 2 * CALLS, 4 * CALLS, 8 * CALLS)}
    found: dict[str, Any] = {f"ancestral, {n}": (grid, S.Ancestral()) for n, grid in equal.items()}
    found[f"ancestral and Gibbs, {CALLS} + {CALLS}"] = (equal[CALLS], S.Ancestral() >> S.Gibbs(sites=8))
    if process.absorbing:
        for select in ("spread", "random", "max_prob", "entropy", "margin"):
            found[f"unmask {select}, {CALLS}"] = (equal[CALLS], S.Unmask(select))
    else:
        found[f"split leap, {CALLS}"] = (equal[CALLS // 2], S.SplitLeap())
    if "site" in name or process.absorbing:
        for calls in (CALLS, 2 * CALLS):
            for select in ("spread", "random", "max_prob"):
                found[f"reveal {select}, {calls}"] = ([1.0, 0.0], S.Reveal(select, calls=calls))
    return found


def judged(name: str, model: dd.Denoiser, network: Judge, reference: Tensor, sizes: Sizes) -> dict[str, Any]:
    """Nats a token under the judge and entropy, of five seeds for every sampler, the found plan among them."""
    process, length = model.process, reference.shape[1]
    floor = entropy(reference)

    def log_prob(tokens: Tensor) -> Tensor:
        return -network(tokens).sum(-1)

    objective = P.Judge(log_prob, length=length, floor=0.98 * floor, samples=sizes.trial, seed=100)
    operators: list[Any] = [S.Ancestral(), S.Ancestral() >> S.Gibbs(sites=8), S.SplitLeap()]
    if process.absorbing:
        operators += [S.Unmask("max_prob"), S.Unmask("spread"), S.Unmask("random")]
    operators += [dd.Step(operator, (Truncation(temperature=0.9),)) for operator in operators[:2]]
    method = P.Surrogate(evaluations=sizes.trials, first=min(50, sizes.trials // 3))
    plan = P.search(process, model, calls=CALLS, operators=operators, objective=objective, method=method,
                    times=sizes.times)  # fmt: skip
    samplers = {key: dd.Sampler(process, model, operator, grid=grid)
                for key, (grid, operator) in candidates(name, process).items()}  # type: ignore[misc]  # fmt: skip
    samplers[f"found, {CALLS}"] = dd.Sampler(process, model, plan=plan)
    samplers |= corrected(model, reference)
    found: dict[str, Any] = {
        "held out": {"nats": [float(network(reference).mean())], "entropy": [floor]},
        "plan": {"grid": list(plan.grid), "steps": [repr(step) for step in plan.steps]},
    }
    for key, sampler in samplers.items():
        outs = [sampler.sample(sizes.score, length, seed=seed) for seed in range(SEEDS)]
        found[key] = {
            "nats": [float(network(out.tokens).mean()) for out in outs],
            "entropy": [entropy(out.tokens) for out in outs],
            "calls": max(out.nfe for out in outs),
        }
    return found


def corrected(model: dd.Denoiser, reference: Tensor) -> dict[str, dd.Sampler]:
    """Eight steps, with two calls of Gibbs behind each of the four steps of largest excess, or of smallest excess."""
    plain = dd.Sampler(model.process, model, S.Ancestral(), steps=CALLS)
    measured = P.excess(plain, reference, seed=7)
    largest = measured.nats.argsort(descending=True)[: CALLS // 2].tolist()
    gibbs = S.Gibbs(sites=8)
    chosen = [S.Ancestral() >> gibbs**2 if n in largest else S.Ancestral() for n in range(CALLS)]
    smallest = [S.Ancestral() if n in largest else S.Ancestral() >> gibbs**2 for n in range(CALLS)]
    return {
        f"Gibbs where the excess is large, {2 * CALLS}": dd.Sampler(
            model.process, model, plan=dd.Plan(plain.grid, [dd.Step(one) for one in chosen])
        ),
        f"Gibbs where the excess is small, {2 * CALLS}": dd.Sampler(
            model.process, model, plan=dd.Plan(plain.grid, [dd.Step(one) for one in smallest])
        ),
    }


@functools.cache
def judge_of(data: str, device: str) -> Judge:
    return judge(data).requires_grad_(False).to(device)


def measured(name: str, device: str, sizes: Sizes) -> dict[str, Any]:
    """All figures of one network."""
    data, file = FOLDERS[name]
    model = load_trained(HERE.parent / f"{file}.safetensors")
    assert isinstance(model.fn, torch.nn.Module)
    model.fn.to(device).requires_grad_(False)
    parts = held_out(data, SEEDS + 1, sizes.rows, device)
    plain = dd.Sampler(model.process, model, S.Ancestral(), steps=CALLS)
    seen = P.excess(plain, torch.cat(parts), seed=5)
    return {
        "length": size(data)[1],
        "excess": {"times": seen.times, "nats": seen.nats.tolist(), "error": seen.standard_error.tolist()},
        "bound": bound(model, parts, sizes.times),
        "judge": judged(name, model, judge_of(data, device), torch.cat(parts), sizes),
    }


def main() -> None:
    """Measure what matches, and keep it after every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--match", default="", help="only networks whose name matches this")
    parser.add_argument("--tiny", action="store_true", help="see that it runs")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    sizes = Sizes(2, 4, 4, 6) if arguments.tiny else Sizes()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in FOLDERS:
        if re.search(arguments.match, name):
            begin = time.perf_counter()
            found[name] = measured(name, arguments.device, sizes)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{time.perf_counter() - begin:6.1f} s  {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
