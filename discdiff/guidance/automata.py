r"""Minimal deterministic automata over token ids, and their products.

    q_0 = start,    q_i = moves(q_{i-1}, x_i);    x is accepted if q_L is an accepting state

Tokens with equal moves form one class. So an automaton of Q states over 50,000 tokens is a table of Q rows and a few
columns. States that cannot be reached, or from which no accepting state can be reached, are left out; equal states are
merged. The states that are left are numbered in the order in which they are first reached. Two automata are therefore
equal if and only if they accept the same sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Automaton"]


@dataclass(frozen=True, eq=False)
class Automaton:
    """Minimal deterministic automaton; its first state is the start, and its last one is dead.

    Shapes: Q states with the dead one, C classes with the last one, V tokens.

    Attributes:
        moves: (Q, C) the next state for each state and class of tokens. The last row and the last column lead to
            the dead state.
        class_of: (V,) the class of each token; C - 1 for tokens that lead to the dead state from every state.
        accepting: (Q,) bools.
    """

    moves: Int[Tensor, "Q C"]
    class_of: Int[Tensor, " V"]
    accepting: Bool[Tensor, " Q"]

    @classmethod
    def of(
        cls, moves: Int[Tensor, "N V"], start: int, accepting: Bool[Tensor, " N"], class_of: Tensor | None = None
    ) -> "Automaton | None":
        """Return the minimal automaton of one with N states; None if it accepts no sequence.

        Args:
            moves: (N, V) the next state for each state and column.
            start: the state before the first token.
            accepting: (N,) bools.
            class_of: the column of each token; by default each token has its own.
        """
        table = np.ascontiguousarray(moves.numpy().astype(np.int64))
        final = accepting.numpy().copy()
        token_class = np.arange(table.shape[1]) if class_of is None else class_of.numpy()
        used, token_class = np.unique(token_class, return_inverse=True)  # no move is made by a class without tokens
        column, inverse = _distinct(table[:, used].T)
        table, token_class = table[:, used[column]], inverse[token_class]
        keep = _reached(table, start) & (_distances(table, final) >= 0)
        if not keep[start]:
            return None
        number = np.where(keep, np.cumsum(keep) - 1, int(keep.sum()))
        table = np.vstack([number[table[keep]], np.full((1, table.shape[1]), int(keep.sum()))])
        final = np.append(final[keep], False)
        merged = _merged(table, final)
        start_class, dead = merged[number[start]], merged[-1]
        _, first = np.unique(merged, return_index=True)
        table, final = merged[table[first]], final[first]
        return cls._numbered(table, final, int(start_class), int(dead), token_class)

    @classmethod
    def _numbered(
        cls, table: np.ndarray, final: np.ndarray, start: int, dead: int, token_class: np.ndarray
    ) -> "Automaton":
        """Number states and classes in the order in which they are first reached; the dead ones come last."""
        column, inverse = _distinct(table.T)
        token_class = inverse[token_class]
        table = table[:, column]
        nothing = (table == dead).all(0)
        used, at = np.unique(token_class, return_index=True)  # each class and its first token
        live = [int(c) for c in used[np.argsort(at)] if not nothing[c]]
        order = {start: 0}
        for state in (queue := [start]):
            for following in dict.fromkeys(table[state, live].tolist()):
                if following != dead and following not in order:
                    order[following] = len(order)
                    queue.append(following)
        size = len(order)
        renumbered = np.full(len(table), size)
        renumbered[list(order)] = np.arange(size)
        moves = np.full((size + 1, len(live) + 1), size)
        moves[:size, : len(live)] = renumbered[table[list(order)][:, live]]
        classes = np.full(table.shape[1], len(live))
        classes[live] = np.arange(len(live))
        accepting = np.append(final[list(order)], False)
        return cls(torch.from_numpy(moves), torch.from_numpy(classes[token_class]), torch.from_numpy(accepting))

    @property
    def states(self) -> int:
        """The number of states besides the dead one."""
        return len(self.moves) - 1

    @property
    def classes(self) -> int:
        """The number of classes of tokens that some state accepts."""
        return self.moves.shape[1] - 1

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.class_of)

    def walk(self, x: Int[Tensor, "*B L"], state: Int[Tensor, "*B"] | None = None) -> Int[Tensor, "*B"]:
        """Return the states after sequences x (*B, L) from given states (*B), by default the start; -1 is no token."""
        moves, class_of = self.moves.to(x.device), self.class_of.to(x.device)
        now = x.new_zeros(x.shape[:-1]) if state is None else state
        for token in x.unbind(-1):
            now = torch.where(token >= 0, moves[now, class_of[token.clamp(min=0)]], now)
        return now

    def without(self, token: int) -> "Automaton | None":
        """Return the automaton that refuses sequences with a token; None if it accepts no sequence."""
        class_of = self.class_of.clone()
        class_of[token] = self.classes
        return Automaton.of(self.moves, 0, self.accepting, class_of)

    def complement(self) -> "Automaton | None":
        """Return the automaton of all other sequences; None if there are none."""
        return Automaton.of(self.moves, 0, ~self.accepting, self.class_of)

    def product(
        self, other: "Automaton", accepts: Callable[[Bool[Tensor, " N"], Bool[Tensor, " N"]], Bool[Tensor, " N"]]
    ) -> "Automaton | None":
        """Return the automaton whose states are pairs; None if it accepts no sequence.

        Args:
            other: an automaton over the same tokens.
            accepts: tells of N pairs of states whether each is accepting, from bools (N,) of the first and the second.
        """
        width = other.classes + 1
        pair, class_of = torch.unique(self.class_of * width + other.class_of, return_inverse=True)
        mine, its = pair // width, pair % width
        size = len(other.moves)
        known = torch.zeros(1, dtype=torch.int64)  # the pair of the two starts
        fresh, rows = known, []
        found = {0: 0}
        codes = [0]
        while len(fresh):
            after = self.moves[fresh // size][:, mine] * size + other.moves[fresh % size][:, its]
            rows.append(after)
            new = [code for code in torch.unique(after).tolist() if code not in found]
            for code in new:
                found[code] = len(found)
            codes += new
            fresh = torch.tensor(new, dtype=torch.int64)
        code = torch.tensor(codes)
        order = code.argsort()
        moves = order[torch.searchsorted(code[order], torch.cat(rows))]
        return Automaton.of(moves, 0, accepts(self.accepting[code // size], other.accepting[code % size]), class_of)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Automaton):
            return NotImplemented
        pairs = ((self.moves, other.moves), (self.class_of, other.class_of), (self.accepting, other.accepting))
        return all(torch.equal(one, its) for one, its in pairs)

    def __hash__(self) -> int:
        return hash((self.states, self.classes, tuple(self.moves.flatten()[:64].tolist())))

    def __repr__(self) -> str:
        return f"Automaton({self.states} states, {self.tokens} tokens in {self.classes + 1} classes)"


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the distinct rows of an array, and for each row the number of its distinct row."""
    rows = np.ascontiguousarray(rows)
    if not rows.shape[1]:
        return np.zeros(min(1, len(rows)), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.ravel()


def _reached(table: np.ndarray, start: int) -> np.ndarray:
    """Return which states are reached from the start."""
    found = np.zeros(len(table), dtype=bool)
    found[start] = True
    fresh = np.array([start])
    while len(fresh):
        following = np.unique(table[fresh])
        fresh = following[~found[following]]
        found[fresh] = True
    return found


def _distances(table: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Return the least number of tokens from each state to an accepting one; -1 if there is none."""
    state = np.repeat(np.arange(len(table)), table.shape[1])
    order = np.argsort(table.ravel(), kind="stable")
    source, ends = state[order], np.searchsorted(table.ravel()[order], np.arange(len(table) + 1))
    distance = np.where(final, 0, -1)
    fresh, steps = final.nonzero()[0], 0
    while len(fresh):
        steps += 1
        before = np.unique(np.concatenate([source[ends[q] : ends[q + 1]] for q in fresh]))
        fresh = before[distance[before] < 0]
        distance[fresh] = steps
    return distance


def _merged(table: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Return a number for each state, equal for states that accept the same sequences (Moore's refinement)."""
    kind = np.unique(_distances(table, final), return_inverse=True)[1].ravel()  # equal states have equal distances
    count = int(kind.max()) + 1
    while True:
        kind = _distinct(np.column_stack([kind, kind[table]]))[1]
        if int(kind.max()) + 1 == count:
            return kind
        count = int(kind.max()) + 1
