"""Blockwise samplers and cascades in many settings, and what is equal between their runs."""

from collections.abc import Iterator

import torch
from operators import STEPS as SHIPPED
from problems import block_network, chain
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.sampling import BlockSamples

MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
PROCESSES = [MASKED, UNIFORM]
B, L = 4, 4
# A coarse tolerance, as the usual one takes thousands of calls.
STEPS = [S.Adaptive(tolerance=1.0) if isinstance(one, S.Adaptive) else one for one in SHIPPED]
PROMPTS = [[], [1], [2, 0, 1], [2, 1]]
ORACLES = {process: chain(3, L).denoiser(process, predicts="loo") for process in PROCESSES}
SHORT = {process: chain(3, 3).denoiser(process, predicts="loo") for process in PROCESSES}
CACHED = {
    process: dd.Denoiser(block_network(process).fn, process, "loo", time="alpha")  # type: ignore[arg-type]
    for process in PROCESSES
}
TIMELESS = {
    process: dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), process, "loo", time=None) for process in PROCESSES
}
FROZEN = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
HELD = torch.tensor([[0, 0, 1, 2], [1, 0, 0, 2], [0, 0, 0, 0], [0, 1, 1, 2]])

# The model, options of Blockwise and arguments of sample.
SETTINGS: dict[str, tuple[dict[dd.Process, dd.Denoiser], dict[str, object], dict[str, object]]] = {
    "prompts": (ORACLES, {"block": 2}, {"prompt": PROMPTS}),
    "sizes and stops": (ORACLES, {"block": {1: 0.5, 2: 0.5}}, {"prompt": PROMPTS, "stop": 0}),
    "window": (SHORT, {"block": 2, "window": 3}, {"prompt": PROMPTS, "stop": 0}),
    "cached": (CACHED, {"block": 2}, {"prompt": PROMPTS, "stop": 0}),
    "cached window": (CACHED, {"block": {1: 0.5, 2: 0.5}, "window": 3}, {"prompt": PROMPTS, "stop": 0}),
    "frozen": (CACHED, {"block": 2}, {"prompt": HELD, "frozen": FROZEN}),
    "no time": (TIMELESS, {"block": 2}, {}),
}


def blocks_of(
    setting: str, process: dd.Process, operator: dd.Operator, steps: int = 2
) -> tuple[dd.Blockwise, dict[str, object]]:
    models, options, asked = SETTINGS[setting]
    maker = dd.Blockwise(process, models[process], operator, steps=steps, **options)  # type: ignore[arg-type]
    return maker, {"batch": B, "length": L, "seed": 7, **asked}


def cascade(process: dd.Process, operator: dd.Operator, first: dd.Sampler | dd.Blockwise | None = None) -> dd.Cascade:
    table = torch.randn(process.states, 3, 3, generator=torch.Generator().manual_seed(0))
    second = dd.Denoiser(lambda x, t, y: table[x, y], process, "loo")  # type: ignore[arg-type]
    if first is None:
        first = dd.Sampler(process, dd.Denoiser(lambda x, t: table[x, 0], process, "loo"), operator, steps=2)
    return dd.Cascade(first, dd.Sampler(process, second, operator, steps=2))


def same(one: dd.Samples, other: dd.Samples) -> None:
    """Equal in all but the trajectory; log-probabilities are sums in another order."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.nfe_rows, other.nfe_rows)
    assert (one.nfe, one.queries, one.seed) == (other.nfe, other.queries, other.seed)
    assert (one.log_prob is None) == (other.log_prob is None)
    if one.log_prob is not None:
        torch.testing.assert_close(one.log_prob, other.log_prob, rtol=1e-5, atol=1e-5)
    if isinstance(one, BlockSamples) and isinstance(other, BlockSamples):
        assert one.lengths is not None
        assert other.lengths is not None
        assert torch.equal(one.lengths, other.lengths)


def joined(parts: list[dd.Samples]) -> Tensor:
    """The trajectory of a run from those of its parts; each begins with the last state of the one before."""
    paths = [part.trajectory for part in parts if part.trajectory is not None and len(part.trajectory)]
    return torch.cat([paths[0], *(path[1:] for path in paths[1:])])


def walk(
    maker: dd.Blockwise | dd.Cascade, asked: dict[str, object], record: bool, steps: int
) -> Iterator[dd.Samples | tuple[dd.Samples, dd.Samples]]:
    """Run one step at a time: each part continues the one before."""
    told: dict[str, object] = asked
    for step in range(1, steps + 1):
        part = maker.sample(**told, record=record, until=step)  # type: ignore[arg-type]
        yield part
        told = {"resume": part.state}


def length(out: dd.Samples) -> int:
    """The number of steps of a recorded run."""
    assert out.trajectory is not None
    return len(out.trajectory) - 1
