"""What int8 weights change in the law of a sampler, exactly: the table of docs/checkpoints.md.

python docs/quantized.py     # half a minute
"""

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from small import UNIFORM, WORLD, trained

STEPS = (4, 8, 16, 32)


class Coarse(nn.Module):
    """The same network, told its time to the nearest of ``levels``."""

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        return self.network(x, (alpha * self.levels).round() / self.levels)


def table(model: dd.Denoiser) -> str:
    """KL from the data and from the float network's law, per number of steps."""
    assert isinstance(model.fn, nn.Module)
    changed = {
        "int8": dd.quantize(model),
        "time features too": dd.quantize(model, whole=lambda name: False),
        "4 bits, time whole": dd.quantize(model, levels=7),
        "4 bits, time alone": dd.quantize(model, whole=lambda name: "time" not in name, levels=7),
        "time to an eighth": model.calling(Coarse(model.fn, 8)),
    }
    lines = [f"| steps | KL(p0, float) | KL(p0, int8) | {' | '.join(f'KL(float, {name})' for name in changed)} |"]
    lines.append("|---" * (3 + len(changed)) + "|")
    for steps in STEPS:
        plain, *laws = (
            T.law(dd.Sampler(UNIFORM, one, S.Ancestral(), steps=steps)) for one in (model, *changed.values())
        )
        found = [T.kl(WORLD.p0, plain), T.kl(WORLD.p0, laws[0]), *(T.kl(plain, law) for law in laws)]
        lines.append(f"| {steps} | {' | '.join(f'{kl:.1e}' for kl in found)} |")
    return "\n".join(lines)


def main() -> None:
    """Put the table into the page."""
    torch.set_num_threads(1)
    page, found = Path(__file__).parent / "checkpoints.md", table(trained(6000))
    print(found)
    text = re.sub(r"(?<=<!-- quantized -->\n).*?(?=\n<!-- end -->)", lambda _: found, page.read_text(), flags=re.S)
    page.write_text(text)


if __name__ == "__main__":
    main()
