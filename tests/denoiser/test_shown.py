"""What a network without a cache is shown: sequences put together for each row, that it may keep and edit."""

import itertools

import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.command.bench import Meter
from discdiff.denoiser import ShownPrefix, context

MASKED = dd.Masked(3, dd.Linear())
PROMPTS = [[1, 2, 0], [], [2] * 9, [0] * 12]


def pick(n: int, high: int, seed: int) -> Tensor:
    return torch.randint(high, (n, 12), generator=torch.Generator().manual_seed(seed))


def read(x: Tensor, time: Tensor | None) -> Tensor:
    """Logits that tell every token and time that is shown, and where."""
    place = torch.arange(x.shape[1], dtype=torch.float64)
    told = (x + 7 * place).cos()
    if time is not None:
        told = told + (time if time.ndim == 2 else time[:, None]) * (place + 1)
    return torch.stack([told, told.cumsum(1), told.flip(1).cumsum(1).flip(1)], -1)


def expected(model: dd.Denoiser, row: Tensor, x: Tensor, t: Tensor, future: Tensor | None) -> Tensor:
    """The block's logits of one row, whose sequence is put together here."""
    after = x[:0] if future is None else future[len(row) + len(x) :]
    times = torch.cat([torch.zeros(len(row)).double(), t, torch.ones(len(after)).double()])
    out = model.call(model.fn, torch.cat([row, x, after])[None], times[None])[0]
    if model.call.shift:
        out = torch.cat([out[:1], out[:-1]])
    return out[len(row) : len(row) + len(x)]


def furthest(time: str | None, scalar: bool, shift: bool, whole: bool) -> float:
    """How far ``ShownPrefix`` is from it through blocks, calls for some rows, widths that change, and a selection."""
    model = dd.Denoiser(
        read,
        MASKED,
        "denoiser",
        time=time,
        scalar_time=scalar,
        shift=shift,
        time_dtype=torch.float64,  # type: ignore[arg-type]
    )
    length, clean, states = torch.tensor([0, 2, 2, 5]), pick(4, 3, 0), pick(4, 4, 1)
    future = pick(4, 4, 2) if whole else None
    rows, prefix = torch.tensor([3, 4, 6, 9]), [clean[b, :n] for b, n in enumerate(length.tolist())]
    shown, worst = ShownPrefix(rows, length, clean[:, :5], future), 0.0
    for turn, (n, asked) in enumerate(itertools.product((3, 1, 2), (4, 4, 2, 4))):
        which = torch.arange(4) if asked == 4 else torch.tensor([2, 0, 2])
        which = which[which < len(shown.rows)]
        x, t = states[which, turn % 4 : turn % 4 + n], torch.full((1, 1), 1 - turn / 20).double()
        if turn % 2:
            t = torch.where(torch.arange(n) == 0, 0.0, t).expand(len(which), n)  # a prompt inside the block
        found = shown.logits(model.call, model.fn, x, t, shown.rows[which])
        for place, b in enumerate(which.tolist()):
            ahead = None if shown.future is None else shown.future[b]
            own = expected(model, prefix[b], x[place], t.expand(len(which), n)[place], ahead)
            worst = max(worst, float((found[place] - own).abs().max()))
        if turn % 4 == 3 and int(shown.length.max()) < 8:
            block = clean[: len(shown.rows), 6 : 6 + n]
            shown.extend(block)
            prefix = [torch.cat([row, block[b]]) for b, row in enumerate(prefix)]
        if turn == 7:
            index = torch.tensor([0, 2, 3])
            shown, prefix = shown.select(index), [prefix[b] for b in index.tolist()]
    return worst


