"""The trainer against formulas by hand: averages, clipping, rates, curves, modes, and the loss that it ends with."""

import math
from collections.abc import Iterator

import pytest
import torch
from learners import MASKED, ROWS, Dropping, Pairs, stopping
from problems import dirichlet
from torch import Tensor, nn

import discdiff as dd
from discdiff import losses
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.demo.transformer import Transformer
from discdiff.learning import StagedLoss, Trainer
from discdiff.learning.objectives import scaled
from discdiff.learning.optimizing import adamw

UNIFORM = dd.Uniform(3, dd.Linear())


class Line(nn.Module):
    """One weight of two numbers; its loss is linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        return torch.zeros(*x.shape, 3)


def slope(model: dd.Denoiser, x0: Tensor) -> Tensor:
    """A loss of gradient (3, 4), of norm 5; four sites a row."""
    assert isinstance(model.fn, Line)
    return (model.fn.w * torch.tensor([3.0, 4.0])).sum() * 4 + torch.zeros(len(x0))


def sgd(parameters: object, steps: int) -> tuple[torch.optim.Optimizer, object]:
    optimizer = torch.optim.SGD(parameters, lr=0.5)  # type: ignore[arg-type]
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def descent(**options: object) -> Trainer:
    said = {"predicts": "denoiser", "optimizer": sgd, "progress": False, "every": 5, **options}
    return Trainer(Line(), MASKED, slope, ROWS, **said)  # type: ignore[arg-type]


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (2.5, 2.5), (5.5, 5.0), (math.inf, 5.0)])
def test_a_gradient_is_as_long_as_clip_at_most(clip: float, norm: float) -> None:
    trainer = descent(clip=clip)
    trainer.fit(7)
    moved = torch.tensor([1.0, 2.0]) - trainer.network.w.detach()
    torch.testing.assert_close(moved, 7 * 0.5 * norm * torch.tensor([0.6, 0.8]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.998])
def test_averages_are_those_of_the_formula(ema: float) -> None:
    trainer = descent(ema=ema, clip=1.0)
    trainer.fit(30)
    weight = average = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for n in range(1, 31):
        weight = weight - 0.5 * torch.tensor([0.6, 0.8], dtype=torch.float64)
        decay = min(ema, n / (n + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(trainer.model.fn.w.double(), average, atol=1e-4, rtol=1e-5)  # type: ignore[union-attr]
    assert (ema == 0) == torch.equal(trainer.model.fn.w, trainer.network.w)  # type: ignore[union-attr]
    assert not trainer.model.fn.w.requires_grad  # type: ignore[union-attr]


def test_the_rate_rises_and_falls_on_a_cosine() -> None:
    optimizer, schedule = adamw([nn.Parameter(torch.zeros(1))], steps=110, rate=0.2, warmup=10)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:11] == pytest.approx([0.2 * (n + 1) / 11 for n in range(11)])
    assert rates[35] == pytest.approx(0.2 * (0.02 + 0.98 * (1 + math.sqrt(0.5)) / 2))
    assert rates[60] == pytest.approx(0.2 * 0.51)
    assert rates[110] == pytest.approx(0.2 * 0.02)
    assert max(rates) == pytest.approx(0.2)
    assert adamw([nn.Parameter(torch.zeros(1))], 3, 0.1, 0)[0].param_groups[0]["lr"] == pytest.approx(0.1)


def test_the_curve_is_the_smoothed_loss_and_the_held_out_loss_is_that_of_the_averages() -> None:
    seen: list[tuple[bool, float]] = []

    def watched(model: dd.Denoiser, x0: Tensor) -> Tensor:
        value = losses.MaskedNELBO()(model, x0)
        assert isinstance(model.fn, nn.Module)
        seen.append((model.fn.training, float(value.detach().mean()) / x0.shape[1]))
        return value

    torch.manual_seed(0)
    network = Dropping()
    trainer = Trainer(network, MASKED, watched, ROWS, predicts="denoiser", time=None, batch=8, held_out=ROWS[:12],
                      every=4, progress=False)  # fmt: skip
    model = trainer.fit(10)
    assert model is trainer.model
    smooth, trained = math.nan, [value for training, value in seen if training]
    assert len(trained) == 10
    assert len(seen) == 10 + 3 * 2  # 12 rows held out, in batches of 8, at steps 4, 8 and 10
    expected = []
    for step, value in enumerate(trained, 1):
        smooth = value if step == 1 else 0.98 * smooth + 0.02 * value
        expected.append((step, pytest.approx(smooth)))
    assert trainer.curve == [expected[3], expected[7], expected[9]]
    assert [step for step, _ in trainer.held_out_curve] == [4, 8, 10]
    for module in (network, model.fn):
        assert not any(part.training for part in module.modules())  # type: ignore[union-attr]
    torch.manual_seed(0)
    with torch.no_grad():
        parts = [losses.MaskedNELBO()(model, part) for part in (ROWS[:8], ROWS[8:12])]
        other = dd.Denoiser(network, MASKED, "denoiser", time=None)
        assert scaled(losses.MaskedNELBO(), losses.MaskedNELBO()(other, ROWS[:12]), ROWS[:12]) != pytest.approx(
            trainer.held_out_curve[-1][1]
        )
    assert trainer.held_out_curve[-1][1] == pytest.approx(float(torch.cat(parts).mean()) / 4)


def test_batches_are_rows_windows_or_those_of_a_function() -> None:
    taken: list[Tensor] = []

    def keep(model: dd.Denoiser, x0: Tensor) -> Tensor:
        taken.append(x0)
        return model(x0, 0.5).logits.sum((1, 2))

    def fit(data: object, **options: object) -> Tensor:
        taken.clear()
        said = {"predicts": "denoiser", "time": None, "batch": 16, "progress": False, **options}
        Trainer(Dropping(), MASKED, keep, data, **said).fit(8)  # type: ignore[arg-type]
        return torch.cat(taken)

    rows = torch.arange(12).view(4, 3) % 3
    assert {tuple(row) for row in fit(rows).tolist()} == {tuple(row) for row in rows.tolist()}
    assert torch.equal(fit(rows.numpy()), fit(rows.tolist()))
    assert not torch.equal(fit(ROWS), fit(ROWS, seed=1))
    long_row = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2])
    windows = {tuple(long_row[n : n + 4].tolist()) for n in range(6)}
    assert {tuple(row) for row in fit(long_row, length=4).tolist()} == windows
    mine = fit(lambda generator: torch.randint(3, (5, 2), generator=generator))
    assert mine.shape == (40, 2)
    assert len({tuple(part.flatten().tolist()) for part in mine.split(5)}) == 8


TWO = {"masked": dd.Masked(2, dd.Linear()), "uniform": dd.Uniform(2, dd.Linear())}
WORLD = dirichlet(1.0, 4, 2, 2)
STATES = T.world.all_states(2, 2)
LOSSES: list[tuple[losses.Objective, dd.Process, str, int, float]] = [
    (losses.MaskedNELBO(), TWO["masked"], "denoiser", 300, 0.01),
    (losses.AnyOrder(), TWO["masked"], "denoiser", 300, 0.01),
    (losses.UniformNELBO(), TWO["uniform"], "loo", 300, 0.01),
    (losses.AbsorbingNELBO(), dd.AbsorbingUniform(2, dd.Linear()), "denoiser", 500, 0.03),
    (losses.ScoreEntropy(), TWO["uniform"], "ratio", 300, 0.02),
    (losses.ScoreEntropy(), TWO["masked"], "ratio", 300, 0.02),
    (losses.PathKL(), TWO["uniform"], "loo", 300, 0.01),
    (losses.DiscreteBound(4), TWO["uniform"], "loo", 300, 0.01),
    (losses.DiscreteBound(4), TWO["masked"], "denoiser", 300, 0.01),
]
FAST = (losses.UniformNELBO(),)


def drawn(generator: torch.Generator) -> Tensor:
    """A batch of the world."""
    return STATES[torch.multinomial(WORLD.p0, 256, True, generator=generator)]


def excess(loss: losses.Objective, model: dd.Denoiser, predicts: str) -> float:
    """The expected loss of a network minus that of the exact denoiser, both without any draw."""
    read = dd.Denoiser(model.fn, model.process, predicts, time="alpha", length=2)  # type: ignore[arg-type]
    exact = float((WORLD.p0 * T.bound(loss, WORLD.denoiser(model.process))).sum())
    if not isinstance(loss, losses.DiscreteBound):  # a bound in continuous time is the entropy of the data
        assert exact == pytest.approx(T.entropy(WORLD.p0), abs=1e-6)
    return float((WORLD.p0 * T.bound(loss, read)).sum()) - exact


@pytest.mark.parametrize(
    ("loss", "process", "predicts", "steps", "gap"),
    [
        pytest.param(*case, marks=() if case[0] in FAST else pytest.mark.slow, id=f"{case[0]} {case[1]}")
        for case in LOSSES
    ],
)
def test_every_loss_ends_at_the_loss_of_the_exact_denoiser(
    loss: losses.Objective, process: dd.Process, predicts: str, steps: int, gap: float
) -> None:
    torch.manual_seed(0)
    trainer = Trainer(Pairs(process, 2), process, loss, drawn, time="alpha", rate=1e-2, warmup=20, ema=0.98,
                      progress=False)  # fmt: skip
    assert trainer.model.predicts == predicts
    model = trainer.fit(steps)
    assert -1e-6 < excess(loss, model, predicts) < gap
    if loss == losses.UniformNELBO():
        assert excess(loss, model, "denoiser") > 0.03, "a leave-one-out in the denoiser's place would be seen"


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [losses.Blocks(losses.MaskedNELBO(), 1), losses.BlockMixture(losses.MaskedNELBO(), {1: 0.5, 2: 0.5})]
)
def test_losses_of_blocks_end_at_the_entropy(loss: losses.Objective) -> None:
    torch.manual_seed(0)
    process = TWO["masked"]
    trainer = Trainer(Transformer(2, 3, 32, 1, sees_alpha=False), process, loss, drawn, time=None, rate=3e-3,
                      warmup=20, ema=0.98, progress=False)  # fmt: skip
    assert trainer.model.predicts == "denoiser"
    model = trainer.fit(500)
    with torch.no_grad():
        nll = losses.Blocks(losses.MaskedNELBO(), 1)(model, STATES)
        bound = losses.BlockMixture(losses.MaskedNELBO(), {2: 1.0}).estimate(model, STATES, draws=400, seed=0).value
    assert -1e-6 < float((WORLD.p0 * nll).sum()) - T.entropy(WORLD.p0) < 0.02
    if isinstance(loss, losses.BlockMixture):
        assert float((WORLD.p0 * bound).sum()) - T.entropy(WORLD.p0) < 0.1


def test_a_sampler_takes_the_trained_model_and_a_loop_of_ones_own_ends_at_the_same_loss() -> None:
    process = TWO["masked"]
    torch.manual_seed(0)
    network = Pairs(process, 2)
    model = dd.Denoiser(network, process, "denoiser", time="alpha", length=2)
    optimizer, generator = torch.optim.Adam(network.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(200):
        loss = losses.AnyOrder()(model, drawn(generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert excess(losses.AnyOrder(), model, "denoiser") < 0.02
    law = T.law(dd.Sampler(process, model, S.Ancestral(), steps=8))
    exact = T.law(dd.Sampler(process, WORLD.denoiser(process), S.Ancestral(), steps=8))
    assert T.tv(law, exact) < 0.05
    trained = stopping(None).fit(3)
    assert dd.Sampler(trained.process, trained, S.Ancestral(), steps=2).sample(2, 4, seed=0).tokens.shape == (2, 4)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"network": lambda x, t: x}, TypeError, "network must be a torch.nn.Module, got"),
        ({"process": "masked"}, TypeError, "Trainer: process must be a Process such as"),
        ({"loss": losses.UniformNELBO()}, ValueError, "UniformNELBO applies to a Uniform process, got Masked"),
        (
            {"loss": losses.AnyOrder(), "process": UNIFORM},
            ValueError,
            "AnyOrder applies to a Masked process, got Uniform",
        ),
        ({"loss": losses.Blocks(losses.AbsorbingNELBO(), 2)}, ValueError, "AbsorbingNELBO applies to pairs"),
        ({"loss": losses.MaskedNELBO}, TypeError, r"it is a class: write MaskedNELBO\(\)"),
        ({"loss": "nelbo"}, TypeError, "loss must be one of discdiff.losses or a function, got 'nelbo'"),
        ({"loss": slope}, ValueError, "the loss is a function, so give predicts='denoiser', 'loo' or 'ratio'"),
        ({"predicts": "score"}, ValueError, "predicts"),
        ({"data": "a text"}, TypeError, "data must be an array of token ids, got a string"),
        ({"data": iter([ROWS])}, TypeError, "the place in an iterator cannot be kept in a checkpoint"),
        ({"data": ROWS.float()}, ValueError, "data must hold token ids, got torch.float32"),
        (
            {"data": ROWS[None]},
            ValueError,
            r"data must have shape \(N, L\), or \(N,\) for one long row, got \(1, 40, 4\)",
        ),
        ({"data": ROWS + 1}, ValueError, "data: row .*, position .* holds 3; accepted ids: 0..2"),
        ({"data": ROWS[0]}, ValueError, "one long row of 4 tokens: give length="),
        ({"data": ROWS[0], "length": 5}, ValueError, "data has 4 tokens, and length= is 5"),
        ({"length": 3}, ValueError, "data has rows of 4 tokens, and length= is 3"),
        ({"held_out": ROWS[:0]}, ValueError, r"held_out must have shape .*, got \(0, 4\)"),
        ({"batch": 0}, ValueError, "Trainer: batch must be at least 1"),
        ({"rate": 0}, ValueError, r"Trainer: rate must lie in \(0, inf\)"),
        ({"ema": 1}, ValueError, r"Trainer: ema must lie in \[0, 1\)"),
        ({"clip": -1.0}, ValueError, "Trainer: clip must lie in"),
        ({"progress": "no"}, TypeError, "progress must be True or False"),
        ({"time": "noise"}, ValueError, "time must be"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    said = {
        "network": Dropping(),
        "process": MASKED,
        "loss": losses.MaskedNELBO(),
        "data": ROWS,
        "time": None,
        **change,
    }
    with pytest.raises(error, match=message):
        Trainer(**said)  # type: ignore[arg-type]


@pytest.mark.usefixtures("as_user")
def test_a_loss_that_is_no_loss_is_refused() -> None:
    for loss, message in (
        (lambda model, x0: 3.0, r"must return nats a sequence, a tensor \(B,\) = \(64,\), got 3.0"),
        (lambda model, x0: torch.zeros(2, 2), r"got torch.float32 of shape \(2, 2\)"),
    ):
        with pytest.raises(TypeError, match=message):
            Trainer(Dropping(), MASKED, loss, ROWS, predicts="denoiser", time=None, progress=False).fit(1)
    trainer = descent(clip=math.inf)
    trainer.network.w.data[0] = math.nan
    with pytest.raises(ValueError, match="the loss is nan at step 1; a lower rate or clip may help"):
        trainer.fit(3)
    with pytest.raises(ValueError, match="fit: steps must be at least 1"):
        trainer.fit(0)


def test_a_trainer_prints_short() -> None:
    assert repr(stopping(None)) == "Trainer(Dropping, Masked(3, Linear()), MaskedNELBO(), batch=8)"
    assert repr(descent()) == "Trainer(Line, Masked(3, Linear()), slope, batch=64)"


def test_progress_is_shown_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    stopping(None, progress=True).fit(3)
    said = capfd.readouterr()
    assert "3/3" in said.err
    assert "loss" in said.err
    assert said.out == ""


class Twice(StagedLoss):
    """Two updates a batch, the second with a tenth of the loss; it keeps what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def __call__(self, model: dd.Denoiser, x0: Tensor) -> Tensor:
        return losses.MaskedNELBO()(model, x0)

    def updates(self, model: dd.Denoiser, average: dd.Denoiser, x0: Tensor, done: float) -> Iterator[Tensor]:
        for factor in (1.0, 0.1):
            before = [part.clone() for part in model.fn.parameters()]  # type: ignore[union-attr]
            yield factor * self(model, x0)
            moved = any(not torch.equal(one, part) for one, part in zip(before, model.fn.parameters(), strict=True))  # type: ignore[union-attr]
            self.seen.append((done, moved and not any(part.requires_grad for part in average.fn.parameters())))  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return "Twice()"


def test_a_staged_loss_follows_the_training_and_updates_twice() -> None:
    loss = Twice()
    trainer = Trainer(Dropping(), MASKED, loss, ROWS, time=None, batch=8, every=2, progress=False)
    trainer.fit(4)
    assert loss.seen == [(n / 4, True) for n in range(4) for _ in range(2)]
    assert trainer.model.predicts == "denoiser"
    assert [step for step, _ in trainer.curve] == [2, 4]

    class Whole(Twice):
        whole = True

    value = torch.tensor([2.0, 4.0])
    assert float(scaled(loss, value, ROWS[:2])) == 3 / 4
    assert float(scaled(Whole(), value, ROWS[:2])) == 3
    with pytest.raises(ValueError, match="the loss of step 1 does not depend on the network's weights"):
        Trainer(Dropping(), MASKED, lambda model, x0: x0.sum(1).double(), ROWS, predicts="denoiser", time=None,
                progress=False).fit(2)  # fmt: skip
