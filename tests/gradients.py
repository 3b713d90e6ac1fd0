"""The table of gradients: autograd of a replayed run's log-probability against differences, counted.

    python tests/gradients.py            from the root of the checkout, with it and tests/ on the path: a part, by turns
    python tests/gradients.py --whole    all of it

A row of the table is an operator, a process, a kind of prediction and a clock. Its choices are drawn once; then the sum
of their log-probabilities is a function of the network's weights and of the clock's parameters, and its derivative in a
random direction is found twice. Where an operator takes the best, or compares with a threshold, its choice is constant
between kinks, and so is its log-probability.
"""

import itertools
import sys
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from problems import irreversible, turning
from pyro import poutine
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff.operator import Run
from discdiff.process import Schedule
from discdiff.samplers.informed_gibbs import Rule

__all__ = ["CLOCKS", "OPERATORS", "PREDICTS", "PROCESSES", "Outcome", "count", "derivatives", "examine", "rows"]

B, L, V = 3, 2, 3
TOLERANCE = 1e-6

OPERATORS: dict[str, list[dd.Operator]] = {
    "ARPC": [S.ARPC(temperature=0.7), S.ARPC("kl", 0.7), S.ARPC("gap", 0.7), S.ARPC("forward"), S.ARPC("entropy")],
    "DFM": [S.DFM(), S.DFM(1.5)],
    "P2": [S.P2(0.0), S.P2(0.5)],
    "Adaptive": [S.Adaptive(0.3, 0.2)],
    "Ancestral": [S.Ancestral(), S.Ancestral() >> S.Gibbs() ** 2],
    "AnchoredRemask": [S.AnchoredRemask(), S.AnchoredRemask(again=True)],
    "AnyOrder": [S.AnyOrder(), S.AnyOrder("entropy", noise=0.5)],
    "EntropyRedraw": [S.EntropyRedraw(0.7), S.EntropyRedraw(0.9, sites=1)],
    "RePaint": [S.RePaint(0.8), S.RePaint(0.9, S.Euler(), steps=2)],
    "EntropyBounded": [S.EntropyBounded()],
    "Euler": [S.Euler()],
    "FirstHitting": [S.FirstHitting()],
    "ForwardBackward": [S.ForwardBackward(0.8), S.ForwardBackward(0.8, sites=2)],
    "Gibbs": [S.Gibbs(), S.Gibbs(2, "systematic")],
    "Gillespie": [S.Gillespie()],
    "Greedy": [S.Greedy()],
    "InformedGibbs": [S.InformedGibbs(rule, exact) for rule in get_args(Rule) for exact in (True, False)],
    "KLStable": [S.KLStable(0.5, 0.5)],
    "LocallyBalanced": [S.LocallyBalanced(), S.LocallyBalanced("sqrt"), S.LocallyBalanced("min")],
    "MaximalCoupling": [S.MaximalCoupling()],
    "Multistep": [S.Multistep()],
    "ReMDM": [S.ReMDM(0.3), S.ReMDM(0.3, "rescale"), S.ReMDM(0.3, "rate"), S.ReMDM(0.3, confident=True)],
    "Remask": [S.Remask(0.4), S.Remask(0.4, sites=1)],
    "Renoising": [S.Renoising()],
    "Reveal": [S.Reveal(calls=2), S.Reveal("entropy", calls=2, noise=0.5)],
    "SplitLeap": [S.SplitLeap()],
    "TauForwardBackward": [S.TauForwardBackward(0.3)],
    "TauLeaping": [S.TauLeaping(), S.TauLeaping("reject")],
    "TauLocallyBalanced": [S.TauLocallyBalanced(0.3), S.TauLocallyBalanced(0.3, "max")],
    "ThetaRK2": [S.ThetaRK2(0.6)],
    "ThetaTrapezoidal": [S.ThetaTrapezoidal(0.4)],
    "Thinning": [S.Thinning()],
    "Threshold": [S.Threshold(0.6)],
    "Uniformization": [S.Uniformization()],
    "Unmask": [S.Unmask(), S.Unmask("margin", noise=0.5), S.Unmask("max_prob", noise=0.5), S.Unmask(draw_first=True)],
}  # fmt: skip

PI = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

