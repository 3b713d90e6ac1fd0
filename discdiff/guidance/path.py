r"""The joint law of tokens at some sites, of which the whole sequence is accepted by an automaton.

    p(x_S)  ~  sum_{x_i, i hidden, not in S} prod_i e_i(x_i) 1(x is accepted)

S are the chosen sites. e_i is the law of a hidden site, or a point mass at the token that site i shows. A draw has two
parts. First the states q_1, ..., q_L of the automaton are drawn from left to right, with messages from behind. Then the
token of each chosen site is drawn from e_i, restricted to the tokens that lead from q_{i-1} to q_i. Tokens of hidden
sites that are not chosen are never drawn, and so are summed out.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import BAD_LOGITS, Choice, Key, Sites
from discdiff.guidance.messages import LIMIT, Edges, Messages, class_sums
from discdiff.kernels import dispatch as kernels

__all__ = ["Path"]


class Path(Choice):
    """Tokens at chosen hidden sites, drawn together such that an automaton accepts the sequence with them.

    Other positions keep their token. Shapes: B rows of L sites, Q states with the dead one.

    Args:
        edges: the edges of the automaton.
        begin: (B,) its states before the first site.
        end: (B, Q) log weights of its states after the last site, -inf for the dead state.
        hidden: the hidden sites and their logits.
        shown: (B, L) the tokens of the other sites.
        where: (B, L) the chosen sites; at a site that is not hidden the value is the token that it shows.
        keep: (B, L) the tokens of positions that are not chosen.

    Raises:
        ValueError: when a value is drawn, for a row in which no accepted sequence has positive probability; for logits
            without mass, a NaN or +inf. The error names the row.
    """

    def __init__(
        self,
        edges: Edges,
        begin: Int[Tensor, " B"],
        end: Float[Tensor, "B Q"],
        hidden: Sites,
        shown: Int[Tensor, "B L"],
        where: Bool[Tensor, "B L"],
        keep: Int[Tensor, "B L"],
    ) -> None:
        super().__init__(keep.shape[0], (keep.shape[1],), keep.device)
        self.edges: Edges = edges
        self.begin: Tensor = begin
        self.end: Tensor = end
        self.hidden: Sites = hidden
        self.where: Tensor = where
        self.shown: Tensor = shown
        self.keep: Tensor = torch.where(where & ~hidden.where, shown, keep)
        self.chosen: Tensor = where & hidden.where

    def __getstate__(self) -> dict[str, object]:
        """Pickle the logits themselves, because the functions that compute them may not be picklable."""
        rows = kernels.Rows.of(self.hidden.rows.dense())
        return {**self.__dict__, "hidden": Sites(self.hidden.where, rows)}

    @property
    def sites(self) -> Sites:
        """The chosen sites and their logits, without the constraint."""
        return self.hidden.narrow(self.chosen)

    # --- draws --------------------------------------------------------------------------------------------------------

    def _draw(self, key: Key) -> Int[Tensor, "B L"]:
        count = int(self.hidden.where.sum())
        before = torch.zeros(count, dtype=torch.int64, device=self.device)
        after, number = torch.zeros_like(before), self.hidden.where.flatten().cumsum(0).view(self.where.shape) - 1
        for rows, sites in self._parts():
            messages = self._messages(rows, sites)
            behind = messages.behind()
            _refuse_dead(behind[:, 0].gather(1, messages.begin[:, None])[:, 0] == -torch.inf, key.ids[rows])
            u, states = kernels.coins(key[rows], self.where.shape[1])[0], [messages.begin]
            for site in range(messages.length):
                states.append(_step(messages, site, states[-1], behind[:, site + 1], u[:, site]))
            path, at = torch.stack(states, 1), number[rows][messages.hidden]
            before[at], after[at] = path[:, :-1][messages.hidden], path[:, 1:][messages.hidden]
        drawn = self._tokens(before, after, key)
        return self.keep.masked_scatter(self.chosen, drawn)

    def _tokens(self, before: Int[Tensor, " N"], after: Int[Tensor, " N"], key: Key) -> Int[Tensor, " n"]:
        """Draw a token at each of the n chosen sites, of those that lead between the states at its two sides.

        ``before`` and ``after`` (N,) are the states at the N hidden sites.
        """
        moves, class_of = self.edges.automaton.moves, self.edges.automaton.class_of

        def led(raw: Tensor, n: Tensor) -> Tensor:
            fits = moves[before[n]] == after[n, None]
            return raw[:, : len(class_of)].masked_fill(~fits[:, class_of], -torch.inf)

        rows = self.hidden.rows
        plain = rows if isinstance(rows, kernels.Rows) else kernels.Rows.computed(rows)
        plain = plain if plain.raw else plain.settled()
        sites = replace(self.hidden, rows=plain.then(led), reading=None).narrow(self.chosen)
        drawn = sites.draw(key)
        replace(self.hidden.watch, ids=key.ids, flags=self.faults).refuse(drawn < 0, BAD_LOGITS, self.chosen)
        return drawn.clamp(min=0)  # a GPU run continues, so its ids must be valid

    # --- probabilities ------------------------------------------------------------------------------------------------

    def _log_prob(self, value: Int[Tensor, "*sample B L"]) -> Float[Tensor, "*sample B"]:
        copies = value.reshape(-1, *self.where.shape)
        fixed = (self.chosen | (copies == self.keep)).all(-1)
        log_p = torch.where(fixed, 0.0, -torch.inf).double()
        inside = (copies >= 0) & (copies < self.edges.automaton.tokens)
        tokens, class_of = copies.where(inside, 0), self.edges.automaton.class_of
        tells = self.chosen & inside
        parts, places = [], []
        for rows, sites in self._parts():
            hidden = sites.where[rows]
            messages, told = self._messages_with(rows, sites, tokens[:, rows][:, hidden].T)
            spread = told.new_full((len(copies), *hidden.shape), torch.nan)
            spread = spread.masked_scatter(hidden.expand(spread.shape), told.T)
            spread = spread.where(tells[:, rows], torch.nan)
            total, found = messages.total(), messages.total((spread, class_of[tokens[:, rows]]))
            possible = (total > -torch.inf) & (inside | ~self.chosen)[:, rows].all(-1)
            parts.append(torch.where(possible, found - total.where(total > -torch.inf, 0.0), -torch.inf))
            places.append(rows)
        if parts:
            index = torch.cat(places)
            log_p = log_p.index_add(1, index, torch.cat(parts, 1).where(fixed[:, index], 0.0))
        return log_p.view(value.shape[:-1])

    def fork(self) -> tuple[Int[Tensor, " M"], Tensor, Float[Tensor, " M"]]:
        """List the values of positive probability; a row in which no accepted sequence has any is left out."""
        still = (~self.chosen.any(-1)).nonzero()[:, 0]
        parents, values, totals = [still], [self.keep[still]], [torch.zeros(len(still), dtype=torch.float64)]
        for rows, sites in self._parts():
            parent, value, total = self._fork(rows, sites)
            parents, values, totals = [*parents, rows[parent]], [*values, value], [*totals, total]
        parent = torch.cat(parents)
        order = parent.argsort(stable=True)
        return parent[order], torch.cat(values)[order], torch.cat(totals)[order]

    def _fork(self, rows: Tensor, sites: Sites) -> tuple[Tensor, Tensor, Tensor]:
        """Extend the tokens of each row site by site by those from which an accepting state is reached."""
        automaton, edges = self.edges.automaton, self.edges
        messages = self._messages(rows, sites)
        behind, hidden, chosen = messages.behind(), messages.hidden, self.chosen[rows]
        logits = torch.full((*hidden.shape, automaton.tokens), -torch.inf, dtype=torch.float64)
        logits = logits.index_put((hidden,), kernels.log_softmax(sites.rows.dense()[:, : automaton.tokens].double()))
        alive = behind[:, 0].gather(1, messages.begin[:, None])[:, 0] > -torch.inf
        parent = alive.nonzero()[:, 0]
        value, total = self.keep[rows][parent], torch.zeros(len(parent), dtype=torch.float64)
        state = torch.nn.functional.one_hot(messages.begin[parent], len(automaton.moves)).double().log()
        after = automaton.moves[:, automaton.class_of]  # (Q, V)
        for site in range(messages.length):
            branches = chosen[parent, site]
            each = state[:, :, None] + behind[parent, site + 1][:, after]  # (M, Q, V)
            log_p = kernels.log_sum_exp(each.mT + logits[parent, site][..., None])
            log_p = (log_p - kernels.log_sum_exp(log_p)[:, None]).where(branches[:, None], -torch.inf)
            log_p[:, 0] = log_p[:, 0].where(branches, 0.0)
            source, token = (log_p > -torch.inf).nonzero(as_tuple=True)
            parent, value, total = parent[source], value[source], total[source] + log_p[source, token]
            value[:, site] = torch.where(branches[source], token, value[:, site])
            known = torch.where(branches[source], automaton.class_of[token], messages.shown[parent, site])
            fixed = branches[source] | ~hidden[parent, site]
            follows = (edges.target == automaton.moves[edges.source][:, known].T).double().log()
            along = torch.where(fixed[:, None], follows, messages.labels(site)[parent][:, edges.label])
            moved = edges.into.log_sum(state[source][:, edges.source] + along)
            state = torch.cat([moved, moved.new_full((len(moved), 1), -torch.inf)], -1)
        return parent, value, total

    # --- parts --------------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[Int[Tensor, " A"], Sites]]:
        """Yield the rows with chosen sites in parts that fit in memory, with the hidden sites of each part."""
        rows = self.chosen.any(-1).nonzero()[:, 0]
        size = max(1, 4 * LIMIT // (self.where.shape[1] * self.edges.numbers))
        for some in rows.split(size):
            if len(some):
                mine = torch.zeros_like(self.where[:, :1]).index_fill(0, some, True)
                yield some, self.hidden.narrow(mine.expand(self.where.shape))

    def _messages(self, rows: Int[Tensor, " A"], sites: Sites) -> Messages:
        return self._messages_with(rows, sites, None)[0]

    def _messages_with(
        self, rows: Int[Tensor, " A"], sites: Sites, at: Int[Tensor, "N K"] | None
    ) -> tuple[Messages, Float[Tensor, "N K"]]:
        """Return the messages of some rows, and the log-probabilities of tokens ``at`` (N, K) at their hidden sites."""
        classes, told = class_sums(self.edges, sites, at)
        shown = self.edges.automaton.class_of[self.shown[rows].where(~sites.where[rows], 0)]
        return Messages(self.edges, self.begin[rows], self.end[rows], classes, sites.where[rows], shown), told


def _refuse_dead(dead: Bool[Tensor, " A"], ids: Int[Tensor, " A"]) -> None:
    """Raise ValueError for the first row that is dead."""
    if bool(dead.any()):
        raise ValueError(
            f"row {int(ids[dead][0])}: no sequence that the constraint accepts has positive probability, given the "
            "tokens that the row shows"
        )


def _step(
    messages: Messages,
    site: int,
    states: Int[Tensor, " A"],
    behind: Float[Tensor, "A Q"],
    u: Float[Tensor, " A"],
) -> Int[Tensor, " A"]:
    """Return the states after a site: drawn by inversion of uniforms u (A,) if it is hidden, else by its token."""
    edges = messages.edges
    known = edges.automaton.moves[states, messages.shown[:, site]]
    if not messages.some[site]:
        return known
    leaving = edges.leaving[states]
    edge = leaving.clamp(min=0)
    along = messages.labels(site).gather(1, edges.label[edge]) + behind.gather(1, edges.target[edge])
    along = along.masked_fill(leaving < 0, -torch.inf)
    top = along.amax(-1, keepdim=True)
    running = (along - top.masked_fill(top == -torch.inf, 0.0)).exp().cumsum(-1)
    total = running[:, -1:]
    # below the total, so that rounding never picks an edge of probability 0
    level = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = (running <= level).sum(-1, keepdim=True).clamp(max=leaving.shape[1] - 1)
    drawn = edges.target[edge.gather(1, place)[:, 0]]
    return torch.where(messages.hidden[:, site], drawn, known)
