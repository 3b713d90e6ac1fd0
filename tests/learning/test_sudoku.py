"""The Sudoku grids of docs/learning: exact counts, laws of the sampler, faults that are seen, and the kept networks."""

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch
from places import ROOT
from scipy import stats
from torch import Tensor

from discdiff import Sampler, losses
from discdiff import samplers as S

FOLDER = ROOT / "docs" / "learning"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"learning_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


sudoku = module("sudoku")


def by_hand(tokens: Tensor, side: int) -> int:
    """Missing symbols of one grid, by loops."""
    rows, columns = sudoku.BOXES[side]
    grid = tokens.view(side, side).tolist()
    missing = 0
    for n in range(side):
        top, left = n // (side // columns) * rows, n % (side // columns) * columns
        box = {grid[top + i][left + j] for i in range(rows) for j in range(columns)}
        missing += 3 * side - len(set(grid[n])) - len({row[n] for row in grid}) - len(box)
    return missing


def test_there_are_288_grids_of_side_4() -> None:
    grids = sudoku.all_grids(4)
    assert grids.shape == (288, 16)
    assert len(torch.unique(grids, dim=0)) == 288
    assert sudoku.solved(grids, 4).all()


def test_there_are_28_200_960_grids_of_side_6() -> None:
    """Renaming the symbols makes 6! grids of each one whose first row is 0 to 5, and each grid once."""
    first = sudoku.starting(6)
    assert len(first) * math.factorial(6) == sudoku.COUNTS[6] == 28_200_960
    assert len(torch.unique(first, dim=0)) == len(first)
    assert sudoku.solved(first, 6).all()
    assert (first[:, :6] == torch.arange(6)).all()
    assert len(sudoku.starting(4)) * math.factorial(4) == 288


def test_no_change_of_one_cell_leaves_a_grid_solved() -> None:
    grids = sudoku.all_grids(4)
    for cell in range(16):
        for shift in (1, 2, 3):
            changed = grids.clone()
            changed[:, cell] = (changed[:, cell] + shift) % 4
            assert not sudoku.solved(changed, 4).any()
            assert (sudoku.violations(changed, 4) == 3).all()  # a symbol is missing in the row, the column and the box


