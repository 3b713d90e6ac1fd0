"""Convert checkpoints and packages of other authors to this package's types; each kind has a module."""

from discdiff.adapters.convention import Convention, Loaded
from discdiff.adapters.diffusion_transformers import DIFFUSION_TRANSFORMERS
from discdiff.adapters.evodiff import EVODIFF
from discdiff.adapters.fairseq import FAIRSEQ
from discdiff.adapters.files import Files
from discdiff.adapters.gemma import GEMMA
from discdiff.adapters.in_transformers import NATIVE
from discdiff.adapters.loading import Asked, Family, load
from discdiff.adapters.md4 import MD4
from discdiff.adapters.own import OWN
from discdiff.adapters.saving import SAVED

FAMILIES: tuple[Family, ...] = (*DIFFUSION_TRANSFORMERS, *NATIVE, GEMMA, FAIRSEQ, *EVODIFF, MD4, OWN, SAVED)

__all__ = ["FAMILIES", "Asked", "Convention", "Family", "Files", "Loaded", "load"]


def __dir__() -> list[str]:
    """List the names for tab completion."""
    return sorted(__all__)
