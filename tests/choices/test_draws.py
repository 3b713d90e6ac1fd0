"""Several draws of a sequence as one choice: independent, keyed by row and position, and without copies of logits."""

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import discdiff as dd
from discdiff.choices import Draws, Key, Sites, Tokens
from discdiff.kernels import dispatch as kernels

pytestmark = pytest.mark.usefixtures("as_user")


def chosen(batch: int, length: int, width: int = 3) -> tuple[Sites, Tensor, Tensor]:
    """Sites with logits, of which some are not chosen, the tokens of these, and the logits of all, (B, L, V)."""
    generator = torch.Generator().manual_seed(3)
    where = torch.rand(batch, length, generator=generator) < 0.8
    logits = torch.randn(batch, length, width, generator=generator).double()
    keep = torch.randint(width, (batch, length), generator=generator)
    return Sites(where, kernels.Rows.of(logits[where])), keep, logits


def test_log_probabilities_and_values_are_those_of_independent_draws() -> None:
    sites, keep, logits = chosen(3, 2)
    draws, one = Draws(sites, keep, 2), Tokens(sites, keep)
    grid = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    alone = one.log_prob(grid.movedim(1, 0)[:, :, None]).sum(0)
    torch.testing.assert_close(draws.log_prob(grid[:, None]), alone, atol=1e-14, rtol=0)
    parent, value, log_p = draws.fork()
    for row in range(3):
        mine, some = parent == row, alone[:, row] > -torch.inf
        order = (value[mine].flatten(1) * 3 ** torch.arange(3, -1, -1)).sum(-1).argsort()
        assert torch.equal(value[mine][order], grid[some])
        torch.testing.assert_close(log_p[mine][order], alone[some, row], atol=1e-14, rtol=0)
    drawn = draws.sample()
    token = logits.log_softmax(-1)[:, None].expand(-1, 2, -1, -1).gather(-1, drawn[..., None])[..., 0]
    torch.testing.assert_close(
        draws.site_log_prob(drawn), torch.where(sites.where[:, None], token, 0.0), atol=1e-14, rtol=0
    )


def test_the_first_draw_is_that_of_one_draw_and_the_others_have_positions_behind_it() -> None:
    sites, keep, logits = chosen(4, 3)
    key = Key(5, torch.tensor([7, 2, 9, 4]), 3, name="x0")
    draws, one = Draws(sites, keep, 3), Tokens(sites, keep)
    draws.key = one.key = key
    drawn = draws.sample()
    assert torch.equal(drawn[:, 0], one.sample())
    seed, step, tag = key.words
    row, position = sites.where.nonzero(as_tuple=True)
    for m in range(3):
        by_hand = kernels.draw(
            logits[sites.where], seed=seed, rows=key.ids[row], positions=3 * m + position, step=step, tag=tag
        )
        assert torch.equal(drawn[:, m][sites.where], by_hand)
    assert not torch.equal(drawn[:, 0], drawn[:, 1]), "planted: a key without the number of the draw"
    for rows in (slice(0, 1), slice(1, 4)):
        some = Draws(Sites(sites.where[rows], kernels.Rows.of(logits[rows][sites.where[rows]])), keep[rows], 3)
        some.key = key[rows]
        assert torch.equal(some.sample(), drawn[rows])


def test_draws_with_laws_of_their_own() -> None:
    """Row b M + m has the law of draw m of row b; equal laws give the draws of one law."""
    sites, keep, logits = chosen(2, 3)
    same = Sites(sites.where.repeat_interleave(4, 0), kernels.Rows.of(logits.repeat_interleave(4, 0)[
        sites.where.repeat_interleave(4, 0)]))  # fmt: skip
    shared, apart = Draws(sites, keep, 4), Draws(same, keep.repeat_interleave(4, 0), 4, apart=True)
    shared.key = apart.key = Key(5, torch.arange(2), 1)
    assert torch.equal(shared.sample(), apart.sample())
    certain = torch.nn.functional.one_hot(torch.arange(8)[:, None].expand(-1, 2) % 3, 3).double().log()
    every = Sites(torch.ones(8, 2, dtype=torch.bool), kernels.Rows.of(certain.flatten(0, 1)))
    drawn = Draws(every, torch.zeros(8, 2, dtype=torch.int64), 4, apart=True).sample()
    assert torch.equal(drawn, (torch.arange(8).view(2, 4, 1) % 3).expand(-1, -1, 2))


def test_draws_are_independent(failure_rate: float) -> None:
    """The joint law of two draws of a row, over 20,000 rows, is the product of their laws."""
    batch = 20_000
    logits = torch.tensor([[0.3, -0.5, 0.0], [1.0, 0.2, -0.7]]).double()
    sites = Sites(torch.ones(batch, 2, dtype=torch.bool), kernels.Rows.of(logits.repeat(batch, 1)))
    draws = Draws(sites, torch.zeros(batch, 2, dtype=torch.int64), 2)
    draws.key = Key(1, torch.arange(batch), 2, name="x0")
    seen = torch.bincount((draws.sample().flatten(1) * 3 ** torch.arange(4)).sum(-1), minlength=81)
    values = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    law = (
        torch.zeros(81)
        .double()
        .index_add(0, (values.flatten(1) * 3 ** torch.arange(4)).sum(-1), draws.log_prob(values[:, None])[:, 0].exp())
    )
    assert chisquare(seen, batch * law).pvalue > failure_rate
    equal = Draws(sites, torch.zeros(batch, 2, dtype=torch.int64), 1)
    equal.key = draws.key
    alike = equal.sample().expand(-1, 2, -1)
    wrong = torch.bincount((alike.flatten(1) * 3 ** torch.arange(4)).sum(-1), minlength=81)
    assert chisquare(wrong, batch * law).pvalue < failure_rate, "planted: one draw in place of two"


def test_logits_are_not_copied_for_each_draw() -> None:
    batch, length, width, samples = 2, 16, 50_000, 8
    logits = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
    process = dd.Uniform(width, dd.Linear())
    said = dd.Prediction(logits, "loo", torch.zeros(batch, length, dtype=torch.int64), 0.5, process)

    held = logits.untyped_storage().data_ptr()

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, Tensor) and one.untyped_storage().data_ptr() != held:
                    self.most = max(self.most, one.numel())
            return out

    where = torch.ones(batch, length, dtype=torch.bool)
    with Largest() as seen:
        draws = Draws(said[where].denoiser, said.x, samples)
        draws.key = Key(5, torch.arange(batch), 1)
        drawn = draws.sample()
        draws.site_log_prob(drawn)
    assert seen.most <= 2**20 < logits.numel()
    with Largest() as seen:  # planted: the rows of all draws in one tensor
        logits.repeat_interleave(samples, 0).log_softmax(-1)
    assert seen.most >= logits.numel() * samples


def test_a_row_without_mass_is_named() -> None:
    sites, keep, logits = chosen(3, 2)
    row, position = sites.where.nonzero()[-1].tolist()
    logits[row, position] = -torch.inf
    bad = Draws(Sites(sites.where, kernels.Rows.of(logits[sites.where])), keep, 4)
    bad.key = Key(5, torch.tensor([10, 11, 12]), 1)
    with pytest.raises(ValueError, match=f"row {10 + row}, position {position}: the denoiser gave logits without mass"):
        bad.sample()
