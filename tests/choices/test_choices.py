"""Choices are good citizens: values, supports, expansions and pickles of every class, against brute force."""

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from problems import weak
from pyro import distributions as pyros
from torch import Tensor

import discdiff as dd
from discdiff.adapters.torch_draws import Uniforms
from discdiff.choices import (
    Branch,
    Choice,
    Coins,
    Draws,
    Key,
    Noise,
    Other,
    PointMixture,
    Ranking,
    Repeated,
    Sites,
    Subset,
    Tokens,
    Waiting,
)
from discdiff.guidance.automata import Automaton
from discdiff.guidance.messages import edges_of
from discdiff.guidance.path import Path
from discdiff.operator import Run
from discdiff.process.interpolant import SourcePairs

PI = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)


def numbers(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return (numbers(*shape) * 4).long()


def coins(batch: int) -> Choice:
    probs = numbers(batch, 2)
    probs[0, 0], probs[-1, 1] = 1 + 1e-12, 0.0  # certain; a rounding error above 1 is none
    return Coins(probs)


def drawn(batch: int) -> Choice:
    where = torch.ones(batch, 2, dtype=torch.bool)
    where[-1, 0] = False
    logits = numbers(batch * 2 - 1, 4).log()
    logits[0, 1] = -torch.inf
    return Tokens(Sites.computed(where, lambda n: logits[n], 4), tokens(batch, 2))


def several(batch: int, apart: bool) -> Choice:
    one = drawn(2 * batch if apart else batch)
    assert isinstance(one, Tokens)
    return Draws(one.sites, one.keep, 2, apart)


def anchored(batch: int) -> Choice:
    where = torch.ones(batch, 2, dtype=torch.bool)
    where[0, 0] = False
    x = torch.full((batch, 2), 2)
    return Other(Noise.of(PI, x.device), x, where, numbers(batch, 2), torch.zeros_like(x))


def path(batch: int) -> Choice:
    """Of two hidden sites, the second is not chosen in the last row, and no two tokens are equal."""
    moves = torch.tensor([[1, 2, 3, 4], [5, 2, 3, 4], [1, 5, 3, 4], [1, 2, 5, 4], [1, 2, 3, 5], [5, 5, 5, 5]])
    edges = edges_of(Automaton.of(moves, 0, torch.arange(6) < 5), torch.device("cpu"))  # type: ignore[arg-type]
    hidden, logits = torch.ones(batch, 2, dtype=torch.bool), numbers(batch * 2, 4).log()
    where = hidden.clone()
    where[-1, 1], logits[0, 1] = False, -torch.inf
    end = torch.where(edges.automaton.accepting, 0.0, -torch.inf).double().expand(batch, -1)
    sites = Sites.computed(hidden, lambda n: logits[n], 4)
    return Path(edges, torch.zeros(batch).long(), end, sites, tokens(batch, 2), where, tokens(batch, 2))


def process(make: dd.Process) -> Callable[[int], Choice]:
    return lambda batch: make.marginal((tokens(batch, 2) % 3), 0.4)


CHOICES: dict[str, Callable[[int], Choice]] = {
    "Coins": coins,
    "Tokens": drawn,
    "PointMixture": lambda batch: PointMixture(PI, [tokens(batch, 2)], [numbers(batch, 2)]),
    "noise alone": lambda batch: PointMixture(PI, [], [], shape=(batch, 2)),
    "Draws": lambda batch: several(batch, apart=False),
    "Draws apart": lambda batch: several(batch, apart=True),
    "Other": anchored,
    "Branch": lambda batch: Branch(PI, batch),
    "Path": path,
    "SourcePairs": lambda batch: SourcePairs(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        tokens(batch, 2) % 2,
        numbers(batch, 2) / 2,
        numbers(batch, 2) / 3,
    ),
    "Subset": lambda batch: Subset(numbers(batch, 4) > 0.1, torch.arange(batch) % 3 + 1),
    "Ranking": lambda batch: Ranking(numbers(batch, 3).log(), torch.arange(batch) % 2 + 2),
    "a masked process": process(dd.Masked(3, dd.Linear())),
    "a dense process": process(dd.Ordinal(3, dd.Linear())),
    "Repeated": lambda batch: Repeated(coins(1), batch),
}
REAL: dict[str, Callable[[int], Choice]] = {
    "Waiting": lambda batch: Waiting(torch.ones(batch, dtype=torch.bool)),
    "Uniforms": lambda batch: Uniforms(batch, 2, torch.device("cpu")),
    "Repeated": lambda batch: Repeated(Uniforms(1, 2, torch.device("cpu")), batch),
}


def every_value(choice: Choice) -> Tensor:
    """All values with entries from -2 to one above what any class here can hold, (N, *event)."""
    sites = choice.event_shape.numel()
    grid = torch.tensor(list(itertools.product(range(-2, 6), repeat=sites)))
    return grid.reshape(-1, *choice.event_shape)


@pytest.mark.parametrize("name", CHOICES)
def test_log_probabilities_are_a_law_on_the_possible_values(name: str) -> None:
    """Over all values they sum to 1, are finite exactly where ``fork`` and ``support`` say so, and are never NaN."""
    choice = CHOICES[name](3)
    grid = every_value(choice)
    log_p = choice.log_prob(grid[:, None])
    assert log_p.shape == (len(grid), 3)
    assert not bool(log_p.isnan().any())
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(3).double(), atol=1e-9, rtol=0)
    parent, value, forked = choice.fork()
    for row in range(3):
        mine = parent == row
        found = {tuple(v.flatten().tolist()): p for v, p in zip(value[mine].long(), forked[mine].tolist(), strict=True)}
        here = log_p[:, row] > -torch.inf
        expected = {tuple(v.flatten().tolist()): p for v, p in zip(grid[here], log_p[here, row].tolist(), strict=True)}
        assert found == pytest.approx(expected, abs=1e-6)
    wide = grid[:, None].expand(-1, *choice.shape())
    assert torch.equal(choice.support.check(wide), log_p > -torch.inf)
    assert choice.support.event_dim == len(choice.event_shape)
    torch.testing.assert_close(choice.log_prob(grid[:, None].double()), log_p)
    halves = torch.full(choice.shape(), 0.5)
    assert bool((choice.log_prob(halves) == -torch.inf).all())
    assert bool((choice.log_prob(halves * torch.nan) == -torch.inf).all())
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(0)
    torch.testing.assert_close(choice.entropy().double(), entropy.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", REAL)
def test_real_choices_know_their_values(name: str) -> None:
    choice = REAL[name](3)
    value = choice.sample((100,))
    assert bool(choice.support.check(value).all())
    assert not bool(choice.support.check(value - 20).any())
    assert bool((choice.log_prob(value) > -torch.inf).all())
    assert bool((choice.log_prob(value - 20) == -torch.inf).all())
    assert bool((choice.log_prob(value * torch.nan) == -torch.inf).all())
    assert not choice.has_enumerate_support
    torch.testing.assert_close(choice.entropy(), (-choice.log_prob(value)).mean(0), atol=0.5, rtol=0)


BOTH = CHOICES | {f"{name} (real)": make for name, make in REAL.items()}


@pytest.mark.parametrize("name", BOTH)
def test_other_shapes_are_refused(name: str) -> None:
    choice = BOTH[name](3)
    value = choice.sample()
    assert choice.log_prob(value[:1]).shape == (3,)
    assert choice.log_prob(value[None, None]).shape == (1, 1, 3)
    assert choice.log_prob(value[0]).shape == (3,)
    wrong = [value[:2], torch.cat([value, value])]
    if choice.event_shape:
        wrong += [value[:, :1], torch.cat([value, value], 1), value[0, 0]]
    for other in wrong:
        with pytest.raises(ValueError, match="a value must have the shape"):
            choice.log_prob(other)


@pytest.mark.parametrize("name", BOTH)
def test_draws_of_any_number(name: str) -> None:
    choice = BOTH[name](3)
    for shape in [(), (0,), (2,), (2, 3), (0, 2)]:
        drawn = choice.sample(shape)
        assert drawn.shape == (*shape, *choice.shape())
        assert drawn.dtype == choice.kind
        assert bool((choice.log_prob(drawn) > -torch.inf).all())


@pytest.mark.parametrize("name", BOTH)
def test_pickles_draw_the_same(name: str) -> None:
    choice = BOTH[name](3)
    choice.key = Key(5, torch.arange(3), 7, name=11)
    for other in (pickle.loads(pickle.dumps(choice)), copy.deepcopy(choice), copy.copy(choice)):
        assert torch.equal(other.sample(), choice.sample())
        torch.testing.assert_close(other.log_prob(choice.sample()), choice.log_prob(choice.sample()))


@pytest.mark.parametrize("name", BOTH)
def test_an_expanded_choice_is_keyed(name: str) -> None:
    one = BOTH[name](1)
    many = one.expand((4,))
    assert isinstance(many, Choice)
    assert many.batch_shape == (4,)
    many.key = Key(5, torch.tensor([3, 0, 8, 3]), 7, name=11)
    drawn = many.sample()
    assert torch.equal(many.sample(), drawn)
    for row, value in zip(many.key.ids, drawn, strict=True):
        one.key = Key(5, row[None], 7, name=11)
        assert torch.equal(one.sample()[0], value)
    torch.testing.assert_close(many.log_prob(drawn), torch.cat([one.log_prob(value) for value in drawn[:, None]]))
    assert torch.equal(many.expand((4,)).sample(), drawn)
    assert one.expand((1,)).sample().shape == one.shape()


@pytest.mark.parametrize("name", BOTH)
def test_what_could_not_be_keyed_is_refused(name: str) -> None:
    choice = BOTH[name](3)
    for wrong in [lambda: choice.expand((4,)), lambda: choice.expand((2, 3)), lambda: choice.expand_by((2,))]:
        with pytest.raises(ValueError, match=r"one row can be expanded to \(B,\) rows"):
            wrong()
    for wrong in [
        lambda: choice.to_event(1),
        lambda: choice.to_event(),
        lambda: choice.independent(1),
        lambda: choice.mask(torch.tensor([True, False, True])),
        lambda: choice.mask(False),
    ]:
        with pytest.raises(TypeError, match="its randomness could not be keyed"):
            wrong()
    assert choice.to_event(0) is choice.mask(True) is choice


@pytest.mark.parametrize("name", CHOICES)
def test_supports_have_pyros_shapes(name: str) -> None:
    for batch in (1, 3):
        choice = CHOICES[name](batch)
        narrow, wide = choice.enumerate_support(expand=False), choice.enumerate_support(expand=True)
        assert narrow.shape == (len(narrow), 1, *choice.event_shape)
        assert wide.shape == (len(narrow), *choice.shape())
        log_p = choice.log_prob(narrow)
        torch.testing.assert_close(log_p.exp().sum(0), torch.ones(batch).double(), atol=1e-6, rtol=0, check_dtype=False)
        assert bool((log_p > -torch.inf).any(1).all())


@pytest.mark.parametrize(
    "law",
    [
        pyros.Bernoulli(torch.full((4, 3), 0.5)).to_event(1),
        pyros.MaskedDistribution(Coins(torch.full((4, 3), 0.5)), True),
        pyros.ExpandedDistribution(Coins(torch.full((1, 3), 0.5)), torch.Size([4])),
        torch.distributions.Categorical(torch.ones(4, 2)),
        torch.zeros(4, 3),
        None,
    ],
    ids=["Bernoulli", "masked", "expanded", "torch's", "a tensor", "nothing"],
)
@pytest.mark.parametrize("listen", [False, True])
@pytest.mark.usefixtures("as_user")
def test_choose_takes_choices_alone(law: object, listen: bool) -> None:
    uniform = dd.Uniform(3, dd.Linear())
    state, at = Run.start(weak().denoiser(uniform), 4, 0, listen=listen).begin(torch.zeros(4, 3).long(), 0.5, step=1)
    with pytest.raises(TypeError, match="choice 'mine': takes a Choice, such as Coins"):
        dd.choose("mine", law, state, at)
