"""The blocked scan against a step for every site, and both against exact fractions; draws are the same draws."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import chain, states
from torch import Tensor

import discdiff as dd
from discdiff import theory as T
from discdiff.theory import scan
from discdiff.theory.oracles import pick

SHARES = (0.0, 0.0, 1e-3, 0.25, 0.5, 1.0)  # of which transitions are made
SEEN = (0.0, 1e-100, 1e-50, 1e-3, 0.5, 1.0)  # weights of a site


def exact(weights: Tensor, first: Tensor, matrix: Tensor) -> Tensor:
    """m_i with sum 1, in fractions, which neither round nor underflow; zero where nothing is possible."""
    found = []
    for row in weights.tolist():
        message, messages = [Fraction(x) for x in first.tolist()], []
        for weight in row:
            total = sum(message)
            messages.append([float(x / total) if total else 0.0 for x in message])
            seen = [x * Fraction(w) for x, w in zip(message, weight, strict=True)]
            columns = zip(*matrix.tolist(), strict=True)
            message = [sum(x * Fraction(a) for x, a in zip(seen, column, strict=True)) for column in columns]
        found.append(messages)
    return torch.tensor(found, dtype=torch.float64)


def normalised(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / total, 0.0)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Weights, a first message and a matrix, with zeros and fixed points, and into how many blocks they are cut."""
    batch, length, size = draw(st.integers(1, 2)), draw(st.integers(4, 40)), draw(st.integers(1, 3))
    blocks = draw(st.integers(2, length))
    numbers = st.lists(st.sampled_from(SHARES), min_size=size, max_size=size)
    matrix = torch.tensor([draw(numbers) for _ in range(size)], dtype=torch.float64)
    first = torch.tensor(draw(numbers), dtype=torch.float64)
    site = st.lists(st.sampled_from(SEEN), min_size=size, max_size=size)
    kinds = torch.tensor([draw(site) for _ in range(3)], dtype=torch.float64)
    which = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length)))
    return kinds[which].view(batch, length, size), normalised(first), normalised(matrix), blocks


def errors(weights: Tensor, first: Tensor, matrix: Tensor, blocks: int) -> tuple[float, float]:
    """How far blocks are from exact where a step for every site is right, in messages and in log totals."""
    right, start = exact(weights, first, matrix), first.expand(len(weights), -1)
    slow, slow_totals, _ = scan._in_order(weights, start, matrix)
    fast, fast_totals = scan._in_blocks(weights, start, matrix, blocks)
    kept = (normalised(slow) - right).abs().amax(-1) < 1e-13
    kept = kept.long().cumprod(-1).bool()  # what was lost once is lost
    known = kept & (slow_totals > 1e-290) & bool((matrix.sum(-1) > 0).all())  # s_i is of messages with sum 1
    return (
        float((normalised(fast) - right)[kept].abs().max()) if bool(kept.any()) else 0.0,
        float((fast_totals / slow_totals - 1)[known].abs().max()) if bool(known.any()) else 0.0,
    )


@settings(max_examples=100, deadline=None)
@given(chains())
def test_blocks_are_a_step_for_every_site(given_chain: tuple[Tensor, Tensor, Tensor, int]) -> None:
    """Zeros, deterministic transitions, weights of 1e-100 and contradictions; any number of blocks, with a rest."""
    assert max(errors(*given_chain)) < 1e-12


