"""The page on training: its table is that of the code, and its figures are those measured."""

import json
import re
from collections.abc import Iterator

import pytest
from places import ROOT
from problems import families, pairs

import discdiff as dd
from discdiff import losses

PAGE = (ROOT / "docs" / "guide" / "train.md").read_text()
MADE: dict[str, losses.Objective] = {
    "MaskedNELBO()": losses.MaskedNELBO(),
    "AnyOrder()": losses.AnyOrder(),
    "UniformNELBO()": losses.UniformNELBO(),
    "AbsorbingNELBO()": losses.AbsorbingNELBO(),
    "ScoreEntropy()": losses.ScoreEntropy(),
    "PathKL()": losses.PathKL(),
    "DiscreteBound(steps)": losses.DiscreteBound(3),
}
EITHER = '`"denoiser"` if absorbing, else `"loo"`'


def rows() -> Iterator[tuple[str, str, str]]:
    """The rows of the table: loss, process, what the network predicts."""
    yield from re.findall(r"^\| `(\w+\(.*?\))` \| (.+?) \| (.+?) \|", PAGE, re.MULTILINE)


def said(loss: losses.Objective) -> tuple[str, str]:
    """The cells of a loss, by trying it on one process of each family."""
    found, every = {}, [*families(3), *pairs(3)]
    for process in every:
        try:
            loss.check(process)
        except ValueError:
            continue
        found[process] = loss.predicts(process)
    kinds = {type(process).__name__ for process in found}
    processes = "every process" if len(found) == len(every) else " ".join(f"`{kind}`" for kind in kinds)
    if len(set(found.values())) == 1:
        return processes, f'`"{next(iter(found.values()))}"`'
    assert all(predicts == ("denoiser" if process.absorbing else "loo") for process, predicts in found.items())
    return processes, EITHER


def test_the_table_is_that_of_the_code() -> None:
    table = {loss: cells for loss, *cells in rows()}
    for name, loss in MADE.items():
        assert tuple(table.pop(name)) == said(loss), name
    assert table == {name: ["as for `bound`"] * 2 for name in ("Blocks(bound, k)", "BlockMixture(bound, weights)")}
    objectives = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    named = {loss.partition("(")[0] for loss, *_ in rows()}
    assert named == {one for one in objectives if issubclass(getattr(losses, one), losses.Objective)} - {
        "Objective", "Continuous",
    }  # fmt: skip
    for made in (losses.Blocks(losses.UniformNELBO(), 2), losses.BlockMixture(losses.UniformNELBO(), {1: 1.0})):
        assert made.predicts(dd.Uniform(3, dd.Linear())) == "loo"
        with pytest.raises(ValueError, match="UniformNELBO applies to a Uniform process"):
            made.check(dd.Masked(3, dd.Linear()))


def test_the_page_says_what_was_measured() -> None:
    figures = json.loads((ROOT / "docs" / "train_text.json").read_text())
    assert figures["megabytes"] >= 1
    assert figures["same weights"] is True
    for name, (known, held) in figures["shares"].items():
        assert f"| {name} | {known:.0%} | {held:.0%} |" in PAGE
    assert f"{figures['steps']:,} steps" in PAGE
    assert f"{figures['seconds']} s of one core" in PAGE
    for name in ("samples", "the same at temperature 0.5"):
        assert all(sample.strip() in PAGE for sample in figures["samples"][name][:2])
    shares = [known for known, _ in figures["shares"].values()]
    assert shares[2] > 0.7 > 0.1 > shares[3], "sampled words can be read, noise cannot"
