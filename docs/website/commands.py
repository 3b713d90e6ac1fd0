"""The page of the command ``discdiff``: the help of each of its commands, as it prints it."""

import contextlib
import io
import os
import re
from unittest import mock

from discdiff.command.cli import main


def told(words: list[str]) -> str:
    """Return what a command prints with --help, at 100 columns."""
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help"])
    return said.getvalue()


def commands(words: list[str] | None = None) -> dict[str, str]:
    """Map each command, with the commands inside it, to its help."""
    words = words or []
    text = told(words)
    found = {" ".join(["discdiff", *words]): text}
    inner = re.search(r"^positional arguments:\n  (?:COMMAND|DATA)\n((?:    .*\n)+)", text, re.M)
    for name in re.findall(r"^    (\w+)", inner[1], re.M) if inner else ():
        found |= commands([*words, name])
    return found


def page() -> str:
    """Return the page in reStructuredText."""
    title = "The command discdiff"
    lines = [title, "=" * len(title), "", "What each command says with ``--help``.", ""]
    for name, text in commands().items():
        lines += [name, "-" * len(name), "", ".. code-block:: text", ""]
        lines += [*("   " + line if line else "" for line in text.splitlines()), ""]
    return "\n".join(lines)
