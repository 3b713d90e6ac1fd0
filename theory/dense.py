"""Compute what checks of a process need: times to test, random predictions, laws from its transition matrix."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from discdiff.choices import Choice
from discdiff.process import Process

__all__ = ["ALPHAS", "beliefs", "far", "gathered", "given", "instants", "pairs", "rows", "spread"]

ALPHAS = (0.0, 1e-12, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-7, 1.0)
FAR_APART = ((0.0, 0.5), (0.0, 1.0), (1e-12, 0.9), (0.1, 0.99), (0.5, 1 - 1e-7), (0.1, 1.0), (0.9, 1.0))


def far(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference between entries of two tensors; 0 if they are empty."""
    return float((a - b).abs().max()) if a.numel() else 0.0


def instants(process: Process, least: float = 0.0, most: float = 1.0) -> Iterator[tuple[float, str]]:
    """Yield (time, name) for each alpha of ``ALPHAS`` between ``least`` and ``most``, the latest time first."""
    end = float(process.schedule.alpha(1.0))
    for alpha in dict.fromkeys(max(alpha, end) for alpha in ALPHAS):
        if least <= alpha <= most:
            t = 1.0 if alpha == end else float(process.schedule.time(alpha))
            yield t, f"alpha = {_short(alpha)}"


def pairs(process: Process) -> Iterator[tuple[float, float, str]]:
    """Yield pairs of times (t, s) with s <= t, and a name for each pair.

    The pairs are neighbours in ``instants``, equal times, and times that are far apart.
    """
    found = list(instants(process))
    names = {name: t for t, name in found}
    for (t, name), (s, other) in itertools.pairwise(found):
        yield t, s, f"{name} from {other}"
        yield t, t, f"{name} twice"
    for late, early in FAR_APART:
        one, other = f"alpha = {_short(late)}", f"alpha = {_short(early)}"
        if one in names and other in names:
            yield names[one], names[other], f"{one} from {other}"


def _short(alpha: float) -> str:
    return f"1 - {1 - alpha:.0e}" if 0.999 < alpha < 1 else f"{alpha:g}"


def rows(law: Choice, states: int) -> Tensor:
    """Compute the probability of each state in each row of a batch with one site, (N, S), from ``log_prob``."""
    return torch.stack([law.log_prob(torch.full((law.batch_shape[0], 1), z)).exp() for z in range(states)], -1)


def spread(process: Process) -> tuple[Tensor, Tensor]:
    """Return a time for every site of 64 sequences of 3 sites, (64, 3), and its index in a list of times, (64, 3).

    The list has the times of ``instants`` with .01 <= alpha <= .999.

    The times within a row mostly differ.
    """
    times = torch.tensor([t for t, _ in instants(process, 0.01, 0.999)], dtype=torch.float64)
    index = (torch.arange(64)[:, None] * torch.tensor([1, 3, 5]) + torch.arange(3)) % len(times)
    return times[index], index


def beliefs(process: Process, t: float, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a random leave-one-out prediction O for each state in x.

    By default x has all states that are reachable at time t.

    Return log O (N, V), O over the n data tokens (N, n), the states x (N,) and alpha (N,).
    """
    x = (process.marginals(t).sum(0) > 0).nonzero()[:, 0] if x is None else x
    data = process.data_tokens
    weights = torch.rand(len(x), len(data), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    o = weights / weights.sum(-1, keepdim=True)
    log_o = torch.full((len(x), process.vocab_size), -torch.inf, dtype=torch.float64)
    log_o[:, data] = o.log()
    return log_o, o, x, torch.full((len(x),), process.schedule.alpha(t), dtype=torch.float64)


def given(process: Process, x: Tensor, t: float) -> Tensor:
    """Compute q_t(. | v) over states for each state in x and every data token v, (N, n, S).

    On an Interpolant it is also conditioned on the source token in x.
    """
    q = process.marginals(t).expand(len(x), -1, -1)
    if process.pairs is None:
        return q
    same = process.pairs.split(torch.arange(process.states))[1] == process.pairs.split(x)[1][:, None]
    q = q * same[:, None]
    return q / q.sum(-1, keepdim=True)


def gathered(process: Process, x: Tensor, c: Tensor | Sequence[Tensor]) -> Tensor:
    """Select the numbers of the states to which a site in state x[i] can move, in the order of columns.

    Row i of c (N, S) has the numbers of all states for x[i]. If c is (N, N, S), c[i, i] is used as row i.
    """
    c = torch.as_tensor(c)
    c = c.diagonal(dim1=0, dim2=1).T if c.ndim == 3 else c
    columns = torch.arange(process.columns).expand(len(x), -1)
    return c.gather(-1, process.place(columns, x[:, None]))
