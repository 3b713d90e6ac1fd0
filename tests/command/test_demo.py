"""The demo: what its sheet shows is what its titles say, and the text names commands that exist."""

import shlex
import time
from pathlib import Path

import pytest
import torch

from discdiff.command import cli, demo_command
from discdiff.command.demo_command import Ink
from discdiff.demo.data import digits
from discdiff.samplers.expression import parse_operator


@pytest.fixture(scope="module")
def shown() -> list[demo_command.Panel]:
    return demo_command.panels(seed=0, calls=(2, 4))


def test_panels_hold_what_their_titles_say(shown: list[demo_command.Panel]) -> None:
    data, run, masked, uniform, infill, guided = shown
    known = {tuple(row) for row in digits().tolist()}
    assert all(tuple(row) in known for row in data.rows.flatten(0, 1).tolist())
    hidden = (run.rows == -1).float().mean(-1)
    assert (hidden[:, 0] == 1).all()
    assert (hidden[:, -1] == 0).all()
    assert (hidden.diff(dim=-1) <= 0).all()  # a masked process without remasking
    assert run.below == tuple(str(n) for n in range(0, 37, 4))
    for panel in (masked, uniform):
        assert panel.rows.shape == (2, 10, 64)
        assert panel.names == ("2 calls", "4 calls")
        assert not torch.equal(panel.rows[0], panel.rows[1])
    given, filled, truth = infill.rows
    assert (given[:, 32:] == -1).all()
    assert torch.equal(given[:, :32], filled[:, :32])
    assert torch.equal(filled[:, :32], truth[:, :32])
    assert not torch.equal(filled[:, 32:], truth[:, 32:])
    ink = guided.rows.double().mean((0, 2))
    assert (ink[2:] > ink[:-2]).all()  # from little to much
    assert ink[-1] > 2 * ink[0]
    for panel in shown:
        assert len(panel.names) == len(panel.rows)
        assert len(panel.below) in (0, panel.rows.shape[1])


@pytest.mark.slow
def test_without_the_guide_ink_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the assertion above: a planted guide that changes nothing."""
    monkeypatch.setattr(Ink, "__call__", lambda self, prediction, state, at: prediction)
    guided = demo_command.panels(seed=0, calls=(2,))[-1]
    assert not (guided.rows.double().mean((0, 2)).diff() > 0).any()


def test_the_command_writes_a_sheet_and_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_command, "CALLS", (4,))
    start, threads = time.process_time(), torch.get_num_threads()
    assert cli.main(["demo", "--out", str(tmp_path / "sheet.png")]) == 0
    assert time.process_time() - start < 60
    assert torch.get_num_threads() == threads
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    said = capfd.readouterr().out
    assert "errors of the networks, not of the sampler" in " ".join(said.split())
    assert "  The " in said
    assert said.splitlines()[-1].startswith(f"wrote {tmp_path / 'sheet.png'} in ")
    offered = [line.strip() for line in said.splitlines() if line.startswith("    discdiff ")]
    assert len(offered) == 3
    for command in offered:
        words = shlex.split(command)[1:]
        found = cli._parser().parse_args(words)  # a command that does not exist would exit
        if found.command == "verify":
            parse_operator(found.subject)
        else:
            parse_operator(found.sampler)


def test_bad_words_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--out", str(tmp_path / "no" / "x.png")], "make it first, or give another path"),
        (["--out", str(tmp_path / "x.txt")], "must end in one of"),
        (["--seed", "-1"], "--seed must lie in"),
    ):
        assert cli.main(["demo", *words]) == 2
        assert message in capfd.readouterr().err
