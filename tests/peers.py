"""Samplers of other packages from the index, run on an exact denoiser of three sites: what ours are compared with.

Each is called as sampler(world, nfe, batch) and returns (B, L) tokens after ``nfe`` denoiser calls, or None where it
cannot be run with that many. Nothing is tuned: temperature 1 where there is one, and the packages' defaults beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AmusedScheduler,
    BlockRefinementScheduler,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    VQDiffusionScheduler,
)
from flow_matching.path import MixtureDiscreteProbPath
from flow_matching.path.scheduler import PolynomialConvexScheduler
from flow_matching.solver import MixtureDiscreteEulerSolver
from torch import Tensor

import discdiff as dd
from discdiff import theory as T

Peer = Callable[[T.Enumeration, int, int], Tensor | None]


def _believes(world: T.Enumeration, process: dd.Process) -> Callable[[Tensor, float], Tensor]:
    """log D at one time for all rows, looked up in a table of all states."""
    model, base = world.denoiser(process, predicts="denoiser"), process.states
    states = torch.cartesian_prod(*[torch.arange(base)] * world.length)
    weights = base ** torch.arange(world.length - 1, -1, -1)
    return lambda x, t: model(states, t).denoiser[(x * weights).sum(-1)]


def ddim(temperature: float = 1.0, corrector: str | None = None) -> Peer:
    """DiscreteDDIMScheduler, with one Gibbs sweep a step where a selection is named."""

    def run(world: T.Enumeration, nfe: int, batch: int) -> Tensor | None:
        steps = nfe if corrector is None else nfe // 2
        believes = _believes(world, dd.Uniform(world.alphabet, dd.Linear()))
        scheduler: Any = DiscreteDDIMScheduler(steps, corrector_selection=corrector or "random")
        x = torch.randint(world.alphabet, (batch, world.length))
        for n in range(steps):
            x = scheduler.step(believes(x, 1 - n / steps), n, x, temperature=temperature).prev_sample
            if corrector is not None and n + 1 < steps:
                x = scheduler.step_correct(believes(x, 1 - (n + 1) / steps), n, x).prev_sample
        return x

    return run


def ddim_correct(selection: str, sites: int = 1) -> Callable[[T.Enumeration, Tensor], Tensor]:
    """DiscreteDDIMScheduler.step_correct alone, at t = 0.4: from states to states."""

    def run(world: T.Enumeration, x: Tensor) -> Tensor:
        believes = _believes(world, dd.Uniform(world.alphabet, dd.Linear()))
        scheduler: Any = DiscreteDDIMScheduler(10, corrector_k=sites, corrector_selection=selection)
        corrected: Tensor = scheduler.step_correct(believes(x, 0.4), 5, x).prev_sample
        return corrected

    return run


def block_refinement(masked: bool, threshold: float) -> Peer:
    """BlockRefinementScheduler on one block, its mask mode or its uniform mode."""

    def run(world: T.Enumeration, nfe: int, batch: int) -> Tensor | None:
        vocab = world.alphabet
        process = (dd.Masked if masked else dd.Uniform)(vocab, dd.Linear())
        scheduler: Any = BlockRefinementScheduler(world.length, nfe, threshold)
        scheduler.set_timesteps(nfe)
        batch = min(batch, 20_000) if masked else batch  # it loops over rows
        x = torch.full((batch, world.length), vocab) if masked else torch.randint(vocab, (batch, world.length))
        believes = _believes(world, process)
        for n in range(nfe):
            logits = believes(x, 1 - n / nfe)
            x = scheduler.step(
                logits, n, x, mask_token_id=vocab if masked else None, temperature=1.0, sampling_method="multinomial"
            ).prev_sample
        return x

    return run


def entropy_bound() -> Peer:
    """EntropyBoundScheduler at temperature 1; the last step's tokens are what it would return."""

    def run(world: T.Enumeration, nfe: int, batch: int) -> Tensor | None:
        believes = _believes(world, dd.Uniform(world.alphabet, dd.Linear()))
        scheduler: Any = EntropyBoundScheduler(t_max=1.0, t_min=1.0, num_inference_steps=nfe)
        x, said = torch.randint(world.alphabet, (batch, world.length)), None
        for n in range(nfe):
            said = scheduler.step(believes(x, 1 - n / nfe), n, x)
            x = said.prev_sample
        return None if said is None else said.sampled_tokens

    return run


def amused(temperature: tuple[int, int], schedule: str) -> Peer:
    """AmusedScheduler, the MaskGIT order."""

    def run(world: T.Enumeration, nfe: int, batch: int) -> Tensor | None:
        process = dd.Masked(world.alphabet, dd.Linear())
        scheduler: Any = AmusedScheduler(process.mask_id, schedule)
        scheduler.set_timesteps(nfe, temperature)
        x, believes = torch.full((batch, world.length), process.mask_id), _believes(world, process)
        for n, step in enumerate(scheduler.timesteps):
            x = scheduler.step(believes(x, max(1 - n / nfe, 0.01)).float(), step, x).prev_sample
        return x

    return run


