"""For type checkers alone: at run time this folder has no __init__, and ``discdiff`` sets the dispatcher's names."""

from discdiff.kernels.dispatch import *  # noqa: F403
from discdiff.kernels.dispatch import __all__ as __all__
