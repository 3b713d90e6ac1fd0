"""Steps at small sizes, beside a plain PyTorch step of the same law and other packages' steps, and how they grow.

A step is one call of an operator on a state inside a run, the call of the denoiser among it, whose logits are at hand;
what ``Sampler.sample`` adds once a run is a case of its own. A step of another package goes from the same logits to
tokens. All is CPU time of one thread. Cases are timed in turn, round after round, and a ratio is the median over rounds
of the ratio within a round.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from discdiff import samplers
from discdiff.command import bench_peers
from discdiff.command.bench import Problem, states
from discdiff.command.verify import SHIPPED
from discdiff.denoiser import Denoiser
from discdiff.operator import Operator, Run
from discdiff.process import AbsorbingUniform, Linear, Masked, Process, Uniform
from discdiff.samplers.expression import parse_operator
from discdiff.sampling import Sampler
from discdiff.theory import MarkovChain

__all__ = [
    "BLOCKS", "CHAIN", "GROWTH", "PLAIN", "SINGLE", "SIZES", "SLOW", "Case", "Times", "growing", "interleaved", "named",
    "one_thread", "operators", "packages", "plain_masked", "plain_uniform", "plain_unmask", "ratio", "reference",
    "single", "slope", "steps",
]  # fmt: skip

Case = Callable[[], Callable[[], object]]  # prepares one call, which alone is timed
Times = Mapping[str, Sequence[float]]  # seconds of one call in each round, by case

SIZES = tuple(
    Problem(batch, length, vocab)
    for vocab, length, batch in ((2, 64, 1), (20, 64, 16), (50, 256, 16), (256, 256, 16), (2, 1024, 16))
)
PLAIN = {kind: f"plain step, {kind}" for kind in ("masked", "uniform", "unmask")}
BLOCKS = {"32": "BlockRefinement step, 32 sites", "all": "BlockRefinement step, all sites"}
CHAIN = "ancestral >> gibbs(8)"
SLOW = ("adaptive",)  # takes seconds a step, so it is timed at one size
SINGLE = "Sampler.sample, one masked step"


def named(problem: Problem) -> str:
    """The sizes of a problem in words."""
    return f"V={problem.vocab}, L={problem.length}, B={problem.batch}"


# --- what is timed --------------------------------------------------------------------------------------------------


def plain_masked(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """A masked step in torch, only the rows of the masks that are revealed."""
    revealed = (z == logits.shape[-1]) & (torch.rand(z.shape) < (alpha_s - alpha_t) / (1 - alpha_t))
    x = z.clone()
    x[revealed] = torch.multinomial(logits[revealed].softmax(-1), 1)[:, 0]
    return x


def plain_uniform(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """A uniform step in torch: the posterior with x0 summed out, at every site."""
    vocab, kept = logits.shape[-1], alpha_t / alpha_s
    backward = alpha_s * logits.softmax(-1) + (1 - alpha_s) / vocab
    posterior = backward * ((1 - kept) / vocab)
    posterior.scatter_add_(-1, z[..., None], kept * backward.gather(-1, z[..., None]))
    return torch.multinomial(posterior.flatten(0, 1), 1).view(z.shape)


def plain_unmask(logits: Tensor, z: Tensor, count: int) -> Tensor:
    """The ``count`` masks of each row whose largest probability is largest, drawn in torch."""
    vocab = logits.shape[-1]
    p = logits.softmax(-1)
    sites = p.amax(-1).masked_fill(z != vocab, -1).topk(count, -1).indices
    drawn = torch.multinomial(p.gather(1, sites[..., None].expand(-1, -1, vocab)).flatten(0, 1), 1)
    return z.scatter(1, sites, drawn.view(sites.shape))


def _called(operator: Operator, process: Process, state: Tensor, logits: Tensor, times: tuple[float, float]) -> Case:
    """One call of an operator inside a run; the run itself is made before the clock starts."""
    batch, (t, s) = len(state), times
    one = logits[:1]  # where an operator asks about more states than there are rows
    model = Denoiser(
        lambda x, time: logits if len(x) == batch else one.expand(len(x), -1, -1),
        process,
        "denoiser" if process.pairs else "loo",
    )

    def prepare() -> Callable[[], object]:
        begun = Run.start(model, batch, 0, device=state.device).begin(state, t, s, 1)
        return lambda: operator(*begun)

    return prepare


def steps(problem: Problem, logits: Tensor, only: Sequence[str] | None = None) -> dict[str, Case]:
    """Plain steps, then steps of the named operators on the masked and the uniform process, where they accept it.

    An operator that takes neither is called on ``AbsorbingUniform``.
    """
    vocab, (t, s) = problem.vocab, problem.times
    z, tokens = states(problem)
    count = max(1, round(problem.length * problem.share))
    made: dict[str, Case] = {
        PLAIN["masked"]: lambda: lambda: plain_masked(logits, z, 1 - t, 1 - s),
        PLAIN["uniform"]: lambda: lambda: plain_uniform(logits, tokens, 1 - t, 1 - s),
        PLAIN["unmask"]: lambda: lambda: plain_unmask(logits, z, count),
    }
    pairs = AbsorbingUniform(vocab, Linear())
    joint = pairs.join(tokens, torch.where(z == vocab, tokens, tokens.flip(0, 1)))
    starts: dict[str, tuple[Process, Tensor]] = {
        "masked": (Masked(vocab, Linear()), z),
        "uniform": (Uniform(vocab, Linear()), tokens),
        "absorbing uniform": (pairs, joint),
    }
    for text in only or operators():
        operator, found = parse_operator(text), 0
        for kind, (process, start) in starts.items():
            if kind == "absorbing uniform" and found:
                break
            with contextlib.suppress(ValueError):
                operator.check(process)
                made[f"{text}, {kind}"] = _called(operator, process, start, logits, (t, s))
                found += 1
    return made


def operators() -> list[str]:
    """Every shipped operator, as ``verify`` names them, those with a bound first."""
    return list(dict.fromkeys(("ancestral", CHAIN, "unmask('max_prob')", "split_leap", *SHIPPED)))


def reference(case: str) -> str:
    """The plain step that a step of an operator is compared with."""
    if case.startswith("unmask('max_prob')"):
        return PLAIN["unmask"]
    return PLAIN["uniform" if case.endswith("uniform") else "masked"]


def single(problem: Problem, logits: Tensor) -> dict[str, Case]:
    """A run of one masked step: a step, and what ``Sampler.sample`` adds to a run."""
    process = Masked(problem.vocab, Linear())
    model = Denoiser(lambda x, time: logits, process, "loo")
    sampler = Sampler(process, model, samplers.Ancestral(), grid=problem.times)
    z, _ = states(problem)
    return {SINGLE: lambda: lambda: sampler.sample(seed=0, initial=z)}


def packages(problem: Problem, logits: Tensor) -> dict[str, Case]:
    """Steps of diffusers and flow_matching.

    Raises:
        ImportError: where they are not installed.
    """
    (t, s), (z, tokens), vocab = problem.times, states(problem), problem.vocab
    made = {
        "DDIM step, uniform": bench_peers.ddim(logits, tokens, t, s),
        "Euler step, masked": bench_peers.euler(logits, z, t, s, vocab + 1),
        "Euler step, uniform": bench_peers.euler(logits, tokens, t, s, vocab),
        BLOCKS["32"]: bench_peers.block_refinement(logits, z, round(1 / problem.share), min(32, problem.length)),
        BLOCKS["all"]: bench_peers.block_refinement(logits, z, round(1 / problem.share), problem.length),
    }
    return {name: lambda run=run: run for name, run in made.items()}  # type: ignore[misc]


# --- how it is timed ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside a ``with`` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved(cases: Mapping[str, Case], rounds: int, most: float = 1.0) -> dict[str, list[float]]:
    """Measure the CPU seconds of one call of each case, in rounds that time all cases in turn.

    A round calls a case once to warm up, then one to five times: it stops once all these calls took 10 ms together. Its
    result is the median of the calls after the first. A case whose calls took more than ``most`` seconds in all is left
    out of later rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    spent = dict.fromkeys(cases, 0.0)
    with one_thread(), torch.no_grad():
        for _ in range(rounds):
            for name, prepare in cases.items():
                if spent[name] > most:
                    continue
                calls = [_seconds(prepare) for _ in range(2)]
                while len(calls) < 6 and sum(calls) < 10e-3:
                    calls.append(_seconds(prepare))
                taken[name].append(statistics.median(calls[1:]))
                spent[name] += sum(calls)
    return taken


