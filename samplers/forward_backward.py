r"""Correct at a fixed time by adding noise and removing it again (forward-backward correctors).

Jumps with the forward rates R plus the reverse rates Rbar preserve p_t (Campbell et al., 2022). ``ForwardBackward``
noises a site from t to u and draws it back from its one-site reverse law. The leave-one-out prediction (LOO) gives this
law exactly, so the move is exact for one site. ``TauForwardBackward`` lets every site jump with the frozen rates
R + Rbar for a length h; its bias is O(h).

Reference: Campbell et al. (2022, https://arxiv.org/abs/2205.14987).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.choices import Coins, Subset, Tokens, spread
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Corrector, Invariance, State, choose
from discdiff.process import Process, RankOne
from discdiff.samplers.ancestral import reverse_tokens

__all__ = ["ForwardBackward", "TauForwardBackward"]


@dataclass(frozen=True)
class ForwardBackward(Corrector):
    """Noise ``sites`` sites of each row from the current time t to u, and draw them back; one denoiser call.

    Args:
        u: the time up to which noise is added. If t >= u the corrector is the identity.
        sites: the number of sites; 1 preserves p_t exactly, more only approximately.

    Raises:
        ValueError: for ``u`` outside (0, 1], or ``sites`` below 1.
    """

    u: float = 0.6
    sites: int = 1
    reads = "noisy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "u", real(self.u, "ForwardBackward: u", "(0, 1]"))
        object.__setattr__(self, "sites", whole(self.sites, "ForwardBackward: sites", 1))

    @property
    def invariant(self) -> Invariance:
        return "exact" if self.sites == 1 else "approximate"

    def __call__(self, state: State, at: At) -> State:
        if self.u <= state.t:
            return state
        alpha, later = at.alpha(state.t), at.alpha(self.u)
        where = choose("site", Subset(state.free, self.sites), state, at)
        noised = choose("noised", at.process.noised_further(state.tokens, where, alpha, later), state, at)
        # The LOO at a site does not depend on its own token, so at time t it is the same before and after noising.
        return state.at(reverse_tokens(state.at(noised), where, later, alpha, at))


@dataclass(frozen=True)
class TauForwardBackward(Corrector):
    """Let all sites jump for a length h of -log alpha, with the frozen sum of forward and reverse rates.

    It makes one denoiser call. At time 0 it is the identity: the reverse rates are not finite there, so frozen rates
    would leave noise.

    Args:
        h: the length, in the unit -log alpha, in which the forward process has rate 1.

    Raises:
        ValueError: for a length that is not positive; in sampling, if the process is not rank-one, or if the model does
            not determine the leave-one-out prediction at a site whose state may come from noise.
    """

    h: float = 0.05
    reads = "noisy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", real(self.h, "TauForwardBackward: h", "(0, inf)"))

    @property
    def invariant(self) -> Invariance:
        return "approximate"

    def check(self, process: Process) -> None:
        if process.rank_one is None:
            raise ValueError(f"{self} needs a process of rank one, got {process}")

    def __call__(self, state: State, at: At) -> State:
        process, z = at.rank_one, state.tokens
        free = state.free & (process.sitewise(at.alpha(state.t), z) < 1)
        if not bool(free.any()):
            return state
        view = at.predict(state)[free]
        backward, x, alpha = view.rates.rows, view.x, view.alpha.clamp(min=1e-290)

        def rows(n: Tensor) -> Tensor:
            back, own = backward.dense(n) + alpha[n][:, None].log(), process.column(x[n])[:, None]
            return kernels.log_add(back, _forward(process, x[n], alpha[n])).scatter(-1, own, -torch.inf)

        rates = view.computed(rows, empty=True, mixed=_mixed(process, view.mixed_rates(alpha), x, alpha))
        leaves = -torch.expm1(-self.h * spread(rates.known().log_sum_exp, free).exp())
        where = choose("where", Coins(leaves), state, at)
        column = choose("state", Tokens(rates.narrow(where), process.column(z)), state, at)
        return state.at(torch.where(where, process.place(column, z), z))


def _forward(process: RankOne, x: Int[Tensor, " n"], alpha: Float[Tensor, " n"]) -> Float[Tensor, "#n C"]:
    """Return the forward rates (n, C) from each state to every column; (1, C) if they are the same for all states."""
    if process.anchor(x) is None:
        return process.noise(x.device).pi[None]
    columns = torch.arange(process.columns, device=x.device).expand(len(x), -1)
    return process.inflow(process.place(columns, x[:, None].expand_as(columns)), alpha[:, None])[..., 0]


def _mixed(
    process: RankOne, back: kernels.Mixture | None, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]
) -> kernels.Mixed | None:
    """Return the sum of reverse and forward rates as mixtures that leave out each site's own column.

    None if ``back``, the mixtures of the reverse rates, is None.
    """
    if back is None:
        return None
    share = process.anchored_inflow(alpha)  # of forward jumps that go to the anchor
    forward = replace(
        back,
        place=torch.full_like(x, -1),
        level=1 - share,
        scale=torch.ones_like(alpha),
        spike=None if back.anchor is None else share,
        own=None,
        relative=False,
    )
    return kernels.Mixed((back, forward), without=process.column(x))
