"""What only a GPU can show: the same tokens there, no waiting in a step, and a graph that holds it.

``REHEARSE=1`` runs the tests that do not need CUDA itself on the CPU, to see that they are sound.
"""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff.operator import At, Run

REHEARSE = os.environ.get("REHEARSE") == "1"
GPU = "cpu" if REHEARSE else "cuda"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSE), reason="there is no GPU")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA itself is tested")

V = 300 if REHEARSE else 2000
Function = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Network = Callable[[torch.device | str], Function]


def table(states: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(states, columns, generator=generator, dtype=torch.float64)


def neighbours(process: dd.Process, dtype: torch.dtype = torch.float32) -> Network:
    """A network that looks at a token and the one before it: exact on every device."""
    whole = table(process.states, process.vocab_size).to(dtype)

    def on(device: torch.device | str) -> Function:
        w = whole.to(device)
        return lambda x, t: w[x] + w[x.roll(1, 1)]

    return on


def same(draw: Callable[[str], torch.Tensor], ties: int = 0) -> torch.Tensor:
    """The tokens drawn on the CPU, after those of the GPU were found equal but for ``ties``."""
    expected, drawn = draw("cpu"), draw(GPU).cpu()
    assert int((drawn != expected).sum()) <= ties
    return expected


PROCESSES = {
    "masked": dd.Masked(V, dd.Linear()),
    "mask in the vocabulary": dd.Masked(V, dd.Linear(), mask_id=7),
    "uniform": dd.Uniform(V, dd.Linear()),
    "marginal": dd.Marginal(table(1, V)[0].softmax(-1), dd.Linear()),
    "hybrid": dd.Hybrid(V, dd.Linear(), p_uniform=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 5, 1025, 50_257])
def test_a_gpu_draws_the_same_tokens(width: int, dtype: torch.dtype) -> None:
    logits, ids = (torch.randn(256, width) * 3).to(dtype), torch.arange(256)
    drawn = {
        seed: same(
            lambda d, seed=seed: kernels.draw(logits.to(d), seed=seed, rows=ids.to(d), positions=ids.to(d)), ties=1
        )
        for seed in (0, 3, 2**63, 2**64 - 1)
    }
    if width > 5:
        assert int((drawn[0] != drawn[3]).sum()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_reads_the_same_statistics(dtype: torch.dtype) -> None:
    logits = (torch.randn(64, 5000) * 3).to(dtype)
    at = torch.arange(64)
    here, there = kernels.read(logits, at=at, top=True), kernels.read(logits.to(GPU), at=at.to(GPU), top=True)
    for name in ("log_sum_exp", "entropy", "max_prob", "margin", "log_prob"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), rtol=2e-6, atol=2e-6)
    assert torch.equal(there.argmax.cpu(), here.argmax)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_samples_the_same_tokens(name: str, dtype: torch.dtype) -> None:
    process = PROCESSES[name]
    network = neighbours(process, dtype)
    operator = S.Ancestral() >> S.Gibbs(sites=2) if name in ("masked", "uniform") else S.Ancestral()

    def draw(device: str, rows: int = 4, first: int = 0) -> torch.Tensor:
        model = dd.Denoiser(network(device), process, "loo")
        sampler = dd.Sampler(process, model, operator, steps=8)
        return sampler.sample(rows, 32, seed=2**64 - 1, device=device, first_row=first).tokens

    whole = same(draw)
    assert torch.equal(draw(GPU, 1, 2).cpu(), whole[2:3])


OPERATORS = {
    "uniform": [S.SplitLeap(), S.Euler(), S.TauLeaping(), S.ThetaTrapezoidal(0.5), S.Multistep(), S.InformedGibbs()],
    "masked": [
        S.Unmask(), S.Unmask(select="max_prob"), S.Unmask(select="margin"), S.Greedy(), S.Threshold(0.5),
        S.ReMDM(eta=0.2), S.P2(eta=0.5), S.EntropyBounded(0.5), S.KLStable(), S.SplitLeap(), S.FirstHitting(),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "operator"), [(n, o) for n, many in OPERATORS.items() for o in many], ids=lambda x: repr(x)
)
def test_every_operator_is_the_same_on_a_gpu(name: str, operator: dd.Operator) -> None:
    process = PROCESSES[name]
    network = neighbours(process, torch.float64)
    whole = operator if operator.moves else S.Ancestral() >> operator

    def draw(device: str) -> torch.Tensor:
        model = dd.Denoiser(network(device), process, "loo")
        return dd.Sampler(process, model, whole, steps=4).sample(2, 16, seed=1, device=device).tokens

    same(draw)


def test_blocks_and_prompts_are_the_same_on_a_gpu() -> None:
    process = PROCESSES["masked"]
    network = neighbours(process, torch.float64)

    def draw(device: str) -> torch.Tensor:
        model = dd.Denoiser(network(device), process, "denoiser")
        blocks = dd.Blockwise(process, model, S.Ancestral(), block=4, steps=3)
        return blocks.sample(3, 14, seed=0, prompt=[1, 2, 3], device=device).tokens

    assert same(draw)[:, :3].tolist() == [[1, 2, 3]] * 3


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_frozen_sites_are_the_same_on_a_gpu(name: str) -> None:
    process = PROCESSES[name]
    network = neighbours(process)
    frozen = torch.arange(16) % 3 == 0

    def draw(device: str) -> torch.Tensor:
        model = dd.Denoiser(network(device), process, "loo")
        sampler = dd.Sampler(process, model, S.Ancestral(), steps=6)
        return sampler.sample(3, 16, seed=0, prompt=torch.arange(16), frozen=frozen, device=device).tokens

    drawn = same(draw)
    assert torch.equal(drawn[:, frozen], torch.arange(16)[frozen].expand(3, -1))


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_what_is_recorded_is_the_same_on_a_gpu(name: str) -> None:
    process = PROCESSES[name]
    network = neighbours(process, torch.float64)
    outs = {}
    for device in ("cpu", GPU):
        model = dd.Denoiser(network(device), process, "loo")
        sampler = dd.Sampler(process, model, S.Ancestral(), steps=5)
        outs[device] = sampler.sample(3, 12, seed=0, record=True, device=device)
    here, there = outs["cpu"], outs[GPU]
    assert torch.equal(there.trajectory.cpu(), here.trajectory)
    torch.testing.assert_close(there.log_prob.cpu(), here.log_prob, rtol=1e-9, atol=1e-9)


def test_a_model_without_time_is_not_called_for_the_same_tokens_on_a_gpu() -> None:
    process = PROCESSES["masked"]
    calls, network = [0], neighbours(process)

    def draw(device: str) -> torch.Tensor:
        inner = network(device)

        def fn(x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
            calls[0] += 1
            return inner(x, t)

        model = dd.Denoiser(fn, process, "denoiser", time=None)
        calls[0] = 0
        return dd.Sampler(process, model, S.Ancestral(), steps=16).sample(1, 4, seed=0, device=device).tokens

    same(draw)
    assert calls[0] < 16


@pytest.mark.parametrize(
    "dtype", [torch.float32] if REHEARSE else [torch.float32, torch.bfloat16]
)  # a CPU rounds logits
@pytest.mark.parametrize("depth", [64, 50])
def test_a_head_draws_its_own_logits_on_a_gpu(dtype: torch.dtype, depth: int) -> None:
    process = dd.Masked(V, dd.Linear())
    hidden, weight = table(process.states, depth).to(dtype) / 4, table(V, depth, 1).to(dtype)

    layer = torch.nn.Linear(depth, V, bias=False, device=GPU, dtype=dtype).requires_grad_(False)
    layer.weight.data.copy_(weight)
    h, exact = hidden.to(GPU), hidden.double() @ weight.double().T  # products of halves are not rounded to halves

    def draw(model: dd.Denoiser, device: str, rows: int = 8, first: int = 0) -> torch.Tensor:
        sampler = dd.Sampler(process, model, S.Ancestral(), steps=8)
        return sampler.sample(rows, 32, seed=0, device=device, first_row=first).tokens.cpu()

    fused = dd.Denoiser(lambda x, t: h[x], process, "denoiser", head=layer)
    expected = draw(dd.Denoiser(lambda x, t: exact[x], process, "denoiser"), "cpu")
    drawn = draw(fused, GPU)
    assert int((drawn != expected).sum()) <= 2
    assert torch.equal(draw(fused, GPU, 1, 3), drawn[3:4])


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_draws_the_same_for_few_rows_and_many_on_a_gpu(dtype: torch.dtype) -> None:
    hidden, weight = table(1000, 512).to(dtype).cuda(), (table(5000, 512, 1) / 8).to(dtype).cuda()
    ids = torch.arange(1000, device="cuda")

    def draw(part: slice) -> torch.Tensor:
        own = ids[part]
        rows = kernels.Rows(hidden[None], torch.zeros_like(own), own, 5000, kernels.LinearHead(weight))
        return kernels.draw(rows, seed=1, rows=own, positions=own)

    whole = draw(slice(None))
    parts = [slice(0, 1), slice(1, 17), slice(17, 80), slice(80, 250), slice(250, 1000)]
    assert torch.equal(torch.cat([draw(part) for part in parts]), whole)


def test_bad_logits_are_named_on_a_gpu() -> None:
    for process in (PROCESSES["masked"], PROCESSES["uniform"]):
        for bad in (float("nan"), float("inf")):
            network = neighbours(process)(GPU)

            def fn(
                x: torch.Tensor, t: torch.Tensor | None, inner: Function = network, bad: float = bad
            ) -> torch.Tensor:
                return inner(x, t).index_put((torch.tensor(0), torch.tensor(3), torch.tensor(5)), torch.tensor(bad))

            sampler = dd.Sampler(process, dd.Denoiser(fn, process, "loo"), S.Ancestral(), steps=2)
            with pytest.raises(ValueError, match="logits"):
                sampler.sample(2, 8, seed=0, device=GPU)


def standing(process: dd.Process, device: str) -> tuple[dd.State, At]:
    model = dd.Denoiser(neighbours(process)(device), process, "loo")
    tokens = torch.randint(process.vocab_size, (4, 32), device=device)
    if process.absorbing:
        tokens = torch.where(torch.rand(4, 32, device=device) < 0.5, tokens, process.hide(tokens))
    return Run.start(model, 4, 0, device=device).begin(tokens, 0.5, 0.25, 1)


@needs_cuda
@pytest.mark.parametrize("name", ["masked", "mask in the vocabulary", "uniform", "marginal"])
def test_a_graph_holds_a_fused_step_and_nothing_waits(name: str) -> None:
    state, at = standing(PROCESSES[name], "cuda")
    operator = S.Ancestral()
    expected = operator(state, at).tokens  # compiles
    at = replace(at, run=replace(at.run))  # each run draws a site of a step once
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert operator(state, at) is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    at = replace(at, run=replace(at.run))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operator(state, at).tokens
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@needs_cuda
@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_the_fused_step_is_the_program_on_a_gpu(name: str) -> None:
    state, at = standing(PROCESSES[name], "cuda")
    fused = S.Ancestral()(state, at).tokens
    apart = replace(at, run=replace(at.run, fuse=False))
    assert torch.equal(fused, S.Ancestral()(state, apart).tokens)


@needs_cuda
@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_in_bfloat16_draws_its_own_logits_on_a_gpu(autocast: bool) -> None:
    process = dd.Masked(V, dd.Linear())
    network = torch.nn.Sequential(torch.nn.Embedding(V + 1, 64), torch.nn.Linear(64, V)).cuda().eval()
    if not autocast:
        network = network.bfloat16()
    seen: list[torch.Tensor] = []

    def fn(x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.no_grad():
            seen.append(network(x))
        return seen[-1]

    initial = torch.full((4, 32), V)
    sampler = dd.Sampler(process, dd.Denoiser(fn, process, "denoiser"), S.Ancestral(), grid=[1.0, 0.5])
    drawn = sampler.sample(4, 32, seed=0, initial=initial, device="cuda").tokens.cpu()
    (logits,) = seen
    assert logits.dtype == torch.bfloat16
    here = dd.Denoiser(lambda x, t: logits.cpu(), process, "denoiser")
    again = dd.Sampler(process, here, S.Ancestral(), grid=[1.0, 0.5]).sample(4, 32, seed=0, initial=initial).tokens
    assert int((drawn != again).sum()) <= 1


@needs_cuda
def test_a_compiled_denoiser_draws_its_own_logits_on_a_gpu() -> None:
    process = dd.Uniform(V, dd.Linear())
    w = table(V, V).float().cuda()
    compiled = torch.compile(lambda x, t: w[x] + w[x.roll(1, 1)])
    models = [dd.Denoiser(fn, process, "loo") for fn in (compiled, lambda x, t: w[x] + w[x.roll(1, 1)])]
    drawn = [dd.Sampler(process, m, S.Ancestral(), steps=4).sample(2, 16, seed=0, device="cuda").tokens for m in models]
    assert torch.equal(*drawn)


@needs_cuda
def test_rows_beyond_two_to_the_31_elements_are_reached() -> None:
    width = 50_257
    count = 2**31 // width + 2
    logits = torch.full((count, width), -100.0, dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(count, device="cuda")
    at = (ids * 7919) % width
    logits.scatter_(1, at[:, None], 100.0)
    assert torch.equal(kernels.draw(logits, seed=0, rows=ids, positions=ids), at)
    assert torch.equal(kernels.read(logits, top=True).argmax, at)
    assert torch.equal(kernels.draw(logits.T.contiguous().T, seed=0, rows=ids, positions=ids), at)  # columns lie apart
