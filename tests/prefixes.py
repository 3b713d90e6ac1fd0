"""The exact law of a program by brute force: every prefix of choices is a row, and nothing is merged or taken apart.

This is what ``theory.kernel`` must equal. Its cost is the number of joint choices, so it is for tiny worlds.
"""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

import discdiff as dd
from discdiff.choices import Choice
from discdiff.operator import Run, listening
from discdiff.theory.world import all_states, state_index


class _Fork(Exception):
    def __init__(self, name: str, choice: Choice, rows: Tensor) -> None:
        self.name, self.choice, self.rows = name, choice, rows


class _Prefixes(Messenger):
    """Answers each site from the prefixes of the rows that reach it."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.start = torch.arange(states)
        self.log_weight = torch.zeros(states, dtype=torch.float64)
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        rows = msg["fn"].key.ids
        if msg["name"] not in self.values:
            raise _Fork(msg["name"], msg["fn"], rows)
        msg["value"], msg["done"], msg["stop"] = self.values[msg["name"]][rows], True, True

    def extend(self, fork: _Fork) -> None:
        parent, value, log_p = fork.choice.fork()
        elsewhere = torch.ones(len(self.start), dtype=torch.bool)
        elsewhere[fork.rows] = False
        kept = elsewhere.nonzero()[:, 0]
        source = torch.cat([kept, fork.rows[parent]])
        self.start, self.log_weight = self.start[source], self.log_weight[source]
        self.log_weight[len(kept) :] += log_p.double()
        self.values = {name: old[source] for name, old in self.values.items()}
        self.values[fork.name] = torch.cat([value.new_zeros(len(kept), *value.shape[1:]), value])


@torch.no_grad()
def brute_force(
    operator: dd.Operator,
    process: dd.Process,
    model: dd.Denoiser,
    t: float,
    s: float | None = None,
    frozen: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """The matrix of ``theory.kernel``, by joint prefixes."""
    size = model.length if length is None else length
    assert size is not None
    z = all_states(process.states, size)
    prefixes = _Prefixes(len(z))
    while True:
        rows = len(prefixes.start)
        here = None if frozen is None else frozen.expand(rows, -1)
        begun = Run.start(model, rows, 0, listen=True).begin(z[prefixes.start], t, s, 1, here)
        try:
            with listening(), prefixes:
                after = operator(*begun)
        except _Fork as fork:
            prefixes.extend(fork)
            continue
        end = state_index(after.tokens, process.states)
        matrix = torch.zeros(len(z), len(z), dtype=torch.float64)
        return matrix.index_put_((prefixes.start, end), prefixes.log_weight.exp(), accumulate=True)
