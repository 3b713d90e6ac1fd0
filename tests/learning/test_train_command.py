"""``discdiff train`` and ``discdiff sample FOLDER``: end to end, killed and resumed, and what they say of bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

import discdiff as dd
from discdiff import samplers as S
from discdiff.command.cli import main
from discdiff.command.train_command import LOSSES
from discdiff.learning.run import CHECKPOINT

TEXT = "The cat sat on the mat, and the dog sat on the log. " * 40
SMALL = ["--width", "32", "--depth", "1", "--batch", "4", "--steps", "12", "--every", "4"]


def train(folder: Path, *words: str, data: str = "text.txt") -> list[str]:
    """The words of a small run, whose data lie in a folder."""
    return ["train", "--data", str(folder / data), "--out", str(folder / "run"), *SMALL, "--length", "16", *words]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def last(capfd: pytest.CaptureFixture[str]) -> str:
    """The line of an error, which is the last."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("discdiff: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "predicts"),
    [
        (["--network", "transformer"], "denoiser"),
        (["--process", "uniform"], "loo"),
        (["--process", "absorbing", "--seed", "3"], "denoiser"),
        (["--loss", "any-order"], "denoiser"),
        (["--loss", "score-entropy", "--process", "uniform", "--network", "transformer"], "loo"),
    ],
    ids=" ".join,
)
def test_a_text_is_learned_and_sampled(
    words: list[str], predicts: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(train(folder, *words)) == 0
    said = capfd.readouterr()
    run = folder / "run"
    assert re.search(r"loss \d\.\d{3} nats a character, held out \d\.\d{3}; wrote .*model.safetensors", said.out)
    assert f'sample:  discdiff sample {run} --prompt "The "' in said.out
    assert "12/12" in said.err
    assert main(["sample", str(run), "--batch", "3", "--steps", "2", "--prompt", "The ", "--seed", "1"]) == 0
    rows = capfd.readouterr().out.rstrip("\n").split("\n\n")
    assert [row[:4] for row in rows] == ["The "] * 3
    assert all(len(row) == 16 and set(row) <= set(TEXT) for row in rows)
    curves = json.loads((run / "curve.json").read_text())
    assert [step for step, _ in curves["train"]] == [step for step, _ in curves["held out"]] == [4, 8, 12]
    model = dd.load(run, quiet=True)
    assert (model.predicts, model.convention.family) == (predicts, "discdiff")
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=2).sample(3, 16, seed=1)
    assert out.tokens.shape == (3, 16)


def test_arrays_are_learned_and_sampled(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).integers(0, 5, (50, 9)).astype(np.uint8)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "long.npy", rows.flatten().astype(np.int32))
    words = ["train", "--data", str(folder / "rows.npy"), "--out", str(folder / "rows"), *SMALL]
    assert main(words) == 0
    assert "nats a token" in capfd.readouterr().out
    out = folder / "out.npy"
    assert main(["sample", str(folder / "rows"), "--batch", "3", "--steps", "2", "--out", str(out)]) == 0
    tokens = np.load(out)
    assert tokens.shape == (3, 9)
    assert set(tokens.flatten()) <= set(range(5))
    assert main(["sample", str(folder / "rows"), "--batch", "1", "--steps", "2", "--length", "4"]) == 0
    assert re.search(r"^\d \d \d \d$", capfd.readouterr().out, re.MULTILINE)
    assert main(train(folder, data="long.npy")) == 0


