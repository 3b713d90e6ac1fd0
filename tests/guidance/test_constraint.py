"""Hard constraints: no mass on rejected sequences under any operator that takes them, and the right law where it is."""

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from constrained import (
    ALIKE,
    ALLOWED,
    MASKED,
    PARITY,
    REFUSED,
    RIGHT,
    SAME,
    WORLD,
    L,
    V,
    X,
    by_hand,
    network,
    parity,
    product,
    restricted,
    takes,
)
from guides import Plain, table
from joint_laws import Alike
from places import ROOT
from problems import named
from scipy import stats

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states, state_index

pytestmark = pytest.mark.usefixtures("as_user")  # many small enumerations


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that computes the tables of the documentation."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))
    import constraints

    return constraints


# --- the figures of steering.md --------------------------------------------------------------------------------------


def test_a_tilt_of_single_sites_is_no_constraint_and_the_joint_draw_is_one(page: ModuleType) -> None:
    found = page.rejected((1, 2, 4, 16))
    assert [float(f"{p:.2f}") for p in found["site by site"]] == [0.43, 0.25, 0.14, 0.04]
    assert found["jointly"] == [0.0] * 4
    assert min(found["no guide"]) > 0.5


@pytest.mark.slow
def test_the_mass_that_a_tilt_leaves_falls_with_the_length_of_the_steps(page: ModuleType) -> None:
    found = page.rejected()
    assert [float(f"{p:.2f}") for p in found["site by site"][:4]] == [0.43, 0.25, 0.14, 0.04]
    assert found["site by site"][-1] == pytest.approx(0.009, rel=0.05)
    assert found["site by site"][-1] / found["site by site"][-2] == pytest.approx(1 / 4, rel=0.05)
    assert found["jointly"] == [0.0] * 5


def test_the_law_is_the_restricted_one_of_products_alone(page: ModuleType) -> None:
    found = page.distances()
    assert max(found["independent sites, jointly"]) < 1e-12
    assert found["correlated sites, jointly"][-1] == pytest.approx(0.18, rel=0.05)
    first, middle, last = found["correlated sites, jointly"]
    assert first > middle > last > 0.17, "more steps do not bring it to the restricted law"
    assert min(found["independent sites, site by site"]) > 0.01, "planted: a tilt of single sites"


# --- operators -------------------------------------------------------------------------------------------------------


def test_the_operators_are_of_both_kinds(page: ModuleType) -> None:
    assert len(ALLOWED) > 25
    assert len(REFUSED) > 15
    found = page.operators()
    assert set(found.values()) == {"0", "refused"}
    for name, mass in found.items():
        assert (mass == "0") == takes(S.ARPC("nll") if name == "ARPC" else getattr(S, name)())


@pytest.mark.parametrize("operator", ALLOWED, ids=named)
def test_no_mass_is_on_rejected_sequences(operator: dd.Operator) -> None:
    model = network()
    sampler = dd.Sampler(MASKED, model.guided(PARITY), operator, steps=2)
    assert bool(by_hand(sampler.sample(400, L, seed=2).tokens).all())
    if operator.enumerable:
        law = T.law(sampler)
        assert float(law[~RIGHT].sum()) == 0
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
        alone = T.law(dd.Sampler(MASKED, model, operator, steps=2))
        assert float(alone[~RIGHT].sum()) > 0.1, "planted: no constraint"


@pytest.mark.parametrize("operator", REFUSED, ids=named)
def test_what_draws_sites_one_by_one_is_refused(operator: dd.Operator) -> None:
    sampler = dd.Sampler(MASKED, network().guided(PARITY), operator, steps=2)
    with pytest.raises(ValueError, match=r"a guide gave a joint law of the clean tokens.*Accepted are operators that"):
        sampler.sample(2, L, seed=0)
    if operator.enumerable:
        with pytest.raises(ValueError, match="a guide gave a joint law of the clean tokens"):
            T.law(sampler)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ALLOWED, ids=named)
def test_no_sequence_of_a_hundred_thousand_is_rejected(operator: dd.Operator) -> None:
    sampler = dd.Sampler(MASKED, network().guided(PARITY), operator, steps=2)
    for first in range(0, 100_000, 20_000):
        assert bool(by_hand(sampler.sample(20_000, L, seed=0, first_row=first).tokens).all())


