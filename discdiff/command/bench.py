"""Measure the cost of a step against one read of the logits, the textbook step and other packages' steps.

Each round times all cases of a problem in turn, so that a busy machine slows all of them. A ratio is the median over
rounds of the ratio within a round. Memory is what torch allocates beyond the inputs.
"""

import contextlib
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from discdiff import samplers
from discdiff.command import bench_peers
from discdiff.denoiser import Denoiser
from discdiff.kernels import dispatch as kernels
from discdiff.process import Linear, Masked, Process, Uniform
from discdiff.sampling import Sampler

__all__ = ["Meter", "Problem", "Result", "cases", "machine", "measure", "report"]

Cases = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Problem:
    """Size, dtype and device of a benchmark step on random logits.

    About half of the sites are noise before the step.

    Attributes:
        batch, length, vocab: B, L and V.
        share: the expected part of all sites that a masked step reveals.
        dtype: "float32", "bfloat16" or "float16".
        device: the torch device, such as "cpu".
    """

    batch: int = 8
    length: int = 256
    vocab: int = 50257
    share: float = 1 / 16
    dtype: str = "float32"
    device: str = "cpu"

    def logits(self) -> Tensor:
        """Draw normal logits (B, L, V) with standard deviation 2, the same in every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.batch, self.length, self.vocab)
        made = torch.empty(shape, dtype=getattr(torch, self.dtype), device=self.device)
        for row in made:  # no second tensor of this size
            row.copy_(torch.randn(shape[1:], generator=generator, device=self.device) * 2)
        return made

    @property
    def times(self) -> tuple[float, float]:
        """Times t and s of the step: on the linear clock alpha = 1 - t rises from 1/2 to 1/2 + share."""
        return 0.5, 0.5 - self.share


@dataclass(frozen=True)
class Result:
    """Result of one case: median milliseconds, ratio to one read of the logits, and peak memory in MiB."""

    name: str
    milliseconds: float
    reads: float
    peak_mib: float


class Meter(TorchDispatchMode):
    """Context that measures the memory of new tensors and records which operations draw random numbers.

    Attributes:
        largest: bytes of the largest tensor made inside the context.
        peak: the largest number of bytes of such tensors in use at one time.
        drawn: names of the operations that drew from a random generator of torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: int = 0
        self.peak: int = 0
        self.largest: int = 0
        self.drawn: list[str] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn.append(str(func))
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            key = x.untyped_storage()._cdata
            if key not in given and key not in self._seen:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def machine() -> dict[str, str | int]:
    """Return the hardware and software on which the figures are measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: not measured on a GPU"
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "row pass": kernels.row_pass(),
        "gpu": gpu,
    }


def states(problem: Problem) -> tuple[Tensor, Tensor]:
    """Draw a masked state, about half of it masks, and a state of random tokens, both (B, L)."""
    generator = torch.Generator().manual_seed(1)
    shape = (problem.batch, problem.length)
    tokens = torch.randint(problem.vocab, shape, generator=generator)
    hidden = torch.rand(shape, generator=generator) < problem.times[0]
    return torch.where(hidden, problem.vocab, tokens).to(problem.device), tokens.to(problem.device)


def cases(
    problem: Problem, logits: Tensor, *, textbook: bool = True, peers: bool = False
) -> dict[str, Callable[[], object]]:
    """Return the functions to time, by name; the first one is the reference of all ratios."""
    t, s = problem.times
    batch, length, vocab = logits.shape
    masked, uniform = Masked(vocab, Linear()), Uniform(vocab, Linear())
    z, tokens = states(problem)
    ids = torch.arange(batch * length, device=logits.device)

    def draw(reading: kernels.Reading | None) -> Tensor:
        return kernels.draw(flat, seed=0, rows=ids, positions=ids, reading=reading)

    def step(process: Process, state: Tensor) -> Callable[[], object]:
        model = Denoiser(lambda x, time: logits, process, "loo", time=None)
        sampler = Sampler(process, model, samplers.Ancestral(), grid=[t, s])
        return lambda: sampler.sample(batch, length, seed=0, initial=state, device=logits.device)

    flat = logits.flatten(0, 1)
    words = logits.flatten()[: logits.numel() // 4 * 4].view(torch.int64)
    made: Cases = {
        "one read of the logits": words.sum,
        "masked step": step(masked, z),
        "uniform step": step(uniform, tokens),
        "dense pass: read all rows": lambda: kernels.read(flat),
        "dense pass: read and draw all rows": lambda: draw(None),
        "dense pass: all statistics and draw": lambda: draw(kernels.read(flat, top=True)),
    }
    if logits.is_cuda:
        spare = torch.empty_like(words)
        made["copy (read and write)"] = lambda: spare.copy_(words)
    if textbook:
        made["textbook eager step, masked"] = lambda: textbook_masked(logits, z, 1 - t, 1 - s)
        made["textbook eager step, uniform"] = lambda: textbook_uniform(logits, tokens, 1 - t, 1 - s)
    if textbook and logits.is_cuda:
        compiled = torch.compile(textbook_masked)
        made["textbook compiled step, masked"] = lambda: compiled(logits, z, 1 - t, 1 - s)
    return made | (_peers(logits, z, tokens, t, s) if peers else {})


def measure(made: Cases, rounds: int = 9, slow: int = 3) -> list[Result]:
    """Time all cases in turn, round by round, then measure the peak memory of each.

    A case with a median above one second is left out after the first ``slow`` rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in made}
    reads: dict[str, list[float]] = {name: [] for name in made}
    for run in made.values():
        run()  # first use compiles, allocates and faults pages
    reference, *others = made
    for turn in range(rounds):
        for name in others:
            if turn >= slow and statistics.median(taken[name]) > 1:
                continue
            made[reference]()  # what the case before it left behind is not its own
            one, seconds = _seconds(made[reference]), _seconds(made[name])
            taken[reference].append(one)
            reads[reference].append(1.0)
            taken[name].append(seconds)
            reads[name].append(seconds / one)
    found = []
    for name, run in made.items():
        with Meter() as meter:
            run()
        milliseconds = statistics.median(taken[name]) * 1e3
        found.append(Result(name, milliseconds, statistics.median(reads[name]), meter.peak / 2**20))
    return found