def sticky(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """State 0 may be left for good; the sites' weights speak for 1, and the one at the end says that it never was."""
    weights = torch.tensor([1e-3, 1.0]).double().expand(1, length, -1).clone()
    weights[0, -1] = torch.tensor([1.0, 0.0])
    return weights, torch.tensor([0.999, 0.001]).double(), torch.tensor([[0.5, 0.5], [0.0, 1.0]]).double()


def parted(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two states that never mix: the first one is certain, although every site speaks 1e7 to 1 for the other."""
    weights = torch.tensor([1e-7, 1.0]).double().expand(1, length, -1)
    return weights, torch.tensor([1.0, 0.0]).double(), torch.eye(2).double()


FAULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "no powers of rows": lambda rows, powers: (rows, torch.zeros_like(powers)),
    "one power for all rows": lambda rows, powers: (
        rows * torch.exp2(powers - powers.amax(-1, keepdim=True))[..., None],
        powers.amax(-1, keepdim=True).expand_as(powers),
    ),
    "rows and columns exchanged": lambda rows, powers: (rows.transpose(1, 2), powers),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_of_blocks_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One power for a whole matrix is enough until a row is a 1e-308th of another: 80 sites in a block do that."""
    cases = [(*sticky(80), 4), (*parted(180), 2), (*parted(18), 3)]
    assert max(max(errors(*case)) for case in cases) < 1e-12
    right = scan._block_matrices
    monkeypatch.setattr(scan, "_block_matrices", lambda w, a: FAULTS[name](*right(w, a)))
    assert max(max(errors(*case)) for case in cases) > 1e-3


# --- thousands of sites -----------------------------------------------------------------------------------------------


def far(length: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Laws at which messages may over- or underflow, from an evenly sticky one to one with a single path."""
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(2, length, 3, generator=generator, dtype=torch.float64)
    even, cycle = torch.full((3,), 1 / 3).double(), torch.eye(3).double().roll(1, 1)
    stay = torch.eye(3).double() * (1 - 3e-9) + 1e-9
    once = torch.zeros(2, length, 3).double()
    once[..., 0] = 1e-200
    single = some.clone()
    single[:, :: length // 7] = torch.tensor([0.0, 1.0, 0.0]).double()
    against = some.clone()
    against[1, length // 2] = 0
    return {
        "sticky": (some, even, stay),
        "tiny": (some * 1e-150, even, stay),
        "huge": (some * 1e150, even, stay),
        "no mixing": (some, even, torch.eye(3).double()),
        "deterministic": (some, even, cycle),
        "one path of small weights": (once, even, stay),
        "some sites shown": (single, even, chain(3, 2).transition),
        "contradicted": (against, even, stay),
    }


@pytest.mark.parametrize("name", list(far(64)))
def test_sixteen_thousand_sites(name: str) -> None:
    weights, first, matrix = far(16_384)[name]
    slow, slow_totals, _ = scan._in_order(weights, first.expand(2, -1), matrix)
    fast, fast_totals = scan.messages(weights, first, matrix)
    assert bool(torch.isfinite(fast).all())
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    torch.testing.assert_close(fast_totals, slow_totals, atol=0, rtol=1e-11)
    assert bool((slow[1, -1] == 0).all()) == (name == "contradicted")


def test_a_chain_of_sixteen_thousand_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions, likelihoods and draws: equal tokens but where a last bit decides, which is never here."""
    law, process = chain(4, 16_384), dd.Uniform(4, dd.Linear())
    model = law.denoiser(process)

    def found() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = law.sample(2, seed=0)
        z = (x + torch.arange(16_384) % 7 // 6) % 4
        return x, model(z, 0.5).logits.exp(), law.log_marginal(process, z, 0.5), law.posterior(process, z, 0.5, seed=0)

    fast = found()
    monkeypatch.setattr(scan, "_WORK", 0)
    slow = found()
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[3], slow[3])
    torch.testing.assert_close(fast[1], slow[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(fast[2], slow[2], atol=0, rtol=1e-12)


# --- small, by brute force --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 7, 9])
def test_blocks_of_a_small_chain_are_brute_force(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_SHORT", 4)
    monkeypatch.setattr(scan, "_WORK", 1 << 40)
    law, process = chain(2, length), dd.Uniform(2, dd.Linear())
    world = T.Enumeration(law.log_prob(states(2, length)).exp(), vocab_size=2, length=length)
    z = states(2, length)
    for predicts in ("denoiser", "loo"):
        fast, slow = (o.denoiser(process, predicts=predicts)(z, 0.5).logits.exp() for o in (law, world))
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    marginal = law.log_marginal(process, z, 0.3).exp()
    torch.testing.assert_close(marginal, world.marginal(process, 0.3), atol=1e-14, rtol=0)


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(0, 2**31))
def test_composed_maps_draw_what_draws_one_by_one_do(
    given_chain: tuple[Tensor, Tensor, Tensor, int], seed: int
) -> None:
    weights, _, matrix, _ = given_chain
    batch, length, size = weights.shape
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(length, batch, generator=generator, dtype=torch.float64)
    last = torch.randint(size, (batch,), generator=generator)
    into = matrix.T.contiguous()
    drawn = [last]
    for i in reversed(range(length)):
        drawn.append(pick(weights[:, i] * into[drawn[-1]], u[i]))
    maps = torch.stack([pick((weights[:, i, None] * into).flatten(0, 1), u[i].repeat_interleave(size)).view(batch, size)
                        for i in range(length)], 1)  # fmt: skip
    one_by_one = torch.stack(drawn[::-1], 1)
    assert torch.equal(scan._composed(maps, last), one_by_one[:, :-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_SHORT", 1)
        patch.setattr(scan, "_TOGETHER", 8)
        assert torch.equal(scan.path(weights, into, last, u), one_by_one)


def test_gradients_pass_through_a_long_chain() -> None:
    """The clock may be learned: there is a step for every site then."""
    weights = torch.rand(1, 80, 2, dtype=torch.float64, requires_grad=True)
    first, matrix = torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    (slope,) = torch.autograd.grad(scan.messages(weights, first, matrix)[1].log().sum(), weights)
    h, moved = 1e-6, weights.detach().clone()
    moved[0, 40, 1] += h
    changed = scan.messages(moved, first, matrix)[1].log().sum()
    base = scan.messages(weights.detach(), first, matrix)[1].log().sum()
    torch.testing.assert_close(slope[0, 40, 1], (changed - base) / h, atol=1e-5, rtol=0)
