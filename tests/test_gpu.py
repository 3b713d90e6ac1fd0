"""What only a GPU can show: the same tokens there, no waiting in a step, and a graph that holds it."""

import pytest
import torch

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff.denoiser import Counter
from discdiff.handlers import At, Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 1025, 50_257])
def test_a_gpu_draws_the_same_tokens(width: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(256, width) * 3).to(dtype)
    ids = torch.arange(256)
    expected = kernels.draw(logits, seed=3, rows=ids, positions=ids)
    drawn = kernels.draw(logits.cuda(), seed=3, rows=ids.cuda(), positions=ids.cuda()).cpu()
    assert int((drawn != expected).sum()) <= 1  # a float tie may fall otherwise
    assert int((kernels.draw(logits, seed=4, rows=ids, positions=ids) != expected).sum()) > 1


def setting(process: dd.Process) -> tuple[dd.Denoiser, torch.Tensor]:
    table = torch.randn(process.states, process.vocab_size, generator=torch.Generator().manual_seed(0)).cuda()
    return dd.Denoiser(lambda x, t: table[x] + table[x.roll(1, 1)], process, "loo"), table


@pytest.mark.parametrize("process", [dd.Masked(2000, dd.Linear()), dd.Uniform(2000, dd.Linear())], ids=repr)
def test_a_gpu_samples_the_same_tokens(process: dd.Process) -> None:
    model, table = setting(process)
    here = dd.Denoiser(lambda x, t: table.cpu()[x] + table.cpu()[x.roll(1, 1)], process, "loo")
    operator = S.Ancestral() >> S.Gibbs(sites=2)
    drawn = dd.Sampler(process, model, operator, steps=8).sample(4, 32, seed=0, device="cuda").tokens.cpu()
    assert torch.equal(drawn, dd.Sampler(process, here, operator, steps=8).sample(4, 32, seed=0).tokens)


@pytest.mark.parametrize("process", [dd.Masked(2000, dd.Linear()), dd.Uniform(2000, dd.Linear())], ids=repr)
def test_a_graph_holds_a_fused_step_and_nothing_waits(process: dd.Process) -> None:
    model, _ = setting(process)
    rows = torch.arange(4, device="cuda")
    tokens = torch.randint(process.states, (4, 32), device="cuda")
    state = dd.State(tokens, 0.5, rows)
    run = Run(0, Counter(model, 0, torch.zeros(4, dtype=torch.int64, device="cuda")), fuse=True)
    at = At(process, run, 0.5, 0.25, 1)
    operator = S.Ancestral()
    expected = operator(state, at).tokens  # compiles
    run._names.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert operator(state, at) is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run._names.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operator(state, at).tokens
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
