"""The joint draw of tokens under an automaton against brute force: laws, draws, gradients, splits, long sequences."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor

import discdiff as dd
from discdiff.choices import Key, Sites, Tokens
from discdiff.guidance import messages as messages_of
from discdiff.guidance import path as paths
from discdiff.guidance.automata import Automaton
from discdiff.guidance.messages import Groups, edges_of
from discdiff.guidance.path import Path

V, L, B = 3, 4, 3
NEVER = -torch.inf
CPU = torch.device("cpu")
X = torch.tensor(list(itertools.product(range(V), repeat=L)))


@dataclass
class Case:
    """A random automaton with random rows: hidden, shown and chosen sites, impossible tokens, weights of both ends."""

    automaton: Automaton
    logits: Tensor
    hidden: Tensor
    where: Tensor
    shown: Tensor
    begin: Tensor
    end: Tensor

    @property
    def keep(self) -> Tensor:
        return torch.where(self.hidden, V, self.shown)

    def path(self, logits: Tensor | None = None) -> Path:
        rows = self.logits if logits is None else logits
        sites = Sites.computed(self.hidden, lambda n: rows[n], V)
        return Path(edges_of(self.automaton, CPU), self.begin, self.end, sites, self.shown, self.where, self.keep)

    def laws(self) -> Tensor:
        """The log-laws of single sites (B, L, V), a point mass at a site that shows its token."""
        log_e = torch.nn.functional.one_hot(self.shown, V).double().log()
        return log_e.masked_scatter(self.hidden[..., None].expand(log_e.shape), self.logits.log_softmax(-1))

    def brute(self, row: int) -> dict[tuple[int, ...], float]:
        """The law of the values of a row, by a sum over all sequences; empty in a dead row."""
        log_e = self.laws()[row]
        ends = self.automaton.walk(X, self.begin[row].expand(len(X)))
        weight = (log_e[torch.arange(L), X].sum(-1) + self.end[row, ends]).exp()
        found: dict[tuple[int, ...], float] = {}
        for x, w in zip(torch.where(self.where[row], X, self.keep[row]).tolist(), weight.tolist(), strict=True):
            if w > 0:
                found[tuple(x)] = found.get(tuple(x), 0.0) + w
        total = sum(found.values())
        return {x: w / total for x, w in found.items()}

    def draws(self, row: int) -> bool:
        """Whether a row has a chosen hidden site."""
        return bool((self.hidden & self.where)[row].any())


def cases(count: int, seed: int = 0) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    found: list[Case] = []
    while len(found) < count:
        size = int(torch.randint(1, 6, (1,), generator=generator))
        moves = torch.randint(size, (size, V), generator=generator)
        automaton = Automaton.of(moves, 0, torch.rand(size, generator=generator) < 0.5)
        if automaton is None or not automaton.classes:
            continue
        hidden = torch.rand(B, L, generator=generator) < 0.7
        logits = torch.randn(int(hidden.sum()), V, generator=generator).double() * 2
        logits[torch.rand(logits.shape, generator=generator) < 0.2] = NEVER
        logits[(logits == NEVER).all(-1), 0] = 0.0
        states = automaton.states + 1
        end = torch.randn(B, states, generator=generator).double()
        end[torch.rand(end.shape, generator=generator) < 0.3] = NEVER
        end[:, -1] = NEVER
        where = torch.rand(B, L, generator=generator) < 0.6
        shown = torch.randint(V, (B, L), generator=generator)
        begin = torch.randint(states, (B,), generator=generator)
        found.append(Case(automaton, logits, hidden, where, shown, begin, end))
    return found


def forked(path: Path, row: int) -> dict[tuple[int, ...], float]:
    parent, value, log_p = path.fork()
    mine = parent == row
    return {tuple(x): p for x, p in zip(value[mine].tolist(), log_p[mine].exp().tolist(), strict=True)}


def check(case: Case, path: Path) -> tuple[int, int]:
    """Compare fork and log_prob with brute force; return the numbers of rows alive and dead."""
    alive = dead = 0
    values = torch.where(case.where, X[:, None], case.keep)
    log_p = path.log_prob(values)
    for row in range(B):
        brute = case.brute(row) if case.draws(row) else {tuple(path.keep[row].tolist()): 1.0}
        assert forked(path, row) == pytest.approx(brute, abs=1e-13)
        for value, found in zip(values[:, row].tolist(), log_p[:, row].exp().tolist(), strict=True):
            assert found == pytest.approx(brute.get(tuple(value), 0.0), abs=1e-13)
        alive, dead = alive + bool(brute), dead + (not brute)
    return alive, dead


def test_every_law_is_that_of_brute_force() -> None:
    counts = [check(case, case.path()) for case in cases(40)]
    assert min(sum(alive for alive, _ in counts), sum(dead for _, dead in counts)) > 20


def test_a_path_without_its_end_or_its_other_sites_is_caught() -> None:
    """Planted: the weights of the last states are left out; sites that are not chosen are taken for impossible."""
    wrong = 0
    for case in cases(40):
        path = case.path()
        path.end = torch.where(path.end > NEVER, 0.0, NEVER).double()
        wrong += any(
            case.draws(row) and forked(path, row) != pytest.approx(case.brute(row), abs=1e-6) for row in range(B)
        )
    assert wrong > 10
    wrong = 0
    for case in cases(40):
        path = case.path()
        path.hidden = path.sites
        path.shown = torch.zeros_like(path.shown)
        wrong += any(
            case.draws(row) and forked(path, row) != pytest.approx(case.brute(row), abs=1e-6) for row in range(B)
        )
    assert wrong > 10


def test_values_outside_the_vocabulary_or_of_other_positions_are_impossible() -> None:
    case = next(one for one in cases(20) if one.draws(0) and one.brute(0) and not bool(one.where[0].all()))
    path = case.path()
    value = path.fork()[1][path.fork()[0] == 0][0]
    assert float(path.log_prob(value.expand(B, -1))[0]) > NEVER
    chosen, other = int((case.where & case.hidden)[0].nonzero()[0]), int((~case.where[0]).nonzero()[0])
    for site, token in ((chosen, -1), (chosen, V), (chosen, 99), (other, int(value[other]) + 1)):
        bad = value.clone()
        bad[site] = token
        assert float(path.log_prob(bad.expand(B, -1))[0]) == NEVER


@pytest.mark.parametrize("limit", [1, 40])
def test_chunks_change_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cases(20, seed=3)
    key = Key(5, torch.arange(B), 7, name="token")
    alive = [all(not one.draws(row) or bool(one.brute(row)) for row in range(B)) for one in made]
    right = [(one.path().fork(), one.path()._log_prob(X[::5, None].expand(-1, B, -1))) for one in made]
    drawn = [one.path()._draw(key) if lives else None for one, lives in zip(made, alive, strict=True)]
    assert 3 < sum(alive) < len(made)
    monkeypatch.setattr(messages_of, "LIMIT", limit)
    monkeypatch.setattr(paths, "LIMIT", limit)
    messages_of.edges_of.cache_clear()
    for case, ((parent, value, log_p), total), tokens in zip(made, right, drawn, strict=True):
        found = case.path().fork()
        assert torch.equal(found[0], parent)
        assert torch.equal(found[1], value)
        torch.testing.assert_close(found[2], log_p, atol=1e-13, rtol=0)
        torch.testing.assert_close(case.path()._log_prob(X[::5, None].expand(-1, B, -1)), total, atol=1e-12, rtol=0)
        if tokens is not None:
            assert torch.equal(case.path()._draw(key), tokens)
    messages_of.edges_of.cache_clear()


def many(case: Case, row: int, copies: int) -> Path:
    """The law of one row, for many rows."""
    one = [x[row].expand(copies, *x[row].shape) for x in (case.hidden, case.where, case.shown, case.end)]
    rows = case.logits[case.hidden[:row].sum() : case.hidden[: row + 1].sum()].repeat(copies, 1)
    hidden, where, shown, end = (x.contiguous() for x in one)
    sites = Sites.computed(hidden, lambda n: rows[n], V)
    keep = torch.where(hidden, V, shown)
    return Path(edges_of(case.automaton, CPU), case.begin[row].expand(copies), end, sites, shown, where, keep)


def pvalue(count: Tensor, p: Tensor) -> float:
    return float(stats.chisquare(count, p / p.sum() * count.sum()).pvalue)


def test_draws_follow_the_law(failure_rate: float) -> None:
    copies, tried = 20_000, 0
    for case in cases(40, seed=1):
        law = case.brute(0)
        if not case.draws(0) or len(law) < 4 or min(law.values()) * copies < 5:
            continue
        tried += 1
        path = many(case, 0, copies)
        drawn = path._draw(Key(11, torch.arange(copies), 3, name="token"))
        seen = dict.fromkeys(law, 0)
        for value in map(tuple, drawn.tolist()):
            seen[value] += 1  # a value that is impossible is a KeyError
        count, p = (torch.tensor(list(x.values())).double() for x in (seen, law))
        assert pvalue(count, p) > failure_rate
        assert pvalue(count, p.flip(0) + 0.05) < failure_rate, "planted: another law"
    assert tried >= 3


def test_draws_do_not_depend_on_the_split_of_the_batch() -> None:
    case = next(one for one in cases(20, seed=1) if one.draws(0) and len(one.brute(0)) > 3)
    ids = torch.arange(40) * 7 + 3
    whole = many(case, 0, 40)._draw(Key(2, ids, 1, name="token"))
    for size in (1, 13):
        parts = [many(case, 0, len(some))._draw(Key(2, some, 1, name="token")) for some in ids.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(many(case, 0, 40)._draw(Key(2, ids + 1, 1, name="token")), whole)


def test_a_dead_row_is_named_and_only_where_something_is_drawn() -> None:
    case = next(one for one in cases(60) if one.draws(1) and not one.brute(1) and (not one.draws(0) or one.brute(0)))
    with pytest.raises(ValueError, match=r"row 21: no sequence that the constraint accepts has positive probability"):
        case.path()._draw(Key(0, torch.arange(20, 23), 0, name="token"))
    case.where[1] = False
    if not case.draws(2) or case.brute(2):
        case.path()._draw(Key(0, torch.arange(20, 23), 0, name="token"))
    assert case.path().log_prob(case.keep)[1] == 0


def test_bad_logits_are_refused_where_they_are_read() -> None:
    case = next(one for one in cases(20) if one.draws(0))
    site = int(case.hidden[0].nonzero()[0])
    for value in (torch.nan, torch.inf, NEVER):
        logits = case.logits.clone()
        logits[0] = value
        with pytest.raises(ValueError, match=f"row 0, position {site}: the denoiser gave logits without mass"):
            case.path(logits).fork()


def test_gradients_are_those_of_finite_differences() -> None:
    tried = 0
    for case in cases(12, seed=2):
        path = case.path()
        parent, value, _ = path.fork()
        if {0, 1, 2} - set(parent.tolist()):
            continue
        tried += 1
        chosen = torch.stack([value[parent == row][0] for row in range(B)])
        logits = case.logits.clone().requires_grad_()
        total = case.path(logits)._log_prob(chosen).sum()
        (grad,) = torch.autograd.grad(total, logits)
        assert not bool(grad.isnan().any())
        for index in (case.logits > NEVER).nonzero().tolist():
            moved = []
            for step in (1e-6, -1e-6):
                other = case.logits.clone()
                other[tuple(index)] += step
                moved.append(float(case.path(other)._log_prob(chosen).sum()))
            assert float(grad[tuple(index)]) == pytest.approx((moved[0] - moved[1]) / 2e-6, abs=1e-7)
    assert tried >= 2


@pytest.mark.usefixtures("as_user")
def test_long_sequences_do_not_underflow() -> None:
    """With 1,500 of 2,048 sites of a token of probability 1e-4, each site has it with probability 1,500 / 2,048."""
    length, count = 2048, 1500
    moves = torch.stack([torch.arange(count + 2), (torch.arange(count + 2) + 1).clamp(max=count + 1)], 1)
    exact = Automaton.of(moves, 0, torch.arange(count + 2) == count)
    assert exact is not None
    hidden = torch.ones(1, length, dtype=torch.bool)
    rows = torch.tensor([1 - 1e-4, 1e-4]).double().log()
    where = torch.zeros_like(hidden)
    where[0, [0, 1000]] = True
    end = torch.where(exact.accepting, 0.0, NEVER).double()[None]
    sites = Sites.computed(hidden, lambda n: rows.expand(len(n), -1), 2)
    nothing = torch.zeros(1, length, dtype=torch.int64)
    path = Path(edges_of(exact, CPU), torch.zeros(1, dtype=torch.int64), end, sites, nothing, where, nothing + 2)
    value = nothing + 2
    value[0, [0, 1000]] = torch.tensor([1, 0])
    right = count / length * (length - count) / (length - 1)
    assert float(path.log_prob(value).exp()) == pytest.approx(right, rel=1e-9)
    log_total = math.lgamma(length + 1) - math.lgamma(count + 1) - math.lgamma(length - count + 1) - count * 9.21
    assert math.exp(log_total) == 0, "planted: probabilities in place of their logs"


def test_sums_over_sets_keep_far_entries() -> None:
    """``log_sum_near`` finds the entries that its one exponential of a row would lose."""
    groups = Groups.of(torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 1, 2, 3, 1]), 4)
    logs = torch.tensor([[0.0, -1.0, -900.0, -901.0], [0.0, NEVER, NEVER, NEVER], [NEVER] * 4]).double()
    right = torch.stack([logs[:, :2].logsumexp(-1), logs[:, 2:].logsumexp(-1), logs[:, 0] + NEVER, logs[:, 1]], 1)
    torch.testing.assert_close(groups.log_sum(logs), right)
    torch.testing.assert_close(groups.log_sum_near(logs), right)
    assert bool((groups.log_sum(logs)[0] > NEVER)[[0, 1, 3]].all())
    assert float((logs[0] - logs[0].amax()).exp()[2:].sum()) == 0, "planted: one exponential alone"


def test_without_a_constraint_a_path_is_the_law_of_single_sites() -> None:
    generator = torch.Generator().manual_seed(0)
    free = Automaton.of(torch.zeros(1, V, dtype=torch.int64), 0, torch.tensor([True]))
    assert free is not None
    hidden, where = (torch.rand(B, L, generator=generator) < 0.6 for _ in range(2))
    logits, keep = torch.randn(int(hidden.sum()), V, generator=generator), torch.full((B, L), V)
    sites = Sites.computed(hidden, lambda n: logits[n], V)
    end = torch.tensor([0.0, NEVER]).double().expand(B, -1)
    shown = torch.zeros_like(keep)
    path = Path(edges_of(free, CPU), torch.zeros(B, dtype=torch.int64), end, sites, shown, where & hidden, keep)
    alone = Tokens(sites.narrow(where & hidden), keep)
    value = torch.where(where & hidden, X[::7, None], keep)
    torch.testing.assert_close(path.log_prob(value), alone.log_prob(value), check_dtype=False, atol=1e-6, rtol=0)
    assert isinstance(path, dd.choices.Choice)
