"""Guides inside block by block sampling, against laws of each block computed by hand."""

from collections.abc import Callable

import pytest
import torch
from guides import Behind, Coin, Plain, table
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states, law_of_data, law_of_prior, state_index

G, H = table(3, 3, 0), table(3, 3, 1)
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
# Enumerations and hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")


def blocks_by_hand(model: dd.Denoiser, law_of_block: Callable[[dd.Denoiser, list[int]], Tensor]) -> Tensor:
    """The law of sequences of two blocks of 2 sites: that of each block behind its prefix, multiplied."""
    laws = []
    for prefix in ([], *all_states(3, 2).tolist()):
        tokens = torch.tensor(prefix, dtype=torch.int64).view(1, -1)
        shown = dd.denoiser.ShownPrefix(torch.zeros(1, dtype=torch.int64), torch.tensor([len(prefix)]), tokens)
        laws.append(law_of_block(model.given(shown), prefix))
    return (laws[0][:, None] * torch.stack(laws[1:])).flatten()


def longer(process: dd.Process) -> dd.Denoiser:
    """A network on sequences of any length whose output depends on the prefix."""
    v = process.states
    weights = torch.randn(v, v, 3, generator=torch.Generator().manual_seed(4)).double()

    def fn(x: Tensor, t: Tensor) -> Tensor:
        before = torch.nn.functional.pad(x[:, :-1], (1, 0))
        return weights[before, x] + weights[x, before].roll(1, -1)

    return dd.Denoiser(fn, process, "denoiser" if process.absorbing else "loo")


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("kind", ["pure", "drawing", "asking", "by time", "behind"])
def test_the_law_of_blocks_under_a_guide(kind: str, process: dd.Process, failure_rate: float) -> None:
    model, other = longer(process), longer(process).guided(Plain(H[:2]))
    guide = {
        "pure": Plain(G[:2]), "drawing": Coin(torch.stack([G, H])[:, :2]), "asking": dd.ClassifierFree(other, 0.6),
        "by time": dd.when(dd.before(0.6), Plain(G[:2]), Plain(H[:2])), "behind": Behind(1.5),
    }[kind]  # fmt: skip
    sampler = dd.Blockwise(process, model.guided(guide), S.Ancestral(), block=2, steps=2)
    law = T.law(sampler, length=4)

    def law_of(block: dd.Denoiser) -> Tensor:
        return T.law(dd.Sampler(process, block, S.Ancestral(), steps=2), length=2)

    def of_a_block(block: dd.Denoiser, prefix: list[int]) -> Tensor:
        if kind == "behind":
            log_g = torch.zeros(2, 3, dtype=torch.float64)
            log_g[:, prefix[-1:]] = 1.5
            return law_of(block.guided(Plain(log_g)))
        if kind == "drawing":  # one coin for each prediction: the mean of kernels, not of laws
            law = law_of_prior(process, 2)
            for t, s in ((1.0, 0.5), (0.5, 0.0)):
                for_g = [T.kernel(S.Ancestral(), process, block.guided(Plain(g[:2])), t, s, length=2) for g in (G, H)]
                law = law @ (0.7 * for_g[0] + 0.3 * for_g[1])
            return law_of_data(process, law, 2)
        if kind == "asking":
            assert block.context is not None
            return law_of(block.guided(dd.ClassifierFree(other.given(block.context), 0.6)))
        return law_of(block.guided(guide))

    exact = blocks_by_hand(model, of_a_block)
    torch.testing.assert_close(law, exact, atol=1e-12, rtol=0)
    plain = T.law(dd.Blockwise(process, model, S.Ancestral(), block=2, steps=2), length=4)
    assert float((plain - exact).abs().max()) > 1e-3, "planted: no guide at all"
    draws = 20_000
    out = sampler.sample(draws, 4, seed=2)
    seen = torch.bincount(state_index(out.tokens, 3), minlength=81).double()
    assert chisquare(seen, law * draws).pvalue > failure_rate
    whole = sampler.sample(16, 4, seed=3, prompt=[[0, 1, 2][: row % 4] for row in range(16)])
    for size in (1, 3):
        parts = [
            sampler.sample(
                min(size, 16 - row),
                4,
                seed=3,
                first_row=row,
                prompt=[[0, 1, 2][: r % 4] for r in range(row, min(row + size, 16))],
            )
            for row in range(0, 16, size)
        ]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    if kind == "asking":
        assert out.calls == {"model": out.nfe}
        assert out.nfe == 2 * dd.Blockwise(process, model, S.Ancestral(), block=2, steps=2).sample(draws, 4, seed=2).nfe


def test_a_guide_sees_whole_sequences_behind_prefixes_of_different_lengths() -> None:
    guide = Behind()
    sampler = dd.Blockwise(MASKED, longer(MASKED).guided(guide), S.Ancestral(), block=1, steps=1)
    sampler.sample(2, 3, seed=0, prompt=[[2, 1], [0]])
    rows = [row for seen in guide.seen for row in seen.tolist()]
    assert [0, 3, -1] in rows or [0, 3] in rows
    assert [2, 1, 3] in rows


def test_a_guide_that_needs_the_future_is_refused_in_blocks() -> None:
    class Far(Plain):
        whole = True

    model = longer(MASKED).guided(Far(G))
    dd.Sampler(MASKED, model, S.Ancestral(), steps=2).sample(2, 3, seed=0)
    with pytest.raises(ValueError, match=r"(?s)Far.*needs the sites after a block"):
        dd.Blockwise(MASKED, model, S.Ancestral(), block=2, steps=2)
