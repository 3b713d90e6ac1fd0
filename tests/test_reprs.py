"""What people see in a notebook: a line for each object, with its settings, and public names on tab completion."""

import pytest
import torch

import discdiff as dd
from discdiff import adapters
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import Branch
from discdiff.denoiser import HeldSites


class Nudge(dd.Corrector):
    """An operator without a decorator."""

    def __init__(self, size: int, table: torch.Tensor) -> None:
        self.size, self.table, self._hidden = size, table, 0

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        return state


def test_an_operator_without_a_repr_shows_its_fields() -> None:
    shown = repr(Nudge(3, torch.zeros(1)) >> S.Ancestral())
    assert shown == "Nudge(size=3, table=tensor([0.])) >> Ancestral()"
    assert len(repr(Nudge(3, torch.zeros(9, 99)))) < 120


@pytest.mark.parametrize(
    ("thing", "shown"),
    [
        (T.Enumeration(torch.full((27,), 1 / 27), vocab_size=3, length=3), "Enumeration(3 tokens, 3 sites)"),
        (T.MarkovChain(torch.ones(2) / 2, torch.full((2, 2), 0.5), 7), "MarkovChain(2 tokens, 7 sites)"),
        (dd.Masked(3, dd.Linear()).prior(2, 5), "PointMixture(2 rows, event (5,))"),
        (Branch(torch.tensor([0.5, 0.5]), 4), "Branch(4 rows)"),
        (
            HeldSites(torch.arange(2), torch.tensor([True, False, True]), torch.zeros(2, 3).long(), torch.zeros(3)),
            "HeldSites(2 of 3 sites move)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_repr_is_one_line_with_sizes(thing: object, shown: str) -> None:
    assert repr(thing) == shown


@pytest.mark.parametrize("module", [dd, S, T, adapters], ids=lambda module: module.__name__)
def test_tab_completion_offers_public_names_alone(module: object) -> None:
    assert dir(module) == sorted(module.__all__)  # type: ignore[attr-defined]
