r"""Redraw a few sites from their conditional given the other sites (the Gibbs corrector).

    p_t(z_i | z_{-i}) = O_i Q_t        with constant noise: alpha_t O_i + (1 - alpha_t) pi

The conditional needs only the leave-one-out prediction O. p_t stays invariant because the choice of sites, uniform or
in turn, does not depend on the tokens. A redraw of one site is exact; a redraw of several in parallel is not. On a
uniform process one call gives O at every site. On an absorbing process the denoiser D does not determine O at a
revealed site, so the chosen sites are hidden before the call.

References: Informed Correctors (Zhao et al., 2024, https://arxiv.org/abs/2407.21243); Uniform Diffusion Models
Revisited (2026, https://arxiv.org/abs/2605.22765).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from discdiff.checks import whole
from discdiff.choices import Subset
from discdiff.operator import At, Corrector, Invariance, State, choose
from discdiff.samplers._redraw import redraw

__all__ = ["Gibbs"]


@dataclass(frozen=True)
class Gibbs(Corrector):
    """Redraw ``sites`` sites of each row in parallel; one denoiser call, or several with a systematic scan.

    Args:
        sites: the number of sites; 1 preserves p_t exactly, more only approximately.
        scan: "random": uniformly chosen sites, in one call. "systematic": a sweep that redraws every site once, from
            left to right, in ceil(L / sites) calls; the sites of one call are evenly spaced, so they lie far apart.

    Raises:
        TypeError, ValueError: if ``sites`` is not a whole number of at least 1, or for an unknown scan.
    """

    sites: int = 1
    scan: Literal["random", "systematic"] = "random"
    reads = "hidden"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", whole(self.sites, "Gibbs: sites", 1))
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
    return state.at(redraw(replace(state, seen=at.predict(state)), where, at.alpha(state.t), at))