def vq_diffusion() -> Peer:
    """VQDiffusionScheduler: mask and uniform tokens together, its own schedule."""

    def run(world: T.Enumeration, nfe: int, batch: int) -> Tensor | None:
        if nfe < 2:
            return None
        vocab, length = world.alphabet, world.length
        scheduler: Any = VQDiffusionScheduler(vocab + 1, nfe)
        scheduler.set_timesteps(nfe)
        states = torch.cartesian_prod(*[torch.arange(vocab + 1)] * length)
        weights = (vocab + 1) ** torch.arange(length - 1, -1, -1)
        x = torch.full((batch, length), vocab)
        for t in scheduler.timesteps:
            keep, noise, mask = (
                getattr(scheduler, name)[t].double().exp()
                for name in ("log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct")
            )
            forward = torch.cat([keep * torch.eye(vocab) + noise, mask.expand(vocab, 1)], -1)
            evidence = forward.T[states]
            d = world.leave_one_out(evidence) * evidence
            said = (d / d.sum(-1, keepdim=True))[(x * weights).sum(-1)].log()
            x = scheduler.step(said.transpose(1, 2).float(), t, x).prev_sample
        return x

    return run


def flow_matching(masked: bool, div_free: float) -> Peer:
    """MixtureDiscreteEulerSolver on the linear path; the divergence-free term starts where it is finite."""

    def run(world: T.Enumeration, nfe: int, batch: int) -> Tensor | None:
        vocab = world.alphabet
        process = (dd.Masked if masked else dd.Uniform)(vocab, dd.Linear())
        believes, size = _believes(world, process), process.states

        def model(x: Tensor, t: Tensor) -> Tensor:
            p = believes(x, 1 - float(t[0])).exp().float()
            return torch.nn.functional.pad(p, (0, size - vocab))

        noise = torch.nn.functional.one_hot(torch.tensor(vocab), size) if masked else torch.full((size,), 1 / size)
        path = MixtureDiscreteProbPath(PolynomialConvexScheduler(1.0))
        solver: Any = MixtureDiscreteEulerSolver(model, path, size, noise.float())
        x = torch.full((batch, world.length), vocab) if masked else torch.randint(vocab, (batch, world.length))
        times = torch.linspace(0, 1, nfe + 1)

        def stochastic(t: Tensor) -> float:
            return div_free if float(t) > 0 else 0.0

        return solver.sample(x, step_size=None, div_free=stochastic if div_free else 0.0, time_grid=times)

    return run


PEERS: dict[str, dict[str, Peer]] = {
    "uniform": {
        "diffusers DiscreteDDIM, temperature 1": ddim(),
        "diffusers DiscreteDDIM, its default temperature 0": ddim(temperature=0.0),
        "diffusers DiscreteDDIM + random Gibbs": ddim(corrector="random"),
        "diffusers DiscreteDDIM + its default Gibbs": ddim(corrector="lowest_log_margin"),
        "diffusers BlockRefinement, uniform mode": block_refinement(masked=False, threshold=0.95),
        "diffusers EntropyBound, temperature 1": entropy_bound(),
        "flow_matching Euler": flow_matching(masked=False, div_free=0.0),
        "flow_matching Euler, div_free 1": flow_matching(masked=False, div_free=1.0),
    },
    "masked": {
        "diffusers BlockRefinement, mask mode": block_refinement(masked=True, threshold=0.95),
        "diffusers Amused, its default temperature": amused((2, 0), "cosine"),
        "diffusers Amused, no noise, linear": amused((0, 0), "linear"),
        "diffusers VQDiffusion": vq_diffusion(),
        "flow_matching Euler": flow_matching(masked=True, div_free=0.0),
        "flow_matching Euler, div_free 1": flow_matching(masked=True, div_free=1.0),
    },
}


def chi_square_divergence(tokens: Tensor, world: T.Enumeration) -> tuple[float, float]:
    """sum (q - p0)^2 / p0 of the law that tokens were drawn from, without its bias, and a standard error."""
    weights = world.alphabet ** torch.arange(world.length - 1, -1, -1)
    count = torch.bincount((tokens * weights).sum(-1), minlength=len(world.p0)).double()
    total = len(tokens)
    bias = (1 / world.p0 * (count / total) * (1 - count / total)).sum() / total
    value = float((((count / total) - world.p0) ** 2 / world.p0).sum() - bias)
    spread = 2 * (count / total - world.p0) / world.p0
    variance = float((count / total * spread**2).sum() - (count / total * spread).sum() ** 2) / total
    return value, (max(variance, 0.0) + 2 * len(world.p0) / total**2) ** 0.5
