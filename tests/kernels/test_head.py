"""A denoiser whose last layer runs only where it is read, and the kernel that fuses it with the draw."""

import dataclasses
import importlib.util

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from problems import processes, states

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff import theory as T

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Network(torch.nn.Module):
    """Hidden states that depend on every token, and a head."""

    def __init__(self, process: dd.Process, length: int, width: int = 8) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(process.states, width)
        self.mix = torch.nn.Linear(length, length)
        self.head = torch.nn.Linear(width, process.vocab_size)
        self.double().requires_grad_(False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.mix(self.embed(x).transpose(1, 2)).transpose(1, 2).tanh() * 3

    def logits(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.head(self(x, t))


def pair(process: dd.Process, length: int, **options: bool) -> tuple[dd.Denoiser, dd.Denoiser, Network]:
    """The same denoiser with its head apart and with logits."""
    network = Network(process, length)
    apart = dd.Denoiser(network, process, "loo", head=network.head, length=length, **options)
    return apart, dd.Denoiser(network.logits, process, "loo", length=length, **options), network


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("process", processes(5), ids=repr)
def test_a_head_apart_gives_the_same_samples(process: dd.Process, shift: bool) -> None:
    apart, together, _ = pair(process, 6, shift=shift)
    samples = [
        dd.Sampler(process, model, S.Ancestral() >> S.Gibbs(sites=2), steps=4).sample(3, seed=0, record=True)
        for model in (apart, together)
    ]
    assert torch.equal(samples[0].trajectory, samples[1].trajectory)
    torch.testing.assert_close(samples[0].log_prob, samples[1].log_prob)
    other = dd.Sampler(process, pair(process, 6)[1], S.Ancestral() >> S.Gibbs(sites=2), steps=4).sample(3, seed=0)
    assert not torch.equal(other.tokens, samples[0].tokens), "planted: another network"


@pytest.mark.parametrize("process", processes(3), ids=repr)
def test_a_head_apart_has_the_same_kernel_and_prediction(process: dd.Process) -> None:
    apart, together, _ = pair(process, 2)
    for operator in (S.Ancestral(), S.Gibbs()):
        times = {"t": 0.6, "s": 0.4} if operator.moves else {"t": 0.6}
        found, expected = (T.kernel(operator, process, model, **times) for model in (apart, together))
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    z = states(process.states, 2)
    torch.testing.assert_close(apart(z, 0.5).logits, together(z, 0.5).logits)
    torch.testing.assert_close(apart(z, 0.5).denoiser, together(z, 0.5).denoiser)


def test_the_head_runs_only_where_a_token_may_change() -> None:
    process, length = dd.Masked(5, dd.Linear()), 64
    network, seen = Network(process, length), []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return network.head(hidden)

    model = dd.Denoiser(network, process, "loo", head=head, length=length)
    dd.Sampler(process, model, S.Ancestral(), steps=16).sample(4, seed=0)
    widths, rows = seen.count(1), sum(n for n in seen if n > 1)
    assert widths >= 16  # one row a call tells how many columns there are
    assert rows + widths <= 4 * length + 2 * 16  # each site once, not at each of the 16 steps


@pytest.mark.usefixtures("as_user")
def test_wrong_heads_are_refused() -> None:
    process = dd.Masked(5, dd.Linear())
    with pytest.raises(TypeError, match="head must be callable"):
        dd.Denoiser(lambda x, t: x, process, "loo", head=3)
    model = dd.Denoiser(lambda x, t: x, process, "loo", head=torch.nn.Linear(2, 5))
    with pytest.raises(TypeError, match=r"hidden states \(B, L, D\)"):
        model(torch.zeros(1, 2, dtype=torch.int64), 0.5)
    narrow = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 2), process, "loo", head=torch.nn.Linear(2, 4))
    with pytest.raises(ValueError, match=r"must return \(1, 2, 5\) = \(B, L, V\), got \(1, 2, 4\)"):
        narrow(torch.zeros(1, 2, dtype=torch.int64), 0.5)


@needs_triton
@hypothesis.settings(max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 999),
    width=st.integers(1, 40) | st.sampled_from([127, 128, 1000, 1024, 1025, 2500]),
    depth=st.integers(1, 20) | st.sampled_from([64, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    adjusted=st.booleans(),
    swapped=st.booleans(),
)
def test_the_fused_head_draws_the_unfused_tokens(
    seed: int, width: int, depth: int, dtype: torch.dtype, bias: bool, adjusted: bool, swapped: bool
) -> None:
    """Against a head in float32, which is what the kernel accumulates in whatever it reads."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 3, depth, generator=generator).to(dtype)
    hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1) if swapped else hidden
    weight = torch.randn(width, depth, generator=generator).to(dtype)
    offset = torch.randn(width, generator=generator).to(dtype) if bias else None
    where = torch.rand(2, 3, generator=generator) < 0.8
    rows = kernels.Rows.at(hidden, where.nonzero(as_tuple=True), width, convert=kernels.LinearHead(weight, offset))
    n = len(rows)
    if adjusted and width > 1:
        own, shift = torch.randint(-1, width, (n,), generator=generator), torch.randn(n, generator=generator).double()
        floor = torch.full((n,), -2.0)
        rows = dataclasses.replace(rows, own=own, shift=shift, hidden=(1,), temperature=0.7, floor=floor)
    exact = kernels.LinearHead(weight.float(), None if offset is None else offset.float())
    plain = dataclasses.replace(rows, source=hidden.float(), convert=exact)
    key = {"seed": 2**63 + 5, "step": 9, "tag": 3, "rows": torch.arange(n) * 3 + 1, "positions": torch.arange(n) % 7}
    assert kernels.draw(rows, backend="triton", **key).tolist() == kernels.draw(plain, backend="torch", **key).tolist()


@needs_triton
def test_the_fused_head_marks_rows_that_cannot_be_drawn() -> None:
    hidden = torch.randn(1, 3, 4)
    hidden[0, 1, 2] = float("nan")
    rows = kernels.Rows.at(hidden, None, 1500, convert=kernels.LinearHead(torch.ones(1500, 4)))
    rows = dataclasses.replace(rows, floor=torch.tensor([-1e9, -1e9, float("inf")]))
    drawn = kernels.draw(rows, seed=0, rows=torch.arange(3), positions=torch.arange(3), backend="triton")
    assert (drawn < 0).tolist() == [False, True, True]
