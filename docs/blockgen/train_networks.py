"""The study's networks and their training: ``python docs/blockgen/train_networks.py``, 40 minutes of two cores.

One transformer, five ways to train it on the text: autoregressive, whole-sequence diffusion (masked, uniform), and
BlockGen's even mixture of blocks of 1 and 16 (masked, uniform). The data are the half of the text that the judge of
docs/parameterisations has not seen.
"""

import argparse
import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch

from discdiff.demo import training as train
from discdiff.demo.data import ASSETS
from discdiff.demo.models import Card, save_trained
from discdiff.losses import Objective
from discdiff.losses import base as losses
from discdiff.losses import blocks as block_losses

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parameterisations"))
import networks as study  # noqa: E402

STEPS, LENGTH = 2000, 128
MIXTURE = {1: 0.5, 16: 0.5}
MASKED, UNIFORM = losses.MaskedNELBO(), losses.UniformNELBO()
OBJECTIVES: dict[str, Objective] = {
    "blocks-uniform": block_losses.BlockMixture(UNIFORM, MIXTURE),
    "blocks-masked": block_losses.BlockMixture(MASKED, MIXTURE),
    "autoregressive": block_losses.Blocks(MASKED, 1),
    "whole-uniform": UNIFORM,
    "whole-masked": MASKED,
}


def weights(name: str) -> Path:
    """Where a network is kept; the command samples from those of blocks."""
    return ASSETS / f"text-{name}.safetensors" if name.startswith("blocks") else HERE / f"{name}.safetensors"


def card(name: str) -> Card:
    """The network of a name; only the uniform ones are told the time."""
    uniform = name.endswith("uniform")
    return Card(
        shape="blocks",
        process="uniform" if uniform else "masked",
        vocab_size=study.size("text")[0],
        length=LENGTH,
        width=128,
        depth=4,
        predicts="loo" if uniform else "denoiser",
        time="alpha" if uniform else None,
    )


def train_one(name: str) -> None:
    """Train a network, and keep its curve."""
    torch.set_num_threads(1)

    def batches(generator: torch.Generator) -> torch.Tensor:
        return study.batches("text", 0)(generator)[:16]

    trained = train.train(card(name), batches, train.bound(OBJECTIVES[name]), STEPS, seed=0, rate=1e-3)
    save_trained(weights(name), trained.network, card(name))
    (HERE / f"{name}.json").write_text(json.dumps(trained.curve) + "\n")


def main() -> None:
    """Train what matches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only what matches this expression")
    jobs = [name for name in OBJECTIVES if re.search(parser.parse_args().match, name)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(train_one, jobs, chunksize=1)


if __name__ == "__main__":
    main()
