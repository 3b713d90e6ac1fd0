"""What int8 weights change in the law of a sampler, exactly: the table of docs/quantised.md.

python docs/quantised.py     # half a minute
"""

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PROCESS = dd.Uniform(3, dd.Linear())
STEPS = (4, 8, 16, 32)


class Network(nn.Module):
    """Three sites of three tokens and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 64))
        self.inner = nn.Linear(9, 64)
        self.middle = nn.Linear(64, 64)
        self.out = nn.Linear(64, 9)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        h = self.inner(nn.functional.one_hot(x, 3).flatten(1).float()) + self.time(alpha[:, None].float())
        return self.out(self.middle(h.relu()).relu()).unflatten(-1, (3, 3))


class Coarse(nn.Module):
    """The same network, told its time to the nearest of ``levels``."""

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        return self.network(x, (alpha * self.levels).round() / self.levels)


def world() -> T.Enumeration:
    """The suite's strongly coupled law of three sites."""
    import problems

    return problems.strong()


def trained(epochs: int) -> dd.Denoiser:
    """Trained on the exact leave-one-outs of all 27 states at 25 noise levels."""
    torch.manual_seed(0)
    network, exact = Network(), world().denoiser(PROCESS, predicts="loo")
    z, alphas = torch.cartesian_prod(*[torch.arange(3)] * 3), torch.linspace(0.0, 0.98, 25).double()
    shown, alpha = z.repeat(25, 1), alphas.repeat_interleave(27)
    target = torch.cat([exact(z, float(1 - a)).loo for a in alphas]).exp().float()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        loss = -(target * network(shown, alpha).log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval().requires_grad_(False)
    return dd.Denoiser(network, PROCESS, "loo", time="alpha", scalar_time=True, length=3)


def table(model: dd.Denoiser) -> str:
    """KL from the data and from the float network's law, per number of steps."""
    assert isinstance(model.fn, nn.Module)
    changed = {
        "int8": dd.quantised(model),
        "time features too": dd.quantised(model, whole=lambda name: False),
        "4 bits, time whole": dd.quantised(model, levels=7),
        "4 bits, time alone": dd.quantised(model, whole=lambda name: "time" not in name, levels=7),
        "time to an eighth": model.calling(Coarse(model.fn, 8)),
    }
    lines = [f"| steps | KL(p0, float) | KL(p0, int8) | {' | '.join(f'KL(float, {name})' for name in changed)} |"]
    lines.append("|---" * (3 + len(changed)) + "|")
    for steps in STEPS:
        plain, *laws = (
            T.law(dd.Sampler(PROCESS, one, S.Ancestral(), steps=steps)) for one in (model, *changed.values())
        )
        found = [T.kl(world().p0, plain), T.kl(world().p0, laws[0]), *(T.kl(plain, law) for law in laws)]
        lines.append(f"| {steps} | {' | '.join(f'{kl:.1e}' for kl in found)} |")
    return "\n".join(lines)


def main() -> None:
    """Put the table into the page."""
    torch.set_num_threads(1)
    page = ROOT / "docs" / "quantised.md"
    found = table(trained(6000))
    print(found)
    if page.exists():
        text = re.sub(r"(?<=<!-- table -->\n).*?(?=\n<!-- end -->)", lambda _: found, page.read_text(), flags=re.S)
        page.write_text(text)


if __name__ == "__main__":
    main()