PROCESSES: dict[str, Callable[[dd.Schedule], dd.Process]] = {
    "Masked": lambda clock: dd.Masked(V, clock),
    "Masked inside": lambda clock: dd.Masked(V, clock, mask_id=1),
    "Uniform": lambda clock: dd.Uniform(V, clock),
    "Marginal": lambda clock: dd.Marginal(PI, clock),
    "Hybrid": lambda clock: dd.Hybrid(V, clock, p_uniform=0.4),
    "Hybrid function": lambda clock: dd.Hybrid(V, clock, p_uniform=lambda alpha: 0.2 + 0.3 * alpha),
    "Ordinal": lambda clock: dd.Ordinal(V, clock),
    "General": lambda clock: dd.General(irreversible(V), clock),
    "TimeVarying": lambda clock: dd.TimeVarying(
        turning(V), dd.LogLinear(0.01) if clock == dd.Linear() else clock, pieces=5
    ),
    "AbsorbingUniform": lambda clock: dd.AbsorbingUniform(V, clock),
    "Interpolant": lambda clock: dd.Interpolant(V, clock, PI, p_uniform=0.3),
}

PREDICTS = ("denoiser", "loo", "ratio")

# what may be said of a row: the operator is not for the process, the clock or the prediction
REFUSALS = (" needs ", "is undefined at", "its clock cannot be learned", "is never reached")


class Power(Schedule):
    """A user's own schedule with a parameter, alpha(t) = 1 - t^k."""

    def __init__(self, k: nn.Parameter) -> None:
        self.k = k

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.k

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -self.k * t ** (self.k - 1)

    def _time(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) ** (1 / self.k)


def _fixed(learned: nn.ParameterDict) -> dd.Schedule:
    return dd.Linear()


def _function(learned: nn.ParameterDict) -> dd.Schedule:
    bend = learned["bend"] = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    return dd.process.as_schedule(lambda t: 1 - 0.99 * t ** bend.exp())


def _formula(learned: nn.ParameterDict) -> dd.Schedule:
    learned["k"] = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    return Power(learned["k"])


def _sites(learned: nn.ParameterDict) -> dd.Schedule:
    learned["log_power"] = nn.Parameter(torch.zeros(L, dtype=torch.float64))  # equal clocks are learned apart too
    return dd.PerSite(dd.Linear(), learned["log_power"])


CLOCKS: dict[str, Callable[[nn.ParameterDict], dd.Schedule]] = {
    "fixed": _fixed,
    "learned function": _function,
    "learned formula": _formula,
    "learned sites": _sites,
}


class Network(nn.Module):
    """Any function of all sites and the time, with logits of tokens; float64."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = states
        self.inner = nn.Linear(L * states, 8, dtype=torch.float64)
        self.time = nn.Linear(1, 8, dtype=torch.float64)
        self.out = nn.Linear(8, L * V, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.inner(nn.functional.one_hot(x, self.states).flatten(1).double())
        time = time.double() if time.ndim == 1 else time.double().mean(-1)
        return self.out(torch.tanh(h + self.time(time[:, None]))).unflatten(-1, (L, V))


def denoiser(process: dd.Process, predicts: str, network: Network) -> dd.Denoiser:
    """The network as any of the three predictions; a ratio is made of a leave-one-out, so that it can be one."""
    if predicts != "ratio":
        return dd.Denoiser(network, process, predicts, length=L, time_dtype=torch.float64)

    def ratio(x: Tensor, alpha: Tensor) -> Tensor:
        logits = network(x, alpha)
        site_alpha = (alpha if alpha.ndim == 2 else alpha[:, None]).expand(x.shape).clamp(min=1e-3)  # finite at 0 too
        if process.mask_id is not None and process.mask_id < V:
            logits = logits.index_fill(-1, torch.tensor([process.mask_id]), -torch.inf)
        log_c = process.conditional(logits.log_softmax(-1).flatten(0, 1), x.flatten(), site_alpha.flatten())
        log_c = log_c.unflatten(0, tuple(x.shape))
        own = log_c.gather(-1, process.column(x)[..., None])
        return torch.where(own > -torch.inf, log_c - own, 0.0)

    return dd.Denoiser(ratio, process, "ratio", time="alpha", length=L, time_dtype=torch.float64)


@dataclass
class Outcome:
    """How a row of the table ended: "right", "refused" or "wrong"; and the largest relative error, or what was said."""

    kind: str
    error: float = 0.0
    said: str = ""


def program(operator: dd.Operator, process: dd.Process, model: dd.Denoiser, grid: list[float]) -> Callable[[], Tensor]:
    """Two or three steps of an operator from fixed states; the only place that makes a ``Run``."""
    tokens = _start(process, operator.moves)

    def steps() -> Tensor:
        run = Run.start(model, B, 5, listen=True)
        state, _ = run.begin(tokens, grid[0])
        for step, (t, s) in enumerate(itertools.pairwise(grid), start=1):
            state = operator(state, dd.At(process, run, t, s if operator.moves else t, step))
            if not operator.moves:
                state = state.at(state.tokens, s)
        return state.tokens

    return steps


def _start(process: dd.Process, moves: bool) -> Tensor:
    """The prior's states; for a corrector those of the middle, where sites of an absorbing process may hold tokens."""
    torch.manual_seed(1)
    if moves:
        return process.prior(B, L).sample()
    return process.marginal(process.data_tokens[torch.randint(len(process.data_tokens), (B, L))], 0.6).sample()


