"""Train the network of docs/plans.md that is told a time for every site: ``python docs/plans/train_sites.py``.

It takes a quarter of an hour on one core. The network has the size, the data and the process of
``docs/parameterisations/digits-loo``, which is told one time a row. In half of the rows here some sites are revealed,
at time 0, and all others are at time 1, as ``samplers.Reveal`` asks. The other rows have one time.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import discdiff as dd
from discdiff.demo import training as train
from discdiff.demo.models import save_trained

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parameterisations"))
from networks import batches, card  # noqa: E402

CARD = replace(card("digits", "loo"), predicts="loo")
STEPS = 4000


def site_times(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw times (B, L): one for the row, or 0 at a random share of the sites and 1 at the others."""
    size, length = shape
    row = ((torch.rand((), generator=generator) + torch.arange(size) / size) % 1).double()[:, None]
    share, kind = torch.rand(2, size, 1, generator=generator)
    revealed = torch.rand(size, length, generator=generator) < share
    return torch.where(kind < 0.5, torch.where(revealed, 0.0, 1.0).double(), row.expand(shape))


def loss(model: dd.Denoiser, x0: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the denoiser at sites of time above 0, in nats a site."""
    time = site_times((x0.shape[0], x0.shape[1]), generator)
    x_t = model.process.marginal(x0, time).sample()
    right = -model(x_t, time).denoiser.gather(-1, x0[..., None])[..., 0]
    return right[time > 0].mean()


def main() -> None:
    """Train the network and keep its weights and its training curve."""
    torch.set_num_threads(1)
    trained = train.train(CARD, batches("digits", 0), loss, STEPS, seed=0)
    save_trained(HERE / "digits-sites.safetensors", trained.network, CARD)
    (HERE / "digits-sites.json").write_text(json.dumps(trained.curve) + "\n")


if __name__ == "__main__":
    main()
