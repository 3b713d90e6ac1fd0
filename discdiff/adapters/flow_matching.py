r"""Use discrete flow-matching models as denoisers, and run operators through the interface of flow_matching's solver.

A mixture path of flow_matching replaces noise by data x1 with probability kappa(tau), tau from 0 (noise) to 1 (data).
Its model gives the posterior p(x1 | x_tau) at every site. With t = 1 - tau this means for the survival probability
alpha, the denoiser D and the law pi of a noise token:

    alpha(t) = kappa(1 - t),    D = p(x1 | x_tau),    pi = the source law

The process is ``Masked`` if the source is a single token, else ``Uniform`` or ``Marginal``. The package flow_matching
is not imported: any paths, schedulers and models with its methods work.

Reference: Discrete Flow Matching (Gat et al., 2024, https://arxiv.org/abs/2407.15595).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import array, check_law, real, whole
from discdiff.denoiser import Denoiser
from discdiff.operator import Operator
from discdiff.process import Marginal, Masked, Process, Schedule, Uniform
from discdiff.sampling import Sampler

__all__ = ["Kappa", "OperatorSolver", "flow_denoiser", "flow_process"]


@dataclass(frozen=True, eq=False)
class Kappa(Schedule):
    """Schedule alpha(t) = kappa(1 - t) of a flow-matching scheduler.

    Two such schedules are equal if their schedulers have the same class and contents.

    Args:
        scheduler: a convex scheduler with a method ``kappa_inverse``. scheduler(tau) returns an object with
            ``alpha_t`` = kappa, ``sigma_t`` = 1 - kappa and ``d_alpha_t``, the derivative of kappa.

    Raises:
        ValueError: if kappa does not increase to 1 at tau = 1, or ``sigma_t`` is not 1 - kappa (Gaussian paths).
    """

    scheduler: Any

    def __post_init__(self) -> None:
        tau = torch.linspace(0, 1, 101, dtype=torch.float64)
        said = self.scheduler(tau)
        convex = torch.allclose(said.alpha_t + said.sigma_t, torch.ones_like(tau))
        if not convex or float(said.alpha_t[-1]) != 1 or bool((said.alpha_t.diff() <= 0).any()):
            raise ValueError(
                f"Kappa: needs a convex scheduler, kappa rising to 1 and sigma = 1 - kappa, got {self.scheduler!r}"
            )

    def _alpha(self, t: Tensor) -> Tensor:
        return self.scheduler(1 - t).alpha_t

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -self.scheduler(1 - t).d_alpha_t

    def _time(self, alpha: Tensor) -> Tensor:
        return (1 - self.scheduler.kappa_inverse(alpha)).clamp(0.0, 1.0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kappa) or type(self.scheduler) is not type(other.scheduler):
            return NotImplemented if not isinstance(other, Kappa) else False
        ours, theirs = _held(self.scheduler), _held(other.scheduler)
        return self.scheduler is other.scheduler or (
            ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)
        )

    def __hash__(self) -> int:
        return hash(type(self.scheduler))

    def __repr__(self) -> str:
        return f"Kappa({type(self.scheduler).__name__})"


def _held(scheduler: object) -> dict[str, object]:
    """Return a scheduler's attributes by name: the numbers that define it."""
    return dict(getattr(scheduler, "__dict__", {}))


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or bool(one == other)


def flow_process(path: Any, source: Float[Tensor, " V"]) -> Process:  # noqa: ANN401
    """Return the forward process from data to noise that corresponds to a mixture path.

    Args:
        path: a path with a convex ``scheduler``.
        source: (V,) law of a noise token. A token with probability 1 is the mask; its id is one of the V.

    Raises:
        ValueError: if ``source`` is not a probability law, or the scheduler is not convex.
    """
    law, clock = check_law(source, "flow_process: source"), Kappa(path.scheduler)
    if bool((law == 1).any()):
        return Masked(len(law), clock, mask_id=int(law.argmax()))
    if torch.allclose(law, law.mean()):
        return Uniform(len(law), clock)
    return Marginal(law, clock)


def flow_denoiser(
    model: Callable[..., Tensor],
    process: Process,
    *,
    logits: bool = False,
    extras: Mapping[str, object] | None = None,
    length: int | None = None,
) -> Denoiser:
    """Make a denoiser of a flow-matching model.

    Args:
        model: called as model(x=x, t=tau, **extras) with tau (B,); returns (B, L, V) posterior probabilities of x1.
            All sites of a row get the same time, so infill is exact only if the source is a mask.
        process: from ``flow_process``.
        logits: whether the model returns logits and not probabilities, as a network trained by cross-entropy does.
        extras: further arguments of the model, the same for the whole batch.
        length: the sequence length, if the model accepts only one.
    """
    told = dict(extras or {})

    def fn(x: Tensor, time: Tensor | None) -> Tensor:
        assert time is not None
        said = model(x=x, t=1 - time, **told)
        return said if logits else said.log()

    return Denoiser(fn, process, "denoiser", scalar_time=True, length=length)