def derivatives(function: Callable[[], Tensor], parameters: list[nn.Parameter], step: float) -> tuple[Tensor, Tensor]:
    """The derivative of a function in one random direction of its parameters, by autograd and by differences."""
    directions = [torch.randn_like(parameter) for parameter in parameters]
    with torch.enable_grad():
        value = function()
        known = value.requires_grad
        slopes = torch.autograd.grad(value, parameters, allow_unused=True) if known else [None] * len(parameters)
    by_autograd = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True) if s is not None)
    start, values = [parameter.detach().clone() for parameter in parameters], []
    with torch.no_grad():
        for factor in (1, -1, 2, -2, 0):
            for parameter, at, direction in zip(parameters, start, directions, strict=True):
                parameter.copy_(at + factor * step * direction)
            values.append(function())
    torch.testing.assert_close(values.pop(), value.detach(), rtol=1e-14, atol=1e-14)  # equal, but for least squares
    one, less, two, least = values
    return torch.as_tensor(by_autograd), (8 * (one - less) - (two - least)) / (12 * step)


def examine(operator: dd.Operator, process_name: str, predicts: str, clock: str) -> Outcome:
    """One row of the table."""
    torch.manual_seed(0)
    learned = nn.ParameterDict()
    try:
        process = PROCESSES[process_name](CLOCKS[clock](learned))
        operator.check(process)
        network = Network(process.states)
        model = denoiser(process, predicts, network)
        start = 0.9 if predicts == "ratio" else 1.0  # a ratio says nothing at alpha = 0
        grid = [start, 0.55, 0.27, 0.0] if operator.moves else [0.7, 0.4, 0.2]
        run = program(operator, process, model, grid)
        with torch.no_grad():
            trace = poutine.trace(run).get_trace()
    except ValueError as error:
        return Outcome("refused", said=str(error))

    def log_prob() -> Tensor:
        return torch.as_tensor(poutine.trace(poutine.replay(run, trace=trace)).get_trace().log_prob_sum())

    parameters, errors = [*network.parameters(), *learned.parameters()], []
    for step in (1e-4, 1e-5, 1e-6):  # a smaller one where a kink, or another number of rows, lies within the first
        try:
            found, right = derivatives(log_prob, parameters, step)
        except ValueError as error:
            return Outcome("refused", said=str(error))
        except (RuntimeError, IndexError):  # rows that are drawn by another path have no log-probability
            continue
        errors.append(float((found - right).abs() / (right.abs() + 1e-4)))
        if errors[-1] <= TOLERANCE:
            return Outcome("right", errors[-1])
    return Outcome("wrong", min(errors, default=float("nan")))


def rows(whole: bool, only: str | None = None) -> Iterator[tuple[dd.Operator, str, str, str]]:
    """The rows of the table: all, or for an operator and a process one kind of prediction and one clock, by turns.

    ``only`` keeps the rows of the operator of that name.
    """
    pairs = list(itertools.product(PREDICTS, CLOCKS))
    for n, (name, variants) in enumerate(OPERATORS.items()):
        if only not in (None, name):
            continue
        for (v, operator), (p, process) in itertools.product(enumerate(variants), enumerate(PROCESSES)):
            if whole:
                yield from ((operator, process, *pair) for pair in pairs)
            elif (v == 0 and process in ("Masked", "Uniform")) or (n + v + p) % (5 if v else 3) == 0:
                yield operator, process, *pairs[(n + 5 * v + 7 * p) % len(pairs)]


def count(whole: bool, only: str | None = None) -> tuple[Tally[str], list[str]]:
    """How many rows were right, refused and wrong; and the wrong ones, with those that were refused strangely."""
    found: Tally[str] = Tally()
    wrong = []
    for row in rows(whole, only):
        outcome = examine(*row)
        found[outcome.kind] += 1
        if outcome.kind == "wrong" or (outcome.kind == "refused" and not any(x in outcome.said for x in REFUSALS)):
            wrong.append(f"{row}: {outcome.error:.2g} {outcome.said}")
    return found, wrong


def main() -> None:
    found, wrong = count("--whole" in sys.argv)
    print("\n".join(wrong))
    print(f"{found['right']} right, {found['refused']} refused, {found['wrong']} wrong")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
