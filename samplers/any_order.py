r"""Reveal one token per denoiser call, in any order; the law at time 0 is exact for every selection rule.

The site is chosen from the revealed tokens alone, and its token is drawn from its law given those tokens. The product

    p0(x) = prod_k p0(x_{i_k} | x_{i_1}, ..., x_{i_{k-1}})

holds for every order that is chosen in this way.

References: ARDM (Hoogeboom et al., 2022, https://arxiv.org/abs/2110.02037); masked diffusion as any-order models (Shi
et al., 2024, https://arxiv.org/abs/2406.04329; Ou et al., 2025, https://arxiv.org/abs/2406.03736).
"""

from dataclasses import dataclass, replace

import torch

from discdiff.operator import At, Predictor, State
from discdiff.process import Process
from discdiff.samplers._choosing import Select, check_mask, quota
from discdiff.samplers.unmask import Unmask, reveal

__all__ = ["AnyOrder"]


@dataclass(frozen=True)
class AnyOrder(Predictor):
    """Reveal masks in the order of ``Unmask``, one token per denoiser call.

    L masks take L calls in all, on any grid; [1, 0] suffices.

    Args:
        select, noise, block: as in ``Unmask``.

    Raises:
        ValueError: as in ``Unmask``.
    """

    select: Select = "random"
    noise: float = 0.0
    block: int | None = None

    def __post_init__(self) -> None:
        checked = Unmask(self.select, self.noise, self.block)
        object.__setattr__(self, "noise", checked.noise)
        object.__setattr__(self, "block", checked.block)

    @property
    def weighable(self) -> bool:
        return Unmask(self.select, self.noise, self.block).weighable

    @property
    def nfe(self) -> float | None:
        return None  # L in all, for any number of steps

    def check(self, process: Process) -> None:
        check_mask(self, process)

    def __call__(self, state: State, at: At) -> State:
        due, tokens, turn = quota(state, at), state.tokens, 1
        how = Unmask(self.select, self.noise, self.block)
        while len(rows := (due >= turn).nonzero()[:, 0]):
            some = replace(state, tokens=tokens, seen=None).select(rows)
            after = reveal(some, how, torch.ones_like(rows), at.again(turn))
            tokens = tokens.index_copy(0, rows, after.tokens)
            turn += 1
        return state.at(tokens, at.s)
