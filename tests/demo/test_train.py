"""Training: every loss learns the law it is shown, and what its network learns is what it is said to predict."""

import functools
from pathlib import Path
from typing import Literal

import pytest
import torch
from problems import chain
from torch import Tensor

import discdiff as dd
from discdiff.adapters.own import load_trained
from discdiff.demo import training as train
from discdiff.demo.data import examples
from discdiff.demo.models import Card, save_trained
from discdiff.losses import base as losses

pytestmark = pytest.mark.usefixtures("as_user")
V, L = 4, 12
KINDS: list[tuple[Literal["uniform", "absorbing"], Literal["loo", "denoiser"], train.Loss, losses.Objective]] = [
    ("uniform", "loo", train.bound(losses.UniformNELBO()), losses.UniformNELBO()),
    ("uniform", "denoiser", functools.partial(train.cross_entropy, prompts=False), losses.UniformNELBO()),
    ("absorbing", "denoiser", train.bound(losses.AbsorbingNELBO()), losses.AbsorbingNELBO()),
]


@functools.cache
def trained(kind: int) -> tuple[train.Trained, Card]:
    process, predicts, loss, _ = KINDS[kind]
    card = Card("sequence", process, V, L, width=32, depth=3, predicts=predicts, time="alpha")
    law = chain(V, L)

    def batches(generator: torch.Generator) -> Tensor:
        return law.sample(64, seed=int(torch.randint(2**40, (), generator=generator)))

    return train.train(card, batches, loss, steps=500, seed=0), card


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_loss_learns_the_law(kind: int, tmp_path: Path) -> None:
    """On data it has not seen the bound is near -log p0, and after saving; another chain's data it finds improbable."""
    result, card = trained(kind)
    assert [step for step, _ in result.curve] == [100, 200, 300, 400, 500]
    save_trained(tmp_path / "w.safetensors", result.network, card)
    model, objective = load_trained(tmp_path / "w.safetensors"), KINDS[kind][3]

    def excess(seed: int) -> float:
        """Of the bound over -log p0, nats a token, for the data of a chain."""
        x0 = chain(V, L, seed).sample(256, seed=99)
        value = objective.estimate(model, x0, draws=32, seed=0).value
        return float((value + chain(V, L, seed).log_prob(x0)).mean()) / L

    assert -0.03 < excess(5) < (0.05, 0.25, 0.05)[kind]
    assert excess(6) > 1.0


def test_sensitivity_tells_what_a_loss_taught() -> None:
    """The bound teaches the leave-one-out, cross-entropy the denoiser: read so, O looks less at its own token."""
    x0 = chain(V, L).sample(256, seed=98)
    for kind, (right, wrong) in enumerate((("loo", "denoiser"), ("denoiser", "loo"))):
        result, card = trained(kind)
        model = dd.Denoiser(result.network, dd.Uniform(V, dd.Linear()), card.predicts, time="alpha")
        curves = dd.diagnostics.sensitivity_curve(model, x0, [0.3, 0.6])
        assert (curves[right][:, 0] * 2 < curves[wrong][:, 0]).all()


def test_examples_are_data() -> None:
    for data, shape in (("digits", (5, 64)), ("text", (5, 128))):
        x, again, another = (examples(data, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert x.shape == shape
        assert (x == again).all()
        assert (x != another).any()
