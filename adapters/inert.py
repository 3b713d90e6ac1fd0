"""Reading torch's files without running what is pickled in them."""

from collections.abc import Callable
from pathlib import Path

import torch

from discdiff.adapters.settings import Refused

__all__ = ["Inert", "load_inert", "plain"]


class Inert:
    """Stands for an object of a class that is not ours to run: it keeps what was pickled and does nothing.

    Attributes:
        arguments: what it would have been made from.
        state: what it would have been told, a dictionary as a rule.
    """

    arguments: tuple[object, ...]
    state: object

    def __new__(cls, *arguments: object) -> "Inert":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def load_inert(path: Path) -> object:
    """torch.load(weights_only=True) where every foreign class is replaced by an ``Inert`` one, so none can run.

    Lightning checkpoints hold configurations of many packages beside their weights; refusing them would lose the
    weights, and unpickling them would run their code.

    Raises:
        Refused: if the file is not one of torch's, or cannot be read even so.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
            (type(name.rsplit(".", 1)[-1], (Inert,), {}), name) for name in foreign
        ]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        raise Refused(f"{path.name} cannot be read as a file of torch.save: {error}") from error
    except Exception as error:  # pickle's own errors have no common base that is public
        raise Refused(
            f"{path.name} holds more than weights ({error}); convert it, or unpickle it yourself if you trust it and "
            "save its state_dict as safetensors"
        ) from error


def plain(value: object) -> object:
    """Configurations as dictionaries, lists and values: what OmegaConf's classes and others keep in their state."""
    if isinstance(value, Inert):
        state = value.state
        if isinstance(state, dict) and "_content" in state:
            return plain(state["_content"])
        if isinstance(state, dict) and "_val" in state:
            return plain(state["_val"])
        return plain(state) if state else [plain(part) for part in value.arguments]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value
