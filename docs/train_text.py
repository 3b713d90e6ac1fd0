"""Train on 2.0 MB of text for ten minutes of one core, and count the words it writes: ``python docs/train_text.py``.

The text is the documentation in Python's standard library: the topics of ``help()`` and the docstrings of all modules,
in lower case, with all but letters replaced by spaces, as in the data set text8. So every machine with Python has it.
``discdiff train`` learns it, is killed once on the way, and goes on. Then ``discdiff sample`` writes, and the script
counts which of its words are words of the text. Noise with the same frequencies of characters is counted too.
"""

import argparse
import ast
import json
import random
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

LENGTH, STEPS = 128, 4500
GIBBS = ["--sampler", "ancestral >> gibbs(sites=4)"]
WAYS = {
    "samples": [],
    "samples with Gibbs correctors": GIBBS,
    "the same at temperature 0.5": [*GIBBS, "--temperature", "0.5"],
}
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
TRAIN = ["--length", str(LENGTH), "--batch", "16", "--loss", "any-order", "--rate", "0.003"]


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings of the modules in a folder, in the order of their paths; no module is imported."""
    for file in sorted(folder.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(folder).parts):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def standard_text() -> str:
    """Return the documentation of this Python's standard library as lower-case words."""
    from pydoc_data.topics import topics

    prose = [*(topics[name] for name in sorted(topics)), *docstrings(Path(sysconfig.get_path("stdlib")))]
    return re.sub(r"[^a-z]+", " ", "\n".join(prose).lower()).strip()


def words(text: str) -> list[str]:
    """Return the words of at least three letters."""
    return re.findall(r"[a-z]{3,}", text)


def share(text: str, known: set[str]) -> float:
    """Return the share of the words of a text that are known."""
    found = words(text)
    return sum(word in known for word in found) / max(1, len(found))


def noise(text: str, count: int) -> str:
    """Return characters drawn independently with their frequencies in a text."""
    return "".join(random.Random(0).choices(text, k=count))


def command(*arguments: str) -> list[str]:
    """Return the command line of ``discdiff``."""
    return [sys.executable, "-m", "discdiff.command.cli", *arguments]


def trained(file: Path, folder: Path, steps: int, every: int, kill_at: int) -> tuple[float, str]:
    """Train, kill the process once after a step, and train on; return its processor time and what it said."""
    import resource

    train = command(
        "train", "--data", str(file), "--out", str(folder), "--steps", str(steps), "--every", str(every), *TRAIN
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(train, stderr=subprocess.DEVNULL)
    while kill_at and process.poll() is None:
        time.sleep(1)
        if reached(folder) >= kill_at:
            process.send_signal(signal.SIGKILL)
    process.wait()
    if kill_at:
        print(f"killed after step {reached(folder)} or more, by signal {-process.returncode}", flush=True)
    done = subprocess.run(train, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def reached(folder: Path) -> int:
    """Return the step of a folder's checkpoint, 0 without one."""
    import torch

    file = folder / "checkpoint.pt"
    return int(torch.load(file, weights_only=True)["step"]) if file.exists() else 0


def same_after_kill(file: Path, folder: Path) -> bool:
    """Return whether a short run that is killed ends with the same weights, bit for bit, as one that is not."""
    import torch
    from safetensors.torch import load_file

    for name, kill_at in (("whole", 0), ("killed", 20)):
        trained(file, folder / name, 60, 10, kill_at)
    # not the bytes of the files: safetensors writes metadata in any order
    whole, killed = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
    return whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def sampled(folder: Path, *options: str) -> list[str]:
    """Return 64 samples of a trained network."""
    out = folder / "samples.txt"
    sample = command("sample", str(folder), "--batch", "64", "--steps", str(LENGTH), "--out", str(out), *options)
    subprocess.run(sample, check=True, capture_output=True)
    return out.read_text().removesuffix("\n").split("\n\n")


def measured(folder: Path, text: str) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Return the shares of words that are in the training text and in the held-out text, and the samples."""
    cut = int(len(text) * 0.95)  # as discdiff train holds out
    samples = {name: sampled(folder, *options) for name, options in WAYS.items()}
    # the first and last word of a sample are cut off by its ends
    texts = {name: " ".join(" ".join(row.split(" ")[1:-1]) for row in rows) for name, rows in samples.items()}
    texts |= {"noise with the same letters": noise(text[:cut], 64 * LENGTH), "the held-out text": text[cut:]}
    known, held = set(words(text[:cut])), set(words(text[cut:]))
    return {name: [round(share(one, of), 3) for of in (known, held)] for name, one in texts.items()}, samples


def main() -> None:
    """Write the text, train, sample and print the shares of words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/words"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches to train on")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give a new folder, so that the time is that of the whole training")
    arguments.out.mkdir(parents=True)
    file, text = arguments.out / "words.txt", standard_text()
    file.write_text(text)
    print(f"{file}: {len(text) / 1e6:.2f} MB, {len(words(text)):,} words", flush=True)
    same = same_after_kill(file, arguments.out)
    print(f"60 steps, killed on the way: the same weights: {same}", flush=True)
    every = max(1, min(200, arguments.steps // 8))
    seconds, told = trained(file, arguments.out / "run", arguments.steps, every, arguments.steps // 2)
    print(f"{arguments.steps} steps in {seconds:.0f} s of one core\n{told}", flush=True)
    shares, samples = measured(arguments.out / "run", text)
    for name, (in_text, in_held) in shares.items():
        print(f"{name}: {in_text:.1%} of its words are in the training text, {in_held:.1%} in the held-out text")
    for name, rows in samples.items():
        print("\n".join(["", f"{name}:", *rows[:4]]))
    if arguments.json is not None:
        figures = {
            "steps": arguments.steps,
            "seconds": round(seconds),
            "megabytes": round(len(text) / 1e6, 2),
            "same weights": same,
            "shares": shares,
            "samples": {name: rows[:4] for name, rows in samples.items()},
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
