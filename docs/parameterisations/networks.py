"""The study's data, its networks and their training: ``python docs/parameterisations/networks.py``, 50 minutes.

Every denoiser has the same size and sees the same noise; only the loss differs, or on the absorbing reformulation the
input too, which is a pair of tokens. The judges are autoregressive and see the other half of the data.
"""

import argparse
import functools
import json
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discdiff import theory as T
from discdiff.demo import training as train
from discdiff.demo.data import GREY_LEVELS, digits, text
from discdiff.demo.models import Card, save_trained
from discdiff.losses import base as losses

WEIGHTS = Path(__file__).parent
DATA = ("chain", "digits", "text")
STEPS = {"chain": 3000, "digits": 3000, "text": 2500}
BATCH = {"chain": 64, "digits": 64, "text": 32}
BLOCK = 4096  # characters; every other block of the text is the judge's


# --- data -----------------------------------------------------------------------------------------------------------


@functools.cache
def chain() -> T.MarkovChain:
    """A Markov chain of 64 sites over 8 tokens with few likely transitions."""
    transition = np.random.default_rng(5).dirichlet(np.full(8, 0.3), size=8)
    return T.MarkovChain(torch.full((8,), 1 / 8), torch.as_tensor(transition), length=64)


@functools.cache
def halves(data: str) -> tuple[Tensor, Tensor]:
    """The denoisers' half of the data and the judge's: images, or blocks of text."""
    if data == "digits":
        images = digits()
        return images[::2], images[1::2]
    tokens, _ = text()
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    return blocks[::2], blocks[1::2]


def size(data: str) -> tuple[int, int]:
    """(V, L)."""
    return {"chain": (8, 64), "digits": (GREY_LEVELS, 64), "text": (len(text()[1]), 128)}[data]


def batches(data: str, half: int) -> Callable[[torch.Generator], Tensor]:
    """Batches of a half; of the chain, fresh draws."""
    count, length = BATCH[data], size(data)[1]

    def draw(generator: torch.Generator) -> Tensor:
        if data == "chain":
            return chain().sample(count, seed=int(torch.randint(2**40, (), generator=generator)) * 2 + half)
        part = halves(data)[half]
        rows = part[torch.randint(len(part), (count,), generator=generator)]
        start = torch.randint(rows.shape[1] - length + 1, (count, 1), generator=generator)
        return rows.gather(1, start + torch.arange(length))

    return draw


# --- training -------------------------------------------------------------------------------------------------------


LOSSES: dict[str, train.Loss] = {
    "loo": train.bound(losses.UniformNELBO()),
    "denoiser": functools.partial(train.cross_entropy, prompts=False),
    "absorbing": train.bound(losses.AbsorbingNELBO()),
}


def card(data: str, kind: str) -> Card:
    """A network for some data."""
    vocab_size, length = size(data)
    return Card(
        shape="image" if data == "digits" else "sequence",
        process="absorbing" if kind == "absorbing" else "uniform",
        vocab_size=vocab_size,
        length=length,
        width=128 if data == "text" else 64,
        depth=8 if data == "text" else 6,
        predicts="loo" if kind == "loo" else "denoiser",
        time="alpha",
    )


class Judge(nn.Module):
    """An autoregressive network, p(x_i | x_{<i}): a GRU over the tokens so far and the position."""

    def __init__(self, vocab_size: int, length: int, width: int) -> None:
        super().__init__()
        self.start = vocab_size
        self.token = nn.Embedding(vocab_size + 1, 64)
        self.position = nn.Parameter(torch.randn(length, 64) * 0.02)
        self.recurrent = nn.GRU(64, width, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """-log p of every token given those before it, (B, L) nats."""
        before = nn.functional.pad(x[:, :-1], (1, 0), value=self.start)
        hidden, _ = self.recurrent(self.token(before) + self.position)
        return nn.functional.cross_entropy(self.head(hidden).transpose(1, 2), x, reduction="none")


def judge(data: str) -> Judge:
    """The trained judge of digits or text."""
    network = Judge(*size(data), width=128 if data == "digits" else 256)
    network.load_state_dict(
        {name: value.float() for name, value in load_file(WEIGHTS / f"{data}-judge.safetensors").items()}
    )
    return network.eval()


def train_judge(data: str) -> list[tuple[int, float]]:
    """Train it on its half; what is kept is the step that was best on the denoisers' half of the data."""
    torch.manual_seed(0)
    network, generator = Judge(*size(data), width=128 if data == "digits" else 256), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = {"digits": 1500, "text": 3000}[data]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=2e-5)
    own, other = batches(data, 1), batches(data, 0)
    held_out = torch.cat([other(generator) for _ in range(8)])
    curve: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        network(own(generator)).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            network.eval()
            with torch.no_grad():
                curve.append((step, round(float(network(held_out).mean()), 5)))
            network.train()
            print(f"judge of {data}, step {step}: {curve[-1][1]:.4f} nats a token held out", flush=True)
            if curve[-1][1] == min(value for _, value in curve):
                weights = {name: value.half() for name, value in network.state_dict().items()}
                save_file(weights, WEIGHTS / f"{data}-judge.safetensors")
    return curve


def train_one(job: tuple[str, str]) -> None:
    """Train a denoiser or a judge, and keep its curve."""
    torch.set_num_threads(1)
    data, kind = job
    if kind == "judge":
        curve = train_judge(data)
    else:
        trained = train.train(card(data, kind), batches(data, 0), LOSSES[kind], STEPS[data], seed=0)
        save_trained(WEIGHTS / f"{data}-{kind}.safetensors", trained.network, card(data, kind))
        curve = trained.curve
    (WEIGHTS / f"{data}-{kind}.json").write_text(json.dumps(curve) + "\n")


def main() -> None:
    """Train what matches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only what matches this expression")
    jobs = [(data, kind) for data in DATA for kind in LOSSES] + [("digits", "judge"), ("text", "judge")]
    jobs = [job for job in jobs if re.search(parser.parse_args().match, "-".join(job))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(train_one, jobs, chunksize=1)


if __name__ == "__main__":
    main()
