"""Misspelt names get the nearest one; names that are like none get no suggestion; help explains itself."""

import re

import pytest

import discdiff as dd
from discdiff.adapters import FAMILIES
from discdiff.checks import meant
from discdiff.command import cli
from discdiff.samplers.expression import parse_operator
from discdiff.sampling import notation
from discdiff.theory.catalogue import kind


@pytest.mark.parametrize(
    ("owner", "name", "found"),
    [
        (dd, "Msked", "Masked"),
        (dd, "sampler", "Sampler"),
        (dd, "Denosier", "Denoiser"),
        (dd, "Ancestral", "discdiff.samplers.Ancestral"),
        (dd, "gibs", "discdiff.samplers.Gibbs"),
        (dd.samplers, "Ancestrl", "Ancestral"),
        (dd.samplers, "ReMDN", "ReMDM"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(owner: object, name: str, found: str) -> None:
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}' \(did you mean '{re.escape(found)}'\?\)$"):
        getattr(owner, name)


def test_a_name_like_none_gets_no_suggestion() -> None:
    for name in ("quux", "__wrapped__", "_Maske", ""):
        assert meant(name, dd.__all__) == ""
        with pytest.raises(AttributeError, match=rf"has no attribute '{name}'$"):
            getattr(dd, name)
    assert meant("x" * 10_000, ["x" * 10_000]) == ""  # a long word costs no time
    assert not hasattr(dd, "Msked")  # still an AttributeError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ancestrl", "cannot read 'ancestrl' in 'ancestrl' (did you mean 'ancestral'?); accepted: adaptive"),
        ("ancestral >> Gibbs(2)", "cannot read 'Gibbs(2)' in 'ancestral >> Gibbs(2)' (did you mean 'gibbs'?)"),
        ("gibbs(site=2)", "in 'gibbs(site=2)' (did you mean 'sites'?); it takes (sites, scan)"),
        ("gibbs(1, 2, 3)", "in 'gibbs(1, 2, 3)'; it takes (sites, scan)"),
        ("quux", "cannot read 'quux' in 'quux'; accepted: adaptive"),
    ],
)
def test_expressions_suggest_operators_and_their_arguments(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_operator(text)


def test_kinds_families_and_plans_suggest() -> None:
    with pytest.raises(ValueError, match=re.escape("no kind of process 'unifrom' (did you mean 'uniform'?)")):
        kind("unifrom")
    name = FAMILIES[0].name
    with pytest.raises(ValueError, match=rf"no family '{name.lower()}x' \(did you mean '{name}'\?\); known: "):
        dd.load(str(cli.ASSETS / "digits-masked.safetensors"), family=f"{name.lower()}x")
    with pytest.raises(ValueError, match=re.escape("cannot read 'Ancestrl()' (did you mean 'Ancestral'?); accepted")):
        notation.parsed("Ancestrl()", "step 1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sampel", "(did you mean 'sample'?); see discdiff --help"),
        ("sample digits --process unifrm", "(did you mean 'uniform'?); see discdiff sample digits --help"),
        ("sample digits --setps 3", "unrecognized arguments: --setps 3 (did you mean '--steps'?)"),
        ("doctor --jsn", "(did you mean '--json'?)"),
        ("list --quux", "unrecognized arguments: --quux; see"),
    ],
)
def test_the_command_suggests_words(words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said


def test_a_misspelt_example_is_no_folder(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "digit"]) == 2
    assert "there is no folder digit (did you mean 'digits'?)" in capfd.readouterr().err


COMMANDS = (
    "demo", "train", "sample", "sample digits", "sample text", "sample folder", "sensitivity", "verify", "list",
    "bench", "doctor",
)  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_help_says_what_a_command_does_and_each_default(words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--help"])
    said = capfd.readouterr().out
    about = said.split("\n\n")[1]
    assert about[0].isupper()
    assert about.rstrip().endswith(".")
    assert "None)" not in said
    assert "(default: )" not in said
    if "--seed" in said:
        assert re.search(r"--seed N .*\(default: 0\)", " ".join(said.split()))


def test_the_first_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capfd.readouterr().out
    assert set(re.findall(r"^    ([a-z]+)\b", said, re.M)) == set(cli._RUN)
    assert set(cli._RUN) == {words.split()[0] for words in COMMANDS} | (set(cli._RUN) - set(COMMANDS))
    assert "first commands:" in said
