"""A small network of three sites of three tokens, trained on exact leave-one-outs; its law can be enumerated."""

import torch
from problems import strong
from torch import Tensor, nn

import discdiff as dd

__all__ = ["UNIFORM", "WORLD", "Small", "trained"]

WORLD, UNIFORM = strong(), dd.Uniform(3, dd.Linear())


class Small(nn.Module):
    """Three sites of three tokens and a time, two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 64))
        self.inner = nn.Linear(9, 64)
        self.middle = nn.Linear(64, 64)
        self.out = nn.Linear(64, 9)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        h = self.inner(nn.functional.one_hot(x, 3).flatten(1).float()) + self.time(alpha[:, None].float())
        return self.out(self.middle(h.relu()).relu()).unflatten(-1, (3, 3))


def trained(epochs: int) -> dd.Denoiser:
    """Trained on the leave-one-outs of all 27 states at 25 noise levels, until its law is close to the world's."""
    torch.manual_seed(0)
    network, exact = Small(), WORLD.denoiser(UNIFORM, predicts="loo")
    z = torch.cartesian_prod(*[torch.arange(3)] * 3)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    alphas = torch.linspace(0.0, 0.98, 25).double()
    shown, alpha = z.repeat(25, 1), alphas.repeat_interleave(27)
    target = torch.cat([exact(z, float(1 - a)).loo for a in alphas]).exp().float()
    for _ in range(epochs):
        loss = -(target * network(shown, alpha).log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval().requires_grad_(False)
    return dd.Denoiser(network, UNIFORM, "loo", time="alpha", scalar_time=True, length=3)
