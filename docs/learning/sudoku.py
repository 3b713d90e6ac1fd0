r"""Sudoku of sides 4, 6 and 9 as data whose right answers are known, and its plain networks.

A grid of side n holds n symbols, and each row, column and box holds each symbol once. The boxes are 2 x 2, 2 x 3 (rows
x columns) or 3 x 3. There are 288, 28,200,960 and 6,670,903,752,021,072,936,960 grids.

``python docs/learning/sudoku.py`` trains four networks, in nine minutes of one core: for sides 4 and 6 one on masked
and one on uniform noise. They see random grids of all there are, so that nothing is held out. The files beside hold
their weights and training curves.
"""

import argparse
import functools
import json
import re
import time
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import discdiff as dd
from discdiff import losses
from discdiff.checks import whole
from discdiff.demo.training import cross_entropy
from discdiff.demo.transformer import FREQUENCIES, survival_features
from discdiff.process import Linear

HERE = Path(__file__).parent
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # (rows, columns) of a box
COUNTS = {4: 288, 6: 28_200_960, 9: 6_670_903_752_021_072_936_960}
STEPS = {"sudoku4-masked": 1500, "sudoku4-uniform": 1500, "sudoku6-masked": 3000, "sudoku6-uniform": 3000}
WIDTH, DEPTH, BATCH = {4: 48, 6: 64}, {4: 4, 6: 6}, 64


# --- grids ----------------------------------------------------------------------------------------------------------


