"""``check_operator`` and the commands around it: what is true passes, each false declaration is caught by name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.cli import main, parse_operator
from discdiff.handlers import At
from discdiff.plugins import plugged

pytestmark = pytest.mark.usefixtures("as_user")  # many matrices

UNIFORM = [dd.Uniform(3, dd.Linear())]


class Careless(S.Gibbs):
    """Redraws frozen sites as well."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        thawed = dd.State(state.tokens, state.t, state.rows)
        return state.at(super().__call__(thawed, at).tokens)


class Hidden(S.Gibbs):
    """Draws outside of ``choose``."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        return moved.at(torch.where(torch.rand(len(state.rows), 1) < 0.5, moved.tokens, state.tokens))


class Idle(dd.Corrector):
    """Keeps p_t by doing nothing."""

    invariant = "exact"

    def __call__(self, state: dd.State, at: At) -> dd.State:
        return state


class Shifted(S.Ancestral):
    """Its draws are not those of its kernel: rows know their number."""

    def __call__(self, state: dd.State, at: At) -> dd.State:
        moved = super().__call__(state, at)
        even = (state.rows % 2 == 0)[:, None] & (state.tokens >= 0)
        return moved.at(torch.where(even & (len(state.rows) > 10_000), moved.tokens, state.tokens.clone() * 0), at.s)


class Sloppy(S.TauForwardBackward):
    invariant = "exact"


class Second(S.Ancestral):
    order = 2.0


class Cheap(S.Gibbs):
    nfe = 0.5


class Exact(S.Gillespie):
    order = float("inf")


FALSE = {
    "ends in p_s (-log10 p)": Exact(),
    "frozen sites are left alone": Careless(),
    "the same key gives the same tokens, in any batch": Hidden(),
    "it moves (the share of p_t that stays)": Idle(),
    "draws follow the kernel (-log10 p)": Shifted(),
    "keeps p_t": Sloppy(h=0.05),
    "order 2 (distance of the slope)": Second(),
    "takes 0.5 calls a step": Cheap(),
}


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
    assert all(check.name.startswith("AbsorbingUniform") for check in report.checks)


def test_a_program_of_too_many_paths_is_not_enumerated() -> None:
    names = [check.name.partition(": ")[2] for check in T.check_operator(S.Adaptive(), processes=UNIFORM).checks]
    assert names == ["the same key gives the same tokens, in any batch", "frozen sites are left alone"]


@pytest.mark.parametrize("claim", list(FALSE))
def test_a_false_declaration_is_caught_by_name(claim: str) -> None:
    report = T.check_operator(FALSE[claim], processes=UNIFORM)
    assert f"{UNIFORM[0]}: {claim}" in report.failed, str(report)
    with pytest.raises(AssertionError, match="FAIL"):
        T.check_operator(FALSE[claim], processes=UNIFORM, strict=True)


def test_an_operator_without_a_process_is_refused() -> None:
    with pytest.raises(ValueError, match="accepts none of the processes"):
        T.check_operator(S.FirstHitting(), processes=UNIFORM)


MODULE = """
from discdiff import samplers as S

class Good(S.Gibbs):
    pass

class Bad(S.TauForwardBackward):
    def __init__(self):
        super().__init__(h=0.3)
    invariant = "exact"

def number():
    return 3
"""


def test_verify_reads_a_module_and_says_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "steps_of_mine:Good"]) == 0
    assert "0 do not hold" in capsys.readouterr().out
    assert main(["verify", "steps_of_mine:Bad"]) == 1
    assert "FAIL" in capsys.readouterr().out
    for text, said in {
        "nowhere_at_all:X": "cannot import 'nowhere_at_all'",
        "steps_of_mine:Missing": "has no 'Missing'",
        "steps_of_mine:number": "is no Operator",
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
