r"""Mask and uniform noise together, with shares that change with time.

    q_t(z | x) = alpha_t 1(z = x) + m_t 1(z = mask) + (1 - alpha_t - m_t) / V

Not every pair of curves alpha_t, m_t defines a process. Let h be the odds of a noise state, its mass divided by alpha.
The rate into this state is alpha dh/dsigma, so the odds of the mask and of uniform tokens must both increase with time.
``Blend`` defines the shares and raises ValueError if they need a negative rate.

Reference: GIDD (von Ruette et al., 2025, https://arxiv.org/abs/2503.04482).
"""

from collections.abc import Callable
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real, shown
from discdiff.process.rank_one import RankOne
from discdiff.process.schedule import Schedule

__all__ = ["Blend", "Hybrid"]


class Blend:
    r"""The shares of an anchor and of uniform tokens in the noise, as a function of alpha.

    A float p gives GIDD's law with gamma = 1 (von Ruette et al., 2025, https://arxiv.org/abs/2503.04482). Let tau be
    GIDD's time, o = tau / (1 - tau), m the mass of the anchor and u the mass of uniform tokens:

        m / alpha = o,   u / alpha = B sqrt(o),   B = 2 p / (1 - p),   (1 - alpha) / alpha = o + B sqrt(o)

    The mass u is largest at tau = 1/2, where it is p, and 0 at both ends of time. Both m / alpha and u / alpha increase
    with time, so the generator is valid for every p in [0, 1).

    Instead of p, a function may give the share of uniform tokens in the noise at each alpha. The function is
    checked at 1000 values of alpha.

    Raises:
        TypeError, ValueError: if p is not in [0, 1), or the function needs a negative rate somewhere.
    """

    def __init__(self, p_uniform: float | Callable[[Tensor], Tensor], name: str) -> None:
        self.p_uniform = p_uniform
        if not callable(p_uniform):
            self.p_uniform = real(p_uniform, f"{name}: p_uniform", "[0, 1)", " or be a function of alpha")
            return
        alpha = torch.linspace(1, 0, 1002, dtype=torch.float64)[1:-1]
        share = p_uniform(alpha)
        if not isinstance(share, Tensor) or share.shape != alpha.shape:
            raise TypeError(f"{name}: p_uniform must give a share for every alpha, elementwise, got {shown(share)}")
        outside = ~((share >= 0) & (share <= 1))
        if bool(outside.any()):
            k = int(outside.nonzero()[0])
            raise ValueError(
                f"{name}: the uniform share must lie in [0, 1], got {float(share[k]):g} at alpha = {alpha[k]:g}"
            )
        odds = (1 - alpha) / alpha
        for who, part in (("uniform tokens", share), ("the mask", 1 - share)):
            falls = (odds * part).diff() < -1e-12 * odds[1:]
            if bool(falls.any()):
                k = int(falls.nonzero()[0])
                raise ValueError(
                    f"{name}: no generator has this noise: the odds of {who} would fall with time near "
                    f"alpha = {alpha[k]:.3g}, which needs a negative rate"
                )

    def anchored(self, alpha: Tensor) -> Tensor:
        """Return m, the mass on the anchor, at each alpha."""
        if callable(self.p_uniform):
            return (1 - alpha) * (1 - self.p_uniform(alpha))
        return self._root(alpha) ** 2 if self.p_uniform > 0 else 1 - alpha

    def inflow(self, alpha: Tensor) -> Tensor:
        """Return m - alpha dm/dalpha, the share of jumps that go to the anchor; m is ``anchored(alpha)``."""
        if callable(self.p_uniform):
            wanted = torch.is_grad_enabled() and alpha.requires_grad
            with torch.enable_grad():
                variable = alpha if wanted else alpha.detach().clone().requires_grad_()
                mass = self.anchored(variable)
                (slope,) = torch.autograd.grad(mass.sum(), variable, create_graph=wanted)
                share = mass - variable * slope
            return share if wanted else share.detach()
        root, uniform = 2 * self._root(alpha), self._b * alpha.sqrt()
        # at B = 0 and alpha = 1 it is 0/0; the limit is 1: every jump goes to the anchor
        return torch.where(root + uniform > 0, root / (root + uniform).clamp(min=1e-300), 1.0)

    @property
    def _b(self) -> float:
        assert not callable(self.p_uniform)
        return 2 * self.p_uniform / (1 - self.p_uniform)

    def _root(self, alpha: Tensor) -> Tensor:
        """Return sqrt(alpha o), o as in ``Blend``, from the quadratic equation; it is exact at both ends of time."""
        return (
            2 * (1 - alpha) / (self._b * alpha.sqrt() + (self._b**2 * alpha + 4 * (1 - alpha)).sqrt()).clamp(min=1e-300)
        )


class Hybrid(RankOne):
    """Process whose noise is the mask or a uniform token, with shares that change with time; it has V + 1 states.

    Reference: GIDD (von Ruette et al., 2025, https://arxiv.org/abs/2503.04482).

    Args:
        vocab_size: V, the number of tokens.
        schedule: the noise schedule.
        p_uniform: a float in [0, 1), the largest probability of a uniform token at any time, for GIDD's law; or a
            function of alpha that gives the share of uniform tokens in the noise.

    Raises:
        ValueError: if a rate would be negative somewhere; the error names the alpha.
    """

    def __init__(
        self,
        vocab_size: SupportsIndex,
        schedule: Schedule | Callable[[Tensor], Tensor],
        p_uniform: float | Callable[[Tensor], Tensor] = 0.1,
    ) -> None:
        super().__init__(vocab_size, schedule)
        self.mask_id: int = self.vocab_size
        self._blend = Blend(p_uniform, "Hybrid")

    @property
    def pi(self) -> Float[Tensor, " S"]:
        pi = torch.full((self.vocab_size + 1,), 1 / self.vocab_size, dtype=torch.float64)
        pi[self.mask_id] = 0
        return pi

    def anchor(self, x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        return torch.full_like(x, self.mask_id)

    def anchored(self, alpha: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return self._blend.anchored(alpha)

    def anchored_inflow(self, alpha: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return self._blend.inflow(alpha)

    def with_schedule(self, schedule: Schedule) -> "Hybrid":
        return Hybrid(self.vocab_size, schedule, self._blend.p_uniform)

    def _identity(self) -> tuple[object, ...]:
        return self.vocab_size, self.schedule, self._blend.p_uniform

    def __repr__(self) -> str:
        return f"Hybrid({self.vocab_size}, {self.schedule}, p_uniform={self._blend.p_uniform})"
