"""``check_operator`` and the commands around it: what is true passes, each false declaration is caught by name."""

import json
from pathlib import Path

import pytest
from problems import families, pairs
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.command.cli import main, parse_operator
from discdiff.command.verify import SHIPPED, shipped
from discdiff.plugins import plugged
from discdiff.theory.catalogue import KINDS, kinds

pytestmark = pytest.mark.usefixtures("as_user")  # many matrices

UNIFORM = [dd.Uniform(3, dd.Linear())]


@pytest.mark.parametrize(
    "operator",
    [
        S.Gibbs(),
        S.Ancestral(),
        S.Ancestral() >> S.Gibbs(),
        S.Thinning(),
        S.Gillespie(),
        S.InformedGibbs(),
        S.ForwardBackward(),  # at some times there is nothing for it to do
    ],
    ids=repr,
)
def test_what_is_true_passes(operator: dd.Operator) -> None:
    report = T.check_operator(operator, processes=UNIFORM)
    assert report.ok, str(report)


def test_what_is_for_no_usual_process_is_examined_on_its_own() -> None:
    report = T.check_operator(S.Renoising())
    assert report.ok, str(report)
    assert list(report.groups) == ["absorbing_uniform"]


def test_a_program_of_too_many_paths_is_not_enumerated_and_not_passed() -> None:
    report = T.check_operator(S.Adaptive(), processes=UNIFORM)
    assert report.ok, str(report)
    assert set(report.unchecked) == {
        "Uniform: rows of the kernel are laws",
        "Uniform: draws follow the kernel (-log10 p)",
    }
    assert report.summary.endswith("2 not checked")


def test_a_report_is_grouped_by_kinds_each_built_anew() -> None:
    report = T.check_operator(S.Gibbs(), processes=["masked", dd.Hybrid(5, dd.LogLinear(), p_uniform=0.2)])
    assert list(report.groups) == ["masked", "Hybrid"]
    assert report.ok, str(report)
    # the example's own size and clock are tried beside those of all kinds
    example = kinds([dd.Hybrid(5, dd.LogLinear(), p_uniform=0.2)], "test")[0]
    sizes = [(s.vocab_size, s.schedule) for s in example.settings]
    assert sizes == [(3, dd.Linear()), (2, dd.Polynomial(2.0)), (4, dd.Cosine()), (5, dd.LogLinear())]
    for setting in example.settings:
        assert example.at(setting) == dd.Hybrid(setting.vocab_size, setting.schedule, p_uniform=0.2)


@pytest.mark.parametrize("given", [*families(3), *pairs(2), dd.Masked(4, dd.Linear(), mask_id=0)], ids=repr)
def test_every_family_is_built_anew(given: dd.Process) -> None:
    one = kinds([given], "test")[0]
    for setting in one.settings:
        process = one.at(setting)
        assert type(process) is type(given)
        assert len(process.data_tokens) == setting.vocab_size
    assert given in [one.at(setting) for setting in one.settings]


def test_kinds_are_named_or_shown() -> None:
    with pytest.raises(
        ValueError, match=r"no kind of process 'unform' \(did you mean 'uniform'\?\); accepted: masked, uniform"
    ):
        T.check_operator(S.Gibbs(), processes=["unform"])
    with pytest.raises(TypeError, match="it is a class"):
        T.check_operator(S.Gibbs(), processes=[dd.Uniform])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a list of kinds"):
        T.check_operator(S.Gibbs(), processes="uniform")


def test_another_seed_draws_others_and_finds_the_same() -> None:
    one, other = (T.check_operator(S.Gibbs(), processes=["uniform"], seed=seed) for seed in (0, 1))
    assert one.ok
    assert other.ok
    assert [check.error for check in one.checks] != [check.error for check in other.checks]


def test_an_operator_without_a_process_is_refused() -> None:
    with pytest.raises(ValueError, match="accepts none of the processes"):
        T.check_operator(S.FirstHitting(), processes=UNIFORM)


MODULE = """
import discdiff as dd
from discdiff import samplers as S

class Good(S.Gibbs):
    pass

class Bad(S.TauForwardBackward):
    def __init__(self):
        super().__init__(h=0.3)
    invariant = "exact"

def number():
    return 3

class Op(S.Gibbs):
    pass

class MyProcess(dd.Uniform):
    pass

class MyWrongProcess(dd.Uniform):
    def kept(self, alpha):
        return alpha ** 0.5
"""


