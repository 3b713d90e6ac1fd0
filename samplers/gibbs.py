r"""The Gibbs corrector: redraw a few sites from their conditional given the rest.

    p_t(z_i | z_{-i}) = O_i Q_t,       alpha_t O_i + (1 - alpha_t) pi on a process of rank one

needs only the leave-one-out prediction O. The sites are chosen without looking at the tokens, uniformly or in turn,
which is what keeps p_t invariant; one site is exact, several in parallel are not. A uniform process gives O at every
site in one call; an absorbing one hides it at a revealed site, so the chosen sites are masked before the call.

References: Informed Correctors (Zhao et al., 2024); Uniform Diffusion Models Revisited (2026).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.events import Subset
from discdiff.handlers import At, choose
from discdiff.operator import Corrector, Invariance
from discdiff.samplers.redraw import redraw
from discdiff.state import State

__all__ = ["Gibbs"]


@dataclass(frozen=True)
class Gibbs(Corrector):
    """Redraw ``sites`` sites of each row in parallel; one denoiser call.

    Args:
        sites: how many; 1 keeps p_t exactly, more only approximately.
        scan: "random": uniformly chosen ones, in one call. "systematic": a whole sweep, every site once from left to
            right, a call for each; several at a time are evenly spaced, so that those redrawn together lie far apart.

    Raises:
        TypeError, ValueError: if ``sites`` is not a whole number of at least 1, or for another scan.
    """

    sites: int = 1
    scan: Literal["random", "systematic"] = "random"
    reads = "hidden"

    def __post_init__(self) -> None:
        if isinstance(self.sites, bool) or not isinstance(self.sites, int):
            raise TypeError(f"Gibbs: sites must be a whole number, got {self.sites!r}")
        if self.sites < 1:
            raise ValueError(f"Gibbs: sites must be at least 1, got {self.sites}")
        if self.scan not in ("random", "systematic"):
            raise ValueError(f"Gibbs: scan must be 'random' or 'systematic', got {self.scan!r}")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(sites={self.sites}{'' if self.scan == 'random' else ', scan=' + repr(self.scan)})"
        )

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.sites == 1 else "approximate"

    @property
    def nfe(self) -> float | None:
        return 1.0 if self.scan == "random" else None  # L / sites, rounded up

    def __call__(self, state: State, at: At) -> State:
        if self.scan == "random":
            return _redrawn(state, choose("where", Subset(state.free, self.sites), state, at), at)
        length = state.tokens.shape[1]
        stride = -(-length // self.sites)
        phase = torch.arange(length, device=state.tokens.device) % stride
        for turn in range(stride):
            state = _redrawn(state, state.free & (phase == turn), at.again(turn + 1))
        return state


def _redrawn(state: State, where: Bool[Tensor, "B L"], at: At) -> State:
    if at.process.absorbing:
        state = state.at(torch.where(where, at.process.hide(state.tokens), state.tokens))
    return redraw(state, where, at.predict(state), at.alpha(state.t), at)
