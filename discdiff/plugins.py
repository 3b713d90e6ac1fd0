"""What other installed packages add: operators, processes and families of checkpoints, by entry points.

[project.entry-points."discdiff.operators"]
my_step = "my_package:MyStep"
"""

from importlib.metadata import entry_points
from typing import Literal

__all__ = ["Group", "plugged"]

Group = Literal["operators", "processes", "families"]


def plugged(group: Group) -> tuple[dict[str, object], dict[str, str]]:
    """What is plugged into a group by name, and for what cannot be imported the error, so that it stops nothing else.

    Args:
        group: of the entry points, ``discdiff.`` before it.
    """
    found: dict[str, object] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=f"discdiff.{group}"):
        try:
            found[point.name] = point.load()
        except Exception as error:  # any package's own; it is shown, not raised
            broken[point.name] = f"{type(error).__name__}: {error}"
    return found, broken
