r"""Enumerate every path through a program; equal paths are merged, and independent sites are kept apart.

The program runs on a batch of *prefixes of choices*. At the first choice that the prefixes do not cover, each prefix is
extended by every possible value, and the program is restarted. When it runs through, the weight of each prefix is added
to its final state. There are two kinds of choices:

* a choice of a whole row (a branch, a subset of sites) multiplies the rows;
* a choice of independent sites (``SiteWise``) does not multiply them. A row then stands for a product of laws: it has a
  list of weighted paths *for each site*. The program sees the k-th path of every site in the k-th copy of the row.

A row of the matrix is a sum over prefixes of Kronecker products over sites, so its cost is states x sites x paths of a
site instead of states x (paths of a site)^sites.

Why this is exact. The values of site-wise choices are ``Sited`` tensors, a subclass that torch dispatches on. While the
program combines only numbers of one site, the law of the next choice at a site is a function of that site's own path.
It is read from any copy of the row that holds this path. When numbers of several sites are combined (a count, a
denoiser call at a new state, an order), the combined tensor is *settled*: paths are grouped by its values, and every
combination of the sites' values becomes a row. Within a row the sites are independent again, because they were
independent before and each is conditioned on its own value. Paths with the same value stay together, which merges
them. A function without a rule settles its arguments, so sites are never treated as independent by mistake.

For at most ``JOINT`` prefixes joint enumeration is cheaper: site-wise choices multiply the rows too, and no tensor is
sited.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pyro.poutine.messenger import Messenger
from torch import Tensor

from discdiff.choices import AT_ONCE, BAD_LOGITS, Choice, SiteWise
from discdiff.theory.sited import Sited
from discdiff.theory.world import state_index

__all__ = ["JOINT", "Branching", "Paths", "TooManyJoint", "TooManyPaths"]

JOINT = 1 << 14


class TooManyPaths(ValueError):
    """Raised for a program with more paths than the limit."""


class TooManyJoint(BaseException):
    """Raised for more than ``JOINT`` joint prefixes, to restart the enumeration with the sites kept apart."""


class Branching(BaseException):
    """Raised to restart the program after its prefixes were extended.

    It is not an ``Exception``, so that an ``except Exception`` in the program does not catch it.
    """


class Paths(Messenger):
    """Pyro messenger that holds prefixes of choices and gives the program its choices from them.

    Args:
        weight: (begin,) the weight of each initial state.
        length: L.
        most: the maximal number of rows.
        joint: whether site-wise choices multiply the rows; TooManyJoint is raised beyond ``JOINT`` of them.

    Attributes:
        start: (R,) the index of the initial state of each row.
        weight: (R,) the initial weight times the probability of the settled choices.
        share: (R, K, L) the probability of the k-th path of each site, given the settled choices; 0 if the site has
            fewer paths.
        grid: (R K, L) the origin of each site of the batch, row * L + site; the copies of a row are adjacent.

    Raises:
        TooManyPaths, TooManyJoint, ValueError: while the program runs, as described in ``settle`` and ``add_ends``.
    """

    def __init__(self, weight: Float[Tensor, " begin"], length: int, most: int, joint: bool = False) -> None:
        super().__init__()
        self.joint = joint
        self.start: Tensor = torch.arange(len(weight))
        self.weight: Tensor = weight
        self.share: Tensor = torch.ones(len(weight), 1, length, dtype=torch.float64)
        self.most = most
        self._values: dict[str, Tensor] = {}  # (R, K, *event)
        self._sited: set[str] = set()
        self._lay("the start")

    @property
    def copies(self) -> int:
        """Return K, the number of copies of a row."""
        return self.share.shape[1]

    @property
    def rows(self) -> int:
        """Return the number of rows that the program runs on, R K."""
        return len(self.grid)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, choice = msg["name"], msg["fn"]
        if not isinstance(choice, Choice) or choice.key is None:
            raise ValueError(
                f"site {name}: a program's choices are made by choose(name, Choice, state, at), got {choice}"
            )
        ids = choice.key.ids
        if name not in self._values:
            if not self.joint and isinstance(choice, SiteWise) and choice.event_shape == self.share.shape[2:]:
                self._widen(name, choice, ids)
            else:
                self._fork(name, choice, ids)
            raise Branching
        value = self._values[name].flatten(0, 1)[ids]
        msg["value"] = Sited.of(value, self.grid[ids], self) if name in self._sited else value
        msg["done"], msg["stop"] = True, True

    # --- extending prefixes -------------------------------------------------------------------------------------------

    def _widen(self, name: str, choice: SiteWise, ids: Int[Tensor, " B"]) -> None:
        """Extend each site's paths by the values that the choice can take there."""
        log_p, value = (self._at_sites(x, ids, name) for x in choice.table())
        AT_ONCE.refuse(log_p.isnan().any(-1), f"{type(choice).__name__} has a NaN probability; {BAD_LOGITS}")
        (count, copies, length), kinds = self.share.shape, log_p.shape[-1]
        p = torch.zeros(self.rows, length, kinds, dtype=torch.float64)
        p[..., 0] = 1  # rows in another branch of a mix
        p[ids] = log_p.double().exp()
        values = torch.zeros(self.rows, length, kinds, dtype=value.dtype)
        values[ids] = value
        share, values = (
            x.view(count, copies, length, kinds).transpose(2, 3).reshape(count, -1, length)
            for x in (self.share.view(-1, length)[..., None] * p, values)
        )
        path = self._pack(share)
        self._keep(torch.arange(count), path // kinds)
        self._values[name] = values.gather(1, path)
        self._sited.add(name)
        self._lay(name)

    def _fork(self, name: str, choice: Choice, ids: Int[Tensor, " B"]) -> None:
        """Replace each row that makes the choice by one row for each possible value."""
        parent, value, log_p = (self.settle(x) if isinstance(x, Sited) else x for x in choice.fork())
        self._check_children(ids[parent], value, log_p, name)
        first = ids[parent] % self.copies == 0
        elsewhere = torch.ones(len(self.start), dtype=torch.bool)
        elsewhere[ids // self.copies] = False
        kept = elsewhere.nonzero()[:, 0]
        source = torch.cat([kept, ids[parent][first] // self.copies])
        self.start, self.weight = self.start[source], self.weight[source]
        self.weight[len(kept) :] *= log_p[first].double().exp()
        self.share = self.share[source]
        self._keep(source, None)
        value = torch.cat([value.new_zeros(len(kept), *value.shape[1:]), value[first]])
        self._values[name] = value[:, None].expand(-1, self.copies, *value.shape[1:])
        self._lay(name)

    def settle(self, values: Sited) -> Tensor:
        """Return the values as a plain tensor if they are equal on all paths of each site.

        Otherwise divide the rows.

        Raises:
            Branching: if the rows were divided.
            TooManyPaths, TooManyJoint: for more rows than are allowed.
        """
        bare, origin = values.bare, values.origin.flatten()
        if not bare.numel():
            return bare
        flat, length = bare.reshape(len(origin), -1), self.share.shape[2]
        site = origin // (length * self.copies) * length + origin % length  # site of a row, for any copy
        turn = _occurrence(origin)
        group = site + turn * (len(self.start) * length)
        other = flat[_first(group)]
        differs = ((flat != other) & ((flat == flat) | (other == other))).any(-1)
        if not bool(differs.any()):
            return bare
        mixed = torch.zeros(int(group.max()) + 1, dtype=torch.bool)
        mixed[group[differs]] = True
        chosen = mixed[group] & (turn == turn[differs].min())
        kind = torch.zeros(self.grid.numel(), dtype=torch.int64)  # 0: no value
        kind[origin[chosen]] = 1 + flat[chosen].unique(dim=0, return_inverse=True)[1]
        self._divide(kind.view(self.share.shape))
        raise Branching

    def _divide(self, kind: Int[Tensor, "R K L"]) -> None:
        """Divide each row into one row for each possible combination of its sites' values.

        ``kind`` (R, K, L) has a number for each path of a site, equal for paths with equal values.
        """
        kind = (kind[:, :, None] == kind[:, None]).double().argmax(2)  # a kind is named by its first path
        total = torch.zeros_like(self.share).scatter_add(1, kind, self.share)
        source, chosen = torch.arange(len(kind)), kind.new_empty(len(kind), 0)
        for site in range(kind.shape[2]):
            row, one = (total[source, :, site] > 0).nonzero(as_tuple=True)
            self._check(len(row), "where sites meet")
            source, chosen = source[row], torch.cat([chosen[row], one[:, None]], 1)
        p = total[source].gather(1, chosen[:, None])
        self.start = self.start[source]
        self.weight = self.weight[source] * p[:, 0].prod(-1)
        share = torch.where(kind[source] == chosen[:, None], self.share[source] / p, 0.0)
        self._keep(source, self._pack(share))
        self._lay("where sites meet")

    def _pack(self, share: Float[Tensor, "R J L"]) -> Int[Tensor, "R K L"]:
        """Move the possible paths of each site to the front; shorter lists are padded with the site's first path."""
        alive = share > 0
        place, most = alive.cumsum(1) - 1, int(alive.sum(1).max()) if len(share) else 1
        path = alive.double().argmax(1, keepdim=True).expand(-1, max(most, 1) + 1, -1).contiguous()
        number = torch.arange(share.shape[1])[:, None].expand(share.shape)
        path = path.scatter(1, place.where(alive, max(most, 1)), number)[:, :-1]
        used = torch.arange(path.shape[1])[:, None] < alive.sum(1, keepdim=True)
        self.share = torch.where(used, share.gather(1, path), 0.0)
        return path

    def _keep(self, source: Int[Tensor, " R"], path: Int[Tensor, "R K L"] | None) -> None:
        """Select the recorded values of the given rows and paths."""
        for name, old in self._values.items():
            value = old[source]
            if path is not None and name in self._sited:
                value = value.gather(1, path)
            elif path is not None:
                value = value[:, :1].expand(-1, path.shape[1], *value.shape[2:])
            self._values[name] = value

    def _lay(self, name: str) -> None:
        count, copies, length = self.share.shape
        self._check(count * copies, name)
        self.grid: Tensor = torch.arange(count * copies * length).view(count * copies, length)

    def _check(self, rows: int, name: str) -> None:
        if self.joint and rows > JOINT:
            raise TooManyJoint
        if rows > self.most:
            raise TooManyPaths(f"site {name}: more than {self.most} paths; use a smaller vocabulary or length")

    # --- checks -------------------------------------------------------------------------------------------------------

    def _at_sites(self, x: Tensor, ids: Int[Tensor, " B"], name: str) -> Tensor:
        """Return a table over sites as plain numbers; settle it first if an entry depends on another site's path."""
        if isinstance(x, Sited):
            return x.bare if torch.equal(x.origin, self.grid[ids]) else self.settle(x)
        self._check_copies(x, ids, name)
        return x

    def _check_copies(self, x: Tensor, ids: Int[Tensor, " B"], name: str) -> None:
        """Raise ValueError unless a plain tensor is equal in all copies of a row, which differ in site-wise choices."""
        if self.copies > 1:
            other = x[_first(ids // self.copies)]
            self._refuse((x != other) & ((x == x) | (other == other)), name)

    def _check_children(self, child: Int[Tensor, " M"], value: Tensor, log_p: Tensor, name: str) -> None:
        if self.copies > 1:
            order = child.argsort(stable=True)
            child, value, log_p = child[order], value[order], log_p[order]
            rank = torch.arange(len(child)) - _first(child)
            pair = child // self.copies * (int(rank.max()) + 1) + rank
            self._refuse(torch.bincount(pair)[pair] != self.copies, name)
            self._refuse(value != value[_first(pair)], name)
            self._refuse((log_p - log_p[_first(pair)]).abs() > 1e-9, name)

    def _refuse(self, wrong: Bool[Tensor, "*any"], name: str) -> None:
        if bool(wrong.any()):
            raise ValueError(f"site {name}: its law depends on other rows of the batch, or on the ids of rows")

    # --- results ------------------------------------------------------------------------------------------------------

    def add_ends(self, tokens: Int[Tensor, "B L"], matrix: Float[Tensor, "M N"], row: Int[Tensor, " begin"]) -> None:
        """Add each row's law of the final state to the matrix: weight times Kronecker product of its sites' laws.

        Shapes: tokens (B, L), the matrix (M, N).

        Raises:
            ValueError: for a choice whose law depends on other rows of the batch.
        """
        count, copies, length = self.share.shape
        states = round(matrix.shape[1] ** (1 / length))
        if self.joint:
            matrix.index_put_((row[self.start], state_index(tokens, states)), self.weight, accumulate=True)
            return
        tokens = self._at_sites(tokens, torch.arange(self.rows), "the state it returns").view(count, copies, length)
        law = torch.zeros(count, states, length, dtype=torch.float64).scatter_add(1, tokens, self.share)
        size = max(1, (1 << 22) // matrix.shape[1])
        for part in range(0, count, size):
            here = slice(part, part + size)
            joint = self.weight[here, None]
            for site in range(length):
                joint = (joint[:, :, None] * law[here, None, :, site]).flatten(1)
            matrix.index_add_(0, row[self.start[here]], joint)


def _first(group: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return for each entry the first index at which its number occurs."""
    if not len(group):
        return group
    least = torch.full((int(group.max()) + 1,), len(group))
    return least.scatter_reduce(0, group, torch.arange(len(group)), "amin")[group]


def _occurrence(origin: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Count for each entry how often its number occurs before it."""
    if bool((origin[1:] > origin[:-1]).all()):
        return torch.zeros_like(origin)
    order = origin.argsort(stable=True)
    rank = torch.arange(len(origin)) - _first(origin[order])
    return torch.empty_like(origin).scatter(0, order, rank)
