"""Find a folder or a file locally, or fetch it from a hub repository; code is never fetched."""

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
    """Return whether a path is a readable folder or a regular file; False if nothing is there.

    Raises:
        Refused: if the path is anything else: a fifo, a device, a loop of links, a folder without permission.
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
    """Settings for access to the hub.

    Attributes:
        revision: a branch, a tag or a commit; None for the default branch.
        token: the access token for private repositories; None for the token of the user's login.
        cache_dir: the folder for fetched files; None for the hub's default.
        file: the file or folder of weights to fetch, without any other weights; None to fetch all weights.
    """

    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None
    file: str | None = None

    def found(self, source: str | Path) -> Path:
        """Return an existing path as it is; else fetch owner/name or owner/name/folder from the hub.

        Raises:
            FileNotFoundError: if ``source`` exists neither locally nor on the hub.
            ImportError: if the hub is needed and huggingface_hub is not installed.
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