@functools.cache
def units(side: int) -> Int[Tensor, "3n n"]:
    """Return the cells of every row, column and box of a grid; cells count along rows, from 0.

    Raises:
        ValueError: for a side other than 4, 6 or 9.
    """
    if side not in BOXES:
        raise ValueError(f"sudoku: side must be 4, 6 or 9, got {side!r}")
    rows, columns = BOXES[side]
    cells = torch.arange(side * side).view(side, side)
    boxes = cells.view(side // rows, rows, side // columns, columns).transpose(1, 2).reshape(side, side)
    return torch.cat([cells, cells.T, boxes])


@functools.cache
def starting(side: int) -> Int[Tensor, "N C"]:
    """Return all grids (N, C) whose first row is 0, 1, ..., n - 1, of side 4 (12) or 6 (39,168).

    They are built cell by cell: every part of a grid goes on with each symbol that its three units still lack.

    Raises:
        ValueError: for a side other than 4 or 6; of side 9 there are too many.
    """
    if side not in (4, 6):
        raise ValueError(f"sudoku: all grids can be listed for sides 4 and 6, got {side!r}")
    inside = (units(side)[:, :, None] == torch.arange(side * side)).any(1)  # (3n, C), unit by cell
    found = torch.arange(side)[None]
    for cell in range(side, side * side):
        peers = (inside[:, cell, None] & inside).any(0)[:cell].nonzero()[:, 0]
        taken = torch.zeros(len(found), side, dtype=torch.bool).scatter_(1, found[:, peers], True)
        part, symbol = (~taken).nonzero(as_tuple=True)
        found = torch.cat([found[part], symbol[:, None]], 1)
    return found


def all_grids(side: int = 4) -> Int[Tensor, "288 16"]:
    """Return all grids of side 4, as tokens (288, 16) in order.

    Raises:
        ValueError: for another side.
    """
    if side != 4:
        raise ValueError(f"sudoku: all grids are listed for side 4, got {side!r}; grids() draws some")
    names = torch.cartesian_prod(*[torch.arange(4)] * 4)
    names = names[(names.sort(1).values == torch.arange(4)).all(1)]  # the 24 permutations
    return torch.unique(names[:, starting(4)].flatten(0, 1), dim=0)


def grids(side: int, count: int, seed: int | torch.Generator) -> Int[Tensor, "N C"]:
    """Draw ``count`` random grids, as tokens (count, side * side).

    Of sides 4 and 6 they are exactly uniform and independent: a grid of ``starting`` with its symbols renamed at
    random, and every grid is one of these in exactly one way. Of side 9 they are independent but not exactly uniform:
    cells are filled at random, those with the fewest possible symbols first. Renaming, exchanges of rows, columns,
    bands and stacks, and a transposition make the law uniform on each class of grids that these turn into each other,
    but not between classes.

    Args:
        side: 4, 6 or 9.
        count: N.
        seed: the seed of the draws, or a generator.

    Raises:
        TypeError, ValueError: for a side other than 4, 6 or 9, or a count below 0.
    """
    units(side)
    count = whole(count, "grids: count", 0)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    names = torch.rand(count, side, generator=generator).argsort(1)
    if side == 9:
        return names.gather(1, _moved(_filled(count, generator), generator))
    first = starting(side)
    return names.gather(1, first[torch.randint(len(first), (count,), generator=generator)])


def _filled(count: int, generator: torch.Generator) -> Int[Tensor, "N 81"]:
    """Fill grids of side 9 at random, the cell with the fewest possible symbols first; begin anew where none is."""
    inside = (units(9)[:, :, None] == torch.arange(81)).any(1).float()
    peers = (inside.T @ inside) > 0  # (C, C)
    done = torch.zeros(0, 81, dtype=torch.int64)
    while len(done) < count:
        tokens = torch.full((2 * (count - len(done)) + 8, 81), -1)
        possible = torch.ones(*tokens.shape, 9, dtype=torch.bool)
        for _ in range(81):
            left = possible.sum(-1).masked_fill(tokens >= 0, 10)
            alive = (left > 0).all(1)
            tokens, possible, left = tokens[alive], possible[alive], left[alive]
            row = torch.arange(len(tokens))
            cell = (left + torch.rand(left.shape, generator=generator)).argmin(1)
            draw = torch.rand(len(tokens), 9, generator=generator)
            symbol = draw.masked_fill(~possible[row, cell], -1.0).argmax(1)
            tokens[row, cell] = symbol
            possible &= ~(peers[cell][:, :, None] & (torch.arange(9) == symbol[:, None])[:, None])
        done = torch.cat([done, tokens])
    return done[:count]


def _moved(tokens: Int[Tensor, "N 81"], generator: torch.Generator) -> Int[Tensor, "N 81"]:
    """Exchange rows within bands, bands, columns within stacks and stacks of each grid at random; transpose half."""
    grid = tokens.view(-1, 9, 9)
    for _ in range(2):
        bands, rows = (torch.rand(len(grid), *size, generator=generator).argsort(-1) for size in ((3,), (3, 3)))
        order = (3 * bands[:, :, None] + rows).view(-1, 9, 1)
        grid = grid.gather(1, order.expand_as(grid)).transpose(1, 2)
    turned = torch.rand(len(grid), 1, 1, generator=generator) < 0.5
    return torch.where(turned, grid.transpose(1, 2), grid).reshape(-1, 81)


def violations(tokens: Int[Tensor, "N C"], side: int) -> Int[Tensor, " N"]:
    """Return how many symbols the units of a grid lack, summed over its 3 n units, (N,); 0 if it is solved.

    Raises:
        ValueError: for a side other than 4, 6 or 9, a wrong number of cells, or symbols outside [0, side).
    """
    cells = units(side).to(tokens.device)
    if tokens.ndim != 2 or tokens.shape[1] != side * side:
        raise ValueError(f"sudoku: tokens must have shape (N, {side * side}), got {tuple(tokens.shape)}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < side:
        raise ValueError(f"sudoku: symbols must lie in [0, {side}), got {int(tokens.min())} to {int(tokens.max())}")
    held = tokens.new_zeros(len(tokens), 3 * side, side).scatter_(2, tokens[:, cells].long(), 1)
    return (1 - held).sum((1, 2))


def solved(tokens: Int[Tensor, "N C"], side: int) -> Bool[Tensor, " N"]:
    """Return whether each row, column and box of a grid (N, side * side) holds each symbol once, (N,).

    Raises:
        ValueError: as ``violations``.
    """
    return violations(tokens, side) == 0


# --- networks -------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A residual network over the cells of a grid; each layer sees a cell and the means of its row, column and box.

    Args:
        side: 4, 6 or 9.
        states: the number of input ids: ``side``, plus one for the mask if there is one.
        width: the width of a cell.
        depth: the number of layers.
        sees_alpha: whether the survival probability alpha is an input.
    """

    mean: Tensor

    def __init__(self, side: int, states: int, width: int, depth: int, sees_alpha: bool) -> None:
        super().__init__()
        inside = (units(side)[:, :, None] == torch.arange(side * side)).any(1).float().view(3, side, -1)
        self.register_buffer("mean", torch.einsum("kuc,kud->kcd", inside, inside) / side, persistent=False)
        self.token: nn.Embedding = nn.Embedding(states, width)
        self.position: nn.Parameter = nn.Parameter(torch.randn(side * side, width) * 0.02)
        self.time: nn.Linear | None = nn.Linear(2 * FREQUENCIES, width) if sees_alpha else None
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.Linear(4 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.norms: nn.ModuleList = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth + 1))
        self.head: nn.Linear = nn.Linear(width, side)

    def forward(self, x: Int[Tensor, "B C"], alpha: Float[Tensor, "B *C"] | None = None) -> Float[Tensor, "B C V"]:
        """Return the logits (B, C, V) of states (B, C) at alpha (B,) or (B, C)."""
        h = self.token(x) + self.position
        if self.time is not None and alpha is not None:
            shown = self.time(survival_features(alpha.to(h.dtype)))
            h = h + (shown[:, None] if alpha.ndim == 1 else shown)
        for layer, norm in zip(self.layers, self.norms[:-1], strict=True):
            one = norm(h)
            around = torch.einsum("kcd,bdw->bckw", self.mean, one).flatten(2)
            h = h + layer(torch.cat([one, around], -1))
        return self.head(self.norms[-1](h))


def process_of(name: str) -> dd.Process:
    """Return the process of a network named as "sudoku4-masked" or "sudoku6-uniform"."""
    side = int(name[6])
    return dd.Masked(side, Linear()) if name.endswith("masked") else dd.Uniform(side, Linear())


def fresh(name: str, width: int | None = None, depth: int | None = None) -> tuple[Cells, dd.Denoiser]:
    """Make a network with fresh weights and its denoiser, by default of the size of the kept ones."""
    side, process = int(name[6]), process_of(name)
    uniform = not process.absorbing
    network = Cells(side, process.states, width or WIDTH[side], depth or DEPTH[side], sees_alpha=uniform)
    return network, dd.Denoiser(network, process, "denoiser", time="alpha" if uniform else None)


def load(name: str) -> tuple[Cells, dd.Denoiser]:
    """Return a kept network and its denoiser, in float32 and evaluation mode."""
    network, model = fresh(name)
    network.load_state_dict({key: part.float() for key, part in load_file(HERE / f"{name}.safetensors").items()})
    network.eval()
    return network, model


def batches(side: int, count: int, generator: torch.Generator) -> Int[Tensor, "B C"]:
    """Draw a batch of grids."""
    return grids(side, count, generator)


def train(name: str, steps: int) -> dict[str, object]:
    """Train a network of a name; keep its weights, its curve and the seconds that it took."""
    torch.manual_seed(0)
    network, model = fresh(name)
    noisy = functools.partial(cross_entropy, generator=torch.default_generator, prompts=False)

    def everywhere(model: dd.Denoiser, x0: Tensor) -> Tensor:
        """The cross-entropy at all sites, nats a grid."""
        return noisy(model, x0) * x0.shape[1]

    trainer = dd.Trainer(
        network, model.process, losses.MaskedNELBO() if model.process.absorbing else everywhere,
        functools.partial(batches, int(name[6]), BATCH), predicts="denoiser", time=model.call.time, rate=2e-3,
        progress=False,
    )  # fmt: skip
    begin = time.perf_counter()
    trained = trainer.fit(steps)
    assert isinstance(trained.fn, nn.Module)
    weights = {key: part.half().contiguous() for key, part in trained.fn.state_dict().items()}
    save_file(weights, HERE / f"{name}.safetensors")
    found = {"seconds": round(time.perf_counter() - begin, 1), "curve": [(n, round(v, 4)) for n, v in trainer.curve]}
    (HERE / f"{name}.json").write_text(json.dumps(found) + "\n")
    return found


def main() -> None:
    """Train what matches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only networks whose name matches this expression")
    parser.add_argument("--steps", type=int, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, steps in STEPS.items():
        if re.search(arguments.match, name):
            found = train(name, arguments.steps or steps)
            print(name, found["seconds"], "s", found["curve"][-1])  # type: ignore[index]


if __name__ == "__main__":
    main()
