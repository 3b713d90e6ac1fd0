"""Train the network of docs/plans.md that is told a time for every site: ``python docs/plans/train_sites.py``.

It took 100 seconds on an H100, with ``--device cuda``; weights made on a CPU differ. The network has the size, the data
and the process of ``docs/parameterisations/digits-loo``, which is told one time a row. In half of the rows here some
sites are revealed, at time 0, and all others are at time 1, as ``samplers.Reveal`` asks. The other rows have one time.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import discdiff as dd
from discdiff.demo.models import build, save_trained

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parameterisations"))
from networks import batches, card  # noqa: E402

STEPS = 4000


def site_times(size: int, length: int, device: torch.device) -> Tensor:
    """Draw times (B, L): one for the row, or 0 at a random share of the sites and 1 at the others."""
    row = ((torch.rand((), device=device) + torch.arange(size, device=device) / size) % 1)[:, None]
    share, kind = torch.rand(2, size, 1, device=device)
    revealed = torch.rand(size, length, device=device) < share
    return torch.where(kind < 0.5, (~revealed).to(row), row.expand(size, length)).double()


def loss(model: dd.Denoiser, x0: Tensor) -> Tensor:
    """Cross-entropy of the denoiser at sites of time above 0, in nats a sequence of L sites."""
    time = site_times(*x0.shape, device=x0.device)
    x_t = model.process.marginal(x0, time).sample()
    right = -model(x_t, time).denoiser.gather(-1, x0[..., None])[..., 0]
    return right[time > 0].mean() * x0.shape[1]


def main() -> None:
    """Train the network and keep its weights and its training curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    described = card("digits", "loo")
    network, model = build(described)
    trainer = dd.Trainer(
        network.to(arguments.device), model.process, loss, batches("digits", 0), predicts=described.predicts,
        time=described.time, rate=2e-3,
    )  # fmt: skip
    trained = trainer.fit(arguments.steps)
    assert isinstance(trained.fn, torch.nn.Module)
    save_trained(arguments.out / "digits-sites.safetensors", trained.fn, described)
    (arguments.out / "digits-sites.json").write_text(json.dumps(trainer.curve) + "\n")


if __name__ == "__main__":
    main()
