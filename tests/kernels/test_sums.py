"""Weighted sums of rows: the compiled pass, torch and the definition agree in readings, draws, steps and gradients."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff.command.bench import Meter
from discdiff.kernels import chunked, dispatch, native, reference
from discdiff.kernels.rows import Computed, LinearHead, Rows, Source

needs_compiler = pytest.mark.skipif(not native.available(), reason="there is no C compiler")
BACKENDS = ["torch", pytest.param("native", marks=needs_compiler)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [2, 5, 33, 1024, 1500]
NEVER, TOO_MUCH, UNKNOWN = -math.inf, math.inf, math.nan
WEIGHTS = (1.7, -0.9, 0.2)
B, L = 2, 7


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "columns":
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "steps":
        return torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "swapped" else x


class Case:
    """Three sources at the same chosen sites, the sum of their rows, and that sum in float64 by its definition."""

    def __init__(
        self, width: int, dtype: torch.dtype = torch.float32, adjust: tuple[str, ...] = (), seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed + width)
        self.width, self.adjust, self.seed = width, adjust, seed
        where = torch.rand(B, L, generator=generator) < (0.7 if "chosen" in adjust else 1.1)
        self.place = where.nonzero(as_tuple=True)
        count = len(self.place[0])
        self.parts, self.right = [], []
        for number, layout in enumerate(("rows", "columns", "steps") if "strided" in adjust else ("rows",) * 3):
            x = torch.randn(B, L, width, generator=generator, dtype=torch.float64).mul(2).to(dtype)
            rows, right = Rows.at(laid_out(x, layout), self.place, width), x[where].double()
            if "hidden" in adjust:
                rows = dataclasses.replace(rows, hidden=(width - 1,))
                right[:, width - 1] = NEVER
            if "own" in adjust:  # one of the columns may not exist
                own = torch.randint(0, width + 1, (count,), generator=generator)
                shift = torch.randn(count, generator=generator, dtype=torch.float64)
                rows, some = dataclasses.replace(rows, own=own, shift=shift), own < width
                right[some] = right[some].scatter_add(1, own[some, None], shift[some, None])
            if number > 0 and "cut" in adjust:  # a part may be tempered and cut by itself; what it has left out is out
                floor = right.median(-1).values / 0.7 - 1e-3  # between two logits, so that rounding decides nothing
                rows = dataclasses.replace(rows, temperature=0.7, floor=floor if number == 2 else None)
                right = (right / 0.7).masked_fill((right / 0.7 < floor[:, None]) & (number == 2), NEVER)
            self.parts.append(rows)
            self.right.append(right)

    def total(self, weights: tuple[float, ...] = WEIGHTS) -> tuple[Rows, Tensor]:
        """The rows of the sum, and its values."""
        rows = self.parts[0].plus(weights[0], list(zip(weights[1:], self.parts[1:], strict=True)))
        value = torch.zeros_like(self.right[0])
        for weight, right in zip(weights, self.right, strict=True):
            value = value if weight == 0 else value + weight * right
        for weight, right in zip(weights, self.right, strict=True):
            if weight > 0:
                value = value.masked_fill(right == NEVER, NEVER)
        if "tempered" in self.adjust:
            rows, value = dataclasses.replace(rows, temperature=1.3), value / 1.3
            floor = value.quantile(0.4, dim=-1) if self.width > 2 else torch.full((len(value),), NEVER).double()
            floor = floor - 1e-3
            rows, value = dataclasses.replace(rows, floor=floor), value.masked_fill(value < floor[:, None], NEVER)
        return rows, value


ADJUSTED = [
    (), ("chosen", "hidden"), ("strided", "chosen"), ("own", "strided"), ("tempered", "own", "chosen"),
    ("cut", "chosen"), ("cut", "hidden", "own", "strided", "tempered"),
]  # fmt: skip


def keyed(rows: Source, seed: int = 11) -> dict[str, Tensor | int]:
    return {
        "seed": seed,
        "step": 3,
        "tag": 9,
        "rows": torch.arange(len(rows)) * 5,
        "positions": torch.arange(len(rows)),
    }


def check(rows: Rows, value: Tensor, backend: str, tolerance: float = 2e-5, cuts: bool = True) -> None:
    """All that is read and drawn, against the values in float64."""
    alive = value.amax(-1) > NEVER
    rows, value = rows.subset(alive), value[alive]
    at = torch.arange(len(rows)) % (rows.width + 1)
    reading = dispatch.read(rows, at=at, top=True, backend=backend)
    p, log_p = value.softmax(-1), torch.nn.functional.pad(value.log_softmax(-1), (0, 1), value=NEVER)
    two = p.topk(2).values
    for mine, right in (
        (reading.log_sum_exp, value.logsumexp(-1)),
        (reading.entropy, torch.special.entr(p).sum(-1)),
        (reading.max_prob, two[:, 0]),
        (reading.margin, two[:, 0] - two[:, 1]),
        (reading.log_prob, log_p.gather(1, at[:, None])[:, 0]),
        (dispatch.log_prob(rows, at), log_p.gather(1, at[:, None])[:, 0]),
        (rows.dense(), value),
    ):
        torch.testing.assert_close(mine.double(), right.double(), atol=tolerance, rtol=tolerance)
    dense = rows.dense()  # from here on bit for bit
    assert torch.equal(dispatch.best(rows, backend=backend), dense.argmax(-1))
    key = keyed(rows)
    tokens = dispatch.draw(rows, backend=backend, **key)
    assert torch.equal(tokens, dispatch.draw(dense, backend="torch", **key))
    if (
        groups := native.statistics(rows, False) if backend == "native" and native.readable(rows) else None
    ) is not None:
        assert torch.equal(groups[0].amax(-1), dense.amax(-1))
    assert torch.equal(tokens, dispatch.draw(rows, backend=backend, reading=reading, **key))
    plain = Rows.of(dense)
    for cut in ({"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}) if cuts else ():
        torch.testing.assert_close(dispatch.threshold(rows, **cut), dispatch.threshold(plain, **cut))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_read_and_drawn_is_that_of_the_definition(width: int, dtype: torch.dtype, backend: str) -> None:
    for adjust in ADJUSTED:
        case = Case(width, dtype, adjust)
        for weights in (WEIGHTS, (2.0, -1.0, 0.0), (0.0, 1.0, -0.5 if "cut" not in adjust else 0.5)):
            check(*case.total(weights), backend, cuts=weights is WEIGHTS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_of_a_language_model_too(dtype: torch.dtype, backend: str) -> None:
    check(*Case(50_257, dtype, ("own", "chosen")).total(), backend, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["a term left out", "a weight of the wrong sign", "weights of two terms exchanged"])
def test_a_wrong_sum_is_caught(fault: str, backend: str) -> None:
    case = Case(1500)
    right = case.total()[1]
    check(*case.total(), backend)
    wrong = {
        "a term left out": (1.7, -0.9, 0.0),
        "a weight of the wrong sign": (1.7, 0.9, 0.2),
        "weights of two terms exchanged": (1.7, 0.2, -0.9),
    }
    with pytest.raises(AssertionError):
        check(case.total(wrong[fault])[0], right, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [5, 1500])
def test_sums_of_sums_are_flat_sums(width: int, backend: str) -> None:
    case = Case(width, adjust=("own", "chosen", "strided"))
    a, b, c = case.parts
    value = case.total((1.2, -0.6, 0.4))[1]
    check(a.plus(1.2, [(-0.6, b), (0.4, c)]), value, backend)
    check(a.plus(1.2, [(-0.6, b)]).plus(1.0, [(0.4, c)]), value, backend)
    check(a.plus(0.6, [(-0.3, b)]).plus(2.0, [(0.4, c)]), value, backend)
    check(a.plus(1.2, [(2.0, b.plus(-0.3, [(0.2, c)]))]), value, backend)
    check(a.plus(0.3, [(0.2, a.plus(1.5, [(-1.0, b.plus(3.0, [(-2.0, c)]))])), (0.6, a)]), value, backend)
    check(a.plus(1.2, [(-0.6, b), (0.4, c)]).settled(), value, backend)
    with pytest.raises(AssertionError):
        check(a.plus(1.2, [(-0.6, b)]).plus(2.0, [(0.4, c)]), value, backend)


@pytest.mark.parametrize("kind", ["head", "float64", "computed", "converted"])
def test_parts_that_no_pass_reads_are_read_in_torch(kind: str) -> None:
    """One such part among the terms is enough; the tokens are those of the same values."""
    case, generator = Case(1030, adjust=("chosen",)), torch.Generator().manual_seed(1)
    head = torch.nn.Linear(4, 1030).requires_grad_(False)
    hidden = torch.randn(B, L, 4, generator=generator)
    dense = head(hidden)[case.place]
    part: Source = {
        "head": Rows.at(hidden, case.place, 1030, convert=LinearHead(head.weight, head.bias)),
        "float64": Rows.at(case.parts[1].source.double(), case.place, 1030),
        "computed": Computed(lambda n: dense[n].double(), 1030, torch.arange(len(dense))),
        "converted": case.parts[1].then(lambda raw, n: raw.square() - n[:, None]),
    }[kind]
    right = {
        "head": dense, "float64": case.right[1], "computed": dense,
        "converted": case.right[1].square() - torch.arange(len(dense))[:, None],
    }[kind].double()  # fmt: skip
    for rows, value in (
        (case.parts[0].plus(1.5, [(-0.5, part)]), 1.5 * case.right[0] - 0.5 * right),
        (case.parts[0].plus(0.5, [(0.5, case.parts[2].plus(2.0, [(-1.0, part)]))]),
         0.5 * case.right[0] + case.right[2] - 0.5 * right),
    ):  # fmt: skip
        assert not native.readable(rows)
        check(rows, value, "native" if native.available() else "torch")
    if isinstance(part, Rows):
        check(part.plus(1.5, [(-0.5, case.parts[0])]), 1.5 * right - 0.5 * case.right[0], "torch")


def test_subsets_and_windows_are_those_of_the_whole() -> None:
    rows, value = Case(1500, adjust=("own", "hidden", "strided", "chosen")).total()
    keep = torch.arange(len(rows)) % 2 == 0
    order = torch.randperm(len(rows))
    torch.testing.assert_close(rows.subset(keep).dense().double(), value[keep], atol=1e-5, rtol=1e-5)
    twice = rows.subset(order).subset(keep)
    torch.testing.assert_close(twice.dense().double(), value[order][keep], atol=1e-5, rtol=1e-5)
    part, first = slice(2, 7), torch.tensor([0, 1024, 1400, 7, 1499])
    padded = torch.nn.functional.pad(value, (0, 200), value=NEVER)
    right = padded[part].gather(1, first[:, None] + torch.arange(130))
    torch.testing.assert_close(rows.window(part, first, 130).double(), right, atol=1e-5, rtol=1e-5)
    assert float((rows.window(part, first + 1, 130).double() - right).nan_to_num().abs().max()) > 1e-3  # planted


@needs_compiler
def test_sums_do_not_depend_on_threads() -> None:
    rows = Case(5000, torch.bfloat16, ("own", "strided")).total()[0]
    one = dispatch.draw(rows, **keyed(rows)), dispatch.read(rows).log_sum_exp
    torch.set_num_threads(2)
    try:
        two = dispatch.draw(rows, **keyed(rows)), dispatch.read(rows).log_sum_exp
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


# --- what rules a token out, and what is a fault ---------------------------------------------------------------------


def ruled(weights: tuple[float, ...], logits: tuple[float, ...]) -> float:
    """The rule, in plain numbers: a bad logit is a fault; what a positive part rules out is out; then the sum."""
    used = [(w, x) for w, x in zip(weights, logits, strict=True) if w != 0]
    if any(x in (UNKNOWN, TOO_MUCH) or x != x for _, x in used):
        return UNKNOWN
    if any(w > 0 and x == NEVER for w, x in used):
        return NEVER
    return sum(w * x for w, x in used)  # +inf where only negative parts rule it out


def of_columns(backend: str, rows: Rows) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of rows of one column, and whether they can be drawn."""
    reading = dispatch.read(rows, backend=backend)
    return reading.log_sum_exp, dispatch.draw(rows, backend=backend, **keyed(rows)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", list(itertools.product((2.0, -1.0, 0.0), (1.5, -0.5, 0.0), (1.0, -0.7))), ids=str)
def test_every_combination_of_bad_logits(weights: tuple[float, ...], backend: str) -> None:
    logits = list(itertools.product((0.5, NEVER, TOO_MUCH, UNKNOWN), repeat=3))
    right = torch.tensor([ruled(weights, each) for each in logits])
    parts = torch.tensor(logits).T[..., None]
    a, b, c = map(Rows.of, parts)
    rows = a.plus(weights[0], [(weights[1], b), (weights[2], c)])
    torch.testing.assert_close(rows.dense()[:, 0], right, equal_nan=True)
    total, drawn = of_columns(backend, rows)
    assert torch.equal(drawn, right.isfinite())
    torch.testing.assert_close(total[right < TOO_MUCH].float(), right[right < TOO_MUCH])
    assert not bool((total[~(right < TOO_MUCH)] < TOO_MUCH).any())
    # the same in the middle of a row that is otherwise fine
    wide = torch.linspace(-1, 1, 70).expand(3, len(logits), 70).clone()
    wide[..., 66] = parts[..., 0]
    a, b, c = map(Rows.of, wide)
    token = dispatch.draw(a.plus(weights[0], [(weights[1], b), (weights[2], c)]), backend=backend, **keyed(a))
    assert torch.equal(token < 0, ~(right < TOO_MUCH))
    assert not bool((token[right == NEVER] == 66).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_an_inner_sum_cannot_allow_may_be_ruled_out_outside(backend: str) -> None:
    never, some = Rows.of(torch.tensor([[NEVER]])), Rows.of(torch.tensor([[0.25]]))
    inner = some.plus(2.0, [(-1.0, never)])  # +inf: only its negative part rules the token out
    assert inner.dense().item() == TOO_MUCH
    for rows, right in (
        (some.plus(1.0, [(1.0, inner)]), TOO_MUCH),
        (never.plus(1.0, [(1.0, inner)]), NEVER),
        (some.plus(1.0, [(-1.0, inner)]), NEVER),  # it has O_never to a positive power
        (some.plus(0.0, [(1.0, inner)]), TOO_MUCH),
        (some.plus(2.0, [(-1.0, some)]), 0.25),
    ):
        assert rows.dense().item() == right
        assert bool(of_columns(backend, rows)[1]) == math.isfinite(right)


# --- steps -----------------------------------------------------------------------------------------------------------

PROCESSES: dict[str, Callable[[int], dd.Process]] = {
    "masked": lambda v: dd.Masked(v, dd.Linear()),
    "uniform": lambda v: dd.Uniform(v, dd.Linear()),
    "masked inside": lambda v: dd.Masked(v, dd.Linear(), mask_id=1),
    "marginal": lambda v: dd.Marginal(torch.arange(1, v + 1).double() / (v * (v + 1) / 2), dd.Linear()),
}


def guided(process: dd.Process, predicts: str, dtype: torch.dtype, weights: tuple[float, ...] = WEIGHTS) -> dd.Denoiser:
    """A model whose guide combines it with two others; logits by the site and its left neighbour."""
    size, v = min(process.states, 64 if process.vocab_size < 2000 else 4), process.vocab_size

    def network(seed: int) -> dd.Denoiser:
        table = torch.randn(size, L, v, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)
        return dd.Denoiser(
            lambda x, t: table[x.roll(1, 1) % size, torch.arange(x.shape[1])],
            process,
            predicts,
            time=None,  # type: ignore[arg-type]
        )

    class Three(dd.Guide):
        models, nfe = (network(1), network(2)), 2.0

        def __call__(self, prediction: dd.Prediction, state: dd.State, at: dd.operator.GuideAt) -> dd.Prediction:
            return prediction.combined([at.ask(model, state) for model in self.models], weights)

    return network(0).guided(Three())


@needs_compiler
@pytest.mark.parametrize("width", [2, 5, 1500, 50_257])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_fused_step_makes_the_tokens_of_separate_choices(
    process: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, count = PROCESSES[process](width), 0
    step = native.step

    def counted(rows: Rows, what: dispatch.Step) -> tuple[Tensor, Tensor]:
        nonlocal count
        assert rows.summed
        count += 1
        return step(rows, what)

    monkeypatch.setattr(native, "step", counted)
    batch = 24 if width < 2000 else 1
    for predicts, dtype in zip(("loo", "denoiser", "loo"), DTYPES, strict=True):
        sampler = dd.Sampler(made, guided(made, predicts, dtype), S.Ancestral(), grid=[1.0, 0.5, 0.1])
        fused = sampler.sample(batch, L, seed=5).tokens
        assert count > 0
        done = count
        separate = sampler.sample(batch, L, seed=5, record=True)
        assert count == done, "a recorded run makes its choices one by one"
        assert torch.equal(fused, separate.tokens)
        with monkeypatch.context() as torch_alone:
            torch_alone.setattr(native, "available", lambda: False)
            assert torch.equal(sampler.sample(batch, L, seed=5).tokens, fused)
        if width > 2:  # planted: one weight of the wrong sign
            wrong = dd.Sampler(
                made, guided(made, predicts, dtype, (1.7, 0.9, 0.2)), S.Ancestral(), grid=[1.0, 0.5, 0.1]
            )
            assert not torch.equal(wrong.sample(batch, L, seed=5).tokens, fused)


# --- gradients -------------------------------------------------------------------------------------------------------


def leaves(width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = [torch.randn(1, 4, width, dtype=dtype, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    made[0][0, 1, 0] = NEVER
    return [x.requires_grad_() for x in made]


def summed(parts: list[Tensor]) -> Rows:
    a, b, c = (Rows.at(x, None, x.shape[-1]) for x in parts)
    a = dataclasses.replace(a, own=torch.arange(4) % a.width, shift=torch.linspace(-1, 1, 4).double())
    rows = a.plus(WEIGHTS[0], [(WEIGHTS[1], b), (WEIGHTS[2], c.plus(0.5, [(0.5, b)]))])
    return dataclasses.replace(rows, temperature=1.3)


def by_hand(parts: list[Tensor]) -> Tensor:
    a, b, c = (x[0] for x in parts)
    own = torch.zeros_like(a).scatter(
        1, (torch.arange(4) % a.shape[1])[:, None], torch.linspace(-1, 1, 4).to(a)[:, None]
    )
    return ((WEIGHTS[0] * (a + own) + WEIGHTS[1] * b + WEIGHTS[2] * (c + b) / 2) / 1.3).log_softmax(-1)


@pytest.mark.parametrize("width", [2, 5, 1500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_reach_every_part(width: int, dtype: torch.dtype) -> None:
    at, weight = torch.tensor([1, 1, 0, width - 1]), torch.tensor([1.0, -2.0, 0.5, 3.0]).to(dtype)
    parts = leaves(width, dtype)
    right = torch.autograd.grad((by_hand(parts).gather(1, at[:, None])[:, 0] * weight).sum(), parts)
    for value in (dispatch.log_prob(summed(parts), at), dispatch.read(summed(parts), at=at, top=True).log_prob):
        found = torch.autograd.grad((value * weight).sum(), parts)
        for mine, exact in zip(found, right, strict=True):
            assert bool(mine.isfinite().all())
            tight = 1e-12 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(mine, exact, atol=tight, rtol=tight)
    # planted: the part of negative weight left out of the graph
    cut = dispatch.log_prob(summed([parts[0], parts[1].detach(), parts[2]]), at)
    assert torch.autograd.grad((cut * weight).sum(), parts, allow_unused=True)[1] is None


# --- memory ----------------------------------------------------------------------------------------------------------


def calls(rows: Rows) -> Iterator[Callable[[], object]]:
    key, at = keyed(rows), torch.zeros(len(rows), dtype=torch.int64)
    yield lambda: dispatch.draw(rows, **key)
    yield lambda: dispatch.read(rows, at=at, top=True)
    yield lambda: dispatch.best(rows)
    yield lambda: dispatch.log_prob(rows, at)
    yield lambda: dispatch.threshold(rows, top_k=5)
    yield lambda: dispatch.draw(dataclasses.replace(rows, floor=dispatch.threshold(rows, top_p=0.9)), **key)


@pytest.mark.parametrize("pass_", ["native", "torch"])
@torch.no_grad()
def test_no_temporary_is_larger_than_2_to_the_20_elements(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if pass_ == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    for count, width in ((24, 50_257), (1100, 1025), (3, 400_000)):
        one, other = torch.zeros(1, 1, width).expand(count, 1, width), torch.ones(1, 1, width).expand(count, 1, width)
        rows = Rows.at(one, None, width).plus(2.0, [(-1.0, Rows.at(other, None, width))])
        for call in calls(rows):
            with Meter() as meter:
                call()
            assert meter.largest <= 4 * 2**20, (count, width)  # bytes: 2^20 float32
        with Meter() as meter:
            rows.dense()  # planted: the whole sum at once
        assert meter.largest > 4 * 2**20


def test_the_pass_of_a_backend_reads_sums_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of sums do not go through chunks where compiled code reads them."""
    if not native.available():
        pytest.skip("there is no C compiler")
    rows = Case(1500, torch.bfloat16).total()[0]
    monkeypatch.setattr(chunked, "_chunks", lambda rows, keep=False: pytest.fail("read in chunks"))
    assert kernels.draw(rows, **keyed(rows)).shape == (len(rows),)
    assert reference.GROUP_SIZE == 1024
