"""Call other packages' steps, from logits to tokens, as the packages' documentation describes.

The ``bench`` extra installs the packages. Without them the functions raise ImportError.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["block_refinement", "ddim", "euler", "installed"]

_NEEDED = "other packages' steps need them: pip install 'discdiff[bench]'"


def installed() -> bool:
    """Return whether diffusers and flow_matching are both installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("diffusers", "flow_matching"))


def ddim(logits: Tensor, tokens: Tensor, t: float, s: float) -> Callable[[], Tensor]:
    """Return a function that takes a step t -> s of diffusers' ``DiscreteDDIMScheduler`` at temperature 1.

    The step's length t - s must divide 1 and 1 - t.

    Args:
        logits: (B, L, V).
        tokens: (B, L) states of the uniform process.
        t, s: times of the linear clock, alpha = 1 - t.

    Raises:
        ImportError: if diffusers is not installed.
    """
    try:
        from diffusers import DiscreteDDIMScheduler
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    steps = round(1 / (t - s))
    scheduler: Any = DiscreteDDIMScheduler(num_inference_steps=steps)
    return lambda: scheduler.step(logits, round((1 - t) * steps), tokens, temperature=1.0).prev_sample


def euler(logits: Tensor, states: Tensor, t: float, s: float, vocab: int) -> Callable[[], Tensor]:
    """Return a function that takes a step t -> s of flow_matching's ``MixtureDiscreteEulerSolver``, linear path.

    Args:
        logits: (B, L, V).
        states: (B, L): tokens for a uniform source, tokens and masks for a masked one.
        t, s: times of the linear clock; the time of flow_matching is 1 - t.
        vocab: number of states: V for a uniform source, V + 1 for a masked one.

    Raises:
        ImportError: if flow_matching is not installed.
    """
    try:
        from flow_matching.path import MixtureDiscreteProbPath
        from flow_matching.path.scheduler import PolynomialConvexScheduler
        from flow_matching.solver import MixtureDiscreteEulerSolver
    except ImportError as error:
        raise ImportError(_NEEDED) from error

    class Stop(Exception):  # the solver's last step is another one, so the second call of the model ends it
        pass

    given: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        given.append(x)
        if len(given) == 1:
            return logits.softmax(-1)
        raise Stop

    path = MixtureDiscreteProbPath(PolynomialConvexScheduler(1.0))
    solver: Any = MixtureDiscreteEulerSolver(model, path, vocab)
    times = torch.tensor([1 - t, 1 - s, 1.0])

    def step() -> Tensor:
        given.clear()
        with contextlib.suppress(Stop):
            solver.sample(states, step_size=None, time_grid=times)
        return given[-1]

    return step


def block_refinement(logits: Tensor, z: Tensor, steps: int, sites: int) -> Callable[[], Tensor]:
    """Return a function that takes a step of diffusers' ``BlockRefinementScheduler`` on a block.

    The block is the first ``sites`` sites. The step keeps the draws of highest confidence.

    Args:
        logits: (B, L, V); only those of the block are read.
        z: (B, L) states, V where masked.
        steps: the number of steps in which a block is filled.
        sites: the number of sites of the block.

    Raises:
        ImportError: if diffusers is not installed.
    """
    try:
        from diffusers import BlockRefinementScheduler
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    scheduler: Any = BlockRefinementScheduler(sites, steps)
    scheduler.set_timesteps(steps)
    block, mask = logits[:, :sites].contiguous(), logits.shape[-1]
    state = z[:, :sites].contiguous()
    return lambda: (
        scheduler.step(block, 0, state, mask_token_id=mask, temperature=1.0, sampling_method="multinomial").prev_sample
    )
