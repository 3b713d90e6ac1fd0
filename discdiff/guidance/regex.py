r"""Regular expressions as automata over the tokens of a vocabulary, whose texts may have several characters.

The package interegular makes an automaton over characters. A token moves it as its characters do, one after another. A
text is accepted if it matches as a whole.
"""

import re
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from discdiff.checks import affordable, listing, shown, whole
from discdiff.guidance.automata import Automaton

if TYPE_CHECKING:
    from interegular import FSM

__all__ = ["tables_of"]

_SET = r"\[\^?(?:\\.|[^\]\\])*\]"  # a set of characters, in a pattern


def tables_of(
    pattern: object, vocabulary: object, pad: object, where: str
) -> tuple[Int[Tensor, "Q V"], int, Bool[Tensor, " Q"]]:
    """Return moves (Q, V), the start and the accepting states (Q,) of the texts that match a pattern as a whole.

    Args:
        pattern: the regular expression.
        vocabulary: the V texts of the tokens, None for tokens that are never accepted.
        pad: the id of a token that may fill the rest of the sequence after a match, or None.
        where: what errors begin with.

    Raises:
        ImportError: if the package interegular is not installed.
        TypeError, ValueError: for other arguments, or an expression that is not supported.
    """
    texts = listing(vocabulary, f"{where}: vocabulary")
    for number, text in enumerate(texts):
        if not isinstance(text, str | None):
            raise TypeError(f"{where}: vocabulary must hold texts or None, got {shown(text)} at id {number}")
    filler = None if pad is None else whole(pad, f"{where}: pad", 0, len(texts) - 1)
    if filler is not None:
        texts[filler] = None
    table, accepting, column = _characters(pattern, where)
    states = len(table)
    affordable((states + 1) * len(texts), f"{where}: {states} states for {len(texts)} tokens")
    moves = np.repeat(np.arange(states)[:, None], len(texts), axis=1)
    known = {text: column.get(text, column[None]) for text in {c for text in texts if text for c in text}}
    length = np.array([0 if text is None else len(text) for text in texts])
    letters = np.zeros((len(texts), int(length.max(initial=0))), dtype=np.int64)
    for number, text in enumerate(texts):
        letters[number, : length[number]] = [known[letter] for letter in text or ""]
    for place in range(letters.shape[1]):
        longer = (length > place).nonzero()[0]
        moves[:, longer] = table[moves[:, longer], letters[longer, place]]
    moves[:, [number for number, text in enumerate(texts) if text is None]] = states - 1
    if filler is not None:
        ended = np.full((1, len(texts)), states - 1)
        moves = np.vstack([moves, ended])
        accepting = np.append(accepting, True)
        moves[accepting, filler] = states
    return torch.from_numpy(moves), 0, torch.from_numpy(accepting)


def _characters(pattern: object, where: str) -> tuple[np.ndarray, np.ndarray, dict[str | None, int]]:
    """Return the automaton of a pattern over characters.

    The result is its moves (Q, C), whose last state is dead, its accepting states (Q,), and the column of each
    character, with that of all other ones at None.
    """
    found = _parsed(pattern, where)
    symbols = {symbol: found.alphabet[symbol] for symbol in found.alphabet}
    columns = {key: number for number, key in enumerate(sorted(set(symbols.values())))}
    states = {state: number for number, state in enumerate(sorted(found.states))}
    moves = np.full((len(states) + 1, len(columns) + 1), len(states))
    for state, following in found.map.items():
        for key, target in following.items():
            moves[states[state], columns[key]] = states[target]
    accepting = np.zeros(len(moves), dtype=bool)
    accepting[[states[state] for state in found.finals]] = True
    named: dict[str | None, int] = {None: len(columns)}  # a character that occurs nowhere leads to the dead state
    for symbol, key in symbols.items():
        named[symbol if isinstance(symbol, str) else None] = columns[key]
    small = Automaton.of(torch.from_numpy(moves), states[found.initial], torch.from_numpy(accepting))
    if small is None:
        raise ValueError(f"{where}: no text matches {pattern!r}")
    classes = small.class_of.numpy()
    return small.moves.numpy(), small.accepting.numpy(), {text: int(classes[n]) for text, n in named.items()}


def _parsed(pattern: object, where: str) -> "FSM":
    """Return interegular's automaton of a pattern."""
    try:
        import interegular
    except ImportError as error:
        raise ImportError(f"{where}: takes the package interegular; pip install 'discdiff[steer]'") from error
    if not isinstance(pattern, str):
        raise TypeError(f"{where}: pattern must be a text, got {shown(pattern)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
    except (re.error, FutureWarning, DeprecationWarning, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    # interegular reads a bracket at the beginning of a set as its end, and takes look-around apart wrongly
    if re.search(r"(?<!\\)(?:\\\\)*\[\^?\]", pattern):
        raise ValueError(f"{where}: {pattern!r} has a bracket at the beginning of a set; write it as \\]")
    if re.search(r"\(\?<?[=!]", re.sub(rf"\\.|{_SET}", "", pattern, flags=re.DOTALL)):
        raise ValueError(f"{where}: {pattern!r} looks ahead or behind; combine constraints with & and ~ instead")
    try:
        return interegular.parse_pattern(pattern).to_fsm()
    except Exception as error:
        said = str(error) or type(error).__name__
        raise ValueError(f"{where}: {pattern!r} is not supported: {said}") from error