class OperatorSolver:
    """An operator with the interface of flow_matching's ``MixtureDiscreteEulerSolver``.

    Args:
        model: returns posterior probabilities, as for ``flow_denoiser``.
        path: a mixture path.
        vocabulary_size: V, the number of tokens; a mask counts as one of them.
        source_distribution_p: (V,) the law of a noise token; required here, because it determines the process.
        operator: the operator of one step, such as ``Ancestral()``. With a mask as source, ``DFM()`` has the law of the
            Euler solver.

    Raises:
        TypeError, ValueError: for an operator that is not a predictor, or a source that is not a law on V tokens.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        path: Any,  # noqa: ANN401
        vocabulary_size: int,
        source_distribution_p: Float[Tensor, " V"],
        *,
        operator: Operator,
    ) -> None:
        vocabulary_size = whole(vocabulary_size, "OperatorSolver: vocabulary_size", 1)
        source_distribution_p = array(source_distribution_p, "OperatorSolver: source_distribution_p")
        if tuple(source_distribution_p.shape) != (vocabulary_size,):
            raise ValueError(
                f"OperatorSolver: source_distribution_p must be ({vocabulary_size},), "
                f"got {tuple(source_distribution_p.shape)}"
            )
        self.model: Callable[..., Tensor] = model
        self.operator: Operator = operator
        self.process: Process = flow_process(path, source_distribution_p)
        self.sampler(step_size=0.5)  # raises at once if the operator is invalid

    def sampler(
        self,
        step_size: float | None,
        time_grid: Float[Tensor, " N"] | None = None,
        extras: Mapping[str, object] | None = None,
        length: int | None = None,
    ) -> Sampler:
        """Return the sampler that ``sample`` runs, for instance for ``T.law``; its ``repr`` describes the run.

        ``step_size`` and ``time_grid``, (N,) increasing times tau in [0, 1], are those of ``sample``.

        Raises:
            ValueError: if times do not increase within [0, 1], or ``step_size`` is not positive.
        """
        grid = [0.0, 1.0] if time_grid is None else [float(tau) for tau in time_grid]
        if step_size is not None:
            step_size = real(step_size, "OperatorSolver: step_size", "(0, inf)")
            first, last = grid[0], grid[-1]
            count = math.ceil((last - first) / step_size - 1e-9)
            grid = [*(first + step_size * n for n in range(count)), last]
        model = flow_denoiser(self.model, self.process, extras=extras, length=length)
        return Sampler(self.process, model, self.operator, grid=[1 - tau for tau in grid])

    def sample(
        self,
        x_init: Int[Tensor, "B L"],
        step_size: float | None,
        div_free: float = 0.0,
        dtype_categorical: torch.dtype = torch.float32,
        time_grid: Float[Tensor, " N"] | None = None,
        return_intermediates: bool = False,
        verbose: bool = False,
        *,
        seed: int | None = None,
        **model_extras: object,
    ) -> Int[Tensor, "*N B L"]:
        """Return tokens (B, L) at the end of the time grid, equal to those of ``sampler(...).sample(initial=x_init)``.

        Args:
            x_init: (B, L) tokens at the first time.
            step_size: the length of equal steps from the first to the last time; only the last step may be shorter.
                None makes a step from each time of the grid to the next.
            div_free: must be 0. For more stochasticity give another operator: ``DFM(eta)``, ``ReMDM``, or one followed
                by a corrector.
            dtype_categorical: ignored; draws are as exact as the model's output.
            time_grid: (N,) increasing times tau in [0, 1]; [0, 1] by default. If the last time is below 1, the tokens
                keep the noise of that time, unlike those of ``MixtureDiscreteEulerSolver``.
            return_intermediates: whether to return tokens (N, B, L): for each time of ``time_grid``, the state of the
                run at the nearest time.
            verbose: show a progress bar on standard error.
            seed: the key of the randomness; drawn from torch's global generator if None.
            model_extras: further arguments of the model.

        Raises:
            ValueError: for unknown tokens, times that do not increase within [0, 1], or a ``div_free`` other than 0.
        """
        if div_free != 0:
            raise ValueError("OperatorSolver: div_free must be 0; give a stochastic operator, such as DFM(eta=1.0)")
        batch, length = x_init.shape
        sampler = self.sampler(step_size, time_grid, model_extras)
        out = sampler.sample(
            batch,
            length,
            seed=seed,
            initial=x_init,
            record=return_intermediates,
            progress=verbose,
            device=x_init.device,
        )
        if out.trajectory is None:
            return out.tokens
        wanted = torch.tensor([0.0, 1.0]) if time_grid is None else time_grid.cpu()
        at = (1 - torch.tensor(sampler.grid)[None] - wanted[:, None]).abs().argmin(-1)
        return out.trajectory[at.to(out.trajectory.device)]