def test_verify_reads_a_module_and_says_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "steps_of_mine:Good", "--process", "uniform", "--process", "steps_of_mine:MyProcess"]) == 0
    said = capsys.readouterr().out
    assert "0 do not hold" in said
    assert "uniform" in said
    assert "MyProcess" in said
    assert main(["verify", "steps_of_mine:Bad", "--process", "masked"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["verify", "steps_of_mine:Op(sites=1)", "--process", "uniform", "--json", "--seed", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["subject"] == "Op(sites=1)"
    assert {check["process"] for check in found["checks"]} == {"uniform"}
    assert main(["verify", "steps_of_mine:MyProcess(4)", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["subject"] == "MyProcess(4, Linear())"
    assert main(["verify", "steps_of_mine:MyWrongProcess"]) == 1
    assert "FAIL" in capsys.readouterr().out
    for text, said in {
        "nowhere_at_all:X": "cannot import 'nowhere_at_all'",
        "steps_of_mine:Missing": "has no 'Missing'",
        "steps_of_mine:number": "is no Operator and no Process",
        "steps_of_mine:Op(len('ab'))": "accepted: module:name or module:name(literals)",
        "steps_of_mine:Op(2, 3, 4, 5)": "needs other arguments",
        "unheard_of": "cannot read 'unheard_of'",
    }.items():
        assert main(["verify", text]) == 2
        assert said in capsys.readouterr().err


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with an operator, a process, a family, and one of each that is broken."""
    (tmp_path / "plugged_in.py").write_text(
        "import discdiff as dd\nfrom discdiff import samplers as S\nfrom discdiff.adapters import Family\n"
        "class Mine(S.Gibbs):\n    pass\nclass MyNoise(dd.Uniform):\n    pass\n"
        "FAMILY = Family('Mine', 'a family of mine', lambda files: False, lambda files, asked: None)\n"
    )
    info = tmp_path / "plugged_in-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[discdiff.operators]\nmine = plugged_in:Mine\ngone = plugged_in:Gone\n"
        "[discdiff.processes]\nMyNoise = plugged_in:MyNoise\n[discdiff.families]\nmine = plugged_in:FAMILY\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_other_packages_add_to_what_there_is(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert type(parse_operator("mine(sites=2)")).__name__ == "Mine"
    assert plugged("operators")[1].keys() == {"gone"}
    assert main(["list"]) == 0
    said = capsys.readouterr()
    for name in ("mine", "MyNoise", "a family of mine", "ancestral", "Hybrid", "MDLM", "LLaDA"):
        assert name in said.out
    assert "the plug-in 'gone' cannot be used: AttributeError" in said.err


def test_a_plugged_in_process_is_checked_like_ours(plugin: Path) -> None:
    noise = plugged("processes")[0]["MyNoise"]
    assert isinstance(noise, type)
    process: dd.Process = noise(3, dd.Linear())
    assert T.check_process(process).ok
    x: Tensor = process.prior(2, 3).sample()
    assert x.shape == (2, 3)


# --- everything that is shipped ---------------------------------------------------------------------------------------


def test_every_shipped_operator_is_in_the_list() -> None:
    made = {type(parse_operator(text)) for text in SHIPPED}
    assert {getattr(S, name) for name in S.__all__ if isinstance(getattr(S, name), type)} <= made


def test_without_a_name_the_command_verifies_what_is_shipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("discdiff.command.verify.shipped", lambda *args: shipped(*args, only=["greedy", "renoising"]))
    assert main(["verify", "--process", "masked", "--process", "absorbing_uniform"]) == 0
    said = capsys.readouterr().out
    assert "greedy" in said
    assert "renoising" in said
    assert "0 do not hold" in said
    assert main(["verify", "--process", "nowhere"]) == 2
    assert "no kind of process 'nowhere'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("text", SHIPPED)
def test_a_shipped_operator_holds_on_every_process_it_accepts(text: str) -> None:
    """The rows of ``discdiff verify`` without a name; docs/verified.md has the figures."""
    for verdict in shipped(parse_operator, list(KINDS), only=[text]):
        assert verdict.report is None or verdict.report.ok, str(verdict.report)