def _seconds(prepare: Case) -> float:
    run = prepare()
    start = time.thread_time()
    run()
    return time.thread_time() - start


def ratio(times: Times, case: str, to: str) -> float:
    """The median over rounds of the ratio of two cases within a round."""
    return statistics.median(a / b for a, b in zip(times[case], times[to], strict=False))


# --- growth ---------------------------------------------------------------------------------------------------------

# Large enough that what does not grow is little, small enough that all sizes of a line stay in seconds.
GROWTH = {
    "L": [Problem(1, length, 4) for length in (2**15, 2**16, 2**17, 2**18)],
    "B": [Problem(batch, 64, 20) for batch in (512, 1024, 2048, 4096)],
    "V": [Problem(16, 64, vocab) for vocab in (2**13, 2**14, 2**15, 2**16)],
}
_GROWING = ("ancestral", CHAIN, "unmask('max_prob')", "split_leap")


def growing(variable: str) -> dict[str, dict[int, Case]]:
    """Cases by name and size, for one of "L", "B" and "V"; in L also the exact leave-one-outs of a Markov chain."""
    made: dict[str, dict[int, Case]] = {}
    for problem in GROWTH[variable]:
        size = {"L": problem.length, "B": problem.batch, "V": problem.vocab}[variable]
        for name, case in steps(problem, problem.logits(), _GROWING).items():
            if name not in PLAIN.values():
                made.setdefault(name, {})[size] = case
    if variable == "L":
        made["marginals of a Markov chain"] = {length: _chain(length) for length in (2**12, 2**13, 2**14, 2**15)}
    return made


def _chain(length: int) -> Case:
    model = MarkovChain(torch.ones(4) / 4, torch.full((4, 4), 0.1) + 0.6 * torch.eye(4), length).denoiser(
        Uniform(4, Linear())
    )
    _, tokens = states(Problem(1, length, 4))
    return lambda: lambda: model(tokens, 0.5).loo


def slope(sizes: Sequence[int], seconds: Sequence[Sequence[float]]) -> float:
    """The median over rounds of the least-squares slope of log seconds by log size within a round."""
    x = [math.log(size) for size in sizes]
    mean = statistics.fmean(x)
    weights = [(one - mean) / sum((other - mean) ** 2 for other in x) for one in x]
    found = [
        sum(w * math.log(y) for w, y in zip(weights, of_round, strict=True)) for of_round in zip(*seconds, strict=False)
    ]
    return statistics.median(found)