def test_a_killed_command_goes_on_to_the_same_weights(folder: Path) -> None:
    """Killed from outside by SIGKILL, as soon as a checkpoint is there."""
    words = train(folder, "--steps", "100", "--every", "10")
    assert main([*words, "--out", str(folder / "whole")]) == 0
    process = subprocess.Popen([sys.executable, "-m", "discdiff.command.cli", *words], cwd=ROOT,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for _ in range(3000):
        if (folder / "run" / CHECKPOINT).exists():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(folder / "run" / CHECKPOINT, weights_only=True)["step"]
    assert 10 <= step < 100
    assert main(["sample", str(folder / "run")]) == 2  # it is not finished
    assert main(words) == 0
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_stays_and_another_needs_a_word(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(train(folder)) == 0
    before = load_file(folder / "run" / "model.safetensors")
    assert main(train(folder)) == 0
    assert all(
        torch.equal(before[name], tensor) for name, tensor in load_file(folder / "run" / "model.safetensors").items()
    )
    capfd.readouterr()
    assert main(train(folder, "--steps", "13", "--seed", "1")) == 2
    said = last(capfd)
    assert (
        "is of another run: --steps was 12, now 13; --seed was 0, now 1. Give the same options, another folder, or"
        in said
    )
    assert main(train(folder, "--steps", "13", "--restart")) == 0
    (folder / "text.txt").write_text(TEXT + "!")
    capfd.readouterr()
    assert main(train(folder, "--steps", "13")) == 2
    assert "the data are not the same file" in last(capfd)


def test_rare_characters_of_a_large_alphabet_are_one_token(folder: Path) -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    (folder / "text.txt").write_text(TEXT + many, encoding="utf-8")
    assert main(train(folder)) == 0
    assert dd.load(folder / "run", quiet=True).process.vocab_size == 257


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.txt"], r"--data: none.txt does not exist; give a text file, or an array"),
        (["--data", "."], r"--data: . is a folder; give a text file"),
        (
            ["--process", "mask"],
            r"--process: there is no 'mask' \(did you mean 'masked'\?\); accepted: masked, uniform, abs",
        ),
        (
            ["--loss", "Masked_NELBO"],
            r"--loss: there is no 'Masked_NELBO' \(did you mean 'masked-nelbo'\?\); accepted: mask",
        ),
        (["--loss", "xyz"], r"--loss: there is no 'xyz'; accepted: masked-nelbo, uniform-nelbo"),
        (
            ["--loss", "uniform-nelbo"],
            r"--loss: uniform-nelbo does not apply to --process masked; accepted: masked-nelbo, a",
        ),
        (
            ["--loss", "any-order", "--process", "uniform"],
            r"any-order does not apply to --process uniform; accepted: uni",
        ),
        (["--network", "lstm"], r"--network: there is no 'lstm'; accepted: convolution, transformer"),
        (
            ["--length", "2000"],
            r"--data: the file has 2,080 characters, and training on windows of 2000 needs at least 4000",
        ),
        (["--steps", "0"], r"--steps must lie in 1\.\."),
        (["--batch", "-1"], r"--batch must lie in 1\.\."),
        (["--width", "40"], r"--width: must be a multiple of 32, got 40"),
        (["--rate", "0"], r"--rate must lie in \(0, inf\)"),
        (["--held-out", "1"], r"--held-out must lie in \(0, 1\)"),
        (["--seed", "-1"], r"--seed must lie in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_give_one_line(
    words: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(train(folder, *words)) == 2
    assert re.search(message, last(capfd))
    assert not (folder / "run").exists()


@pytest.mark.usefixtures("as_user")
def test_bad_files_give_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(name: str, *words: str) -> str:
        assert main(["train", "--data", str(folder / name), "--out", str(folder / "run"), *SMALL, *words]) == 2
        return last(capfd)

    arrays = {
        "floats": (np.zeros((4, 4)), "holds float64; accepted: an array of whole numbers from 0, of shape"),
        "bools": (np.ones((4, 4), dtype=bool), "holds bool; accepted"),
        "cube": (np.ones((2, 2, 2), dtype=int), r"has shape \(2, 2, 2\); accepted"),
        "empty": (np.ones((0, 2), dtype=int), r"has shape \(0, 2\); accepted"),
        "minus": (np.array([[0, 1], [-2, 1]]), "holds -2; accepted"),
        "large": (np.array([[0, 1], [2**40, 1]]), "holds 1099511627776; accepted"),
        "constant": (np.zeros((4, 4), dtype=int), "holds only the number 0"),
        "objects": (np.array([{"a": 1}, None], dtype=object), "is no .npy file of numbers"),
        "one": (np.array([[0, 1, 2]]), "the array has 1 row"),
        "short": (np.arange(9), "the file has 9 tokens, and training on windows of 128 needs at least 256"),
    }
    for name, (array, message) in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
        assert re.search(message, said(f"{name}.npy"))
    (folder / "text.npy").write_text("no array")
    assert "is no .npy file of numbers" in said("text.npy")
    np.save(folder / "rows.npy", np.ones((4, 5), dtype=int))
    assert "--length: the array has rows of 5 tokens; leave the option out, or give 5" in said(
        "rows.npy", "--length", "3"
    )
    (folder / "latin.txt").write_bytes("Stra\xdfe ".encode("latin-1") * 99)
    assert "is no text in UTF-8 (byte 4)" in said("latin.txt")
    (folder / "empty.txt").write_text("")
    assert "has 0 characters, 0 different; 2 are needed" in said("empty.txt")
    (folder / "run").write_text("a file")
    assert "is a file, and the name of a folder is needed" in said("text.txt")
    (folder / "run").unlink()
    (folder / "run").mkdir()
    (folder / "run" / "letter.txt").write_text("mine")
    assert "holds other files; give a new folder" in said("text.txt")


@pytest.mark.usefixtures("as_user")
def test_sampling_says_what_is_missing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "digit"]) == 2
    assert "there is no folder digit (did you mean 'digits'?); accepted: digits, text, or a folder" in last(capfd)
    assert main(["sample", str(folder)]) == 2
    assert "holds no model.safetensors; discdiff train writes it when all its steps are done" in last(capfd)
    assert main(train(folder)) == 0
    capfd.readouterr()
    for words, message in (
        (["--length", "17"], "--length: this network takes at most 16 tokens, got 17"),
        (["--prompt", "Thé"], "characters ['é'] that are not in the vocabulary"),
        (["--prompt", "The cat sat on the mat"], "--prompt: has 22 characters, and --length is 16"),
        (["--batch", "0"], "--batch must lie in 1.."),
        (["--sampler", "gibbs"], "a step needs a predictor"),
        (["--out", str(folder / "no" / "x.txt")], "must be a file in a folder that exists"),
    ):
        assert main(["sample", str(folder / "run"), *words]) == 2
        assert message in last(capfd)


def test_every_loss_has_a_process() -> None:
    found = {
        name: [kind for kind in ("masked", "uniform", "absorbing") if _fits(loss, kind)]
        for name, loss in LOSSES.items()
    }
    assert all(found.values())
    assert [next(name for name in LOSSES if kind in found[name]) for kind in ("masked", "uniform", "absorbing")] == [
        "masked-nelbo", "uniform-nelbo", "absorbing-nelbo",
    ]  # fmt: skip


def _fits(loss: dd.losses.Objective, kind: str) -> bool:
    process = {"masked": dd.Masked, "uniform": dd.Uniform, "absorbing": dd.AbsorbingUniform}[kind](3, dd.Linear())
    try:
        loss.check(process)
    except ValueError:
        return False
    return True
