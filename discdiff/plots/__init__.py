"""Pictures with matplotlib: each function takes ``ax=None`` and returns the ``Axes`` that it drew on.

matplotlib is imported when a picture is drawn: ``pip install 'discdiff[demo]'``.
"""

from discdiff.plots.curves import convergence, frontier, kl_against_calls
from discdiff.plots.particles import effective_sample_size
from discdiff.plots.probes import loo_sensitivity
from discdiff.plots.runs import trajectory, unmasking_order

__all__ = [
    "convergence", "effective_sample_size", "frontier", "kl_against_calls", "loo_sensitivity", "trajectory",
    "unmasking_order",
]  # fmt: skip


def __dir__() -> list[str]:
    """List the names for tab completion."""
    return sorted(__all__)
