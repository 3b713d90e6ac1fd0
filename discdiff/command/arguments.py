"""The parser of the command's arguments: an error is one line, and a misspelt word gets a suggestion."""

import argparse
import re
from typing import NoReturn

from discdiff.checks import meant

__all__ = ["Formatter", "Parser"]


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, with the nearest option or choice if a word is misspelt."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end with exit status 2."""
        message = re.sub(r"invalid int value: '(.*)'$", r"must be a whole number, got '\1'", message)
        choice = re.match(r"argument .*: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        strange = re.match(r"unrecognized arguments: (--?[^\s=]+)", message)
        if choice:
            message += meant(choice[1], re.findall(r"[\w.-]+", choice[2]))
        elif strange:
            message += meant(strange[1], self._options())
        self.exit(2, f"discdiff: {message}; see {self.prog} --help\n")

    def _options(self) -> list[str]:
        """Return the options of this parser and of all its commands."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                inner = (one for one in action.choices.values() if isinstance(one, Parser))
                found += [option for one in inner for option in one._options()]
        return found


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Formatter of help that keeps the lines of examples, and adds "(default: ...)" where a default says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        silent = any(action.default is one for one in (None, False, "", argparse.SUPPRESS)) or "(default" in told
        return told if silent or not action.option_strings else f"{told} (default: %(default)s)"
