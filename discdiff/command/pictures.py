"""What the commands that write pictures share: matplotlib without a window, the check of a path, digits in rows."""

from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.demo.data import SIDE

__all__ = ["check_out", "picture", "pyplot_without_window"]


def pyplot_without_window() -> ModuleType:
    """Import ``matplotlib.pyplot``, which shall write files and open no window.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'discdiff[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_out(out: Path, pyplot: ModuleType | None = None, option: str = "--out") -> None:
    """Check the path of a file to write, before the work starts; with ``pyplot`` the file is a picture.

    Raises:
        ValueError: for a folder that does not exist, a path that is a folder, or an ending that is no kind of picture.
    """
    if not out.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {out.parent}; make it first, or give another path")
    if out.is_dir():
        raise ValueError(f"{option}: {out} is a folder, and a file is to be written; add a file name")
    if pyplot is not None:
        kinds = pyplot.gcf().canvas.get_supported_filetypes()
        pyplot.close()
        if out.suffix[1:].lower() not in kinds:
            raise ValueError(f"{option}: {out} must end in one of {', '.join(sorted(kinds))}, which are pictures")


def picture(tokens: Int[Tensor, "B 64"], columns: int = 10, zoom: int = 6, gap: int = 1) -> Int[Tensor, "H W"]:
    """Arrange images (B, 64) in a picture (H, W), ``columns`` in a row, with magnified pixels and white gaps."""
    columns = min(columns, len(tokens))
    rows = -(-len(tokens) // columns)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, rows * columns - len(tokens)))
    tiles = torch.nn.functional.pad(padded.view(-1, SIDE, SIDE), (gap, gap, gap, gap))
    side = SIDE + 2 * gap
    grid = tiles.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    return grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
