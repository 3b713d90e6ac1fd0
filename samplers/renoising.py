r"""Sample the process ``AbsorbingUniform`` with fresh noise tokens: a revealed token can become noise again.

    x   ~ D(. | z, u) at hidden sites, z elsewhere
    z_s ~ q(z_s | z_t, x), the bridge of the uniform process
    u_s = z_s if z_s != x; else z_s with probability (1 - alpha_s) pi / (alpha_s + (1 - alpha_s) pi), or drawn from pi

A state is a pair of a token z and a noise token u. The last line draws from q(u | x, z_s). Given x, the pair (z_s, u_s)
has its joint law at time s, and (x, z_s, z_t) follows the joint law of the uniform process. ``Ancestral`` keeps the
noise token fixed, so its path (x, z_s, z_t) has another law.

Fresh noise tokens are drawn independently at each site. At two hidden sites this is not their joint law, and every step
repeats the error. So between times inside (0, 1) the law of the pairs does not converge to p_t (order 0). As t -> 0 no
site is hidden, and the error in the tokens vanishes: the measured order from noise to data is 1.

Reference: ReAUDM of Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from discdiff.choices import PointMixture
from discdiff.operator import At, Predictor, State, choose
from discdiff.process import AbsorbingUniform, Process, Uniform
from discdiff.samplers._choosing import draw_clean, hidden

__all__ = ["Renoising"]


@dataclass(frozen=True)
class Renoising(Predictor):
    """Take reverse steps of ``AbsorbingUniform`` with fresh noise tokens.

    A step makes one denoiser call, or none if no site is hidden.

    Raises:
        ValueError: in sampling, if the process is not ``AbsorbingUniform``.
    """

    order: ClassVar[float | None] = 0.0

    def check(self, process: Process) -> None:
        if not isinstance(process, AbsorbingUniform):  # any other source law has other noise tokens
            raise ValueError(f"{self} needs an AbsorbingUniform process, got {process}")

    def __call__(self, state: State, at: At) -> State:
        process = at.process.pairs
        assert process is not None  # ensured by ``check``
        masks = hidden(state, at)
        clean = draw_clean(state, masks, at) if bool(masks.any()) else state.tokens
        (x, _), (z, u) = process.split(clean), process.split(state.tokens)
        a_s = process.sitewise(at.alpha(at.s), x)
        plain = Uniform(process.vocab_size, process.schedule)
        z_s = choose("state", plain.bridge(z, x, state.t, at.s), state, at)
        pi = 1 / process.vocab_size
        own = torch.where(z_s == x, (1 - a_s) * pi / (a_s + (1 - a_s) * pi), 1.0)
        u_s = choose("noise token", PointMixture(plain.noise(x.device), [z_s], [own]), state, at)
        return state.at(torch.where(state.free, process.join(z_s, u_s), process.join(z, u)), at.s)
