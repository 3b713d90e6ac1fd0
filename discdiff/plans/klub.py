r"""The additive bound on the KL of a plan: one term for each step, exact on small worlds or from data.

Let R(z_s | z_t) be the true reverse step of the process and K the kernel of the plan's step. By the chain rule and the
data-processing inequality

    KL(p0 || law) <= KL(p_1 || prior) + sum_i E_{z ~ p_{t_i}} KL(R(. | z) || K(. | z))          (KLUB)

The terms do not depend on the other steps, so dynamic programming finds the plan with the least bound. A term is
infinite if the step excludes something that the true step may do, such as ``Unmask``, whose number of masks is fixed;
``Reveal`` has finite terms in every order.

From data x0 the term of a step is estimated, up to a part that depends on the times alone, by

    E[ log q(z_t | z_s) - log K(z_s | z_t) ],       z_s ~ q(. | x0),  z_t ~ q(. | z_s)

This sum over a plan is its discrete-time likelihood bound. ``KLUB(data=)`` subtracts the same sum over all steps of the
fine grid with the first choice of the search: the network itself is the reference. A value may be below 0.

References: jump your steps (Park et al., 2024, https://arxiv.org/abs/2410.07761); D3PM (Austin et al., 2021,
https://arxiv.org/abs/2107.03006).
"""

from typing import SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from discdiff.checks import seeded, shown
from discdiff.plans.intervals import Measured, measure
from discdiff.plans.matrices import Matrices, Owner
from discdiff.plans.objectives import Objective
from discdiff.process import Process
from discdiff.sampling import Sampler, Step
from discdiff.theory import Enumeration
from discdiff.theory.consistency import joint_of_times
from discdiff.theory.world import law_of_prior

__all__ = ["KLUB"]


class KLUB(Objective):
    """The bound KLUB on KL(p0 || law), a sum over steps: exact for a small world, or estimated from data.

    Args:
        world: a listed data law; the terms are exact. The steps may take any operator without memory.
        data: (N, L) data tokens instead; the terms are estimated with the network as the reference. The steps take
            ``Ancestral`` with any guides and models.
        seed: the seed of the noise of the estimate.

    Raises:
        TypeError: unless exactly one of ``world`` and ``data`` is given, or for an operator that it does not take.
    """

    def __init__(
        self, world: Enumeration | None = None, *, data: Int[Tensor, "N L"] | None = None, seed: SupportsIndex = 0
    ) -> None:
        if (world is None) == (data is None) or not (world is None or isinstance(world, Enumeration)):
            raise TypeError(f"KLUB: takes a theory.Enumeration, or data=, tokens (N, L); got {shown(world)}")
        self.world: Enumeration | None = world
        self.data: Int[Tensor, "N L"] | None = data
        self.seed: int = seeded(seed, "KLUB: seed")
        self._matrices = None if world is None else Matrices(world.length)
        self._measured, self._owner = list[tuple[Step, Measured]](), Owner()
        self._times: tuple[float, ...] = ()
        self._first: Step | None = None
        self._known: dict[tuple[Step, float, float], float] = {}

    def prepare(self, times: tuple[float, ...], first: Step | None = None) -> None:
        """Set the times of all plans, and from data the reference.

        The reference is the step ``first`` at all times, or without it the first step that is scored.
        """
        if times != self._times:
            self._measured.clear()
        self._times, self._first = times, first

    def score(self, sampler: Sampler) -> float:
        total = self.offset(sampler.process)
        for (_, t, s), step in zip(sampler.plan.intervals(), sampler.plan.steps, strict=True):
            total += self.term(sampler, step, t, s)
        return total

    def offset(self, process: Process) -> float:
        """Return KL(p_1 || prior) of a small world; 0 from data, where plans have it in common."""
        if self.world is None:
            return 0.0
        p, prior = self.world.marginal(process, 1.0), law_of_prior(process, self.world.length)
        held = p > 0
        return max(0.0, float((p[held] * (p[held] / prior[held]).log()).sum()))

    def term(self, sampler: Sampler, step: Step, t: float, s: float) -> float:
        """Return the term of a step from t to s, with the process and models of a sampler.

        Raises:
            TypeError: for an operator with memory; from data, for one that is not ``Ancestral``.
            ValueError: from data, for times that are not those of the search.
        """
        if self._owner.changed(sampler.process, sampler.models):
            self._measured.clear()
            self._known.clear()
        if self.world is None:
            return self._estimated(sampler, step, t, s)
        if (step, t, s) not in self._known:
            self._known[step, t, s] = self._exact(sampler, step, t, s)
        return self._known[step, t, s]

    def _exact(self, sampler: Sampler, step: Step, t: float, s: float) -> float:
        if step.operator.remembers:
            raise TypeError(f"KLUB: {step.operator} uses the step before it, so its bound is no sum over steps")
        assert self._matrices is not None
        assert self.world is not None
        matrix, joint = self._matrices.of(sampler, step, t, s), joint_of_times(self.world, sampler.process, t, s)
        held = joint > 0
        given = (joint / joint.sum(1, keepdim=True))[held]
        return max(0.0, float((joint[held] * (given / matrix[held]).log()).sum()))

    def _estimated(self, sampler: Sampler, step: Step, t: float, s: float) -> float:
        if t not in self._times or s not in self._times:
            raise ValueError(f"KLUB: from data it knows the times of the search, {list(self._times)}; got {t} and {s}")
        held = self._measurement(sampler, step)
        first = self._measured[0][1] if self._first is None else self._measurement(sampler, self._first)
        i, j = self._times.index(t), self._times.index(s)
        return float(held.bound[i, j] - first.fine(i, j))

    def _measurement(self, sampler: Sampler, step: Step) -> Measured:
        """Return the measurement of a step, which is made once."""
        assert self.data is not None
        held = next((found for each, found in self._measured if each == step), None)
        if held is None:
            held = measure(sampler.process, sampler.models, self.data, self._times, step=step, seed=self.seed)
            self._measured.append((step, held))
        return held

    def __repr__(self) -> str:
        held = self.world.p0 if self.world is not None else self.data
        assert held is not None
        weight = torch.arange(1, held.numel() + 1, dtype=torch.float64).sqrt()
        kind = "" if self.world is not None else f"data, seed={self.seed}, "
        return f"KLUB({kind}{tuple(held.shape)}, {float((held.cpu().double().flatten() * weight).sum())!r})"
