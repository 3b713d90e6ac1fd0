"""Plans for a trained antibody network: ``python docs/plans/antibody.py``; docs/plans/antibody.json.

It takes about ten minutes on one core, after ``make antibody``. docs/antibodies.csv holds 47 natural
domains of 107 residues, all light chains. The grid is searched on half of them and scored on the other half with five
seeds of noise. Samples of five seeds are scored by the share that has all the residues that hold a domain together.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

import discdiff as dd
from discdiff import samplers as S

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import antibodies as A  # noqa: E402

P = dd.plans
FIGURES, LENGTH, TIMES, CALLS, SEEDS, ROWS = HERE / "antibody.json", 107, 16, 8, 5, 16


def equal(steps: int) -> dd.Plan:
    return dd.Plan([1 - n / steps for n in range(steps)] + [0.0], [dd.Step(S.Ancestral())] * steps)


def bounds(model: dd.Denoiser) -> dict[str, Any]:
    """The bound of 8 found steps beside equal steps, nats a sequence, on chains that the search has not seen."""
    rows = [A.tokens(one) for group in ("PDB, heavy", "PDB, light") for one in A.known()[group] if len(one) == LENGTH]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    data = torch.tensor(rows)[order]
    seen, held = data[: len(data) // 2], data[len(data) // 2 :]
    plans = {f"{steps} equal steps": equal(steps) for steps in (CALLS, 2 * CALLS)}
    plans[f"{CALLS} found steps"] = P.search(
        model.process, model, calls=CALLS, operators=[S.Ancestral()], objective=P.KLUB(data=seen), method=P.Dynamic(),
        times=TIMES,
    )  # fmt: skip
    found: dict[str, Any] = {name: {"nats": [], "grid": list(plan.grid)} for name, plan in plans.items()}
    for seed in range(1, SEEDS + 1):
        objective = P.KLUB(data=held, seed=seed)
        objective.prepare(tuple([1 - n / TIMES for n in range(TIMES)] + [0.0]))
        for name, plan in plans.items():
            found[name]["nats"].append(objective.score(dd.Sampler(model.process, model, plan=plan)))
    return found | {"rows": len(held)}


def domains(model: dd.Denoiser, grid: list[float]) -> dict[str, Any]:
    """How many of the samples of each seed have all residues of the rules."""
    made = model.guided(dd.Truncation(temperature=A.TEMPERATURE))
    process, rule, found = model.process, list(A.RULES.values())[-1], {}
    samplers = {
        f"ancestral, {CALLS} equal steps": dd.Sampler(process, made, plan=equal(CALLS)),
        f"ancestral, {2 * CALLS} equal steps": dd.Sampler(process, made, plan=equal(2 * CALLS)),
        f"ancestral, {CALLS} found steps": dd.Sampler(process, made, S.Ancestral(), grid=grid),
        f"Reveal('spread'), {CALLS} calls": dd.Sampler(process, made, S.Reveal("spread", calls=CALLS), grid=[1, 0]),
        f"Reveal('max_prob'), {CALLS} calls": dd.Sampler(process, made, S.Reveal("max_prob", calls=CALLS), grid=[1, 0]),
    }
    for name, sampler in samplers.items():
        outs = [sampler.sample(ROWS, LENGTH, seed=seed) for seed in range(SEEDS)]
        texts = [[A.letters(row) for row in out.tokens.tolist()] for out in outs]
        found[name] = {
            "kept": [sum(bool(re.search(rule, text)) for text in some) for some in texts],
            "alike": [A.alike(some) for some in texts],
            "calls": max(out.nfe for out in outs),
        }
    return found


def main() -> None:
    """Measure both, and keep the figures."""
    torch.set_num_threads(1)
    model = dd.load(A.antiberty(), dtype=torch.bfloat16)
    found: dict[str, Any] = {"bound": bounds(model)}
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    found["domains"] = domains(model, found["bound"][f"{CALLS} found steps"]["grid"]) | {"rows": ROWS}
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