@pytest.mark.parametrize("whole", [False, True], ids=["prefix", "future"])
@pytest.mark.parametrize(("time", "scalar"), [("t", False), ("alpha", False), ("alpha", True), (None, False)])
@pytest.mark.parametrize("shift", [False, True])
def test_every_row_is_shown_its_own_sequence(
    time: str | None, scalar: bool, shift: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert furthest(time, scalar, shift, whole) < 1e-12

    def forget(self: context._Aligned, clean: Tensor) -> None:  # the block's last noisy state stays
        self.length, self._width = self.length + clean.shape[1], 0

    monkeypatch.setattr(context._Aligned, "extend", forget)
    assert furthest(time, scalar, shift, whole) > 1e-3


@pytest.mark.parametrize("future", [False, True], ids=["prefix", "future"])
def test_an_input_may_be_kept_and_edited(future: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keeps(x: Tensor, time: Tensor) -> Tensor:
        kept.extend((each, each.clone()) for each in (x[:, 1:], time[:, 1:]))  # views: what holds them is not seen
        return read(x, time)

    def edits(x: Tensor, time: Tensor) -> Tensor:
        out = read(x, time)
        x.fill_(2)
        time.fill_(0.25)
        return out

    def tokens(fn: object) -> Tensor:
        model = dd.Denoiser(fn, MASKED, "denoiser")  # type: ignore[arg-type]
        sampler = dd.Blockwise(MASKED, model, S.Ancestral(), block=3, steps=4, future=future)
        return sampler.sample(4, 12, seed=0, prompt=PROMPTS).tokens

    usual = tokens(read)
    assert torch.equal(tokens(keeps), usual)
    assert torch.equal(tokens(edits), usual)
    assert kept
    assert all(torch.equal(one, then) for one, then in kept)
    monkeypatch.setattr(context, "_when_written", lambda x: x)
    kept.clear()
    tokens(keeps)
    assert not all(torch.equal(one, then) for one, then in kept)
    assert not torch.equal(tokens(edits), usual)


def test_gradients_of_earlier_calls_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding keeps its input for the gradient; two calls write the same tensor."""
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model = dd.Denoiser(lambda x, t: torch.nn.functional.embedding(x, weight), MASKED, "denoiser")
    blocks, t = [torch.full((2, 2), value) for value in (3, 1)], torch.full((1, 1), 0.5).double()

    def gradient() -> Tensor:
        shown = ShownPrefix(torch.arange(2), torch.tensor([3, 3]), torch.zeros(2, 3, dtype=torch.int64))
        out = torch.stack([shown.logits(model.call, model.fn, x, t, shown.rows) for x in blocks])
        return torch.autograd.grad(out.sum(), weight)[0]

    assert torch.equal(gradient(), torch.tensor([0.0, 4.0, 0.0, 4.0])[:, None].expand(4, 3))
    monkeypatch.setattr(context, "_when_written", lambda x: x)
    with pytest.raises(RuntimeError, match="inplace"):
        gradient()


@pytest.mark.parametrize("future", [False, True], ids=["prefix", "future"])
def test_a_call_copies_the_block_alone(future: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes made in a call behind 4096 tokens are those of the block; the copy handed out has the tensor's memory."""
    batch, length, n = 4, 4096, 16
    logits = torch.zeros(batch, 2 * length, 3)
    model = dd.Denoiser(lambda x, t: logits[:, : x.shape[1]], MASKED, "denoiser")
    noise = torch.full((batch, 2 * length), 3) if future else None
    shown = ShownPrefix(torch.arange(batch), torch.full((batch,), length), torch.zeros(batch, length).long(), noise)
    x, t = torch.full((batch, n), 3), torch.full((1, 1), 0.5).double()
    one = context._when_written(logits)
    assert torch._C._data_address(one) == torch._C._data_address(logits)  # type: ignore[attr-defined]
    monkeypatch.setattr(context, "_when_written", lambda x: x)  # a copy that is not made would count

    def made() -> int:
        with Meter() as meter:
            shown.logits(model.call, model.fn, x, t, shown.rows)
        return meter.peak

    assert made() > 8 * batch * length  # the first call of a block
    assert made() < 64 * batch * n
    assert shown.queries(n, shown.rows) == batch * (2 * length if future else length + n)


@pytest.mark.parametrize(
    ("fn", "error"),
    [
        (lambda x, t: None, TypeError),
        (lambda x, t: torch.zeros(x.shape), ValueError),
        (lambda x, t: torch.zeros(len(x), x.shape[1] - 1, 3), ValueError),
        (lambda x, t: torch.zeros(5, x.shape[1], 3), ValueError),
    ],
)
@pytest.mark.parametrize("prompt", [(), PROMPTS], ids=["equal", "ragged"])
def test_what_a_function_returns_is_looked_at(fn: object, error: type[Exception], prompt: object) -> None:
    model = dd.Denoiser(fn, MASKED, "denoiser")  # type: ignore[arg-type]
    with pytest.raises(error, match="must return logits"):
        dd.Blockwise(MASKED, model, S.Ancestral(), block=3, steps=2).sample(4, 12, seed=0, prompt=prompt)  # type: ignore[arg-type]
