"""The named recipes at equal calls and rewards: which of them aim at p0 W / Z, and how near they come."""

from types import ModuleType

import pytest
import torch
from places import ROOT

from discdiff import theory as T

pytestmark = pytest.mark.usefixtures("as_user")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import recipes

    return recipes


@pytest.mark.parametrize("name", ["Masked", pytest.param("Uniform", marks=pytest.mark.slow)])
def test_recipes_at_equal_calls_and_rewards(page: ModuleType, name: str) -> None:
    found = dict(page.recipes(name, drawn=4_000))
    few = {what: row for what, row in found.items() if what not in ("unguided", "best of 72")}
    assert all(row.calls <= 64 and row.rewards <= 72 for row in few.values())
    assert max(row.calls for row in few.values()) == 64
    assert (found["best of 72"].rewards, found["best of 72"].calls) == (72, 576)
    distance = {what: row.distance for what, row in found.items()}
    assert distance["8 particles"] < 0.15
    assert distance["8 particles, guided"] < 0.15
    assert distance["8 particles"] < distance["8 candidates in each step"]
    assert distance["the same, groups weighted by evidence"] < distance["8 candidates in each step"]
    aimed = [row for what, row in few.items() if "best" not in what]
    assert all(row.distance < distance["unguided"] - 0.1 for row in aimed)
    # best-of-n has a larger reward than the target, and less entropy
    target = page.Row(0, 0, page.TARGET)
    for what in ("best of 8", "best of 72", "the best of 8 particles"):
        assert found[what].reward > target.reward + 0.3
        assert found[what].entropy < target.entropy - 0.4
    if name == "Uniform":
        split = found["split Gibbs, 18 turns"]  # its exact law
        assert split.distance == pytest.approx(0.113, rel=0.05)
        assert (split.calls, split.rewards) == (52, 72)


@pytest.mark.slow
def test_more_calls_help_what_has_the_right_law_alone(page: ModuleType) -> None:
    found = page.budgets(drawn=32_000, sizes=(8, 32))
    assert found["split Gibbs, 9 n / 4 turns"] == pytest.approx([0.113, 0.054], rel=0.05)
    assert found["best of n"][0] + 0.2 < found["best of n"][1]
    floor = found["the limit of particles: the law of 8 steps, tilted"][0]
    assert floor < found["n particles"][1] < found["n particles"][0]
    assert found["n particles"][1] < floor + 0.03


def test_the_best_particle_has_no_law(page: ModuleType) -> None:
    """What a public class returns: its distance grows with the number of particles, that of a draw falls."""
    few, many = (page.particles("Masked", n, "systematic", False, 12_000) for n in (4, 64))
    assert 0.1 < few.best.distance < 0.3 < 0.6 < many.best.distance
    assert many.drawn.distance < few.drawn.distance
    assert T.tv(many.drawn.law, page.limit("Masked")) < 0.05


@pytest.mark.parametrize("name", ["Masked", pytest.param("Uniform", marks=pytest.mark.slow)])
def test_a_draw_after_candidate_resampling_tends_to_another_law(page: ModuleType, name: str) -> None:
    """Only the evidence of groups knows how probable each step was."""
    found, other = page.particles(name, 64, "one", False, 24_000), page.candidates(name)
    assert float((other - found.drawn.law).abs().max()) < 0.05
    assert T.tv(found.drawn.law, other) < T.tv(found.drawn.law, page.limit(name))
    assert T.tv(other, page.limit(name)) > 0.09
    assert torch.isclose(found.weighted.law.sum(), torch.ones(()).double())
