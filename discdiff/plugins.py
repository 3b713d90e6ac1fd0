"""Operators, processes and families of checkpoints from other installed packages, found by entry points.

A package offers one by lines such as these in its pyproject.toml:

[project.entry-points."discdiff.operators"]
my_step = "my_package:MyStep"
"""

from importlib.metadata import entry_points
from typing import Literal

__all__ = ["Group", "plugged"]

Group = Literal["operators", "processes", "families"]


def plugged(group: Group) -> tuple[dict[str, object], dict[str, str]]:
    """Import the plug-ins of a group; a plug-in whose import fails does not stop the others.

    Args:
        group: the entry-point group without the prefix ``discdiff.``.

    Returns:
        The imported plug-ins by name, and the error texts of the others by name.
    """
    found: dict[str, object] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=f"discdiff.{group}"):
        try:
            found[point.name] = point.load()
        except Exception as error:  # any error of the package; it is reported, not raised
            broken[point.name] = f"{type(error).__name__}: {error}"
    return found, broken