def report(problem: Problem, results: Sequence[Result]) -> dict[str, object]:
    """Return the machine, the problem and its results as a table that JSON can hold."""
    return {"machine": machine(), "problem": asdict(problem), "results": [asdict(result) for result in results]}


def textbook_masked(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """Take a masked step as it is usually written: every site draws from a posterior over V + 1 states.

    All sites draw by an exponential race. Sites that are not masks then discard the draw and keep their state.
    """
    move = (alpha_s - alpha_t) / (1 - alpha_t)
    p = torch.cat([logits.softmax(-1) * move, torch.full((*z.shape, 1), 1 - move, device=z.device).to(logits)], -1)
    drawn = (p / (1e-10 - (torch.rand_like(p) + 1e-10).log())).argmax(-1)
    return torch.where(z == logits.shape[-1], drawn, z)


def textbook_uniform(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """Take a uniform step as it is usually written.

    x0 is summed out of the posterior, and every site draws by an exponential race.

    Reference: Austin et al., 2021, https://arxiv.org/abs/2107.03006.
    """
    vocab, survival = logits.shape[-1], alpha_t / alpha_s
    x0 = logits.softmax(-1)
    own = torch.nn.functional.one_hot(z, vocab).to(x0)
    forward = survival * own + (1 - survival) / vocab
    backward = alpha_s * x0 + (1 - alpha_s) / vocab
    evidence = alpha_t * (x0 * own).sum(-1, keepdim=True) + (1 - alpha_t) / vocab
    p = forward * backward / evidence
    return (p / (1e-10 - (torch.rand_like(p) + 1e-10).log())).argmax(-1)


def _peers(logits: Tensor, z: Tensor, tokens: Tensor, t: float, s: float) -> Cases:
    return {
        "diffusers DiscreteDDIMScheduler.step, uniform": bench_peers.ddim(logits, tokens, t, s),
        "flow_matching Euler step, masked": bench_peers.euler(logits, z, t, s, logits.shape[-1] + 1),
    }


def _seconds(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    def names() -> Iterator[str]:
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
            yield from (line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))

    flags = torch.backends.cpu.get_cpu_capability()
    return f"{next(names(), platform.processor() or platform.machine())} ({flags})"
