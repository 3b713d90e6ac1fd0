r"""Train the examples' denoisers: ``python -m discdiff.demo.training digits masked`` and so on, four in all.

Any bound of ``discdiff.losses`` can be the loss (``bound``). The examples use one loss for both processes instead: the
cross-entropy of the denoiser D that the network's prediction implies,

    E_{t, x0, x_t}  -1/L sum_i log D_t(x0_i | x_t).

On a masked process the network predicts D. On a uniform one it predicts the leave-one-out O, and ``Prediction`` adds
the evidence of the site's own token, a known number, before the loss. D and O determine each other, so the minimum of
this proper score of D is at the exact O. The network then spends no capacity on copying its input.
"""

import argparse
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.demo.data import _TEXT, ASSETS, GREY_LEVELS, examples, text, text_from_topics
from discdiff.demo.models import Card, build, save_trained
from discdiff.denoiser import Denoiser
from discdiff.learning import Trainer
from discdiff.losses import Objective

__all__ = ["Trained", "bound", "cross_entropy", "main", "train"]

Batches = Callable[[torch.Generator], Int[Tensor, "B L"]]
Loss = Callable[[Denoiser, Int[Tensor, "B L"], torch.Generator], Float[Tensor, ""]]


def bound(objective: Objective) -> Loss:
    """Return a training loss that averages a likelihood bound over the batch, in nats per token."""
    return lambda model, x0, generator: objective(model, x0).mean() / x0.shape[1]


def cross_entropy(
    model: Denoiser, x0: Int[Tensor, "B L"], generator: torch.Generator, prompts: bool = True
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the denoiser on one batch (B, L), in nats per token.

    The alphas of the rows are uniform on [0, 1] and stratified over the batch. With ``prompts``, about half of the rows
    have some clean sites, so that the model learns to use a prompt.
    """
    size = len(x0)
    alpha = ((torch.rand((), generator=generator) + torch.arange(size) / size) % 1).double()
    t = model.process.schedule.time(alpha)
    assert isinstance(t, Tensor)
    time = torch.where(_given(x0, generator), 0.0, t[:, None]) if prompts else t[:, None].expand(x0.shape)
    x_t = model.process.marginal(x0, time).sample()
    return -model(x_t, time).denoiser.gather(-1, x0[..., None]).mean()


def _given(x0: Int[Tensor, "B L"], generator: torch.Generator) -> Bool[Tensor, "B L"]:
    """Choose the clean sites of a prompt: a prefix in a quarter of the rows, scattered sites in another quarter."""
    size, length = x0.shape
    kind, share = torch.rand(2, size, 1, generator=generator)
    prefix = torch.arange(length) < share * length
    scattered = torch.rand(size, length, generator=generator) < share
    return torch.where(kind < 0.25, prefix, (kind < 0.5) & scattered)


@dataclass(frozen=True)
class Trained:
    """Trained network and its training curve.

    Attributes:
        network: the network; its weights are exponential moving averages over training.
        curve: (step, smoothed loss) after every 100 steps.
    """

    network: torch.nn.Module
    curve: list[tuple[int, float]]


def train(card: Card, batches: Batches, loss: Loss, steps: int, seed: int, rate: float = 2e-3) -> Trained:
    """Train a network by ``Trainer``, with AdamW and a cosine learning-rate schedule after a warm-up of 100 steps.

    Args:
        card: the network and the process.
        batches: a function that draws a batch of data with a generator.
        loss: ``cross_entropy``, ``bound(UniformNELBO())`` or another function of (model, x0, generator).
        steps: the number of batches.
        seed: the seed of weights, data and noise.
        rate: the highest learning rate.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, model = build(card)
    trainer = Trainer(
        network,
        model.process,
        lambda learner, x0: loss(learner, x0, generator) * x0.shape[1],
        lambda _: batches(generator),
        predicts=card.predicts,
        time=card.time,
        optimizer=functools.partial(_optimizing, rate=rate),
        seed=None,
    )
    trained = trainer.fit(steps)
    assert isinstance(trained.fn, torch.nn.Module)
    return Trained(trained.fn, [(step, round(value, 5)) for step, value in trainer.curve if step % 100 == 0])


class _WarmCosine:
    """The learning rate of the examples: a rise of 100 steps, then a cosine over as many steps as the run has."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, rate: float) -> None:
        self.done = 0
        self.warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
        self.cool = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate * 0.02)

    def step(self) -> None:
        self.done += 1
        (self.warm if self.done < 100 else self.cool).step()


def _optimizing(
    parameters: Iterable[torch.nn.Parameter], steps: int, rate: float
) -> tuple[torch.optim.Optimizer, _WarmCosine]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    return optimizer, _WarmCosine(optimizer, steps, rate)


def main() -> None:
    """Train one of the four models and write its weights to ``ASSETS``, or write the example text."""
    parser = argparse.ArgumentParser(prog="python -m discdiff.demo.training", description=__doc__)
    parser.add_argument("data", choices=["digits", "text", "text-file"], help="text-file writes the text itself")
    parser.add_argument("process", choices=["masked", "uniform"], nargs="?", default="masked")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    if arguments.data == "text-file":
        _TEXT.write_text(text_from_topics(), encoding="ascii")
        return
    on_digits = arguments.data == "digits"
    size = 64 if on_digits else 32
    masked = arguments.process == "masked"
    card = Card(
        shape="image" if on_digits else "sequence",
        process=arguments.process,
        vocab_size=GREY_LEVELS if on_digits else len(text()[1]),
        length=64 if on_digits else 128,
        width=64 if on_digits else 128,
        depth=6 if on_digits else 8,
        predicts="denoiser" if masked else "loo",
        time=None if masked else "alpha",
    )
    steps = arguments.steps or (6000 if on_digits else 3500)
    trained = train(card, functools.partial(examples, arguments.data, size), cross_entropy, steps, arguments.seed)
    path = ASSETS / f"{arguments.data}-{arguments.process}.safetensors"
    save_trained(path, trained.network, card)
    print(f"{path}: {sum(p.numel() for p in trained.network.parameters())} weights")


if __name__ == "__main__":
    main()
