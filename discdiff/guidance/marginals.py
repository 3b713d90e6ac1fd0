r"""Laws of single sites under a constraint, from which operators compute confidences.

    O'_i(v)  ~  O_i(v) sum_q f_{i-1}(q) b_i(moves(q, v))

f and b are the automaton's messages from the sites before and behind site i. At a hidden site this is the marginal of
the joint law of all hidden sites, given that the sequence is accepted. At a site that shows its token it is the law of
that site given the other ones. To draw several sites from these laws would be no constraint.

Behind a block, in ``Blockwise``, there are sites without a law. A state of the automaton then has weight 1 if an
accepting state can be reached from it by the tokens of these sites, and else 0.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Sites
from discdiff.guidance.messages import LIMIT, Edges, Messages, class_sums
from discdiff.kernels import dispatch as kernels
from discdiff.operator import GuideAt
from discdiff.prediction import Prediction, RowChange, Tilt, View

__all__ = ["Marginals", "ends", "hidden_sites"]


@dataclass(frozen=True, eq=False)
class Marginals(RowChange):
    """Tilt of single sites by the messages of an automaton.

    Other changes of the prediction count, whether they come before or after this one. In a row in which no accepted
    sequence has positive probability nothing is changed.

    Attributes:
        edges: the edges of the automaton, with Q states, the dead one too.
        begin: (B,) its states before the first site of each row.
        end: (B, Q) log weights of its states after the last site.
    """

    edges: Edges
    begin: Int[Tensor, " B"]
    end: Float[Tensor, "B Q"]

    def __call__(self, rows: kernels.Source, view: View) -> kernels.Source:
        shape = view.prediction.x.shape
        number = torch.full(shape, -1, device=view.where.device)
        number[view.place] = torch.arange(len(view.place[0]), device=view.where.device)
        weights = cache(lambda: self._weights(view))
        class_of = self.edges.automaton.class_of
        tilt = Tilt(lambda row, position: weights()[number[row, position]][:, class_of])
        return tilt(rows, view)

    def select(self, index: Int[Tensor, " R"]) -> "Marginals":
        return Marginals(self.edges, self.begin[index], self.end[index])

    def untruncated(self) -> "Marginals":
        return self

    def _weights(self, view: View) -> Float[Tensor, "N C"]:
        """Return the log weights of the classes of tokens at the N sites of a view, -inf for the last class."""
        said = view.prediction.without(Marginals)
        row, position = view.place
        found = self.end.new_full((len(row), self.edges.automaton.classes + 1), -torch.inf)
        size = max(1, 2 * LIMIT // (said.x.shape[1] * self.edges.numbers))
        for rows in row.unique().split(size):
            mine = torch.zeros(len(said.x), dtype=torch.bool, device=row.device).index_fill(0, rows, True)
            sites = hidden_sites(said, mine)
            hidden = sites.where[rows]
            tokens = said.process.column(said.x[rows]).where(~hidden, 0)
            shown = self.edges.automaton.class_of[tokens]
            classes, _ = class_sums(self.edges, sites)
            messages = Messages(self.edges, self.begin[rows], self.end[rows], classes, hidden, shown)
            behind, before = messages.behind(), messages.before()
            dead = behind[:, 0].gather(1, messages.begin[:, None])[:, 0] == -torch.inf
            asked = mine[row].nonzero()[:, 0]
            for some in asked.split(max(1, LIMIT // len(self.edges.source))):
                at, site = torch.searchsorted(rows, row[some]), position[some]
                along = before[at, site][:, self.edges.source] + behind[at, site + 1][:, self.edges.target]
                found[some, :-1] = self.edges.holding.log_sum(self.edges.alike.log_sum(along))
                found[some[dead[at]]] = 0.0
        return found


def hidden_sites(said: Prediction, rows: Bool[Tensor, " B"]) -> Sites:
    """Return the hidden sites of some rows (B,), with the rows of the denoiser there."""
    hidden = ~said.process.revealed(said.x, said.alpha) & rows[:, None]
    view = said[hidden]
    return view.loo if said.process.masks else view.denoiser


def ends(edges: Edges, at: GuideAt, block: int) -> Float[Tensor, "R Q"]:
    """Return the log weights (R, Q) of the automaton's states after the last of ``block`` sites of each row.

    They are 0 for states from which the sites behind the block can reach an accepting state, else -inf. Without blocks
    these are the accepting states.
    """
    given, accepting = at.given, edges.automaton.accepting
    if given is None:
        reach = accepting.expand(len(at.rows), -1)
    else:
        after, sites = at.offset + block, torch.arange(given.shape[1], device=given.device)
        reach = _reaching(edges, given.shape[1])[given.shape[1] - after]
        later = (given >= 0) & (sites >= after[:, None])
        some = later.any(1)
        if bool(some.any()):
            reach = reach.clone()
            reach[some] = _completing(edges, given[some].where(later[some], -1), after[some])
    return torch.where(reach, 0.0, -torch.inf).double()


@lru_cache(maxsize=64)
def _reaching(edges: Edges, most: int) -> Bool[Tensor, "K Q"]:
    """Return from which states exactly k more tokens can reach an accepting state, for k = 0 to ``most``."""
    reach, following = [edges.automaton.accepting], _following(edges)
    for _ in range(most):
        reach.append(reach[-1][following].any(-1))
    return torch.stack(reach)


def _following(edges: Edges) -> Int[Tensor, "Q D"]:
    """Return the states that follow each state; the dead state fills the rows."""
    return torch.where(edges.leaving >= 0, edges.target[edges.leaving.clamp(min=0)], edges.automaton.states)


def _completing(edges: Edges, given: Int[Tensor, "R W"], after: Int[Tensor, " R"]) -> Bool[Tensor, "R Q"]:
    """Return from which states the sites from ``after`` (R,) on, some with given tokens, reach an accepting state."""
    automaton, following = edges.automaton, _following(edges)
    reach = automaton.accepting.expand(len(given), -1)
    for site in range(given.shape[1] - 1, int(after.min()) - 1, -1):
        token = given[:, site]
        known = reach.gather(1, automaton.moves.T[automaton.class_of[token.clamp(min=0)]])
        open_ = reach[:, following].any(-1)
        before = torch.where(token[:, None] >= 0, known, open_)
        reach = torch.where(site >= after[:, None], before, reach)
    return reach
