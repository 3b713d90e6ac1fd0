"""Random words and keyed draws: known answers, the specification, and Triton's interpreter against it."""

import dataclasses
import importlib.util
import itertools
import math
import zlib
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from scipy import stats

from discdiff import kernels
from discdiff.kernels import chunked, native, reference
from discdiff.kernels import philox_words as philox_module

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(not native.available(), reason="there is no C compiler")


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


BACKENDS = ["torch", pytest.param("native", marks=needs_compiler), pytest.param("triton", marks=needs_triton)]


class Plan(NamedTuple):
    """What a random recipe for rows is made from."""

    seed: int
    shape: tuple[int, int]
    width: int
    dtype: torch.dtype
    spread: float
    layout: str
    share: float  # of the sites that are chosen
    back: int
    empty: bool  # whether a row has no mass
    adjust: frozenset[str]

    def rows(self) -> kernels.Rows:
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(*self.shape, self.width, generator=generator, dtype=torch.float64) * self.spread
        logits[..., torch.rand(self.width, generator=generator) < 0.1] = -math.inf
        if self.empty:
            logits[0, 0] = -math.inf
        source = logits.to(self.dtype)
        if self.layout == "columns":
            source = source.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        elif self.layout == "steps":  # every second column of something wider
            source = torch.stack([source, torch.zeros_like(source)], -1).flatten(-2)[..., ::2]
        elif self.layout == "swapped":
            source = source.transpose(0, 1).contiguous().transpose(0, 1)
        where = torch.rand(*self.shape, generator=generator) < self.share
        rows = kernels.Rows.at(source, where.nonzero(as_tuple=True), self.width, back=self.back)
        if "shift" in self.adjust:
            own = torch.randint(-1, self.width + 1, (len(rows),), generator=generator)
            rows = dataclasses.replace(rows, own=own, shift=torch.randn(len(rows), generator=generator).double())
        if "hidden" in self.adjust:
            rows = dataclasses.replace(rows, hidden=(0, self.width - 1))
        if "temperature" in self.adjust:
            rows = dataclasses.replace(rows, temperature=0.7)
        if "floor" in self.adjust:
            rows = dataclasses.replace(rows, floor=kernels.threshold(rows, top_k=max(1, self.width // 3), top_p=0.9))
        return rows


PLANS = st.builds(
    Plan,
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    width=st.integers(2, 40) | st.sampled_from([1000, 1023, 1024, 1025, 2049, 2500, 5003]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([1.0, 9.0]),
    layout=st.sampled_from(["rows", "columns", "steps", "swapped"]),
    share=st.sampled_from([0.5, 1.0]),
    back=st.integers(0, 1),
    empty=st.booleans(),
    adjust=st.frozensets(st.sampled_from(["shift", "hidden", "temperature", "floor"])),
)


def key_of(n: int) -> dict[str, torch.Tensor | int]:
    return {"seed": 2**63 + 5, "step": 9, "tag": 3} | address(n)


def right(logits: torch.Tensor, n: int) -> list[int]:
    """The tokens of the definition, under the key of ``key_of``."""
    return reference.draw(
        logits, kernels.Key(2**63 + 5, address(n)["rows"], 9, name=3), address(n)["positions"]
    ).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(plan=PLANS)
def test_every_backend_draws_the_references_tokens(backend: str, plan: Plan) -> None:
    """Over random shapes, dtypes, strides and adjustments; a reading made before changes nothing."""
    rows = plan.rows()
    key = key_of(len(rows))
    expected = right(rows.dense(), len(rows))
    reading = kernels.read(rows, backend=backend)
    assert kernels.draw(rows, backend=backend, **key).tolist() == expected
    assert kernels.draw(rows, backend=backend, reading=reading, **key).tolist() == expected
    computed = kernels.Computed(rows.dense, rows.width, torch.arange(len(rows)), rows.dtype)
    assert kernels.draw(computed, backend=backend, **key).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_widest_vocabularies_too(backend: str, dtype: torch.dtype) -> None:
    logits, key = (torch.randn(3, 262_144) * 3).to(dtype), key_of(3)
    assert kernels.draw(logits, backend=backend, **key).tolist() == right(logits.float(), 3)
    reading = kernels.read(logits, top=True, backend=backend)
    assert reading.argmax is not None
    assert reading.argmax.tolist() == logits.argmax(-1).tolist()


def test_another_seed_gives_other_tokens() -> None:
    logits, key = torch.randn(24, 1500), key_of(24)
    assert kernels.draw(logits, **key | {"seed": 1}).tolist() != kernels.draw(logits, **key).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=30)
@hypothesis.given(plan=PLANS)
def test_a_reading_is_that_of_the_softmax(backend: str, plan: Plan) -> None:
    rows = plan.rows()
    rows = rows.subset(rows.dense().amax(-1) > -math.inf)
    x = rows.dense().double()
    at = torch.arange(len(rows)) % (rows.width + 1)  # one column beyond the last
    reading = kernels.read(rows, at=at, top=True, backend=backend)
    p = x.softmax(-1)
    torch.testing.assert_close(reading.log_sum_exp, x.logsumexp(-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reading.entropy, torch.special.entr(p).sum(-1), atol=1e-5, rtol=1e-5)
    first, second = p.topk(2).values.unbind(-1)
    torch.testing.assert_close(reading.max_prob, first, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reading.margin, first - second, atol=1e-6, rtol=1e-6)
    assert reading.argmax is not None
    assert reading.argmax.tolist() == rows.dense().argmax(-1).tolist()
    inside = at < rows.width
    own = x.log_softmax(-1).gather(-1, at.where(inside, 0)[:, None])[:, 0].masked_fill(~inside, -math.inf)
    torch.testing.assert_close(reading.log_prob, own, atol=1e-6, rtol=1e-6)
    hypothesis.assume(len(rows) > 0)
    off = x.logsumexp(-1) + 1e-5  # planted: an error of 1e-5 is seen
    with pytest.raises(AssertionError):
        torch.testing.assert_close(reading.log_sum_exp, off, atol=1e-6, rtol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_of_the_vocabulary_give_the_same_tokens(shards: int, backend: str) -> None:
    width, n = 8 * 1024 + 77, 6
    logits, key = torch.randn(n, width) * 2, key_of(6)
    edges = [8 // shards * 1024 * k for k in range(shards)] + [width]
    parts = [
        kernels.race(logits[:, start:end], first_column=start, backend=backend, **key)
        for start, end in itertools.pairwise(edges)
    ]
    whole = kernels.draw(logits, **key).tolist()
    assert kernels.winner(*parts).tolist() == whole
    logits[2, 5000] = math.nan
    parts = [kernels.race(logits[:, a:b], first_column=a, backend=backend, **key) for a, b in itertools.pairwise(edges)]
    assert kernels.winner(*parts).tolist() == [-1 if n == 2 else token for n, token in enumerate(whole)]
    if shards > 1:  # planted fault: shards that do not know where they are
        lost = [kernels.race(logits[:, a:b], backend=backend, **key) for a, b in itertools.pairwise(edges)]
        assert kernels.winner(*lost).tolist() != whole


def test_the_native_pass_does_not_depend_on_threads_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, key = torch.randn(70, 5000), key_of(70)
    expected = kernels.draw(logits, **key).tolist()
    torch.set_num_threads(2)
    try:
        assert kernels.draw(logits, **key).tolist() == expected
    finally:
        torch.set_num_threads(1)
    for elements in (1, 1 << 14):
        monkeypatch.setitem(chunked._CHUNK, "cpu", elements)
        assert kernels.draw(logits.double(), **key).tolist() == kernels.draw(logits, backend="torch", **key).tolist()
        assert kernels.draw(logits.to(torch.float16).float(), **key).tolist() == (
            kernels.draw(logits.to(torch.float16), **key).tolist()
        )


@hypothesis.given(plan=PLANS, top_k=st.none() | st.integers(1, 9), top_p=st.none() | st.floats(0, 1))
def test_truncation_keeps_what_sorting_keeps(plan: Plan, top_k: int | None, top_p: float | None) -> None:
    rows = plan.rows()
    rows = rows.subset(rows.dense().amax(-1) > -math.inf)
    x = rows.dense()
    for row, floor in zip(x.double(), kernels.threshold(rows, top_k=top_k, top_p=top_p), strict=True):
        values = row.sort(descending=True).values
        kept = values[: top_k or len(values)]
        kept = values[values >= kept[-1]]  # ties stay
        if top_p is not None:
            p = kept.softmax(-1)
            count = int((p.cumsum(-1) - p < top_p * (1 - 1e-12)).sum())
            kept = kept[: max(count, 1)]
        least = kept[kept > -math.inf][-1]
        near = values[(values - least).abs() < 1e-5]  # a cumulated float may stop one token away
        assert near.min() - 1e-9 <= float(floor) <= near.max() + 1e-9 or float(floor) == float(least)
    low = kernels.threshold(rows, min_p=0.25)
    assert torch.equal(x >= low[:, None], (x.double() - x.double().amax(-1, keepdim=True)).exp() >= 0.25)


def test_truncation_refuses_nonsense() -> None:
    for wrong in ({"top_k": 0}, {"top_p": 1.5}, {"min_p": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kernels.threshold(torch.zeros(1, 3), **wrong)


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


def test_a_million_draws_of_tiny_and_huge_probabilities(failure_rate: float) -> None:
    """2e-8 a token beside a dominant one: a float32 race or running sum would draw none of them, ever."""
    n = 1_000_000
    p = torch.cat(
        [torch.tensor([0.9, 0.1 - 1e-3 - 1e-5]), torch.full((1000,), 1e-6), torch.full((500,), 2e-8)]
    ).double()
    logits = p.log().float().expand(n, -1)
    key = {"rows": torch.arange(n), "positions": torch.zeros(n, dtype=torch.int64)}
    drawn = kernels.draw(logits, seed=3, **key)
    bins = torch.cat([torch.tensor([0, 1]), torch.full((1000,), 2), torch.full((500,), 3)])
    counts = torch.bincount(bins[drawn], minlength=4)
    share = torch.zeros(4).double().index_add(0, bins, logits[0].double().softmax(-1))
    assert stats.chisquare(counts, n * share).pvalue > failure_rate
    assert counts[3] > 0
    biased = share * torch.tensor([1, 1, 1.3, 1]) / (share * torch.tensor([1, 1, 1.3, 1])).sum()  # planted fault
    assert stats.chisquare(counts, n * biased).pvalue < failure_rate


def test_rare_tokens_are_not_starved(failure_rate: float) -> None:
    """Tokens of probability 5e-8 behind one of probability 1: a float32 running sum would drop every one of them."""
    width, n = 1024, 150_000
    logits = torch.full((width,), math.log(5e-8))
    logits[0] = 0
    key = {"rows": torch.arange(n), "positions": torch.zeros(n, dtype=torch.int64)}
    rare = int((kernels.draw(logits.expand(n, width), seed=3, backend="torch", **key) > 0).sum())
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


def test_a_key_is_its_scalars_and_a_turn_another_seed() -> None:
    ids, logits, places = torch.tensor([5, 2**32 - 1, 0]), torch.randn(3, 50), torch.arange(3)
    key = kernels.Key(2**64 - 1, ids, step=4, slot=6, name="token")
    tag = zlib.crc32(b"token") % 1024
    assert key.words == (2**64 - 1, 6 << 20 | 4, tag)
    assert key.signed == (-1, 6 << 20 | 4, tag)
    scalars = {"seed": 2**64 - 1, "step": 6 << 20 | 4, "tag": tag}
    drawn = kernels.draw(logits, rows=ids, positions=places, **scalars)
    assert torch.equal(kernels.drawn(kernels.Rows.of(logits), key, places), drawn)
    assert torch.equal(kernels.drawn(kernels.Rows.of(logits[1:]), key[1:], places[1:]), drawn[1:])
    for mine, right in zip(
        kernels.coins(key, 7), kernels.uniforms(rows=ids[:, None], positions=torch.arange(7), **scalars), strict=True
    ):
        assert torch.equal(mine, right)
    turned = dataclasses.replace(key, turn=3)
    high, low, _, _ = (int(word) for word in kernels.philox(2**64 - 1, 3 << 30, 3, 0, 0))
    assert turned.words == (high << 32 | low, *key.words[1:])
    with pytest.raises(ValueError, match=r"draw: rows must be an int64 tensor of shape \(3,\), got"):
        kernels.drawn(kernels.Rows.of(logits), key[:2], places)


def test_uniforms_are_uniform(failure_rate: float) -> None:
    u, v = kernels.uniforms(seed=4, rows=torch.arange(5000)[:, None], positions=torch.arange(10))
    for x in (u, v, (u + v) % 1):
        assert stats.kstest(x.flatten(), "uniform").pvalue > failure_rate
        assert stats.kstest(x.flatten() ** 1.05, "uniform").pvalue < failure_rate  # planted fault
    assert abs(stats.pearsonr(u.flatten(), v.flatten()).statistic) < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cannot_be_drawn_are_marked(backend: str) -> None:
    logits = torch.zeros(6, 1100)
    logits[5] = math.nan
    logits[0] = -math.inf
    logits[1, 3] = math.nan
    logits[2, 1050] = math.inf
    logits[3, :1024] = -math.inf
    drawn = kernels.draw(logits, seed=0, backend=backend, **address(6))
    assert drawn[[0, 1, 2, 5]].tolist() == [-1] * 4
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
