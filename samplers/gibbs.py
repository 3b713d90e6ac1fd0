r"""The random-scan Gibbs corrector: redraw a few sites from their conditional given the rest.

    p_t(z_i | z_{-i}) = O_i Q_t,       alpha_t O_i + (1 - alpha_t) pi on a process of rank one

needs only the leave-one-out prediction O. The sites are chosen uniformly and without looking at the tokens, which is
what keeps p_t invariant; one site is exact, several in parallel are not. A uniform process gives O at every site in
one call; an absorbing one hides it at a revealed site, so the chosen sites are masked before the call.

References: Informed Correctors (Zhao et al., 2024); Uniform Diffusion Models Revisited (2026).
"""

from dataclasses import dataclass

import torch

from discdiff.events import Subset
from discdiff.handlers import At, choose
from discdiff.operator import Corrector, Invariance
from discdiff.samplers.redraw import redraw
from discdiff.state import State

__all__ = ["Gibbs"]


@dataclass(frozen=True)
class Gibbs(Corrector):
    """Redraw ``sites`` uniformly chosen sites of each row in parallel; one denoiser call.

    Args:
        sites: how many; 1 keeps p_t exactly, more only approximately.

    Raises:
        TypeError, ValueError: if ``sites`` is not a whole number of at least 1.
    """

    sites: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.sites, bool) or not isinstance(self.sites, int):
            raise TypeError(f"Gibbs: sites must be a whole number, got {self.sites!r}")
        if self.sites < 1:
            raise ValueError(f"Gibbs: sites must be at least 1, got {self.sites}")

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.sites == 1 else "approximate"

    def __call__(self, state: State, at: At) -> State:
        where = choose("where", Subset(state.free, self.sites), state, at)
        if at.process.absorbing:
            state = state.at(torch.where(where, at.process.hide(state.tokens), state.tokens))
        return redraw(state, where, at.predict(state), at.alpha(state.t), at)