@pytest.mark.parametrize("operator", ALLOWED, ids=named)
def test_tokens_do_not_depend_on_the_split(operator: dd.Operator) -> None:
    sampler = dd.Sampler(MASKED, network().guided(PARITY), operator, grid=[1.0, 0.5, 0.2])
    whole = sampler.sample(13, L, seed=3).tokens
    for size in (1, 6):
        parts = [sampler.sample(min(size, 13 - row), L, seed=3, first_row=row).tokens for row in range(0, 13, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "operator",
    [
        S.Ancestral(), S.SplitLeap(), S.AnyOrder("margin"), S.KLStable(), S.Unmask(), S.Unmask("max_prob"),
        S.Unmask("left_to_right"), S.Threshold(), S.ReMDM(0.3), S.Ancestral() >> S.Gibbs(2),
        S.Ancestral() >> S.RePaint(),
    ],
    ids=named,
)  # fmt: skip
def test_samples_of_a_product_follow_the_restricted_law(operator: dd.Operator) -> None:
    world = product()
    law = T.law(dd.Sampler(MASKED, world.denoiser(MASKED).guided(PARITY), operator, steps=2))
    torch.testing.assert_close(law, restricted(world.p0), atol=1e-12, rtol=0)


def test_exact_times_of_a_product_follow_the_restricted_law(failure_rate: float) -> None:
    """``FirstHitting`` cannot be enumerated."""
    world = product()
    sampler = dd.Sampler(MASKED, world.denoiser(MASKED).guided(PARITY), S.FirstHitting(), steps=1)
    count = torch.bincount(state_index(sampler.sample(20_000, L, seed=0).tokens, V), minlength=V**L)[RIGHT].double()
    for law, right in ((restricted(world.p0)[RIGHT], True), (restricted(WORLD.p0)[RIGHT], False)):
        assert (stats.chisquare(count, law / law.sum() * count.sum()).pvalue > failure_rate) == right


def test_one_site_given_the_others_is_exact() -> None:
    """At time 0 ``Gibbs`` preserves the restricted law of any world; without the constraint it does not."""
    goal = restricted(WORLD.p0)
    model = WORLD.denoiser(MASKED)
    states = torch.zeros(4**L, dtype=torch.float64)
    states[state_index(X, 4)] = goal
    kernel = T.kernel(S.Gibbs(), MASKED, model.guided(PARITY), t=0.0)
    torch.testing.assert_close(states @ kernel, states, atol=1e-12, rtol=0)
    assert float((states @ T.kernel(S.Gibbs(), MASKED, model, t=0.0) - states).abs().max()) > 1e-3
    two = T.kernel(S.Gibbs(2), MASKED, model.guided(PARITY), t=0.0)
    assert float((states @ two - states).abs().max()) > 1e-4, "two sites at once are not exact"


# --- the two layers --------------------------------------------------------------------------------------------------


def joint_of(prediction: dd.Prediction) -> Callable[[int], dict[tuple[int, ...], float]]:
    """The law of all hidden sites of each row."""
    hidden = prediction.x == 3
    parent, value, log_p = prediction.tokens(hidden, prediction.x).fork()
    return lambda row: {
        tuple(x): p for x, p in zip(value[parent == row].tolist(), log_p[parent == row].exp().tolist(), strict=True)
    }


def test_confidences_are_those_of_the_joint_law() -> None:
    states = all_states(4, L)
    for changes in ([], [Plain(table(3, 3))]):
        model = network().guided(PARITY)
        for change in changes:
            model = model.guided(change)  # a tilt that follows counts at the other sites too
        said = model(states, 0.5)
        rows, joint = said.untruncated, joint_of(said)
        for row, z in enumerate(states):
            if not bool((z == 3).any()) or not joint(row):
                continue
            single = rows.select(torch.tensor([row]))
            for site in (z == 3).nonzero()[:, 0].tolist():
                where = torch.zeros(1, L, dtype=torch.bool)
                where[0, site] = True
                found = single[where].loo.dense().softmax(-1)[0]
                right = [sum(p for x, p in joint(row).items() if x[site] == v) for v in range(V)]
                assert found.tolist() == pytest.approx(right, abs=1e-12)
        alone = network()(states, 0.5).denoiser[-1].exp()
        assert float((alone - rows.denoiser[-1].exp()).abs().max()) > 0.05, "planted: no constraint"


def test_a_revealed_site_is_read_given_the_other_ones() -> None:
    z = torch.tensor([[1, 3, 0], [2, 1, 1], [0, 0, 3]])
    said = network().guided(PARITY)(z, 0.5)
    where = torch.tensor([[True, False, False], [False, True, False], [False, True, False]])
    found = said.untruncated[where].loo.dense().softmax(-1)
    plain = network()(z, 0.5).loo.exp()
    for row, site in where.nonzero().tolist():
        right = []
        for v in range(V):
            fits = torch.ones(len(X), dtype=torch.bool)
            weight = torch.ones(len(X), dtype=torch.float64)
            for other in range(L):
                if other != site and int(z[row, other]) < 3:
                    fits &= X[:, other] == z[row, other]
                elif other != site:
                    weight = weight * plain[row, other, X[:, other]]
            fits &= (X[:, site] == v) & RIGHT
            right.append(float(plain[row, site, v] * weight[fits].sum()))
        assert found.tolist()[where.nonzero().tolist().index([row, site])] == pytest.approx(
            [p / sum(right) for p in right], abs=1e-12
        )


def test_a_site_that_the_constraint_decides_is_certain() -> None:
    """After (1, ?) an odd number of ones must follow: with one mask left it is revealed with certainty."""
    certain = dd.Constraint(torch.tensor([[1, 2, 2], [2, 0, 2], [2, 2, 2]]), 0, torch.tensor([False, True, False]))
    said = network().guided(certain)(torch.tensor([[3, 3, 3]]), 0.9)  # (0, 1, 0) is the one sequence that is accepted
    assert said.untruncated.denoiser.argmax(-1).tolist() == [[0, 1, 0]]
    assert float(said.untruncated.denoiser.exp().amax(-1).min()) == 1
    out = dd.Sampler(MASKED, network().guided(certain), S.Threshold(0.99), steps=3).sample(4, L, seed=0)
    assert out.tokens.tolist() == [[0, 1, 0]] * 4
    assert out.nfe == 1


def test_guides_before_and_after_change_the_same_law() -> None:
    model, tilt, cut = network(), Plain(table(3, 3)), dd.Truncation(temperature=0.7)
    for guides in ([tilt, PARITY], [tilt, cut, PARITY]):
        laws = []
        for order in itertools.permutations(guides):
            if cut in order and order.index(cut) < order.index(tilt):
                continue  # a tilt of what is cut off is another law
            one = model
            for guide in order:
                one = one.guided(guide)
            for operator in (S.Ancestral(), S.Unmask("max_prob"), S.P2()):
                laws.append(T.law(dd.Sampler(MASKED, one, operator, steps=2)))
        for number, law in enumerate(laws):
            torch.testing.assert_close(law, laws[number % 3], atol=1e-12, rtol=0)
            assert float(law[~RIGHT].sum()) == 0


# --- algebra ---------------------------------------------------------------------------------------------------------


def test_two_constraints_are_their_intersection() -> None:
    assert torch.equal(ALIKE.accepts(X), SAME)
    assert torch.equal((PARITY & ALIKE).accepts(X), RIGHT & SAME)
    assert torch.equal((PARITY | ALIKE).accepts(X), RIGHT | SAME)
    assert torch.equal((~PARITY).accepts(X), ~RIGHT)
    assert ~(PARITY & ALIKE) == ~PARITY | ~ALIKE != ~PARITY
    assert PARITY & ALIKE == ALIKE & PARITY
    assert hash(PARITY & ALIKE) == hash(ALIKE & PARITY)
    model = network()
    for operator in (S.Ancestral(), S.Unmask("max_prob"), S.P2()):
        both = T.law(dd.Sampler(MASKED, model.guided(PARITY & ALIKE), operator, steps=2))
        for one, other in ((PARITY, ALIKE), (ALIKE, PARITY)):
            twice = model.guided(one).guided(Plain(torch.zeros(3, 3).double())).guided(other)
            found = T.law(dd.Sampler(MASKED, twice, operator, steps=2))
            torch.testing.assert_close(found, both, atol=1e-12, rtol=0)
        assert float(both[~(RIGHT & SAME)].sum()) == 0
        last = T.law(dd.Sampler(MASKED, model.guided(ALIKE), operator, steps=2))
        assert float(last[~RIGHT].sum()) > 0.01, "planted: the last constraint alone"
    tokens = (
        dd.Sampler(MASKED, model.guided(PARITY).guided(ALIKE), S.SplitLeap(), steps=3).sample(300, L, seed=0).tokens
    )
    assert bool((PARITY & ALIKE).accepts(tokens).all())


def test_random_automata_combine_as_sets_do() -> None:
    generator = torch.Generator().manual_seed(0)
    every = all_states(V, 4)
    made = []
    while len(made) < 12:
        size = int(torch.randint(2, 6, (1,), generator=generator))
        moves = torch.randint(size, (size, V), generator=generator)
        accept = torch.rand(size, generator=generator) < 0.5
        state = torch.zeros(len(every), dtype=torch.int64)
        for token in every.unbind(1):
            state = moves[state, token]
        if bool(accept[state].any()):
            made.append((dd.Constraint(moves, 0, accept), accept[state]))
    for (one, a), (other, b) in itertools.pairwise(made):
        assert torch.equal(one.accepts(every), a)
        for name, right in (("__and__", a & b), ("__or__", a | b)):
            if bool(right.any()):
                assert torch.equal(getattr(one, name)(other).accepts(every), right)


def test_another_joint_law_is_refused() -> None:
    for guides in ((Alike(), PARITY), (PARITY, Alike())):
        model = network().guided(guides[0]).guided(guides[1])
        with pytest.raises(ValueError, match="another guide gave a joint law of the clean tokens already"):
            dd.Sampler(MASKED, model, S.Ancestral(), steps=1).sample(1, L, seed=0)
    other = network()
    for pair in ((other.guided(PARITY), other), (other, other.guided(PARITY))):
        guided = pair[0].guided(dd.ClassifierFree(pair[1], 0.5))
        sampler = dd.Sampler(MASKED, guided, S.Ancestral(), steps=2)
        if pair[0] is other:
            with pytest.raises(ValueError, match="has a joint law of its tokens; guide the combination instead"):
                sampler.sample(1, L, seed=0)
        else:
            assert bool(by_hand(sampler.sample(200, L, seed=0).tokens).all())


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: dd.Constraint([0, 1], 0, [True, True]), ValueError, r"transitions must be \(Q, V\) states"),
        (lambda: dd.Constraint([[0.5]], 0, [True]), ValueError, "transitions must hold states"),
        (lambda: dd.Constraint([[0, 2]], 0, [True]), ValueError, r"states in 0\.\.0, got"),
        (lambda: dd.Constraint([[0, -1]], 0, [True]), ValueError, r"states in 0\.\.0, got"),
        (lambda: dd.Constraint([[0, 0]], 1, [True]), ValueError, r"start must lie in 0\.\.0, got 1"),
        (lambda: dd.Constraint([[0, 0]], True, [True]), TypeError, "start must be a whole number"),
        (lambda: dd.Constraint([[0, 0]], 0, [1]), ValueError, r"accept must be \(1,\) bools"),
        (lambda: dd.Constraint([[0, 0]], 0, [True, False]), ValueError, r"accept must be \(1,\) bools"),
        (lambda: dd.Constraint([[0, 0]], 0, [False]), ValueError, "Constraint: no sequence is accepted"),
        (lambda: dd.Constraint("x", 0, [False]), TypeError, "transitions must be an array"),
        (lambda: ~(PARITY | ~PARITY), ValueError, "~Constraint: no sequence is accepted"),
        (lambda: PARITY & ~PARITY, ValueError, "Constraint &: no sequence is accepted"),
        (lambda: PARITY & 3, TypeError, "Constraint & takes a Constraint, got 3"),
        (lambda: PARITY | dd.Constraint([[0, 0]], 0, [True]), ValueError, "of the same tokens, got 3 and 2"),
        (lambda: PARITY.accepts(torch.tensor([[3]])), ValueError, r"must hold ids in 0\.\.2"),
        (lambda: PARITY.accepts([[0]]), ValueError, r"must be an int64 \(B, L\) tensor"),
        (
            lambda: WORLD.denoiser(dd.Uniform(3, dd.Linear())).guided(PARITY),
            ValueError,
            "takes an absorbing process, such as Masked, .* got Uniform",
        ),
        (
            lambda: WORLD.denoiser(MASKED).guided(dd.Constraint([[0, 0]], 0, [True])),
            ValueError,
            r"is for 2 tokens, but Masked\(3, .* has 3",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


def test_laws_of_single_sites_are_read_from_the_marginals_alone() -> None:
    said = network().guided(PARITY)(torch.full((1, L), 3), 0.5)
    with pytest.raises(ValueError, match=r"prediction\.untruncated has the laws of single sites"):
        _ = said.loo
    assert said.untruncated.loo.shape == (1, L, V)
    assert repr(PARITY) == "Constraint(4 states, 3 tokens)"
    assert PARITY == parity() != ALIKE
    assert PARITY != 3
