"""Count what a reader of the code has to hold in mind: ``python docs/house.py [--json]``.

* frames of ours on the stack from a step of the sampler to the first frame in kernels/, the fewest and the most;
* calls of ours that a masked step makes;
* isinstance tests for a kind of process, in files that define none;
* public names of ``Prediction``, ``seed: int`` in kernels/, lines of code without blanks, comments and docstrings;
* seconds that ``import discdiff`` takes beyond ``import torch, pyro``, the least of five.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

import discdiff as dd
from discdiff import samplers as S
from discdiff.prediction import Prediction

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("discdiff", "theory", "samplers", "kernels")
SWITCH = re.compile(r"isinstance\([^()]*(?:\([^()]*\)[^()]*)*\)")


def files() -> Iterator[Path]:
    """Our Python files, once each, without the links inside discdiff/."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.resolve() == path and "assets" not in path.parts:
                yield path


def lines(path: Path) -> int:
    """Lines that hold code."""
    text = path.read_text(encoding="utf-8")
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    told = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in silent
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            told -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(told)


def switches() -> list[str]:
    """Tests of a process's type outside the files that define processes."""
    kinds = {"Process", *(name for name in vars(dd) if _is_process(name))}
    kinds |= {"RankOne", "Interpolant"}
    found = []
    for path in files():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if any(isinstance(node, ast.ClassDef) and node.name in kinds for node in ast.walk(tree)):
            continue
        for match in SWITCH.finditer(text):
            if kinds & set(re.findall(r"\w+", match.group())):
                found.append(f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match.group()}")
    return found


def _is_process(name: str) -> bool:
    value = getattr(dd, name)
    return isinstance(value, type) and issubclass(value, dd.Process)


class Walk:
    """Counts calls of our functions, and frames between a step and the kernels, while it is entered."""

    def __init__(self) -> None:
        self.calls = 0
        self.depths: list[int] = []

    def __enter__(self) -> "Walk":
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _seen(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not _ours(frame):
            return
        self.calls += 1
        if _room(frame) == "kernels" and frame.f_back is not None and _room(frame.f_back) != "kernels":
            depth, outer = 0, frame.f_back
            while outer is not None and outer.f_code.co_qualname != "Sampler.through":
                depth += _ours(outer)
                outer = outer.f_back
            self.depths.append(depth)


def _room(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename).resolve()
    return path.relative_to(ROOT).parts[0] if ROOT in path.parents and ".venv" not in path.parts else None


def _ours(frame: FrameType) -> bool:
    return _room(frame) in ROOMS


def walked(steps: int) -> Walk:
    """One run of masked steps at V = 20, L = 64, B = 16."""
    process, logits = dd.Masked(20, dd.Linear()), torch.randn(16, 64, 20, generator=torch.Generator().manual_seed(0))
    model = dd.Denoiser(lambda x, t: logits, process, "loo")
    sampler = dd.Sampler(process, model, S.Ancestral(), grid=[1 - k / 4 for k in range(steps + 1)])
    sampler.sample(16, 64, seed=0)
    with Walk() as walk:
        sampler.sample(16, 64, seed=0)
    return walk


def importing() -> float:
    """Seconds of ``import discdiff`` in a new interpreter that has imported torch and pyro."""
    program = (
        "import time, torch, pyro; start = time.perf_counter(); import discdiff; print(time.perf_counter() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)]
    runs += [subprocess.run(runs[0].args, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(4)]
    return min(float(run.stdout) for run in runs)


def counted() -> dict[str, object]:
    """All counts by name."""
    one, two = walked(1), walked(2)
    kernels = [path.read_text(encoding="utf-8") for path in files() if path.is_relative_to(ROOT / "kernels")]
    return {
        "frames from a step to kernels/": [min(one.depths), max(one.depths)],
        "calls of ours in a masked step": two.calls - one.calls,
        "isinstance tests of processes elsewhere": len(switches()),
        "public names of Prediction": len([name for name in dir(Prediction) if not name.startswith("_")]),
        "seed: int in kernels/": sum(text.count("seed: int") for text in kernels),
        "lines of code": sum(lines(path) for path in files()),
        "seconds of import discdiff": round(importing(), 2),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = counted()
    if "--json" in sys.argv[1:]:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items()))
