"""Train the masked network of docs/steering/digits.py: ``python docs/steering/train_digits.py``, in ten minutes.

The networks in ``discdiff/demo`` have seen all images. For images that a network has not seen, this one is trained on
the half of the images on which the uniform networks in ``docs/parameterisations`` were trained, with the loss and the
prompts of the demo. It is half as wide and sees fewer batches: on half of the images, a larger one is soon worse on the
other half.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from discdiff.demo import training as train
from discdiff.demo.data import GREY_LEVELS
from discdiff.demo.models import Card, save_trained

WEIGHTS = Path(__file__).parent
sys.path.insert(0, str(WEIGHTS.parent / "parameterisations"))
from networks import halves  # noqa: E402

CARD = Card(
    shape="image", process="masked", vocab_size=GREY_LEVELS, length=64, width=32, depth=6, predicts="denoiser",
    time=None,
)  # fmt: skip
STEPS, BATCH = 2000, 64


def batch(generator: torch.Generator) -> Tensor:
    """Draw a batch (64, 64) of the images that the networks see."""
    seen, _ = halves("digits")
    return seen[torch.randint(len(seen), (BATCH,), generator=generator)]


def main() -> None:
    """Train the network and keep its weights and its training curve."""
    torch.set_num_threads(1)
    trained = train.train(CARD, batch, functools.partial(train.cross_entropy, prompts=True), STEPS, seed=0)
    save_trained(WEIGHTS / "digits-masked.safetensors", trained.network, CARD)
    (WEIGHTS / "digits-masked.json").write_text(json.dumps(trained.curve) + "\n")


if __name__ == "__main__":
    main()
