"""The diffusion transformers themselves: their weights' names, what they are told, and who sees whom."""

import math

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters.block_dit import BlockTransformer, CausalBlockTransformer
from discdiff.adapters.dit import DiffusionTransformer, Ratios

ROWS, L = 13, 12
LAYER = [
    ("norm1.weight", (16,)), ("norm2.weight", (16,)), ("attn_qkv.weight", (48, 16)), ("attn_out.weight", (16, 16)),
    ("mlp.0.weight", (64, 16)), ("mlp.0.bias", (64,)), ("mlp.2.weight", (16, 64)), ("mlp.2.bias", (16,)),
]  # fmt: skip


def filled(net: DiffusionTransformer, seed: int = 0) -> DiffusionTransformer:
    """Random weights, the same for networks of the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, part in sorted(net.named_parameters()):
            part.copy_(0.3 * torch.randn(part.shape, generator=generator))
    return net.eval().requires_grad_(False)


def tokens(seed: int, batch: int = 3) -> Tensor:
    return torch.randint(ROWS, (batch, L), generator=torch.Generator().manual_seed(seed))


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_weights_have_the_authors_names_and_shapes() -> None:
    time = [("mlp.0.weight", (8, 256)), ("mlp.0.bias", (8,)), ("mlp.2.weight", (8, 8)), ("mlp.2.bias", (8,))]
    modulated = [("adaLN_modulation.weight", (96, 8)), ("adaLN_modulation.bias", (96,))]
    last = {"output_layer.norm_final.weight": (16,), "output_layer.linear.weight": (13, 16)}
    bare = {"vocab_embed.embedding": (13, 16), "output_layer.linear.bias": (13,)} | last
    bare |= {f"blocks.{n}.{name}": shape for n in range(2) for name, shape in LAYER}
    told = bare | {f"sigma_map.{name}": shape for name, shape in time}
    told |= {f"blocks.{n}.{name}": shape for n in range(2) for name, shape in modulated}
    told |= {"output_layer.adaLN_modulation.weight": (32, 8), "output_layer.adaLN_modulation.bias": (32,)}
    shifted = bare | {f"blocks.{n}.norm{m}.bias": (16,) for n in range(2) for m in (1, 2)}
    shifted |= {"output_layer.norm_final.bias": (16,)}
    for net, expected in (
        (DiffusionTransformer(13, 16, 2, 2, 8), told),
        (DiffusionTransformer(13, 16, 2, 2, 8, classes=4), told | {"cond_map.embedding_table.weight": (4, 8)}),
        (DiffusionTransformer(13, 16, 2, 2, None, norm_shift=True), shifted),
        (BlockTransformer(13, 16, 2, 2, None, clean=4), bare),
        (CausalBlockTransformer(13, 16, 2, 2, 8, blank=12), told),
    ):
        assert {name: tuple(part.shape) for name, part in net.state_dict().items()} == expected
        assert [name for name, _ in net.named_parameters()] == list(
            net.state_dict()
        )  # averages are lists in this order


def test_a_network_without_a_time_does_not_depend_on_it() -> None:
    x = tokens(0)
    late, early = torch.full((3,), 4.0), torch.zeros(3)
    untold = filled(DiffusionTransformer(ROWS, 16, 2, 2, None))
    assert torch.equal(untold(x, late), untold(x, early))
    told = filled(DiffusionTransformer(ROWS, 16, 2, 2, 8))
    assert torch.equal(told(x), told(x, early))
    assert furthest(told(x, late), told(x, early)) > 0.1


def test_a_class_is_told_beside_the_time() -> None:
    """c = silu(time) + silu(class); no class is not the same as any of them."""
    net, x, sigma, label = filled(DiffusionTransformer(ROWS, 16, 2, 2, 8, classes=4)), tokens(1), torch.rand(3), None
    plain = filled(DiffusionTransformer(ROWS, 16, 2, 2, 8))
    plain.load_state_dict({name: part for name, part in net.state_dict().items() if not name.startswith("cond_map")})
    assert torch.equal(net(x, sigma, label), plain(x, sigma))
    label = torch.tensor([0, 3, 3])
    both = net(x, sigma, label)
    assert furthest(both, plain(x, sigma)) > 0.05
    net.cond_map.embedding_table.weight[3] = 0.0  # silu(0) = 0: it says nothing
    assert furthest(net(x, sigma, label)[1:], plain(x, sigma)[1:]) < 1e-6
    assert torch.equal(net(x, sigma, label)[0], both[0])
    with pytest.raises(ValueError, match="told a label, and has no classes"):
        plain(x, sigma, label)
    with pytest.raises(ValueError, match="it has no time_width"):
        DiffusionTransformer(ROWS, 16, 2, 2, None, classes=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_precision_of_the_weights_will_do(dtype: torch.dtype) -> None:
    """The time is embedded in whole precision: bfloat16 would not tell sigma = 5 from 5.01."""
    net, x = filled(DiffusionTransformer(ROWS, 16, 2, 2, 8)), tokens(2)
    sigma = torch.tensor([0.01, 5.0, 5.01])
    usual, seen = net(x, sigma), []
    hook = net.sigma_map.mlp[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    said = net.to(dtype)(x, sigma)
    hook.remove()
    assert said.dtype == seen[0].dtype == dtype
    coarsest = torch.finfo(max(dtype, torch.float32, key=_eps)).eps
    assert furthest(said.double(), usual.double()) < 40 * coarsest
    angle = [[s * math.exp(-math.log(1e4) * k / 128) for k in range(128)] for s in (0.01, 5.0, 5.01)]
    expected = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angle]).double()
    assert furthest(seen[0].double(), expected) < 10 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("scaled", [True, False])
def test_ratios_are_0_at_the_own_token_and_less_by_what_is_known(scaled: bool) -> None:
    net, x, sigma = filled(DiffusionTransformer(ROWS, 16, 2, 2, 8)), tokens(3), torch.tensor([0.01, 0.7, 6.0])
    said, plain = Ratios(net, scaled)(x, sigma), net(x, sigma)
    own = torch.zeros_like(said).bool().scatter(-1, x[..., None], True)
    assert torch.equal(said[own], torch.zeros(3 * L))
    known = torch.tensor([[[math.log((math.exp(s) - 1) * (ROWS - 1))]] for s in sigma.tolist()]) if scaled else 0.0
    assert furthest(said[~own], (plain - known)[~own]) < 1e-5


# --- blocks -----------------------------------------------------------------------------------------------------------


def block_nets(block: int) -> list[BlockTransformer]:
    """Clean tokens in blocks like the noisy ones, and causal ones."""
    return [
        filled(BlockTransformer(ROWS, 16, 2, 2, 8, clean=block)),  # type: ignore[list-item]
        filled(CausalBlockTransformer(ROWS, 16, 2, 2, 8, blank=12)),  # type: ignore[list-item]
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_see_their_past_and_themselves(causal: bool) -> None:
    net, x0, x, position = block_nets(4)[causal], tokens(4), tokens(5), torch.arange(L)
    usual = net.blocks_at_once(x0, x, None, 4)
    for site in (1, 5, 11):
        begin = site // 4 * 4
        for clean in (True, False):
            other = (x0 if clean else x).clone()
            other[:, site] = (other[:, site] + 1) % ROWS
            said = net.blocks_at_once(other, x, None, 4) if clean else net.blocks_at_once(x0, other, None, 4)
            expected = position >= begin + 4 if clean else (position >= begin) & (position < begin + 4)
            assert torch.equal((said - usual).abs().amax((0, 2)) > 1e-6, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_clean_tokens_see_their_own_block_only_where_they_are_not_causal(causal: bool) -> None:
    """The last clean block's first token in the memory, against the token after it."""
    net, x0 = block_nets(4)[causal], tokens(6)
    other = x0.clone()
    other[:, 7] = (other[:, 7] + 1) % ROWS
    eight = torch.full((3,), 8)
    kept, changed = (net.prefill(part[:, :8], eight, L).kept[1][0] for part in (x0, other))
    assert torch.equal((kept - changed).abs().amax((0, 1, 3)) > 1e-6, torch.arange(8) >= (7 if causal else 4))