@pytest.mark.parametrize("side", [4, 6, 9])
def test_violations_are_those_counted_by_loops(side: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(side, (20, side * side), generator=generator)
    tokens[:5] = sudoku.grids(side, 5, 2)
    tokens[3, 7] = (tokens[3, 7] + 1) % side
    assert sudoku.violations(tokens, side).tolist() == [by_hand(row, side) for row in tokens]
    assert sudoku.solved(tokens, side).tolist() == [True] * 3 + [False, True] + [False] * 15


def test_a_latin_square_with_wrong_boxes_is_not_solved() -> None:
    latin = (torch.arange(6)[:, None] + torch.arange(6)) % 6  # rows and columns are right
    assert sudoku.violations(latin.view(1, -1), 6).item() == 6 * 2  # each box has four symbols
    assert not sudoku.solved(latin.view(1, -1), 6)


def test_grids_of_side_4_are_uniform(failure_rate: float) -> None:
    every, draws = sudoku.all_grids(4), 288 * 50
    for weight, uniform in ((1.0, True), (1.3, False)):  # the fault: grids whose first cell is 0 come more often
        drawn = sudoku.grids(4, 2 * draws, 3)
        kept = torch.rand(len(drawn), generator=torch.Generator().manual_seed(4)) * weight < torch.where(
            drawn[:, 0] == 0, weight, 1.0
        )
        numbers = (drawn[kept][:draws, None] == every).all(-1).long().argmax(1)
        p = stats.chisquare(torch.bincount(numbers, minlength=288)).pvalue
        assert (p > failure_rate) == uniform


def test_grids_of_side_6_are_uniform(failure_rate: float) -> None:
    """Every grid is one of the listed ones in one way, so the number of that one and the first row's order say all."""
    tokens, first = sudoku.grids(6, 200_000, 5), sudoku.starting(6)
    place = 6 ** torch.arange(36, dtype=torch.float64)
    renamed = tokens[:, :6].argsort(1).gather(1, tokens)  # the first row becomes 0 to 5
    assert torch.equal(renamed[:, :6], torch.arange(6).expand(len(tokens), 6))
    code = (first.double() * place.remainder(2**31 - 1)).sum(1)  # distinct for all listed grids
    assert len(code.unique()) == len(first)
    order = code.argsort()
    at = torch.searchsorted(code[order], (renamed.double() * place.remainder(2**31 - 1)).sum(1))
    number = order[at]
    assert torch.equal(first[number], renamed)
    names = (tokens[:, :6] * 6 ** torch.arange(6)).sum(1)
    for counts in (torch.bincount(number, minlength=len(first)), names.unique(return_counts=True)[1]):
        assert stats.chisquare(counts).pvalue > failure_rate
    assert len(names.unique()) == 720
    together = torch.bincount(number % 64 * 6 + tokens[:, 0], minlength=64 * 6)  # 612 of the listed grids in each of 64
    assert stats.chisquare(together).pvalue > failure_rate
    half = torch.bincount(number[number % 20 > 0], minlength=len(first))  # the fault: one grid in twenty never comes
    assert stats.chisquare(half).pvalue < failure_rate


def test_grids_of_side_9_are_solved_and_symmetric(failure_rate: float) -> None:
    tokens = sudoku.grids(9, 1000, 6)
    assert sudoku.solved(tokens, 9).all()
    assert len(torch.unique(tokens, dim=0)) == 1000
    for cell in (0, 40, 80):
        assert stats.chisquare(torch.bincount(tokens[:, cell], minlength=9)).pvalue > failure_rate


@pytest.mark.parametrize("side", [4, 6, 9])
def test_grids_follow_from_the_seed(side: int) -> None:
    assert torch.equal(sudoku.grids(side, 7, 1), sudoku.grids(side, 7, 1))
    assert not torch.equal(sudoku.grids(side, 7, 1), sudoku.grids(side, 7, 2))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="side must be 4, 6 or 9, got 5"):
        sudoku.grids(5, 1, 0)
    with pytest.raises(ValueError, match="listed for side 4, got 6"):
        sudoku.all_grids(6)
    with pytest.raises(ValueError, match="sides 4 and 6, got 9"):
        sudoku.starting(9)
    with pytest.raises(ValueError, match="grids: count"):
        sudoku.grids(4, -1, 0)
    with pytest.raises(ValueError, match=r"shape \(N, 16\), got \(2, 15\)"):
        sudoku.solved(torch.zeros(2, 15, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"in \[0, 4\), got 0 to 4"):
        sudoku.violations(torch.full((1, 16), 4).index_fill(1, torch.tensor([0]), 0), 4)


# --- the kept networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "share"), [("sudoku4-masked", 0.6), ("sudoku6-masked", 0.2)])
def test_kept_masked_networks_solve_grids(name: str, share: float) -> None:
    """Many calls solve a share of the grids; with one call all cells are independent, and almost none is solved."""
    side = int(name[6])
    _, model = sudoku.load(name)
    few, many = (
        sudoku.solved(
            Sampler(model.process, model, S.Ancestral(), steps=steps).sample(256, side * side, seed=1).tokens, side
        )
        for steps in (1, 32)
    )
    assert many.double().mean() > share
    assert few.double().mean() < 0.01


def test_the_bound_of_the_kept_network_is_near_the_entropy() -> None:
    _, model = sudoku.load("sudoku4-masked")
    bound = losses.MaskedNELBO().estimate(model, sudoku.all_grids(), draws=20, seed=1).value.mean()
    assert math.log(288) - 0.05 < float(bound) < math.log(288) + 0.5
