"""The reference transformer: what sees what, and that the cache changes nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from discdiff.adapters.own import load_trained
from discdiff.demo.models import Card, build, save_trained
from discdiff.demo.transformer import Transformer

V, L = 7, 24


def network(sees_alpha: bool = True) -> Transformer:
    """Random weights, large enough that everything matters."""
    torch.manual_seed(0)
    made = Transformer(V, V + 1, 64, 3, sees_alpha)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean tokens, noisy ones, survivals."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(V, (rows, L), generator=generator)
    x_t = torch.randint(V + 1, (rows, L), generator=generator)
    return x0, x_t, torch.rand(rows, L, generator=generator)


@pytest.mark.parametrize("sees_alpha", [True, False])
@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_cached_logits_are_those_of_the_whole_pass(sees_alpha: bool, block: int, seed: int) -> None:
    """Random prefixes of ragged lengths, blocks put behind them, sub-batches: within 1e-5 in float32."""
    net, (x0, x_t, alpha) = network(sees_alpha), batch(5, seed)
    shown = alpha if sees_alpha else None
    nothing = torch.zeros(5) if sees_alpha else None
    blank = torch.full_like(x0, V)
    whole, read = net.blocks_at_once(x0, x_t, shown, block), net.blocks_at_once(x0, blank, nothing, 1)
    most = (L - 3 * block) // block
    length = torch.randint(most + 1, (5,), generator=torch.Generator().manual_seed(seed)) * block
    cache = net.prefill(x0[:, : int(length.max())], length, capacity=L)
    some = torch.tensor([3, 0, 3])
    for turn in range(3):
        here = (length + turn * block)[:, None] + torch.arange(block)
        at = here[..., None].expand(-1, -1, V)
        noisy, survival = x_t.gather(1, here), None if shown is None else shown.gather(1, here)
        part = net.evaluate(cache.select(some), noisy[some], None if survival is None else survival[some])
        assert (part - whole.gather(1, at)[some]).abs().max() < 1e-5
        for _ in range(2):  # the first call takes the last block in
            assert (net.evaluate(cache, noisy, survival) - whole.gather(1, at)).abs().max() < 1e-5
        assert (net.score(cache, x0.gather(1, here)) - read.gather(1, at)).abs().max() < 1e-5
        net.extend(cache, x0.gather(1, here))
    assert (whole[:, 1:] - whole[:, :-1]).abs().max() > 0.1  # and they are not all alike


def test_whole_sequences_are_one_block() -> None:
    net, (x0, x_t, alpha) = network(), batch(4, 0)
    assert (net(x_t, alpha) - net.blocks_at_once(x0, x_t, alpha, L)).abs().max() < 1e-5


def test_blocks_see_what_is_before_them_and_themselves() -> None:
    net, (x0, x_t, alpha) = network(), batch(4, 1)
    usual, position = net.blocks_at_once(x0, x_t, alpha, 4), torch.arange(L)
    for site in (5, 11):
        begin = site // 4 * 4
        other = x0.clone()
        other[:, site] = (other[:, site] + 1) % V
        moved = (net.blocks_at_once(other, x_t, alpha, 4) - usual).abs().amax((0, 2)) > 1e-6
        assert torch.equal(moved, position >= begin + 4)
        noise = x_t.clone()
        noise[:, site] = (noise[:, site] + 1) % V
        moved = (net.blocks_at_once(x0, noise, alpha, 4) - usual).abs().amax((0, 2)) > 1e-6
        assert torch.equal(moved, (position >= begin) & (position < begin + 4))


def test_block_sizes_may_differ_between_rows() -> None:
    net, (x0, x_t, alpha) = network(), batch(2, 2)
    both = net.blocks_at_once(x0, x_t, alpha, torch.tensor([[1], [8]]))
    for row, size in enumerate((1, 8)):
        assert (both[row] - net.blocks_at_once(x0, x_t, alpha, size)[row]).abs().max() < 1e-5


def test_pure_noise_says_nothing() -> None:
    net, (x0, x_t, alpha) = network(), batch(2, 3)
    other, nothing = (x_t + 1) % V, torch.zeros(2)
    assert torch.equal(net.blocks_at_once(x0, x_t, nothing, 4), net.blocks_at_once(x0, other, nothing, 4))
    assert (net.blocks_at_once(x0, x_t, alpha, 4) - net.blocks_at_once(x0, other, alpha, 4)).abs().max() > 0.1


def test_a_cache_grows_when_it_must() -> None:
    net, (x0, x_t, alpha) = network(), batch(2, 4)
    cache = net.prefill(x0[:, :8], torch.tensor([8, 8]), capacity=8)
    net.extend(cache, x0[:, 8:16])
    assert (
        net.evaluate(cache, x_t[:, 16:], alpha[:, 16:]) - net.blocks_at_once(x0, x_t, alpha, 8)[:, 16:]
    ).abs().max() < 1e-5


def test_a_card_brings_it_back(tmp_path: Path) -> None:
    card = Card("blocks", "masked", V, L, width=32, depth=1, predicts="denoiser", time=None)
    net, model = build(card)
    save_trained(tmp_path / "w.safetensors", net, card)
    x = torch.full((1, L), V)
    loaded = load_trained(tmp_path / "w.safetensors")
    assert isinstance(loaded.fn, Transformer)
    assert (loaded(x, 0.5).logits - model(x, 0.5).logits).abs().max() < 1e-2  # kept as float16


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        Transformer(V, V, 48, 1, True)