def test_keys_are_turned_by_their_position() -> None:
    """(k_m, k_{m + d/2}) is turned by position / 10000^(2m / d): the keys kept of the first layer, written out."""
    net, x0 = block_nets(1)[0].double(), torch.randint(ROWS, (1, 400), generator=torch.Generator().manual_seed(15))
    kept = net.prefill(x0, torch.tensor([400]), 400).kept[0][0][0]
    layer, none = net.blocks[0], torch.zeros(1).double()
    told = torch.nn.functional.silu(net.sigma_map(none))[0]
    shift, scale = (layer.adaLN_modulation.weight @ told + layer.adaLN_modulation.bias)[:32].chunk(2)
    h = net.vocab_embed.embedding[x0[0]]
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    keys = (normed * layer.norm1.weight * (1 + scale) + shift) @ layer.attn_qkv.weight[16:32].T
    for site in (0, 1, 250, 399):
        for head in range(2):
            plain = keys[site, 8 * head : 8 * head + 8].tolist()
            for m in range(4):
                a, first, second = site / 10_000 ** (2 * m / 8), plain[m], plain[m + 4]
                turned = first * math.cos(a) - second * math.sin(a), second * math.cos(a) + first * math.sin(a)
                assert float(kept[head, site, m]) == pytest.approx(turned[0], abs=3e-4)  # rates are in float32
                assert float(kept[head, site, m + 4]) == pytest.approx(turned[1], abs=3e-4)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_kept_does_not_change_what_is_said(block: int, causal: bool) -> None:
    """Ragged prefixes, blocks put behind them, sub-batches, and the tokens beyond a prefix's length left unseen."""
    net, x0, x = block_nets(block)[causal], tokens(7), tokens(8)
    whole = net.blocks_at_once(x0, x, None, block)
    length = torch.tensor([1, 0, 2]) * block
    beyond = torch.arange(L) >= length[:, None]
    shown = torch.where(beyond, (x0 + 3) % ROWS, x0)[:, : 2 * block]
    memory, some = net.prefill(shown, length, L), torch.tensor([2, 0, 2])
    for turn in range(L // block - 2 if block == 4 else 3):
        here = (length + turn * block)[:, None] + torch.arange(block)
        expected = whole.gather(1, here[..., None].expand(-1, -1, ROWS))
        assert furthest(net.evaluate(memory.select(some), x.gather(1, here)[some], None), expected[some]) < 1e-5
        for _ in range(2):  # the first call takes the last block in
            assert furthest(net.evaluate(memory, x.gather(1, here), None), expected) < 1e-5
        net.extend(memory, x0.gather(1, here))
    assert furthest(whole[:, 1:], whole[:, :-1]) > 0.1
    seen = net.prefill(shown, torch.full((3,), 2 * block), L)  # the planted fault: lengths forgotten
    assert furthest(net.evaluate(seen, x[:, 2 * block : 3 * block], None), whole[:, 2 * block : 3 * block]) > 1e-3


def test_a_causal_network_reads_as_it_writes() -> None:
    """score is p(x_i | x_{<i}), which is also that of blocks of one site."""
    net, x0 = block_nets(4)[1], tokens(9)
    assert isinstance(net, CausalBlockTransformer)
    one_by_one = net.blocks_at_once(x0, torch.full_like(x0, 12), None, 1)
    memory = net.prefill(x0[:, :4], torch.full((3,), 4), L)
    assert furthest(net.score(memory, x0[:, 4:]), one_by_one[:, 4:]) < 1e-5
    net.extend(memory, x0[:, 4:8])
    assert furthest(net.score(memory, x0[:, 8:]), one_by_one[:, 8:]) < 1e-5


def test_the_last_block_of_a_block_causal_pass_is_the_noisy_one() -> None:
    """The two ways to write BD3LM: one sequence with a block-causal mask, and noisy blocks behind clean ones."""
    at_once, one = block_nets(3)[0], filled(DiffusionTransformer(ROWS, 16, 2, 2, 8, block=3))
    x0, x = tokens(10), tokens(11)
    whole = at_once.blocks_at_once(x0, x, None, 3)
    for begin in range(0, L, 3):
        here = slice(begin, begin + 3)
        assert furthest(one(torch.cat([x0[:, :begin], x[:, here]], 1))[:, here], whole[:, here]) < 1e-5
    assert torch.equal(at_once(x), one(x))
    causal = block_nets(3)[1]
    assert furthest(causal(x), causal.blocks_at_once(x0, x, None, L)) < 1e-5  # there a sequence is one noisy block


def test_block_sizes_may_differ_between_rows() -> None:
    net, x0, x = block_nets(4)[1], tokens(12), tokens(13)
    both = net.blocks_at_once(x0, x, None, torch.tensor([[1], [4], [12]]))
    for row, size in enumerate((1, 4, 12)):
        assert furthest(both[row], net.blocks_at_once(x0, x, None, size)[row]) < 1e-5


def test_generation_is_the_same_with_and_without_what_is_kept() -> None:
    process = dd.Uniform(ROWS, dd.LogLinear())
    kept, shown = block_nets(3)[0], filled(DiffusionTransformer(ROWS, 16, 2, 2, 8, block=3))
    drawn = []
    for net in (kept, shown):
        model = dd.Denoiser(net, process, "loo", time=None)
        drawn.append(dd.Blockwise(process, model, S.Ancestral(), block=3, steps=4).sample(5, L, seed=1))
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    other = dd.Denoiser(filled(DiffusionTransformer(ROWS, 16, 2, 2, 8), 1), process, "loo", time=None)
    found = dd.Blockwise(process, other, S.Ancestral(), block=3, steps=4).sample(5, L, seed=1).tokens
    assert not torch.equal(found, drawn[0].tokens)  # so that it was the network that spoke


def test_parts_of_blocks_are_refused() -> None:
    net, x0 = block_nets(4)[0], tokens(14)
    with pytest.raises(ValueError, match=r"clean tokens come in whole blocks of 4, got \[3, 4\]"):
        net.prefill(x0[:, :4], torch.tensor([4, 3, 4]), L)
    memory = net.prefill(x0[:, :4], torch.tensor([4, 0, 4]), L)
    with pytest.raises(ValueError, match=r"whole blocks of 4, got \[2\]"):
        net.extend(memory, x0[:, 4:6])
    with pytest.raises(ValueError, match=r"whole blocks of 4, got \[0, 2, 4, 6\]"):
        net.blocks_at_once(x0, x0, None, 2)
    with pytest.raises(ValueError, match="clean must be a positive block size, got 0"):
        BlockTransformer(ROWS, 16, 2, 2, 8, clean=0)
