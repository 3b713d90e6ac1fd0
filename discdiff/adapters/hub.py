"""From a path or a hub repository to a local folder or file; code is never fetched."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from discdiff.adapters.documents import is_there
from discdiff.adapters.settings import Refused

__all__ = ["Hub", "folder_or_file"]

_TEXTS = ("*.json", "*.txt", "*.yaml")
_WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.npz")
_ASIDE = ("*.py", "optimizer*", "scheduler*", "rng_state*", "training_args*", "*.onnx*", "onnx/*", "openvino*")
_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+")
_ADVICE = {
    "GatedRepoError": "accept its terms on its page, then pass token=, or log in by `hf auth login`",
    "RepositoryNotFoundError": "check its name; for a private one pass token=, or log in by `hf auth login`",
    "RevisionNotFoundError": "check revision=: a branch, a tag or a commit",
    "LocalEntryNotFoundError": "check the connection, or fetch it elsewhere and pass the folder",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE, or fetch it elsewhere and pass the folder",
}


def folder_or_file(path: Path) -> bool:
    """Return whether the path leads to a folder or a regular file; False if it leads nowhere.

    Raises:
        Refused: for anything else: a fifo, a device, a broken link, a loop of links, a folder without permission.
    """
    try:
        if path.is_dir():
            if not os.access(path, os.R_OK | os.X_OK):
                raise Refused("this folder cannot be read: permission denied")
            return True
        return is_there(path)
    except (OSError, ValueError) as error:  # a name that is too long or invalid, or a folder without permission
        if isinstance(error, Refused):
            raise
        raise Refused(f"this cannot be read: {getattr(error, 'strerror', error)}") from error


@dataclass(frozen=True)
class Hub:
    """Access to the hub.

    Attributes:
        revision: a branch, a tag or a commit; None for the default branch.
        token: for private repositories; None for that of the login.
        cache_dir: the folder for fetched files; None for the hub's own.
        file: the only file of weights, or folder of weights, to fetch; None for all.
    """

    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None
    file: str | None = None

    def found(self, source: str | Path) -> Path:
        """Return a path as it is; fetch anything else of the form owner/name or owner/name/folder.

        Raises:
            FileNotFoundError: if there is nothing of that name, locally or on the hub.
            ImportError: without huggingface_hub.
        """
        path = Path(source)
        if folder_or_file(path):
            return path
        parts = str(source).split("/")
        if isinstance(source, Path) or not _ID.fullmatch(source) or ".." in parts:
            raise FileNotFoundError(f"load: there is no file or folder {source}")
        return self._fetched(source, parts)

    def _fetched(self, source: str, parts: Sequence[str]) -> Path:
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise ImportError(
                f"load: there is no file {source}, and hub ids need huggingface_hub: pip install 'discdiff[hf]'"
            ) from error
        owner, name, *within = parts
        kinds = [*_TEXTS, *_WEIGHTS]
        if self.file is not None:
            kinds = [*_TEXTS, re.sub(r"-\d{5}-of-", "-*-of-", self.file), f"{self.file}/*"]
        try:
            fetched = snapshot_download(
                f"{owner}/{name}",
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                allow_patterns=["/".join([*within, kind]) for kind in kinds],
                ignore_patterns=list(_ASIDE),
            )
        except Exception as error:  # of many kinds, none of which suggests that a path was meant
            advice = next((_ADVICE[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _ADVICE), None)
            said = str(error).strip().split("\n")[0]
            raise FileNotFoundError(
                f"load: there is no file or folder {source}, and the hub gave nothing for it: {said}"
                + (f"; {advice}" if advice else "")
            ) from error
        return Path(fetched).joinpath(*within)
