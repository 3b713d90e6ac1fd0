"""Random words and keyed draws: known answers, the specification, and Triton's interpreter against it."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from discdiff import kernels
from discdiff.kernels import philox as philox_module
from discdiff.kernels import reference


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(seed: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    """The known-answer vectors of Random123 (Salmon et al., 2011)."""
    assert tuple(int(word) for word in kernels.philox(seed, *counter)) == words


def test_philox_equals_tritons() -> None:
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def words(out, seed, n: tl.constexpr):  # noqa: ANN001, ANN202
        lane = tl.arange(0, n)
        c = lane.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, c, c * 7, c + 3, c ^ 5)
        tl.store(out + lane, w0.to(tl.int64))
        tl.store(out + n + lane, w1.to(tl.int64))
        tl.store(out + 2 * n + lane, w2.to(tl.int64))
        tl.store(out + 3 * n + lane, w3.to(tl.int64))

    n, seed = 64, 0x123456789ABCDEF
    out = torch.empty(4, n, dtype=torch.int64)
    words[(1,)](out, seed, n=n)
    c = torch.arange(n)
    torch.testing.assert_close(torch.stack(kernels.philox(seed, c, c * 7, c + 3, c ^ 5)), out & 0xFFFFFFFF)


def address(n: int) -> dict[str, torch.Tensor]:
    return {"rows": torch.arange(n) * 3 + 1, "positions": torch.arange(n) % 7}


@pytest.mark.parametrize("width", [2, 3, 17, 1000, 1024, 1025, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_triton_draws_the_references_tokens(width: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    n = 24
    logits = (torch.randn(n, width) * 3).to(dtype)
    logits[:, 0] = -math.inf
    key = {"seed": 2**63 + 5, "step": 9, "tag": 3} | address(n)
    expected = kernels.draw(logits, **key)
    assert kernels.draw(logits, backend="triton", **key).tolist() == expected.tolist()
    pairs = torch.stack([key["rows"], key["positions"]], -1)  # ids with a stride of two
    apart = key | {"rows": pairs[:, 0], "positions": pairs[:, 1]}
    assert kernels.draw(logits, backend="triton", **apart).tolist() == expected.tolist()
    strided = torch.empty(width, n, dtype=dtype).T.copy_(logits)
    assert kernels.draw(strided, backend="triton", **key).tolist() == expected.tolist()
    assert kernels.draw(strided, **key).tolist() == expected.tolist()
    assert kernels.draw(logits, **key | {"seed": 1}).tolist() != expected.tolist() or width == 2


def test_draw_is_the_specification() -> None:
    """The two-level rule written once more, a row and a column at a time, in plain numbers."""
    width, seed, step, tag = 2500, 11, 4, 2
    logits = torch.randn(5, width)
    key = address(5)
    for n in range(5):
        row, position = int(key["rows"][n]), int(key["positions"][n])
        best, chosen = -math.inf, -1
        for group in range(3):
            x = logits[n, 1024 * group : 1024 * (group + 1)]
            block = philox_module.counter(philox_module.GROUP, tag, group // 4)
            u = min((int(kernels.philox(seed, block, position, step, row)[group % 4]) + 0.5) / 2**32, 1 - 2**-24)
            key_value = float(x.max()) + math.log(float((x - x.max()).exp().sum())) - math.log(-math.log1p(-u))
            if key_value > best:
                best, chosen = key_value, group
        x = logits[n, 1024 * chosen : 1024 * (chosen + 1)]
        weights = (x - x.max()).exp().double()
        high, low, _, _ = kernels.philox(seed, philox_module.counter(philox_module.WITHIN, tag), position, step, row)
        v = ((int(high) << 21 | int(low) >> 11) + 0.5) / 2**53
        running = list(itertools.accumulate(weights.tolist()))
        column = next(c for c, total in enumerate(running) if total > v * running[-1])
        drawn = kernels.draw(logits, seed=seed, step=step, tag=tag, **key)[n]
        assert int(drawn) == 1024 * chosen + column


@pytest.mark.parametrize("width", [5, 3000])
def test_draws_follow_the_softmax(width: int, failure_rate: float) -> None:
    n = 200_000 if width == 5 else 60_000
    logits = torch.linspace(0, 3, 5) if width == 5 else torch.zeros(width).index_fill(0, torch.arange(900, 1100), 3.0)
    key = {"rows": torch.arange(n), "positions": torch.zeros(n, dtype=torch.int64)}
    drawn = kernels.draw(logits.expand(n, width), seed=0, **key)
    bins = torch.arange(width) if width == 5 else torch.arange(width) // 100  # a bin has 100 columns: groups and parts
    counts = torch.bincount(bins[drawn], minlength=int(bins.max()) + 1)
    p = torch.zeros(len(counts)).double().index_add(0, bins, logits.double().softmax(-1))
    assert stats.chisquare(counts, n * p).pvalue > failure_rate
    biased = p * (1 + 0.05 * (torch.arange(len(p)) % 2))  # planted fault: 5 % on every second bin
    assert stats.chisquare(counts, n * biased / biased.sum()).pvalue < failure_rate


def test_rare_tokens_are_not_starved(failure_rate: float) -> None:
    """Tokens of probability 5e-8 behind one of probability 1: a float32 running sum would drop every one of them."""
    width, n = 1024, 150_000
    logits = torch.full((width,), math.log(5e-8))
    logits[0] = 0
    key = {"rows": torch.arange(n), "positions": torch.zeros(n, dtype=torch.int64)}
    rare = int((kernels.draw(logits.expand(n, width), seed=3, **key) > 0).sum())
    p = 1023 * 5e-8 / (1 + 1023 * 5e-8)
    assert stats.binomtest(rare, n, p).pvalue > failure_rate
    assert rare > 0
    assert np.float32(1) + np.float32(5e-8) == np.float32(1), "what the float64 sum is for"


def test_tokens_do_not_depend_on_the_batch() -> None:
    logits, key = torch.randn(12, 1500), address(12)
    whole = kernels.draw(logits, seed=7, **key)
    order = torch.randperm(12)
    shuffled = kernels.draw(logits[order], seed=7, **{name: ids[order] for name, ids in key.items()})
    assert shuffled.tolist() == whole[order].tolist()
    each = [kernels.draw(logits[i : i + 1], seed=7, **{k: ids[i : i + 1] for k, ids in key.items()}) for i in range(12)]
    assert torch.cat(each).tolist() == whole.tolist()
    # planted fault: rows numbered by slot
    assert kernels.draw(logits[order], seed=7, **key).tolist() != whole[order].tolist()


def test_every_part_of_the_address_matters() -> None:
    n = 400
    key = {"rows": torch.arange(n), "positions": torch.arange(n) % 7, "seed": 1, "step": 1, "tag": 1}
    logits = torch.zeros(n, 16)
    base = kernels.draw(logits, **key)
    for name in key:
        other = kernels.draw(logits, **key | {name: key[name] + 1})
        assert 0.02 < float((other == base).double().mean()) < 0.12, name  # chance agreement is 1/16


def test_uniforms_are_uniform(failure_rate: float) -> None:
    u, v = kernels.uniforms(seed=4, rows=torch.arange(5000)[:, None], positions=torch.arange(10))
    for x in (u, v, (u + v) % 1):
        assert stats.kstest(x.flatten(), "uniform").pvalue > failure_rate
        assert stats.kstest(x.flatten() ** 1.05, "uniform").pvalue < failure_rate  # planted fault
    assert abs(stats.pearsonr(u.flatten(), v.flatten()).statistic) < 0.03


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_cannot_be_drawn_are_marked(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    logits = torch.zeros(5, 1100)
    logits[0] = -math.inf
    logits[1, 3] = math.nan
    logits[2, 1050] = math.inf
    logits[3, :1024] = -math.inf
    drawn = kernels.draw(logits, seed=0, backend=backend, **address(5))
    assert (drawn[:3] == -1).all()
    assert drawn[3] >= 1024
    assert drawn[4] >= 0


def test_empty_and_single() -> None:
    assert kernels.draw(torch.zeros(0, 5), seed=0, **address(0)).shape == (0,)
    assert kernels.draw(torch.zeros(3, 1), seed=0, **address(3)).tolist() == [0, 0, 0]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be a floating \(N, V\)"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "floating"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, r"rows must be an int64 tensor of shape \(3,\)"),
        ({"positions": torch.zeros(3)}, "positions must be an int64"),
        ({"seed": -1}, "seed must lie in"),
        ({"tag": 1024}, "tag must lie in"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 4), "seed": 0} | address(3) | change
    with pytest.raises(ValueError, match=message):
        kernels.draw(arguments.pop("logits"), **arguments)


def test_gumbels_are_gumbel(failure_rate: float) -> None:
    words, _, _, _ = kernels.philox(0, torch.arange(50_000), 0, 0, 0)
    assert stats.kstest(reference.gumbel32(words), "gumbel_r").pvalue > failure_rate
    assert reference.gumbel32(torch.tensor([0, 2**32 - 1])).tolist() == pytest.approx([22.87, -2.81], abs=0.01)
