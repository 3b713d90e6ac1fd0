"""Read the sizes of a network from the shapes of its weights."""

import re
from collections.abc import Mapping

from discdiff.adapters.settings import Refused

__all__ = ["Shapes", "axes", "depth", "matrix"]

Shapes = Mapping[str, tuple[int, ...]]


def axes(shapes: Shapes, name: str, count: int, least: int = 1) -> tuple[int, ...]:
    """Return the shape of a weight after a check of its number of axes.

    Raises:
        Refused: if the weight is missing, does not have ``count`` axes, or has an axis shorter than ``least``.
    """
    if name not in shapes:
        raise Refused(f"the weight {name} is missing; there are {', '.join(list(shapes)[:4])}")
    shape = shapes[name]
    if len(shape) != count or min(shape) < least:
        raise Refused(f"the weight {name} must have {count} axes, none smaller than {least}, got shape {shape}")
    return shape


def matrix(shapes: Shapes, name: str, least: int = 1) -> tuple[int, int]:
    """Return the numbers of rows and columns of a weight with two axes, each at least ``least``."""
    rows, columns = axes(shapes, name, 2, least)
    return rows, columns


def depth(shapes: Shapes, prefix: str) -> int:
    """Count the layers: the different numbers after ``prefix`` in names such as "blocks.0.w1.weight".

    This function does not check that the numbers are 0, 1, 2, ...; ``fit`` does so later.

    Raises:
        Refused: if there are no layers.
    """
    found = {m[1] for m in (re.match(re.escape(prefix) + r"([0-9]+)\.", name) for name in shapes) if m}
    if not found:
        raise Refused(f"there is no layer named {prefix}0; there are {', '.join(list(shapes)[:4])}")
    return len(found)
