r"""Log messages of a finite automaton over rows of independent sites.

    from behind   b_L(q) = end(q),        b_{i-1}(q) = log sum_v e_i(v) exp b_i(moves(q, v))
    from before   f_0 = log 1(q = begin), f_i(r) = log sum_{q, v: moves(q, v) = r} e_i(v) exp f_{i-1}(q)

e_i is the law of a hidden site i, or a point mass at the token that site i shows. Three sums replace the sum over
tokens. Tokens with equal moves form a class, and e_i is summed over each class once. The classes that lead from a state
q to a state r are the label of the edge (q, r), and the sum over a label is shared by all edges with this label. A
message is then a sum over edges. For Q states and V tokens this takes O(Q V) operations a site at most, and there is no
table of Q^2 V numbers.

All sums are of logs and are shifted by their largest term. So no weight underflows, however long the sequence is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import BAD_LOGITS, Sites
from discdiff.guidance.automata import Automaton
from discdiff.kernels import dispatch as kernels

__all__ = ["LIMIT", "Edges", "Groups", "Messages", "class_sums", "edges_of"]

LIMIT = 1 << 20  # numbers in a temporary
_FACTOR = 4  # groups whose sizes differ by less are summed together, padded to the largest of them


@dataclass(frozen=True, eq=False)
class Groups:
    """Sets of columns, over which logs are summed.

    Attributes:
        count: G, the number of sets; some may be empty.
        members: for some sets of similar size, their columns (g, K), -1 where a set is smaller.
        place: (G,) the place of each set in the order of ``members``; empty sets have the place after the last.
    """

    count: int
    members: tuple[Int[Tensor, "_ _"], ...]
    place: Int[Tensor, " G"]

    @classmethod
    def of(cls, group: Int[Tensor, " M"], column: Int[Tensor, " M"], count: int) -> "Groups":
        """Make ``count`` sets from M pairs of a set (M,) and a column (M,) in it."""
        order = group.argsort(stable=True)
        column, size = column[order], torch.bincount(group, minlength=count)
        start = size.cumsum(0) - size
        kept, members = [], []
        largest = int(size.max()) if count else 0
        top = 1
        while top <= largest * _FACTOR:
            inside = ((size > top // _FACTOR) & (size <= top)).nonzero()[:, 0]
            if len(inside):
                width = int(size[inside].max())
                for some in inside.split(max(1, LIMIT // width)):
                    index = start[some, None] + torch.arange(width)
                    filled = torch.arange(width) < size[some, None]
                    members.append(torch.where(filled, column[index.clamp(max=len(column) - 1)], -1))
                    kept.append(some)
            top *= _FACTOR
        place = torch.full((count,), sum(map(len, kept)))
        if kept:
            place[torch.cat(kept)] = torch.arange(len(torch.cat(kept)))
        return cls(count, tuple(members), place)

    def to(self, device: torch.device) -> "Groups":
        """Return the sets on a device."""
        return Groups(self.count, tuple(one.to(device) for one in self.members), self.place.to(device))

    def log_sum(self, logs: Float[Tensor, "n M"]) -> Float[Tensor, "n G"]:
        """Return the log of the sum over each set of the numbers with these logs (n, M), in chunks: (n, G)."""
        nothing = logs.new_full((len(logs), 1), -torch.inf)
        padded = torch.cat([logs, nothing], -1)
        parts = [_chunked(padded, columns, kernels.log_sum_exp) for columns in self.members]
        return self._placed(parts, nothing)

    def log_sum_near(self, logs: Float[Tensor, "n M"]) -> Float[Tensor, "n G"]:
        """Return ``log_sum`` (n, G), in less time for rows (n, M) whose logs lie within 690 of the largest one.

        Each number is exponentiated once, and not once for each set that holds it.
        """
        if logs.requires_grad:
            return self.log_sum(logs)
        top = logs.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = (logs - top).exp()
        far = ((weights < 1e-300) & (logs > -torch.inf)).any(-1).nonzero()[:, 0]
        padded = torch.nn.functional.pad(weights, (0, 1))
        parts = [_chunked(padded, columns, lambda x: x.sum(-1)) for columns in self.members]
        found = self._placed(parts, weights.new_zeros(len(weights), 1)).log() + top
        return found.index_copy(0, far, self.log_sum(logs[far])) if len(far) else found

    def _placed(self, parts: list[Tensor], empty: Tensor) -> Float[Tensor, "n G"]:
        if len(parts) == 1 and len(self.members[0]) == self.count:
            return parts[0]
        return torch.cat([*parts, empty], -1)[:, self.place]


def _chunked(padded: Tensor, columns: Tensor, total: Callable[[Tensor], Tensor]) -> Float[Tensor, "n g"]:
    """Return the total over each of g sets of columns; the last column of ``padded`` fills the sets."""
    if columns.shape[1] == 1:
        return padded[:, columns[:, 0]]
    chunks = [total(some[:, columns]) for some in padded.split(max(1, LIMIT // columns.numel()))]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@dataclass(frozen=True, eq=False)
class Edges:
    """An automaton as edges between its states, with the classes of tokens that move along each edge.

    Shapes: Q states with the dead one, E edges, S labels, D edges at most from one state.

    Attributes:
        automaton: the automaton, on the device of the edges.
        tokens: the tokens of each class.
        labels: the classes of each label.
        source, target, label: (E,) the states at the ends of each edge, and its label.
        leaving: (Q, D) the edges from each state, -1 where a state has fewer.
        out, into: the edges from each state, and to each state.
        alike, holding: the edges of each label, and the labels that hold each class.
    """

    automaton: Automaton
    tokens: Groups
    labels: Groups
    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    label: Int[Tensor, " E"]
    leaving: Int[Tensor, "Q D"]
    out: Groups
    into: Groups
    alike: Groups
    holding: Groups

    @property
    def numbers(self) -> int:
        """The numbers that messages hold for each site of a row."""
        return self.automaton.states + 1 + self.labels.count + self.automaton.classes


@lru_cache(maxsize=16)
def edges_of(automaton: Automaton, device: torch.device) -> Edges:
    """Return the edges of an automaton on a device; those of the last few automata are kept."""
    states, classes = automaton.states, automaton.classes
    known: dict[bytes, int] = {}
    sets: list[np.ndarray] = []
    edges: list[tuple[int, int, int]] = []
    for state, row in enumerate(automaton.moves[:states, :classes].numpy()):
        order = np.argsort(row, kind="stable")
        targets, begin = np.unique(row[order], return_index=True)
        for target, some in zip(targets.tolist(), np.split(order, begin)[1:], strict=True):
            if target != states:
                number = known.setdefault(some.tobytes(), len(known))
                if number == len(sets):
                    sets.append(some)
                edges.append((state, target, number))
    source, target, label = torch.tensor(edges, dtype=torch.int64).view(-1, 3).unbind(1)
    sizes = torch.tensor([len(some) for some in sets], dtype=torch.int64)
    within = torch.repeat_interleave(torch.arange(len(sets)), sizes)
    held = torch.from_numpy(np.concatenate(sets))
    token = (automaton.class_of < classes).nonzero()[:, 0]
    every = torch.arange(len(source))
    degree = torch.bincount(source, minlength=states + 1)
    leaving = torch.full((states + 1, max(1, int(degree.max()))), -1)
    leaving[source, every - (degree.cumsum(0) - degree)[source]] = every
    groups = {
        "tokens": Groups.of(automaton.class_of[token], token, classes),
        "labels": Groups.of(within, held, len(sets)),
        "out": Groups.of(source, every, states),
        "into": Groups.of(target, every, states),
        "alike": Groups.of(label, every, len(sets)),
        "holding": Groups.of(held, within, classes),
    }
    moved = Automaton(*(part.to(device) for part in (automaton.moves, automaton.class_of, automaton.accepting)))
    return Edges(
        moved,
        source=source.to(device),
        target=target.to(device),
        label=label.to(device),
        leaving=leaving.to(device),
        **{name: one.to(device) for name, one in groups.items()},
    )


def class_sums(
    edges: Edges, sites: Sites, at: Int[Tensor, "N K"] | None = None
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N K"]]:
    """Read the rows of N sites and return log-probabilities of the M classes (N, M) and of the tokens ``at`` (N, K).

    Both are shifted by one number of the site, and float64. The rows are read in chunks.

    Raises:
        ValueError: for a row without mass, or with a NaN or +inf; the error names the site.
    """
    device = sites.where.device
    at = torch.zeros(len(sites.rows), 0, dtype=torch.int64, device=device) if at is None else at
    classes = [torch.zeros(0, edges.automaton.classes, dtype=torch.float64, device=device)]
    told = [torch.zeros(0, at.shape[1], dtype=torch.float64, device=device)]
    size = max(1, LIMIT // sites.rows.width)
    for start in range(0, len(sites.rows), size):
        rows = sites.rows.dense(slice(start, start + size))
        top = rows.detach().amax(-1)
        sites.watch.refuse(~top.isfinite(), BAD_LOGITS, sites.where, start)
        found = edges.tokens.log_sum_near(rows.double())
        # by the likeliest class that is accepted at all, which may be far less likely than the likeliest token
        shift = found.detach().amax(-1, keepdim=True)
        shift = shift.masked_fill(shift == -torch.inf, 0.0)
        classes.append(found - shift)
        told.append(rows.gather(-1, at[start : start + size]).double() - shift)
    return torch.cat(classes), torch.cat(told)


class Messages:
    """Messages of an automaton over rows of sites that are hidden or show a token.

    Shapes: A rows of L sites, N of them hidden; Q states with the dead one, M classes of tokens that some state
    accepts, S labels; T = L + 1.

    Args:
        edges: the edges of the automaton.
        begin: (A,) the states before the first site.
        end: (A, Q) the log weights of the states after the last site.
        classes: (N, M) the log-probabilities of the classes at the hidden sites, in row-major order.
        hidden: (A, L) bools.
        shown: (A, L) the classes of the tokens of the other sites.
    """

    def __init__(
        self,
        edges: Edges,
        begin: Int[Tensor, " A"],
        end: Float[Tensor, "A Q"],
        classes: Float[Tensor, "N M"],
        hidden: Bool[Tensor, "A L"],
        shown: Int[Tensor, "A L"],
    ) -> None:
        self.edges: Edges = edges
        self.begin: Tensor = begin
        self.end: Tensor = end
        self.classes: Tensor = classes
        self.hidden: Tensor = hidden
        self.shown: Tensor = shown
        self.number: Tensor = (hidden.flatten().cumsum(0) - 1).view(hidden.shape)
        self.some: list[bool] = hidden.any(0).tolist()
        self.every: list[bool] = hidden.all(0).tolist()
        self._block: tuple[int, Tensor] | None = None

    @property
    def length(self) -> int:
        """L."""
        return self.hidden.shape[1]

    def labels(self, site: int) -> Float[Tensor, "A S"]:
        """Return the log-probabilities of the labels at a site, (A, S); -inf where it is not hidden."""
        rows, count = len(self.hidden), self.edges.labels.count
        size = max(1, LIMIT // max(1, rows * count))
        block = site // size
        if self._block is None or self._block[0] != block:
            here = self.hidden[:, block * size : (block + 1) * size]
            number = self.number[:, block * size : (block + 1) * size][here]
            found = self.edges.labels.log_sum_near(self.classes[number])
            table = found.new_full((*here.shape, count), -torch.inf)
            self._block = block, found.view(table.shape) if bool(here.all()) else table.index_put((here,), found)
        return self._block[1][:, site % size]

    def behind(self) -> Float[Tensor, "A T Q"]:
        """Return the messages from behind, (A, T, Q): entry i is about the sites from i on."""
        message = self.end
        found = [message]
        for site in range(self.length - 1, -1, -1):
            message = self._back(site, message)
            found.append(message)
        return torch.stack(found[::-1], 1)

    def _back(self, site: int, message: Tensor) -> Tensor:
        edges, before = self.edges, message
        if self.some[site]:
            along = self.labels(site)[:, edges.label] + message[:, edges.target]
            dead = message.new_full((len(message), 1), -torch.inf)
            before = torch.cat([edges.out.log_sum(along), dead], -1)
        if self.every[site]:
            return before
        known = message.gather(1, edges.automaton.moves.T[self.shown[:, site]])
        return torch.where(self.hidden[:, site, None], before, known)

    def before(self) -> Float[Tensor, "A T Q"]:
        """Return the messages from before, (A, T, Q): entry i is about the sites before i."""
        return torch.stack(list(self._forward(self.begin, None)), 1)

    def total(self, told: tuple[Float[Tensor, "K A L"], Int[Tensor, "K A L"]] | None = None) -> Float[Tensor, "K A"]:
        """Return the log weight (K, A) of the accepted sequences.

        Args:
            told: K sets of tokens at some of the hidden sites: their log-probabilities (K, A, L), NaN at sites where no
                token is told, and their classes (K, A, L). By default all sequences are weighed, and K is 1.
        """
        copies = 1 if told is None else len(told[0])
        rows = None if told is None else (told[0].flatten(0, 1), told[1].flatten(0, 1))
        *_, last = self._forward(self.begin.repeat(copies), rows, copies)
        return kernels.log_sum_exp(last + self.end.repeat(copies, 1)).view(copies, len(self.begin))

    def _forward(self, begin: Tensor, told: tuple[Tensor, Tensor] | None, copies: int = 1) -> Iterator[Tensor]:
        """Yield the messages before each site and after the last; ``begin`` and ``told`` are of copies of the rows."""
        edges, size = self.edges, len(self.edges.automaton.moves)
        start = torch.nn.functional.one_hot(begin, size).bool()
        message = torch.where(start, 0.0, -torch.inf).to(self.end)
        yield message
        for site in range(self.length):
            known, weight = self.shown[:, site].repeat(copies), torch.zeros_like(message[:, 0])
            open_ = self.hidden[:, site].repeat(copies)
            if told is not None:
                says = ~told[0][:, site].isnan()
                weight = torch.where(says, told[0][:, site].nan_to_num(neginf=-torch.inf), weight)
                known, open_ = torch.where(says, told[1][:, site], known), open_ & ~says
            follows = edges.target == edges.automaton.moves[edges.source][:, known].T
            along = torch.where(follows, weight[:, None], -torch.inf)
            if self.some[site]:
                along = torch.where(open_[:, None], self.labels(site)[:, edges.label].repeat(copies, 1), along)
            after = edges.into.log_sum(message[:, edges.source] + along)
            message = torch.cat([after, after.new_full((len(after), 1), -torch.inf)], -1)
            yield message
