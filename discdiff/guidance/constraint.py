r"""Hard constraints: every sequence that is sampled is accepted by a finite automaton.

    p(x_S | z)  ~  sum over the other hidden sites of  prod_i D_i(x_i) 1(x is accepted)

D_i(v) = p(x0_i = v | z) is the denoiser, a point mass at a site that shows its token. The tokens of all sites S that an
operator draws in a step come from this joint law. So after every step the tokens that are shown can be completed to an
accepted sequence, and the last step leaves an accepted sequence. A tilt of the laws of single sites has no such
property: two sites that are drawn in one step may each be right and be wrong together.

If p0 is a product over sites, the samples follow p0 restricted to the accepted sequences. If sites depend on each
other, the law differs from it with any number of steps, because what is left to other hidden sites is weighed by a
product of laws. ``Particles`` corrects this. With one hidden site there is no other one, so ``Gibbs(sites=1)`` at time
0 preserves p0 restricted to the accepted sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import array, check_tokens, shown, token_ids, whole
from discdiff.denoiser import Guide
from discdiff.guidance.automata import Automaton
from discdiff.guidance.json_shapes import ANY_CHARACTER, json_pattern
from discdiff.guidance.marginals import Marginals, ends, hidden_sites
from discdiff.guidance.messages import Edges, edges_of
from discdiff.guidance.path import Path
from discdiff.guidance.regex import tables_of
from discdiff.operator import GuideAt, State
from discdiff.prediction import Prediction
from discdiff.process import Process

__all__ = ["Constraint"]


class Constraint(Guide):
    """Guide under which every sample is accepted by a deterministic automaton: ``model.guided(Constraint(...))``.

    It is for absorbing processes, such as ``Masked``, and for operators that draw all tokens of a step together, such
    as ``Ancestral``, ``SplitLeap``, ``Unmask``, ``ReMDM``, ``P2``, ``Gibbs``, and ``ARPC`` with the score "random" or
    "forward". Other operators refuse it. Confidences, by which ``Unmask`` and others order sites, are those of the
    marginals of single sites under the joint law. Guides that follow change D, as guides before it do. A truncation to
    few tokens may leave no accepted sequence.

    ``a & b`` accepts what both accept, and a model that is guided by both makes such sequences. ``a | b`` accepts what
    one of them accepts, and ``~a`` what ``a`` does not accept. Constraints that accept the same sequences are equal.

    Shapes: Q states, V tokens.

    Args:
        transitions: (Q, V) the next state for each state and token.
        start: the state before the first token.
        accept: (Q,) bools, the states in which a sequence may end.

    Raises:
        TypeError, ValueError: for wrong shapes, or a state out of range; if no sequence is accepted; in sampling, for a
            row in which no accepted sequence has positive probability, and for an operator that draws sites one by one.
    """

    def __init__(
        self,
        transitions: Int[Tensor, "Q V"] | Sequence[Sequence[int]],
        start: SupportsIndex,
        accept: Bool[Tensor, " Q"] | Sequence[bool],
    ) -> None:
        moves = token_ids(transitions, "Constraint: transitions", "states").long()
        if moves.ndim != 2 or not moves.numel():
            raise ValueError(f"Constraint: transitions must be (Q, V) states, got shape {tuple(moves.shape)}")
        size = len(moves)
        if not bool(((moves >= 0) & (moves < size)).all()):
            raise ValueError(f"Constraint: transitions must hold states in 0..{size - 1}, got {shown(moves.tolist())}")
        final = array(accept, "Constraint: accept")
        if final.dtype != torch.bool or final.shape != (size,):
            raise ValueError(f"Constraint: accept must be ({size},) bools, got {final.dtype} {tuple(final.shape)}")
        first = whole(start, "Constraint: start", 0, size - 1)
        self.automaton: Automaton = _some(Automaton.of(moves.cpu(), first, final.cpu()), "Constraint")

    @classmethod
    def _of(cls, automaton: Automaton | None, where: str) -> "Constraint":
        made = cls.__new__(cls)
        made.automaton = _some(automaton, where)
        return made

    @classmethod
    def regex(cls, pattern: str, vocabulary: Sequence[str | None], *, pad: SupportsIndex | None = None) -> "Constraint":
        r"""Make the constraint that the text of the whole sequence matches a regular expression.

        The text is that of all tokens, one after another. The syntax is Python's, with \w, \d and \s for ASCII alone.
        Look-ahead, look-behind, references and anchors are refused. ``~`` and ``&`` express what look-ahead would:
        ``~Constraint.regex("(?s:.*)N[^P][ST](?s:.*)", vocabulary)`` accepts the sequences without a motif.

        Args:
            pattern: the regular expression.
            vocabulary: the V texts of the tokens, by id; a text may have several characters, or none. None stands for
                a special token, which is never accepted.
            pad: the id of a token that may fill the rest of the sequence after a match; its text is not used. With it
                a text may be shorter than the sequence.

        Raises:
            ImportError: if the package ``interegular`` is not installed.
            TypeError, ValueError: for an expression that is wrong or not supported, a vocabulary of something else than
                texts, or if no sequence is accepted.
        """
        return cls._of(Automaton.of(*tables_of(pattern, vocabulary, pad, "Constraint.regex")), "Constraint.regex")

    @classmethod
    def json(
        cls,
        shape: object,
        vocabulary: Sequence[str | None],
        *,
        depth: SupportsIndex = 1,
        characters: str = ANY_CHARACTER,
        pad: SupportsIndex | None = None,
    ) -> "Constraint":
        """Make the constraint that the text of the whole sequence is JSON of some shape, without white space.

        A shape is one of ``str``, ``int``, ``float``, ``bool`` and None; a dict of shapes by key, for an object with
        these keys in this order; a list of one shape, for an array of any length; a tuple of shapes, for one of them;
        a text or a number, for itself; or ``object``, for any JSON.

        Args:
            shape: the shape.
            vocabulary, pad: as in ``regex``.
            depth: how many arrays and objects may lie within each other in an ``object``; the automaton grows
                exponentially with it.
            characters: a regular expression of the characters of texts, by default all that JSON permits.

        Raises:
            ImportError, TypeError, ValueError: as ``regex``; for another shape.
        """
        pattern = json_pattern(shape, whole(depth, "Constraint.json: depth", 0), characters)
        return cls._of(Automaton.of(*tables_of(pattern, vocabulary, pad, "Constraint.json")), "Constraint.json")

    def accepts(self, x: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """Return which sequences x (B, L) are accepted, (B,).

        Raises:
            ValueError: if ``x`` is no tensor of token ids.
        """
        check_tokens(x, "Constraint.accepts: x")
        if bool(((x < 0) | (x >= self.automaton.tokens)).any()):
            raise ValueError(f"Constraint.accepts: x must hold ids in 0..{self.automaton.tokens - 1}")
        return self.automaton.accepting.to(x.device)[self.automaton.walk(x)]

    # --- the guide ----------------------------------------------------------------------------------------------------

    def check(self, process: Process) -> None:
        if not process.absorbing:
            raise ValueError(
                f"{self}: takes an absorbing process, such as Masked, whose sites are hidden or show their token; got "
                f"{process}"
            )
        if self.automaton.tokens != process.vocab_size:
            raise ValueError(f"{self}: is for {self.automaton.tokens} tokens, but {process} has {process.vocab_size}")
        self._edges(process, torch.device("cpu"))

    def _edges(self, process: Process, device: torch.device) -> Edges:
        return edges_of(_shown(self.automaton, process.mask_id, str(self)), device)

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        if isinstance(prediction.law, _Joint):
            both = _both(prediction.law.constraint, self)
            return both(prediction.without(Marginals), state, at)
        edges = self._edges(at.process, prediction.x.device)
        begin = edges.automaton.walk(at.prefix)
        end = ends(edges, at, prediction.x.shape[1])
        tilted = prediction.changed(Marginals(edges, begin, end))
        return tilted.joint(_Joint(self, edges, begin, end))

    # --- algebra ------------------------------------------------------------------------------------------------------

    def __and__(self, other: "Constraint") -> "Constraint":
        return self._with(other, torch.logical_and, "&")

    def __or__(self, other: "Constraint") -> "Constraint":
        return self._with(other, torch.logical_or, "|")

    def __invert__(self) -> "Constraint":
        return Constraint._of(self.automaton.complement(), "~Constraint")

    def _with(self, other: object, accepts: Callable[[Tensor, Tensor], Tensor], sign: str) -> "Constraint":
        if not isinstance(other, Constraint):
            raise TypeError(f"Constraint {sign} takes a Constraint, got {shown(other)}")
        if self.automaton.tokens != other.automaton.tokens:
            raise ValueError(
                f"Constraint {sign}: takes constraints of the same tokens, got {self.automaton.tokens} and "
                f"{other.automaton.tokens}"
            )
        return Constraint._of(self.automaton.product(other.automaton, accepts), f"Constraint {sign}")

    def __eq__(self, other: object) -> bool:
        return self.automaton == other.automaton if isinstance(other, Constraint) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.automaton)

    def __repr__(self) -> str:
        return f"Constraint({self.automaton.states} states, {self.automaton.tokens} tokens)"


def _some(automaton: Automaton | None, where: str) -> Automaton:
    """Return the automaton if it accepts a sequence with a token."""
    if automaton is None or not automaton.classes:
        raise ValueError(f"{where}: no sequence is accepted")
    return automaton


@lru_cache(maxsize=16)
def _shown(automaton: Automaton, mask_id: int | None, what: str) -> Automaton:
    """Return the automaton of a process: a mask that is one of its columns is no token."""
    if mask_id is None or mask_id >= automaton.tokens:
        return automaton
    return _some(automaton.without(mask_id), f"{what}: without the mask, token {mask_id}")


@lru_cache(maxsize=16)
def _both(one: Constraint, other: Constraint) -> Constraint:
    return one & other


@dataclass(frozen=True, eq=False)
class _Joint:
    """The joint law of tokens, for ``Prediction.joint``: a ``Path`` through the automaton of a constraint.

    Attributes:
        constraint: the constraint.
        edges: its edges.
        begin: (B,) the states before the first site of each row.
        end: (B, Q) the log weights of the states after the last site.
    """

    constraint: Constraint
    edges: Edges
    begin: Int[Tensor, " B"]
    end: Float[Tensor, "B Q"]

    def __call__(self, said: Prediction, row: Tensor, where: Tensor, keep: Tensor) -> Path:
        said = said.without(Marginals)
        sites = hidden_sites(said, where.any(-1))
        return Path(self.edges, self.begin[row], self.end[row], sites, said.process.column(said.x), where, keep)
